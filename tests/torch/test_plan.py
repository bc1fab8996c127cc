"""The plan as an operator."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prmim_core
from prmim_core import Grid, Schedule, TokenCounts, count_tokens, counter_noise, random_decoded
from prmim_torch import create_method, make_plan, plan


def lattice(grid, counts, noise, is_visible):
    """Decode masked tokens in checkerboard order; within a colour, by noise."""
    colour = (sum(grid.coordinates(noise)) + noise[:, :1]) & 1
    return random_decoded(counts.decoded, (colour << 30) + (noise >> 2), is_visible)


SCHEDULES = [
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12)),
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), stages=3, furthest_from="none"),
    Schedule(Grid((4, 6), spacing=(3, 1)), TokenCounts(6, 6, 12)),
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), throwing="random"),
    Schedule(Grid((2, 4, 4)), TokenCounts(4, 10, 18), throwing="cell"),
    Schedule(Grid((12,)), TokenCounts(3, 9, 0)),
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 2)),
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 1), throwing="cell"),
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), throwing=lattice),
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 2), throwing=lattice),
]


def noise_for(schedule, device="cpu", batch=3):
    return counter_noise(0, 0, torch.arange(batch, device=device), schedule.counts.num_tokens)


@pytest.mark.parametrize(
    "schedule",
    SCHEDULES,
    ids=lambda s: f"{getattr(s.throwing, '__name__', s.throwing)}-{s.furthest_from}-{s.grid.axes}-{s.unit}",
)
def test_plan_is_the_cores(schedule, device):
    noise = noise_for(schedule, device)
    made = make_plan(schedule, noise)
    assert made.order.dtype == torch.int64
    assert made.order.device.type == device.type
    assert made.schedule == schedule
    expected = prmim_core.make_plan(schedule, noise.cpu().numpy()).order
    np.testing.assert_array_equal(made.order.cpu().numpy(), expected)


def test_on_a_cpu_the_core_works_on_numpy_views(monkeypatch):
    seen = []
    original = prmim_core.make_plan

    def spy(schedule, noise, *arguments, **options):
        seen.append(noise)
        return original(schedule, noise, *arguments, **options)

    monkeypatch.setattr(prmim_core, "make_plan", spy)
    noise = noise_for(SCHEDULES[0])
    make_plan(SCHEDULES[0], noise)
    assert isinstance(seen[0], np.ndarray)
    assert seen[0].ctypes.data == noise.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_taken_as_float32(dtype):
    schedule = Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), throwing="weighted", unit=(2, 2))
    noise = noise_for(schedule)
    weights = torch.rand(noise.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = prmim_core.make_plan(schedule, noise.numpy(), weights=weights.float().numpy())
    np.testing.assert_array_equal(make_plan(schedule, noise, weights=weights).order.numpy(), expected.order)


def test_the_kernel_samples_where_there_is_triton_and_a_gpu(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton: pip install 'prmim[gpu-tests]'")
    from prmim_torch import furthest

    on_gpu = SimpleNamespace(is_cuda=True)
    assert plan._sampler(on_gpu) is furthest.furthest_point_sampling
    assert plan._sampler(SimpleNamespace(is_cuda=False)) is prmim_core.furthest_point_sampling
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan._sampler(on_gpu) is prmim_core.furthest_point_sampling


def test_weights_and_visible_tokens_go_through():
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing="weighted")
    noise = noise_for(schedule)
    weights = torch.rand(noise.shape, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[3, 1, 0, 15]] * 3)
    made = make_plan(schedule, noise, visible=visible, weights=weights)
    expected = prmim_core.make_plan(schedule, noise.numpy(), visible=visible.numpy(), weights=weights.numpy())
    np.testing.assert_array_equal(made.order.numpy(), expected.order)
    assert made.visible.tolist() == visible.tolist()


@pytest.mark.parametrize("throwing", ["weighted", lattice])
def test_decoded_tokens_go_through(throwing, device):
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing=throwing)
    noise = noise_for(schedule)
    visible, decoded = np.array([[3, 1, 0, 15]] * 3), np.array([[4, 2, 7, 9]] * 3)
    given = (torch.from_numpy(tokens).to(device) for tokens in (visible, decoded))
    made = make_plan(schedule, noise.to(device), *given)
    expected = prmim_core.make_plan(schedule, noise.numpy(), visible, decoded)
    np.testing.assert_array_equal(made.order.cpu(), expected.order)
    assert made.decoded.tolist() == decoded.tolist()


def test_a_function_is_compiled_with_the_plan():
    schedule = Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), throwing=lattice)
    (calls,) = calls_of_graphs(lambda noise: make_plan(schedule, noise).order, noise_for(schedule))
    assert sum("plan_order" in call for call in calls) == 1
    assert any("lshift" in call for call in calls)  # the function's own


@pytest.mark.parametrize("with_visible", [False, True])
def test_operator_passes_opcheck(with_visible):
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    noise = noise_for(schedule)
    visible, decoded = (noise.argsort(1)[:, :8].split(4, dim=1)) if with_visible else (None, None)
    arguments = (noise, visible, None, [4, 4], [1, 1], [4, 4, 8], 2, "furthest", "visible", (), decoded)
    torch.library.opcheck(torch.ops.prmim.plan_order.default, arguments)


def calls_of_graphs(function, *arguments):
    """Compile a function, compare results, and return each graph's operators."""
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    expected = function(*arguments)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(compiled(*arguments), expected)
    return graphs


@pytest.mark.parametrize("side", [4, 14])
def test_a_traced_plan_is_one_operator(side):
    grid = Grid((side, side))
    schedule = Schedule(grid, count_tokens(grid.num_tokens, 0.75, 0.5))
    (calls,) = calls_of_graphs(lambda noise: make_plan(schedule, noise).decoded + 1, noise_for(schedule))
    assert sum("plan_order" in call for call in calls) == 1
    assert len(calls) <= 4  # and a detach, a slice, and the sum


def test_a_compiled_step_holds_the_plan_whole():
    options = {"image_size": (16, 16), "patch_size": (2, 2), "embed_dim": 16, "depth": 1, "num_heads": 2}
    method = create_method("mae", **options, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    (calls,) = calls_of_graphs(lambda *a: method(*a).loss, images, noise_for(method.config.schedule, batch=2))
    assert sum("plan_order" in call for call in calls) == 1
    assert not [call for call in calls if "argmax" in call or "minimum" in call]  # 16 picks would be 16 of each


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise": [[0] * 16]}, TypeError, r"noise: expected a torch\.Tensor, got list"),
        ({"noise": np.zeros((2, 16))}, TypeError, r"noise: expected a torch\.Tensor, got ndarray"),
        ({"visible": np.zeros((2, 4), int)}, TypeError, r"visible: expected a torch\.Tensor, got ndarray"),
        ({"decoded": np.zeros((2, 4), int)}, TypeError, r"decoded: expected a torch\.Tensor, got ndarray"),
        (
            {"decoded": torch.zeros(2, 16, dtype=torch.bool)},
            TypeError,
            r"decoded: expected token indices, got a boolean mask; \(~mask\)\.argsort\(1\).*",
        ),
        (
            {"visible": torch.arange(4).expand(2, 4), "decoded": torch.arange(3, 7).expand(2, 4)},
            ValueError,
            "decoded: expected distinct masked tokens in every row, got an invalid row 0",
        ),
        ({"noise": None}, TypeError, "noise: expected an array, got NoneType"),
        ({"schedule": (4, 4)}, TypeError, "schedule: expected a Schedule, got tuple"),
        (
            {"noise": torch.zeros(2, 16, dtype=torch.bool)},
            TypeError,
            r"noise: expected integers or real numbers, got torch\.bool",
        ),
        ({"noise": torch.full((2, 16), torch.nan)}, ValueError, "noise: expected numbers, got NaN"),
        (
            {"visible": torch.zeros(2, 4, dtype=torch.int64)},
            ValueError,
            "visible: expected distinct tokens in every row, got an invalid row 0",
        ),
        (
            {"visible": torch.full((2, 4), 16)},
            IndexError,
            r"visible: expected tokens in \[0, 16\), got values from 16 to 16",
        ),
        ({"visible": torch.zeros(2, 4)}, TypeError, r"visible: expected integers, got torch\.float32"),
        (
            {"noise": torch.zeros(2, 9, dtype=torch.int32)},
            ValueError,
            r"noise: expected shape \(batch, 16\), got \(2, 9\)",
        ),
        (
            {"noise": torch.zeros(16, dtype=torch.int32)},
            ValueError,
            r"noise: expected shape \(batch, 16\), got \(16,\)",
        ),
        (
            {"visible": torch.zeros(2, 5, dtype=torch.int64)},
            ValueError,
            r"visible: expected shape \(2, 4\), got \(2, 5\)",
        ),
        ({"weights": torch.zeros(2, 5)}, ValueError, r"weights: expected .*\(2, 16\), got \(2, 5\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    throwing = "weighted" if "weights" in arguments else "furthest"
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing=throwing)
    with pytest.raises(error, match=f"^{message}$"):
        make_plan(**{"schedule": schedule, "noise": torch.zeros(2, 16, dtype=torch.int32), **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_noise_may_be_of_any_real_dtype(dtype, device):
    schedule = SCHEDULES[0]
    noise = (100 * torch.rand(3, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = prmim_core.make_plan(schedule, noise.double().numpy()).order
    np.testing.assert_array_equal(make_plan(schedule, noise.to(device)).order.cpu(), expected)


def test_an_empty_batch_has_an_empty_plan(device):
    made = make_plan(SCHEDULES[0], torch.zeros(0, 24, device=device))
    assert made.order.shape == (0, 24)
    assert made.restore.shape == (0, 24)
    made.check()


def test_a_compiled_plan_on_a_cpu_checks_its_values():
    def order(noise, visible):
        return make_plan(SCHEDULES[0], noise, visible).order

    compiled = torch.compile(order, fullgraph=True, backend="eager")
    noise, visible = torch.rand(3, 24), torch.arange(6).expand(3, 6)
    assert torch.equal(compiled(noise, visible), order(noise, visible))
    with pytest.raises(ValueError, match=r"^visible: expected distinct tokens in every row, got an invalid row 0$"):
        compiled(noise, visible // 2)
    with pytest.raises(ValueError, match=r"^noise: expected numbers, got NaN$"):
        compiled(noise * torch.nan, visible)

"""The plan as an operator."""

import numpy as np
import pytest
import torch

import prmim_core
from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_torch import make_plan

SCHEDULES = [
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12)),
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), stages=3, seed="none"),
    Schedule(Grid((4, 6), spacing=(3, 1)), TokenCounts(6, 6, 12)),
    Schedule(Grid((4, 6)), TokenCounts(6, 6, 12), throwing="random"),
    Schedule(Grid((2, 4, 4)), TokenCounts(4, 10, 18), throwing="cell"),
    Schedule(Grid((12,)), TokenCounts(3, 9, 0)),
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 2)),
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 1), throwing="cell"),
]


def noise_for(schedule, device="cpu", batch=3):
    return counter_noise(0, 0, torch.arange(batch, device=device), schedule.counts.num_tokens)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.throwing}-{s.seed}-{s.grid.axes}-{s.unit}")
def test_plan_is_the_cores(schedule, device):
    noise = noise_for(schedule, device)
    plan = make_plan(schedule, noise)
    assert plan.order.dtype == torch.int64
    assert plan.order.device.type == device.type
    assert plan.schedule == schedule
    expected = prmim_core.make_plan(schedule, noise.cpu().numpy()).order
    np.testing.assert_array_equal(plan.order.cpu().numpy(), expected)


def test_weights_and_visible_tokens_go_through():
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing="weighted")
    noise = noise_for(schedule)
    weights = torch.rand(noise.shape, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[3, 1, 0, 15]] * 3)
    plan = make_plan(schedule, noise, visible=visible, weights=weights)
    expected = prmim_core.make_plan(schedule, noise.numpy(), visible=visible.numpy(), weights=weights.numpy())
    np.testing.assert_array_equal(plan.order.numpy(), expected.order)
    assert plan.visible.tolist() == visible.tolist()


@pytest.mark.parametrize("with_visible", [False, True])
def test_operator_passes_opcheck(with_visible):
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    noise = noise_for(schedule)
    visible = noise.argsort(1)[:, :4] if with_visible else None
    arguments = (noise, visible, None, [4, 4], [1, 1], [4, 4, 8], 2, "furthest", "visible")
    torch.library.opcheck(torch.ops.prmim.plan_order.default, arguments)


def test_a_traced_plan_is_one_operator():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    noise = noise_for(schedule)
    traced = torch.compile(lambda noise: make_plan(schedule, noise).decoded + 1, fullgraph=True, backend=backend)
    assert torch.equal(traced(noise), make_plan(schedule, noise).decoded + 1)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert "plan_order" in str(calls[0].target)
    assert len(calls) <= 3  # and a slice, and the sum


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise": torch.zeros(2, 16)}, TypeError, "noise: expected integers, got torch.float32"),
        ({"noise": torch.zeros(2, 16, dtype=torch.bool)}, TypeError, "noise: expected integers, got torch.bool"),
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
        ({"weights": torch.zeros(2, 5)}, ValueError, r"weights: expected shape \(2, 16\), got \(2, 5\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    with pytest.raises(error, match=f"^{message}$"):
        make_plan(schedule, **{"noise": torch.zeros(2, 16, dtype=torch.int32), **arguments})

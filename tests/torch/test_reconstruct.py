"""Progressive reconstruction as a module."""

import numpy as np
import pytest
import torch
from torch import nn

from prmim_core import Grid, Plan, Schedule, TokenCounts, counter_noise
from prmim_reference import counts as reference_counts
from prmim_reference import reconstruct as reference
from prmim_torch import ProgressiveReconstruction, make_plan

RECONSTRUCTIONS = ["kernel", "interpolate", "conv"]
GRIDS = [
    Grid((9,)),
    Grid((4, 5)),
    Grid((4, 5), spacing=(2, 1)),
    Grid((2, 3, 3), spacing=(3, 1, 1)),
]


def make_case(grid, reconstruction, stages=2, device="cpu", dtype=torch.float64, dim=8):
    quarter = grid.num_tokens // 4
    counts = TokenCounts(quarter, quarter, grid.num_tokens - 2 * quarter)
    schedule = Schedule(grid, counts, stages=stages)
    plan = make_plan(schedule, counter_noise(0, 0, torch.arange(2, device=device), grid.num_tokens))
    generator = torch.Generator().manual_seed(0)
    module = ProgressiveReconstruction(dim, grid, reconstruction=reconstruction)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    features = torch.randn(2, 2 * quarter, dim, generator=generator, dtype=dtype)
    return module.to(device, dtype), features.to(device), plan


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_features_are_the_reference_ones(grid, reconstruction, stages):
    module, features, plan = make_case(grid, reconstruction, stages)
    rebuilt = module(features, plan)
    assert torch.equal(rebuilt[:, : features.shape[1]], features)
    counts = plan.schedule.counts
    for image in range(2):
        expected = reference.progressive_reconstruction(
            features[image].numpy(),
            plan.order[image].tolist(),
            reference_counts.TokenCounts(counts.visible, counts.decoded, counts.thrown),
            grid.shape,
            stages=stages,
            reconstruction=reconstruction,
            parameters={name: p.detach().numpy() for name, p in module.named_parameters()},
            spacing=grid.spacing,
        )
        np.testing.assert_allclose(rebuilt[image].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_without_visible_features_they_are_the_reference_ones(reconstruction):
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    rebuilt = module(features[:, 5:], plan, visible_features=False)
    expected = reference.progressive_reconstruction(
        features[1, 5:].numpy(),
        plan.order[1].tolist(),
        reference_counts.TokenCounts(5, 5, 10),
        (4, 5),
        stages=2,
        reconstruction=reconstruction,
        parameters={name: p.detach().numpy() for name, p in module.named_parameters()},
        visible_features=False,
    )
    np.testing.assert_allclose(rebuilt[1].detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"^features: expected shape \(2, 5, dim\), got \(2, 10, 8\)$"):
        module(features, plan, visible_features=False)


class Scaled(nn.Module):
    """The mean of the known features, scaled by a weight per token."""

    def __init__(self, dim, grid):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, grid.num_tokens * dim).reshape(grid.num_tokens, dim))

    def forward(self, features, known, thrown):
        return self.scale[thrown] * features.mean(1, keepdim=True)


def test_a_module_of_ones_own_mixes():
    _, features, plan = make_case(Grid((4, 5)), "kernel")
    module = ProgressiveReconstruction(8, Grid((4, 5)), mix=Scaled(8, Grid((4, 5)))).double()
    assert module.no_weight_decay() == {"norm.weight", "norm.bias"}  # the trainer decides on those of the mix
    assert {name for name, _ in module.named_parameters()} == {"mix.scale", "norm.weight", "norm.bias"}
    rebuilt = module(features, plan)
    mean = features.mean(1, keepdim=True)
    expected = nn.functional.layer_norm(module.mix.scale[plan.stage(1)] * mean, (8,), eps=1e-6)
    torch.testing.assert_close(rebuilt[:, 10:15], expected)
    rebuilt.sum().backward()
    assert module.mix.scale.grad.abs().sum() > 0
    assert torch.equal(ProgressiveReconstruction(8, module.grid, mix=lambda f, k, t: f[:, : t.shape[1]])
                       (features, plan)[:, :10], features)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mix": "mean"}, TypeError, "mix: expected a module or a function, got str"),
        (
            {"mix": nn.Identity(), "reconstruction": "conv"},
            ValueError,
            "mix: expected None with reconstruction 'conv', got Identity",
        ),
    ],
)
def test_wrong_mixes(options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ProgressiveReconstruction(8, Grid((4,)), **options)


def test_a_mix_returns_features_of_all_thrown_tokens():
    _, features, plan = make_case(Grid((4, 5)), "kernel", dtype=torch.float32)
    module = ProgressiveReconstruction(8, Grid((4, 5)), mix=lambda features, known, thrown: features[:, :1])
    with pytest.raises(
        ValueError, match=r"^mix: expected reconstructed features of shape \(2, 5, 8\), got \(2, 1, 8\)$"
    ):
        module(features, plan)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_gradients(reconstruction):
    module, features, plan = make_case(Grid((3, 4)), reconstruction, dim=4)
    names = [name for name, _ in module.named_parameters()]

    def rebuild(features, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (features, plan))

    inputs = [features.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(rebuild, inputs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_table_starts_at_minus_the_squared_distance(grid):
    table = ProgressiveReconstruction(8, grid, heads=2).table
    assert table.tolist() == reference.initial_table(grid.shape, 2, grid.spacing).tolist()


def test_parameters():
    grid = Grid((4, 5))
    names = {
        kind: {name: tuple(p.shape) for name, p in ProgressiveReconstruction(8, grid, kind).named_parameters()}
        for kind in RECONSTRUCTIONS
    }
    norm = {"norm.weight": (8,), "norm.bias": (8,)}
    assert names == {"kernel": {"table": (4, 63), **norm}, "interpolate": {}, "conv": {"kernel": (8, 3, 3), **norm}}
    for reconstruction in RECONSTRUCTIONS:
        module = ProgressiveReconstruction(8, grid, reconstruction)
        assert set(module.state_dict()) == set(names[reconstruction])
    assert module.kernel.unique().tolist() == [1.0]


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_devices_agree(reconstruction, device):
    here, features, plan = make_case(Grid((4, 5)), reconstruction, dtype=torch.float32)
    expected = here(features, plan)
    there, features, plan = make_case(Grid((4, 5)), reconstruction, dtype=torch.float32, device=device)
    torch.testing.assert_close(there(features, plan).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_autocast_stays_near(reconstruction, device):
    module, features, plan = make_case(Grid((4, 5)), reconstruction, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = module(features, plan)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, module(features, plan), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_features_of_lower_precision_than_the_module(reconstruction, device):
    module, features, plan = make_case(Grid((4, 5)), reconstruction, dtype=torch.float32, device=device)
    rough = module(features.bfloat16(), plan)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), module(features, plan), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_nothing_thrown_gives_nothing_new(reconstruction):
    schedule = Schedule(Grid((2, 2)), TokenCounts(2, 2, 0))
    plan = make_plan(schedule, torch.arange(4)[None])
    features = torch.randn(1, 4, 8)
    assert torch.equal(ProgressiveReconstruction(8, schedule.grid, reconstruction)(features, plan), features)


@pytest.mark.parametrize("visible_features", [True, False])
@pytest.mark.parametrize("reconstruction", ["kernel", "conv"])
def test_without_thrown_tokens_all_parameters_have_gradients(reconstruction, visible_features):
    """As DistributedDataParallel needs it."""
    schedule = Schedule(Grid((2, 2)), TokenCounts(2, 2, 0))
    module = ProgressiveReconstruction(8, schedule.grid, reconstruction)
    features = torch.randn(1, 4 if visible_features else 2, 8)
    module(features, make_plan(schedule, torch.arange(4)[None]), visible_features=visible_features).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def test_one_turn_of_the_convolution_reaches_one_token_far():
    schedule = Schedule(Grid((7,)), TokenCounts(1, 0, 6), stages=1)
    plan = make_plan(schedule, torch.arange(7)[None])  # token 0 is known
    features = torch.randn(1, 1, 8)
    module = ProgressiveReconstruction(8, schedule.grid, "conv", repeats=2)
    rebuilt = module(features, plan)[0]
    reached = plan.order[0] <= 2
    assert rebuilt[reached].abs().sum(1).gt(0).all()
    assert not rebuilt[~reached].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "spline"}, "reconstruction: expected one of kernel, interpolate, conv, got 'spline'"),
        ({"reconstruction": "none"}, "reconstruction: expected one of kernel, interpolate, conv, got 'none'"),
        ({"heads": 3}, "heads: expected a divisor of dim=8, got 3"),
        ({"heads": 0}, "heads: expected a divisor of dim=8, got 0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"reconstruction": "conv", "repeats": 0}, "repeats: expected at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ProgressiveReconstruction(**{"dim": 8, "grid": Grid((4,)), **options})


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_one_module_serves_an_annealed_throw_ratio(reconstruction):
    """A plan's result does not depend on plans that the module saw before."""
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    for visible, decoded, stages in ((5, 15, 2), (5, 10, 1), (5, 5, 3), (5, 0, 16)):
        counts = TokenCounts(visible, decoded, 20 - visible - decoded)
        annealed = make_plan(Schedule(module.grid, counts, stages=stages), plan.order)
        known = torch.cat([features, features], dim=1)[:, : visible + decoded]
        fresh = ProgressiveReconstruction(8, module.grid, reconstruction).double()
        fresh.load_state_dict(module.state_dict())
        rebuilt = module(known, annealed)
        assert rebuilt.shape == (2, 20, 8)
        assert torch.equal(rebuilt, fresh(known, annealed))


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_batch_may_be_empty(reconstruction):
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    empty = make_plan(plan.schedule, plan.order[:0])
    assert module(features[:0], empty).shape == (0, 20, 8)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_orders_may_be_int32(reconstruction):
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    narrow = Plan(plan.order.int(), plan.schedule)
    assert torch.equal(module(features, narrow), module(features, plan))


def test_wrong_inputs():
    module, features, plan = make_case(Grid((4, 5)), "kernel")
    with pytest.raises(ValueError, match=r"^features: expected shape \(2, 10, dim\), got \(2, 9, 8\)$"):
        module(features[:, 1:], plan)
    with pytest.raises(ValueError, match=r"^features: expected shape \(2, 10, dim\), got \(1, 10, 8\)$"):
        module(features[:1], plan)
    with pytest.raises(ValueError, match=r"^features: expected 8 channels, got shape \(2, 10, 4\)$"):
        module(features[:, :, 4:], plan)
    transposed = make_plan(Schedule(Grid((5, 4)), plan.schedule.counts), plan.order)
    with pytest.raises(
        ValueError, match=r"^plan: expected one on Grid\(shape=\(4, 5\), .*, got Grid\(shape=\(5, 4\), "
    ):
        module(features, transposed)
    blind = make_plan(Schedule(module.grid, TokenCounts(0, 0, 20)), plan.order)
    with pytest.raises(ValueError, match=r"^features: expected at least one visible or decoded token"):
        module(features[:, :0], blind)

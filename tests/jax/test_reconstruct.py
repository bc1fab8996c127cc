"""Progressive reconstruction as a module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_jax import ProgressiveReconstruction, make_plan
from prmim_jax.interop import named_variables
from prmim_reference import counts as reference_counts
from prmim_reference import reconstruct as reference

RECONSTRUCTIONS = ["kernel", "interpolate", "conv"]
GRIDS = [
    Grid((9,)),
    Grid((4, 5)),
    Grid((4, 5), spacing=(2, 1)),
    Grid((2, 3, 3), spacing=(3, 1, 1)),
]


def make_case(grid, reconstruction, stages=2, dtype=jnp.float32, dim=8, compute_dtype=None):
    quarter = grid.num_tokens // 4
    counts = TokenCounts(quarter, quarter, grid.num_tokens - 2 * quarter)
    schedule = Schedule(grid, counts, stages=stages)
    plan = make_plan(schedule, counter_noise(0, 0, jnp.arange(2), grid.num_tokens))
    rng = np.random.default_rng(0)
    module = ProgressiveReconstruction(dim, grid, reconstruction=reconstruction, dtype=compute_dtype)
    for variable in named_variables(module).values():
        variable.set_value(variable[...].astype(dtype) + 0.3 * rng.normal(size=variable.shape).astype(dtype))
    return module, jnp.asarray(rng.normal(size=(2, 2 * quarter, dim)), dtype), plan


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("grid", GRIDS[2:], ids=str)
def test_features_are_the_reference_ones(grid, reconstruction):
    stages = 1 if grid.axes == 3 else 3
    with jax.enable_x64(True):
        module, features, plan = make_case(grid, reconstruction, stages, dtype=np.float64)
        rebuilt = np.asarray(jax.jit(lambda features, plan: module(features, plan))(features, plan))
    np.testing.assert_array_equal(rebuilt[:, : features.shape[1]], features)
    counts = plan.schedule.counts
    for image in range(2):
        expected = reference.progressive_reconstruction(
            np.asarray(features[image]),
            plan.order[image].tolist(),
            reference_counts.TokenCounts(counts.visible, counts.decoded, counts.thrown),
            grid.shape,
            stages=stages,
            reconstruction=reconstruction,
            parameters={name: np.asarray(v[...]) for name, v in named_variables(module).items()},
            spacing=grid.spacing,
        )
        np.testing.assert_allclose(rebuilt[image], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_without_visible_features_they_are_the_reference_ones(reconstruction):
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    rebuilt = jax.jit(lambda *a: module(*a, visible_features=False))(features[:, 5:], plan)
    expected = reference.progressive_reconstruction(
        np.asarray(features[1, 5:], float),
        plan.order[1].tolist(),
        reference_counts.TokenCounts(5, 5, 10),
        (4, 5),
        stages=2,
        reconstruction=reconstruction,
        parameters={name: np.asarray(v[...], float) for name, v in named_variables(module).items()},
        visible_features=False,
    )
    np.testing.assert_allclose(rebuilt[1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^features: expected shape \(2, 5, dim\), got \(2, 10, 8\)$"):
        module(features, plan, visible_features=False)


class Scaled(nnx.Module):
    """The mean of the known features, scaled by a weight per token."""

    def __init__(self, dim, grid):
        self.scale = nnx.Param(jnp.linspace(1, 2, grid.num_tokens * dim).reshape(grid.num_tokens, dim))

    def __call__(self, features, known, thrown):
        return self.scale[thrown] * features.mean(1, keepdims=True)


def test_a_module_of_ones_own_mixes():
    _, features, plan = make_case(Grid((4, 5)), "kernel")
    module = ProgressiveReconstruction(8, Grid((4, 5)), mix=Scaled(8, Grid((4, 5))))
    assert module.no_weight_decay() == {"norm.weight", "norm.bias"}  # the trainer decides on those of the mix
    assert set(named_variables(module)) == {"mix.scale", "norm.weight", "norm.bias"}
    rebuilt = nnx.jit(lambda module, *a: module(*a))(module, features, plan)
    mixed = np.asarray(module.mix.scale[plan.stage(1)] * features.mean(1, keepdims=True))
    centred = mixed - mixed.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rebuilt[:, 10:15], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mix": "mean"}, TypeError, "mix: expected a module or a function, got str"),
        (
            {"mix": lambda *_: None, "reconstruction": "conv"},
            ValueError,
            "mix: expected None with reconstruction 'conv', got function",
        ),
    ],
)
def test_wrong_mixes(options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ProgressiveReconstruction(8, Grid((4,)), **options)


def test_a_mix_returns_features_of_all_thrown_tokens():
    _, features, plan = make_case(Grid((4, 5)), "kernel")
    module = ProgressiveReconstruction(8, Grid((4, 5)), mix=lambda features, known, thrown: features[:, :, :1])
    with pytest.raises(
        ValueError, match=r"^mix: expected reconstructed features of shape \(2, 5, 8\), got \(2, 10, 1\)$"
    ):
        module(features, plan)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_table_starts_at_minus_the_squared_distance(grid):
    table = ProgressiveReconstruction(8, grid, heads=2).table[...]
    assert table.tolist() == reference.initial_table(grid.shape, 2, grid.spacing).tolist()


def test_parameters():
    grid = Grid((4, 5))
    names = {
        kind: {n: p.shape for n, p in named_variables(ProgressiveReconstruction(8, grid, kind)).items()}
        for kind in RECONSTRUCTIONS
    }
    norm = {"norm.weight": (8,), "norm.bias": (8,)}
    assert names == {"kernel": {"table": (4, 63), **norm}, "interpolate": {}, "conv": {"kernel": (8, 3, 3), **norm}}
    kernel = ProgressiveReconstruction(8, grid, "conv").kernel[...]
    assert (kernel == 1).all()


def test_lower_precision_stays_near():
    module, features, plan = make_case(Grid((4, 5)), "kernel")
    lower, *_ = make_case(Grid((4, 5)), "kernel", dtype=jnp.float32, compute_dtype=jnp.bfloat16)
    expected, rough = module(features, plan), lower(features, plan)
    assert rough.dtype == jnp.float32
    assert (rough != expected).any()
    np.testing.assert_allclose(rough, expected, rtol=0.1, atol=0.1)
    halved = module(features.astype(jnp.bfloat16), plan)
    assert halved.dtype == jnp.bfloat16
    np.testing.assert_allclose(halved.astype(jnp.float32), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_nothing_thrown_gives_nothing_new(reconstruction):
    schedule = Schedule(Grid((2, 2)), TokenCounts(2, 2, 0))
    plan = make_plan(schedule, jnp.arange(4)[None])
    features = jnp.ones((1, 4, 8))
    assert (ProgressiveReconstruction(8, schedule.grid, reconstruction)(features, plan) == features).all()


def test_one_turn_of_the_convolution_reaches_one_token_far():
    schedule = Schedule(Grid((7,)), TokenCounts(1, 0, 6), stages=1)
    plan = make_plan(schedule, jnp.arange(7)[None])  # token 0 is known
    features = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8)), jnp.float32)
    rebuilt = np.asarray(ProgressiveReconstruction(8, schedule.grid, "conv", repeats=2)(features, plan)[0])
    reached = np.asarray(plan.order[0]) <= 2
    assert (np.abs(rebuilt[reached]).sum(1) > 0).all()
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


def test_one_module_takes_plans_of_any_counts():
    module, features, plan = make_case(Grid((4, 5)), "kernel")
    fresh, _, _ = make_case(Grid((4, 5)), "kernel")
    for visible, decoded, stages in ((5, 5, 2), (4, 0, 4)):
        counts = TokenCounts(visible, decoded, 20 - visible - decoded)
        other = make_plan(Schedule(module.grid, counts, stages=stages), plan.order)
        known = features[:, : visible + decoded]
        np.testing.assert_array_equal(module(known, other), fresh(known, other))


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_batch_may_be_empty(reconstruction):
    module, features, plan = make_case(Grid((4, 5)), reconstruction)
    empty = make_plan(plan.schedule, plan.order[:0])
    assert jax.jit(lambda features, plan: module(features, plan))(features[:0], empty).shape == (0, 20, 8)


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

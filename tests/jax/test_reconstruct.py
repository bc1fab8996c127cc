"""Progressive reconstruction as a module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_jax import ProgressiveReconstruction, make_plan
from prmim_jax.interop import named_variables
from prmim_jax.vit import set_compute_dtype
from prmim_reference import counts as reference_counts
from prmim_reference import reconstruct as reference

VARIANTS = ["kernel", "interpolate", "conv"]
GRIDS = [
    Grid((9,)),
    Grid((4, 5)),
    Grid((4, 5), spacing=(2, 1)),
    Grid((2, 3, 3), spacing=(3, 1, 1)),
]


def make_case(grid, variant, stages=2, dtype=jnp.float32, dim=8):
    quarter = grid.num_tokens // 4
    counts = TokenCounts(quarter, quarter, grid.num_tokens - 2 * quarter)
    schedule = Schedule(grid, counts, stages=stages)
    plan = make_plan(schedule, counter_noise(0, 0, jnp.arange(2), grid.num_tokens))
    rng = np.random.default_rng(0)
    module = ProgressiveReconstruction(dim, schedule, variant=variant)
    for variable in named_variables(module).values():
        variable.set_value(variable[...].astype(dtype) + 0.3 * rng.normal(size=variable.shape).astype(dtype))
    return module, jnp.asarray(rng.normal(size=(2, 2 * quarter, dim)), dtype), plan


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", GRIDS[2:], ids=str)
def test_features_are_the_reference_ones(grid, variant):
    stages = 1 if grid.axes == 3 else 3
    with jax.enable_x64(True):
        module, features, plan = make_case(grid, variant, stages, dtype=np.float64)
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
            variant=variant,
            parameters={name: np.asarray(v[...]) for name, v in named_variables(module).items()},
            spacing=grid.spacing,
        )
        np.testing.assert_allclose(rebuilt[image], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_table_starts_at_minus_the_squared_distance(grid):
    schedule = Schedule(grid, TokenCounts(grid.num_tokens, 0, 0))
    table = ProgressiveReconstruction(8, schedule, heads=2).table[...]
    assert table.tolist() == reference.initial_table(grid.shape, 2, grid.spacing).tolist()


def test_parameters():
    schedule = Schedule(Grid((4, 5)), TokenCounts(5, 5, 10))
    names = {
        v: {n: p.shape for n, p in named_variables(ProgressiveReconstruction(8, schedule, v)).items()} for v in VARIANTS
    }
    norm = {"norm.weight": (8,), "norm.bias": (8,)}
    assert names == {"kernel": {"table": (4, 63), **norm}, "interpolate": {}, "conv": {"kernel": (8, 3, 3), **norm}}
    kernel = ProgressiveReconstruction(8, schedule, "conv").kernel[...]
    assert (kernel == 1).all()


def test_lower_precision_stays_near():
    module, features, plan = make_case(Grid((4, 5)), "kernel")
    expected = module(features, plan)
    set_compute_dtype(module, jnp.bfloat16)
    rough = module(features, plan)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_thrown_gives_nothing_new(variant):
    schedule = Schedule(Grid((2, 2)), TokenCounts(2, 2, 0))
    plan = make_plan(schedule, jnp.arange(4)[None])
    features = jnp.ones((1, 4, 8))
    assert (ProgressiveReconstruction(8, schedule, variant)(features, plan) == features).all()


def test_one_turn_of_the_convolution_reaches_one_token_far():
    schedule = Schedule(Grid((7,)), TokenCounts(1, 0, 6), stages=1)
    plan = make_plan(schedule, jnp.arange(7)[None])  # token 0 is known
    features = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8)), jnp.float32)
    rebuilt = np.asarray(ProgressiveReconstruction(8, schedule, "conv", repeats=2)(features, plan)[0])
    reached = np.asarray(plan.order[0]) <= 2
    assert (np.abs(rebuilt[reached]).sum(1) > 0).all()
    assert not rebuilt[~reached].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "spline"}, "variant: expected one of kernel, interpolate, conv, got 'spline'"),
        ({"variant": "none"}, "variant: expected one of kernel, interpolate, conv, got 'none'"),
        ({"heads": 3}, "heads: expected a divisor of dim=8, got 3"),
        ({"heads": 0}, "heads: expected a divisor of dim=8, got 0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"variant": "conv", "repeats": 0}, "repeats: expected at least 1, got 0"),
        (
            {"schedule": Schedule(Grid((4,)), TokenCounts(0, 0, 4))},
            "schedule: expected at least one visible or decoded token, got none",
        ),
    ],
)
def test_wrong_options(options, message):
    schedule = Schedule(Grid((4,)), TokenCounts(1, 1, 2))
    with pytest.raises(ValueError, match=f"^{message}$"):
        ProgressiveReconstruction(**{"dim": 8, "schedule": schedule, **options})


def test_wrong_inputs():
    module, features, plan = make_case(Grid((4, 5)), "kernel")
    with pytest.raises(ValueError, match=r"^features: expected shape \(batch, 10, 8\), got \(2, 9, 8\)$"):
        module(features[:, 1:], plan)
    with pytest.raises(ValueError, match=r"^plan: expected an order of shape \(1, 20\), got \(2, 20\)$"):
        module(features[:1], plan)

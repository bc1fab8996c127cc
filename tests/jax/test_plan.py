"""The plan inside compiled functions."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prmim_core
from prmim_core import Grid, Schedule, TokenCounts, counter_noise, random_decoded
from prmim_jax import make_plan


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
    Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), unit=(2, 2), throwing=lattice),
]


def noise_for(schedule, batch=3):
    return counter_noise(0, 0, jnp.arange(batch), schedule.counts.num_tokens)


@pytest.mark.parametrize(
    "schedule",
    SCHEDULES,
    ids=lambda s: f"{getattr(s.throwing, '__name__', s.throwing)}-{s.furthest_from}-{s.grid.axes}",
)
def test_plan_is_the_cores(schedule):
    noise = noise_for(schedule)
    plan = jax.jit(make_plan, static_argnums=0)(schedule, noise)
    assert plan.order.dtype == jnp.int32
    assert plan.schedule == schedule
    np.testing.assert_array_equal(plan.order, prmim_core.make_plan(schedule, np.asarray(noise)).order)


def test_weights_and_visible_tokens_go_through():
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing="weighted")
    noise = noise_for(schedule)
    weights = np.random.default_rng(0).random(noise.shape, np.float32)
    visible = np.array([[3, 1, 0, 15]] * 3)
    plan = make_plan(schedule, noise, visible=jnp.asarray(visible), weights=jnp.asarray(weights))
    expected = prmim_core.make_plan(schedule, np.asarray(noise), visible=visible, weights=weights)
    np.testing.assert_array_equal(plan.order, expected.order)
    assert plan.visible.tolist() == visible.tolist()


def test_decoded_tokens_go_through():
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing=lattice)
    noise = noise_for(schedule)
    visible, decoded = np.array([[3, 1, 0, 15]] * 3), np.array([[4, 2, 7, 9]] * 3)
    plan = make_plan(schedule, noise, jnp.asarray(visible), jnp.asarray(decoded))
    expected = prmim_core.make_plan(schedule, np.asarray(noise), visible, decoded)
    np.testing.assert_array_equal(plan.order, expected.order)
    assert plan.decoded.tolist() == decoded.tolist()


def test_plans_are_pytrees_and_mapped_over():
    schedule = SCHEDULES[0]
    noise = noise_for(schedule, batch=4).reshape(2, 2, -1)
    plans = jax.jit(jax.vmap(lambda noise: make_plan(schedule, noise)))(noise)
    expected = make_plan(schedule, noise.reshape(4, -1))
    np.testing.assert_array_equal(plans.order.reshape(4, -1), expected.order)
    assert jax.tree.structure(plans) == jax.tree.structure(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise": [[0] * 16]}, TypeError, r"noise: expected a jax\.Array, got list"),
        ({"noise": np.zeros((2, 16))}, TypeError, r"noise: expected a jax\.Array, got ndarray"),
        ({"visible": np.zeros((2, 4), int)}, TypeError, r"visible: expected a jax\.Array, got ndarray"),
        ({"decoded": np.zeros((2, 4), int)}, TypeError, r"decoded: expected a jax\.Array, got ndarray"),
        (
            {"decoded": jnp.zeros((2, 16), bool)},
            TypeError,
            r"decoded: expected token indices, got a boolean mask; \(~mask\)\.argsort\(1\).*",
        ),
        ({"noise": None}, TypeError, "noise: expected an array, got NoneType"),
        ({"schedule": (4, 4)}, TypeError, "schedule: expected a Schedule, got tuple"),
        ({"noise": jnp.zeros((2, 16), bool)}, TypeError, "noise: expected integers or real numbers, got bool"),
        ({"visible": jnp.zeros((2, 4))}, TypeError, "visible: expected integers, got float32"),
        (
            {"noise": jnp.zeros((2, 9), jnp.int32)},
            ValueError,
            r"noise: expected shape \(batch, 16\), got \(2, 9\)",
        ),
        (
            {"noise": jnp.zeros(16, jnp.int32)},
            ValueError,
            r"noise: expected shape \(batch, 16\), got \(16,\)",
        ),
        (
            {"visible": jnp.zeros((2, 5), jnp.int32)},
            ValueError,
            r"visible: expected shape \(2, 4\), got \(2, 5\)",
        ),
        ({"weights": jnp.zeros((2, 5))}, ValueError, r"weights: expected .*\(2, 16\), got \(2, 5\)"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    throwing = "weighted" if "weights" in arguments else "furthest"
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8), throwing=throwing)
    with pytest.raises(error, match=f"^{message}$"):
        make_plan(**{"schedule": schedule, "noise": jnp.zeros((2, 16), jnp.int32), **arguments})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_noise_may_be_of_any_real_dtype(dtype):
    noise = (100 * jax.random.uniform(jax.random.key(0), (3, 24))).astype(dtype)
    expected = prmim_core.make_plan(SCHEDULES[0], np.asarray(noise, np.float64)).order
    np.testing.assert_array_equal(make_plan(SCHEDULES[0], noise).order, expected)


def test_an_empty_batch_has_an_empty_plan():
    plan = make_plan(SCHEDULES[0], jnp.zeros((0, 24)))
    assert plan.order.shape == (0, 24)
    assert plan.restore.shape == (0, 24)
    plan.check()


def test_a_plan_of_numpy_arrays_is_a_pytree_before_any_plan_of_jax():
    # In a process of its own: in this one other tests have made plans.
    program = """
import jax, numpy as np, prmim_jax
from prmim_core import Grid, Plan, Schedule, TokenCounts
plan = Plan(np.asarray([[3, 1, 2, 0]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
assert jax.eval_shape(lambda plan: plan.visible, plan).shape == (1, 1)
"""
    subprocess.run([sys.executable, "-c", program], check=True)

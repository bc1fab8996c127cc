"""The core's plan, to be made inside ``jax.jit``."""

import jax.numpy as jnp
from jax import Array

import prmim_core
from prmim_core import Plan, Schedule


def make_plan(schedule: Schedule, noise: Array, visible: Array | None = None, weights: Array | None = None) -> Plan:
    """Make the plan of a batch; ``prmim_core.make_plan`` for JAX, its arguments checked.

    Parameters
    ----------
    schedule
        The static part of the plan; hashable, so a jitted function may have it as a static argument.
    noise
        int (batch, N), for instance from ``prmim_core.counter_noise``. The plan is a pure function of it.
    visible
        int (batch, V): the visible tokens, if another rule than "those of lowest noise" chose them.
    weights
        float (batch, N), for schedules that throw by weight.

    Returns
    -------
    Plan
        A pytree. Its ``order`` is int32 (batch, N), or int64 where 64-bit types are enabled.

    Raises
    ------
    TypeError
        If ``noise`` does not hold integers.
    ValueError
        If a shape does not fit the schedule.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> schedule = Schedule(Grid((2, 4)), TokenCounts(visible=2, decoded=2, thrown=4))
    >>> plan = make_plan(schedule, jnp.array([[3, 1, 4, 0, 5, 7, 2, 6]]))
    >>> plan.visible.tolist()
    [[3, 1]]
    """
    _check(schedule, noise, visible, weights)
    return prmim_core.make_plan(schedule, noise, visible=visible, weights=weights)


def _check(schedule: Schedule, noise: Array, visible: Array | None, weights: Array | None) -> None:
    num_tokens, num_visible = schedule.counts.num_tokens, schedule.counts.visible
    if not jnp.issubdtype(noise.dtype, jnp.integer):
        raise TypeError(f"noise: expected integers, got {noise.dtype}")
    if noise.ndim != 2 or noise.shape[1] != num_tokens:
        raise ValueError(f"noise: expected shape (batch, {num_tokens}), got {tuple(noise.shape)}")
    if visible is not None and tuple(visible.shape) != (noise.shape[0], num_visible):
        raise ValueError(f"visible: expected shape {(noise.shape[0], num_visible)}, got {tuple(visible.shape)}")
    if weights is not None and tuple(weights.shape) != tuple(noise.shape):
        raise ValueError(f"weights: expected shape {tuple(noise.shape)}, got {tuple(weights.shape)}")

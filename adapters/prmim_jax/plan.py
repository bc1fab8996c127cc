"""The core's plan for JAX arrays, also inside ``jax.jit``."""

import jax.numpy as jnp
from jax import Array

import prmim_core
from prmim_core import Plan, Schedule


def make_plan(schedule: Schedule, noise: Array, visible: Array | None = None, weights: Array | None = None) -> Plan:
    """Return the plan of a batch; ``prmim_core.make_plan``, for noise of an integer dtype only.

    Parameters
    ----------
    schedule
        The static part of the plan; hashable, so it can be a static argument of a jitted function.
    noise
        int (batch, N), for example from ``prmim_core.counter_noise``. The plan is a pure function of it.
    visible
        int (batch, V): the visible tokens; None: the tokens of lowest noise, in units if the schedule has a unit.
    weights
        float (batch, N), for ``throwing="weighted"``.

    Returns
    -------
    Plan
        A pytree. ``order`` is int32 (batch, N), or int64 if 64-bit types are enabled.

    Raises
    ------
    TypeError
        If ``noise`` is not of an integer dtype.
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
    if not jnp.issubdtype(noise.dtype, jnp.integer):
        raise TypeError(f"noise: expected integers, got {noise.dtype}")
    return prmim_core.make_plan(schedule, noise, visible=visible, weights=weights)

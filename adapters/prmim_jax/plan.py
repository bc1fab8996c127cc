"""Plans for JAX arrays, also inside ``jax.jit``."""

from jax import Array

import prmim_core
from prmim_core import Plan, Schedule
from prmim_core._arrays import register_pytree


def make_plan(
    schedule: Schedule,
    noise: Array,
    visible: Array | None = None,
    decoded: Array | None = None,
    weights: Array | None = None,
) -> Plan:
    """Return the plan of a batch; ``prmim_core.make_plan`` for JAX arrays.

    Parameters
    ----------
    schedule
        The static part of the plan; hashable, so it can be a static argument of a jitted function.
    noise
        (batch, N), any real dtype, for example from ``prmim_core.counter_noise`` or ``jax.random.uniform``. The plan is
        a pure function of it. Throwing by ``"weighted"`` needs int32, ``"cell"`` integers.
    visible
        int (batch, V): the visible tokens, distinct, and in whole units if the schedule has a unit; None: the tokens or
        units of lowest noise.
    decoded
        int (batch, M): the decoded tokens, distinct and masked, and in whole units if the schedule has a unit; None:
        those chosen by the strategy of the schedule. A function in ``schedule.throwing`` is traced.
    weights
        float (batch, N), for ``throwing="weighted"``.

    Returns
    -------
    Plan
        A pytree. ``order`` is int32 (batch, N), or int64 if 64-bit types are enabled.

    Raises
    ------
    TypeError
        If an argument is not a JAX array, or a dtype does not fit.
    ValueError
        If a shape does not fit the schedule, or weights are missing or not needed.

    Notes
    -----
    Values are not checked, because a check would block. Use :meth:`prmim_core.Plan.check` for tokens from other
    sources.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> schedule = Schedule(Grid((2, 4)), TokenCounts(visible=2, decoded=2, thrown=4))
    >>> plan = make_plan(schedule, jnp.array([[3, 1, 4, 0, 5, 7, 2, 6]]))
    >>> plan.visible.tolist()
    [[3, 1]]
    """
    for name, array in (("noise", noise), ("visible", visible), ("decoded", decoded), ("weights", weights)):
        if array is not None and not isinstance(array, Array):
            raise TypeError(f"{name}: expected a jax.Array, got {type(array).__name__}")
    return prmim_core.make_plan(schedule, noise, visible, decoded, weights)


register_pytree(Plan, None, "order", "schedule")  # also for plans of NumPy arrays

"""Means over units, blocks of several tokens."""

from math import prod

from prmim_core._arrays import Array, array_namespace, as_index, device_of
from prmim_core._checks import check_arrays, check_tokens, check_type
from prmim_core.grid import Grid
from prmim_core.schedule import Plan, take_tokens
from prmim_core.targets import patchify


def pool_units(features: Array, plan: Plan, unit: tuple[int, ...]) -> Array:
    """Average the token features of each unit.

    Parameters
    ----------
    features
        float (batch, n, dim), features of the first n tokens in plan order.
    plan
        The plan of the batch.
    unit
        Tokens of a unit along each axis; divides the grid.

    Returns
    -------
    array
        (batch, N / tokens per unit, dim): units in raster order. Tokens without features are left out of the mean; a
        unit without any feature is 0.

    Raises
    ------
    ValueError
        If the features do not fit the plan, or the unit does not divide the grid.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[3, 0, 1, 2]]), Schedule(Grid((4,)), TokenCounts(1, 2, 1)))
    >>> pool_units(np.asarray([[[1.0], [2.0], [4.0]]]), plan, (2,))[0].tolist()
    [[3.0], [1.0]]
    """
    xp = array_namespace(features, plan.order)
    grid, (batch, tokens) = plan.schedule.grid, plan.order.shape
    if features.ndim != 3 or features.shape[0] != batch or features.shape[1] > tokens:
        raise ValueError(f"features: expected shape ({batch}, at most {tokens}, dim), got {tuple(features.shape)}")
    units = grid.units(unit)
    missing = tokens - features.shape[1]

    def total(values: Array) -> Array:
        """Sum (batch, n, d) over units: (batch, units, d)."""
        if missing:
            nothing = xp.zeros((batch, missing, values.shape[2]), dtype=values.dtype, device=device_of(values))
            values = xp.concat([values, nothing], axis=1)
        raster = xp.reshape(take_tokens(values, plan.restore), (batch, *grid.shape, values.shape[2]))
        cut = xp.reshape(patchify(raster, unit), (batch, units.num_tokens, prod(unit), values.shape[2]))
        return xp.sum(cut, axis=2)

    if not missing:
        return total(features) / prod(unit)
    number = total(xp.ones_like(features[:, :, :1]))
    return total(features) / xp.where(number > 0, number, xp.ones_like(number))


def unit_index(grid: Grid, unit: tuple[int, ...], tokens: Array) -> Array:
    """Return the unit of each token.

    Parameters
    ----------
    grid
        The grid of the tokens.
    unit
        Tokens of a unit along each axis; divides the grid.
    tokens
        int (batch, n).

    Returns
    -------
    array
        int (batch, n): units are numbered in raster order.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid or the tokens are not integers.
    ValueError
        If the unit does not divide the grid.
    IndexError
        If a token is outside of the grid. Checked on the host only: NumPy, and PyTorch on a CPU when not compiled.

    Examples
    --------
    >>> import numpy as np
    >>> unit_index(Grid((4, 4)), (2, 2), np.asarray([[0, 3, 6, 15]])).tolist()
    [[0, 1, 1, 3]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(tokens=tokens)
    units = grid.units(unit)
    check_tokens(xp, "tokens", tokens, grid.num_tokens)
    tokens = as_index(xp, tokens)
    index, stride = tokens * 0, grid.num_tokens
    for length, size, number in zip(grid.shape, unit, units.shape, strict=True):
        stride //= length
        index = index * number + tokens // stride % length // size
    return index

"""Progressive reconstruction: thrown tokens rebuilt from known ones, stage by stage.

Here are the stages without learned parameters, and the tables of offsets that learned ones look up. The learned modules
live in the adapters.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, array_namespace, device_of
from prmim_core.grid import Grid
from prmim_core.schedule import Plan

Mix = Callable[[Array, Array, Array], Array]
"""Rebuild tokens: (features (batch, K, dim), known (batch, K), thrown (batch, n)) -> (batch, n, dim)."""


def reconstruct_stages(features: Array, plan: Plan, mix: Mix) -> Array:
    """Rebuild the thrown tokens, every stage from all that is known before it.

    Parameters
    ----------
    features
        (batch, V + M, dim), of visible and decoded tokens in plan order.
    plan
        The plan of the batch.
    mix
        ``mix(features, known, thrown)`` rebuilds the tokens ``thrown`` (batch, n) from the features of the tokens
        ``known`` (batch, K), as (batch, n, dim).

    Returns
    -------
    array
        (batch, N, dim), of all tokens in plan order.

    Raises
    ------
    ValueError
        If ``features`` do not fit the plan, or thrown tokens are to be rebuilt from nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[0, 2, 1, 3]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    >>> mean = lambda features, known, thrown: features.mean(axis=1, keepdims=True)
    >>> reconstruct_stages(np.asarray([[[1.0], [3.0]]]), plan, mean)[0, :, 0].tolist()
    [1.0, 3.0, 2.0, 2.0]
    """
    xp = array_namespace(features, plan.order)
    schedule = plan.schedule
    known = schedule.num_known(1)
    if features.ndim != 3 or tuple(features.shape[:2]) != (plan.order.shape[0], known):
        expected = f"({plan.order.shape[0]}, {known}, dim)"
        raise ValueError(f"features: expected shape {expected}, got {tuple(features.shape)}")
    if known == 0 and schedule.counts.thrown:
        raise ValueError(
            "features: expected at least one visible or decoded token to rebuild thrown ones from, got none"
        )
    for stage, size in enumerate(schedule.stage_sizes, start=1):
        if size:
            rebuilt = mix(features, plan.known(stage), plan.stage(stage))
            features = xp.concat([features, rebuilt], axis=1)
    return features


def interpolate(features: Array, plan: Plan, eps: float = 1e-6) -> Array:
    """Rebuild thrown tokens by inverse distance weighting, without parameters.

    Parameters
    ----------
    features
        float (batch, V + M, dim), of visible and decoded tokens in plan order.
    plan
        The plan of the batch.
    eps
        Added to the variance in the norm.

    Returns
    -------
    array
        (batch, N, dim), of all tokens in plan order. A thrown token is the mean of all known ones, weighted by one over
        the squared distance (Shepard, 1968), and normalised over its channels to mean 0 and variance 1.

    Notes
    -----
    Cost: one (n x K) by (K x dim) product per image and stage.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[0, 3, 1, 2]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2), stages=1))
    >>> interpolate(np.asarray([[[0.0, 1.0], [1.0, 0.0]]]), plan)[0, 2:].round(3).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """
    xp = array_namespace(features)

    def mix(features: Array, known: Array, thrown: Array) -> Array:
        weights = inverse_distance_weights(plan.schedule.grid, thrown, known)
        return standardize(xp.matmul(xp.astype(weights, features.dtype), features), eps)

    return reconstruct_stages(features, plan, mix)


def inverse_distance_weights(grid: Grid, thrown: Array, known: Array) -> Array:
    """Return the weights of :func:`interpolate`: float32 (batch, n, K), positive, each row summing to 1."""
    xp = array_namespace(thrown, known)
    inverse = 1.0 / xp.astype(pair_squared_distances(grid, thrown, known), xp.float32)
    return inverse / xp.sum(inverse, axis=-1, keepdims=True)


def standardize(x: Array, eps: float = 1e-6) -> Array:
    """Give the last axis mean 0 and (biased) variance 1: a layer norm without parameters."""
    xp = array_namespace(x)
    mean = xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean((x - mean) ** 2, axis=-1, keepdims=True)  # not xp.var: PyTorch's warns where the batch is empty
    return (x - mean) / xp.sqrt(variance + eps)


def num_offsets(grid: Grid) -> int:
    """Count the offsets that two tokens of the grid can have: the product of (2 * side - 1).

    Parameters
    ----------
    grid
        The grid of the tokens.

    Examples
    --------
    >>> num_offsets(Grid((14, 14)))
    729
    """
    return prod([2 * size - 1 for size in grid.shape])  # a list, since torch.compile takes no generator here


def offset_squared_distances(grid: Grid) -> NDArray[np.int64]:
    """Return the squared distance, spacing applied, of every offset: int64 (num_offsets,), in raster order.

    Parameters
    ----------
    grid
        The grid of the tokens.

    Examples
    --------
    >>> offset_squared_distances(Grid((2, 2))).tolist()
    [2, 1, 2, 1, 0, 1, 2, 1, 2]
    """
    squares = [(np.arange(1 - size, size) * step) ** 2 for size, step in zip(grid.shape, grid.spacing, strict=True)]
    total = squares[0]
    for along_axis in squares[1:]:
        total = total[:, None] + along_axis
        total = total.reshape(-1)
    return total


def offset_index(grid: Grid, thrown: Array, known: Array) -> Array:
    """Return the number of the offset from every known to every thrown token.

    Parameters
    ----------
    grid
        The grid of the tokens.
    thrown, known
        int (batch, n) and (batch, K).

    Returns
    -------
    array
        int (batch, n, K), in [0, num_offsets): the place of (thrown - known), counted in tokens along each axis, among
        all offsets in raster order.

    Examples
    --------
    >>> import numpy as np
    >>> offset_index(Grid((2, 2)), np.asarray([[3]]), np.asarray([[0, 3]])).tolist()
    [[[8, 4]]]
    """
    # A token's raster place in the wider grid of offsets: the difference of two such places, shifted to the middle,
    # is the place of their offset. So n + K small sums do, and one difference per pair.
    return _wide_place(grid, thrown)[:, :, None] - _wide_place(grid, known)[:, None, :] + num_offsets(grid) // 2


def _wide_place(grid: Grid, tokens: Array) -> Array:
    place = tokens * 0
    stride = grid.num_tokens
    for size in grid.shape:
        stride //= size
        place = place * (2 * size - 1) + tokens // stride % size
    return place


def pair_squared_distances(grid: Grid, thrown: Array, known: Array) -> Array:
    """Return the squared distance, spacing applied, from every thrown to every known token: int (batch, n, K)."""
    xp = array_namespace(thrown, known)
    total = xp.zeros((1, 1, 1), dtype=thrown.dtype, device=device_of(thrown))
    stride = grid.num_tokens
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        stride //= size
        along_axis = ((thrown // stride % size)[:, :, None] - (known // stride % size)[:, None, :]) * step
        total = total + along_axis * along_axis
    return total

"""Progressive reconstruction: thrown tokens are rebuilt from known tokens, stage by stage.

This module has no learned parameters. Learned modules live in the adapters and use its offset tables.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, array_namespace, as_index, device_of
from prmim_core._checks import check_arrays, check_tokens, check_type
from prmim_core.grid import Grid
from prmim_core.schedule import Plan

Mix = Callable[[Array, Array, Array], Array]
"""Rebuilds tokens: (features (batch, K, dim), known (batch, K), thrown (batch, n)) -> (batch, n, dim)."""


def reconstruct_stages(features: Array, plan: Plan, mix: Mix) -> Array:
    """Rebuild thrown tokens stage by stage. Each stage uses all tokens known before it.

    Parameters
    ----------
    features
        (batch, V + M, dim), features of visible and decoded tokens in plan order.
    plan
        The plan of the batch.
    mix
        ``mix(features, known, thrown)`` returns features (batch, n, dim) of the tokens ``thrown`` (batch, n), from the
        features (batch, K, dim) of the tokens ``known`` (batch, K).

    Returns
    -------
    array
        (batch, N, dim), features of all tokens in plan order; ``features`` come first, unchanged.

    Raises
    ------
    ValueError
        If ``features`` do not fit the plan, or tokens are thrown and none is known.

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
    num_known = schedule.num_known(1)
    if features.ndim != 3 or tuple(features.shape[:2]) != (plan.order.shape[0], num_known):
        expected = f"({plan.order.shape[0]}, {num_known}, dim)"
        raise ValueError(f"features: expected shape {expected}, got {tuple(features.shape)}")
    if num_known == 0 and schedule.counts.thrown:
        raise ValueError("features: expected at least one visible or decoded token to rebuild others from, got none")
    for stage, size in enumerate(schedule.stage_sizes, start=1):
        if size:
            rebuilt = mix(features, plan.known(stage), plan.stage(stage))
            features = xp.concat([features, rebuilt], axis=1)
    return features


def interpolate(features: Array, plan: Plan, eps: float = 1e-6) -> Array:
    """Rebuild thrown tokens by inverse distance weighting (Shepard, 1968), without parameters.

    Parameters
    ----------
    features
        float (batch, V + M, dim), features of visible and decoded tokens in plan order.
    plan
        The plan of the batch.
    eps
        Added to the variance in the norm.

    Returns
    -------
    array
        (batch, N, dim), features of all tokens in plan order. A thrown token is the mean of all known tokens, weighted
        by the inverse squared distance, then normalised over its channels to mean 0 and variance 1.

    Raises
    ------
    ValueError
        As :func:`reconstruct_stages`.

    Notes
    -----
    One (n, K) x (K, dim) product per image and stage.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[0, 3, 1, 2]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2), stages=1))
    >>> interpolate(np.asarray([[[0.0, 1.0], [1.0, 0.0]]]), plan)[0, 2:].round(3).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """
    xp = array_namespace(features, plan.order)

    def mix(features: Array, known: Array, thrown: Array) -> Array:
        weights = _inverse_distance_weights(xp, plan.schedule.grid, thrown, known)
        return _standardize(xp, xp.matmul(xp.astype(weights, features.dtype), features), eps)

    return reconstruct_stages(features, plan, mix)


def _inverse_distance_weights(xp: Namespace, grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute the weights of :func:`interpolate`: float32 (batch, n, K). Rows sum to 1."""
    inverse = 1.0 / xp.astype(_pair_squared_distances(xp, grid, thrown, known), xp.float32)
    return inverse / xp.sum(inverse, axis=-1, keepdims=True)


def _standardize(xp: Namespace, x: Array, eps: float) -> Array:
    """Apply a layer norm without parameters (biased variance)."""
    mean = xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean((x - mean) ** 2, axis=-1, keepdims=True)  # PyTorch's var warns about empty batches
    return (x - mean) / xp.sqrt(variance + eps)


def num_offsets(grid: Grid) -> int:
    """Return the number of possible offsets between two tokens: the product of (2 * side - 1).

    Parameters
    ----------
    grid
        The grid of the tokens.

    Examples
    --------
    >>> num_offsets(Grid((14, 14)))
    729
    """
    check_type("grid", grid, Grid)
    return prod([2 * size - 1 for size in grid.shape])  # torch.compile does not support a generator here


def offset_squared_distances(grid: Grid) -> NDArray[np.int64]:
    """Compute the squared distance of every offset, spacing applied.

    Parameters
    ----------
    grid
        The grid of the tokens.

    Returns
    -------
    NDArray
        int64 (num_offsets,), in raster order of the offsets.

    Examples
    --------
    >>> offset_squared_distances(Grid((2, 2))).tolist()
    [2, 1, 2, 1, 0, 1, 2, 1, 2]
    """
    check_type("grid", grid, Grid)
    squares = [(np.arange(1 - size, size) * step) ** 2 for size, step in zip(grid.shape, grid.spacing, strict=True)]
    total = squares[0]
    for along_axis in squares[1:]:
        total = total[:, None] + along_axis
        total = total.reshape(-1)
    return total


def offset_index(grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute the index of the offset from every known to every thrown token.

    Parameters
    ----------
    grid
        The grid of the tokens.
    thrown, known
        int (batch, n) and (batch, K).

    Returns
    -------
    array
        int (batch, n, K), in [0, num_offsets): raster index of (thrown - known), in tokens along each axis.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid or an index does not hold integers.
    IndexError
        If a token is outside of the grid. Seen on the host only: NumPy, and PyTorch on a CPU when not compiled.

    Examples
    --------
    >>> import numpy as np
    >>> offset_index(Grid((2, 2)), np.asarray([[3]]), np.asarray([[0, 3]])).tolist()
    [[[8, 4]]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(thrown=thrown, known=known)
    for name, tokens in (("thrown", thrown), ("known", known)):
        check_tokens(xp, name, tokens, grid.num_tokens)
    thrown, known = as_index(xp, thrown), as_index(xp, known)
    # The difference of two raster indices in the grid of offsets, shifted to its centre, is the index of the offset:
    # n + K indices per image, and one difference per pair.
    return _offset_place(grid, thrown)[:, :, None] - _offset_place(grid, known)[:, None, :] + num_offsets(grid) // 2


def _offset_place(grid: Grid, tokens: Array) -> Array:
    """Compute the raster index of tokens in the wider grid of offsets."""
    place = tokens * 0
    stride = grid.num_tokens
    for size in grid.shape:
        stride //= size
        place = place * (2 * size - 1) + tokens // stride % size
    return place


def _pair_squared_distances(xp: Namespace, grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute squared distances from every thrown to every known token, spacing applied: int (batch, n, K)."""
    thrown, known = as_index(xp, thrown), as_index(xp, known)
    total = xp.zeros((1, 1, 1), dtype=thrown.dtype, device=device_of(thrown))
    stride = grid.num_tokens
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        stride //= size
        along_axis = ((thrown // stride % size)[:, :, None] - (known // stride % size)[:, None, :]) * step
        total = total + along_axis * along_axis
    return total

"""Coverage of a grid by its known tokens: distances to the nearest known token.

``positions`` is a :class:`prmim_core.Grid` or an integer array (N, axes) of distinct points. A grid takes
O(N * (sum of its sides)) operations per image, free points O(N**2).
"""

import numpy as np

from prmim_core._arrays import Array, Namespace, device_of
from prmim_core._checks import check_arrays, check_positions
from prmim_core.grid import INT32_MAX, Grid

# Upper limit of point pairs in memory: 2**24 int32 are 64 MiB.
_PAIRS_AT_ONCE = 2**24
# The same for pairs along an axis of a grid, per image: the batch size may be unknown while a program is exported.
_PAIRS_OF_AN_IMAGE = 2**20


def nearest_known_distance(positions: Grid | Array, is_known: Array) -> Array:
    """Compute the squared distance from each token to its nearest known token.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).

    Returns
    -------
    array
        int32 (batch, N), squared Euclidean distances in the units of the positions; 0 at known tokens. Images without
        known tokens get 2**31 - 1 everywhere.

    Raises
    ------
    TypeError
        If ``is_known`` is not bool or positions are not integers.
    ValueError
        If the shapes do not fit, or the squared diagonal of NumPy positions reaches 2**30.

    Notes
    -----
    On a grid this is the exact Euclidean distance transform (Felzenszwalb and Huttenlocher, 2012): a squared distance
    is a sum over axes, so the minimum over known tokens is computed one axis at a time.

    Examples
    --------
    >>> import numpy as np
    >>> is_known = np.asarray([[True, False, False, False, False, False]])
    >>> nearest_known_distance(Grid((2, 3)), is_known).tolist()
    [[0, 1, 4, 1, 2, 5]]
    """
    xp = check_arrays(is_known=is_known)
    _check(xp, positions, is_known)
    return _nearest_known_distance(xp, positions, is_known)


def covering_radius(positions: Grid | Array, is_known: Array) -> Array:
    """Compute the largest distance from any token to its nearest known token.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).

    Returns
    -------
    array
        float32 (batch,), Euclidean; infinite for images without known tokens.

    Raises
    ------
    TypeError
        If ``is_known`` is not bool or positions are not integers.
    ValueError
        If the shapes do not fit, or the squared diagonal of NumPy positions reaches 2**30.

    Examples
    --------
    >>> import numpy as np
    >>> covering_radius(Grid((1, 5)), np.asarray([[False, False, True, False, False]])).tolist()
    [2.0]
    """
    xp = check_arrays(is_known=is_known)
    _check(xp, positions, is_known)
    squared = xp.max(_nearest_known_distance(xp, positions, is_known), axis=1)
    return xp.where(squared < INT32_MAX, xp.sqrt(xp.astype(squared, xp.float32)), float("inf"))


def _check(xp: Namespace, positions: Grid | Array, is_known: Array) -> None:
    num_tokens = check_positions(positions)
    if is_known.dtype != xp.bool:
        raise TypeError(f"is_known: expected bool, got {is_known.dtype}")
    if is_known.ndim != 2 or is_known.shape[1] != num_tokens:
        raise ValueError(f"is_known: expected shape (batch, {num_tokens}), got {tuple(is_known.shape)}")


def _nearest_known_distance(xp: Namespace, positions: Grid | Array, is_known: Array) -> Array:
    if isinstance(positions, Grid):
        return _distance_transform(xp, positions, is_known)
    return _pairwise_minimum(xp, positions, is_known)


def _distance_transform(xp: Namespace, grid: Grid, is_known: Array) -> Array:
    device = device_of(is_known)
    batch = is_known.shape[0]
    # Larger than any distance. Distances are below 2**30, so sums with this value cannot overflow.
    unknown = grid.max_squared_distance + 1
    zeros = xp.zeros(is_known.shape, dtype=xp.int32, device=device)
    distance = xp.where(is_known, zeros, unknown)
    block = max(1, _PAIRS_OF_AN_IMAGE // grid.num_tokens)
    # The current axis first, the batch last: minima over long rows are fast in all libraries.
    distance = xp.permute_dims(distance, (1, 0))
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        others = grid.num_tokens // size
        line = xp.arange(size, dtype=xp.int32, device=device) * step
        lines = xp.reshape(distance, (size, 1, others * batch))
        parts = []
        for start in range(0, size, block):
            along_axis = (line[:, None] - line[None, start : min(start + block, size)]) ** 2
            parts.append(xp.min(lines + along_axis[:, :, None], axis=0))
        lines = xp.concat(parts, axis=0)
        # Move the finished axis behind the others. After the last axis, their order is the original one.
        distance = xp.permute_dims(xp.reshape(lines, (size, others, batch)), (1, 0, 2))
    distance = xp.permute_dims(xp.reshape(distance, (grid.num_tokens, batch)), (1, 0))
    return xp.where(distance < unknown, distance, INT32_MAX)


def _pairwise_minimum(xp: Namespace, positions: Array, is_known: Array) -> Array:
    """Compute nearest known distances of free points, in blocks to bound memory."""
    points = _int32_points(xp, positions, device_of(is_known))
    batch, length = is_known.shape
    block = max(1, _PAIRS_AT_ONCE // max(1, batch * length))
    nearest = xp.full((batch, length), INT32_MAX, dtype=xp.int32, device=device_of(is_known))
    for start in range(0, length, block):
        stop = min(start + block, length)
        squared = _squared_distances(xp, points[start:stop, :], points)
        to_known = xp.where(is_known[:, start:stop, None], squared[None, :, :], INT32_MAX)
        nearest = xp.minimum(nearest, xp.min(to_known, axis=1))
    return nearest


def _int32_points(xp: Namespace, positions: Array, device: object) -> Array:
    if isinstance(positions, np.ndarray):
        positions = np.array(positions, dtype=np.int32)  # a copy, because PyTorch warns about read-only arrays
    return xp.asarray(positions, dtype=xp.int32, device=device)


def _squared_distances(xp: Namespace, first: Array, second: Array) -> Array:
    """Compute squared distances between points (n, axes) and (m, axes): int (n, m)."""
    return xp.sum((first[:, None, :] - second[None, :, :]) ** 2, axis=2, dtype=first.dtype)

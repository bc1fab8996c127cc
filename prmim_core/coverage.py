"""How well the known tokens cover the grid: distances to the nearest of them.

``positions`` is a :class:`prmim_core.Grid`, or an integer array (N, axes) of distinct points. A grid is measured along
one axis after the other, in O(N * (sum of its sides)) per image; free points pair by pair, in O(N**2).
"""

from collections.abc import Callable

import numpy as np

from prmim_core._arrays import Array, Namespace, array_namespace, device_of
from prmim_core.grid import INT32_MAX, Grid

# Pairs of tokens that a pairwise measure holds at a time: 2**24 int32 are 64 MiB.
_PAIRS_AT_ONCE = 2**24


def nearest_known_distance(positions: Grid | Array, is_known: Array) -> Array:
    """Measure how far each token lies from the nearest known one, squared.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).

    Returns
    -------
    array
        int32 (batch, N), squared Euclidean distances in the units of the positions; 0 at known tokens. Where an image
        has no known token, all are 2**31 - 1.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    On a grid this is the exact Euclidean distance transform, by a minimum over one axis at a time: a squared distance
    is a sum over axes, so the minimum over all known tokens splits into nested ones (Felzenszwalb and Huttenlocher,
    2012).

    Examples
    --------
    >>> import numpy as np
    >>> nearest_known_distance(Grid((2, 3)), np.asarray([[True, False, False, False, False, False]])).tolist()
    [[0, 1, 4, 1, 2, 5]]
    """
    xp = array_namespace(is_known)
    _check_known(positions, is_known)
    if isinstance(positions, Grid):
        return _distance_transform(xp, positions, is_known)
    return _blockwise_minimum(positions, is_known, _nearest)


def covering_radius(positions: Grid | Array, is_known: Array) -> Array:
    """Measure the largest distance from any token to its nearest known one.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).

    Returns
    -------
    array
        float32 (batch,), Euclidean; infinite where nothing is known. Greedy furthest sampling comes within twice the
        best possible radius (Gonzalez, 1985).

    Examples
    --------
    >>> import numpy as np
    >>> covering_radius(Grid((1, 5)), np.asarray([[False, False, True, False, False]])).tolist()
    [2.0]
    """
    xp = array_namespace(is_known)
    return _square_root(xp, xp.max(nearest_known_distance(positions, is_known), axis=1))


def separation(positions: Grid | Array, is_known: Array) -> Array:
    """Measure the smallest distance between two known tokens.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).

    Returns
    -------
    array
        float32 (batch,), Euclidean; infinite where fewer than two tokens are known. O(N**2) per image.

    Examples
    --------
    >>> import numpy as np
    >>> separation(Grid((1, 5)), np.asarray([[True, False, True, False, True]])).tolist()
    [2.0]
    """
    xp = array_namespace(is_known)
    _check_known(positions, is_known)
    if isinstance(positions, Grid):
        positions = xp.stack(positions.coordinates(xp, device_of(is_known)), axis=1)
    nearest_other = _blockwise_minimum(positions, is_known, _nearest_other)
    unknown = xp.full_like(nearest_other, INT32_MAX)
    return _square_root(xp, xp.min(xp.where(is_known, nearest_other, unknown), axis=1))


def distance_histogram(positions: Grid | Array, is_known: Array, edges: Array) -> Array:
    """Count tokens by their distance to the nearest known one.

    Parameters
    ----------
    positions
        A grid, or int (N, axes).
    is_known
        bool (batch, N).
    edges
        float (bins + 1,), increasing distances (not squared), of the same array library.

    Returns
    -------
    array
        int (batch, bins): how many tokens have ``edges[i] <= distance < edges[i + 1]``. Known tokens lie at 0.

    Examples
    --------
    >>> import numpy as np
    >>> known = np.asarray([[True, False, False, False]])
    >>> distance_histogram(Grid((4,)), known, np.asarray([0.0, 0.5, 1.5, 9.0])).tolist()
    [[1, 1, 2]]
    """
    xp = array_namespace(is_known, edges)
    if edges.ndim != 1 or edges.shape[0] < 2:
        raise ValueError(f"edges: expected shape (bins + 1,) with at least two edges, got {tuple(edges.shape)}")
    distance = _square_root(xp, nearest_known_distance(positions, is_known))
    at_least = distance[:, :, None] >= xp.astype(edges, xp.float32)[None, None, :]
    reached = xp.sum(xp.astype(at_least, xp.int32), axis=1)
    return reached[:, :-1] - reached[:, 1:]


def _distance_transform(xp: Namespace, grid: Grid, is_known: Array) -> Array:
    device = device_of(is_known)
    batch = is_known.shape[0]
    # Larger than any distance; Grid keeps distances below 2**30, so that adding one to it cannot wrap.
    unknown = grid.max_squared_distance + 1
    zeros = xp.zeros(is_known.shape, dtype=xp.int32, device=device)
    distance = xp.where(is_known, zeros, unknown)
    # The axis at work comes first and the images last: a minimum over long rows is what array libraries are fast at.
    distance = xp.permute_dims(distance, (1, 0))
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        others = grid.num_tokens // size
        line = xp.arange(size, dtype=xp.int32, device=device) * step
        along_axis = (line[:, None] - line[None, :]) ** 2
        lines = xp.reshape(distance, (size, 1, others * batch))
        lines = xp.min(lines + along_axis[:, :, None], axis=0)
        # Done with, it goes behind the other axes, so that after a full turn all are in their places.
        distance = xp.permute_dims(xp.reshape(lines, (size, others, batch)), (1, 0, 2))
    distance = xp.permute_dims(xp.reshape(distance, (grid.num_tokens, batch)), (1, 0))
    return xp.where(distance < unknown, distance, INT32_MAX)


def _blockwise_minimum(positions: Array, is_known: Array, measure: Callable[[Array, Array, Array], Array]) -> Array:
    """Take the minimum of ``measure`` over the known tokens, a block of them at a time to bound memory."""
    xp = array_namespace(is_known)
    positions = int32_points(xp, positions, device_of(is_known))
    batch, length = is_known.shape
    block = max(1, _PAIRS_AT_ONCE // max(1, batch * length))
    best = xp.full((batch, length), INT32_MAX, dtype=xp.int32, device=device_of(is_known))
    for start in range(0, length, block):
        stop = min(start + block, length)
        squared = squared_distances(positions[start:stop, :], positions)
        best = xp.minimum(best, measure(xp, squared, is_known[:, start:stop]))
    return best


def _nearest(xp: Namespace, squared: Array, is_known: Array) -> Array:
    return xp.min(xp.where(is_known[:, :, None], squared[None, :, :], INT32_MAX), axis=1)


def _nearest_other(xp: Namespace, squared: Array, is_known: Array) -> Array:
    # Points are distinct, so only a token itself lies at distance 0.
    return _nearest(xp, xp.where(squared > 0, squared, INT32_MAX), is_known)


def int32_points(xp: Namespace, positions: Array, device: object) -> Array:
    """Return positions (N, axes) as int32 of the library ``xp``, on the device."""
    if isinstance(positions, np.ndarray):
        positions = np.array(positions, dtype=np.int32)  # a copy: PyTorch warns of arrays that are read-only
    return xp.asarray(positions, dtype=xp.int32, device=device)


def squared_distances(first: Array, second: Array) -> Array:
    """Return squared distances between all pairs of integer points (n, axes) and (m, axes): int (n, m)."""
    xp = array_namespace(first, second)
    return xp.sum((first[:, None, :] - second[None, :, :]) ** 2, axis=2, dtype=first.dtype)


def _square_root(xp: Namespace, squared: Array) -> Array:
    distance = xp.sqrt(xp.astype(squared, xp.float32))
    return xp.where(squared < INT32_MAX, distance, float("inf"))


def _check_known(positions: Grid | Array, is_known: Array) -> None:
    xp = array_namespace(is_known)
    if is_known.dtype != xp.bool:
        raise TypeError(f"is_known: expected bool, got {is_known.dtype}")
    if not isinstance(positions, Grid) and positions.ndim != 2:
        raise ValueError(f"positions: expected shape (N, axes), got {tuple(positions.shape)}")
    length = positions.num_tokens if isinstance(positions, Grid) else positions.shape[0]
    if is_known.ndim != 2 or is_known.shape[1] != length:
        raise ValueError(f"is_known: expected shape (batch, {length}), got {tuple(is_known.shape)}")

"""Furthest point sampling: picks that lie as far from everything known as they can."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, argsort, array_namespace, device_of, scan
from prmim_core.coverage import int32_points, nearest_known_distance, squared_distances
from prmim_core.grid import INT32_MAX, Grid
from prmim_core.noise import noise_rank

# Up to this many tokens rows of distances are looked up in a table of all N * N (16 MiB), which is two to three times
# as fast in NumPy as adding them up axis by axis.
_TABLE_TOKENS = 2048


Sampler = Callable[[Grid, int, Array, Array | None, Array | None], Array]
"""What is called as :func:`furthest_point_sampling` is, by position, and picks the same tokens."""


def furthest_point_sampling(
    positions: Grid | Array,
    num_samples: int,
    noise: Array,
    known: Array | None = None,
    candidates: Array | None = None,
) -> Array:
    """Pick tokens one after the other, each the furthest from all that are known or picked already.

    Parameters
    ----------
    positions
        A :class:`Grid`, or int (N, axes) of distinct points whose squared distances are below 2**30.
    num_samples
        How many tokens to pick, at most the number of candidates in every image; it is static, so only N is checked.
    noise
        (batch, N), any real dtype. Of tokens equally far the one of higher noise is picked; the first pick, where
        nothing is known, is the candidate of highest noise.
    known
        bool (batch, N), tokens known from the start; None: none.
    candidates
        bool (batch, N), tokens that may be picked, known ones excepted; None: all.

    Returns
    -------
    array
        int (batch, num_samples), in the order of picking.

    Raises
    ------
    TypeError
        If positions are not integers, or ``known`` or ``candidates`` not bool.
    ValueError
        If shapes do not fit or ``num_samples`` is out of range.

    Notes
    -----
    One integer key per token holds all that decides: ``key = distance**2 * N + rank``; the pick is the largest key, and
    ``key = minimum(key, distance_to_pick**2 * N + rank)`` takes it into account. No masks, no branches, a fixed number
    of turns: O(num_samples * N) per image. Where the key could pass int32, distance and rank are compared one after the
    other instead, with the same picks. Any k picks are the first k of k + 1, and their covering radius is at most twice
    the best one (Gonzalez, 1985).

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.asarray([[1, 0, 3, 2, 4]])
    >>> known = np.asarray([[True, False, False, False, False]])
    >>> furthest_point_sampling(Grid((5,)), 2, noise, known=known).tolist()
    [[4, 2]]
    """
    xp = array_namespace(noise)
    length = _check(positions, num_samples, noise, known, candidates)
    if num_samples == 0:
        return argsort(noise)[:, :0]
    distance, rank = starting_distance(positions, noise, known, candidates)
    if key_fits_int32(positions):
        key = distance * length + rank
        if isinstance(noise, np.ndarray) and isinstance(positions, Grid) and length <= _TABLE_TOKENS:
            return _pick_in_place(_key_table(positions), key, rank, num_samples)
        return _pick_by_packed_key(xp, _distance_rows(xp, positions, length, noise), key, rank, num_samples)
    return _pick_by_distance_then_rank(xp, _distance_rows(xp, positions, 1, noise), distance, rank, num_samples)


def starting_distance(
    positions: Grid | Array, noise: Array, known: Array | None, candidates: Array | None
) -> tuple[Array, Array]:
    """Return what sampling starts from.

    Returns
    -------
    distance
        int32 (batch, N): squared, to the nearest known token; one and the same for all where nothing is known, and -1
        where a token may not be picked.
    rank
        int32 (batch, N): see :func:`prmim_core.noise_rank`.
    """
    xp = array_namespace(noise)
    is_known = xp.zeros(noise.shape, dtype=xp.bool, device=device_of(noise)) if known is None else known
    may_pick = ~is_known if candidates is None else candidates & ~is_known
    distance = nearest_known_distance(positions, is_known)
    furthest = _max_squared_distance(positions)
    if furthest is not None:
        distance = xp.minimum(distance, xp.full_like(distance, furthest + 1))
    return xp.where(may_pick, distance, -1), noise_rank(noise)


def key_fits_int32(positions: Grid | Array) -> bool:
    """Whether distance and rank fit into one int32 key; False where the distances are not known here."""
    furthest = _max_squared_distance(positions)
    length = positions.num_tokens if isinstance(positions, Grid) else positions.shape[0]
    return furthest is not None and (furthest + 2) * length <= INT32_MAX


Rows = Callable[[Array], Array]
"""From picks (batch,) to the squared distances of all tokens to them, int32 (batch, N)."""


def _pick_by_packed_key(xp: Namespace, rows: Rows, key: Array, rank: Array, num_samples: int) -> Array:
    def step(key: Array) -> tuple[Array, Array]:
        pick = xp.argmax(key, axis=1)
        return xp.minimum(key, rows(pick) + rank), pick

    return scan(xp, step, key, num_samples)[1]


def _pick_in_place(
    table: NDArray[np.int32], key: NDArray[np.int32], rank: NDArray[np.int32], num_samples: int
) -> NDArray[np.intp]:
    """Pick by the packed key in NumPy, without a new array in every turn; ``key`` is lost."""
    picks = np.empty((num_samples, key.shape[0]), dtype=np.intp)
    row = np.empty_like(key)
    for pick in picks:
        np.argmax(key, axis=1, out=pick)
        np.take(table, pick, axis=0, out=row, mode="clip")  # all are inside; to check it, NumPy would copy `row`
        np.add(row, rank, out=row)
        np.minimum(key, row, out=key)
    return np.ascontiguousarray(picks.T)


@lru_cache(maxsize=4)
def _key_table(grid: Grid) -> NDArray[np.int32]:
    """Return the squared distances between all tokens, times N: what they add to a key."""
    table: NDArray[np.int32] = squared_distances(grid.positions, grid.positions) * grid.num_tokens
    table.flags.writeable = False
    return table


def _pick_by_distance_then_rank(xp: Namespace, rows: Rows, distance: Array, rank: Array, num_samples: int) -> Array:
    def step(distance: Array) -> tuple[Array, Array]:
        is_furthest = distance == xp.max(distance, axis=1, keepdims=True)
        pick = xp.argmax(xp.where(is_furthest, rank, -1), axis=1)
        return xp.minimum(distance, rows(pick)), pick

    return scan(xp, step, distance, num_samples)[1]


def _distance_rows(xp: Namespace, positions: Grid | Array, scale: int, like: Array) -> Rows:
    """Return the rows of distances, times ``scale``, in the library and on the device of ``like``."""
    length, device = like.shape[1], device_of(like)
    if isinstance(positions, Grid):
        if length > _TABLE_TOKENS:
            return _grid_rows(xp, positions, scale, device)
        points = xp.stack(positions.coordinates(xp, device), axis=1)
    else:
        points = int32_points(xp, positions, device)
    if length <= _TABLE_TOKENS:
        table = squared_distances(points, points) * scale
        return lambda pick: xp.take(table, pick, axis=0)
    return lambda pick: squared_distances(xp.take(points, pick, axis=0), points) * scale


def _grid_rows(xp: Namespace, grid: Grid, scale: int, device: object) -> Rows:
    """Look distances up one axis at a time, and add them."""
    axes = []
    stride = grid.num_tokens
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        stride //= size
        line = xp.arange(size, dtype=xp.int32, device=device) * step
        axes.append((stride, size, (line[:, None] - line[None, :]) ** 2 * scale))

    def rows(pick: Array) -> Array:
        total = xp.zeros((pick.shape[0], 1), dtype=xp.int32, device=device)
        for stride, size, table in reversed(axes):
            along_axis = xp.take(table, pick // stride % size, axis=0)
            total = xp.reshape(along_axis[:, :, None] + total[:, None, :], (pick.shape[0], -1))
        return total

    return rows


def _max_squared_distance(positions: Grid | Array) -> int | None:
    """Bound the squared distances without reading values off a device; None where they are not known here."""
    if isinstance(positions, Grid):
        return positions.max_squared_distance
    if isinstance(positions, np.ndarray):
        return int((np.ptp(positions.astype(np.int64), axis=0) ** 2).sum())
    return None


def _check(
    positions: Grid | Array, num_samples: int, noise: Array, known: Array | None, candidates: Array | None
) -> int:
    xp = array_namespace(noise)
    if isinstance(positions, Grid):
        length = positions.num_tokens
    else:
        if positions.ndim != 2:
            raise ValueError(f"positions: expected a Grid or shape (N, axes), got shape {tuple(positions.shape)}")
        if not array_namespace(positions).isdtype(positions.dtype, "integral"):
            raise TypeError(f"positions: expected integers, got {positions.dtype}")
        length = int(positions.shape[0])
    if noise.ndim != 2 or noise.shape[1] != length:
        raise ValueError(f"noise: expected shape (batch, {length}), got {tuple(noise.shape)}")
    if not 0 <= num_samples <= length:
        raise ValueError(f"num_samples: expected 0 to {length}, got {num_samples}")
    for name, mask in (("known", known), ("candidates", candidates)):
        if mask is None:
            continue
        if mask.dtype != xp.bool:
            raise TypeError(f"{name}: expected bool, got {mask.dtype}")
        if tuple(mask.shape) != tuple(noise.shape):
            raise ValueError(f"{name}: expected the shape of noise, {tuple(noise.shape)}, got {tuple(mask.shape)}")
    return length

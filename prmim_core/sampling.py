"""Furthest point sampling: each pick lies as far as possible from known tokens."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, argsort, device_of, scan
from prmim_core._checks import check_arrays, check_count, check_mask, check_noise, check_positions, squared_diagonal
from prmim_core.coverage import _int32_points, _nearest_known_distance, _squared_distances
from prmim_core.grid import INT32_MAX, Grid
from prmim_core.noise import _noise_rank

# Up to this many tokens, NumPy reads distances from an N x N table (16 MiB), two to three times as fast as adding them
# axis by axis.
_TABLE_TOKENS = 2048


Sampler = Callable[[Grid, int, Array, Array | None, Array | None], Array]
"""Drop-in replacements for :func:`furthest_point_sampling`, with positional arguments. Must pick the same tokens."""


def furthest_point_sampling(
    positions: Grid | Array,
    num_samples: int,
    noise: Array,
    is_known: Array | None = None,
    is_candidate: Array | None = None,
) -> Array:
    """Repeatedly pick the token furthest from all known and picked tokens.

    Parameters
    ----------
    positions
        A :class:`Grid`, or int (N, axes) of distinct points with squared distances below 2**30.
    num_samples
        Number of picks, at most the number of unknown candidates of every image. Only the bound N is checked.
    noise
        (batch, N), any real dtype. Breaks ties: the token of higher noise is picked. Without known tokens, the first
        pick is the candidate of highest noise.
    is_known
        bool (batch, N), tokens known from the start; None: none.
    is_candidate
        bool (batch, N), tokens that may be picked; None: all. Known tokens are never picked.

    Returns
    -------
    array
        int (batch, num_samples), in picking order.

    Raises
    ------
    TypeError
        If positions are not integers, ``noise`` does not hold real numbers, or ``is_known`` or ``is_candidate`` is not
        bool.
    ValueError
        If a shape does not fit, ``num_samples`` is out of range, ``noise`` has NaN or the squared diagonal of NumPy
        positions reaches 2**30 (values are checked on the host only).

    Notes
    -----
    One integer key per token, ``key = distance**2 * N + rank``, orders all candidates. Every iteration picks the
    largest key and sets ``key = minimum(key, distance_to_pick**2 * N + rank)``: O(num_samples * N) per image. If the
    key could overflow int32, distance and rank are compared one after the other, with the same picks.

    Fewer picks are a prefix of more picks. The covering radius is at most twice the optimum (Gonzalez, 1985).

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.asarray([[1, 0, 3, 2, 4]])
    >>> is_known = np.asarray([[True, False, False, False, False]])
    >>> furthest_point_sampling(Grid((5,)), 2, noise, is_known).tolist()
    [[4, 2]]
    """
    xp = check_arrays(noise=noise)
    num_tokens = check_positions(positions)
    check_noise(noise, num_tokens)
    check_count("num_samples", num_samples, num_tokens)
    for name, mask in (("is_known", is_known), ("is_candidate", is_candidate)):
        if mask is not None:
            check_mask(xp, name, mask, noise)
    return _furthest_point_sampling(xp, positions, num_samples, noise, is_known, is_candidate)


def _furthest_point_sampling(
    xp: Namespace,
    positions: Grid | Array,
    num_samples: int,
    noise: Array,
    is_known: Array | None,
    is_candidate: Array | None,
) -> Array:
    if num_samples == 0:
        return argsort(xp, noise)[:, :0]
    distance, rank = starting_distance(xp, positions, noise, is_known, is_candidate)
    length = noise.shape[1]
    if key_fits_int32(positions):
        key = distance * length + rank
        if isinstance(noise, np.ndarray) and isinstance(positions, Grid) and length <= _TABLE_TOKENS:
            return _pick_in_place(_key_table(positions), key, rank, num_samples)
        return _pick_by_packed_key(xp, _distance_rows(xp, positions, length, noise), key, rank, num_samples)
    return _pick_by_distance_then_rank(xp, _distance_rows(xp, positions, 1, noise), distance, rank, num_samples)


def starting_distance(
    xp: Namespace, positions: Grid | Array, noise: Array, is_known: Array | None, is_candidate: Array | None
) -> tuple[Array, Array]:
    """Compute the initial state of sampling. Arguments are not validated.

    For the core's loop and for kernels.

    Returns
    -------
    distance
        int32 (batch, N): squared distance to the nearest known token, a constant without known tokens, and -1 for
        tokens that must not be picked.
    rank
        int32 (batch, N): rank of the noise, lowest first.
    """
    if is_known is None:
        is_known = xp.zeros(noise.shape, dtype=xp.bool, device=device_of(noise))
    may_pick = ~is_known if is_candidate is None else is_candidate & ~is_known
    distance = _nearest_known_distance(xp, positions, is_known)
    furthest = _max_squared_distance(positions)
    if furthest is not None:
        distance = xp.minimum(distance, xp.full_like(distance, furthest + 1))
    return xp.where(may_pick, distance, -1), _noise_rank(xp, noise)


def key_fits_int32(positions: Grid | Array) -> bool:
    """Return whether distance and rank fit into one int32 key; False if unknown.

    Distances are unknown if free positions are not on the host.
    """
    furthest = _max_squared_distance(positions)
    length = positions.num_tokens if isinstance(positions, Grid) else positions.shape[0]
    return furthest is not None and (furthest + 2) * length <= INT32_MAX


Rows = Callable[[Array], Array]
"""Maps picks (batch,) to the squared distances of all tokens to them, int32 (batch, N)."""


def _pick_by_packed_key(xp: Namespace, rows: Rows, key: Array, rank: Array, num_samples: int) -> Array:
    def step(key: Array) -> tuple[Array, Array]:
        pick = xp.argmax(key, axis=1)
        return xp.minimum(key, rows(pick) + rank), pick

    return scan(xp, step, key, num_samples)[1]


def _pick_in_place(
    table: NDArray[np.int32], key: NDArray[np.int32], rank: NDArray[np.int32], num_samples: int
) -> NDArray[np.intp]:
    """Pick by the packed key in NumPy, without allocations; overwrites ``key``."""
    picks = np.empty((num_samples, key.shape[0]), dtype=np.intp)
    row = np.empty_like(key)
    for pick in picks:
        np.argmax(key, axis=1, out=pick)
        np.take(table, pick, axis=0, out=row, mode="clip")  # the default mode would copy `row`
        np.add(row, rank, out=row)
        np.minimum(key, row, out=key)
    return np.ascontiguousarray(picks.T)


@lru_cache(maxsize=4)
def _key_table(grid: Grid) -> NDArray[np.int32]:
    """Compute the squared distances between all tokens, times N."""
    table: NDArray[np.int32] = _squared_distances(np, grid.positions, grid.positions) * grid.num_tokens
    table.flags.writeable = False
    return table


def _pick_by_distance_then_rank(xp: Namespace, rows: Rows, distance: Array, rank: Array, num_samples: int) -> Array:
    def step(distance: Array) -> tuple[Array, Array]:
        is_furthest = distance == xp.max(distance, axis=1, keepdims=True)
        pick = xp.argmax(xp.where(is_furthest, rank, -1), axis=1)
        return xp.minimum(distance, rows(pick)), pick

    return scan(xp, step, distance, num_samples)[1]


def _distance_rows(xp: Namespace, positions: Grid | Array, scale: int, like: Array) -> Rows:
    """Return a function from picks to rows of distances, times ``scale``."""
    length, device = like.shape[1], device_of(like)
    if isinstance(positions, Grid):
        if length > _TABLE_TOKENS:
            return _grid_rows(xp, positions, scale, device)
        points = xp.stack(positions.coordinates(like), axis=1)
    else:
        points = _int32_points(xp, positions, device)
    if length <= _TABLE_TOKENS:
        table = _squared_distances(xp, points, points) * scale
        return lambda pick: xp.take(table, pick, axis=0)
    return lambda pick: _squared_distances(xp, xp.take(points, pick, axis=0), points) * scale


def _grid_rows(xp: Namespace, grid: Grid, scale: int, device: object) -> Rows:
    """Look up distances one axis at a time and add them."""
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
    """Bound the squared distances; None if the positions are not on the host."""
    if isinstance(positions, Grid):
        return positions.max_squared_distance
    if isinstance(positions, np.ndarray):
        return squared_diagonal(positions)
    return None

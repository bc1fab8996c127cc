"""Furthest point sampling: picks that lie as far from everything known as they can."""

from collections.abc import Callable

import numpy as np

from prmim_core._arrays import Array, Namespace, array_namespace, device_of, scan
from prmim_core.coverage import int32_points, nearest_known_distance, squared_distances
from prmim_core.grid import INT32_MAX, Grid
from prmim_core.noise import noise_rank

# Up to this many tokens a table of all N * N distances is made once (16 MiB) and rows are looked up in it: five times
# as fast in NumPy as computing each row where it is needed.
_TABLE_TOKENS = 2048


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
        return xp.argsort(noise, axis=1, stable=True)[:, :0]
    nobody = xp.zeros(noise.shape, dtype=xp.bool, device=device_of(noise))
    is_known = nobody if known is None else known
    may_pick = ~is_known if candidates is None else candidates & ~is_known
    distance = nearest_known_distance(positions, is_known)
    rank = noise_rank(noise)
    furthest = _max_squared_distance(positions)
    rows = _distance_rows(xp, positions, length, device_of(noise))
    if furthest is not None and (furthest + 2) * length <= INT32_MAX:
        return _pick_by_packed_key(xp, rows, distance, rank, may_pick, furthest, num_samples)
    return _pick_by_distance_then_rank(xp, rows, distance, rank, may_pick, num_samples)


def _pick_by_packed_key(
    xp: Namespace,
    rows: Callable[[Array], Array],
    distance: Array,
    rank: Array,
    may_pick: Array,
    furthest: int,
    num_samples: int,
) -> Array:
    length = rank.shape[1]
    nowhere_near = xp.full_like(distance, furthest + 1)  # where nothing is known, all are equally far
    key = xp.minimum(distance, nowhere_near) * length + rank
    key = xp.where(may_pick, key, -1)

    def step(key: Array) -> tuple[Array, Array]:
        pick = xp.argmax(key, axis=1)
        return xp.minimum(key, rows(pick) * length + rank), pick

    return scan(xp, step, key, num_samples)[1]


def _pick_by_distance_then_rank(
    xp: Namespace, rows: Callable[[Array], Array], distance: Array, rank: Array, may_pick: Array, num_samples: int
) -> Array:
    distance = xp.where(may_pick, distance, -1)

    def step(distance: Array) -> tuple[Array, Array]:
        is_furthest = distance == xp.max(distance, axis=1, keepdims=True)
        pick = xp.argmax(xp.where(is_furthest, rank, -1), axis=1)
        return xp.minimum(distance, rows(pick)), pick

    return scan(xp, step, distance, num_samples)[1]


def _distance_rows(xp: Namespace, positions: Grid | Array, length: int, device: object) -> Callable[[Array], Array]:
    """Return a function from picks (batch,) to the squared distances of all tokens to them, int32 (batch, N)."""
    if isinstance(positions, Grid):
        points = xp.stack(positions.coordinates(xp, device), axis=1)
    else:
        points = int32_points(xp, positions, device)
    if length <= _TABLE_TOKENS:
        table = squared_distances(points, points)
        return lambda pick: xp.take(table, pick, axis=0)
    return lambda pick: squared_distances(xp.take(points, pick, axis=0), points)


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

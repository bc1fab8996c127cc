"""Distances from tokens to known tokens."""

import math
from collections.abc import Iterable, Sequence

Position = Sequence[int]

NOTHING_KNOWN = 2**31 - 1
"""Squared distance of a token if no token is known."""


def squared_distance(first: Position, second: Position) -> int:
    """Return the squared Euclidean distance between two positions.

    Examples
    --------
    >>> squared_distance((0, 0), (3, 4))
    25
    """
    total = 0
    for a, b in zip(first, second, strict=True):
        total += (a - b) ** 2
    return total


def nearest_squared_distance(position: Position, others: Iterable[Position]) -> int:
    """Return the squared distance from a position to the nearest of some others.

    Examples
    --------
    >>> nearest_squared_distance((0, 0), [(3, 4), (0, 2)])
    4
    """
    return min(squared_distance(position, other) for other in others)


def nearest_squared_distances(positions: Sequence[Position], known: Sequence[int]) -> list[int]:
    """Return the squared distance from every token to its nearest known token.

    Parameters
    ----------
    positions : N positions
    known : raster numbers of the known tokens; without any, every distance is `NOTHING_KNOWN`

    Examples
    --------
    >>> nearest_squared_distances([(0,), (1,), (2,), (3,)], known=[0])
    [0, 1, 4, 9]
    """
    if len(known) == 0:
        return [NOTHING_KNOWN] * len(positions)
    known_positions = [positions[token] for token in known]
    return [nearest_squared_distance(position, known_positions) for position in positions]


def covering_radius(positions: Sequence[Position], known: Sequence[int]) -> float:
    """Return the largest Euclidean distance from a token to its nearest known token.

    It is infinite if no token is known.

    Examples
    --------
    >>> covering_radius([(0,), (1,), (2,), (3,)], known=[0])
    3.0
    """
    if len(known) == 0:
        return math.inf
    return math.sqrt(max(nearest_squared_distances(positions, known)))

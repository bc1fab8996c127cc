"""Furthest point sampling."""

from collections.abc import Sequence

from prmim_reference.coverage import Position, nearest_squared_distance
from prmim_reference.noise import noise_rank


def furthest_point_sampling(
    positions: Sequence[Position],
    num_samples: int,
    noise: Sequence[float],
    known: Sequence[int] = (),
    candidates: Sequence[int] | None = None,
) -> list[int]:
    """Repeatedly pick the token furthest from all known and picked tokens.

    The next pick is the candidate with the largest squared distance to its nearest known or picked token. Ties are
    broken by the highest noise rank. Without known or picked tokens, all candidates are equal.

    Parameters
    ----------
    positions : N positions, integers
    num_samples : int
        Number of picks, at most the number of candidates that are not known.
    noise : sequence of N numbers
    known : raster numbers; none by default
    candidates : raster numbers; all by default. Known tokens are never picked.

    Returns
    -------
    list of int
        Distinct raster numbers, in picking order.

    References
    ----------
    T. F. Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985: the covering radius of k picks is
    at most twice the optimum for k tokens.

    Examples
    --------
    >>> furthest_point_sampling([(0,), (1,), (2,), (3,), (4,)], 3, noise=[5, 4, 3, 2, 1],
    ...     known=[0])
    [4, 2, 1]
    """
    ranks = noise_rank(noise)
    if candidates is None:
        candidates = range(len(positions))
    remaining = [token for token in candidates if token not in known]
    if not 0 <= num_samples <= len(remaining):
        raise ValueError(f"num_samples: expected 0 to {len(remaining)}, got {num_samples}")
    covered = [positions[token] for token in known]
    picks: list[int] = []
    for _ in range(num_samples):

        def preference(token: int) -> tuple[int, int]:
            distance = nearest_squared_distance(positions[token], covered) if covered else 0
            return distance, ranks[token]

        pick = max(remaining, key=preference)
        remaining.remove(pick)
        covered.append(positions[pick])
        picks.append(pick)
    return picks

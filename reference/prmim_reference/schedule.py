"""Plans: permutations of an image's tokens: visible, decoded, stages."""

from collections.abc import Sequence

from prmim_reference import grid
from prmim_reference.counts import TokenCounts
from prmim_reference.coverage import nearest_squared_distance
from prmim_reference.masking import block_visible, random_visible
from prmim_reference.noise import check_noise, noise_rank
from prmim_reference.throwing import choose_decoded, choose_decoded_units


def stage_sizes(num_thrown: int, stages: int) -> tuple[int, ...]:
    """Return the sizes of the stages: they differ by at most one, larger first.

    Examples
    --------
    >>> stage_sizes(98, 2)
    (49, 49)
    >>> stage_sizes(5, 3)
    (2, 2, 1)
    """
    if stages < 1:
        raise ValueError(f"stages: expected at least 1, got {stages}")
    sizes = [0] * stages
    for thrown in range(num_thrown):
        sizes[thrown % stages] += 1
    return tuple(sizes)


def num_known(counts: TokenCounts, stages: int, stage: int) -> int:
    """Return the number of known tokens before a stage (stages count from 1).

    Examples
    --------
    >>> [num_known(TokenCounts(49, 49, 98), 2, stage) for stage in (1, 2)]
    [98, 147]
    """
    return counts.visible + counts.decoded + sum(stage_sizes(counts.thrown, stages)[: stage - 1])


def thrown_order(
    shape: Sequence[int], noise: Sequence[float], known: Sequence[int], *, spacing: Sequence[int] | None = None
) -> list[int]:
    """Sort unknown tokens by squared distance to known tokens, then by noise rank.

    Without known tokens, the order is that of the noise rank.

    Examples
    --------
    >>> thrown_order((5,), noise=[1, 9, 2, 8, 3], known=[2])
    [3, 1, 0, 4]
    """
    positions = grid.positions(shape, spacing)
    ranks = noise_rank(noise)
    known_positions = [positions[token] for token in known]

    def place(token: int) -> tuple[int, int]:
        distance = nearest_squared_distance(positions[token], known_positions) if known_positions else 0
        return distance, ranks[token]

    return sorted((token for token in range(len(positions)) if token not in known), key=place)


def make_order(
    shape: Sequence[int],
    counts: TokenCounts,
    noise: Sequence[float],
    *,
    spacing: Sequence[int] | None = None,
    throwing: str = "furthest",
    furthest_from: str = "visible",
    visible: Sequence[int] | None = None,
    decoded: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    unit: Sequence[int] | None = None,
) -> list[int]:
    """Return the plan of one image: visible, then decoded, then thrown tokens.

    Stages are consecutive slices of the thrown tokens (`stage_sizes`), so their number does not change the order.

    Parameters
    ----------
    shape, spacing : the grid
    counts : TokenCounts
    noise : sequence of N numbers, not NaN; integers for throwing by "weighted" or "cell"
    throwing, furthest_from, weights : see `throwing.choose_decoded`
    visible : raster numbers of the visible tokens, distinct; by default the tokens (or units) of lowest noise
    decoded : raster numbers of the decoded tokens, distinct and masked; by default, chosen by `throwing`
    unit : tokens along each axis of the blocks that are decoded or thrown together (`throwing.choose_decoded_units`);
        single tokens by default. Thrown tokens are sorted one by one in either case.

    Returns
    -------
    list of int
        A permutation of 0 .. N-1.

    Examples
    --------
    >>> make_order((1, 6), TokenCounts(1, 2, 3), noise=[0, 5, 1, 4, 2, 3])
    [0, 5, 3, 2, 4, 1]
    """
    if not len(noise) == counts.num_tokens == grid.num_tokens(shape):
        raise ValueError(
            f"noise: expected one value for each of {grid.num_tokens(shape)} tokens and counts that add up to them, "
            f"got {len(noise)} values and {counts}"
        )
    check_noise(noise)
    if visible is None:
        if unit is None:
            visible = random_visible(counts.visible, noise)
        else:
            visible = block_visible(shape, unit, counts.visible // grid.num_tokens(unit), noise)
    if len(visible) != counts.visible:
        raise ValueError(f"visible: expected {counts.visible} tokens, got {len(visible)}")
    for token in visible:
        if not 0 <= token < counts.num_tokens:
            raise IndexError(f"visible: expected tokens in [0, {counts.num_tokens}), got {token}")
    if len(set(visible)) < len(visible):
        raise ValueError(f"visible: expected distinct tokens, got {list(visible)}")
    if decoded is not None:
        if sorted({*decoded} - {*visible}) != sorted(decoded) or len(decoded) != counts.decoded:
            raise ValueError(f"decoded: expected {counts.decoded} distinct masked tokens, got {list(decoded)}")
    elif unit is None:
        decoded = choose_decoded(
            throwing,
            shape,
            counts.decoded,
            noise,
            visible,
            furthest_from=furthest_from,
            spacing=spacing,
            weights=weights,
        )
    else:
        decoded = choose_decoded_units(
            throwing,
            shape,
            unit,
            counts.decoded,
            noise,
            visible,
            furthest_from=furthest_from,
            spacing=spacing,
            weights=weights,
        )
    known = [*visible, *decoded]
    return known + thrown_order(shape, noise, known, spacing=spacing)

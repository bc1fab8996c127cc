"""Which masked tokens are decoded; the others are thrown."""

from collections.abc import Sequence

from prmim_reference import grid
from prmim_reference.masking import weighted_draw
from prmim_reference.noise import by_noise, noise_rank
from prmim_reference.sampling import furthest_point_sampling


def masked_tokens(num_tokens: int, visible: Sequence[int]) -> list[int]:
    """Return the tokens that are not visible, in raster order.

    Examples
    --------
    >>> masked_tokens(5, visible=[3, 0])
    [1, 2, 4]
    """
    return [token for token in range(num_tokens) if token not in visible]


def furthest_decoded(
    shape: Sequence[int],
    noise: Sequence[int],
    visible: Sequence[int],
    num_decoded: int,
    *,
    seed: str = "visible",
    spacing: Sequence[int] | None = None,
) -> list[int]:
    """Pick the decoded tokens by furthest point sampling, in order of picking.

    ``seed="visible"``: the visible tokens are known from the start. ``seed="none"``: nothing is, and the first pick is
    the masked token of highest noise rank.
    """
    if seed not in ("visible", "none"):
        raise ValueError(f'seed: expected "visible" or "none", got {seed!r}')
    positions = grid.positions(shape, spacing)
    return furthest_point_sampling(
        positions,
        num_decoded,
        noise,
        known=visible if seed == "visible" else (),
        candidates=masked_tokens(len(positions), visible),
    )


def random_decoded(noise: Sequence[int], visible: Sequence[int], num_decoded: int) -> list[int]:
    """Take the masked tokens of lowest noise rank, ascending.

    Examples
    --------
    >>> random_decoded([4, 3, 2, 1], visible=[3], num_decoded=2)
    [2, 1]
    """
    return by_noise(noise, masked_tokens(len(noise), visible))[:num_decoded]


def weighted_decoded(
    noise: Sequence[int], visible: Sequence[int], num_decoded: int, weights: Sequence[float]
) -> list[int]:
    """Draw masked tokens without replacement, with probability proportional to their weights; in order of drawing."""
    return weighted_draw(noise, weights, masked_tokens(len(noise), visible), num_decoded)


def cell_phase(index: Sequence[int], offset: int) -> int:
    """Return the phase 0 .. 3 of a grid cell in the running-cell pattern (VideoMAE V2).

    Cells of 2x2 tokens over the last two axes hold the phases 0, 1 / 2, 3; every time step (axis 0 of three) moves them
    on by one, and ``offset`` moves them all. With a single axis the cell is four tokens long.

    Examples
    --------
    >>> [[cell_phase((row, column), 0) for column in range(4)] for row in range(2)]
    [[0, 1, 0, 1], [2, 3, 2, 3]]
    """
    if len(index) == 1:
        return (index[0] + offset) % 4
    row, column = index[-2], index[-1]
    time = index[0] if len(index) == 3 else 0
    return (row % 2 * 2 + column % 2 + time + offset) % 4


def cell_decoded(shape: Sequence[int], noise: Sequence[int], visible: Sequence[int], num_decoded: int) -> list[int]:
    """Take the masked tokens of the lowest phases, inside a phase those of lowest noise rank.

    The offset of the pattern is the noise of token 0 modulo 4 (not negative).

    Examples
    --------
    >>> cell_decoded((2, 4), noise=[4, 7, 6, 5, 4, 3, 2, 1], visible=[0], num_decoded=3)
    [2, 3, 1]
    """
    offset = noise[0] % 4
    ranks = noise_rank(noise)
    index = grid.positions(shape)
    masked = masked_tokens(len(noise), visible)
    return sorted(masked, key=lambda token: (cell_phase(index[token], offset), ranks[token]))[:num_decoded]


def choose_decoded(
    throwing: str,
    shape: Sequence[int],
    noise: Sequence[int],
    visible: Sequence[int],
    num_decoded: int,
    *,
    seed: str = "visible",
    spacing: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Return the decoded tokens under a throwing strategy by name.

    Parameters
    ----------
    throwing : {"furthest", "random", "weighted", "cell"}
    shape, spacing : the grid
    noise : sequence of int, N values
    visible : raster numbers
    num_decoded : int
        M, at most the masked tokens.
    seed : {"visible", "none"}
        For "furthest" alone.
    weights : sequence of float, N values
        For "weighted" alone, and needed there.

    Raises
    ------
    ValueError
        If a name is unknown, the weights are missing, or there are not that many masked tokens.

    Examples
    --------
    >>> choose_decoded("furthest", (1, 5), noise=[0, 1, 2, 3, 4], visible=[0], num_decoded=2)
    [4, 2]
    """
    if not 0 <= num_decoded <= len(noise) - len(visible):
        raise ValueError(f"num_decoded: expected 0 to {len(noise) - len(visible)}, got {num_decoded}")
    if throwing == "furthest":
        return furthest_decoded(shape, noise, visible, num_decoded, seed=seed, spacing=spacing)
    if throwing == "random":
        return random_decoded(noise, visible, num_decoded)
    if throwing == "cell":
        return cell_decoded(shape, noise, visible, num_decoded)
    if throwing == "weighted":
        if weights is None:
            raise ValueError('weights: expected one weight per token for throwing="weighted", got None')
        return weighted_decoded(noise, visible, num_decoded, weights)
    raise ValueError(f'throwing: expected "furthest", "random", "weighted" or "cell", got {throwing!r}')

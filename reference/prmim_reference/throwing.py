"""Throwing strategies: choose decoded tokens; other masked tokens are thrown."""

from collections.abc import Sequence

from prmim_reference import grid
from prmim_reference.masking import unit_tokens, weighted_draw
from prmim_reference.noise import by_noise, integers, noise_rank
from prmim_reference.sampling import furthest_point_sampling


def masked_tokens(num_tokens: int, visible: Sequence[int]) -> list[int]:
    """Return the masked tokens in raster order.

    Examples
    --------
    >>> masked_tokens(5, visible=[3, 0])
    [1, 2, 4]
    """
    return [token for token in range(num_tokens) if token not in visible]


def furthest_decoded(
    shape: Sequence[int],
    num_decoded: int,
    noise: Sequence[float],
    visible: Sequence[int],
    *,
    furthest_from: str = "visible",
    spacing: Sequence[int] | None = None,
) -> list[int]:
    """Pick masked tokens by furthest point sampling; return them in picking order.

    ``furthest_from="visible"``: visible tokens are known from the start. ``furthest_from="none"``: no token is known,
    so the first pick is the masked token of highest noise rank.
    """
    if furthest_from not in ("visible", "none"):
        raise ValueError(f'furthest_from: expected "visible" or "none", got {furthest_from!r}')
    positions = grid.positions(shape, spacing)
    return furthest_point_sampling(
        positions,
        num_decoded,
        noise,
        known=visible if furthest_from == "visible" else (),
        candidates=masked_tokens(len(positions), visible),
    )


def random_decoded(num_decoded: int, noise: Sequence[float], visible: Sequence[int]) -> list[int]:
    """Take the masked tokens of lowest noise, in ascending order of noise.

    Examples
    --------
    >>> random_decoded(2, [4, 3, 2, 1], visible=[3])
    [2, 1]
    """
    return by_noise(noise, masked_tokens(len(noise), visible))[:num_decoded]


def weighted_decoded(
    num_decoded: int, noise: Sequence[int], visible: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Draw masked tokens without replacement, in proportion to weights.

    Returns them in drawing order.
    """
    return weighted_draw(num_decoded, noise, weights, masked_tokens(len(noise), visible))


def cell_phase(index: Sequence[int], offset: int) -> int:
    """Return the phase 0 .. 3 of a grid cell in the running cell (VideoMAE V2).

    A cell of 2x2 tokens over the last two axes has the phases 0, 1 / 2, 3. Every time step (axis 0 of three) advances
    them by one, and ``offset`` advances all. On a single axis, a cell is four tokens long.

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


def cell_decoded(shape: Sequence[int], num_decoded: int, noise: Sequence[int], visible: Sequence[int]) -> list[int]:
    """Take the masked tokens of lowest phase, then of lowest noise rank.

    The offset of the pattern is the noise of token 0 modulo 4 (non-negative).

    Examples
    --------
    >>> cell_decoded((2, 4), 3, noise=[4, 7, 6, 5, 4, 3, 2, 1], visible=[0])
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
    num_decoded: int,
    noise: Sequence[float],
    visible: Sequence[int],
    *,
    furthest_from: str = "visible",
    spacing: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Choose the decoded tokens by a named throwing strategy.

    Parameters
    ----------
    throwing : {"furthest", "random", "weighted", "cell"}
    shape, spacing : the grid
    num_decoded : int
        M, at most the number of masked tokens.
    noise : sequence of N numbers; integers for "weighted" and "cell"
    visible : raster numbers
    furthest_from : {"visible", "none"}
        For "furthest" only.
    weights : sequence of float, N values
        Required for "weighted", ignored otherwise.

    Raises
    ------
    ValueError
        If a name is unknown, weights are missing or M exceeds the number of masked tokens.

    Examples
    --------
    >>> choose_decoded("furthest", (1, 5), 2, noise=[0, 1, 2, 3, 4], visible=[0])
    [4, 2]
    """
    if not 0 <= num_decoded <= len(noise) - len(visible):
        raise ValueError(f"num_decoded: expected 0 to {len(noise) - len(visible)}, got {num_decoded}")
    if throwing == "furthest":
        return furthest_decoded(shape, num_decoded, noise, visible, furthest_from=furthest_from, spacing=spacing)
    if throwing == "random":
        return random_decoded(num_decoded, noise, visible)
    if throwing == "cell":
        return cell_decoded(shape, num_decoded, integers(noise), visible)
    if throwing == "weighted":
        if weights is None:
            raise ValueError('weights: expected one weight per token for throwing="weighted", got None')
        return weighted_decoded(num_decoded, integers(noise), visible, weights)
    raise ValueError(f'throwing: expected "furthest", "random", "weighted" or "cell", got {throwing!r}')


def choose_decoded_units(
    throwing: str,
    shape: Sequence[int],
    unit: Sequence[int],
    num_decoded: int,
    noise: Sequence[float],
    visible: Sequence[int],
    *,
    furthest_from: str = "visible",
    spacing: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Choose the decoded tokens if whole units are decoded or thrown.

    Units are chosen like tokens, on the grid of units, with the spacing of the units. A unit takes the noise of its
    first token and the sum of its weights. Units are in order of choice, the tokens of a unit in raster order.

    Parameters
    ----------
    throwing, shape, noise, furthest_from, spacing, weights : see `choose_decoded`
    unit : tokens per unit along each axis; divisors of the lengths
    num_decoded : int
        M in tokens, a multiple of the tokens per unit.
    visible : raster numbers of whole units

    Examples
    --------
    >>> choose_decoded_units("furthest", (1, 8), (1, 2), 2, noise=[0, 1, 2, 3, 4, 5, 6, 7],
    ...     visible=[0, 1])
    [6, 7]
    """
    units = unit_tokens(shape, unit)
    visible_units = []
    for number, tokens in enumerate(units):
        how_many = len([token for token in tokens if token in visible])
        if how_many not in (0, len(tokens)):
            raise ValueError(f"visible: expected whole units, got {how_many} tokens of unit {tokens}")
        if how_many:
            visible_units.append(number)
    if num_decoded % len(units[0]):
        raise ValueError(f"num_decoded: expected a multiple of the {len(units[0])} tokens of a unit, got {num_decoded}")
    if spacing is None:
        spacing = (1,) * len(shape)
    chosen = choose_decoded(
        throwing,
        [length // side for length, side in zip(shape, unit, strict=True)],
        num_decoded // len(units[0]),
        [noise[tokens[0]] for tokens in units],
        visible_units,
        furthest_from=furthest_from,
        spacing=[step * side for step, side in zip(spacing, unit, strict=True)],
        weights=None if weights is None else [sum(weights[token] for token in tokens) for tokens in units],
    )
    return [token for number in chosen for token in units[number]]

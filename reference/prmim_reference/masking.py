"""Which tokens are visible."""

import itertools
import math
from collections.abc import Sequence

from prmim_reference import grid
from prmim_reference.noise import by_noise, uniform


def random_visible(noise: Sequence[int], num_visible: int) -> list[int]:
    """Return the tokens of lowest noise, in ascending order of noise (MAE).

    Parameters
    ----------
    noise : sequence of int, N values
    num_visible : int
        V, between 0 and N.

    Examples
    --------
    >>> random_visible([30, 10, 40, 20], 2)
    [1, 3]
    """
    if not 0 <= num_visible <= len(noise):
        raise ValueError(f"num_visible: expected 0 to {len(noise)}, got {num_visible}")
    return by_noise(noise, range(len(noise)))[:num_visible]


def block_visible(noise: Sequence[int], shape: Sequence[int], unit: Sequence[int], num_visible_units: int) -> list[int]:
    """Return the tokens of the visible units: blocks of tokens that are masked together (SimMIM).

    The noise of a unit is the noise of its first token. The units of lowest noise are visible, in ascending order of
    noise; units of equal noise come in raster order. Inside a unit the tokens come in raster order.

    Parameters
    ----------
    noise : sequence of int, N values
    shape : lengths of the grid
    unit : tokens of a unit along each axis; each divides the grid's length
    num_visible_units : int

    Examples
    --------
    >>> block_visible([5, 0, 3, 0, 0, 0, 0, 0], (2, 4), (2, 2), 1)
    [2, 3, 6, 7]
    """
    tokens_of_units = unit_tokens(shape, unit)
    unit_noise = [noise[tokens[0]] for tokens in tokens_of_units]
    visible = []
    for unit_number in random_visible(unit_noise, num_visible_units):
        visible.extend(tokens_of_units[unit_number])
    return visible


def unit_tokens(shape: Sequence[int], unit: Sequence[int]) -> list[list[int]]:
    """Return the tokens of every unit; units and the tokens of each are in raster order.

    Examples
    --------
    >>> unit_tokens((2, 4), (2, 2))
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if len(unit) != len(shape) or any(length % side for length, side in zip(shape, unit, strict=True)):
        raise ValueError(f"unit: expected divisors of the grid {tuple(shape)}, got {tuple(unit)}")
    tokens_of_units = []
    for unit_index in itertools.product(*(range(length // side) for length, side in zip(shape, unit, strict=True))):
        tokens = []
        for inside in itertools.product(*(range(side) for side in unit)):
            index = [u * side + i for u, side, i in zip(unit_index, unit, inside, strict=True)]
            tokens.append(grid.raster_number(index, shape))
        tokens_of_units.append(tokens)
    return tokens_of_units


def weighted_draw(
    noise: Sequence[int], weights: Sequence[float], candidates: Sequence[int], num_drawn: int
) -> list[int]:
    """Draw candidates without replacement, with probability proportional to their weights; in order of drawing.

    An exponential race: token i arrives at the time -log(u_i) / w_i, where u_i is its noise as a number in (0, 1)
    (`noise.uniform`), and the first to arrive are drawn. A token of weight 0 never arrives in finite time, and is drawn
    only after all others. Equal times are settled by the lower token number. Positive weights below 2^-100 count as
    2^-100, so that all times are finite in float32.

    Examples
    --------
    >>> weighted_draw([0, 0, 0, 0], [1.0, 3.0, 2.0, 0.0], candidates=[0, 1, 2, 3], num_drawn=4)
    [1, 2, 0, 3]
    """
    if not 0 <= num_drawn <= len(candidates):
        raise ValueError(f"num_drawn: expected 0 to {len(candidates)}, got {num_drawn}")
    arrival = {}
    for token in candidates:
        rate = max(weights[token], 2.0**-100)
        arrival[token] = -math.log(uniform(noise[token])) / rate if weights[token] > 0 else math.inf
    return sorted(candidates, key=lambda token: (arrival[token], token))[:num_drawn]


def weighted_visible(noise: Sequence[int], weights: Sequence[float], num_visible: int) -> list[int]:
    """Draw the visible tokens without replacement, with probability proportional to ``weights`` (MaskAlign, AMT).

    Parameters
    ----------
    noise : sequence of int, N values of 32 bits, signed
    weights : sequence of float, N values, not negative
    num_visible : int

    Examples
    --------
    >>> weighted_visible([0, 0, 0], [1.0, 3.0, 2.0], 2)
    [1, 2]
    """
    return weighted_draw(noise, weights, range(len(noise)), num_visible)


def tube_visible(noise: Sequence[int], shape: Sequence[int], num_visible: int) -> list[int]:
    """Return one frame's random visible tokens, repeated at every time (VideoMAE); axis 0 is time.

    The mask of a frame follows the noise of the first frame; tokens come frame by frame.

    Parameters
    ----------
    noise : sequence of int, N values
    shape : lengths of the grid, time first
    num_visible : int
        Visible tokens of the whole clip: a multiple of the number of frames.

    Examples
    --------
    >>> tube_visible([9, 3, 0, 0], (2, 2), 2)
    [1, 3]
    """
    frames = shape[0]
    frame_tokens = grid.num_tokens(shape) // frames
    if num_visible % frames:
        raise ValueError(f"num_visible: expected a multiple of {frames} frames, got {num_visible}")
    in_frame = random_visible(noise[:frame_tokens], num_visible // frames)
    visible = []
    for frame in range(frames):
        for token in in_frame:
            visible.append(frame * frame_tokens + token)
    return visible

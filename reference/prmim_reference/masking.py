"""Masking strategies: the choice of visible tokens."""

import itertools
import math
from collections.abc import Sequence

from prmim_reference import grid
from prmim_reference.noise import by_noise, uniform


def random_visible(num_visible: int, noise: Sequence[float]) -> list[int]:
    """Return the tokens of lowest noise, in ascending order of noise (MAE).

    Parameters
    ----------
    num_visible : int
        V, between 0 and N.
    noise : sequence of N numbers

    Examples
    --------
    >>> random_visible(2, [30, 10, 40, 20])
    [1, 3]
    """
    if not 0 <= num_visible <= len(noise):
        raise ValueError(f"num_visible: expected 0 to {len(noise)}, got {num_visible}")
    return by_noise(noise, range(len(noise)))[:num_visible]


def unit_shape(shape: Sequence[int], mask_unit: int) -> tuple[int, ...]:
    """Return the number of tokens of a unit along each axis of the grid.

    Examples
    --------
    >>> unit_shape((14, 14), 2)
    (2, 2)
    """
    if mask_unit < 1 or any(length % mask_unit for length in shape):
        raise ValueError(f"mask_unit: expected a divisor of the grid {'x'.join(map(str, shape))}, got {mask_unit}")
    return (mask_unit,) * len(shape)


def block_visible(
    shape: Sequence[int], unit: Sequence[int], num_visible_units: int, noise: Sequence[float]
) -> list[int]:
    """Return the tokens of visible units, blocks that are masked together (SimMIM).

    A unit takes the noise of its first token. The units of lowest noise are visible, in ascending order of noise; units
    of equal noise keep raster order. The tokens of a unit are in raster order.

    Parameters
    ----------
    shape : lengths of the grid
    unit : tokens per unit along each axis; divisors of the lengths
    num_visible_units : int
    noise : sequence of N numbers

    Examples
    --------
    >>> block_visible((2, 4), (2, 2), 1, [5, 0, 3, 0, 0, 0, 0, 0])
    [2, 3, 6, 7]
    """
    tokens_of_units = unit_tokens(shape, unit)
    unit_noise = [noise[tokens[0]] for tokens in tokens_of_units]
    visible = []
    for unit_number in random_visible(num_visible_units, unit_noise):
        visible.extend(tokens_of_units[unit_number])
    return visible


def unit_tokens(shape: Sequence[int], unit: Sequence[int]) -> list[list[int]]:
    """Return the tokens of every unit; units and their tokens are in raster order.

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
    num_drawn: int, noise: Sequence[int], weights: Sequence[float], candidates: Sequence[int]
) -> list[int]:
    """Draw candidates without replacement in proportion to weights, in drawing order.

    An exponential race: token i arrives at time -log(u_i) / w_i, where u_i in (0, 1) is the `noise.uniform` of its
    noise. The first arrivals are drawn. Positive weights below 2^-100 count as 2^-100, so all times are finite in
    float32. Tokens of weight 0 race after all others: they arrive at (17 - log(u_i)) / 2^-100, where 17 is above all
    values of -log(u_i). Of equal times, the lower raster number comes first.

    Examples
    --------
    >>> weighted_draw(4, [0, 0, 0, 0], [1.0, 3.0, 2.0, 0.0], candidates=[0, 1, 2, 3])
    [1, 2, 0, 3]
    """
    if not 0 <= num_drawn <= len(candidates):
        raise ValueError(f"num_drawn: expected 0 to {len(candidates)}, got {num_drawn}")
    arrival = {}
    for token in candidates:
        rate = max(weights[token], 2.0**-100)
        start = 0 if weights[token] > 0 else 17
        arrival[token] = (start - math.log(uniform(noise[token]))) / rate
    return sorted(candidates, key=lambda token: (arrival[token], token))[:num_drawn]


def weighted_visible(num_visible: int, noise: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Draw visible tokens without replacement, in proportion to weights (MaskAlign).

    Parameters
    ----------
    num_visible : int
    noise : sequence of int, N signed 32-bit values
    weights : sequence of float, N non-negative values

    Examples
    --------
    >>> weighted_visible(2, [0, 0, 0], [1.0, 3.0, 2.0])
    [1, 2]
    """
    return weighted_draw(num_visible, noise, weights, range(len(noise)))


def unattended_visible(
    shape: Sequence[int], unit: Sequence[int], num_visible_units: int, noise: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Draw units in proportion to weights; return the tokens of the last ones (AMT).

    Units are drawn without replacement. A unit takes the noise of its first token and the sum of its weights. The unit
    drawn last comes first; the tokens of a unit are in raster order.

    Parameters
    ----------
    shape : lengths of the grid
    unit : tokens per unit along each axis; divisors of the lengths
    num_visible_units : int
    noise : sequence of int, N signed 32-bit values
    weights : sequence of float, N non-negative values

    Examples
    --------
    >>> unattended_visible((1, 4), (1, 1), 2, [0, 0, 0, 0], [4.0, 3.0, 1.0, 2.0])
    [2, 3]
    """
    units = unit_tokens(shape, unit)
    if not 0 <= num_visible_units <= len(units):
        raise ValueError(f"num_visible_units: expected 0 to {len(units)}, got {num_visible_units}")
    unit_noise = [noise[tokens[0]] for tokens in units]
    sums = [sum(weights[token] for token in tokens) for tokens in units]
    drawn = weighted_draw(len(units), unit_noise, sums, range(len(units)))
    visible = []
    for number in drawn[::-1][:num_visible_units]:
        visible.extend(units[number])
    return visible


def attention_weights(attention: Sequence[Sequence[float]]) -> list[float]:
    """Average min-max normalized attention of several heads to N weights (AMT).

    A head with uniform attention gives every patch the weight 1.

    Examples
    --------
    >>> attention_weights([[0.25, 0.5, 0.25], [0.1, 0.1, 0.1]])
    [0.5, 1.0, 0.5]
    """
    heads = []
    for values in attention:
        low, high = min(values), max(values)
        heads.append([1.0 if high == low else (value - low) / (high - low) for value in values])
    return [sum(of_token) / len(heads) for of_token in zip(*heads, strict=True)]


def tube_visible(shape: Sequence[int], num_visible: int, noise: Sequence[float]) -> list[int]:
    """Draw the visible tokens of one frame and repeat them in every frame (VideoMAE).

    Only the noise of the first frame is used. Tokens are in order of frames.

    Parameters
    ----------
    shape : lengths of the grid, time first
    num_visible : int
        Visible tokens of the whole clip, a multiple of the number of frames.
    noise : sequence of N numbers

    Examples
    --------
    >>> tube_visible((2, 2), 2, [9, 3, 0, 0])
    [1, 3]
    """
    frames = shape[0]
    frame_tokens = grid.num_tokens(shape) // frames
    if num_visible % frames:
        raise ValueError(f"num_visible: expected a multiple of {frames} frames, got {num_visible}")
    in_frame = random_visible(num_visible // frames, noise[:frame_tokens])
    visible = []
    for frame in range(frames):
        for token in in_frame:
            visible.append(frame * frame_tokens + token)
    return visible

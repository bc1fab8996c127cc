"""Grids: token positions in an image, a clip or a volume."""

import itertools
from collections.abc import Sequence


def num_tokens(shape: Sequence[int]) -> int:
    """Return the number of tokens of a grid: the product of its lengths.

    Examples
    --------
    >>> num_tokens((14, 14))
    196
    """
    product = 1
    for length in shape:
        product *= length
    return product


def positions(shape: Sequence[int], spacing: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Return the position of every token, in raster order (last axis fastest).

    Parameters
    ----------
    shape : sequence of int
        Number of tokens along each axis.
    spacing : sequence of int, optional
        Distance between neighbouring tokens along each axis; 1 everywhere by default.

    Returns
    -------
    list of tuple of int
        N positions, one integer per axis.

    Raises
    ------
    ValueError
        If a length or a spacing is not positive, or their numbers differ.

    Examples
    --------
    >>> positions((2, 3))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    >>> positions((2, 2), spacing=(1, 5))
    [(0, 0), (0, 5), (1, 0), (1, 5)]
    """
    if spacing is None:
        spacing = (1,) * len(shape)
    if len(shape) == 0 or any(length < 1 for length in shape):
        raise ValueError(f"shape: expected one positive length per axis, got {tuple(shape)}")
    if len(spacing) != len(shape) or any(step < 1 for step in spacing):
        raise ValueError(f"spacing: expected {len(shape)} positive integers, got {tuple(spacing)}")
    result = []
    for index in itertools.product(*(range(length) for length in shape)):
        result.append(tuple(i * step for i, step in zip(index, spacing, strict=True)))
    return result


def raster_number(index: Sequence[int], shape: Sequence[int]) -> int:
    """Return the raster number of a grid cell; the inverse of ``positions(shape)``.

    Examples
    --------
    >>> raster_number((1, 2), (2, 3))
    5
    """
    number = 0
    for i, length in zip(index, shape, strict=True):
        number = number * length + i
    return number

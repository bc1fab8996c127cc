"""Bicubic interpolation, pixel by pixel."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHARPNESS = -0.75


def cubic(distance: float) -> float:
    """Return the weight of a pixel by cubic convolution with a = -0.75.

    The argument is the distance of the pixel. Keys, "Cubic convolution interpolation for digital image processing",
    1981.

    Examples
    --------
    >>> [cubic(distance) for distance in (0.0, 0.5, 1.0, 1.5, 2.0)]
    [1.0, 0.59375, 0.0, -0.09375, 0.0]
    """
    d, a = abs(distance), SHARPNESS
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def taps(pixel: int, source: int, target: int) -> list[tuple[int, float]]:
    """Return the four source pixels of a target pixel along an axis, with weights.

    Source and target span the same length, and positions are those of pixel centres. Pixels beyond the border are
    replaced by the border pixel.

    Examples
    --------
    >>> taps(0, source=4, target=2)
    [(0, -0.09375), (0, 0.59375), (1, 0.59375), (2, -0.09375)]
    """
    place = (pixel + 0.5) * source / target - 0.5
    first = math.floor(place) - 1
    found = []
    for neighbour in range(first, first + 4):
        found.append((min(max(neighbour, 0), source - 1), cubic(place - neighbour)))
    return found


def resize_image(image: ArrayLike, shape: Sequence[int]) -> NDArray[np.float64]:
    """Resize an image by bicubic interpolation, as PyTorch does without antialiasing.

    Parameters
    ----------
    image : (axes..., channels)
    shape : pixels along each axis of the result

    Returns
    -------
    float64 array (shape..., channels)

    Examples
    --------
    >>> resize_image([[0], [0], [32], [32]], (2,)).tolist()
    [[-3.0], [35.0]]
    """
    pixels = np.asarray(image, dtype=np.float64)
    if len(shape) != pixels.ndim - 1 or any(length < 1 for length in shape):
        raise ValueError(f"shape: expected {pixels.ndim - 1} positive lengths, got {tuple(shape)}")
    resized = np.zeros((*shape, pixels.shape[-1]))
    for target in itertools.product(*(range(length) for length in shape)):
        along_axes = [taps(pixel, pixels.shape[axis], shape[axis]) for axis, pixel in enumerate(target)]
        for chosen in itertools.product(*along_axes):
            source = tuple(neighbour for neighbour, _ in chosen)
            resized[target] += math.prod(weight for _, weight in chosen) * pixels[source]
    return resized


def resize_table(
    table: ArrayLike, from_shape: Sequence[int], to_shape: Sequence[int], class_tokens: int = 1
) -> NDArray[np.float64]:
    """Resize a position table (class_tokens + N, dim); keep the rows of class tokens.

    Examples
    --------
    >>> resize_table([[9], [0], [0], [32], [32]], (4,), (2,)).tolist()
    [[9.0], [-3.0], [35.0]]
    """
    rows = np.asarray(table, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != class_tokens + math.prod(from_shape):
        raise ValueError(f"table: expected {class_tokens + math.prod(from_shape)} rows, got shape {rows.shape}")
    resized = resize_image(rows[class_tokens:].reshape(*from_shape, rows.shape[1]), to_shape)
    return np.concatenate([rows[:class_tokens], resized.reshape(-1, rows.shape[1])])

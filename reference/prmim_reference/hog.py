"""Histograms of oriented gradients of one image, computed pixel by pixel."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COLUMNS = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
"""The Sobel kernel of differences between columns; its transpose is that of differences between rows."""


def reflected(index: int, length: int) -> int:
    """Reflect an index at most one pixel outside of a line of `length` pixels.

    Examples
    --------
    >>> [reflected(i, 4) for i in (-1, 0, 3, 4)]
    [1, 0, 3, 2]
    """
    return length - 2 if index == length else abs(index)


def gradient(plane: Array, row: int, column: int) -> tuple[float, float]:
    """Return the Sobel responses at a pixel to column and to row differences.

    Examples
    --------
    >>> gradient(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), 1, 1)
    (-8.0, 0.0)
    """
    height, width = plane.shape
    across = down = 0.0
    for i in range(3):
        for j in range(3):
            value = float(plane[reflected(row + i - 1, height), reflected(column + j - 1, width)])
            across += COLUMNS[i][j] * value
            down += COLUMNS[j][i] * value
    return across, down


def direction_bin(across: float, down: float, bins: int) -> int:
    """Return the bin of a gradient; opposite gradients share a bin.

    Examples
    --------
    >>> [direction_bin(*gradient, 4) for gradient in [(0, 1), (0, -1), (1, 1), (-1, 0), (1, -2)]]
    [0, 0, 1, 2, 3]
    """
    return math.floor(math.atan2(across, down) / math.pi * bins) % bins


def hog(image: Array, cell_size: Sequence[int], bins: int) -> Array:
    """Compute a normalized histogram of gradient directions per cell and channel.

    Parameters
    ----------
    image : array (height, width, channels)
    cell_size : pixels of a cell along both axes
        Divides the image.
    bins : int

    Returns
    -------
    array (height / cell height, width / cell width, channels * bins), bins fastest

    References
    ----------
    Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv 2303.05251.

    Examples
    --------
    >>> hog(np.arange(4.0).repeat(4).reshape(4, 4, 1), (4, 4), 2).tolist()
    [[[1.0, 0.0]]]
    """
    height, width, channels = image.shape
    cell_height, cell_width = cell_size
    cells = np.zeros((height // cell_height, width // cell_width, channels, bins))
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                across, down = gradient(image[:, :, channel], row, column)
                chosen = direction_bin(across, down, bins)
                share = math.hypot(across, down) / (cell_height * cell_width)
                cells[row // cell_height, column // cell_width, channel, chosen] += share
    for histogram in cells.reshape(-1, bins):  # views
        norm = math.sqrt(sum(value * value for value in histogram.tolist()))
        histogram /= max(norm, 1e-12)
    return cells.reshape(*cells.shape[:2], channels * bins)

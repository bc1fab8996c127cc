"""Prediction targets: patches of an image and their normalization."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prmim_reference import grid

Array = NDArray[np.float64]


def grid_shape(image_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the token grid of an image (lengths without channels).

    Examples
    --------
    >>> grid_shape((224, 224), (16, 16))
    (14, 14)
    """
    divisible = len(image_shape) == len(patch_size) and all(
        length % side == 0 for length, side in zip(image_shape, patch_size, strict=True)
    )
    if not divisible:
        raise ValueError(f"patch_size: expected divisors of the image {tuple(image_shape)}, got {tuple(patch_size)}")
    return tuple(length // side for length, side in zip(image_shape, patch_size, strict=True))


def patchify(image: Array, patch_size: Sequence[int]) -> Array:
    """Cut an image into patches.

    Parameters
    ----------
    image : array (axes..., channels)
    patch_size : pixels of a patch along each axis

    Returns
    -------
    array (N, pixels of a patch * channels)
        Tokens in raster order. A token holds its pixels in raster order, channels fastest.

    Examples
    --------
    >>> patchify(np.arange(8.0).reshape(2, 4, 1), (2, 2))
    array([[0., 1., 4., 5.],
           [2., 3., 6., 7.]])
    """
    patches = []
    for index in grid.positions(grid_shape(image.shape[:-1], patch_size)):
        values: list[float] = []
        for inside in itertools.product(*(range(side) for side in patch_size)):
            pixel = tuple(i * side + offset for i, side, offset in zip(index, patch_size, inside, strict=True))
            values.extend(image[pixel])
        patches.append(values)
    return np.array(patches)


def unpatchify(tokens: Array, patch_size: Sequence[int], shape: Sequence[int]) -> Array:
    """Assemble an image from patches; the inverse of `patchify`.

    Parameters
    ----------
    tokens : array (N, pixels of a patch * channels)
    patch_size : pixels of a patch along each axis
    shape : the token grid

    Returns
    -------
    array (axes..., channels)

    Examples
    --------
    >>> image = np.arange(24.0).reshape(4, 6, 1)
    >>> bool((unpatchify(patchify(image, (2, 3)), (2, 3), (2, 2)) == image).all())
    True
    """
    channels = tokens.shape[1] // grid.num_tokens(patch_size)
    image = np.zeros((*(length * side for length, side in zip(shape, patch_size, strict=True)), channels))
    for index, token in zip(grid.positions(shape), tokens, strict=True):
        for number, inside in enumerate(itertools.product(*(range(side) for side in patch_size))):
            pixel = tuple(i * side + offset for i, side, offset in zip(index, patch_size, inside, strict=True))
            image[pixel] = token[number * channels : (number + 1) * channels]
    return image


def patch_statistics(patch: Array, eps: float = 1e-6) -> tuple[float, float]:
    """Return the mean and sqrt(variance + eps) of one patch, with unbiased variance.

    Examples
    --------
    >>> patch_statistics(np.array([1.0, 2.0, 3.0]), eps=0.0)
    (2.0, 1.0)
    """
    count = patch.size
    if count < 2:
        raise ValueError(f"patch: expected at least 2 values for an unbiased variance, got {count}")
    mean = patch.sum() / count
    variance = ((patch - mean) ** 2).sum() / (count - 1)
    return float(mean), float(np.sqrt(variance + eps))


def normalize_patches(patches: Array, eps: float = 1e-6) -> Array:
    """Normalize every patch by its own mean and deviation (MAE's target).

    Examples
    --------
    >>> normalize_patches(np.array([[1.0, 2.0, 3.0]]), eps=0.0)
    array([[-1.,  0.,  1.]])
    """
    result = np.empty_like(patches)
    for token, patch in enumerate(patches):
        mean, deviation = patch_statistics(patch, eps)
        result[token] = (patch - mean) / deviation
    return result


def denormalize_patches(normalized: Array, patches: Array, eps: float = 1e-6) -> Array:
    """Invert `normalize_patches` with the statistics of ``patches``.

    Examples
    --------
    >>> denormalize_patches(np.array([[-1.0, 0.0, 1.0]]), np.array([[1.0, 2.0, 3.0]]), eps=0.0)
    array([[1., 2., 3.]])
    """
    result = np.empty_like(normalized)
    for token, patch in enumerate(patches):
        mean, deviation = patch_statistics(patch, eps)
        result[token] = normalized[token] * deviation + mean
    return result


def normalize_patch_channels(patches: Array, channels: int, eps: float = 1e-6) -> Array:
    """Normalize every channel of every patch separately (VideoMAE's target).

    The divisor is the unbiased deviation plus eps.

    Examples
    --------
    >>> normalize_patch_channels(np.array([[1.0, 5.0, 3.0, 5.0]]), 2).round(3)
    array([[-0.707,  0.   ,  0.707,  0.   ]])
    """
    result = np.empty_like(patches)
    for token in range(len(patches)):
        for channel in range(channels):
            mean, deviation = patch_statistics(patches[token, channel::channels], eps=0.0)
            for place in range(channel, patches.shape[1], channels):
                result[token, place] = (patches[token, place] - mean) / (deviation + eps)
    return result


def pixels_of_cell(patch_size: Sequence[int], cells: Sequence[int], cell: Sequence[int]) -> list[int]:
    """Return the raster numbers of the pixels of a cell in a patch.

    Examples
    --------
    >>> pixels_of_cell((2, 4), (1, 2), (0, 1))
    [2, 3, 6, 7]
    """
    fits = len(cells) == len(patch_size) and all(
        count > 0 and side % count == 0 for side, count in zip(patch_size, cells, strict=True)
    )
    if not fits:
        raise ValueError(f"cells: expected divisors of the patch {tuple(patch_size)}, got {tuple(cells)}")
    inside = itertools.product(*(range(side) for side in patch_size))
    return [
        number
        for number, pixel in enumerate(inside)
        if all(i * count // side == c for i, side, count, c in zip(pixel, patch_size, cells, cell, strict=True))
    ]


def cell_means(patches: Array, patch_size: Sequence[int], cells: Sequence[int]) -> Array:
    """Average the pixels of each cell of every patch.

    Parameters
    ----------
    patches : array (n, pixels of a patch * channels)
    patch_size : pixels of a patch along each axis
    cells : cells of a patch along each axis; divisors of `patch_size`

    Returns
    -------
    array (n, cells of a patch * channels)
        A token holds its cells in raster order, channels fastest.

    Examples
    --------
    >>> cell_means(np.arange(8.0).reshape(1, 8), (2, 4), (1, 2))
    array([[2.5, 4.5]])
    """
    channels = patches.shape[1] // grid.num_tokens(patch_size)
    rows = []
    for patch in patches:
        means: list[float] = []
        for cell in itertools.product(*(range(count) for count in cells)):
            pixels = pixels_of_cell(patch_size, cells, cell)
            for channel in range(channels):
                means.append(sum(patch[pixel * channels + channel] for pixel in pixels) / len(pixels))
        rows.append(means)
    return np.array(rows).reshape(len(patches), grid.num_tokens(cells) * channels)


def expand_cells(values: Array, patch_size: Sequence[int], cells: Sequence[int]) -> Array:
    """Give every pixel of a patch the value of its cell.

    Examples
    --------
    >>> expand_cells(np.array([[2.5, 4.5]]), (2, 4), (1, 2))
    array([[2.5, 2.5, 4.5, 4.5, 2.5, 2.5, 4.5, 4.5]])
    """
    channels = values.shape[1] // grid.num_tokens(cells)
    patches = np.zeros((len(values), grid.num_tokens(patch_size) * channels))
    for token, cell_values in enumerate(values):
        for number, cell in enumerate(itertools.product(*(range(count) for count in cells))):
            for pixel in pixels_of_cell(patch_size, cells, cell):
                for channel in range(channels):
                    patches[token, pixel * channels + channel] = cell_values[number * channels + channel]
    return patches


def channel_values(patches: Array, tokens: Sequence[int], channels: int, channel: int) -> list[float]:
    """Return the values of one channel of some patches."""
    return [float(patches[token, place]) for token in tokens for place in range(channel, patches.shape[1], channels)]


def pixel_statistics(patches: Array, tokens: Sequence[int], channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel over some patches.

    The variance is the mean squared deviation.

    Examples
    --------
    >>> pixel_statistics(np.array([[1.0, 3.0], [1.0, 3.0], [9.0, 9.0]]), [0, 1], 1)
    ([2.0], [1.0])
    """
    means, deviations = [], []
    for channel in range(channels):
        values = channel_values(patches, tokens, channels, channel)
        mean = sum(values) / len(values)
        means.append(mean)
        deviations.append(float(np.sqrt(sum((value - mean) ** 2 for value in values) / len(values))))
    return means, deviations


def window(shape: Sequence[int], token: int) -> list[int]:
    """Return a token and the tokens next to it, diagonals included.

    Examples
    --------
    >>> window((3, 3), 0)
    [0, 1, 3, 4]
    """
    places = grid.positions(shape)
    return [
        other
        for other, place in enumerate(places)
        if all(abs(a - b) <= 1 for a, b in zip(place, places[token], strict=True))
    ]


def cell_statistics(
    patches: Array, shape: Sequence[int], token: int, channels: int, cell_norm: str
) -> tuple[list[float], list[float]]:
    """Return mean and divisor per channel for the cells of a token.

    The statistics are those of the image, of the patch and its neighbours (`window`), or 0 and 1 (``"none"``). 1e-3 is
    added to a standard deviation.
    """
    if cell_norm == "none":
        return [0.0] * channels, [1.0] * channels
    tokens = list(range(len(patches))) if cell_norm == "image" else window(shape, token)
    means, deviations = pixel_statistics(patches, tokens, channels)
    return means, [deviation + 1e-3 for deviation in deviations]


def cell_targets(
    patches: Array,
    tokens: Sequence[int],
    patch_size: Sequence[int],
    shape: Sequence[int],
    cells: Sequence[int],
    cell_norm: str = "image",
) -> Array:
    """Return the normalized cell means of some tokens of an image.

    Parameters
    ----------
    patches : array (N, pixels of a patch * channels)
        All patches of the image.
    tokens : n raster numbers
    patch_size : pixels of a patch along each axis
    shape : the token grid
    cells : cells of a patch along each axis
    cell_norm : {"image", "window", "none"}

    Returns
    -------
    array (n, cells of a patch * channels)

    Examples
    --------
    >>> patches = np.array([[1.0, 1.0], [3.0, 3.0]])
    >>> cell_targets(patches, [1], (1, 2), (1, 2), (1, 1)).round(2)
    array([[1.]])
    """
    if cell_norm not in ("image", "window", "none"):
        raise ValueError(f'cell_norm: expected "image", "window" or "none", got {cell_norm!r}')
    channels = patches.shape[1] // grid.num_tokens(patch_size)
    targets = cell_means(patches[list(tokens)], patch_size, cells)
    for row, token in enumerate(tokens):
        means, divisors = cell_statistics(patches, shape, token, channels, cell_norm)
        for place in range(targets.shape[1]):
            channel = place % channels
            targets[row, place] = (targets[row, place] - means[channel]) / divisors[channel]
    return targets


def low_pass(image: Array, radius: float) -> Array:
    """Remove high frequencies from an image by a literal Fourier transform (PixMIM).

    Parameters
    ----------
    image : array (axes..., channels)
    radius : periods per image

    Returns
    -------
    array (axes..., channels)
        Absolute values. The zero frequency is in the middle. Along an axis of n coefficients, coefficient i has the
        distance i - (n - 1) / 2 from the centre. Coefficients in the ball of this radius are kept.

    Examples
    --------
    >>> low_pass(np.array([0.0, 1.0] * 4).reshape(8, 1), 2.0)[:, 0].round(3)
    array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """
    shape = image.shape[:-1]
    pixels = list(itertools.product(*(range(length) for length in shape)))
    places = np.array(pixels) / np.array(shape)
    filtered = np.zeros(image.shape, complex)
    for index in pixels:
        if sum((i - (length - 1) / 2) ** 2 for i, length in zip(index, shape, strict=True)) > radius**2:
            continue
        frequency = np.array([i - length // 2 for i, length in zip(index, shape, strict=True)])
        wave = np.exp(2j * np.pi * (places @ frequency)).reshape(*shape, 1)
        for channel in range(image.shape[-1]):
            values = image[..., channel : channel + 1]
            coefficient = (values * wave.conj()).sum() / len(pixels)
            filtered[..., channel : channel + 1] += coefficient * wave
    return np.abs(filtered)

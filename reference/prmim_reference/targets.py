"""Prediction targets: patches of an image and their normalisation."""

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
    """Assemble patches to an image: the inverse of `patchify`.

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
    """Normalise every patch by its own mean and deviation (MAE's target).

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

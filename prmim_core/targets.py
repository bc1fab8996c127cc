"""Patches of images and prediction targets. One to three axes, any number of channels."""

from math import prod

from prmim_core._arrays import Array, array_namespace
from prmim_core.grid import Grid


def patch_grid(image_size: tuple[int, ...], patch_size: tuple[int, ...]) -> Grid:
    """Return the grid of patches of an image.

    Parameters
    ----------
    image_size, patch_size
        Pixels along each of one to three axes.

    Raises
    ------
    ValueError
        If the numbers of axes differ, or a patch size does not divide the image size.

    Examples
    --------
    >>> patch_grid((224, 112), (16, 16)).shape
    (14, 7)
    """
    if len(image_size) != len(patch_size) or any(
        patch < 1 or size % patch for size, patch in zip(image_size, patch_size, strict=True)
    ):
        raise ValueError(
            f"patch_size: expected sizes that divide the image {tuple(image_size)}, got {tuple(patch_size)}"
        )
    return Grid(tuple(size // patch for size, patch in zip(image_size, patch_size, strict=True)))


def patchify(images: Array, patch_size: tuple[int, ...]) -> Array:
    """Cut images into patches.

    Parameters
    ----------
    images
        (batch, axes..., channels), any dtype.
    patch_size
        Pixels of a patch along each axis.

    Returns
    -------
    array
        (batch, N, P) with P = product of ``patch_size`` times channels. Values of a patch are in the order of MAE: row,
        column, channel (fastest).

    Raises
    ------
    ValueError
        If the patch size does not divide the image size.

    Examples
    --------
    >>> import numpy as np
    >>> patchify(np.reshape(np.arange(8), (1, 2, 4, 1)), (2, 2)).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    xp = array_namespace(images)
    batch, *axes, channels = images.shape
    grid = patch_grid(tuple(axes), tuple(patch_size))
    split = [size for pair in zip(grid.shape, patch_size, strict=True) for size in pair]
    cut = xp.reshape(images, (batch, *split, channels))
    outer = range(1, 2 * grid.axes, 2)
    inner = range(2, 2 * grid.axes + 1, 2)
    cut = xp.permute_dims(cut, (0, *outer, *inner, 2 * grid.axes + 1))
    return xp.reshape(cut, (batch, grid.num_tokens, prod(patch_size) * channels))


def unpatchify(tokens: Array, patch_size: tuple[int, ...], grid: Grid) -> Array:
    """Assemble patches to images; the inverse of :func:`patchify`.

    Parameters
    ----------
    tokens
        (batch, N, P).
    patch_size
        Pixels of a patch along each axis.
    grid
        The grid of the patches.

    Returns
    -------
    array
        (batch, axes..., channels).

    Raises
    ------
    ValueError
        If the tokens do not fit the grid or the patch size.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.asarray([[[0, 1, 4, 5], [2, 3, 6, 7]]])
    >>> unpatchify(tokens, (2, 2), Grid((1, 2)))[0, :, :, 0].tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    xp = array_namespace(tokens)
    pixels = prod(patch_size)
    if tokens.ndim != 3 or tokens.shape[1] != grid.num_tokens or tokens.shape[2] % pixels or not tokens.shape[2]:
        expected = f"(batch, {grid.num_tokens}, a multiple of {pixels})"
        raise ValueError(f"tokens: expected shape {expected}, got {tuple(tokens.shape)}")
    if len(patch_size) != grid.axes:
        raise ValueError(f"patch_size: expected {grid.axes} axes, got {tuple(patch_size)}")
    batch, channels = tokens.shape[0], tokens.shape[2] // pixels
    cut = xp.reshape(tokens, (batch, *grid.shape, *patch_size, channels))
    interleaved = [axis for outer in range(1, grid.axes + 1) for axis in (outer, outer + grid.axes)]
    cut = xp.permute_dims(cut, (0, *interleaved, 2 * grid.axes + 1))
    axes = tuple(n * patch for n, patch in zip(grid.shape, patch_size, strict=True))
    return xp.reshape(cut, (batch, *axes, channels))


def normalize_patches(patches: Array, eps: float = 1e-6) -> Array:
    """Normalise every patch to mean 0 and variance 1 (MAE's target).

    Parameters
    ----------
    patches
        float (..., P), P at least 2.
    eps
        Added to the variance, in squared units of the patches.

    Returns
    -------
    array
        (..., P): (x - mean) / sqrt(variance + eps), with unbiased variance (divided by P - 1).

    Raises
    ------
    ValueError
        If P is less than 2.

    Examples
    --------
    >>> import numpy as np
    >>> normalize_patches(np.asarray([[1.0, 3.0]])).round(3).tolist()
    [[-0.707, 0.707]]
    """
    mean, scale = _patch_statistics(patches, eps)
    return (patches - mean) / scale


def denormalize_patches(normalized: Array, patches: Array, eps: float = 1e-6) -> Array:
    """Invert :func:`normalize_patches` with the mean and variance of ``patches``.

    Parameters
    ----------
    normalized
        float (..., P), for instance predictions.
    patches
        float (..., P), the true patches. Brightness and contrast come from them, not from the model.
    eps
        As in :func:`normalize_patches`.

    Returns
    -------
    array
        (..., P): normalized * sqrt(variance + eps) + mean.

    Raises
    ------
    ValueError
        If P is less than 2.

    Examples
    --------
    >>> import numpy as np
    >>> patches = np.asarray([[1.0, 3.0]])
    >>> denormalize_patches(normalize_patches(patches), patches).tolist()
    [[1.0, 3.0]]
    """
    mean, scale = _patch_statistics(patches, eps)
    return normalized * scale + mean


def _patch_statistics(patches: Array, eps: float) -> tuple[Array, Array]:
    xp = array_namespace(patches)
    if patches.shape[-1] < 2:
        raise ValueError(f"patches: expected at least 2 values in a patch to normalise it, got {patches.shape[-1]}")
    mean = xp.mean(patches, axis=-1, keepdims=True)
    # PyTorch's var warns about empty batches.
    variance = xp.sum((patches - mean) ** 2, axis=-1, keepdims=True) / (patches.shape[-1] - 1)
    return mean, xp.sqrt(variance + eps)

"""Patches of images, and prediction targets.

Images have one to three axes and any number of channels.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, array_namespace, device_of
from prmim_core._checks import check_type
from prmim_core.grid import Grid

CELL_EPS = 1e-3
"""Added to a standard deviation over an image or a window, in units of the normalized pixels."""


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
    """Assemble images from patches; the inverse of :func:`patchify`.

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
    check_type("grid", grid, Grid)
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
    """Normalize every patch to mean 0 and variance 1 (MAE's target).

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
    TypeError
        If the patches do not hold floats.
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
        float (..., P), the true patches, whose brightness and contrast are used.
    eps
        As in :func:`normalize_patches`.

    Returns
    -------
    array
        (..., P): normalized * sqrt(variance + eps) + mean.

    Raises
    ------
    TypeError
        If the patches do not hold floats.
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
    _check_floats(xp, patches)
    if patches.shape[-1] < 2:
        raise ValueError(f"patches: expected at least 2 values in a patch to normalize it, got {patches.shape[-1]}")
    mean = xp.mean(patches, axis=-1, keepdims=True)
    # PyTorch's var warns about empty batches.
    variance = xp.sum((patches - mean) ** 2, axis=-1, keepdims=True) / (patches.shape[-1] - 1)
    return mean, xp.sqrt(variance + eps)


def cell_means(patches: Array, patch_size: tuple[int, ...], cells: tuple[int, ...]) -> Array:
    """Average the pixels of each cell of a patch, which reduces its resolution.

    Parameters
    ----------
    patches
        float (..., P), as :func:`patchify` returns them.
    patch_size
        Pixels of a patch along each axis.
    cells
        Cells of a patch along each axis; divides ``patch_size``. A patch of 16 x 16 pixels has (2, 2) cells of 8 x 8.

    Returns
    -------
    array
        (..., product of ``cells`` times channels): the means per channel. Cells are in raster order, channels fastest,
        as pixels in a patch.

    Raises
    ------
    ValueError
        If the cells do not divide the patch, or the patches do not have its size.

    Notes
    -----
    The means are a linear function of the patch that keeps its low frequencies. Neighbours can predict this part of a
    patch, so it is the target of thrown tokens (our choice).

    Examples
    --------
    >>> import numpy as np
    >>> cell_means(np.arange(8.0).reshape(1, 8), (2, 4), (1, 2)).tolist()
    [[2.5, 4.5]]
    """
    xp = array_namespace(patches)
    split = _split_by_cells(patch_size, cells)
    leading, channels = patches.shape[:-1], patches.shape[-1] // prod(patch_size)
    if not channels or channels * prod(patch_size) != patches.shape[-1]:
        raise ValueError(f"patches: expected a multiple of {prod(patch_size)} values, got {patches.shape[-1]}")
    cut = xp.reshape(patches, (*leading, *split, channels))
    means = xp.mean(cut, axis=tuple(len(leading) + axis for axis in range(1, len(split), 2)))
    return xp.reshape(means, (*leading, prod(cells) * channels))


def expand_cells(values: Array, patch_size: tuple[int, ...], cells: tuple[int, ...]) -> Array:
    """Give every pixel of a patch the value of its cell.

    :func:`cell_means` of the result returns the values.

    Parameters
    ----------
    values
        (..., product of ``cells`` times channels).
    patch_size, cells
        As for :func:`cell_means`.

    Returns
    -------
    array
        (..., product of ``patch_size`` times channels).

    Raises
    ------
    ValueError
        If the cells do not divide the patch, or the values do not have their number.

    Examples
    --------
    >>> import numpy as np
    >>> expand_cells(np.asarray([[2.5, 4.5]]), (2, 4), (1, 2)).tolist()
    [[2.5, 2.5, 4.5, 4.5, 2.5, 2.5, 4.5, 4.5]]
    """
    xp = array_namespace(values)
    split = _split_by_cells(patch_size, cells)
    leading, channels = values.shape[:-1], values.shape[-1] // prod(cells)
    if not channels or channels * prod(cells) != values.shape[-1]:
        raise ValueError(f"values: expected a multiple of {prod(cells)} values, got {values.shape[-1]}")
    held = xp.reshape(values, (*leading, *(size for n in cells for size in (n, 1)), channels))
    return xp.reshape(xp.broadcast_to(held, (*leading, *split, channels)), (*leading, prod(patch_size) * channels))


def image_statistics(patches: Array, channels: int) -> tuple[Array, Array]:
    """Return mean and standard deviation per channel over all pixels of an image.

    Parameters
    ----------
    patches
        float (batch, N, P), all patches of the images.
    channels
        Channels of the images.

    Returns
    -------
    tuple of array
        Mean and standard deviation, each (batch, 1, channels). The variance is the mean squared deviation.

    Raises
    ------
    TypeError
        If the patches do not hold floats.
    ValueError
        If ``channels`` does not divide P.

    Examples
    --------
    >>> import numpy as np
    >>> mean, deviation = image_statistics(np.asarray([[[1.0, 3.0], [5.0, 7.0]]]), channels=1)
    >>> mean.item(), round(deviation.item(), 3)
    (4.0, 2.236)
    """
    xp = array_namespace(patches)
    pixels = _pixels(xp, patches, channels)
    mean = _image_mean(xp, pixels)
    variance = xp.mean((pixels - mean) ** 2, axis=(1, 2))
    return mean[:, :, 0, :], xp.sqrt(variance)[:, None, :]


def window_statistics(patches: Array, channels: int, grid: Grid) -> tuple[Array, Array]:
    """Return mean and deviation per channel over a patch and its neighbours.

    Parameters
    ----------
    patches
        float (batch, N, P), all patches of the images.
    channels
        Channels of the images.
    grid
        The grid of the patches.

    Returns
    -------
    tuple of array
        Mean and standard deviation, each (batch, N, channels), over windows of 3 patches along each axis, fewer at the
        border. The variance is the mean squared deviation.

    Raises
    ------
    TypeError
        If the patches do not hold floats.
    ValueError
        If ``channels`` does not divide P, or the grid has another number of tokens.

    Examples
    --------
    >>> import numpy as np
    >>> patches = np.asarray([[[1.0, 1.0], [3.0, 3.0], [8.0, 8.0]]])
    >>> mean, _ = window_statistics(patches, channels=1, grid=Grid((3,)))
    >>> mean[0, :, 0].tolist()
    [2.0, 4.0, 5.5]
    """
    check_type("grid", grid, Grid)
    xp = array_namespace(patches)
    pixels = _pixels(xp, patches, channels)
    if patches.shape[1] != grid.num_tokens:
        raise ValueError(f"patches: expected {grid.num_tokens} in an image, got {patches.shape[1]}")
    center = _image_mean(xp, pixels)
    pixels = pixels - center  # centred, so that the difference of moments below is accurate
    mean = _window_mean(xp, xp.mean(pixels, axis=2), grid)
    moment = _window_mean(xp, xp.mean(pixels**2, axis=2), grid)
    variance = moment - mean**2
    return mean + center[:, :, 0, :], xp.sqrt(xp.where(variance > 0, variance, xp.zeros_like(variance)))


def patch_statistics(patches: Array, channels: int) -> tuple[Array, Array]:
    """Return mean and deviation per channel over a patch (VideoMAE's target).

    Parameters
    ----------
    patches
        float (batch, n, P).
    channels
        Channels of the images.

    Returns
    -------
    tuple of array
        Mean and standard deviation, each (batch, n, channels), with unbiased variance. For a patch of one colour, the
        mean is exact and the deviation 0.

    Raises
    ------
    TypeError
        If the patches do not hold floats.
    ValueError
        If ``channels`` does not divide P, or a patch has less than 2 pixels.

    Examples
    --------
    >>> import numpy as np
    >>> mean, deviation = patch_statistics(np.asarray([[[1.0, 5.0, 3.0, 5.0]]]), channels=2)
    >>> mean[0, 0].tolist(), deviation[0, 0].round(3).tolist()
    ([2.0, 5.0], [1.414, 0.0])
    """
    xp = array_namespace(patches)
    pixels = _pixels(xp, patches, channels)
    number = pixels.shape[2]
    if number < 2:
        raise ValueError(f"patches: expected at least 2 pixels in a patch for an unbiased variance, got {number}")
    first = pixels[:, :, :1, :]
    mean = first + xp.mean(pixels - first, axis=2, keepdims=True)
    variance = xp.sum((pixels - mean) ** 2, axis=2) / (number - 1)
    return mean[:, :, 0, :], xp.sqrt(variance)


def normalize_values(values: Array, mean: Array, deviation: Array, eps: float = CELL_EPS) -> Array:
    """Normalize values per channel with given statistics.

    Parameters
    ----------
    values
        float (batch, n, k * channels), channels fastest: pixels or cells of n tokens.
    mean, deviation
        (batch, n or 1, channels), for instance from :func:`image_statistics`.
    eps
        Added to the deviation.

    Returns
    -------
    array
        Shape of ``values``: (value - mean) / (deviation + eps).

    Raises
    ------
    TypeError
        If the values are not floats.

    Examples
    --------
    >>> import numpy as np
    >>> mean, deviation = np.ones((1, 1, 1)), np.full((1, 1, 1), 2.0)
    >>> normalize_values(np.asarray([[[1.0, 5.0]]]), mean, deviation, eps=0).tolist()
    [[[0.0, 2.0]]]
    """
    xp = array_namespace(values, mean, deviation)
    cut = _pixels(xp, values, mean.shape[-1])
    return xp.reshape((cut - mean[:, :, None, :]) / (deviation[:, :, None, :] + eps), values.shape)


def denormalize_values(normalized: Array, mean: Array, deviation: Array, eps: float = CELL_EPS) -> Array:
    """Invert :func:`normalize_values`.

    Parameters
    ----------
    normalized
        float (batch, n, k * channels), for instance predictions.
    mean, deviation, eps
        As for :func:`normalize_values`.

    Returns
    -------
    array
        Shape of ``normalized``: normalized * (deviation + eps) + mean.

    Raises
    ------
    TypeError
        If the normalized values are not floats.

    Examples
    --------
    >>> import numpy as np
    >>> mean, deviation = np.ones((1, 1, 1)), np.full((1, 1, 1), 2.0)
    >>> denormalize_values(np.asarray([[[0.0, 2.0]]]), mean, deviation, eps=0).tolist()
    [[[1.0, 5.0]]]
    """
    xp = array_namespace(normalized, mean, deviation)
    cut = _pixels(xp, normalized, mean.shape[-1])
    return xp.reshape(cut * (deviation[:, :, None, :] + eps) + mean[:, :, None, :], normalized.shape)


def normalize_over_image(values: Array, patches: Array, channels: int, eps: float = CELL_EPS) -> Array:
    """Normalize values per channel over the image.

    Unlike :func:`normalize_patches`, this keeps brightness and contrast of each patch.

    Parameters
    ----------
    values
        float (batch, n, k * channels), channels fastest: pixels or cells of n tokens.
    patches
        float (batch, N, P), all patches of the images.
    channels
        Channels of the images.
    eps
        Added to the standard deviation, in units of the patches.

    Returns
    -------
    array
        Shape of ``values``: (value - mean of the image) / (standard deviation of the image + eps).

    Raises
    ------
    TypeError
        If the patches do not hold floats.
    ValueError
        If ``channels`` does not divide P.

    Examples
    --------
    >>> import numpy as np
    >>> patches = np.asarray([[[1.0, 1.0], [3.0, 3.0]]])
    >>> normalize_over_image(patches, patches, channels=1, eps=0).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    return normalize_values(values, *image_statistics(patches, channels), eps)


def low_pass(images: Array, radius: float) -> Array:
    """Remove high frequencies from images (PixMIM's target).

    Parameters
    ----------
    images
        float (batch, axes..., channels), values of at least 0.
    radius
        Radius of the ideal filter, in periods per image. PixMIM has 40 for images of 224 pixels.

    Returns
    -------
    array
        Shape of ``images``: absolute values of the filtered images, per channel.

    Raises
    ------
    ValueError
        If the radius is not positive.

    Notes
    -----
    The discrete Fourier transform is shifted, so that the zero frequency is in the middle. Along an axis of n
    coefficients, coefficient i has the distance i - (n - 1) / 2 from the centre of the filter. For even n, the centre
    is half a coefficient off the zero frequency, as published. Coefficients at a distance of at most ``radius`` are
    kept. O(pixels log pixels).

    References
    ----------
    Liu et al., "PixMIM: Rethinking Pixel Reconstruction in Masked Image Modeling", arXiv 2303.02416.

    Examples
    --------
    >>> import numpy as np
    >>> stripes = np.asarray([0.0, 1.0] * 4).reshape(1, 8, 1)
    >>> low_pass(stripes, radius=2)[0, :, 0].round(3).tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    if radius <= 0:
        raise ValueError(f"radius: expected a positive number, got {radius}")
    xp = array_namespace(images)
    axes = tuple(range(1, images.ndim - 1))
    if images.shape[0] == 0:
        return xp.zeros_like(images)  # PyTorch raises an error for empty batches
    dtype = xp.complex128 if images.dtype == xp.float64 else xp.complex64
    kept = xp.asarray(_inside_ball(images.shape[1:-1], radius), dtype=images.dtype, device=device_of(images))
    return xp.abs(xp.fft.ifftn(xp.fft.fftn(xp.astype(images, dtype), axes=axes) * kept, axes=axes))


def _inside_ball(shape: tuple[int, ...], radius: float) -> NDArray[np.bool_]:
    """Return which coefficients a low-pass filter keeps: bool (axes..., 1)."""
    places = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    kept = sum(place**2 for place in places) <= radius**2
    return np.fft.ifftshift(kept)[..., None]


def _split_by_cells(patch_size: tuple[int, ...], cells: tuple[int, ...]) -> list[int]:
    """Return the shape of a patch with each axis split into cells and their pixels."""
    if len(cells) != len(patch_size) or any(n < 1 or size % n for n, size in zip(cells, patch_size, strict=True)):
        raise ValueError(f"cells: expected numbers that divide the patch {tuple(patch_size)}, got {tuple(cells)}")
    return [size for n, pixels in zip(cells, patch_size, strict=True) for size in (n, pixels // n)]


def _pixels(xp: Namespace, patches: Array, channels: int) -> Array:
    """Separate the channels: (batch, N, P) to (batch, N, pixels, channels)."""
    if patches.ndim != 3:
        raise ValueError(f"patches: expected shape (batch, N, P), got {tuple(patches.shape)}")
    _check_floats(xp, patches)
    if channels < 1 or patches.shape[2] % channels:
        raise ValueError(f"channels: expected a divisor of the {patches.shape[2]} values of a patch, got {channels}")
    return xp.reshape(patches, (*patches.shape[:2], patches.shape[2] // channels, channels))


def _check_floats(xp: Namespace, patches: Array) -> None:
    """Raise TypeError unless patches hold real numbers: differences of unsigned integers wrap around."""
    if not xp.isdtype(patches.dtype, "real floating"):
        raise TypeError(f"patches: expected floats, got {patches.dtype}")


def _image_mean(xp: Namespace, pixels: Array) -> Array:
    """Average (batch, N, pixels, channels) over an image: (batch, 1, 1, channels).

    Exact for images of one colour. Their deviation is 0, so a rounding error of the mean would be divided by eps.
    """
    first = pixels[:, :1, :1, :]
    return first + xp.mean(pixels - first, axis=(1, 2), keepdims=True)


def _window_mean(xp: Namespace, values: Array, grid: Grid) -> Array:
    """Average (batch, N, channels) over each token and its neighbours."""
    maps = xp.reshape(values, (values.shape[0], *grid.shape, values.shape[2]))
    number = xp.ones_like(maps)
    for axis in range(1, grid.axes + 1):
        maps, number = _sum_of_three(xp, maps, axis), _sum_of_three(xp, number, axis)
    return xp.reshape(maps / number, values.shape)


def _sum_of_three(xp: Namespace, values: Array, axis: int) -> Array:
    """Sum each value and its two neighbours along an axis."""
    leading = (slice(None),) * axis
    zero = xp.zeros_like(values[(*leading, slice(0, 1), ...)])
    before = xp.concat([zero, values[(*leading, slice(0, -1), ...)]], axis=axis)
    after = xp.concat([values[(*leading, slice(1, None), ...)], zero], axis=axis)
    return before + values + after

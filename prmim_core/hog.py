"""Histograms of oriented gradients (HOG), the targets of LocalMIM.

Images have two axes and any number of channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import cos, pi, sin

from prmim_core._arrays import Array, Namespace, array_namespace

NORM_EPS = 1e-12
"""Lower bound of the norm that a histogram is divided by."""


def hog(images: Array, cell_size: tuple[int, int], bins: int = 9) -> Array:
    """Compute a histogram of gradient directions for each cell of an image.

    Parameters
    ----------
    images
        float (batch, height, width, channels), at least 2 x 2 pixels.
    cell_size
        Pixels of a cell along each axis; divides the image.
    bins
        Bins of a histogram, over directions in [0, pi).

    Returns
    -------
    array
        (batch, height / cell height, width / cell width, channels * bins), dtype of ``images``; bins fastest. The
        histogram of a cell and channel has norm 1, or is 0 where the image is flat.

    Raises
    ------
    TypeError
        If the images are not floats.
    ValueError
        If the images have another number of axes or are too small, a cell size does not divide them, or there is no
        bin.

    Notes
    -----
    As in LocalMIM. Each channel is filtered by the 3 x 3 Sobel kernels, with reflected borders: ``u`` is the response
    to differences between columns, ``v`` to differences between rows. A pixel adds its magnitude, sqrt(u^2 + v^2), to
    bin floor(bins * atan2(u, v) / pi) modulo ``bins``: opposite directions are the same, and bins are not
    interpolated. A cell's histogram is the mean over its pixels, divided by its Euclidean norm. There is no
    normalization over blocks of cells.

    Directions are compared with the edges of the bins by products only. Therefore integer pixels below 256 fall into
    the same bins in float32 and float64, even if a direction lies on an edge. Positive affine maps of a channel change
    rounding only: pixels need no normalization.

    References
    ----------
    Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", CVPR 2005. Wang et al., "Masked Image
    Modeling with Local Multi-Scale Reconstruction", arXiv 2303.05251.

    Examples
    --------
    >>> import numpy as np
    >>> ramp = np.arange(4.0)[None, :, None, None] + np.zeros((1, 4, 4, 1))  # rises with the row
    >>> hog(ramp, (4, 4), bins=2).tolist(), hog(ramp.swapaxes(1, 2), (4, 4), bins=2).tolist()
    ([[[[1.0, 0.0]]]], [[[[0.0, 1.0]]]])
    """
    return hog_pyramid(images, (cell_size,), bins)[0]


def hog_pyramid(images: Array, cell_sizes: Sequence[tuple[int, int]], bins: int = 9) -> list[Array]:
    """Compute :func:`hog` for several cell sizes in a single pass over the pixels.

    Parameters
    ----------
    images, bins
        As for :func:`hog`.
    cell_sizes
        Sizes of the cells, finest first; each is a multiple of the one before.

    Returns
    -------
    list of array
        The result of :func:`hog` for each size.

    Raises
    ------
    TypeError, ValueError
        As :func:`hog`, and if a cell size is not a multiple of the one before.

    Examples
    --------
    >>> import numpy as np
    >>> [maps.shape for maps in hog_pyramid(np.zeros((1, 16, 8, 3)), ((2, 2), (8, 4)))]
    [(1, 8, 4, 27), (1, 2, 2, 27)]
    """
    xp = array_namespace(images)
    _check(xp, images, cell_sizes, bins)
    histograms = _cell_histograms(xp, images, cell_sizes[0], bins)
    maps = [_normalize(xp, histograms)]
    for finer, coarser in pairwise(cell_sizes):
        ratio = (coarser[0] // finer[0], coarser[1] // finer[1])
        histograms = _mean_over_cells(xp, histograms, ratio)
        maps.append(_normalize(xp, histograms))
    return maps


def _check(xp: Namespace, images: Array, cell_sizes: Sequence[tuple[int, int]], bins: int) -> None:
    if images.ndim != 4 or min(images.shape[1:3]) < 2:
        raise ValueError(
            "images: expected shape (batch, height, width, channels) with at least 2 x 2 pixels, "
            f"got {tuple(images.shape)}"
        )
    if not xp.isdtype(images.dtype, "real floating"):
        raise TypeError(f"images: expected floats, got {images.dtype}")
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    for size in cell_sizes:
        if len(size) != 2 or any(n < 1 or length % n for n, length in zip(size, images.shape[1:3], strict=True)):
            raise ValueError(
                f"cell_size: expected sizes that divide the image {tuple(images.shape[1:3])}, got {tuple(size)}"
            )
    for finer, coarser in pairwise(cell_sizes):
        if any(large % small for small, large in zip(finer, coarser, strict=True)):
            raise ValueError(f"cell_sizes: expected a multiple of {tuple(finer)}, got {tuple(coarser)}")


def _cell_histograms(xp: Namespace, images: Array, cell_size: tuple[int, int], bins: int) -> Array:
    """Compute mean magnitudes per cell, channel and bin.

    Shape (batch, rows, columns, channels, bins).
    """
    u, v = _sobel(xp, images)
    magnitude = xp.sqrt(u * u + v * v)
    chosen = _direction_bin(xp, u, v, bins)
    nothing = xp.zeros_like(magnitude)
    # A loop over bins needs the memory of one image, not of one image per bin.
    return xp.stack(
        [_mean_over_cells(xp, xp.where(chosen == number, magnitude, nothing), cell_size) for number in range(bins)],
        axis=-1,
    )


def _sobel(xp: Namespace, images: Array) -> tuple[Array, Array]:
    """Return Sobel responses to differences between columns, and between rows."""
    padded = _reflect(xp, _reflect(xp, images, 1), 2)
    above, below = padded[:, :-2, :, :], padded[:, 2:, :, :]
    left, right = padded[:, :, :-2, :], padded[:, :, 2:, :]
    columns = left - right
    rows = above - below
    return (
        columns[:, :-2, :, :] + 2 * columns[:, 1:-1, :, :] + columns[:, 2:, :, :],
        rows[:, :, :-2, :] + 2 * rows[:, :, 1:-1, :] + rows[:, :, 2:, :],
    )


def _reflect(xp: Namespace, images: Array, axis: int) -> Array:
    """Pad an axis by one reflected pixel at both ends, without repeating the border."""
    leading = (slice(None),) * axis
    return xp.concat([images[(*leading, slice(1, 2), ...)], images, images[(*leading, slice(-2, -1), ...)]], axis=axis)


def _direction_bin(xp: Namespace, u: Array, v: Array, bins: int) -> Array:
    """Compute floor(bins * atan2(u, v) / pi) modulo ``bins`` as an integer array."""
    is_turned = (u < 0) | ((u == 0) & (v < 0))  # opposite directions are the same
    u, v = xp.where(is_turned, -u, u), xp.where(is_turned, -v, v)
    # The angle is now in [0, pi). It is past the edge e if sin(angle - e) is not negative. The two products are
    # compared, not subtracted: a compiler may fuse a difference of products and round it differently.
    angles = [pi * number / bins for number in range(1, bins)]
    passed = [xp.astype(u * cos(angle) >= v * sin(angle), xp.int32) for angle in angles]
    return sum(passed, xp.zeros_like(u, dtype=xp.int32))


def _mean_over_cells(xp: Namespace, values: Array, cell_size: tuple[int, int]) -> Array:
    """Average (batch, height, width, ...) over cells: (batch, rows, columns, ...)."""
    batch, height, width, *rest = values.shape
    rows, columns = height // cell_size[0], width // cell_size[1]
    cut = xp.reshape(values, (batch, rows, cell_size[0], columns, cell_size[1], *rest))
    return xp.mean(cut, axis=(2, 4))


def _normalize(xp: Namespace, histograms: Array) -> Array:
    """Divide (..., channels, bins) by the norm over bins: (..., channels * bins)."""
    norm = xp.sqrt(xp.sum(histograms * histograms, axis=-1, keepdims=True))
    unit = histograms / xp.where(norm > NORM_EPS, norm, xp.full_like(norm, NORM_EPS))
    return xp.reshape(unit, (*unit.shape[:-2], unit.shape[-2] * unit.shape[-1]))

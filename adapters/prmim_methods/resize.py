"""Bicubic interpolation of images and position tables, by matrix products."""

from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, array_namespace, device_of

# The free parameter of cubic convolution, as in PyTorch.
SHARPNESS = -0.75


def resize_matrix(source: int, target: int) -> NDArray[np.float64]:
    """Return the matrix that interpolates along one axis, bicubically.

    Parameters
    ----------
    source, target
        Lengths of the axis before and after.

    Returns
    -------
    array
        float64 (target, source); a row sums to 1 and has at most four entries that are not 0. Always NumPy.

    Raises
    ------
    TypeError
        If a length is not an integer.
    ValueError
        If a length is not positive.

    Notes
    -----
    Equals PyTorch's ``interpolate(mode="bicubic", align_corners=False)``, which does not antialias. Pixel i of the
    target lies at x = (i + 0.5) * source / target - 0.5 of the source. It is the sum over the four nearest pixels,
    weighted by w of their distance. Pixels beyond the border repeat the border pixel. With a = -0.75::

        w(d) = (a + 2) d**3 - (a + 3) d**2 + 1           d <= 1
        w(d) = a d**3 - 5 a d**2 + 8 a d - 4 a           1 < d < 2

    References
    ----------
    Keys, "Cubic convolution interpolation for digital image processing", 1981.

    Examples
    --------
    >>> resize_matrix(4, 2)
    array([[ 0.5    ,  0.59375, -0.09375,  0.     ],
           [ 0.     , -0.09375,  0.59375,  0.5    ]])
    """
    for name, length in (("source", source), ("target", target)):
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"{name}: expected an integer, got {length!r}")
        if length < 1:
            raise ValueError(f"{name}: expected at least 1, got {length}")
    place = (np.arange(target) + 0.5) * (source / target) - 0.5
    taps = np.floor(place)[:, None] + np.arange(-1, 3)
    weights = _cubic(np.abs(place[:, None] - taps))
    columns = np.clip(taps, 0, source - 1)
    is_column = columns[:, :, None] == np.arange(source)
    matrix: NDArray[np.float64] = np.sum(np.where(is_column, weights[:, :, None], 0.0), axis=1)
    return matrix


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    a = SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def resize_images(images: Array, shape: tuple[int, ...]) -> Array:
    """Resize images bicubically, axis by axis.

    Parameters
    ----------
    images
        (batch, axes..., channels), channels last; integers become float32.
    shape
        Pixels along each axis of the result.

    Returns
    -------
    array
        float (batch, shape..., channels), not clipped: bicubic interpolation overshoots at edges. Axes that keep their
        length are skipped, so images of this shape are returned unchanged.

    Raises
    ------
    TypeError
        If a length is not an integer.
    ValueError
        If the numbers of axes differ or a length is not positive.

    Notes
    -----
    One matrix product per axis, see :func:`resize_matrix`, without antialiasing.

    Examples
    --------
    >>> import numpy as np
    >>> resize_images(np.asarray([[[0], [0], [32], [32]]]), (2,)).tolist()
    [[[-3.0], [35.0]]]
    >>> resize_images(np.ones((2, 8, 8, 3)), (4, 6)).shape
    (2, 4, 6, 3)
    """
    xp = array_namespace(images)
    if not shape or images.ndim != len(shape) + 2:
        expected = f"one length for each axis between batch and channels of images of shape {tuple(images.shape)}"
        raise ValueError(f"shape: expected {expected}, got {tuple(shape)}")
    if not xp.isdtype(images.dtype, "real floating"):
        images = xp.astype(images, xp.float32)
    for axis, target in enumerate(shape, start=1):
        source = images.shape[axis]
        if source == target:
            continue
        matrix = xp.asarray(resize_matrix(source, target), dtype=images.dtype, device=device_of(images))
        before, after = images.shape[:axis], images.shape[axis + 1 :]
        lines = xp.reshape(images, (prod(before), source, prod(after)))
        images = xp.reshape(xp.matmul(matrix, lines), (*before, target, *after))
    return images


def resize_table(table: Array, from_shape: tuple[int, ...], to_shape: tuple[int, ...], class_tokens: int = 1) -> Array:
    """Resize a position table to another grid; rows of class tokens are unchanged.

    Parameters
    ----------
    table
        float (1, C + N, dim): a row for each class token, then one for every token of a grid, in raster order.
    from_shape, to_shape
        Tokens along each axis of the table's grid, and of the target grid.
    class_tokens
        Number of class tokens, C.

    Returns
    -------
    array
        float (1, C + tokens of ``to_shape``, dim); ``table`` itself where the shapes are equal.

    Raises
    ------
    TypeError
        If a length is not an integer.
    ValueError
        If the table does not fit ``from_shape`` or the numbers of axes differ.

    Examples
    --------
    >>> import numpy as np
    >>> table = np.asarray([[[9.0], [0.0], [0.0], [32.0], [32.0]]])
    >>> resize_table(table, (4,), (2,)).tolist()
    [[[9.0], [-3.0], [35.0]]]
    """
    xp = array_namespace(table)
    rows = class_tokens + prod(from_shape)
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] != rows:
        raise ValueError(f"table: expected shape (1, {rows}, dim), got {tuple(table.shape)}")
    if tuple(from_shape) == tuple(to_shape):
        return table
    dim = table.shape[2]
    resized = resize_images(xp.reshape(table[:, class_tokens:, :], (1, *from_shape, dim)), to_shape)
    kept = xp.astype(table[:, :class_tokens, :], resized.dtype)
    return xp.concat([kept, xp.reshape(resized, (1, -1, dim))], axis=1)

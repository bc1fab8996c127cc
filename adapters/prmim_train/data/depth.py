"""Depth and range of pixel values.

Without a range, all values become 8 bits on the host. With one, images keep their depth (uint8, uint16 or float32) up
to the device, which maps the range to [0, 1].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEPTHS", "PixelRange", "SourceArray", "cast_depth", "depth_of", "in_8_bit_range", "to_8_bits"]

SourceArray = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.float32]
PixelRange = tuple[float, float]

DEPTHS = {"uint8": "uint8", "uint16": "uint16", "int16": "float32", "float32": "float32"}
"""Type of stored values to the type of their images."""


def depth_of(dtype: np.dtype[Any]) -> str:
    """Return the type of images that hold values of a type.

    Raises ValueError for unsupported types.

    Examples
    --------
    >>> depth_of(np.dtype(np.int16))
    'float32'
    """
    if dtype.name not in DEPTHS:
        raise ValueError(f"expected {', '.join(DEPTHS)}, got {dtype}")
    return DEPTHS[dtype.name]


def to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 16-bit values to 8 bits; no-op for 8-bit values.

    Values are rounded: 65535 becomes 255.

    Raises
    ------
    ValueError
        If the values have another type, without a fixed range.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype.name != "uint16":  # in any byte order
        raise ValueError(f"{values.dtype} values have no fixed range; set pixel_range")
    # 65535 = 257 * 255. 257 is odd, so rounding has no ties.
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def cast_depth(values: NDArray[Any], depth: str | None) -> NDArray[Any]:
    """Return the values of an image in the type of its source, or in 8 bits if None.

    Raises
    ------
    ValueError
        If the type cannot hold the values, or values are not finite.

    Examples
    --------
    >>> cast_depth(np.array([-5], np.int16), "float32").tolist()
    [-5.0]
    """
    if depth is None:
        return to_8_bits(values)
    if not np.can_cast(depth_of(values.dtype), depth):
        raise ValueError(f"{values.dtype} values, but the first images have {depth}")
    values = values.astype(depth, copy=False)
    if depth == "float32" and not np.isfinite(values).all():
        raise ValueError("NaN or infinity")
    return values


def in_8_bit_range(images: NDArray[Any], pixel_range: PixelRange | None) -> NDArray[Any]:
    """Map a range of pixel values to [0, 255] and clip; no-op without a range.

    Equals the computation on the device.

    Examples
    --------
    >>> in_8_bit_range(np.array([-10, 1000, 9000], np.float32), (0, 2000)).tolist()
    [0.0, 127.5, 255.0]
    """
    if pixel_range is None:
        return images
    low, high = pixel_range
    scaled: NDArray[Any] = (images.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return scaled.clip(0, 255)

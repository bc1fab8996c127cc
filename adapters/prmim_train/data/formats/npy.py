"""Single arrays in NumPy's format.

They are read without pickle, and checked before memory is allocated.
"""

import io
import math
from typing import IO, BinaryIO

import numpy as np

from prmim_train.config.training import VOLUME_EXAMPLE
from prmim_train.data.depth import SourceArray, depth_of
from prmim_train.data.formats.stacks import FileStack

__all__ = ["NPY_START", "decode_npy", "npy_shape", "npy_stack", "read_npy_header"]

NPY_START = b"\x93NUMPY"
"""First bytes of a ``.npy`` file."""

_MAX_HEADER = 10_000  # bytes; NumPy has the same limit, but checks it after reading the header


def decode_npy(content: bytes) -> SourceArray:
    """Return the image in a ``.npy`` file.

    Parameters
    ----------
    content : bytes
        The complete file: (height, width) or (height, width, channels), of one of the types in
        `prmim_train.data.depth.DEPTHS`.

    Returns
    -------
    array (height, width, channels)
        In native byte order.

    Raises
    ------
    ValueError
        If the content is truncated or followed by other data, or is no image.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> np.save(file, np.zeros((8, 6), np.uint16))
    >>> decode_npy(file.getvalue()).shape
    (8, 6, 1)
    """
    file = io.BytesIO(content)
    shape, dtype, header_size = read_npy_header(file)
    shape = npy_shape(shape, dtype)
    expected = header_size + math.prod(shape) * dtype.itemsize
    if expected != len(content):
        raise ValueError(f"{dtype} {shape} takes {expected:,} bytes, got {len(content):,}")
    file.seek(0)
    image: SourceArray = np.lib.format.read_array(file, allow_pickle=False).reshape(shape)
    return image.astype(dtype.newbyteorder("="), copy=False)


def npy_shape(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> tuple[int, int, int]:
    """Return height, width and channels of a stored array.

    Raises ValueError if it is not an image.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        hint = f"; for clips or volumes, write {VOLUME_EXAMPLE}" if len(shape) == 4 else ""
        raise ValueError(f"expected an array (height, width) or (height, width, channels), got {shape}{hint}")
    depth_of(dtype)
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    return height, width, channels


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic], int]:
    """Return shape, dtype and the length of the header in bytes.

    Raises
    ------
    ValueError
        If the header is invalid or the array contains Python objects, which would need pickle.
    """
    shape, _, dtype, size = _read_header(file)
    return shape, dtype, size


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Read a header: shape, Fortran order, dtype and length of the header.

    In Fortran order, the first axis is the fastest.
    """
    start = file.read(12)
    version = tuple(start[6:8])
    if not start.startswith(NPY_START) or version not in ((1, 0), (2, 0)):
        raise ValueError("not in NumPy's format")
    length = int.from_bytes(start[8:10] if version == (1, 0) else start[8:12], "little")
    if length > _MAX_HEADER:
        raise ValueError(f"header of {length:,} bytes, more than the limit of {_MAX_HEADER:,}")
    content = io.BytesIO(start + file.read(length))
    content.seek(8)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(content)
    if min(shape, default=0) < 0:
        raise ValueError(f"invalid shape {shape}")
    if dtype.hasobject:
        raise ValueError("contains Python objects")
    return shape, is_fortran, dtype, content.tell()


def npy_stack(file: BinaryIO) -> FileStack:
    """Open a ``.npy`` file as a clip or a volume. Crops read their slices only.

    Parameters
    ----------
    file : binary file
        (frames, height, width) or (frames, height, width, channels), of one of the types in
        `prmim_train.data.depth.DEPTHS`. Must stay open until the stack is read.

    Raises
    ------
    ValueError
        If the file is truncated or followed by other data, or is neither a clip nor a volume.
    """
    shape, is_fortran, dtype, offset = _read_header(file)
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"expected an array (frames, height, width) or (frames, height, width, channels), got {shape}")
    depth_of(dtype)
    expected, size = offset + math.prod(shape) * dtype.itemsize, file.seek(0, io.SEEK_END)
    if expected != size:
        raise ValueError(f"{dtype} {shape} takes {expected:,} bytes, got {size:,}")
    frames, height, width, channels = shape if len(shape) == 4 else (*shape, 1)
    if is_fortran:
        return FileStack(file, dtype, (channels, width, height, frames), offset, axes=(3, 2, 1, 0))
    return FileStack(file, dtype, (frames, height, width, channels), offset)

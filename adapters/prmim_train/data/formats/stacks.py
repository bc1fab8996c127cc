"""Clips and volumes, read by frames or slices.

A crop reads only its part of the file. An item of three axes is an array (frames, height, width, channels). Frames are
pictures in time for a clip, and slices for a volume.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prmim_train.config.axes import Spacing
from prmim_train.data.depth import cast_depth, depth_of
from prmim_train.data.transforms import resize

__all__ = [
    "ArrayStack",
    "Box",
    "Choose",
    "ChooseFrames",
    "FileStack",
    "Stack",
    "StackBox",
    "read_stack",
    "resize_stack",
]

ImageArray = NDArray[Any]
FrameArray = NDArray[np.int64]
Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""

ChooseFrames = Callable[[tuple[int, int, int]], tuple[FrameArray, Box]]
"""Maps the shape (frames, height, width) of a clip or a volume to the frames to read, sorted, and a box in them."""

Choose = Any
"""`ChooseFrames` of clips and volumes, `prmim_train.data.image_files.ChooseBox` of images."""

StackBox = tuple[float, float, float, float, float, float]
"""Front, top, left, back, bottom and right of a region, in voxels."""


class Stack(Protocol):
    """One clip or volume, opened but not read."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels."""
        ...

    @property
    def depth(self) -> str:
        """Smallest of `uint8`, `uint16` and `float32` that holds the values."""
        ...

    @property
    def spacing(self) -> Spacing | None:
        """Millimetres per voxel along the three axes; None if unknown."""
        ...

    @property
    def rate(self) -> float | None:
        """Frames per second of a clip; None if unknown."""
        ...

    @property
    def is_array(self) -> bool:
        """Whether the number of channels is that of the file, without conversion."""
        ...

    def read(self, frames: FrameArray, box: Box) -> ImageArray:
        """Return a box of some frames, in the type of the file.

        Shape (number of frames, height, width, channels). `frames` are sorted, and may repeat.
        """
        ...


@dataclass(frozen=True)
class ArrayStack:
    """A clip or volume in memory.

    Parameters
    ----------
    array : array (frames, height, width, channels)
        Of one of the types in `prmim_train.data.depth.DEPTHS`.

    Examples
    --------
    >>> stack = ArrayStack(np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1))
    >>> stack.shape, stack.read(np.array([1, 3, 3]), (0, 1, 2, 1))[:, 0, 0, 0].tolist()
    ((6, 2, 2), [5, 13, 13])
    """

    array: ImageArray
    spacing: ClassVar[None] = None
    rate: ClassVar[None] = None
    is_array: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        frames, height, width, _ = self.array.shape
        return frames, height, width

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[3])

    @property
    def depth(self) -> str:
        """Smallest type that holds the values."""
        return depth_of(self.array.dtype)

    def read(self, frames: FrameArray, box: Box) -> ImageArray:
        """Return a box of some frames; see `Stack`."""
        top, left, height, width = box
        return self.array[_part(frames), top : top + height, left : left + width]


@dataclass(frozen=True)
class FileStack:
    """A clip or volume in an uncompressed or gzipped file.

    Only the needed slices are read.

    Parameters
    ----------
    file : binary file
        Must stay open until the stack is read.
    dtype : dtype
        Of the stored values: real numbers.
    stored : tuple of four ints
        Lengths of the stored axes, the slowest one first.
    offset : int
        Position of the values in the file, in bytes.
    axes : tuple of four ints, optional
        The stored axis of frames, height, width and channels.
    backwards : tuple of ints, optional
        Which of the axes of the stack, 0 to 2, are stored in reverse.
    spacing : (depth, height, width), optional
        Millimetres per voxel.
    slope, intercept : float, optional
        The values are `slope` * stored + `intercept`, float32. Default: the stored values.

    Examples
    --------
    >>> values = np.arange(24, dtype=np.uint8).reshape(4, 3, 2, 1)
    >>> import io
    >>> file = io.BytesIO(values.tobytes())
    >>> stack = FileStack(file, values.dtype, values.shape, offset=0, axes=(1, 0, 2, 3),
    ...     backwards=(0,))
    >>> slice_ = stack.read(np.array([0]), (0, 0, 4, 2))[0, :, :, 0]
    >>> stack.shape, slice_.tolist() == values[:, 2, :, 0].tolist()
    ((3, 4, 2), True)
    """

    rate: ClassVar[None] = None
    is_array: ClassVar[bool] = True
    file: BinaryIO
    dtype: np.dtype[Any]
    stored: tuple[int, int, int, int]
    offset: int
    axes: tuple[int, int, int, int] = (0, 1, 2, 3)
    backwards: tuple[int, ...] = ()
    spacing: Spacing | None = None
    slope: float | None = None
    intercept: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        frames, height, width, _ = (self.stored[axis] for axis in self.axes)
        return frames, height, width

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.stored[self.axes[3]]

    @property
    def depth(self) -> str:
        """Smallest type that holds the values."""
        return "float32" if self.slope is not None else depth_of(self.dtype)

    def read(self, frames: FrameArray, box: Box) -> ImageArray:
        """Return a box of some frames; see `Stack`."""
        top, left, height, width = box
        wanted = [frames, np.arange(top, top + height), np.arange(left, left + width), np.arange(self.channels)]
        for axis in self.backwards:
            wanted[axis] = self.shape[axis] - 1 - wanted[axis]
        part = self._read_stored([wanted[self.axes.index(axis)] for axis in range(4)]).transpose(self.axes)
        if self.slope is not None:
            return part.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)
        return part

    def _read_stored(self, wanted: Sequence[FrameArray]) -> ImageArray:
        """Read the needed rows of the second stored axis, for each index of the first."""
        _, rows, *inner = self.stored
        row_bytes = math.prod(inner) * self.dtype.itemsize
        places, back = np.unique(wanted[0], return_inverse=True)
        first, last = int(wanted[1].min()), int(wanted[1].max()) + 1
        blocks = []
        for place in places.tolist():  # in the order of the file, which a compressed one has to be read in
            self.file.seek(self.offset + (place * rows + first) * row_bytes)
            content = self.file.read((last - first) * row_bytes)
            if len(content) != (last - first) * row_bytes:
                raise ValueError("truncated")
            block = np.frombuffer(content, self.dtype).reshape(last - first, *inner)
            blocks.append(block[_part(wanted[1] - first)][:, _part(wanted[2])][:, :, _part(wanted[3])])
        return np.stack(blocks)[_part(back)]


def _part(places: FrameArray) -> slice | FrameArray:
    """Return the slice of evenly spaced indices: views are faster than copies."""
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if step == 0 or (np.diff(places) != step).any():
        return places
    first, end = int(places[0]), int(places[-1]) + step
    return slice(first, None if end < 0 else end, step)


def read_stack(stack: Stack, choose: ChooseFrames | None = None, depth: str | None = None) -> ImageArray:
    """Return a box of the chosen frames of a clip or a volume.

    Default: the whole item.

    Parameters
    ----------
    stack : Stack
    choose : callable, optional
        See `ChooseFrames`. Called once.
    depth : "uint8", "uint16" or "float32", optional
        Type of the result, which must hold the values. Default: 8 bits.

    Returns
    -------
    array (frames, height, width, channels)
        In native byte order.

    Raises
    ------
    ValueError
        If `depth` cannot hold the values, or values have no fixed range.
    """
    frames, height, width = stack.shape
    chosen, box = (np.arange(frames), (0, 0, height, width)) if choose is None else choose(stack.shape)
    part = stack.read(chosen, box)
    return cast_depth(part.astype(part.dtype.newbyteorder("="), copy=False), depth)


def resize_stack(stack: ImageArray, size: tuple[int, ...], *, box: StackBox | None = None) -> ImageArray:
    """Resize a clip or a volume along its three axes, antialiased (bicubic).

    The filter is separable: each frame is resized like an image, then every column of voxels along the first axis, if
    the number of frames changes.

    Parameters
    ----------
    stack : array (frames, height, width, channels)
        uint8, uint16 or float32.
    size : (frames, height, width)
        Of the result.
    box : (front, top, left, back, bottom, right), optional
        Region to resize; may be fractional. Default: all. Near its faces, the filter also uses voxels outside it.

    Returns
    -------
    array (frames, height, width, channels)
        Of the type of `stack`.

    Raises
    ------
    ValueError
        If `stack` or `size` is invalid.

    Examples
    --------
    >>> resize_stack(np.full((10, 8, 6, 2), 200, np.uint8), (5, 4, 3)).shape
    (5, 4, 3, 2)
    """
    if stack.ndim != 4 or 0 in stack.shape:
        raise ValueError(f"stack: expected an array (frames, height, width, channels), got {stack.shape}")
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size: expected (frames, height, width) of at least 1, got {size}")
    frames, height, width, channels = stack.shape
    front, top, left, back, bottom, right = box or (0.0, 0.0, 0.0, float(frames), float(height), float(width))
    plane = np.stack([resize(frame, (size[1], size[2]), box=(left, top, right, bottom)) for frame in stack])
    if (front, back, size[0]) == (0, frames, frames):
        return plane
    columns = plane.reshape(frames, -1, 1)  # Pillow filters the rows only if the width stays
    across = columns.shape[1]
    resized = resize(columns, (size[0], across), box=(0, front, across, back), filter=Image.Resampling.BICUBIC)
    return resized.reshape(*size, channels)

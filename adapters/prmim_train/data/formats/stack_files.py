"""Files with a clip or a volume each."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from prmim_methods.messages import counted
from prmim_train.config.axes import ThreeAxes
from prmim_train.data.formats.nifti import NIFTI_ENDINGS, is_nifti, nifti_stack
from prmim_train.data.formats.npy import NPY_START, npy_stack
from prmim_train.data.formats.records import FileSource, ImageArray
from prmim_train.data.formats.stacks import ArrayStack, Choose, ChooseFrames, Stack, read_stack, resize_stack
from prmim_train.data.formats.video import VIDEO_ENDINGS, VideoStack, is_video
from prmim_train.data.image_files import ARRAY_ENDING, MAX_PIXELS, ImageHeader, check_pixels, named_errors

__all__ = ["STACK_ENDINGS", "StackSource", "open_stack"]

STACK_ENDINGS = (*VIDEO_ENDINGS, ARRAY_ENDING, *NIFTI_ENDINGS)
"""Endings of files with a clip or a volume."""


_START = 12  # bytes that tell the format


def open_stack(file: BinaryIO, name: str, channels: int, *, max_pixels: int = MAX_PIXELS) -> Stack:
    """Open a file with a clip or a volume.

    Parameters
    ----------
    file : binary file
        Must stay open until the stack is read.
    name : str
        Files with the ending of a video are videos; for others, the content decides.
    channels : int
        Of the frames of videos. Arrays have their own.
    max_pixels : int, optional
        Larger frames or slices are an error.

    Raises
    ------
    ValueError
        If the file is corrupt, of another format, or too large.
    ImportError
        If the package that reads the format is not installed.
    """
    start = file.read(_START)
    file.seek(0)
    if name.lower().endswith(VIDEO_ENDINGS) or is_video(start):
        return VideoStack(file, channels, max_pixels=max_pixels)
    if start.startswith(NPY_START):
        stack = npy_stack(file)
    elif is_nifti(start):
        stack = nifti_stack(file)
    else:
        raise ValueError("not NPY or NIfTI" if start else "empty file")
    check_pixels(stack.shape[1] * stack.shape[2], max_pixels)
    return stack


def array_stack(array: ImageArray, max_pixels: int = MAX_PIXELS) -> ArrayStack:
    """Return an array as a clip or a volume.

    The array is (frames, height, width) or (frames, height, width, channels).
    """
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"expected (frames, height, width) or (frames, height, width, channels), got {array.shape}")
    check_pixels(array.shape[1] * array.shape[2], max_pixels)
    return ArrayStack(array if array.ndim == 4 else array[..., None])


@dataclass(frozen=True)
class StackSource(FileSource):
    """Files with a clip or a volume each; see `prmim_train.data.sources.ImageSource`.

    Parameters
    ----------
    three_axes : ThreeAxes
        Sampling of the clips or volumes.
    """

    three_axes: ThreeAxes = field(kw_only=True)

    def read(self, index: int, choose: ChooseFrames | None = None) -> ImageArray:
        """Read a box of the chosen frames of a clip or volume. Default: the whole item."""
        with self._opened(index) as stack:
            if stack.is_array and stack.channels != self.channels:
                raise ValueError(f"{counted(stack.channels, 'channel')}, expected {self.channels}")
            return read_stack(stack, choose, self.depth)

    def read_crop(self, index: int, size: tuple[int, ...], choose: Choose) -> ImageArray:
        """Read and resize a box of the chosen frames."""
        return resize_stack(self.read(index, choose), size)

    def header(self, index: int) -> ImageHeader:
        """Read shape, depth, and spacing or frame rate."""
        with self._opened(index) as stack:
            return ImageHeader(stack.shape, stack.depth, stack.channels, stack.is_array, stack.spacing, stack.rate)

    @contextmanager
    def _opened(self, index: int) -> Iterator[Stack]:
        with named_errors(self.name(index)):
            file = self._open(index)
            if isinstance(file, np.ndarray):
                yield array_stack(file, self.max_pixels)
                return
            with closing(file):
                yield open_stack(file, self.name(index), self.channels, max_pixels=self.max_pixels)

"""Encoded images by index, and the image source that decodes them.

Each format has its own module with one class of records: `folder`, `tar_shards`, `parquet`, `hub`, `lmdb`, `custom`.
"""

import io
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from prmim_train.config.axes import ThreeAxes
from prmim_train.data.formats.stacks import Choose, ChooseFrames
from prmim_train.data.identity import Identities
from prmim_train.data.image_files import (
    MAX_PIXELS,
    ImageHeader,
    array_header,
    decode_crop,
    decode_image,
    named_errors,
    read_header,
)

__all__ = ["FileSource", "ImageArray", "OpensRecords", "Records"]

ImageArray = NDArray[Any]


class Records(Protocol):
    """Fixed sequence of encoded images.

    Must be picklable: each worker process gets a copy. Threads share one.
    """

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class number of each image; see `prmim_train.data.sources.ImageSource`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, by class number; None without labels."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def content(self, index: int) -> bytes | ImageArray:
        """Return the complete image file, or an array (height, width[, channels]).

        Any error makes the image unreadable.
        """
        ...

    def name(self, index: int) -> str:
        """Return the image's name for messages: one printable line."""
        ...

    def identities(self) -> Identities:
        """Return the identities of the images, without decoding them."""
        ...


@runtime_checkable
class OpensRecords(Protocol):
    """Records whose headers can be read alone."""

    def open(self, index: int) -> BinaryIO:
        """Open one image file for reading at any position."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded on access; see `prmim_train.data.sources.ImageSource`.

    Parameters
    ----------
    records : Records
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA). For NumPy arrays, their number.
    description : str
    max_pixels : int, optional
        Larger images are unreadable.
    depth : str, optional
        Type of the images; see `prmim_train.data.sources.ImageSource`.
    three_axes : ThreeAxes, optional
        How clips or volumes are sampled; see `prmim_train.data.formats.stack_files.StackSource`.
    """

    records: Records
    channels: int
    description: str
    max_pixels: int = MAX_PIXELS
    depth: str | None = None
    three_axes: ThreeAxes | None = None

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class number of each image; None without labels."""
        return self.records.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class; None without labels."""
        return self.records.class_names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def read(self, index: int, choose: ChooseFrames | None = None) -> ImageArray:
        """Decode one image."""
        return decode_image(self._content(index), **self._how(index))

    def read_crop(self, index: int, size: tuple[int, ...], choose: Choose) -> ImageArray:
        """Decode and resize a box of one image."""
        return decode_crop(self._content(index), size, choose, **self._how(index))

    def header(self, index: int) -> ImageHeader:
        """Read size and depth of one image."""
        name = self.name(index)
        with named_errors(name):
            file = self._open(index)
            if isinstance(file, np.ndarray):
                return array_header(file.shape, file.dtype, self.max_pixels)
        with closing(file):
            return read_header(file, max_pixels=self.max_pixels, name=name)

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        return self.records.name(index)

    def identities(self) -> Identities:
        """Return the identities of the images."""
        return self.records.identities()

    def _open(self, index: int) -> BinaryIO | ImageArray:
        """Open the file of one image. An array is returned as it is."""
        if isinstance(self.records, OpensRecords):
            return self.records.open(index)
        content = self.records.content(index)
        return content if isinstance(content, np.ndarray) else io.BytesIO(content)

    def _content(self, index: int) -> bytes | ImageArray:
        with named_errors(self.name(index)):
            return self.records.content(index)

    def _how(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        return {"channels": self.channels, "max_pixels": self.max_pixels, "name": name, "depth": self.depth}

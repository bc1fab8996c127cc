"""Images in memory: the embedded digits, and the arrays of a `.npz` file."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.config.axes import ThreeAxes
from prmim_train.config.packages import check_installed
from prmim_train.data.depth import SourceArray, cast_depth, depth_of
from prmim_train.data.formats.npz import read_npz
from prmim_train.data.formats.stacks import ArrayStack, Choose, ChooseFrames, read_stack, resize_stack
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import MAX_PIXELS, ImageHeader, UnreadableImageError, check_file_channels, cut_box
from prmim_train.data.transforms import resize

__all__ = ["ArraySource", "open_digits", "open_npz"]

ImageArray = NDArray[Any]


@dataclass(frozen=True)
class ArraySource:
    """Images or clips of one size, held in memory.

    Parameters
    ----------
    images : array (number of images, height, width, channels) or (number of clips, frames, height, width, channels)
        Values of a type in `prmim_train.data.depth.DEPTHS`. Without `depth`, `read` scales uint16 to 8 bits.
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    max_pixels : int, optional
        Limit for image files used as test images of this source. No effect on arrays.
    depth : str, optional
        Type of the images; see `prmim_train.data.sources.ImageSource`.
    three_axes : ThreeAxes, optional
        Sampling of clips or volumes.

    Examples
    --------
    >>> source = ArraySource(np.zeros((5, 8, 6, 1), np.uint8), "five black images")
    >>> len(source), source.channels, source.read(4).shape
    (5, 1, (8, 6, 1))
    """

    images: SourceArray
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    max_pixels: int = MAX_PIXELS
    depth: str | None = None
    three_axes: ThreeAxes | None = None

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        return int(self.images.shape[-1])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, index: int, choose: ChooseFrames | None = None) -> ImageArray:
        """Return one image ([frames,] height, width, channels).

        uint8 images are views: do not modify them.
        """
        try:
            if self.three_axes is not None:
                return read_stack(ArrayStack(self.images[index]), choose, self.depth)
            return cast_depth(self.images[index], self.depth)
        except ValueError as error:
            raise UnreadableImageError(self.name(index), str(error)) from error

    def read_crop(self, index: int, size: tuple[int, ...], choose: Choose) -> ImageArray:
        """Return a resized box of one image; see `prmim_train.data.sources.ImageSource`."""
        if self.three_axes is not None:
            return resize_stack(self.read(index, choose), size)
        return resize(cut_box(self.read(index), choose), size)

    def header(self, index: int) -> ImageHeader:
        """Return size and depth of one image."""
        *shape, channels = self.images.shape[1:]
        return ImageHeader(tuple(shape), depth_of(self.images.dtype), channels)

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        return f"image {index}"

    def identities(self) -> Identities:
        """Hash the pixels; see `prmim_train.data.sources.ImageSource`."""
        return identities((image.tobytes(), 0) for image in self.images)


def open_digits(channels: int, max_pixels: int, three_axes: ThreeAxes | None) -> ArraySource:
    """Return the embedded digits; see `prmim_train.data.sources.open_source`."""
    check_file_channels(channels, "the digits")
    check_installed("data", "sklearn", otherwise="--data FOLDER")
    table = _read_digits()
    class_names = tuple(map(str, range(10)))
    grey = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    bands = [grey] if channels == 1 else [grey, grey, grey]
    if channels == 4:
        bands.append(np.full_like(grey, 255))
    images = np.concatenate(bands, axis=3)
    if three_axes is not None:
        images = np.broadcast_to(images[:, None], (len(images), three_axes.frames, *images.shape[1:]))
    return ArraySource(
        images=images,
        description=_describe("digits", len(grey), images.shape[1:-1], class_names),
        labels=table[:, -1].astype(np.int64),
        class_names=class_names,
        max_pixels=max_pixels,
        three_axes=three_axes,
    )


def _read_digits() -> NDArray[np.uint8]:
    """Read the digits of scikit-learn: uint8 (1797, 65).

    A row holds 64 pixels in [0, 16] and the class. Reading their file takes milliseconds; importing the package takes a
    second.
    """
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits  # a version with the file in another place

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


def open_npz(path: Path, channels: int | None, max_pixels: int, three_axes: ThreeAxes | None) -> ArraySource:
    """Read a ``.npz`` file; see `prmim_train.data.sources.open_source`."""
    images, labels, class_names = read_npz(path, channels, has_frames=three_axes is not None)
    return ArraySource(
        images=images,
        description=_describe(f"file {printable(str(path))}", len(images), images.shape[1:-1], class_names),
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
        three_axes=three_axes,
    )


def _describe(where: str, number: int, size: tuple[int, ...], class_names: Sequence[str] | None) -> str:
    classes = ", no labels" if class_names is None else f" in {counted(len(class_names), 'class', 'classes')}"
    return f"{where}: {counted(number, 'image')} of {' x '.join(map(str, size))} pixels{classes}"

"""Image sources: the embedded digits, a folder of image files, tar files, or a `.npz` file.

A source returns single images by index, as uint8 arrays (height, width, channels). The order of its images is fixed.
The frames of clips are folded into channels.
"""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import printable
from prmim_train.config.packages import check_installed
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import (
    IMAGE_ENDINGS,
    MAX_PIXELS,
    ChooseBox,
    UnreadableImageError,
    check_file_channels,
    check_header,
    counted,
    decode_crop,
    decode_image,
    read_file,
    read_image,
    to_8_bits,
)
from prmim_train.data.names import PackedNames, number_classes
from prmim_train.data.npz import read_npz
from prmim_train.data.tar_shards import TarSource, open_tars
from prmim_train.data.transforms import fold_frames, resize

__all__ = [
    "IMAGE_ENDINGS",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "TarSource",
    "UnreadableImageError",
    "open_source",
    "read_image",
]

ImageArray = NDArray[np.uint8]

_STAT_THREADS = 16


class ImageSource(Protocol):
    """Fixed sequence of images, read by index. Must be picklable: each worker process gets a copy."""

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        ...

    @property
    def frames(self) -> int | None:
        """Number of frames of every clip, which `read` folds into channels; None for images."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class number of each image, int64 (number of images,); None without labels."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, by class number; None without labels."""
        ...

    @property
    def description(self) -> str:
        """One line that says what was found, and where."""
        ...

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels of a readable image file. Arrays have no limit."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels), or raise `UnreadableImageError`."""
        ...

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a resized box of one image, uint8 (height, width, channels), or raise `UnreadableImageError`.

        `choose` maps (height, width) of the image to the box (top, left, height, width). The result is
        ``resize(read(index)[box], size)``; for large JPEGs an approximation, see
        `prmim_train.data.image_files.decode_crop`.
        """
        ...

    def check_header(self, index: int) -> None:
        """Raise `UnreadableImageError` if the header alone shows that an image cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        ...

    def identities(self) -> Identities:
        """Return what tells the images apart, without decoding them."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images or clips of one size, held in memory.

    Parameters
    ----------
    images : array (number of images, height, width, channels) or (number of clips, frames, height, width, channels)
        uint8 or uint16; `read` scales uint16 to 8 bits.
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    max_pixels : int, optional
        Limit for image files that are used with this source, as test images. No effect on arrays.

    Examples
    --------
    >>> source = ArraySource(np.zeros((5, 8, 6, 1), np.uint8), "five black images")
    >>> len(source), source.channels, source.read(4).shape
    (5, 1, (8, 6, 1))
    """

    images: NDArray[np.uint8] | NDArray[np.uint16]
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        return int(self.images.shape[-1])

    @property
    def frames(self) -> int | None:
        """Number of frames of every clip; None for images."""
        return int(self.images.shape[1]) if self.images.ndim == 5 else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels). For uint8 images this is a view: do not modify it.

        Of a clip, (height, width, frames * channels).
        """
        image = to_8_bits(self.images[index])
        return image if self.frames is None else fold_frames(image)

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a resized box of one image; see `ImageSource`."""
        image = self.read(index)
        top, left, height, width = choose((image.shape[0], image.shape[1]))
        return resize(image[top : top + height, left : left + width], size)

    def check_header(self, index: int) -> None:
        """Return: images in memory are readable."""

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        return f"image {index}"

    def identities(self) -> Identities:
        """Hash the pixels; see `ImageSource`."""
        return identities((image.tobytes(), 0) for image in self.images)


@dataclass(frozen=True)
class FolderSource:
    """Image files in a folder, decoded on access.

    Parameters
    ----------
    folder : Path
    files : sequence of str
        Paths relative to `folder`.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA).
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    max_pixels : int, optional
        Larger images are unreadable.
    """

    folder: Path
    files: Sequence[str]
    channels: int
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    max_pixels: int = MAX_PIXELS
    frames: None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def read(self, index: int) -> ImageArray:
        """Decode one image; see `ImageSource`."""
        content, name = self._content(index), self.name(index)
        return decode_image(content, channels=self.channels, max_pixels=self.max_pixels, name=name)

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Decode and resize a box of one image; see `ImageSource`."""
        content, name = self._content(index), self.name(index)
        return decode_crop(content, size, choose, channels=self.channels, max_pixels=self.max_pixels, name=name)

    def check_header(self, index: int) -> None:
        """Check the header of one image; see `ImageSource`."""
        check_header(self.folder / self.files[index], max_pixels=self.max_pixels, name=self.name(index))

    def _content(self, index: int) -> bytes:
        return read_file(self.folder / self.files[index], name=self.name(index))

    def name(self, index: int) -> str:
        """Return the image's name for messages: its path relative to the folder."""
        return printable(self.files[index])

    def identities(self) -> Identities:
        """Read size and modification time of every file, and hash path and size; see `ImageSource`.

        A file that cannot be examined has size -1 and time 0.
        """
        with ThreadPoolExecutor(_STAT_THREADS) as pool:  # network file systems answer slowly, but many at once
            found = pool.map(self._size_and_time, self.files, chunksize=1000)
            return identities(
                (os.fsencode(f"{name} {size}"), time) for name, (size, time) in zip(self.files, found, strict=True)
            )

    def _size_and_time(self, name: str) -> tuple[int, int]:
        try:
            status = (self.folder / name).stat()
        except OSError:
            return -1, 0
        return status.st_size, int(status.st_mtime)


def open_source(spec: str, *, channels: int, max_pixels: int = MAX_PIXELS, frames: int | None = None) -> ImageSource:
    """Open an image source.

    Parameters
    ----------
    spec : str
        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, with labels. For a folder of that name
          write ``"./digits"``.
        - a folder: all image files below it, sorted by path. Image files end in one of `IMAGE_ENDINGS`, in upper or
          lower case. Hidden files and folders, pipes and devices are skipped. Links are followed, but each folder is
          visited once: images have the path without links if there is one, otherwise one with as few links as possible,
          the first in sorted order. If every image lies in a sub-folder, the sorted names of the top-level folders are
          the classes; otherwise there are no labels.
        - a ``.tar`` file, a folder that contains ``.tar`` files but no image files, or a pattern such as
          ``"photos/train-*.tar"``: the images in these files, which are sorted by path. Compressed files are refused.
          For the labels see `prmim_train.data.tar_shards.open_tars`.
        - a ``.npz`` file with ``images`` (N, height, width) or (N, height, width, channels), uint8 or uint16, and
          optionally ``labels`` (N,), integers from 0, and ``names``, the class names. Read without pickle. Clips are
          (N, frames, height, width) or (N, frames, height, width, channels).
    channels : int
        Number of channels. Files and digits are converted to 1 (grey), 3 (RGB) or 4 (RGBA); a ``.npz`` file must have
        this number, which can be any.
    max_pixels : int, optional
        Images of more pixels are unreadable, whatever size they are cropped to. No effect on digits and ``.npz`` files.
    frames : int, optional
        Number of frames of clips, which a ``.npz`` file must have; digits are still clips then. Default: images.

    Returns
    -------
    ImageSource

    Raises
    ------
    FileNotFoundError
        If nothing exists at `spec`.
    ValueError
        If there are no images, or the data is not as described above.
    OSError
        If a folder or a file cannot be read.

    Notes
    -----
    uint16 values become uint8 as round(value / 257): 65535 gives 255. Values of the digits, 0 to 16, are scaled to 0 to
    255 and rounded. For the conversion of files see `prmim_train.data.image_files.decode_image`.

    Examples
    --------
    >>> source = open_source("digits", channels=1)
    >>> source.description
    'digits: 1,797 images of 8 x 8 pixels in 10 classes'
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  # pathlib raises for an unknown user
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _open_npz(path, channels, max_pixels, frames)
    if spec == "digits":
        return _open_digits(channels, max_pixels, frames)
    if frames is not None:
        raise ValueError(f"image_size: expected height,width: clips come from .npz files, got {printable(spec)}")
    if path.is_dir():
        return _open_folder(path, channels, max_pixels)
    if path.exists():
        return _open_tars([path], channels, max_pixels)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  # absolute patterns
    if matches:
        return _open_tars(matches, channels, max_pixels)
    hint = "; braces are not expanded, use * or ?" if "{" in spec else ""
    raise FileNotFoundError(f"data: nothing at {printable(spec)}; expected {_EXPECTED}{hint}")


_EXPECTED = 'a folder of images, .tar files, a .npz file, or "digits"'


def _describe(where: str, number: int, size: tuple[int, ...] | None, class_names: Sequence[str] | None) -> str:
    pixels = "" if size is None else f" of {' x '.join(map(str, size))} pixels"
    classes = ", no labels" if class_names is None else f" in {counted(len(class_names), 'class', 'classes')}"
    return f"{where}: {counted(number, 'image')}{pixels}{classes}"


# -------------------------------------------------------------------------------------------------------- digits


def _open_digits(channels: int, max_pixels: int, frames: int | None) -> ArraySource:
    check_file_channels(channels, "the digits")
    check_installed("data", "sklearn", otherwise="--data FOLDER")
    table = _read_digits()
    class_names = tuple(map(str, range(10)))
    grey = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    bands = [grey] if channels == 1 else [grey, grey, grey]
    if channels == 4:
        bands.append(np.full_like(grey, 255))
    images = np.concatenate(bands, axis=3)
    if frames is not None:
        images = np.broadcast_to(images[:, None], (len(images), frames, *images.shape[1:]))
    return ArraySource(
        images=images,
        description=_describe("digits", len(grey), images.shape[1:-1], class_names),
        labels=table[:, -1].astype(np.int64),
        class_names=class_names,
        max_pixels=max_pixels,
    )


def _read_digits() -> NDArray[np.uint8]:
    """Read the digits of scikit-learn, uint8 (1797, 65): 64 pixels in [0, 16] and the class.

    Their file takes milliseconds to read, and the package a second to import.
    """
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, np.uint8, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------- folder


def _open_folder(folder: Path, channels: int, max_pixels: int) -> ImageSource:
    check_file_channels(channels, "image files")
    found = sorted(_walk(folder))
    images = [parts for parts in found if parts[-1].lower().endswith(IMAGE_ENDINGS)]
    if not images:
        tars = [folder.joinpath(*parts) for parts in found if parts[-1].lower().endswith(".tar")]
        if tars:
            return _open_tars(tars, channels, max_pixels)
        others = f"{counted(len(found), 'other file')}; " if found else "no files found; "
        where = printable(str(folder))
        raise ValueError(f"data: no images in {where}: {others}expected names ending in {', '.join(IMAGE_ENDINGS)}")
    labels, class_names = _label_by_folder(images)
    number = len(found) - len(images)
    others = f", {counted(number, 'other file')} skipped" if number else ""
    return FolderSource(
        folder=folder,
        files=PackedNames("/".join(parts) for parts in images),
        channels=channels,
        description=_describe(f"folder {printable(str(folder))}", len(images), None, class_names) + others,
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
    )


_Place = tuple[tuple[str, ...], str]  # parts below the folder of the source, and the path


def _walk(folder: Path) -> Iterator[tuple[str, ...]]:
    """Iterate over the paths, as parts, of all files that are not hidden. Follows links; visits each folder once."""
    # First all folders that are reached without a link, then those behind one link, and so on. So the paths do not
    # depend on the order in which the system lists them.
    starts: list[_Place] = [((), str(folder))]
    visited: set[str] = set()
    while starts:
        links: list[_Place] = []
        for start in sorted(starts):
            yield from _walk_plain(start, visited, links)
        starts = links


def _walk_plain(start: _Place, visited: set[str], links: list[_Place]) -> Iterator[tuple[str, ...]]:
    """Iterate over the files below a folder that is not yet visited; append the links to folders to `links`."""
    stack = [start]  # trees can be deeper than Python's recursion
    while stack:
        parts, path = stack.pop()
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                inner = (*parts, entry.name)
                if entry.name.startswith("."):
                    continue
                if _is(entry.is_dir):
                    (links if entry.is_symlink() else stack).append((inner, entry.path))
                elif _is(entry.is_file) or _leads_nowhere(entry):
                    yield inner


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a circular link, or no permission for a folder on the way
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    """Whether a link is broken or its target inaccessible. Such images are not skipped, but count as unreadable."""
    return entry.is_symlink() and not _is(lambda: bool(entry.stat()))


def _label_by_folder(
    images: Sequence[tuple[str, ...]],
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    if any(len(parts) == 1 for parts in images):
        return None, None
    return number_classes(parts[0] for parts in images)


# ---------------------------------------------------------------------------------------------------- tar and npz


def _open_tars(paths: Sequence[Path], channels: int, max_pixels: int) -> TarSource:
    check_file_channels(channels, "image files")
    for path in paths:
        if not path.name.lower().endswith((".tar", *_COMPRESSED_TARS)):
            raise ValueError(f"data: expected {_EXPECTED}, got {printable(str(path))}")
    return open_tars(paths, channels=channels, max_pixels=max_pixels)


# `open_tars` refuses these with the reason.
_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _open_npz(path: Path, channels: int, max_pixels: int, frames: int | None) -> ArraySource:
    images, labels, class_names = read_npz(path, channels, frames)
    return ArraySource(
        images=images,
        description=_describe(f"file {printable(str(path))}", len(images), images.shape[1:-1], class_names),
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
    )

"""Where images come from: the embedded digits, a folder of image files, tar files, or a `.npz` file.

Every source gives single images as uint8 arrays (height, width, channels), by index, in an order that does not change.
"""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prmim_train.image_files import (
    IMAGE_ENDINGS,
    ChooseBox,
    UnreadableImageError,
    check_file_channels,
    decode_crop,
    decode_image,
    printable,
    read_file,
    read_image,
    to_8_bits,
)
from prmim_train.names import PackedNames
from prmim_train.npz import read_npz
from prmim_train.tar_shards import TarSource, open_tars
from prmim_train.transforms import resize

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


class ImageSource(Protocol):
    """A fixed sequence of images, read by index. Must be picklable: worker processes get a copy."""

    @property
    def channels(self) -> int:
        """Channels of every image."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class of every image, int64 (number of images,); None without labels."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class, in the order of the labels; None without labels."""
        ...

    @property
    def description(self) -> str:
        """One line: what was found where."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels); `UnreadableImageError` if that fails."""
        ...

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a box of one image, resized: uint8, `size` and channels; `UnreadableImageError` if that fails.

        `choose` is given (height, width) of the image, and returns (top, left, height, width) of the box. This is
        ``resize(read(index)[box], size)``, or as near to it as `prmim_train.image_files.decode_crop` promises.
        """
        ...

    def name(self, index: int) -> str:
        """Return what to call an image in messages."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images of one size, held in memory.

    Parameters
    ----------
    images : array (number of images, height, width, channels)
        uint8, or uint16, which `read` scales to 8 bits.
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional

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

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.images.shape[3])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels); of uint8 images a view, not to be written to."""
        return to_8_bits(self.images[index])

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a box of one image, resized: see `ImageSource`."""
        image = self.read(index)
        top, left, height, width = choose((image.shape[0], image.shape[1]))
        return resize(image[top : top + height, left : left + width], size)

    def name(self, index: int) -> str:
        """Return what to call an image in messages."""
        return f"image {index}"


@dataclass(frozen=True)
class FolderSource:
    """Image files, decoded when they are read.

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

    Notes
    -----
    Errors name the file relative to the folder.
    """

    folder: Path
    files: Sequence[str]
    channels: int
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels); `UnreadableImageError` if that fails."""
        return decode_image(self._content(index), channels=self.channels, name=self.name(index))

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a box of one image, resized: see `ImageSource`."""
        return decode_crop(self._content(index), size, choose, channels=self.channels, name=self.name(index))

    def _content(self, index: int) -> bytes:
        return read_file(self.folder / self.files[index], name=self.name(index))

    def name(self, index: int) -> str:
        """Return what to call an image in messages: its path inside the folder."""
        return printable(self.files[index])


def open_source(spec: str, *, channels: int) -> ImageSource:
    """Open a source of images.

    Parameters
    ----------
    spec : str
        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, with labels. (A folder of that name:
          ``"./digits"``.)
        - a folder: all image files below it (`IMAGE_ENDINGS`, in either case; hidden files and folders, pipes and
          devices are left out), sorted by path. If all of them lie in sub-folders, the names of the top-level ones,
          sorted, are the classes; otherwise there are no labels.
        - a ``.tar`` file, a folder that holds ``.tar`` files but no image files, or a pattern such as
          ``"photos/train-*.tar"``: the images in them, file after file, sorted by path. Only plain tar files:
          see `prmim_train.tar_shards.open_tars`, also for labels.
        - a ``.npz`` file: ``images`` (N, height, width) or (N, height, width, channels), uint8 or uint16; optionally
          ``labels`` (N,), integers from 0, and ``names``, the names of the classes. Read without pickle.
    channels : int
        Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA) for files and digits, which are converted; for a
        ``.npz`` any number, which must be that of the file.

    Returns
    -------
    ImageSource

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If there are no images, or what is there is not as described.
    OSError
        If a folder or a file may not be read.

    Notes
    -----
    uint16 becomes uint8 as value / 257, rounded: 65535 gives 255. The digits' 0 to 16 become 0 to 255, rounded. How
    files are converted: see `prmim_train.image_files.decode_image`.

    Examples
    --------
    >>> source = open_source("digits", channels=1)
    >>> source.description
    'digits: 1,797 images of 8 x 8 pixels in 10 classes'
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    if spec == "digits":
        return _open_digits(channels)
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  # pathlib's raises where there is no such user
    if path.is_dir():
        return _open_folder(path, channels)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, channels)
    if path.exists():
        return _open_tars([path], channels)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  # absolute as well
    if matches:
        return _open_tars(matches, channels)
    hint = "; braces are not expanded, use * or ?" if "{" in spec else ""
    raise FileNotFoundError(f"data: nothing at {printable(spec)}; expected {_EXPECTED}{hint}")


_EXPECTED = 'a folder of images, .tar files, a .npz file, or "digits"'


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _describe(where: str, number: int, size: tuple[int, int] | None, num_classes: int | None) -> str:
    pixels = "" if size is None else f" of {size[0]} x {size[1]} pixels"
    classes = ", no labels" if num_classes is None else f" in {_count(num_classes, 'class', 'classes')}"
    return f"{where}: {_count(number, 'image', 'images')}{pixels}{classes}"


# -------------------------------------------------------------------------------------------------------- digits


def _open_digits(channels: int) -> ArraySource:
    from sklearn.datasets import load_digits  # slow to import, and rarely needed

    check_file_channels(channels, "the digits")
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    bands = [grey] if channels == 1 else [grey, grey, grey]
    if channels == 4:
        bands.append(np.full_like(grey, 255))
    return ArraySource(
        images=np.concatenate(bands, axis=3),
        description=_describe("digits", len(grey), (8, 8), 10),
        labels=digits.target.astype(np.int64),
        class_names=tuple(str(name) for name in digits.target_names),
    )


# -------------------------------------------------------------------------------------------------------- folder


def _open_folder(folder: Path, channels: int) -> ImageSource:
    check_file_channels(channels, "image files")
    found = sorted(_walk(folder))
    images = [parts for parts in found if parts[-1].lower().endswith(IMAGE_ENDINGS)]
    if not images:
        tars = [folder.joinpath(*parts) for parts in found if parts[-1].lower().endswith(".tar")]
        if tars:
            return _open_tars(tars, channels)
        others = f"{_count(len(found), 'other file', 'other files')}; " if found else "it holds no files; "
        where = printable(str(folder))
        raise ValueError(f"data: no images in {where}: {others}expected names ending in {', '.join(IMAGE_ENDINGS)}")
    class_names, labels = _label_by_folder(images)
    number = None if class_names is None else len(class_names)
    return FolderSource(
        folder=folder,
        files=PackedNames("/".join(parts) for parts in images),
        channels=channels,
        description=_describe(f"folder {printable(str(folder))}", len(images), None, number),
        labels=labels,
        class_names=class_names,
    )


def _walk(folder: Path) -> Iterator[tuple[str, ...]]:
    """Give the path, in parts, of every file that is not hidden. Links are followed, but not in circles."""
    # An explicit stack: a deep tree is no deep recursion. Each entry knows its ancestors, to break circles of links.
    stack: list[tuple[str, tuple[str, ...], frozenset[str]]] = [(str(folder), (), frozenset())]
    while stack:
        path, parts, ancestors = stack.pop()
        real = os.path.realpath(path)
        if real in ancestors:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is(entry.is_dir):
                    stack.append((entry.path, (*parts, entry.name), ancestors | {real}))
                elif _is(entry.is_file) or _leads_nowhere(entry):
                    yield (*parts, entry.name)


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link in a circle, or one through a folder that is closed to us
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a link to what is not there or out of reach: to be counted as unreadable, not passed over."""
    return entry.is_symlink() and not _is(lambda: bool(entry.stat()))


def _label_by_folder(
    images: Sequence[tuple[str, ...]],
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    if any(len(parts) == 1 for parts in images):
        return None, None
    class_names = sorted({parts[0] for parts in images})
    number = {name: k for k, name in enumerate(class_names)}
    labels = np.array([number[parts[0]] for parts in images], np.int64)
    return tuple(printable(name) for name in class_names), labels


# ---------------------------------------------------------------------------------------------------- tar and npz


def _open_tars(paths: Sequence[Path], channels: int) -> TarSource:
    check_file_channels(channels, "image files")
    for path in paths:
        if not path.name.lower().endswith((".tar", *_COMPRESSED_TARS)):
            raise ValueError(f"data: expected {_EXPECTED}, got {printable(str(path))}")
    return open_tars(paths, channels=channels)


_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # refused with the reason


def _open_npz(path: Path, channels: int) -> ArraySource:
    images, labels, class_names = read_npz(path, channels)
    number = None if class_names is None else len(class_names)
    height, width = images.shape[1:3]
    return ArraySource(
        images=images,
        description=_describe(f"file {printable(str(path))}", len(images), (height, width), number),
        labels=labels,
        class_names=class_names,
    )

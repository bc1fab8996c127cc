"""Image sources: the embedded digits, a folder of image files, tar files, or a `.npz` file.

A source returns single images by index, as arrays (height, width, channels): uint8, or, with a depth, the values that
are stored. The order of its images is fixed. The frames of clips are folded into channels.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import printable
from prmim_train.config.packages import check_installed
from prmim_train.data.depth import SourceArray, cast_depth, depth_of
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import (
    ARRAY_ENDING,
    IMAGE_ENDINGS,
    MAX_PIXELS,
    ChooseBox,
    ImageHeader,
    UnreadableImageError,
    check_array_channels,
    check_file_channels,
    counted,
    cut_box,
    decode_crop,
    decode_image,
    image_endings,
    missing_plugins,
    read_file,
    read_header,
    read_image,
)
from prmim_train.data.names import PackedNames, classes_of_folders, ending_of, expand_braces, skipped
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
    "keeping_depth",
    "open_source",
    "read_image",
]

ImageArray = NDArray[Any]

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
        """Class number of each image, int64 (number of images,); None without labels.

        `prmim_train.data.names.UNLABELLED`, -1, for single images without a class.
        """
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

    @property
    def depth(self) -> str | None:
        """Type of the images: `uint8`, `uint16` or `float32`, with the values stored; None: uint8, scaled to that."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int) -> ImageArray:
        """Return one image (height, width, channels), or raise `UnreadableImageError`."""
        ...

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a resized box of one image (height, width, channels), or raise `UnreadableImageError`.

        `choose` maps (height, width) of the image to the box (top, left, height, width). The result is
        ``resize(read(index)[box], size)``; for large JPEGs an approximation, see
        `prmim_train.data.image_files.decode_crop`.
        """
        ...

    def header(self, index: int) -> ImageHeader:
        """Return size and depth of one image, or raise `UnreadableImageError`. Reads little more than its header."""
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
        Of one of the types in `prmim_train.data.depth.DEPTHS`. Without `depth`, `read` scales uint16 to 8 bits.
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    max_pixels : int, optional
        Limit for image files that are used with this source, as test images. No effect on arrays.
    depth : str, optional
        Type of the images; see `ImageSource`.

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
        """Return one image (height, width, channels). For uint8 images this is a view: do not modify it.

        Of a clip, (height, width, frames * channels).
        """
        try:
            image = cast_depth(self.images[index], self.depth)
        except ValueError as error:
            raise UnreadableImageError(self.name(index), str(error)) from error
        return image if self.frames is None else fold_frames(image)

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a resized box of one image; see `ImageSource`."""
        return resize(cut_box(self.read(index), choose), size)

    def header(self, index: int) -> ImageHeader:
        """Return size and depth of one image."""
        height, width, channels = self.images.shape[-3:]
        return ImageHeader((height, width), depth_of(self.images.dtype), channels)

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
    depth : str, optional
        Type of the images; see `ImageSource`.
    """

    folder: Path
    files: Sequence[str]
    channels: int
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    max_pixels: int = MAX_PIXELS
    depth: str | None = None
    frames: None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def read(self, index: int) -> ImageArray:
        """Decode one image; see `ImageSource`."""
        return decode_image(self._content(index), **self._how(index))

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Decode and resize a box of one image; see `ImageSource`."""
        return decode_crop(self._content(index), size, choose, **self._how(index))

    def header(self, index: int) -> ImageHeader:
        """Read size and depth of one image; see `ImageSource`."""
        return read_header(self.folder / self.files[index], max_pixels=self.max_pixels, name=self.name(index))

    def _how(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        return {"channels": self.channels, "max_pixels": self.max_pixels, "name": name, "depth": self.depth}

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


def open_source(
    spec: str,
    *,
    channels: int | None,
    max_pixels: int = MAX_PIXELS,
    frames: int | None = None,
    image_key: str | None = None,
    keep_depth: bool = False,
) -> ImageSource:
    """Open an image source.

    Parameters
    ----------
    spec : str
        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, with labels. For a folder of that name
          write ``"./digits"``.
        - a folder: all image files below it, sorted by path. Image files end in one of `IMAGE_ENDINGS`, in upper or
          lower case, or in ``.heic``, ``.heif`` or ``.avif`` if the plug-in is installed. In a folder without such
          files and tar files, the content tells: all files count whose ending they share with an image among the first
          8 of that ending; without any, ``.npy`` files count. Hidden files and folders, pipes and devices are skipped.
          Links are followed, but each folder is visited once: images have the path without links if there is one,
          otherwise one with as few links as possible, the first in sorted order. For the labels see
          `prmim_train.data.names.classes_of_folders`.
        - a ``.tar`` file, a folder that contains ``.tar`` files but no image files, or a pattern such as
          ``"photos/train-*.tar"`` or ``"train-{000..099}.tar"``: the images in these files, which are sorted by path.
          Compressed files are refused. For samples and labels see `prmim_train.data.tar_shards.open_tars`.
        - a ``.npz`` file with ``images`` (N, height, width) or (N, height, width, channels), uint8 or uint16, and
          optionally ``labels`` (N,), integers from 0, and ``names``, the class names. Read without pickle. Clips are
          (N, frames, height, width) or (N, frames, height, width, channels).
    channels : int
        Number of channels. Files and digits are converted to 1 (grey), 3 (RGB) or 4 (RGBA); ``.npz`` and ``.npy`` files
        must have this number, which can be any. None: that of arrays; else 1 if all files looked at are grey, or 3.
    max_pixels : int, optional
        Images of more pixels are unreadable, whatever size they are cropped to. No effect on digits and ``.npz`` files.
    frames : int, optional
        Number of frames of clips, which a ``.npz`` file must have; digits are still clips then. Default: images.
    image_key : str, optional
        Which member of a sample in tar files is the image; see `prmim_train.data.tar_shards.open_tars`.
    keep_depth : bool, optional
        Keep the values that are stored, as needed for a range of pixel values. All images get the widest type that the
        first of up to 8 evenly spaced ones have. Default: 8 bits.

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
    if channels is not None and channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    source = _open(spec, channels, max_pixels, frames, image_key)
    if channels is None and not isinstance(source, ArraySource):
        source = replace(source, channels=_find_channels(source))
    if keep_depth:
        return keeping_depth(source)
    if isinstance(source, ArraySource) and source.images.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixel_range: expected low,high or auto for {source.images.dtype} images, got null")
    return source


def keeping_depth(source: ImageSource) -> ImageSource:
    """Return a source whose images have the values that are stored; see `open_source`."""
    if isinstance(source, ArraySource):
        return replace(source, depth=depth_of(source.images.dtype))
    if not isinstance(source, FolderSource | TarSource):
        return source
    found = [header.depth for header in _some_headers(source)]
    return replace(source, depth=np.result_type(*found).name if found else "uint8")


def _find_channels(source: FolderSource | TarSource) -> int:
    found = {header.channels for header in _some_headers(source)}
    if source.name(0).lower().endswith(ARRAY_ENDING):
        return max(found, default=1)
    return 1 if found <= {1, 2} else 3  # two: grey with opacity


def _some_headers(source: ImageSource) -> list[ImageHeader]:
    """Return the headers of a few evenly spaced images, without unreadable ones."""
    found = []
    for record in sorted({len(source) * k // _NUM_SAMPLES for k in range(_NUM_SAMPLES)}):
        with suppress(UnreadableImageError):
            found.append(source.header(record))
    return found


def _open(
    spec: str, channels: int | None, max_pixels: int, frames: int | None, image_key: str | None
) -> ArraySource | FolderSource | TarSource:
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  # pathlib raises for an unknown user
    is_npz = path.suffix.lower() == ".npz" and not path.is_dir()
    if image_key is not None and (is_npz or spec == "digits"):
        raise ValueError(f"image_key: expected null, since {printable(spec)} is no tar file, got {image_key}")
    if is_npz:
        return _open_npz(path, channels, max_pixels, frames)
    if spec == "digits":
        return _open_digits(channels or 1, max_pixels, frames)
    if frames is not None:
        raise ValueError(f"image_size: expected height,width: clips come from .npz files, got {printable(spec)}")
    if path.is_dir():
        return _open_folder(path, channels, max_pixels, image_key)
    paths = [path] if path.exists() else _matches(str(path))
    if not paths:
        raise FileNotFoundError(f"data: nothing at {printable(spec)}; expected {_EXPECTED}")
    return _open_tars(paths, channels, max_pixels, image_key)


def _matches(pattern: str) -> list[Path]:
    """Return the files of a pattern, sorted; FileNotFoundError if one of the names in braces matches none."""
    names = expand_braces(pattern)
    found = {name: glob.glob(name, recursive=True) for name in names}  # noqa: PTH207  # absolute patterns
    missing = [name for name in names if not found[name]]
    if missing and len(names) > 1:
        listed = ", ".join(printable(name) for name in missing[:_NUM_NAMED]) + ", ..." * (len(missing) > _NUM_NAMED)
        raise FileNotFoundError(
            f"data: {len(missing):,} of {len(names):,} files of {printable(pattern)} are missing: {listed}"
        )
    return sorted({Path(path) for paths in found.values() for path in paths})


_NUM_NAMED = 3
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


def _open_folder(
    folder: Path, channels: int | None, max_pixels: int, image_key: str | None
) -> FolderSource | TarSource:
    found = sorted(_walk(folder))
    endings = Counter(ending_of(parts[-1]) for parts in found)
    images = _with_endings(found, image_endings())
    tars = [] if images else _with_endings(found, (".tar",))
    if tars:
        del endings[".tar"]
        paths = [folder.joinpath(*parts) for parts in tars]
        return _open_tars(paths, channels, max_pixels, image_key, endings)
    where = printable(str(folder))
    if image_key is not None:
        raise ValueError(f"image_key: expected null, since there are no tar files in {where}, got {image_key}")
    images = images or _by_content(folder, found, max_pixels)
    if not images:
        others = skipped(endings).removeprefix(", ").replace(" skipped", "") or "no files found"
        hint = "; decompress tar files" if endings.keys() & set(_COMPRESSED_TARS) else missing_plugins(endings)
        raise ValueError(
            f"data: no images in {where}: {others}; expected names ending in {', '.join(IMAGE_ENDINGS)}{hint}"
        )
    if images[0][-1].lower().endswith(ARRAY_ENDING):
        check_array_channels(folder.joinpath(*images[0]), channels=channels, name=printable("/".join(images[0])))
    else:
        check_file_channels(channels, "image files")
    numbers: dict[tuple[str, ...], int] = {}
    index = [numbers.setdefault(parts[:-1], len(numbers)) for parts in images]
    labels, class_names, remark = classes_of_folders(list(numbers), np.array(index))
    endings -= Counter(ending_of(parts[-1]) for parts in images)
    return FolderSource(
        folder=folder,
        files=PackedNames("/".join(parts) for parts in images),
        channels=channels or 3,
        description=f"folder {where}: {counted(len(images), 'image')}{remark}{skipped(endings)}",
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
    )


def _with_endings(found: Sequence[tuple[str, ...]], endings: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [parts for parts in found if parts[-1].lower().endswith(endings)]


def _by_content(folder: Path, found: Sequence[tuple[str, ...]], max_pixels: int) -> list[tuple[str, ...]]:
    """Return the files of all endings of which one of the first files is an image; without any, the arrays."""
    samples: dict[str, list[tuple[str, ...]]] = {}
    for parts in found:
        sample = samples.setdefault(ending_of(parts[-1]), [])
        if len(sample) < _NUM_SAMPLES:
            sample.append(parts)
    arrays, raw = samples.pop(ARRAY_ENDING, []), _RAW.intersection(samples)
    chosen = {
        ending
        for ending, sample in samples.items()
        if ending not in raw and any(_is_image(folder.joinpath(*parts), max_pixels) for parts in sample)
    }
    if not chosen and arrays:
        chosen = {ARRAY_ENDING}
    return [parts for parts in found if ending_of(parts[-1]) in chosen]


def _is_image(path: Path, max_pixels: int) -> bool:
    try:
        read_header(path, max_pixels=max_pixels)
    except UnreadableImageError:
        return False
    return True


_NUM_SAMPLES = 8
# TIFF files for Pillow, which reads the preview in them.
_RAW = frozenset((".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".sr2", ".srw"))


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


# ---------------------------------------------------------------------------------------------------- tar and npz


def _open_tars(
    paths: Sequence[Path],
    channels: int | None,
    max_pixels: int,
    image_key: str | None,
    others: Mapping[str, int] | None = None,
) -> TarSource:
    for path in paths:
        if ending_of(path.name) not in (".tar", *_COMPRESSED_TARS):
            raise ValueError(f"data: expected {_EXPECTED}, got {printable(str(path))}")
    return open_tars(paths, channels=channels, max_pixels=max_pixels, image_key=image_key, others=others)


# `open_tars` refuses these with the reason.
_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def _open_npz(path: Path, channels: int | None, max_pixels: int, frames: int | None) -> ArraySource:
    images, labels, class_names = read_npz(path, channels, frames)
    return ArraySource(
        images=images,
        description=_describe(f"file {printable(str(path))}", len(images), images.shape[1:-1], class_names),
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
    )

"""Image sources: the digits, folders, tar files, tables, and more.

A source returns single images by index, as arrays (height, width, channels): uint8, or, with a depth, the stored
values. The order of its images is fixed. The first axis of clips and volumes is that of frames or slices.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prmim_methods.files import expanded
from prmim_methods.messages import counted, printable
from prmim_methods.record import IMPORT_PATH
from prmim_train.config.axes import ThreeAxes
from prmim_train.config.packages import check_installed
from prmim_train.config.training import DIGITS, VOLUME_EXAMPLE, SourceOptions
from prmim_train.data.cache import open_cache
from prmim_train.data.depth import depth_of
from prmim_train.data.formats.arrays import ArraySource, open_digits, open_npz
from prmim_train.data.formats.custom import open_custom
from prmim_train.data.formats.folder import open_folder
from prmim_train.data.formats.frame_folders import FrameSource, find_frame_folders
from prmim_train.data.formats.hub import HUB, open_hub
from prmim_train.data.formats.lmdb import DATA_FILE, LMDB_ENDINGS, open_lmdb
from prmim_train.data.formats.nifti import NIFTI_ENDINGS
from prmim_train.data.formats.parquet import PARQUET_ENDING, open_parquet
from prmim_train.data.formats.records import FileSource, Records
from prmim_train.data.formats.stack_files import STACK_ENDINGS, StackSource
from prmim_train.data.formats.stacks import Choose, ChooseFrames
from prmim_train.data.formats.tar_shards import COMPRESSED_TARS, open_tars
from prmim_train.data.formats.video import VIDEO_ENDINGS
from prmim_train.data.identity import Identities
from prmim_train.data.image_files import (
    IMAGE_ENDINGS,
    MAX_PIXELS,
    ImageHeader,
    UnreadableImageError,
    check_file_channels,
    image_endings,
    read_image,
)
from prmim_train.data.names import ending_of, skipped
from prmim_train.data.paths import Parts, matches, walk, with_endings
from prmim_train.data.storage import Place, find_addresses, is_address, public_address

__all__ = [
    "IMAGE_ENDINGS",
    "ArraySource",
    "FileSource",
    "ImageSource",
    "UnreadableImageError",
    "keeping_depth",
    "open_source",
    "read_image",
]

ImageArray = NDArray[Any]


class ImageSource(Protocol):
    """Fixed sequence of images, read by index.

    Must be picklable: each worker process gets a copy.
    """

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        ...

    @property
    def three_axes(self) -> ThreeAxes | None:
        """How clips or volumes are sampled along their first axis; None for images."""
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
        """One line that describes the images and their place."""
        ...

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels of a readable image file. Arrays have no limit."""
        ...

    @property
    def depth(self) -> str | None:
        """Type of the stored values: `uint8`, `uint16` or `float32`.

        None: values are scaled to uint8.
        """
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, index: int, choose: ChooseFrames | None = None) -> ImageArray:
        """Return one image ([frames,] height, width, channels).

        Raises `UnreadableImageError`. For a clip or a volume, returns the frames and the box of `choose` only.
        """
        ...

    def read_crop(self, index: int, size: tuple[int, ...], choose: Choose) -> ImageArray:
        """Return a resized box of one image ([frames,] height, width, channels).

        Raises `UnreadableImageError`. `choose` maps (height, width) of the image to the box (top, left, height, width).
        The result is ``resize(read(index)[box], size)``; for large JPEGs an approximation, see
        `prmim_train.data.image_files.decode_crop`. Of clips and volumes, it is ``resize_stack(read(index, choose),
        size)``, see `prmim_train.data.formats.stacks`.
        """
        ...

    def header(self, index: int) -> ImageHeader:
        """Return size and depth of one image, reading little more than its header.

        Raises `UnreadableImageError`.
        """
        ...

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        ...

    def identities(self) -> Identities:
        """Return the identities of the images, without decoding them."""
        ...


def open_source(
    spec: str,
    *,
    channels: int | None,
    max_pixels: int = MAX_PIXELS,
    three_axes: ThreeAxes | None = None,
    keep_depth: bool = False,
    options: SourceOptions | None = None,
    for_test: bool = False,
) -> ImageSource:
    """Open an image source.

    Parameters
    ----------
    spec : str
        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, with labels. For a folder of that name
          write ``"./digits"``.
        - a folder: all image files below it, sorted by path. Image files end in one of `IMAGE_ENDINGS`, in upper or
          lower case, or in ``.heic``, ``.heif`` or ``.avif`` if the plug-in is installed. In a folder without such
          files and tar files, the content decides: an ending counts if one of its first 8 files is an image; without
          any, ``.npy`` files count. Hidden files and folders, pipes and devices are skipped.
          Links are followed, but each folder is visited once: images have the path without links if there is one,
          otherwise one with as few links as possible, the first in sorted order. For the labels see
          `prmim_train.data.names.classes_of_folders`.
        - a ``.tar`` file, a folder that contains ``.tar`` files but no image files, or a pattern such as
          ``"photos/train-*.tar"`` or ``"train-{000..099}.tar"``: the images in these files, which are sorted by path.
          Compressed files are refused. For samples and labels see `prmim_train.data.formats.tar_shards.open_tars`.
        - a ``.parquet`` file, a folder that contains ``.parquet`` files but no image or tar files, or a pattern: see
          `prmim_train.data.formats.parquet.open_parquet`.
        - tar or parquet files at addresses that begin with ``https://``, ``http://``, ``s3://`` or ``gs://``; see
          `prmim_train.data.storage.find_addresses`.
        - ``"hf:FOLDER"`` or ``"hf:OWNER/NAME"``: a data set of Hugging Face ``datasets``; see
          `prmim_train.data.formats.hub.open_hub`.
        - an LMDB: a folder with ``data.mdb``, or a file; see `prmim_train.data.formats.lmdb.open_lmdb`.
        - ``"package.module:function"``: a custom function; see `prmim_train.data.formats.custom.open_custom`.
        - for clips and volumes (`three_axes`): a folder or tar files with videos (see
          `prmim_train.data.formats.video.VIDEO_ENDINGS`), or with ``.npy``, ``.nii`` and ``.nii.gz`` files, one clip or
          volume each. Without any, each folder of at least two images is one, see
          `prmim_train.data.formats.frame_folders.find_frame_folders`.
        - a ``.npz`` file with ``images`` (N, height, width) or (N, height, width, channels), uint8 or uint16, and
          optionally ``labels`` (N,), integers from 0, and ``names``, the class names. Read without pickle. Clips are
          (N, frames, height, width) or (N, frames, height, width, channels).
    channels : int
        Number of channels. Files and digits are converted to 1 (grey), 3 (RGB) or 4 (RGBA); ``.npz`` and ``.npy`` files
        must have this number; any number is allowed. None: that of arrays; else 1 if all examined files are grey, or 3.
    max_pixels : int, optional
        Images with more pixels are unreadable, even if crops are smaller. No effect on digits and ``.npz`` files.
    three_axes : ThreeAxes, optional
        Sampling of clips or volumes. A digit becomes a still clip of as many frames. Default: images.
    keep_depth : bool, optional
        Keep the stored values, as needed for a range of pixel values. All images get the widest type of up to 8 evenly
        spaced images. Default: 8 bits.
    options : SourceOptions, optional
        Which images of the source. Its `data` is not used: `spec` can be the test images of a run.
    for_test : bool, optional
        Whether these are test images of a run with these options. Then, options that do not apply to them are ignored,
        and the default split is test or validation.

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
    source = _open(spec, channels, max_pixels, three_axes, options or SourceOptions(), for_test)
    if keep_depth:
        return keeping_depth(source)
    if (dtype := _unscaled_type(source)) is not None:
        raise ValueError(f"pixel_range: expected low,high or auto for {dtype} images, got null")
    return source


def _unscaled_type(source: ImageSource) -> str | None:
    """Return the type of arrays whose values have no fixed range, else None."""
    if isinstance(source, ArraySource):
        return None if source.images.dtype in (np.uint8, np.uint16) else source.images.dtype.name
    is_float = isinstance(source, StackSource) and any(head.depth == "float32" for _, head in _some_headers(source))
    return "int16 or float32" if is_float else None


def keeping_depth(source: ImageSource) -> ImageSource:
    """Return a source whose images keep the stored values; see `open_source`."""
    if isinstance(source, ArraySource):
        return replace(source, depth=depth_of(source.images.dtype))
    if not isinstance(source, FileSource):
        return source
    found = [header.depth for _, header in _some_headers(source)]
    return replace(source, depth=np.result_type(*found).name if found else "uint8")


def _open(
    spec: str,
    channels: int | None,
    max_pixels: int,
    three_axes: ThreeAxes | None,
    options: SourceOptions,
    for_test: bool,
) -> ArraySource | FileSource:
    path = expanded(spec)
    is_npz = path.suffix.lower() == ".npz" and not path.is_dir() and not is_address(spec)
    if is_npz or spec == DIGITS:
        _refuse(spec, options, for_test)
        if is_npz:
            return open_npz(path, channels, max_pixels, three_axes)
        return open_digits(channels or 1, max_pixels, three_axes)
    files = sorted(walk(path)) if path.is_dir() else []
    if three_axes is None:
        records, description = _open_records(spec, path, files, max_pixels, None, options, for_test)
        source = FileSource(records, channels or 3, description, max_pixels)
    else:
        source = _open_stacks(spec, path, files, channels or 3, max_pixels, three_axes, options, for_test)
    return replace(source, channels=_channels_of(source, channels))


def _open_stacks(
    spec: str,
    path: Path,
    files: list[Parts],
    channels: int,
    max_pixels: int,
    three_axes: ThreeAxes,
    options: SourceOptions,
    for_test: bool,
) -> StackSource:
    """Return a source of clips or volumes: files, or folders of frames."""
    endings = VIDEO_ENDINGS if with_endings(files, VIDEO_ENDINGS) else STACK_ENDINGS
    if not with_endings(files, (*endings, *_ARCHIVES)) and (found := find_frame_folders(path, files)) is not None:
        _refuse(spec, options, for_test)
        folders, description = found
        return FrameSource(folders, channels, description, max_pixels, three_axes=three_axes)
    records, description = _open_records(spec, path, files, max_pixels, endings, options, for_test)
    name = records.name(0).lower()
    if name.endswith(NIFTI_ENDINGS):
        check_installed("data", "nibabel", otherwise="volumes in .npy or .npz files")
        if not three_axes.volumes:
            raise ValueError(f"volumes: expected true for NIfTI files, got false for {description}")
    if name.endswith(VIDEO_ENDINGS):
        check_installed("data", "av", otherwise="folders of frames")
    return StackSource(records, channels, description, max_pixels, three_axes=three_axes)


_ARCHIVES = (".tar", PARQUET_ENDING)


def _open_records(
    spec: str,
    path: Path,
    files: list[Parts],
    max_pixels: int,
    endings: tuple[str, ...] | None,
    options: SourceOptions,
    for_test: bool,
) -> tuple[Records, str]:
    if is_address(spec):
        addresses = find_addresses(spec, open_cache(options.cache, options.cache_size))
        where = f"{counted(len(addresses), 'file')} {public_address(spec)}"
        _, named = _names_below(addresses)
        return _open_archives(named, where, endings, options, for_test, Counter())
    if spec.startswith(HUB):
        return open_hub(spec.removeprefix(HUB), **_keys(options), split=options.split, for_test=for_test)
    if IMPORT_PATH.fullmatch(spec) and not path.exists():
        _refuse(spec, options, for_test)
        return open_custom(spec)
    if (path / DATA_FILE).is_file() or (path.is_file() and ending_of(path.name) in LMDB_ENDINGS):
        _refuse(spec, options, for_test)
        return open_lmdb(path)
    if path.is_dir():
        others = Counter(ending_of(parts[-1]) for parts in files)
        archives = () if with_endings(files, endings or image_endings()) else _ARCHIVES
        for ending in archives:
            if chosen := with_endings(files, (ending,)):
                del others[ending]
                named = {path.joinpath(*parts): "/".join(parts) for parts in chosen}
                return _open_archives(named, f"folder {printable(spec)}", endings, options, for_test, others)
        _refuse(spec, options, for_test)
        return open_folder(path, files, max_pixels=max_pixels, endings=endings)
    paths = [path] if path.exists() else matches(str(path))
    if not paths:
        raise FileNotFoundError(f"data: nothing at {printable(str(path))}; expected {_EXPECTED}")
    where = f"file {printable(spec)}" if len(paths) == 1 else f"{len(paths):,} files {printable(spec)}"
    base, named = _names_below(paths)
    if endings is not None and (chosen := with_endings([Path(name).parts for name in named.values()], endings)):
        _refuse(spec, options, for_test)
        return open_folder(base, chosen, max_pixels=max_pixels, endings=endings)
    return _open_archives(named, where, endings, options, for_test, Counter())


def _names_below(places: Sequence[Place]) -> tuple[Path, dict[Place, str]]:
    """Return the folder that all files lie in, and the path of each file below it.

    The host or bucket of an address is a folder, too. Its query is left out.
    """
    paths = [Path(str(place)) for place in places]
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return base, {place: os.path.relpath(path, base) for place, path in zip(places, paths, strict=True)}


def _open_archives(
    paths: Mapping[Place, str],
    where: str,
    endings: tuple[str, ...] | None,
    options: SourceOptions,
    for_test: bool,
    others: Counter[str],
) -> tuple[Records, str]:
    """Open tar or parquet files by their names; `others` are other files in the folder."""
    if {ending_of(path.name) for path in paths} == {PARQUET_ENDING}:
        keys = _keys(options)
        return open_parquet(paths, where, **keys, split=options.split, for_test=for_test, others=skipped(others))
    for path in paths:
        if ending_of(path.name) not in (".tar", *COMPRESSED_TARS):
            raise ValueError(f"data: expected {_EXPECTED}, got {printable(str(path))}")
    _refuse(where, replace(options, image_key=None), for_test)
    return open_tars(list(paths), image_key=options.image_key, others=others, endings=endings)


_MANY = 16  # channels, more than images usually have

_EXPECTED = (
    'a folder of images, .tar or .parquet files, on disk or at addresses, a .npz file, an LMDB, hf:NAME, or "digits"'
)


def _keys(options: SourceOptions) -> dict[str, str | None]:
    return {"image_key": options.image_key, "label_key": options.label_key}


def _refuse(spec: str, options: SourceOptions, for_test: bool) -> None:
    """Raise ValueError if a set option does not apply to a source.

    For test images, options of the run are ignored.
    """
    for name, value in {**_keys(options), "split": options.split}.items():
        if value is not None and not for_test:
            raise ValueError(f"{name}: expected null, since {printable(spec)} is no {_HAS[name]}, got {value}")


_HAS = {
    "image_key": "tar file, parquet file or data set of Hugging Face",
    "label_key": "parquet file or data set of Hugging Face",
    "split": "set of parquet files or data set of Hugging Face",
}


def _channels_of(source: FileSource, channels: int | None) -> int:
    """Validate the number of channels and return it. Default: that of the images."""
    if channels is not None:
        record, header = next(_some_headers(source), (0, None))
        if header is None or not header.is_array:
            check_file_channels(channels, "image files")
        elif header.channels != channels:
            name = source.name(record)
            hint = (
                f"; for volumes, write {VOLUME_EXAMPLE}" if len(header.shape) == 2 and header.channels > _MANY else ""
            )
            raise ValueError(f"channels: {name} has {counted(header.channels, 'channel')}, got {channels}{hint}")
        return channels
    headers = [header for _, header in _some_headers(source)]
    found = {header.channels for header in headers}
    if any(header.is_array for header in headers):
        return max(found)
    return 1 if found <= {1, 2} else 3  # two: grey with opacity


def _some_headers(source: ImageSource) -> Iterator[tuple[int, ImageHeader]]:
    """Iterate over evenly spaced readable images and their headers."""
    for record in sorted({len(source) * k // _NUM_SAMPLES for k in range(_NUM_SAMPLES)}):
        with suppress(UnreadableImageError):
            yield record, source.header(record)


_NUM_SAMPLES = 8

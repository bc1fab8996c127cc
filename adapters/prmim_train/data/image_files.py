"""Decoding of single image files, which are treated as untrusted input.

Any content gives an image or an `UnreadableImageError` with a one-line reason. Only the formats listed here are tried,
and no other program is started. Pipes in place of files cannot block a run, and headers with huge dimensions cannot
fill its memory.
"""

import importlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    PsdImagePlugin,
    QoiImagePlugin,
    SgiImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from prmim_methods.files import open_regular
from prmim_methods.messages import counted, printable
from prmim_train.config.axes import Spacing
from prmim_train.config.training import DataOptions
from prmim_train.data.depth import cast_depth, depth_of, to_8_bits
from prmim_train.data.formats.npy import NPY_START, decode_npy, npy_shape, read_npy_header
from prmim_train.data.storage import File, PartialFile, Place, open_place
from prmim_train.data.transforms import check_size, resize, resize_picture

__all__ = [
    "ARRAY_ENDING",
    "IMAGE_ENDINGS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ChooseBox",
    "ImageHeader",
    "UnreadableImageError",
    "array_header",
    "check_file_channels",
    "check_pixels",
    "convert_picture",
    "cut_box",
    "decode_crop",
    "decode_image",
    "ignore_pillow_warnings",
    "image_endings",
    "missing_plugins",
    "named_errors",
    "open_part",
    "read_file",
    "read_header",
    "read_image",
    "read_part",
    "reason_of",
]

ImageArray = NDArray[Any]
ChooseBox = Callable[[tuple[int, int]], tuple[int, int, int, int]]
"""Maps the shape (height, width) of an image to a box (top, left, height, width) in it, in pixels."""

_Box = tuple[float, float, float, float]

IMAGE_ENDINGS = (*(".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),)
"""Endings of image files that need no plug-in; see `image_endings`."""

ARRAY_ENDING = ".npy"
"""Ending of files with one array each. They count as images only if there are no others; they often hold features."""

_PLUGINS = {"AVIF": ("PIL.AvifImagePlugin", "pillow_avif"), "HEIF": ("pillow_heif",)}
"""Modules that decode a format, in order of preference. Pillow decodes AVIF itself since version 11.3."""

_PLUGIN_OF_ENDING = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}

MAX_PIXELS = DataOptions.max_pixels
"""Default maximum number of pixels of an image, as in Pillow."""

MAX_FILE_BYTES = 2**29
"""Maximum size of a file. `MAX_PIXELS` pixels of three 16-bit values fit uncompressed."""

# Resizing takes 32 bytes of memory per pixel of a side.
_MAX_SIDE = 2**20
# The JPEG decoder passes over all pixels once per scan, however few bytes a scan has. Encoders write about ten scans;
# libtiff has the same limit.
_MAX_SCANS = 100
_SCAN = b"\xff\xda"
# Neither an escaped 255 in compressed data, nor a restart marker, nor padding.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_BARE_MARKERS = b"\x01\xd8"  # without a length
_END_OF_IMAGE = 0xD9

# The content counts, not the file name. Of Pillow's other formats, some start programs (EPS). Importing these modules
# keeps Pillow from importing all forty plugins to find one.
_MODULES = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "GIF": GifImagePlugin,
    "PPM": PpmImagePlugin,
    "JPEG2000": Jpeg2KImagePlugin,
    "QOI": QoiImagePlugin,
    "SGI": SgiImagePlugin,
    "PSD": PsdImagePlugin,
    "PCX": PcxImagePlugin,
}
_FORMATS = tuple(_MODULES)
_STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "GIF": rb"GIF8[79]a",
    "JPEG2000": rb"\0\0\0\x0cjP  ",
    "AVIF": rb"....ftyp(avif|avis|(mif1|msf1).{0,40}avif)",
    "HEIF": rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
}
_MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that Pillow converts directly to L, RGB and RGBA; others (CMYK, YCbCr, LAB, ...) are converted to RGB first.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ORIENTATION_TAG = 0x0112


class _Turn(NamedTuple):
    """Operations that turn a stored picture upright.

    In this order: reverse the rows, reverse the columns, swap the axes.
    """

    rows: bool = False
    columns: bool = False
    axes: bool = False


_UPRIGHT = _Turn()
_TURNS = {  # by EXIF orientation
    2: _Turn(columns=True),
    3: _Turn(rows=True, columns=True),
    4: _Turn(rows=True),
    5: _Turn(axes=True),
    6: _Turn(rows=True, axes=True),
    7: _Turn(rows=True, columns=True, axes=True),
    8: _Turn(columns=True, axes=True),
}

_REDUCTIONS = (8, 4, 2)  # those of libjpeg
_LEFT_TO_FILTER = 2  # factor by which the filter still shrinks a reduced JPEG
_MAX_REASON = 200


class UnreadableImageError(ValueError):
    """An image is truncated, corrupt, missing, too large, or not an image.

    Parameters
    ----------
    name : str
        The image's name for messages.
    reason : str
        One line.

    Attributes
    ----------
    name, reason : str

    Examples
    --------
    >>> UnreadableImageError("cat/3.jpg", "empty file")
    UnreadableImageError('cat/3.jpg: empty file')
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, exceptions are unpickled from their message alone.
        return type(self), (self.name, self.reason)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Convert any error into an `UnreadableImageError`.

    A `ConnectionError` is only prefixed with the name. It is no fault of the image, so the run must not skip the image.
    """
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"data: {name}: {reason_of(error)}") from error
    except Exception as error:  # decoders raise many types of errors on corrupt input
        raise UnreadableImageError(name, reason_of(error)) from error


def image_endings() -> tuple[str, ...]:
    """Return the endings of image files that can be decoded here.

    `IMAGE_ENDINGS`, and those of installed plug-ins.
    """
    return (*IMAGE_ENDINGS, *(ending for ending, name in _PLUGIN_OF_ENDING.items() if _plugin(name) is not None))


def missing_plugins(endings: Iterable[str]) -> str:
    """Suggest the packages that decode files with these endings; empty if none apply.

    Examples
    --------
    >>> missing_plugins([".txt"])
    ''
    """
    missing = {_PLUGIN_OF_ENDING.get(ending) for ending in endings} - {None}
    names = [name for name in sorted(filter(None, missing)) if _plugin(name) is None]
    return "".join(f"; {name} files need pip install {_PLUGINS[name][-1].replace('_', '-')}" for name in names)


@cache
def _plugin(name: str) -> str | None:
    """Return the installed module that decodes a format; None without one.

    Registers it in Pillow.
    """
    for module in _PLUGINS[name]:
        if find_spec(module) is None:
            continue
        plugin = importlib.import_module(module)
        if name == "HEIF":
            plugin.register_heif_opener()
        if getattr(plugin, "SUPPORTED", True):
            return module
    return None


def read_image(path: str | Path, *, channels: int, max_pixels: int = MAX_PIXELS) -> ImageArray:
    """Read and decode one image file; see `decode_image` for the conversions.

    Parameters
    ----------
    path : str or Path
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).
    max_pixels : int, optional
        Larger images are unreadable.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    UnreadableImageError
        If the file is missing, inaccessible, not a regular file (a folder, pipe or device), larger than
        `MAX_FILE_BYTES`, or cannot be decoded.
    ValueError
        If `channels` is not 1, 3 or 4.
    """
    check_file_channels(channels, "image files")
    name = printable(os.fspath(path))
    with named_errors(name):
        content = read_file(path)
    return decode_image(content, channels=channels, max_pixels=max_pixels, name=name)


def decode_image(
    content: bytes | ImageArray,
    *,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    name: str = "image",
    depth: str | None = None,
) -> ImageArray:
    """Decode the content of an image file.

    - The EXIF orientation is applied.
    - Palette, grey, CMYK and other modes are converted.
    - 16-bit grey values become round(value / 257). Of 16-bit colours, Pillow keeps the upper 8 bits.
    - For 1 and 3 channels, transparent images are composited on white, since fully transparent pixels often have
      arbitrary colours.
    - For animations and multi-page files, the first picture is read.
    - NumPy arrays (``.npy``) are not converted, except uint16 to 8 bits as above.

    With a depth, values are not scaled: grey images of 16 or 32 bits keep their values, in every channel.

    Parameters
    ----------
    content : bytes or array
        The complete file, or the array that a ``.npy`` file holds.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255). A NumPy array must have this number of channels; any
        number is allowed.
    max_pixels : int, optional
        Larger images are unreadable.
    name : str, optional
        Name of the image in errors.
    depth : "uint8", "uint16" or "float32", optional
        Type of the result, which must hold the values of the file. Default: 8 bits.

    Returns
    -------
    array (height, width, channels)
        uint8, or the type given by `depth`.

    Raises
    ------
    UnreadableImageError
        If `content` is empty, truncated, corrupt, of another format than those listed here, has 32 bits per value
        (which have no fixed range, without `depth`), values that `depth` does not hold, more than `max_pixels` pixels,
        more than 1,048,576 pixels per side, or, for a JPEG, more than 100 scans. Pixels and scans are counted before
        decoding.
    ValueError
        If `channels` is not 1, 3 or 4.

    Notes
    -----
    A `max_pixels` above `PIL.Image.MAX_IMAGE_PIXELS` also raises that limit, for all of this process.
    """
    if isinstance(content, np.ndarray) or content.startswith(NPY_START):
        return _decode_array(content, channels, max_pixels, name, depth)
    check_file_channels(channels, "image files")
    with named_errors(name):
        picture = _open(content, max_pixels)
        picture.load()
        if depth is not None:
            return cast_depth(_own_values(picture, channels), depth)
        upright = _set_upright(convert_picture(picture, channels), _turn(picture))
        return np.asarray(upright).reshape(upright.height, upright.width, channels)


def decode_crop(
    content: bytes | ImageArray,
    size: tuple[int, ...],
    choose: ChooseBox,
    *,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    name: str = "image",
    depth: str | None = None,
) -> ImageArray:
    """Decode an image file and resize a box of the image.

    The result is ``resize(decode_image(content)[box], size)``, except for large boxes of JPEGs: if the box is at least
    four times as large as `size`, in height and in width, the JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution,
    such that the box is still at least twice as large as `size`. The factor depends on the box and `size` only.

    Parameters
    ----------
    content : bytes or array
        The complete file, or the array that a ``.npy`` file holds.
    size : (height, width)
        Of the result, in pixels.
    choose : callable
        Maps (height, width) of the image to the box (top, left, height, width), in pixels. Called at most once.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).
    max_pixels : int, optional
        Larger images are unreadable.
    name : str, optional
        Name of the image in errors.
    depth : "uint8", "uint16" or "float32", optional
        Type of the result; see `decode_image`. With a depth, JPEGs are decoded at full resolution.

    Returns
    -------
    array (height, width, channels)
        uint8, or the type given by `depth`.

    Raises
    ------
    UnreadableImageError
        As `decode_image`; also if only pixels outside the box are corrupt.
    ValueError
        If `channels` is not 1, 3 or 4, or if `size` is invalid.

    Notes
    -----
    Scaled decoding is kept for speed: it takes a fifth to a half of the time for a photograph of 12 megapixels.
    libjpeg computes a reduced image from the lowest frequencies of each block; up to rounding, its pixels are means of
    the full image's. Pillow's thumbnails leave the same factor of two to the filter.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (640, 480), "red").save(file, "JPEG")
    >>> decode_crop(file.getvalue(), (32, 32), lambda shape: (0, 0, *shape), channels=3).shape
    (32, 32, 3)
    """
    check_size(size)
    if isinstance(content, np.ndarray) or content.startswith(NPY_START) or depth is not None:
        image = decode_image(content, channels=channels, max_pixels=max_pixels, name=name, depth=depth)
        return resize(cut_box(image, choose), size)
    check_file_channels(channels, "image files")
    with named_errors(name):
        picture = _open(content, max_pixels)
        is_jpeg = isinstance(picture, JpegImagePlugin.JpegImageFile)
        if not is_jpeg:
            picture.load()
        turn = _turn(picture)
    width, height = picture.size
    chosen = choose((width, height) if turn.axes else (height, width))
    top, left, rows, columns = _swap_axes(chosen, turn)
    stored = _mirror((left, top, left + columns, top + rows), picture.size, turn)
    with named_errors(name):
        reduction = _reduce(picture, chosen, size) if is_jpeg else 1
        picture.load()
        sides = [side / reduction for side in stored]
        # Crop before resizing, so that the filter uses no pixel outside the box.
        outer = (math.floor(sides[0]), math.floor(sides[1]), math.ceil(sides[2]), math.ceil(sides[3]))
        cut = convert_picture(picture, channels).crop(outer)
        inner = (sides[0] - outer[0], sides[1] - outer[1], sides[2] - outer[0], sides[3] - outer[1])
        upright = _swap_axes(_mirror(inner, cut.size, turn), turn)
        return resize_picture(_set_upright(cut, turn), size, box=upright)


class ImageHeader(NamedTuple):
    """Header of an image.

    Parameters
    ----------
    shape : (height, width) or (frames, height, width)
        In pixels, upright.
    depth : "uint8", "uint16" or "float32"
        Smallest type that holds the values.
    channels : int
        Channels of the file; a palette counts as 3.
    is_array : bool
        Whether it is a NumPy array, whose channels are not converted.
    spacing : (depth, height, width), optional
        Millimetres per voxel of a volume; None if unknown.
    rate : float, optional
        Frames per second of a clip; None if unknown.
    """

    shape: tuple[int, ...]
    depth: str
    channels: int
    is_array: bool = False
    spacing: Spacing | None = None
    rate: float | None = None


def read_header(file: BinaryIO, *, max_pixels: int = MAX_PIXELS, name: str = "image") -> ImageHeader:
    """Return size and depth of an image. Reads little more than its header.

    Parameters
    ----------
    file : binary file
        The image file, from its first byte to its last.
    max_pixels : int, optional
        Larger images are unreadable.
    name : str, optional
        Name of the image in errors.

    Returns
    -------
    ImageHeader

    Raises
    ------
    UnreadableImageError
        If the header alone shows that `decode_image` would raise it.
    """
    with named_errors(name):
        _check_bytes(file.seek(0, io.SEEK_END))
        file.seek(0)
        is_array = file.read(len(NPY_START)) == NPY_START
        file.seek(0)
        if is_array:
            shape, dtype, _ = read_npy_header(file)
            return array_header(shape, dtype, max_pixels)
        picture = _open_header(file, max_pixels)
        width, height = reversed(picture.size) if _turn(picture).axes else picture.size
        channels = 3 if picture.mode in ("P", "PA") else len(picture.getbands())
        return ImageHeader((height, width), _depth(picture), channels)


def array_header(shape: tuple[int, ...], dtype: np.dtype[Any], max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return size and depth of an array.

    Raises ValueError if it is not an image, or too large.
    """
    height, width, channels = npy_shape(shape, dtype)
    if height * width > max_pixels:
        raise ValueError(_too_many_pixels(height * width, max_pixels))
    return ImageHeader((height, width), depth_of(dtype), channels, is_array=True)


def check_file_channels(channels: int | None, what: str) -> None:
    """Raise ValueError unless image files can have this number of channels."""
    if channels is not None and channels not in _MODE_OF_CHANNELS:
        raise ValueError(
            f"channels: {what} give 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {channels}; "
            "for other numbers use a .npz file or .npy files"
        )


# --------------------------------------------------------------------------------------------------------- reading


def read_file(path: str | Path) -> bytes:
    """Read a regular file."""
    with open_regular(path) as file:
        return read_part(file, 0, os.fstat(file.fileno()).st_size)


def open_part(place: Place, offset: int = 0, size: int | None = None) -> BinaryIO:
    """Open a part of a regular file, or all of it, as a file."""
    file = open_place(place)
    size = file.seek(0, io.SEEK_END) - offset if size is None else size
    return io.BufferedReader(PartialFile(lambda start, number: read_part(file, offset + start, number), size, file))


def read_part(file: File, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset`; fewer at the end of the file.

    Raises ValueError above `MAX_FILE_BYTES`.
    """
    _check_bytes(size)
    file.seek(offset)
    content = file.read(size) or b""
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")


# -------------------------------------------------------------------------------------------------------- decoding


def ignore_pillow_warnings() -> None:
    """Silence Pillow's warnings in this process.

    Pillow warns about damaged metadata, nearly once per file. The warnings are redundant: an image is either read, or
    listed as unreadable with the reason.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _decode_array(
    content: bytes | ImageArray, channels: int, max_pixels: int, name: str, depth: str | None
) -> ImageArray:
    with named_errors(name):
        if isinstance(content, np.ndarray):
            header = array_header(content.shape, content.dtype, max_pixels)
            image = content.reshape(*header.shape, header.channels)
        else:
            shape, dtype, _ = read_npy_header(io.BytesIO(content))
            header = array_header(shape, dtype, max_pixels)
            image = decode_npy(content)
        if header.channels != channels:
            raise ValueError(f"{counted(header.channels, 'channel')}, expected {channels}")
        return cast_depth(image, depth)


def cut_box(image: ImageArray, choose: ChooseBox) -> ImageArray:
    """Return a box of an image, a view."""
    top, left, rows, columns = choose((image.shape[0], image.shape[1]))
    return image[top : top + rows, left : left + columns]


def _open(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Open an image, and check the cost of decoding it."""
    picture = _open_header(io.BytesIO(content), max_pixels)
    if isinstance(picture, JpegImagePlugin.JpegImageFile) and (number := _count_scans(content)) > _MAX_SCANS:
        raise ValueError(f"JPEG of {number:,} scans, more than the limit of {_MAX_SCANS}")
    return picture


def _open_header(file: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """Open an image, which reads its header, and check the number of pixels."""
    # Pillow refuses more than twice its own limit and warns above it; warning filters cannot be set per thread.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        picture = Image.open(file, formats=_formats(file))
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ValueError(_unidentified(file.read(4096))) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # "Image size (100000000 pixels) exceeds ..."
        raise ValueError(_too_many_pixels(int(re.findall(r"\d+", str(error))[0]), max_pixels)) from error
    if max(picture.size) > _MAX_SIDE:
        raise ValueError(
            f"{picture.width:,} x {picture.height:,} pixels, more than the limit of {_MAX_SIDE:,} per side"
        )
    check_pixels(max(picture.width * picture.height, _tile_pixels(picture)), max_pixels)
    return picture


def _formats(file: BinaryIO) -> tuple[str, ...]:
    """Return the formats to try on a file."""
    start = file.read(64)
    file.seek(0)
    # AVIF first: its files can have the brands of HEIF, too.
    name = next((name for name in ("AVIF", "HEIF") if re.match(_STARTS[name], start, re.DOTALL)), None)
    if name is None:
        return _FORMATS
    if _plugin(name) is None:
        raise ValueError(f"starts like a {name} file{missing_plugins(_endings_of(name))}")
    return (name,)


def _endings_of(plugin: str) -> list[str]:
    return [ending for ending, name in _PLUGIN_OF_ENDING.items() if name == plugin]


def _tile_pixels(picture: ImageFile.ImageFile) -> int:
    """Return the pixels of a tile of a TIFF image; 0 without tiles.

    A tile can be larger than the image.
    """
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (picture.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return int(width) * int(height)


def check_pixels(number: int, max_pixels: int) -> None:
    """Raise ValueError if an image has too many pixels."""
    if number > max_pixels:
        raise ValueError(_too_many_pixels(number, max_pixels))


def _too_many_pixels(number: int, limit: int) -> str:
    return f"{number:,} pixels, more than max_pixels {limit:,}"


def _count_scans(content: bytes) -> int:
    """Count the scans of a JPEG up to the end of the image, if there may be too many."""
    number = content.count(_SCAN)  # also counts those in metadata and after the end, where videos can be
    if number <= _MAX_SCANS:
        return number
    number = place = 0
    while (marker := _MARKER.search(content, place)) and content[marker.end() - 1] != _END_OF_IMAGE:
        place = marker.end()
        number += marker[0] == _SCAN
        if content[place - 1] not in _BARE_MARKERS:
            place += int.from_bytes(content[place : place + 2], "big")
    return number


def _reduce(picture: ImageFile.ImageFile, box: tuple[int, int, int, int], size: tuple[int, ...]) -> int:
    """Set the JPEG decoder's reduction for a box, and return the factor.

    The box is (top, left, height, width).
    """
    spare = min(box[2] / size[0], box[3] / size[1]) / _LEFT_TO_FILTER
    reduction = next((factor for factor in _REDUCTIONS if factor <= spare), 1)
    if reduction > 1 and picture.draft(None, (picture.width // reduction, picture.height // reduction)) is None:
        return 1
    return reduction


def _depth(picture: ImageFile.ImageFile) -> str:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        return "uint16"  # to which Pillow scales the values of PPM
    return "float32" if picture.mode in ("I", "F") else "uint8"


def _own_values(picture: ImageFile.ImageFile, channels: int) -> NDArray[Any]:
    """Return an upright image (height, width, channels) in the stored depth."""
    turn = _turn(picture)
    depth = _depth(picture)
    if depth == "uint8":
        values = np.asarray(_set_upright(convert_picture(picture, channels), turn))
        return values.reshape(*values.shape[:2], channels)
    values = np.asarray(picture).astype(depth)
    if channels == 4:
        raise ValueError(f"grey values ({picture.mode}) without opacity, expected 4 channels")
    values = values[:: -1 if turn.rows else 1, :: -1 if turn.columns else 1]
    return np.repeat((values.T if turn.axes else values)[..., None], channels, axis=2)


def convert_picture(picture: Image.Image, channels: int) -> Image.Image:
    """Convert a Pillow image to 8-bit channels; see `decode_image`.

    1 (grey), 3 (RGB) or 4 (RGBA) channels.
    """
    mode = _MODE_OF_CHANNELS[channels]
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(to_8_bits(np.asarray(picture)))
    elif picture.mode == "I" and picture.format == "PPM":
        picture = Image.fromarray(to_8_bits(np.asarray(picture).astype(np.uint16)))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits per value have no fixed range; set pixel_range, or save the image with 8 or 16")
    elif channels != 4 and picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    elif picture.mode not in _PLAIN_MODES:
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _turn(picture: Image.Image) -> _Turn:
    # Except for JPEGs, call this after loading to turn a picture: Pillow turns TIFF images while it loads them and then
    # drops the tag.
    try:
        return _TURNS.get(int(picture.getexif().get(_ORIENTATION_TAG, 1)), _UPRIGHT)
    except Exception:  # damaged metadata: keep the picture as stored
        return _UPRIGHT


def _set_upright(picture: Image.Image, turn: _Turn) -> Image.Image:
    if turn.rows:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if turn.columns:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.TRANSPOSE) if turn.axes else picture


def _swap_axes(box: _Box, turn: _Turn) -> _Box:
    """Swap the axes of a box if the turn does.

    The box is (left, top, right, bottom) or (top, left, height, width).
    """
    return (box[1], box[0], box[3], box[2]) if turn.axes else box


def _mirror(box: _Box, size: tuple[int, int], turn: _Turn) -> _Box:
    """Mirror a box like the rows and columns of its picture.

    The box is (left, top, right, bottom), the picture (width, height).
    """
    left, top, right, bottom = box
    if turn.columns:
        left, right = size[0] - right, size[0] - left
    if turn.rows:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


# --------------------------------------------------------------------------------------------------------- reasons


def reason_of(error: Exception) -> str:
    """Return the reason of a read error in one short line."""
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def _unidentified(content: bytes) -> str:
    if not content:
        return "empty file"
    for name, start in _STARTS.items():
        if re.match(start, content, re.DOTALL):
            return f"starts like a {name} file, but is corrupt or of a kind that Pillow cannot read"
    return f"not one of {', '.join(_FORMATS)}" + (" (all zeros)" if not any(content) else "")

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
from prmim_methods.messages import printable
from prmim_train.data.depth import cast_depth, depth_of, to_8_bits
from prmim_train.data.npy import NPY_START, decode_npy, npy_shape, read_npy_header
from prmim_train.data.transforms import check_size, resize, resize_picture

__all__ = [
    "ARRAY_ENDING",
    "IMAGE_ENDINGS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ChooseBox",
    "ImageHeader",
    "UnreadableImageError",
    "check_array_channels",
    "check_file_channels",
    "counted",
    "cut_box",
    "decode_crop",
    "decode_image",
    "ignore_pillow_warnings",
    "image_endings",
    "missing_plugins",
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
"""Endings of image files, whatever is installed; see `image_endings`."""

ARRAY_ENDING = ".npy"
"""Ending of files with one array each. They are images where there are no others: features often lie beside images."""

_PLUGINS = {"AVIF": ("PIL.AvifImagePlugin", "pillow_avif"), "HEIF": ("pillow_heif",)}
"""Modules that decode a format, the first that is installed counts; Pillow has its own for AVIF since version 11.3."""

_PLUGIN_OF_ENDING = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}

MAX_PIXELS = 89_478_485
"""Default limit of pixels in an image, that of Pillow."""

MAX_FILE_BYTES = 2**29
"""Larger files are not read. `MAX_PIXELS` pixels of three 16-bit values fit uncompressed."""

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
    """Operations that turn a stored picture upright: reverse rows, reverse columns, then swap the axes."""

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
    """Error of a single image: truncated, corrupt, missing, not an image, or too large.

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


def image_endings() -> tuple[str, ...]:
    """Return the endings of image files that can be decoded here: `IMAGE_ENDINGS`, and those of installed plug-ins."""
    return (*IMAGE_ENDINGS, *(ending for ending, name in _PLUGIN_OF_ENDING.items() if _plugin(name) is not None))


def missing_plugins(endings: Iterable[str]) -> str:
    """Return a hint that names the packages to install for files with these endings; empty without such files.

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
    """Return the installed module that decodes a format, registered in Pillow; None without."""
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
    return decode_image(read_file(path, name=name), channels=channels, max_pixels=max_pixels, name=name)


def decode_image(
    content: bytes, *, channels: int, max_pixels: int = MAX_PIXELS, name: str = "image", depth: str | None = None
) -> ImageArray:
    """Decode the content of an image file.

    - The EXIF orientation is applied.
    - Palette, grey, CMYK and other modes are converted.
    - 16-bit grey values become round(value / 257). Of 16-bit colours, Pillow keeps the upper 8 bits.
    - For 1 and 3 channels, transparent images are composited on white, since fully transparent pixels often have
      arbitrary colours.
    - Of animations and multi-page files, the first picture is read.
    - NumPy arrays (``.npy``) are read as they are; uint16 becomes 8 bits as above.

    With a depth, values are not scaled. Grey images of 16 or 32 bits have their own values then, in every channel.

    Parameters
    ----------
    content : bytes
        The complete file.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255). A NumPy array must have this number, which can be
        any.
    max_pixels : int, optional
        Larger images are unreadable.
    name : str, optional
        Name of the image in errors.
    depth : "uint8", "uint16" or "float32", optional
        Type of the result, which must hold the values of the file. Default: 8 bits.

    Returns
    -------
    array (height, width, channels)
        uint8, or as `depth` says.

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
    if content.startswith(NPY_START):
        return _decode_array(content, channels, max_pixels, name, depth)
    check_file_channels(channels, "image files")
    with _named_errors(name):
        picture = _open(content, max_pixels)
        picture.load()
        if depth is not None:
            return cast_depth(_own_values(picture, channels), depth)
        upright = _set_upright(_convert(picture, channels), _turn(picture))
        return np.asarray(upright).reshape(upright.height, upright.width, channels)


def decode_crop(
    content: bytes,
    size: tuple[int, int],
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
    content : bytes
        The complete file.
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
        uint8, or as `depth` says.

    Raises
    ------
    UnreadableImageError
        As `decode_image`; also if only pixels outside the box are corrupt.
    ValueError
        If `channels` is not 1, 3 or 4, or if `size` is invalid.

    Notes
    -----
    Scaled decoding is kept for speed: it takes a fifth to two fifths of the time for a photograph of 12 megapixels.
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
    if content.startswith(NPY_START) or depth is not None:
        image = decode_image(content, channels=channels, max_pixels=max_pixels, name=name, depth=depth)
        return resize(cut_box(image, choose), size)
    check_file_channels(channels, "image files")
    with _named_errors(name):
        picture = _open(content, max_pixels)
        is_jpeg = isinstance(picture, JpegImagePlugin.JpegImageFile)
        if not is_jpeg:
            picture.load()
        turn = _turn(picture)
    width, height = picture.size
    chosen = choose((width, height) if turn.axes else (height, width))
    top, left, rows, columns = _swap_axes(chosen, turn)
    stored = _mirror((left, top, left + columns, top + rows), picture.size, turn)
    with _named_errors(name):
        reduction = _reduce(picture, chosen, size) if is_jpeg else 1
        picture.load()
        sides = [side / reduction for side in stored]
        # Crop before resizing, so that the filter uses no pixel outside the box.
        outer = (math.floor(sides[0]), math.floor(sides[1]), math.ceil(sides[2]), math.ceil(sides[3]))
        cut = _convert(picture, channels).crop(outer)
        inner = (sides[0] - outer[0], sides[1] - outer[1], sides[2] - outer[0], sides[3] - outer[1])
        upright = _swap_axes(_mirror(inner, cut.size, turn), turn)
        return resize_picture(_set_upright(cut, turn), size, box=upright)


class ImageHeader(NamedTuple):
    """What the header of an image tells.

    Parameters
    ----------
    shape : (height, width)
        In pixels, upright.
    depth : "uint8", "uint16" or "float32"
        Smallest type that holds the values.
    channels : int
        Channels of the file: those of a palette count as 3.
    """

    shape: tuple[int, int]
    depth: str
    channels: int


def read_header(
    path: str | Path, offset: int = 0, size: int | None = None, *, max_pixels: int = MAX_PIXELS, name: str = "image"
) -> ImageHeader:
    """Return size and depth of an image, reading little more than its header.

    Parameters
    ----------
    path : str or Path
        The image file, or an archive that contains it.
    offset, size : int, optional
        Position and length of the image's content, in bytes. Default: the whole file.
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
    with _named_errors(name), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        _check_bytes(size)
        part = io.BufferedReader(_Part(file, offset, size))
        if part.peek(len(NPY_START)).startswith(NPY_START):
            shape, dtype, _ = read_npy_header(part)
            height, width, channels = npy_shape(shape, dtype)
            _check_array((height, width, channels), None, max_pixels)
            return ImageHeader((height, width), depth_of(dtype), channels)
        picture = _open_header(part, max_pixels)
        width, height = reversed(picture.size) if _turn(picture).axes else picture.size
        channels = 3 if picture.mode in ("P", "PA") else len(picture.getbands())
        return ImageHeader((height, width), _depth(picture), channels)


def check_file_channels(channels: int | None, what: str) -> None:
    """Raise ValueError unless image files can be converted to this number of channels."""
    if channels is not None and channels not in _MODE_OF_CHANNELS:
        raise ValueError(
            f"channels: {what} give 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {channels}; "
            "for other numbers use a .npz file or .npy files"
        )


def check_array_channels(path: Path, offset: int = 0, *, channels: int | None, name: str) -> None:
    """Raise ValueError if a ``.npy`` file, which nothing converts, has another number of channels."""
    try:
        with open_regular(path) as file:
            file.seek(offset)
            shape, dtype, _ = read_npy_header(file)
        found = npy_shape(shape, dtype)[2]
    except (OSError, ValueError):  # reported with the other unreadable images
        return
    if channels not in (None, found):
        raise ValueError(f"channels: {name} has {counted(found, 'channel')}, got {channels}")


# --------------------------------------------------------------------------------------------------------- reading


def read_file(path: str | Path, *, name: str) -> bytes:
    """Read a regular file; raise `UnreadableImageError` with this name if that fails."""
    try:
        with open_regular(path) as file:
            return read_part(file, 0, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise UnreadableImageError(name, reason_of(error)) from error


def read_part(file: io.FileIO, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset`, fewer at the end of the file; raise ValueError above `MAX_FILE_BYTES`."""
    _check_bytes(size)
    file.seek(offset)
    content = file.read(size) or b""
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        content = read_part(self._file, self._offset + self._place, max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")


# -------------------------------------------------------------------------------------------------------- decoding


def ignore_pillow_warnings() -> None:
    """Silence Pillow's warnings in this process.

    Pillow warns about damaged metadata, nearly once per file. These warnings add nothing: an image is either read or
    listed as unreadable with the reason.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _decode_array(content: bytes, channels: int, max_pixels: int, name: str, depth: str | None) -> ImageArray:
    with _named_errors(name):
        shape, dtype, _ = read_npy_header(io.BytesIO(content))
        _check_array(npy_shape(shape, dtype), channels, max_pixels)
        return cast_depth(decode_npy(content), depth)


def cut_box(image: ImageArray, choose: ChooseBox) -> ImageArray:
    """Return a box of an image, a view."""
    top, left, rows, columns = choose((image.shape[0], image.shape[1]))
    return image[top : top + rows, left : left + columns]


def _check_array(shape: tuple[int, int, int], channels: int | None, max_pixels: int) -> None:
    if shape[0] * shape[1] > max_pixels:
        raise ValueError(_too_many_pixels(shape[0] * shape[1], max_pixels))
    if channels not in (None, shape[2]):
        raise ValueError(f"{counted(shape[2], 'channel')}, expected {channels}")


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise nearly anything on corrupt input
        raise UnreadableImageError(name, reason_of(error)) from error


def _open(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Open an image, and check what its decoding would cost."""
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
    if (number := max(picture.width * picture.height, _tile_pixels(picture))) > max_pixels:
        raise ValueError(_too_many_pixels(number, max_pixels))
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
    """Return the pixels of a tile of a TIFF image, which can be larger than the image; 0 without tiles."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (picture.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return int(width) * int(height)


def _too_many_pixels(number: int, limit: int) -> str:
    return f"{number:,} pixels, more than max_pixels {limit:,}"


def _count_scans(content: bytes) -> int:
    """Count the scans of a JPEG up to the end of the image; beyond the limit only."""
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


def _reduce(picture: ImageFile.ImageFile, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """Set the JPEG decoder's reduction for a box (top, left, height, width) and return the factor."""
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
    """Return the values of an upright image, (height, width, channels), in their own depth."""
    turn = _turn(picture)
    depth = _depth(picture)
    if depth == "uint8":
        values = np.asarray(_set_upright(_convert(picture, channels), turn))
        return values.reshape(*values.shape[:2], channels)
    values = np.asarray(picture).astype(depth)
    if channels == 4:
        raise ValueError(f"grey values ({picture.mode}) without opacity, expected 4 channels")
    values = values[:: -1 if turn.rows else 1, :: -1 if turn.columns else 1]
    return np.repeat((values.T if turn.axes else values)[..., None], channels, axis=2)


def _convert(picture: Image.Image, channels: int) -> Image.Image:
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
    """Swap the axes of a box if the turn does: (left, top, right, bottom) or (top, left, height, width)."""
    return (box[1], box[0], box[3], box[2]) if turn.axes else box


def _mirror(box: _Box, size: tuple[int, int], turn: _Turn) -> _Box:
    """Mirror a box (left, top, right, bottom) like the rows and columns of its picture (width, height)."""
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


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> counted(1, "image"), counted(2000, "class", "classes")
    ('1 image', '2,000 classes')
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"

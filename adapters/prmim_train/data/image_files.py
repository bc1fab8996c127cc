"""Decoding of single image files, which are treated as untrusted input.

Any content gives an image or an `UnreadableImageError` with a one-line reason. Only six formats are tried and no other
program is started. Pipes in place of files cannot block a run, and headers with huge dimensions cannot fill its memory.
"""

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from prmim_methods.files import open_regular
from prmim_methods.messages import printable
from prmim_train.data.transforms import check_size, resize_picture

__all__ = [
    "IMAGE_ENDINGS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ChooseBox",
    "UnreadableImageError",
    "check_file_channels",
    "check_header",
    "counted",
    "decode_crop",
    "decode_image",
    "ignore_pillow_warnings",
    "read_file",
    "read_image",
    "read_part",
    "reason_of",
    "to_8_bits",
]

ImageArray = NDArray[np.uint8]
ChooseBox = Callable[[tuple[int, int]], tuple[int, int, int, int]]
"""Maps the shape (height, width) of an image to a box (top, left, height, width) in it, in pixels."""

_Box = tuple[float, float, float, float]

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

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

# The content counts, not the file name. Of Pillow's other formats, some start programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Importing these keeps Pillow from importing all forty plugins to find one.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, BmpImagePlugin, TiffImagePlugin, GifImagePlugin)
_STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "GIF": rb"GIF8[79]a",
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


def decode_image(content: bytes, *, channels: int, max_pixels: int = MAX_PIXELS, name: str = "image") -> ImageArray:
    """Decode the content of an image file.

    - The EXIF orientation is applied.
    - Palette, grey, CMYK and other modes are converted.
    - 16-bit grey values become round(value / 257). Of 16-bit colours, Pillow keeps the upper 8 bits.
    - For 1 and 3 channels, transparent images are composited on white, since fully transparent pixels often have
      arbitrary colours.
    - Of animations and multi-page files, the first picture is read.

    Parameters
    ----------
    content : bytes
        The complete file.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).
    max_pixels : int, optional
        Larger images are unreadable.
    name : str, optional
        Name of the image in errors.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    UnreadableImageError
        If `content` is empty, truncated, corrupt, not a JPEG, PNG, WebP, BMP, TIFF or GIF file, has 32 bits per value
        (which have no fixed range), more than `max_pixels` pixels, more than 1,048,576 pixels per side, or, for a JPEG,
        more than 100 scans. Pixels and scans are counted before decoding.
    ValueError
        If `channels` is not 1, 3 or 4.

    Notes
    -----
    A `max_pixels` above `PIL.Image.MAX_IMAGE_PIXELS` also raises that limit, for all of this process.
    """
    check_file_channels(channels, "image files")
    with _named_errors(name):
        picture = _open(content, max_pixels)
        picture.load()
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

    Returns
    -------
    uint8 array (height, width, channels)

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
    check_file_channels(channels, "image files")
    check_size(size)
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
        box = [side / reduction for side in stored]
        # Crop before resizing, so that the filter uses no pixel outside the box.
        outer = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        cut = _convert(picture, channels).crop(outer)
        inner = (box[0] - outer[0], box[1] - outer[1], box[2] - outer[0], box[3] - outer[1])
        upright = _swap_axes(_mirror(inner, cut.size, turn), turn)
        return resize_picture(_set_upright(cut, turn), size, box=upright)


def check_header(
    path: str | Path, offset: int = 0, size: int | None = None, *, max_pixels: int = MAX_PIXELS, name: str = "image"
) -> None:
    """Check the header of an image file, reading little more than that.

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

    Raises
    ------
    UnreadableImageError
        If the header alone shows that `decode_image` would raise it.
    """
    with _named_errors(name), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        _check_bytes(size)
        _open_header(io.BufferedReader(_Part(file, offset, size)), max_pixels)


def check_file_channels(channels: int, what: str) -> None:
    """Raise ValueError unless image files can be converted to this number of channels."""
    if channels not in _MODE_OF_CHANNELS:
        raise ValueError(
            f"channels: {what} give 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {channels}; "
            "for other numbers use a .npz file"
        )


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
        picture = Image.open(file, formats=_FORMATS)
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


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    mode = _MODE_OF_CHANNELS[channels]
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(to_8_bits(np.asarray(picture)))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits per value have no fixed range; save the image with 8 or 16")
    elif channels != 4 and picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    elif picture.mode not in _PLAIN_MODES:
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _turn(picture: Image.Image) -> _Turn:
    # Except for JPEGs, call this after loading: Pillow turns TIFF images while it loads them and then drops the tag.
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


def to_8_bits(values: NDArray[np.uint8] | NDArray[np.uint16]) -> ImageArray:
    """Scale 16-bit values to 8 bits, rounded (65535 becomes 255); return 8-bit values unchanged."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    # 65535 = 257 * 255. 257 is odd, so rounding has no ties.
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


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

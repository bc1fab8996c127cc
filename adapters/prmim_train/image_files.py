"""Single image files: from bytes to pixels, or to one line that says why not.

What is read here may come from anywhere. Whatever the bytes are, there is an image or an `UnreadableImageError`; only
six formats are tried, no other program is started, and neither a pipe in place of a file nor a header that claims huge
dimensions can stop a run or fill its memory.
"""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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

from prmim_train.transforms import check_size, resize_picture

__all__ = [
    "IMAGE_ENDINGS",
    "MAX_FILE_BYTES",
    "ChooseBox",
    "UnreadableImageError",
    "check_file_channels",
    "decode_crop",
    "decode_image",
    "ignore_pillow_warnings",
    "open_regular",
    "printable",
    "read_file",
    "read_image",
    "read_part",
    "reason_of",
    "to_8_bits",
]

ImageArray = NDArray[np.uint8]
ChooseBox = Callable[[tuple[int, int]], tuple[int, int, int, int]]
"""Chooses a box (top, left, height, width) of an image of the shape (height, width), in pixels."""

_Box = tuple[float, float, float, float]

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

MAX_FILE_BYTES = 2**29
"""Larger files are not read: what `PIL.Image.MAX_IMAGE_PIXELS` pixels of three 16-bit colours take uncompressed."""

# What a file may hold, whatever it is called. Pillow knows more formats; some of them start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Found loaded, these need not be looked for by loading all forty.
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
# Modes that Pillow converts to L, RGB and RGBA by itself; the others (CMYK, YCbCr, LAB, ...) go through RGB.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ORIENTATION_TAG = 0x0112


class _Turn(NamedTuple):
    """What sets a stored picture upright: rows reversed, columns reversed, then the axes swapped."""

    rows: bool = False
    columns: bool = False
    axes: bool = False


_UPRIGHT = _Turn()
_TURNS = {  # by what a camera noted
    2: _Turn(columns=True),
    3: _Turn(rows=True, columns=True),
    4: _Turn(rows=True),
    5: _Turn(axes=True),
    6: _Turn(rows=True, axes=True),
    7: _Turn(rows=True, columns=True, axes=True),
    8: _Turn(columns=True, axes=True),
}

_REDUCTIONS = (8, 4, 2)  # what libjpeg offers
_LEFT_TO_FILTER = 2
_MAX_REASON = 200


class UnreadableImageError(ValueError):
    """One image that cannot be read: truncated, corrupt, gone, not an image, or too large.

    Parameters
    ----------
    name : str
        What the source calls the image.
    reason : str
        Why it cannot be read, in one line.

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
        # Exceptions are put together again from their message alone, which is not how this one is made.
        return type(self), (self.name, self.reason)


def read_image(path: str | Path, *, channels: int) -> ImageArray:
    """Read one image file.

    See `decode_image` for what becomes of the many kinds of images.

    Parameters
    ----------
    path : str or Path
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    UnreadableImageError
        If the file is missing, may not be read, is no regular file (a folder, a pipe, a device), is larger than
        `MAX_FILE_BYTES`, or cannot be decoded.
    ValueError
        If `channels` is none of 1, 3 and 4.
    """
    check_file_channels(channels, "image files")
    name = printable(os.fspath(path))
    return decode_image(read_file(path, name=name), channels=channels, name=name)


def decode_image(content: bytes, *, channels: int, name: str = "image") -> ImageArray:
    """Decode what an image file holds.

    The orientation that a camera noted (EXIF) is applied. Palette, grey, CMYK and other modes are converted. Of
    16-bit grey images each value becomes value / 257, rounded; of 16-bit colours Pillow keeps the upper eight bits. For
    1 and 3 channels, transparent images are laid on white, as a page would show them; what lies under full transparency
    is often arbitrary. Of animations and of files of several pages the first picture is read.

    Parameters
    ----------
    content : bytes
        All of the file.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).
    name : str, optional
        What to call the image in errors.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    UnreadableImageError
        If `content` is empty, truncated, corrupt, no JPEG, PNG, WebP, BMP, TIFF or GIF, of 32 bits per value (which
        have no fixed range), or of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89,478,485, unless changed). Nothing
        is decoded then that would fill the memory.
    ValueError
        If `channels` is none of 1, 3 and 4.
    """
    check_file_channels(channels, "image files")
    with _named_errors(content, name):
        picture = _open(content)
        picture.load()
        pixels = np.asarray(_convert(picture, channels))
        return _orient(pixels.reshape(*pixels.shape[:2], channels), _turn(picture))


def decode_crop(
    content: bytes, size: tuple[int, int], choose: ChooseBox, *, channels: int, name: str = "image"
) -> ImageArray:
    """Decode a box of what an image file holds, and resize it.

    The pixels are those of ``resize(decode_image(content)[box], size)``, with one exception: of a JPEG whose box is at
    least four times as large as `size`, in height and in width, the decoder makes only every second, fourth or eighth
    pixel, such that what is left of the box is still at least twice as large. That saves most of the time, and is as
    determined as the rest: it depends on the box and `size` alone.

    Parameters
    ----------
    content : bytes
        All of the file.
    size : (height, width)
        Of the result, in pixels.
    choose : callable
        From (height, width) of the image to the box (top, left, height, width), in pixels. Called at most once.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA; opaque images get alpha 255).
    name : str, optional
        What to call the image in errors.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    UnreadableImageError
        As `decode_image` does: also where only pixels outside the box are damaged.
    ValueError
        If `channels` is none of 1, 3 and 4, or `size` not as described.

    Notes
    -----
    A reduced JPEG is the mean of the pixels that it leaves out, but for rounding: libjpeg computes it from the lowest
    frequencies of each block. Pillow's own thumbnails leave the same factor of two to the filter.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (640, 480), "red").save(file, "JPEG")
    >>> decode_crop(file.getvalue(), (32, 32), lambda shape: (0, 0, *shape), channels=3).shape
    (32, 32, 3)
    """
    check_file_channels(channels, "image files")
    check_size(size)
    with _named_errors(content, name):
        picture = _open(content)
        is_jpeg = isinstance(picture, JpegImagePlugin.JpegImageFile)
        if not is_jpeg:
            picture.load()
        turn = _turn(picture)
    width, height = picture.size
    chosen = choose((width, height) if turn.axes else (height, width))
    left, top, right, bottom = _stored_box(chosen, (width, height), turn)
    with _named_errors(content, name):
        reduction = _reduce(picture, chosen, size) if is_jpeg else 1
        picture.load()
        box = (left / reduction, top / reduction, right / reduction, bottom / reduction)
        # Cut out first, so that the filter sees no pixel outside.
        outer = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
        cut = _convert(picture, channels).crop(outer)
        inner = (box[0] - outer[0], box[1] - outer[1], box[2] - outer[0], box[3] - outer[1])
        cut, inner = _set_upright(cut, inner, turn)
        return resize_picture(cut, size, box=inner)


def check_file_channels(channels: int, what: str) -> None:
    """Raise ValueError unless image files can be turned into images of that many channels."""
    if channels not in _MODE_OF_CHANNELS:
        raise ValueError(
            f"channels: {what} give 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {channels}; "
            "for other numbers use a .npz file"
        )


# --------------------------------------------------------------------------------------------------------- reading


def read_file(path: str | Path, *, name: str) -> bytes:
    """Read all of a file; `UnreadableImageError` with this name if that fails, or if it is no regular file."""
    try:
        with open_regular(path) as file:
            return read_part(file, 0, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise UnreadableImageError(name, reason_of(error)) from error


def open_regular(path: str | Path) -> io.FileIO:
    """Open a file to read, unbuffered; ValueError if it is a pipe or a device, which might never answer or end."""
    file = io.FileIO(path, opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file, but a pipe, a socket or a device")
    return file


def _open_at_once(path: str, flags: int) -> int:
    # Opening a named pipe would wait for somebody to write to it. Windows has neither such pipes nor the flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_part(file: io.FileIO, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file from `offset` on: fewer where it ends, ValueError above `MAX_FILE_BYTES`."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
    file.seek(offset)
    content = file.read(size) or b""
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return content


# -------------------------------------------------------------------------------------------------------- decoding


def ignore_pillow_warnings() -> None:
    """Keep Pillow from printing warnings, in this process and from here on.

    It warns of damaged notes in files, one line for nearly each of them, which says nothing that helps here: an image
    is read, or is listed as unreadable with the reason.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextmanager
def _named_errors(content: bytes, name: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImageError(name, _unidentified(content)) from error
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise UnreadableImageError(name, reason_of(error)) from error


def _open(content: bytes) -> ImageFile.ImageFile:
    """Read the header."""
    picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    # Pillow itself only warns up to twice the limit, and a warning filter cannot be set for one thread alone.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise ValueError(_too_many_pixels(picture.width * picture.height))
    return picture


def _reduce(picture: ImageFile.ImageFile, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """Tell the decoder of a JPEG by how much to reduce, and return that, for a box (top, left, height, width)."""
    spare = min(box[2] / size[0], box[3] / size[1]) / _LEFT_TO_FILTER
    reduction = next((factor for factor in _REDUCTIONS if factor <= spare), 1)
    if reduction > 1 and picture.draft(None, (picture.width // reduction, picture.height // reduction)) is None:
        return 1
    return reduction


def _too_many_pixels(number: int) -> str:
    return f"{number:,} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,}"


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    mode = _MODE_OF_CHANNELS[channels]
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(to_8_bits(np.asarray(picture)))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits per value have no fixed range; save it with 8 or 16")
    elif channels != 4 and picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    elif picture.mode not in _PLAIN_MODES:
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _turn(picture: Image.Image) -> _Turn:
    # Of all but JPEGs asked after loading: Pillow turns TIFF images itself while loading, and then drops the tag.
    try:
        return _TURNS.get(int(picture.getexif().get(_ORIENTATION_TAG, 1)), _UPRIGHT)
    except Exception:  # damaged notes do not damage the picture: without an orientation it stands as stored
        return _UPRIGHT


def _orient(pixels: ImageArray, turn: _Turn) -> ImageArray:
    pixels = pixels[:: -1 if turn.rows else 1, :: -1 if turn.columns else 1]
    return pixels.swapaxes(0, 1) if turn.axes else pixels


def _stored_box(box: tuple[int, int, int, int], size: tuple[int, int], turn: _Turn) -> tuple[int, int, int, int]:
    """Return where a box (top, left, height, width) of the upright picture is stored: left, top, right, bottom."""
    top, left, height, width = (box[1], box[0], box[3], box[2]) if turn.axes else box
    if turn.rows:
        top = size[1] - top - height
    if turn.columns:
        left = size[0] - left - width
    return left, top, left + width, top + height


def _set_upright(picture: Image.Image, box: _Box, turn: _Turn) -> tuple[Image.Image, _Box]:
    """Return a stored picture upright, and a box in it: left, top, right, bottom."""
    left, top, right, bottom = box
    if turn.rows:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        top, bottom = picture.height - bottom, picture.height - top
    if turn.columns:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, right = picture.width - right, picture.width - left
    if turn.axes:
        return picture.transpose(Image.Transpose.TRANSPOSE), (top, left, bottom, right)
    return picture, (left, top, right, bottom)


def to_8_bits(values: NDArray[np.uint8] | NDArray[np.uint16]) -> ImageArray:
    """Return values in 8 bits; those of 16 are scaled, so that the largest becomes the largest, and rounded."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    # 65535 = 257 * 255; 257 is odd, so there are no ties to round
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- reasons


def reason_of(error: Exception) -> str:
    """Return why something could not be read, in one short line."""
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        # "Image size (100000000 pixels) exceeds ..."
        return _too_many_pixels(int(re.findall(r"\d+", str(error))[0]))
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = printable(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def _unidentified(content: bytes) -> str:
    if not content:
        return "empty file"
    for name, start in _STARTS.items():
        if re.match(start, content, re.DOTALL):
            return f"begins like a {name} file, but is damaged or of a kind that Pillow cannot read"
    return f"not one of {', '.join(_FORMATS)}" + (", but zeros" if not any(content[:4096]) else "")


def printable(text: str) -> str:
    r"""Return text fit for one line of a terminal: what cannot be printed is escaped, as file names may hold anything.

    Examples
    --------
    >>> print(printable("Zoë/a\nb.jpg"))
    Zoë/a\nb.jpg
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # how Python writes a byte of a file name that is no UTF-8
        return f"\\x{ord(char) & 0xFF:02x}"
    return char.encode("unicode_escape").decode("ascii")

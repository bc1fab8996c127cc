"""Where images come from: the embedded digits, a folder of image files, or a `.npz` file.

Every source gives single images as uint8 arrays (height, width, channels), by index, in an order that does not change.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

__all__ = [
    "IMAGE_ENDINGS",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "UnreadableImageError",
    "open_source",
    "read_image",
]

ImageArray = NDArray[np.uint8]

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What a file may hold, whatever it is called. Pillow knows more formats; some of them start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that Pillow converts to L, RGB and RGBA by itself; the others (CMYK, YCbCr, LAB, ...) go through RGB.
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ORIENTATION_TAG = 0x0112


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
    reason : str

    Examples
    --------
    >>> UnreadableImageError("cat/3.jpg", "empty file")
    UnreadableImageError('cat/3.jpg: empty file')
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


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
        return _to_8_bits(self.images[index])

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
    `read` is `read_image`, with errors that name the file relative to the folder.
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
        try:
            return read_image(self.folder / self.files[index], channels=self.channels)
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name(index), error.reason) from error

    def name(self, index: int) -> str:
        """Return what to call an image in messages: its path inside the folder."""
        # A name that is no valid text must not break the message that is to show it.
        return os.fsencode(self.files[index]).decode("utf-8", "backslashreplace")


def open_source(spec: str, *, channels: int) -> ImageSource:
    """Open a source of images.

    Parameters
    ----------
    spec : str
        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, with labels. (A folder of that name:
          ``"./digits"``.)
        - a folder: all image files below it (`IMAGE_ENDINGS`, in either case; hidden files and folders are left out),
          sorted by path. If all of them lie in sub-folders, the names of the top-level ones, sorted, are the classes;
          otherwise there are no labels.
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

    Notes
    -----
    uint16 becomes uint8 as value / 257, rounded: 65535 gives 255. The digits' 0 to 16 become 0 to 255, rounded. How
    files are converted: see `read_image`.

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
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, channels)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, channels)
    if not path.exists():
        raise FileNotFoundError(f'data: nothing at {spec}; expected a folder of images, a .npz file, or "digits"')
    raise ValueError(f'data: expected a folder of images, a .npz file, or "digits", got the file {spec}')


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _describe(where: str, number: int, size: tuple[int, int] | None, num_classes: int | None) -> str:
    pixels = "" if size is None else f" of {size[0]} x {size[1]} pixels"
    classes = ", no labels" if num_classes is None else f" in {_count(num_classes, 'class', 'classes')}"
    return f"{where}: {_count(number, 'image', 'images')}{pixels}{classes}"


def _check_file_channels(channels: int, what: str) -> None:
    if channels not in _MODE_OF_CHANNELS:
        raise ValueError(
            f"channels: {what} give 1 (grey), 3 (RGB) or 4 (RGBA) channels, got {channels}; "
            "for other numbers use a .npz file"
        )


def _to_8_bits(values: NDArray[np.uint8] | NDArray[np.uint16]) -> ImageArray:
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    # 65535 = 257 * 255; 257 is odd, so there are no ties to round
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------- digits


def _open_digits(channels: int) -> ArraySource:
    from sklearn.datasets import load_digits  # slow to import, and rarely needed

    _check_file_channels(channels, "the digits")
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


def _open_folder(folder: Path, channels: int) -> FolderSource:
    _check_file_channels(channels, "image files")
    found = sorted(_walk(folder))
    images = [parts for parts in found if parts[-1].lower().endswith(IMAGE_ENDINGS)]
    if not images:
        others = f"{_count(len(found), 'other file', 'other files')}; " if found else "it holds no files; "
        raise ValueError(f"data: no images in {folder}: {others}expected names ending in {', '.join(IMAGE_ENDINGS)}")
    class_names, labels = _label_by_folder(images)
    return FolderSource(
        folder=folder,
        files=["/".join(parts) for parts in images],
        channels=channels,
        description=_describe(f"folder {folder}", len(images), None, None if class_names is None else len(class_names)),
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
                if entry.is_dir():
                    stack.append((entry.path, (*parts, entry.name), ancestors | {real}))
                else:
                    yield (*parts, entry.name)


def _label_by_folder(
    images: Sequence[tuple[str, ...]],
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    if any(len(parts) == 1 for parts in images):
        return None, None
    class_names = tuple(sorted({parts[0] for parts in images}))
    number = {name: k for k, name in enumerate(class_names)}
    return class_names, np.array([number[parts[0]] for parts in images], np.int64)


def read_image(path: str | Path, *, channels: int) -> ImageArray:
    """Read one image file.

    The orientation that a camera noted (EXIF) is applied. Palette, grey, CMYK and other modes are converted. Of
    16-bit grey images each value becomes value / 257, rounded. For 1 and 3 channels, transparent images are laid on
    white, as a page would show them; what lies under full transparency is often arbitrary. Of animations the first
    picture is read.

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
        If the file is missing, empty, truncated, corrupt, no JPEG, PNG, WebP, BMP, TIFF or GIF, of 32 bits per value
        (which have no fixed range), or of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    ValueError
        If `channels` is none of 1, 3 and 4.
    """
    _check_file_channels(channels, "image files")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            _check_pixels(picture)
            picture.load()
            pixels = np.asarray(_convert(picture, channels))
            return _orient(pixels.reshape(*pixels.shape[:2], channels), _orientation(picture))
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise UnreadableImageError(str(path), _reason(path, error)) from error


def _check_pixels(picture: Image.Image) -> None:
    # Pillow itself only warns up to twice the limit, and a warning filter cannot be set for one thread alone.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise ValueError(f"{picture.width} x {picture.height} pixels, more than the limit of {limit:,}")


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    mode = _MODE_OF_CHANNELS[channels]
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(_to_8_bits(np.asarray(picture)))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits per value have no fixed range; save it with 8 or 16")
    elif channels != 4 and picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    elif picture.mode not in _PLAIN_MODES:
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _orientation(picture: Image.Image) -> int:
    # Asked after loading: Pillow turns TIFF images itself while loading, and then drops the tag.
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged notes do not damage the picture: without an orientation it stands as stored
        return 1


def _orient(pixels: ImageArray, orientation: int) -> ImageArray:
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.swapaxes(0, 1)
        case 6:
            return pixels[::-1].swapaxes(0, 1)
        case 7:
            return pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return pixels[:, ::-1].swapaxes(0, 1)
        case _:
            return pixels


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, UnidentifiedImageError):
        return "empty file" if Path(path).stat().st_size == 0 else f"not one of {', '.join(_FORMATS)}"
    text = " ".join((str(error) if not isinstance(error, OSError) or not error.strerror else error.strerror).split())
    return text or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- npz


def _open_npz(path: Path, channels: int) -> ArraySource:
    arrays = _load_arrays(path)
    images = _check_images(path, arrays.get("images"), channels)
    labels = _check_labels(path, arrays.get("labels"), len(images))
    class_names = _check_names(path, arrays.get("names"), labels)
    return ArraySource(
        images=images,
        description=_describe(
            f"file {path}",
            len(images),
            (images.shape[1], images.shape[2]),
            None if class_names is None else len(class_names),
        ),
        labels=labels,
        class_names=class_names,
    )


def _load_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.exists():
        raise FileNotFoundError(f"data: no such file: {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: {path} is not a .npz file (not a zip archive); write it with numpy.savez")
    arrays: dict[str, NDArray[np.generic]] = {}
    with np.load(path, allow_pickle=False) as archive:
        if "images" not in archive.files:
            raise ValueError(f"data: {path} holds no array named 'images', but {', '.join(archive.files) or 'nothing'}")
        for key in ("images", "labels", "names"):
            if key in archive.files:
                try:
                    arrays[key] = archive[key]
                except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    reason = "it holds Python objects" if "pickle" in str(error) else str(error)
                    raise ValueError(f"data: array '{key}' of {path} cannot be read: {reason}") from error
    return arrays


def _check_images(
    path: Path, images: NDArray[np.generic] | None, channels: int
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    if images is None or images.dtype not in (np.uint8, np.uint16):
        kind = "nothing" if images is None else images.dtype
        raise ValueError(f"data: 'images' of {path}: expected uint8 or uint16, got {kind}")
    if images.ndim not in (3, 4):
        raise ValueError(
            f"data: 'images' of {path}: expected (N, height, width) or (N, height, width, channels), got {images.shape}"
        )
    images = images[..., None] if images.ndim == 3 else images
    if 0 in images.shape:
        raise ValueError(f"data: no images in {path}: 'images' is {images.shape}")
    if images.shape[3] != channels:
        raise ValueError(f"channels: {path} has {images.shape[3]} (of (N, height, width, channels)), got {channels}")
    return images.astype(np.uint8, copy=False) if images.dtype == np.uint8 else images.astype(np.uint16, copy=False)


def _check_labels(path: Path, labels: NDArray[np.generic] | None, number: int) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.dtype.kind not in "iu":
        raise ValueError(f"data: 'labels' of {path}: expected integers, got {labels.dtype}")
    if labels.shape != (number,):
        raise ValueError(f"data: 'labels' of {path}: expected ({number},), one per image, got {labels.shape}")
    labels_int = labels.astype(np.int64)
    if labels_int.min() < 0:
        raise ValueError(f"data: 'labels' of {path}: expected classes from 0, got {labels_int.min()}")
    return labels_int


def _check_names(
    path: Path, names: NDArray[np.generic] | None, labels: NDArray[np.int64] | None
) -> tuple[str, ...] | None:
    if labels is None:
        return None
    largest = int(labels.max())
    if names is None:
        return tuple(str(k) for k in range(largest + 1))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"data: 'names' of {path}: expected a list of strings, got {names.dtype} {names.shape}")
    if len(names) <= largest:
        raise ValueError(
            f"data: 'names' of {path}: expected a name for every class up to {largest}, got {len(names)} names"
        )
    return tuple(str(name) for name in names)

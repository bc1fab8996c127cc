"""Crops, flips and resizing of single images: uint8 arrays (height, width, channels), any number of channels.

All resizing is Pillow's bicubic filter, which widens when it shrinks an image (antialias), as the published recipes
of masked autoencoders assume. Randomness is an argument: a `numpy.random.Generator`.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "center_crop",
    "check_crop_options",
    "check_size",
    "random_crop_box",
    "random_flip",
    "random_resized_crop",
    "resize",
    "resize_picture",
]

ImageArray = NDArray[np.uint8]

# "RGBX" rather than "RGBA": Pillow weighs RGBA colours by alpha when it resizes, which is wrong for a fourth band
# that is not opacity (near infrared, depth).
_MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBX"}
_CROP_TRIES = 10


def _check_image(image: ImageArray) -> None:
    if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image: expected a uint8 array (height, width, channels), got {image.dtype} {image.shape}")


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless `size` is (height, width) of at least one pixel."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width) of at least 1 pixel, got {size}")


def check_crop_options(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Check the two ranges of `random_resized_crop`.

    Parameters
    ----------
    scale : tuple of two floats
        Smallest and largest area of a crop, as a fraction of the image: 0 < smallest <= largest <= 1.
    ratio : tuple of two floats
        Smallest and largest width / height of a crop: 0 < smallest <= largest.

    Raises
    ------
    ValueError
        If a range is out of bounds or reversed.

    Examples
    --------
    >>> check_crop_options((0.2, 1.0), (3 / 4, 4 / 3))
    """
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {scale}")
    if not (len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise ValueError(f"crop_ratio: expected 0 < smallest <= largest, got {ratio}")


def resize(
    image: ImageArray, size: tuple[int, int], *, box: tuple[float, float, float, float] | None = None
) -> ImageArray:
    """Resize an image, or a box of it, with Pillow's antialiased bicubic filter.

    Parameters
    ----------
    image : uint8 array (height, width, channels)
        Any number of channels. Each channel is filtered by itself; a fourth channel is not taken for opacity.
    size : (height, width)
        Of the result, in pixels.
    box : (left, top, right, bottom), optional
        Region of the input to resize, in pixels, fractions allowed. Default: the whole image. Near the edges of the
        box the filter also sees the pixels just outside it.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    ValueError
        If `image` or `size` is not as described.

    Examples
    --------
    >>> resize(np.full((8, 6, 7), 200, np.uint8), (4, 3)).shape
    (4, 3, 7)
    """
    _check_image(image)
    check_size(size)
    mode = _MODE_OF_CHANNELS.get(image.shape[2])
    if mode is not None:
        return _resize_planes(image, mode, size, box)
    planes = [_resize_planes(image[..., c : c + 1], "L", size, box) for c in range(image.shape[2])]
    return np.concatenate(planes, axis=2)


def _resize_planes(
    image: ImageArray, mode: str, size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> ImageArray:
    height, width, channels = image.shape
    picture = Image.frombuffer(mode, (width, height), np.ascontiguousarray(image), "raw", mode, 0, 1)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).reshape(*size, channels)


def resize_picture(
    picture: Image.Image, size: tuple[int, int], *, box: tuple[float, float, float, float] | None = None
) -> ImageArray:
    """Resize a Pillow image, as `resize` does with its pixels, but without copying them all into an array first.

    Parameters
    ----------
    picture : PIL.Image.Image
        Of mode L, RGB or RGBA.
    size : (height, width)
        Of the result, in pixels.
    box : (left, top, right, bottom), optional
        See `resize`.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    ValueError
        If `size` is not as described, or the mode is none of the three.

    Examples
    --------
    >>> resize_picture(Image.new("RGB", (6, 8)), (4, 3)).shape
    (4, 3, 3)
    """
    check_size(size)
    if picture.mode == "RGBA":  # see `_MODE_OF_CHANNELS`
        return resize(np.asarray(picture), size, box=box)
    if picture.mode not in ("L", "RGB"):
        raise ValueError(f"picture: expected mode L, RGB or RGBA, got {picture.mode}")
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).reshape(*size, len(picture.getbands()))


def random_crop_box(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    The area is uniform over `scale` times the area of the image, the logarithm of the aspect ratio uniform over
    `ratio`, the place uniform over all places where the box fits. A box that does not fit is drawn again, ten times
    at most; then the box is the centred largest one whose ratio lies within `ratio` (the whole image, if its own
    ratio does).

    Parameters
    ----------
    shape : (height, width)
        Of the image, in pixels.
    rng : numpy.random.Generator
        Advanced by the draw.
    scale, ratio : tuple of two floats
        See `check_crop_options`.

    Returns
    -------
    (top, left, height, width) : ints
        In pixels.

    Raises
    ------
    ValueError
        If a range is out of bounds.

    References
    ----------
    Szegedy et al., Going Deeper with Convolutions, 2015, section 6 (the crop); the ten tries and the centred
    fall-back are those of torchvision's RandomResizedCrop, which masked autoencoders are trained with.

    Examples
    --------
    >>> random_crop_box((48, 48), np.random.default_rng(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    (0, 0, 48, 48)
    """
    check_crop_options(scale, ratio)
    image_height, image_width = shape
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_TRIES):
        area = image_height * image_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(rng.integers(0, image_height - height + 1))
            left = int(rng.integers(0, image_width - width + 1))
            return top, left, height, width
    return _central_box(shape, ratio)


def _central_box(shape: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    image_height, image_width = shape
    # max(1, ...): an image one pixel wide still gives a crop
    height = min(image_height, max(1, round(image_width / ratio[0])))
    width = min(image_width, max(1, round(image_height * ratio[1])))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def random_resized_crop(
    image: ImageArray,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> ImageArray:
    """Cut a random box out of an image and resize it.

    The box is cut out first, so that the filter sees no pixel outside it. The defaults are those of MAE's pre-training.

    Parameters
    ----------
    image : uint8 array (height, width, channels)
    size : (height, width)
        Of the result, in pixels; need not be square, and does not change how boxes are drawn.
    rng : numpy.random.Generator
        Advanced by the draw.
    scale, ratio : tuple of two floats
        See `random_crop_box`.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    ValueError
        If an argument is not as described.

    Examples
    --------
    >>> random_resized_crop(np.zeros((40, 60, 3), np.uint8), (32, 16), np.random.default_rng(0)).shape
    (32, 16, 3)
    """
    _check_image(image)
    top, left, height, width = random_crop_box((image.shape[0], image.shape[1]), rng, scale=scale, ratio=ratio)
    return resize(image[top : top + height, left : left + width], size)


def random_flip(image: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Mirror an image left to right, with probability one half.

    Parameters
    ----------
    image : uint8 array (height, width, channels)
    rng : numpy.random.Generator
        Advanced by one draw.

    Returns
    -------
    uint8 array (height, width, channels)
        The image itself or a mirrored copy.

    Examples
    --------
    >>> random_flip(np.arange(3, dtype=np.uint8).reshape(1, 3, 1), np.random.default_rng(1)).ravel().tolist()
    [0, 1, 2]
    """
    if rng.random() >= 0.5:
        return image
    # Copied as whole pixels: byte by byte, as from a mirrored view, would take four times as long.
    pixels = np.ascontiguousarray(image).view(f"V{image.shape[2]}")
    return np.ascontiguousarray(pixels[:, ::-1]).view(np.uint8)


def center_crop(image: ImageArray, size: tuple[int, int], *, share: float = 1.0) -> ImageArray:
    """Resize an image until it just covers `size`, and cut out its centre.

    Both in one pass of the filter: the largest centred box with the proportions of `size`, or one inside it, is
    resized. Deterministic: for evaluation.

    Parameters
    ----------
    image : uint8 array (height, width, channels)
    size : (height, width)
        Of the result, in pixels.
    share : float, optional
        Sides of the box relative to those of the largest one, in (0, 1]: 0.875 is what is also written as resizing to
        256 and cutting out 224.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    ValueError
        If an argument is not as described.

    Examples
    --------
    >>> center_crop(np.zeros((40, 60, 3), np.uint8), (32, 16)).shape
    (32, 16, 3)
    """
    _check_image(image)
    check_size(size)
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    height, width = image.shape[0], image.shape[1]
    zoom = share * min(height / size[0], width / size[1])
    # min: rounding must not push the box past the edge, which Pillow refuses
    box_height, box_width = min(float(height), size[0] * zoom), min(float(width), size[1] * zoom)
    top, left = (height - box_height) / 2, (width - box_width) / 2
    return resize(
        image, size, box=(left, top, min(float(width), left + box_width), min(float(height), top + box_height))
    )

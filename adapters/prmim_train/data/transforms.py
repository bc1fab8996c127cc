"""Crops, flips and resizing of arrays (height, width, channels).

Values are uint8, uint16 or float32; any number of channels is allowed. To treat the frames of a clip alike, they are
folded into channels.

Resizing uses Pillow's antialiased bicubic filter, as in the published recipes of masked autoencoders;
`random_padded_crop` uses the bilinear filter. All random numbers come from the `numpy.random.Generator` that the caller
passes.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "CROP_TRIES",
    "center_crop",
    "check_crop_options",
    "check_size",
    "crop_maps",
    "fold_frames",
    "plane_of",
    "random_crop_box",
    "random_flip",
    "random_padded_crop",
    "relative_ratio",
    "resize",
    "resize_picture",
    "unfold_frames",
]

ImageArray = NDArray[Any]
CropDraw = Literal["retry", "clamp"]

# "RGBX" instead of "RGBA": Pillow weights RGBA colours by alpha when it resizes, which is wrong if the fourth channel
# is not opacity (near infrared, depth).
_MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBX"}
CROP_TRIES = 10
_MAX_COVERING = 64  # area of a resized whole image, relative to a crop


def _check_image(image: ImageArray) -> None:
    if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16, np.float32) or 0 in image.shape:
        raise ValueError(
            "image: expected an array (height, width, channels), uint8, uint16 or float32, got "
            f"{image.dtype} {image.shape}"
        )


def check_size(size: tuple[int, ...]) -> None:
    """Raise ValueError unless `size` is (height, width), both at least 1."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width) of at least 1 pixel, got {size}")


def check_crop_options(scale: tuple[float, float], ratio: tuple[float, float], draw: str = "retry") -> None:
    """Validate the options of `random_crop_box`.

    Parameters
    ----------
    scale : tuple of two floats
        Smallest and largest area of a crop as a fraction of the image: 0 < smallest <= largest <= 1.
    ratio : tuple of two floats
        Smallest and largest width / height of a crop: 0 < smallest <= largest.
    draw : "retry" or "clamp"

    Raises
    ------
    ValueError
        If a range is invalid or the kind of draw unknown.

    Examples
    --------
    >>> check_crop_options((0.2, 1.0), (3 / 4, 4 / 3))
    """
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {scale}")
    if not (len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise ValueError(f"crop_ratio: expected 0 < smallest <= largest, got {ratio}")
    if draw not in get_args(CropDraw):
        raise ValueError(f"crop_draw: expected 'retry' or 'clamp', got {draw!r}")


def relative_ratio(ratio: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """Return absolute bounds of width / height.

    The given bounds are relative to those of the resized crop (height, width).

    Examples
    --------
    >>> relative_ratio((0.75, 1.25), (1024, 128))
    (0.09375, 0.15625)
    """
    aspect = size[1] / size[0]  # exactly 1 for squares
    return ratio[0] * aspect, ratio[1] * aspect


def resize(
    image: ImageArray,
    size: tuple[int, ...],
    *,
    box: tuple[float, float, float, float] | None = None,
    filter: Image.Resampling = Image.Resampling.BICUBIC,
) -> ImageArray:
    """Resize an image or a box of it with one of Pillow's antialiased filters.

    Parameters
    ----------
    image : array (height, width, channels)
        uint8, uint16 or float32. Any number of channels. Channels are filtered independently; a fourth channel is not
        treated as opacity.
    size : (height, width)
        Of the result, in pixels.
    box : (left, top, right, bottom), optional
        Region to resize, in pixels; may be fractional. Default: the whole image. Near the edges of the box, the filter
        also uses pixels outside it.
    filter : PIL.Image.Resampling, optional

    Returns
    -------
    array (height, width, channels)
        Of the type of `image`.

    Raises
    ------
    ValueError
        If `image` or `size` is invalid.

    Examples
    --------
    >>> resize(np.full((8, 6, 7), 200, np.uint8), (4, 3)).shape
    (4, 3, 7)
    """
    _check_image(image)
    height, width, channels = image.shape
    if image.dtype != np.uint8:
        return _resize_deep(image, size, box, filter)
    mode = _MODE_OF_CHANNELS.get(channels)
    if mode is None:
        planes = [resize(image[..., [channel]], size, box=box, filter=filter) for channel in range(channels)]
        return np.concatenate(planes, axis=2)
    picture = Image.frombuffer(mode, (width, height), np.ascontiguousarray(image), "raw", mode, 0, 1)
    return resize_picture(picture, size, box=box, filter=filter)


def _resize_deep(
    image: ImageArray,
    size: tuple[int, ...],
    box: tuple[float, float, float, float] | None,
    filter: Image.Resampling,
) -> ImageArray:
    """Resize in float32; round and clip whole numbers."""
    check_size(size)
    planes = (Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in np.moveaxis(image, 2, 0))
    resized = np.stack([np.asarray(plane.resize((size[1], size[0]), filter, box=box)) for plane in planes], axis=2)
    if image.dtype == np.float32:
        return resized
    rounded: ImageArray = np.rint(resized).clip(0, np.iinfo(image.dtype).max).astype(image.dtype)
    return rounded


def resize_picture(
    picture: Image.Image,
    size: tuple[int, ...],
    *,
    box: tuple[float, float, float, float] | None = None,
    filter: Image.Resampling = Image.Resampling.BICUBIC,
) -> ImageArray:
    """Resize a Pillow image like `resize`, without copying it into an array.

    Parameters
    ----------
    picture : PIL.Image.Image
        Mode L, RGB, RGBX or RGBA.
    size : (height, width)
        Of the result, in pixels.
    box : (left, top, right, bottom), optional
    filter : PIL.Image.Resampling, optional
        See `resize`.

    Returns
    -------
    uint8 array (height, width, channels)

    Raises
    ------
    ValueError
        If `size` is invalid, or the mode is not supported.

    Examples
    --------
    >>> resize_picture(Image.new("RGB", (6, 8)), (4, 3)).shape
    (4, 3, 3)
    """
    check_size(size)
    if picture.mode == "RGBA":  # see `_MODE_OF_CHANNELS`
        return resize(np.asarray(picture), size, box=box, filter=filter)
    if picture.mode not in _MODE_OF_CHANNELS.values():
        raise ValueError(f"picture: expected mode L, RGB, RGBX or RGBA, got {picture.mode}")
    resized = picture.resize((size[1], size[0]), filter, box=box)
    return np.asarray(resized).reshape(*size, len(picture.getbands()))


def plane_of(image_size: tuple[int, ...]) -> tuple[int, int]:
    """Return the height and the width of images or clips."""
    height, width = image_size[-2:]
    return height, width


def fold_frames(clip: ImageArray) -> ImageArray:
    """Fold the frames of a clip into channels.

    From (frames, height, width, channels) to (height, width, frames * channels).

    Examples
    --------
    >>> fold_frames(np.zeros((16, 8, 6, 3), np.uint8)).shape
    (8, 6, 48)
    """
    _, height, width, _ = clip.shape
    return np.moveaxis(clip, 0, 2).reshape(height, width, -1)


def unfold_frames(image: ImageArray, image_size: tuple[int, ...]) -> ImageArray:
    """Inverse of `fold_frames`; no-op for images.

    Parameters
    ----------
    image : array (height, width, frames * channels)
    image_size : (height, width) or (frames, height, width)

    Returns
    -------
    array (height, width, channels) or (frames, height, width, channels)

    Examples
    --------
    >>> unfold_frames(np.zeros((8, 6, 48), np.uint8), (16, 8, 6)).shape
    (16, 8, 6, 3)
    """
    if len(image_size) == 2:
        return image
    return np.moveaxis(image.reshape(*image.shape[:2], image_size[0], -1), 2, 0)


def random_crop_box(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    draw: str = "retry",
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    The area, as a fraction of the image, is uniform over `scale`; the logarithm of width / height is uniform over
    `ratio`; the position is uniform over all positions inside the image. The defaults are those of MAE's pre-training.

    Parameters
    ----------
    shape : (height, width)
        Size of the image, in pixels.
    rng : numpy.random.Generator
        Advanced by the draw.
    scale, ratio : tuple of two floats
        See `check_crop_options`.
    draw : "retry" or "clamp"
        Handling of a box that does not fit. "retry": draw again; if ten boxes do not fit, return the largest centred
        box whose width / height lies in `ratio`. "clamp": shorten a side that is longer than the image's, which changes
        area and ratio.

    Returns
    -------
    (top, left, height, width) : ints
        In pixels.

    Raises
    ------
    ValueError
        If a range is invalid or the kind of draw unknown.

    Notes
    -----
    "retry" rejects large boxes more often than small ones. For `scale` (0.08, 1) and an image of 375 x 500 pixels, the
    mean area of a box is 0.432 of the image with "retry", and 0.519 with "clamp".

    References
    ----------
    Szegedy et al., Going Deeper with Convolutions, 2015, section 6. The ten tries and the centred fallback are those of
    torchvision's RandomResizedCrop, which masked autoencoders are trained with. "clamp" is the crop of MAE's linear
    probe (He et al., arXiv 2111.06377, released code).

    Examples
    --------
    >>> random_crop_box((48, 48), np.random.default_rng(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    (0, 0, 48, 48)
    """
    check_crop_options(scale, ratio, draw)
    image_height, image_width = shape
    # The order of the draws is fixed: workers and resumed runs, even from older versions, must draw the same boxes.
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(CROP_TRIES):
        area = image_height * image_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if draw == "clamp":  # always fits
            width, height = min(max(width, 1), image_width), min(max(height, 1), image_height)
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(rng.integers(0, image_height - height + 1))
            left = int(rng.integers(0, image_width - width + 1))
            return top, left, height, width
    return _central_box(shape, ratio)


def _central_box(shape: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    image_height, image_width = shape
    # max(1, ...): an image that is one pixel wide still has a crop.
    height = min(image_height, max(1, round(image_width / ratio[0])))
    width = min(image_width, max(1, round(image_height * ratio[1])))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def crop_maps(maps: NDArray[np.floating[Any]], boxes: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Crop and mirror token maps like their images.

    The results are resized to the tokens of the crops.

    Parameters
    ----------
    maps : float array (batch, rows, columns)
        Values of the tokens of whole images.
    boxes : float array (batch, 4)
        Top, left, bottom, right of each crop as fractions of its image. Left is greater than right in mirrored crops.

    Returns
    -------
    float32 array (batch, rows, columns)
        The mean of the map over the area of each token of the crop.

    Examples
    --------
    >>> maps = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    >>> crop_maps(maps, np.array([[0, 0, 1, 1]])).tolist()
    [[[1.0, 0.0], [0.0, 0.0]]]
    >>> crop_maps(maps, np.array([[0, 1, 0.5, 0]])).tolist()  # mirrored
    [[[0.0, 1.0], [0.0, 1.0]]]
    """
    top, left, bottom, right = np.asarray(boxes, np.float64).T
    rows, columns = _shares(top, bottom, maps.shape[1]), _shares(left, right, maps.shape[2])
    return (rows @ maps.astype(np.float64) @ columns.mT).astype(np.float32)


def _shares(start: NDArray[np.float64], end: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """Return each crop token's share in each image token: (batch, number, number)."""
    edges = number * (start[:, None] + (end - start)[:, None] * np.linspace(0, 1, number + 1))
    before = np.clip(edges[:, :, None] - np.arange(number), 0, 1)  # the part of each token before each edge
    return np.diff(before, axis=1) / np.diff(edges)[:, :, None]


def random_padded_crop(
    image: ImageArray, size: tuple[int, int], rng: np.random.Generator, *, padding: int
) -> ImageArray:
    """Cut a random window from an image that is resized and padded.

    The image is resized to just cover `size`, and padded with mirrored pixels. The crop of MFF and PixMIM, which is
    milder than that of MAE: it shows most of the image.

    Parameters
    ----------
    image : uint8, uint16 or float32 array (height, width, channels)
    size : (height, width)
        Of the result, in pixels.
    rng : numpy.random.Generator
        Advanced by two draws.
    padding : int
        Pixels on each side. The pixels at the edge are not repeated.

    Returns
    -------
    array (height, width, channels)
        Of the type of `image`.

    Raises
    ------
    ValueError
        If an argument is invalid.

    References
    ----------
    Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261, released code.

    Examples
    --------
    >>> image = np.arange(4, dtype=np.uint8).reshape(1, 4, 1)
    >>> random_padded_crop(image, (1, 4), np.random.default_rng(2), padding=2)[0, :, 0].tolist()
    [1, 0, 1, 2]
    """
    _check_image(image)
    check_size(size)
    if padding < 0:
        raise ValueError(f"padding: expected at least 0, got {padding}")
    height, width, _ = image.shape
    zoom = max(size[0] / height, size[1] / width)
    tall, wide = max(size[0], round(height * zoom)), max(size[1], round(width * zoom))
    rows, columns = (
        _mirrored(int(rng.integers(0, have + 2 * padding - wanted + 1)) - padding, wanted, have)
        for wanted, have in zip(size, (tall, wide), strict=True)
    )
    top, left, bottom, right = 0, 0, tall, wide
    if tall * wide > _MAX_COVERING * math.prod(size):  # a box rounds differently, so other images are resized whole
        top, left, bottom, right = int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1
    box = (left * width / wide, top * height / tall, right * width / wide, bottom * height / tall)
    resized = resize(image, (bottom - top, right - left), box=box, filter=Image.Resampling.BILINEAR)
    return resized.take(rows - top, axis=0).take(columns - left, axis=1)


def _mirrored(start: int, number: int, length: int) -> NDArray[np.int64]:
    """Return `number` places from `start` on an axis that is continued by mirroring."""
    period = max(1, 2 * (length - 1))
    places = np.arange(start, start + number) % period
    return np.minimum(places, period - places)


def random_flip(image: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Mirror an image or a clip left to right with probability 0.5.

    Parameters
    ----------
    image : uint8, uint16 or float32 array ([frames,] height, width, channels)
    rng : numpy.random.Generator
        Advanced by one draw.

    Returns
    -------
    array ([frames,] height, width, channels)
        The image itself, or a mirrored copy.

    Examples
    --------
    >>> crop = np.arange(3, dtype=np.uint8).reshape(1, 3, 1)
    >>> random_flip(crop, np.random.default_rng(1)).ravel().tolist()
    [0, 1, 2]
    """
    if rng.random() >= 0.5:
        return image
    # Copies whole pixels; copying a mirrored view byte by byte takes four times as long.
    pixels = np.ascontiguousarray(image).view(f"V{image.shape[-1] * image.itemsize}")
    return np.ascontiguousarray(pixels[..., ::-1, :]).view(image.dtype)


def center_crop(image: ImageArray, size: tuple[int, int], *, share: float = 1.0) -> ImageArray:
    """Resize the largest centred box that has the proportions of `size`.

    Equivalent to resizing the image until it just covers `size` and cropping the centre, but filters only once.
    Deterministic; used for evaluation.

    Parameters
    ----------
    image : uint8, uint16 or float32 array (height, width, channels)
    size : (height, width)
        Of the result, in pixels.
    share : float, optional
        Scales the sides of the box, in (0, 1]. 0.875 corresponds to resizing to 256 and cropping 224.

    Returns
    -------
    array (height, width, channels)
        Of the type of `image`.

    Raises
    ------
    ValueError
        If an argument is invalid.

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
    # min(): Pillow refuses boxes that rounding pushes past the edge.
    box_height, box_width = min(float(height), size[0] * zoom), min(float(width), size[1] * zoom)
    top, left = (height - box_height) / 2, (width - box_width) / 2
    return resize(
        image, size, box=(left, top, min(float(width), left + box_width), min(float(height), top + box_height))
    )

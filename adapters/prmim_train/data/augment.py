"""RandAugment and random erasing for any number of channels.

Images are uint8 arrays (height, width, channels). The frames of a clip are folded into channels; mean, standard
deviation and fill values are those of one frame. All random numbers come from the `numpy.random.Generator` that the
caller passes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

__all__ = ["OPERATIONS", "Augment", "erase", "rand_augment"]

ImageArray = NDArray[np.uint8]
Fill = tuple[int, ...]
Operation = Callable[[ImageArray, float, Fill], ImageArray]

_MAX_LEVEL = 10.0
_PROBABILITY = 0.5  # probability of applying a drawn operation
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_TRIES = 10


@dataclass(frozen=True)
class Augment:
    """RandAugment followed by random erasing.

    Parameters
    ----------
    mean, std
        Per channel of a frame, for pixels in [0, 1]. Uncovered corners are filled with the mean; erased boxes with
        normal noise of this mean and standard deviation.
    operations
        Number of RandAugment operations per image.
    level
        Mean strength of an operation, from 0 to 10. 0 disables RandAugment.
    spread
        Standard deviation of the strength.
    erasing
        Probability of erasing a box.

    Examples
    --------
    >>> augment = Augment((0.5,), (0.25,), level=9.0, erasing=0.25)
    >>> augment(np.zeros((8, 8, 1), np.uint8), np.random.default_rng(0)).shape
    (8, 8, 1)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    operations: int = 2
    level: float = 0.0
    spread: float = 0.5
    erasing: float = 0.0

    def __call__(self, image: ImageArray, rng: np.random.Generator) -> ImageArray:
        """Return an augmented copy, or the image itself if nothing was drawn."""
        if self.level > 0:
            fill = tuple(min(255, round(255 * value)) for value in self.mean)
            image = rand_augment(
                image, rng, operations=self.operations, level=self.level, spread=self.spread, fill=fill
            )
        if self.erasing > 0 and rng.random() < self.erasing:
            image = erase(image, rng, mean=self.mean, std=self.std)
        return image


def rand_augment(
    image: ImageArray,
    rng: np.random.Generator,
    *,
    operations: int = 2,
    level: float = 9.0,
    spread: float = 0.5,
    fill: Fill,
) -> ImageArray:
    """Apply RandAugment.

    Operations are drawn from `OPERATIONS` with replacement, and each is applied with probability 0.5. Each strength is
    drawn from a normal distribution and clipped to [0, 10]. The defaults are `rand-m9-mstd0.5-inc1`, the policy for
    fine-tuning of masked autoencoders.

    Parameters
    ----------
    image
        uint8 (height, width, channels); may have more frames than `fill`.
    rng
        Advanced by a number of draws that depends on `operations` only.
    operations
        Number of operations to draw.
    level, spread
        Mean and standard deviation of the strength.
    fill
        Value of uncovered pixels, per channel of a frame.

    Returns
    -------
    array
        uint8 (height, width, channels).

    References
    ----------
    Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space, arXiv 1909.13719.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rand_augment(np.zeros((4, 6, 3), np.uint8), rng, fill=(124, 116, 104)).shape
    (4, 6, 3)
    """
    # The order of the draws and of `OPERATIONS` is fixed, and every draw is made even if the operation is skipped:
    # workers and resumed runs, even from older versions, must augment an image in the same way.
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=operations):
        is_applied = rng.random() < _PROBABILITY
        strength = float(np.clip(rng.normal(level, spread), 0.0, _MAX_LEVEL)) / _MAX_LEVEL
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if is_applied:
            image = OPERATIONS[names[number]](image, sign * strength, fill)
    return image


def erase(
    image: ImageArray, rng: np.random.Generator, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageArray:
    """Replace a random box by per-pixel noise.

    The box covers 2 % to 33 % of the image; height / width lies in [0.3, 3.3]. If ten drawn boxes do not fit, the image
    is returned unchanged.

    Parameters
    ----------
    image
        uint8 (height, width, channels).
    rng
        Advanced by the draws.
    mean, std
        Mean and standard deviation of the noise, per channel of a frame, for pixels in [0, 1]. The noise is rounded and
        clipped to [0, 255].

    Returns
    -------
    array
        uint8 (height, width, channels).

    References
    ----------
    Zhong et al., Random Erasing Data Augmentation, arXiv 1708.04896.

    Examples
    --------
    >>> erased = erase(np.zeros((8, 8, 1), np.uint8), np.random.default_rng(0), mean=(0.5,),
    ...     std=(0.1,))
    >>> int(np.count_nonzero(erased))
    15
    """
    height, width, channels = image.shape
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*_ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            noise = rng.normal(size=(rows, columns, channels // len(mean), len(mean))) * std + np.asarray(mean)
            values = np.clip(np.rint(255 * noise), 0, 255).astype(np.uint8)
            image = image.copy()
            image[top : top + rows, left : left + columns] = values.reshape(rows, columns, channels)
            break
    return image


# ---------------------------------------------------------------------------------------- operations of RandAugment


def _with_pillow(change: Callable[[Image.Image, float, Fill], Image.Image]) -> Operation:
    """Return an operation for RGB images.

    Other images are changed channel by channel.
    """

    def operation(image: ImageArray, amount: float, fill: Fill) -> ImageArray:
        if image.shape[2] == len(fill) == 3:
            return np.asarray(change(Image.fromarray(image), amount, fill))
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
        changed = [change(plane, amount, (value,)) for plane, value in zip(planes, cycle(fill), strict=False)]
        return np.stack([np.asarray(plane) for plane in changed], axis=2)

    return operation


def _blend(degenerate: Callable[[ImageArray, Fill], NDArray[np.uint8] | int]) -> Operation:
    """Return an operation that blends an image with its degenerate version.

    Positive amounts extrapolate away from it. Equals `PIL.ImageEnhance` for RGB images, and accepts any number of
    channels.
    """

    def operation(image: ImageArray, amount: float, fill: Fill) -> ImageArray:
        other = np.broadcast_to(np.uint8(degenerate(image, fill)), image.shape)
        # Image.blend treats all values alike, so one grey picture can hold all channels.
        first, second = (Image.fromarray(np.ascontiguousarray(part).reshape(len(part), -1)) for part in (other, image))
        return np.asarray(Image.blend(first, second, max(0.1, 1 + 0.9 * amount))).reshape(image.shape)

    return operation


def _grey(image: ImageArray, fill: Fill) -> ImageArray:
    """Return the brightness of each frame in all of its channels (height, width, channels).

    Luma for three channels, else the mean over the channels.
    """
    frames = image.reshape(len(image), -1, len(fill))
    if len(fill) == 3:
        grey: ImageArray = np.asarray(Image.fromarray(frames).convert("L"))
    else:
        grey = np.rint(frames.mean(axis=2)).astype(np.uint8)
    return np.repeat(grey, len(fill), axis=1).reshape(image.shape)


_smooth = _with_pillow(lambda picture, amount, fill: picture.filter(ImageFilter.SMOOTH))


def _posterize(image: ImageArray, amount: float, fill: Fill) -> ImageArray:
    bits = 4 - int(4 * abs(amount))  # 0 at full strength, which ImageOps.posterize refuses
    return image & np.uint8(256 - 2 ** (8 - bits))


def _solarize_add(picture: Image.Image, amount: float, fill: Fill) -> Image.Image:
    table = [value + int(110 * abs(amount)) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Operation:
    """Return the affine transform with the matrix for (amount, width, height)."""
    return _with_pillow(
        lambda picture, amount, fill: picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix(amount, *picture.size),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
    )


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _with_pillow(lambda picture, amount, fill: ImageOps.autocontrast(picture)),
    "equalize": _with_pillow(lambda picture, amount, fill: ImageOps.equalize(picture)),
    "invert": _with_pillow(lambda picture, amount, fill: ImageOps.invert(picture)),
    "rotate": _with_pillow(
        lambda picture, amount, fill: picture.rotate(30 * amount, Image.Resampling.BICUBIC, fillcolor=fill)
    ),
    "posterize": _posterize,
    "solarize": _with_pillow(lambda picture, amount, fill: ImageOps.solarize(picture, 256 - int(256 * abs(amount)))),
    "solarize_add": _with_pillow(_solarize_add),
    "color": _blend(_grey),
    "contrast": _blend(lambda image, fill: int(_grey(image, fill).mean() + 0.5)),
    "brightness": _blend(lambda image, fill: 0),
    "sharpness": _blend(lambda image, fill: _smooth(image, 0.0, fill)),
    "shear_x": _affine(lambda amount, width, height: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda amount, width, height: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _affine(lambda amount, width, height: (1, 0, 0.45 * amount * width, 0, 1, 0)),
    "translate_y": _affine(lambda amount, width, height: (1, 0, 0, 0, 1, 0.45 * amount * height)),
}
"""Operations by name. Arguments are an image, an amount in [-1, 1], and a fill value per channel of a frame."""

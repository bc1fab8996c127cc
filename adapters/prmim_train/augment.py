"""RandAugment and random erasing of single images: uint8 arrays (height, width, channels), any number of channels.

Randomness is an argument: a `numpy.random.Generator`, by which everything is drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

__all__ = ["OPERATIONS", "Augment", "erase", "rand_augment"]

ImageArray = NDArray[np.uint8]

_MOST = 10.0  # the strongest level
_PROBABILITY = 0.5  # that an operation drawn is applied
_LUMA = np.array([0.299, 0.587, 0.114])
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_TRIES = 10


@dataclass(frozen=True)
class Augment:
    """RandAugment, then random erasing.

    Parameters
    ----------
    mean, std
        Of every channel, for pixels in [0, 1]: uncovered corners are filled with the mean, erased boxes with noise of
        this mean and deviation.
    operations
        How many operations of RandAugment an image gets.
    level
        Their mean strength, from 0 to 10. 0: no RandAugment.
    spread
        Standard deviation of the strength.
    erasing
        Probability that a box of an image is erased.

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
        """Return a changed copy of an image, or the image itself."""
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
    fill: tuple[int, ...],
) -> ImageArray:
    """Apply some operations, drawn from `OPERATIONS` with replacement, each with probability one half.

    The strength is drawn anew for each from a normal distribution, and cut to [0, 10]; it only ever makes an operation
    stronger. This is `rand-m9-mstd0.5-inc1`, as masked autoencoders are fine-tuned with, for any number of channels.

    Parameters
    ----------
    image
        uint8 (height, width, channels).
    rng
        Advanced by the draws.
    operations
        How many are drawn.
    level, spread
        Mean and standard deviation of the strength.
    fill
        For every channel the value of what is uncovered.

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
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=operations):
        is_applied = rng.random() < _PROBABILITY
        strength = float(np.clip(rng.normal(level, spread), 0.0, _MOST)) / _MOST
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if is_applied:
            image = OPERATIONS[names[number]](image, strength, sign, fill)
    return image


def erase(
    image: ImageArray, rng: np.random.Generator, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageArray:
    """Replace a box by noise, pixel by pixel.

    The box covers 2 to 33 % of the image, its ratio of height to width lies in [0.3, 3.3]; after ten that do not fit
    the image is left as it is.

    Parameters
    ----------
    image
        uint8 (height, width, channels).
    rng
        Advanced by the draws.
    mean, std
        Of the noise, which is normal, for pixels in [0, 1]; rounded and cut to what a pixel can be.

    Returns
    -------
    array
        uint8 (height, width, channels).

    References
    ----------
    Zhong et al., Random Erasing Data Augmentation, arXiv 1708.04896.

    Examples
    --------
    >>> erased = erase(np.zeros((8, 8, 1), np.uint8), np.random.default_rng(0), mean=(0.5,), std=(0.1,))
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
            noise = rng.normal(size=(rows, columns, channels)) * std + np.asarray(mean)
            image = image.copy()
            image[top : top + rows, left : left + columns] = np.clip(np.rint(255 * noise), 0, 255).astype(np.uint8)
            break
    return image


# ----------------------------------------------------------------------------------------- what RandAugment draws from


def _look_up(image: ImageArray, table: NDArray[Any]) -> ImageArray:
    """Replace every value by that of a table (256,), or (256, channels), rounded."""
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    if table.ndim == 1:
        found: ImageArray = table[image]
        return found
    return np.stack([table[image[..., channel], channel] for channel in range(image.shape[2])], axis=-1)


def _blend(other: NDArray[Any] | float, image: ImageArray, factor: float) -> ImageArray:
    """Go from another image to this one (factor 1) and beyond."""
    blended = np.rint(other + factor * (image - np.asarray(other, np.float32)))
    result: ImageArray = np.clip(blended, 0, 255).astype(np.uint8)
    return result


def _factor(strength: float, sign: float) -> float:
    return max(0.1, 1 + sign * 0.9 * strength)


def _grey(image: ImageArray) -> NDArray[Any]:
    """Return the brightness (height, width, 1): of three channels that of RGB, else the mean of all."""
    weights = _LUMA if image.shape[2] == 3 else np.full(image.shape[2], 1 / image.shape[2])
    grey: NDArray[np.float64] = np.rint(image @ weights)
    return grey[..., None]


def _pictures(image: ImageArray, change: Callable[[Image.Image, slice], Image.Image]) -> ImageArray:
    """Let Pillow change an image: three channels at once, any other number one by one."""
    channels = image.shape[2]
    if channels == 3:
        return np.asarray(change(Image.fromarray(image), slice(3)))
    planes = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(channels)]
    changed = [change(plane, slice(channel, channel + 1)) for channel, plane in enumerate(planes)]
    return np.stack([np.asarray(plane) for plane in changed], axis=-1)


def _affine(image: ImageArray, matrix: tuple[float, ...], fill: tuple[int, ...]) -> ImageArray:
    size = (image.shape[1], image.shape[0])
    return _pictures(
        image,
        lambda picture, channels: picture.transform(
            size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill[channels]
        ),
    )


def _auto_contrast(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    planes = [image[..., channel] for channel in range(image.shape[2])]
    low, high = (np.array([float(find(plane)) for plane in planes]) for find in (np.min, np.max))
    level = np.arange(256.0)[:, None]
    stretched = (level - low) * 255 / np.maximum(high - low, 1)
    return _look_up(image, np.where(high > low, stretched, level))


def _equalize(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    tables = []
    for channel in range(image.shape[2]):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        share = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255  # pixels for each step of the new scale
        tables.append((np.cumsum(counts) - counts + share // 2) // share if share else np.arange(256))
    return _look_up(image, np.stack(tables, axis=1))


def _invert(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return 255 - image


def _rotate(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    angle = sign * 30 * strength
    return _pictures(
        image, lambda picture, channels: picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill[channels])
    )


def _posterize(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    bits = 4 - int(4 * strength)
    return image & np.uint8(256 - 2 ** (8 - bits))


def _solarize(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    level = np.arange(256)
    return _look_up(image, np.where(level < 256 - int(256 * strength), level, 255 - level))


def _solarize_add(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    level = np.arange(256)
    return _look_up(image, np.where(level < 128, level + int(110 * strength), level))


def _color(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _blend(_grey(image), image, _factor(strength, sign))


def _contrast(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _blend(float(np.rint(_grey(image).mean())), image, _factor(strength, sign))


def _brightness(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _blend(0.0, image, _factor(strength, sign))


def _sharpness(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    smooth = _pictures(image, lambda picture, _: picture.filter(ImageFilter.SMOOTH))
    return _blend(smooth, image, _factor(strength, sign))


def _shear_x(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _affine(image, (1, sign * 0.3 * strength, 0, 0, 1, 0), fill)


def _shear_y(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _affine(image, (1, 0, 0, sign * 0.3 * strength, 1, 0), fill)


def _translate_x(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _affine(image, (1, 0, sign * 0.45 * strength * image.shape[1], 0, 1, 0), fill)


def _translate_y(image: ImageArray, strength: float, sign: float, fill: tuple[int, ...]) -> ImageArray:
    return _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * strength * image.shape[0]), fill)


Operation = Callable[[ImageArray, float, float, tuple[int, ...]], ImageArray]

OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""Each is given an image, a strength from 0 to 1, a sign, and a fill value for every channel."""

"""What random crops do to the given images: which share of an image they show, and how much they enlarge it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_train.data.transforms import random_crop_box, relative_ratio

__all__ = ["CropEffect", "crop_effect"]

_NUM_BOXES = 500


class CropEffect(NamedTuple):
    """Effect of each of a number of random crops.

    Parameters
    ----------
    share : float64 array (number of crops,)
        Share of the area of its image that the crop shows.
    enlargement : float64 array (number of crops,)
        Pixels of the crop for each pixel of the image, along the side that is enlarged more.
    stretch : float64 array (number of crops,)
        Enlargement along that side relative to the other side, at least 1.
    """

    share: NDArray[np.float64]
    enlargement: NDArray[np.float64]
    stretch: NDArray[np.float64]


def crop_effect(
    shapes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: str = "retry",
) -> CropEffect:
    """Draw crops of images, and measure them. Deterministic.

    Parameters
    ----------
    shapes : sequence of (height, width)
        Of the images, in pixels. At least one.
    size : (height, width)
        Of the resized crops, in pixels.
    scale, ratio, draw
        As `crop_scale`, `crop_ratio` and `crop_draw` of `prmim_train.data.batches.train_batches`.

    Returns
    -------
    CropEffect
        Of at least 500 crops, the same number of each image.

    Examples
    --------
    >>> effect = crop_effect([(64, 64)], (128, 128), scale=(0.25, 1.0), ratio=(1.0, 1.0))
    >>> effect.enlargement.min().round(), effect.enlargement.max().round()
    (np.float64(2.0), np.float64(4.0))
    """
    rng = np.random.default_rng(0)
    rows = []
    for height, width in shapes:
        for _ in range(-(-_NUM_BOXES // len(shapes))):
            box = random_crop_box((height, width), rng, scale=scale, ratio=relative_ratio(ratio, size), draw=draw)
            factors = size[0] / box[2], size[1] / box[3]
            rows.append((box[2] * box[3] / (height * width), max(factors), max(factors) / min(factors)))
    return CropEffect(*np.array(rows, np.float64).T)

"""Effect of random crops on images: visible share, and enlargement."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_train.config.axes import Spacing
from prmim_train.data.three_axes import random_volume_box
from prmim_train.data.transforms import random_crop_box, relative_ratio

__all__ = ["CropEffect", "crop_effect"]

_NUM_BOXES = 500


class CropEffect(NamedTuple):
    """Effect of random crops, one value per crop.

    Parameters
    ----------
    share : float64 array (number of crops,)
        Fraction of the area of the image, or of the volume, that the crop shows.
    enlargement : float64 array (number of crops,)
        Pixels of the crop per pixel of the image, along the side with the largest enlargement.
    stretch : float64 array (number of crops,)
        Ratio of the largest to the smallest enlargement of a side, at least 1. For volumes, in millimetres.
    step : float64 array (number of crops,)
        Geometric mean of the sides of the crop's pixels or voxels: in pixels of the image, or millimetres of a volume.
    """

    share: NDArray[np.float64]
    enlargement: NDArray[np.float64]
    stretch: NDArray[np.float64]
    step: NDArray[np.float64]


def crop_effect(
    shapes: Sequence[tuple[int, ...]],
    size: tuple[int, ...],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: str = "retry",
    spacings: Sequence[Spacing | None] | None = None,
) -> CropEffect:
    """Draw crops of images, and return their effect. Deterministic.

    Parameters
    ----------
    shapes : sequence of (height, width), or of (depth, height, width)
        Of the images or volumes, in pixels. At least one.
    size : (height, width) or (depth, height, width)
        Of the resized crops, in pixels.
    scale, ratio, draw
        As `crop_scale`, `crop_ratio` and `crop_draw` of `prmim_train.data.batches.train_batches`.
    spacings : sequence of (depth, height, width), optional
        Millimetres per voxel of each volume.

    Returns
    -------
    CropEffect
        Effect of at least 500 crops, the same number for each image.

    Examples
    --------
    >>> effect = crop_effect([(64, 64)], (128, 128), scale=(0.25, 1.0), ratio=(1.0, 1.0))
    >>> effect.enlargement.min().round(), effect.enlargement.max().round()
    (np.float64(2.0), np.float64(4.0))
    >>> options = {"scale": (0.5, 0.5), "ratio": (1.0, 1.0)}
    >>> crop_effect([(20, 64, 64)], (32, 32, 32), **options, spacings=[(4, 1, 1)]).step[0].round(1)
    np.float64(1.7)
    """
    rng = np.random.default_rng(0)
    known = [None] * len(shapes) if spacings is None else spacings
    rows = []
    for shape, spacing in zip(shapes, known, strict=True):
        for _ in range(-(-_NUM_BOXES // len(shapes))):
            sides = _draw(shape, size, spacing, rng, scale, ratio, draw)
            factors = [wanted / side for wanted, side in zip(size, sides, strict=True)]
            units = spacing or (1.0,) * len(shape)
            steps = [unit / factor for unit, factor in zip(units, factors, strict=True)]
            step = math.prod(steps) ** (1 / len(steps))
            rows.append((math.prod(sides) / math.prod(shape), max(factors), max(steps) / min(steps), step))
    return CropEffect(*np.array(rows, np.float64).T)


def _draw(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    spacing: Spacing | None,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: str,
) -> tuple[int, ...]:
    """Return the sides of a random box."""
    if len(shape) == 3:
        volume, wanted = (shape[0], shape[1], shape[2]), (size[0], size[1], size[2])
        return random_volume_box(volume, wanted, rng, spacing=spacing, scale=scale, ratio=ratio, draw=draw)[3:]
    plane, relative = (shape[0], shape[1]), relative_ratio(ratio, (size[0], size[1]))
    return random_crop_box(plane, rng, scale=scale, ratio=relative, draw=draw)[2:]

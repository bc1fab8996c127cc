"""Mixup and CutMix of whole batches on the host.

All random numbers come from a generator seeded with (seed, step).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mixing", "soft_targets"]

_STREAM = 1  # separates these draws from those of single images, which are seeded with three numbers
_LEVELS = 256  # the kept share is a multiple of 1 / 256


@dataclass(frozen=True)
class Mixing:
    """Mixup or CutMix of a batch, with soft targets.

    Parameters
    ----------
    labels
        int64 (number of images of the source,).
    num_classes
        Number of classes.
    seed
        With the step, determines the mixing.
    mixup, cutmix
        Parameter alpha of the beta distribution of the kept share; 0 disables.
    switch
        Probability of CutMix if both are enabled.
    smoothing
        Label smoothing: fraction of a target that is spread uniformly over all classes.

    Notes
    -----
    One share is drawn per batch. For mixup, it is rounded to a multiple of 1 / 256 for images and targets, so images
    are mixed exactly in integers, rounded half up. The partner of an image is half a batch away, not at the mirrored
    position: this keeps partners in the same process when a batch is distributed. The result does not depend on the
    number of processes if each has an even number of images.

    References
    ----------
    Zhang et al., mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412. Yun et al., CutMix: Regularization
    Strategy to Train Strong Classifiers with Localizable Features, arXiv 1905.04899.

    Examples
    --------
    >>> mixing = Mixing(np.array([0, 1]), 2, seed=0, mixup=0.8)
    >>> images = np.array([0, 200], np.uint8).reshape(2, 1, 1, 1)
    >>> mixed, targets = mixing(0, images, np.array([0, 1]))
    >>> mixed.ravel().tolist(), targets.tolist()
    ([148, 52], [[0.26171875, 0.73828125], [0.73828125, 0.26171875]])
    """

    labels: NDArray[np.int64]
    num_classes: int
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5
    smoothing: float = 0.0

    def __call__(
        self, step: int, images: NDArray[Any], index: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Mix a batch.

        Parameters
        ----------
        step
            From 0.
        images
            uint8, uint16 or float32 (batch, [frames,] height, width, channels); not modified.
        index
            int64 (batch,). Record of the source of each image.

        Returns
        -------
        images
            Of the same type and shape.
        targets
            float32 (batch, classes). Each row sums to 1.
        """
        targets = soft_targets(self.labels[index], self.num_classes, self.smoothing)
        if not (self.mixup or self.cutmix):
            return images, targets
        rng = np.random.default_rng((self.seed, step, 0, _STREAM))
        is_cutmix = bool(self.cutmix) and (not self.mixup or rng.random() < self.switch)
        share = rng.beta(*2 * (self.cutmix if is_cutmix else self.mixup,))
        half = len(images) // 2
        partners = np.roll(images, -half, axis=0)
        if is_cutmix:
            images, kept = _paste(images, partners, share, rng)
        else:
            kept = round(share * _LEVELS) / _LEVELS
            images = _blend(images, partners, kept)
        return images, np.float32(kept) * targets + np.float32(1 - kept) * np.roll(targets, -half, axis=0)


def soft_targets(labels: NDArray[Any], num_classes: int, smoothing: float = 0.0) -> NDArray[np.float32]:
    """Return one-hot labels with label smoothing.

    Parameters
    ----------
    labels
        int (batch,).
    num_classes
        Number of classes.
    smoothing
        Fraction of a target that is spread uniformly over all classes.

    Returns
    -------
    array
        float32 (batch, classes).

    Examples
    --------
    >>> soft_targets(np.array([1]), 4, smoothing=0.2).round(3).tolist()
    [[0.05000000074505806, 0.8500000238418579, 0.05000000074505806, 0.05000000074505806]]
    """
    targets = np.full((len(labels), num_classes), smoothing / num_classes, np.float32)
    targets[np.arange(len(labels)), labels] += np.float32(1 - smoothing)
    return targets


def _blend(images: NDArray[Any], partners: NDArray[Any], kept: float) -> NDArray[Any]:
    """Return the weighted mean of two batches; `kept` is a multiple of 1 / 256."""
    if images.dtype != np.uint8:
        mixed = np.float32(kept) * images + np.float32(1 - kept) * partners
        return mixed if images.dtype == np.float32 else np.rint(mixed).astype(images.dtype)
    first = round(kept * _LEVELS)
    mixed = np.empty_like(images)
    for number, (image, partner) in enumerate(zip(images, partners, strict=True)):  # one image fits the cache
        total = image * np.uint16(first) + partner * np.uint16(_LEVELS - first) + np.uint16(_LEVELS // 2)
        mixed[number] = total >> 8
    return mixed


def _paste(
    images: NDArray[Any], partners: NDArray[Any], share: float, rng: np.random.Generator
) -> tuple[NDArray[Any], float]:
    """Paste the same box of every partner.

    Returns the images and their remaining share, after clipping to the edges.
    """
    height, width = images.shape[-3:-1]
    side = np.sqrt(1 - share)
    top, bottom = _stretch(height, side, rng)
    left, right = _stretch(width, side, rng)
    pasted = images.copy()
    pasted[..., top:bottom, left:right, :] = partners[..., top:bottom, left:right, :]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def _stretch(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw start and end of a box along an axis.

    The centre is uniform, and the box is clipped to the image.
    """
    size, centre = int(length * share), int(rng.integers(length))
    return max(0, centre - size // 2), min(length, centre + size // 2)

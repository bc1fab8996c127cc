"""Mixup and cutmix: images of a batch are laid over each other, and so are their labels.

Both work on whole batches of uint8 images on the host, and are drawn from a generator seeded with (seed, step) alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mixing", "soft_targets"]

_STREAM = 1  # apart from the generators of single images, which are seeded with three numbers
_LEVELS = 256  # of the share that an image keeps


@dataclass(frozen=True)
class Mixing:
    """Makes images and soft targets of a batch.

    Parameters
    ----------
    labels
        int64 (number of images of the source,).
    num_classes
        How many classes there are.
    seed
        The mixing of a step follows from it and from the number of the step.
    mixup, cutmix
        The parameter alpha of the beta distribution that the share of the first image is drawn from; 0: never.
    switch
        Where both are wanted: how often it is cutmix.
    smoothing
        Share of a target that is spread evenly over all classes.

    Notes
    -----
    One share is drawn for each batch. It is rounded to a multiple of 1 / 256, in images and in targets alike, so that
    mixup is exact in integers, rounded half up. The partner of an image is the one half a batch further on: that keeps
    partners together when several processes share a batch, where the usual reversed batch would not, so that how many
    they are changes nothing, as long as each has an even number of images.

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
        self, step: int, images: NDArray[np.uint8], index: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return mixed images and their targets.

        Parameters
        ----------
        step
            Number of the step, from 0.
        images
            uint8 (batch, height, width, channels); left as they are.
        index
            int64 (batch,): which image of the source each one is.

        Returns
        -------
        images
            uint8, of the same shape.
        targets
            float32 (batch, classes); each row sums to 1.
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
    """Return label distributions.

    Parameters
    ----------
    labels
        int (batch,).
    num_classes
        How many classes there are.
    smoothing
        Share that is spread evenly over all classes.

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


def _blend(images: NDArray[np.uint8], partners: NDArray[np.uint8], kept: float) -> NDArray[np.uint8]:
    """Mix two batches; `kept` is a multiple of 1 / 256."""
    first = round(kept * _LEVELS)
    mixed = np.empty_like(images)
    for number, (image, partner) in enumerate(zip(images, partners, strict=True)):  # small enough for the cache
        total = image * np.uint16(first) + partner * np.uint16(_LEVELS - first) + np.uint16(_LEVELS // 2)
        mixed[number] = total >> 8
    return mixed


def _paste(
    images: NDArray[np.uint8], partners: NDArray[np.uint8], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], float]:
    """Put one box of every partner over the image; return the share that is left of the image, edges considered."""
    height, width = images.shape[1:3]
    side = np.sqrt(1 - share)
    top, bottom = _stretch(height, side, rng)
    left, right = _stretch(width, side, rng)
    pasted = images.copy()
    pasted[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def _stretch(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw where a box begins and ends: its centre lies anywhere, and what passes the edge is cut off."""
    size, centre = int(length * share), int(rng.integers(length))
    return max(0, centre - size // 2), min(length, centre + size // 2)

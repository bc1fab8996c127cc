"""Correctly classified test images, and standard errors over test images."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Runs = Mapping[int, Mapping[str, Any]]
"""Records of an arm by seed."""


def read_correct(path: Path) -> dict[str, str]:
    """Return each protocol's packed bits from a file of predictions.

    Empty if the file does not exist.
    """
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as predictions:
        truth = predictions["truth"]
        return {name: pack(predictions[name] == truth) for name in predictions.files if name != "truth"}


def pack(correct: NDArray[np.bool_]) -> str:
    """Return bits as hexadecimal digits, the first image in the highest bit.

    Examples
    --------
    >>> pack(np.array([True, False, False, False, True, True, True, True, True]))
    '8f80'
    """
    return np.packbits(correct).tobytes().hex()


def unpack(digits: str, images: int) -> NDArray[np.bool_]:
    """Return the bits of images.

    Examples
    --------
    >>> unpack("a0", 4).tolist()
    [True, False, True, False]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=images).astype(bool)


def image_error(own: Runs, other: Runs, measure: str) -> float:
    """Return the standard error over test images of the mean difference of two arms.

    This is the bootstrap standard error: images are drawn with replacement, each with the predictions of both arms and
    of all seeds. For a mean, the limit of many resamples has a closed form, so nothing is resampled: the standard
    deviation over images, of differences averaged over seeds, divided by the square root of the number of images. NaN
    if no seed has the bits of both arms.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 6.2: ideal bootstrap estimate of a mean.

    Examples
    --------
    >>> def runs(*digits):
    ...     return {s: {"test_images": 4, "correct": {"knn": text}} for s, text in enumerate(digits)}
    >>> image_error(runs("f0"), runs("c0"), "knn")  # right for two of four images more
    0.25
    >>> image_error(runs("f0", "50"), runs("c0", "60"), "knn"), image_error(runs("f0"), {0: {}}, "knn")
    (0.21650635094610965, nan)
    """
    found = [
        bits(own[seed], measure).astype(float) - bits(other[seed], measure)
        for seed in sorted(set(own) & set(other))
        if has_bits(own[seed], measure) and has_bits(other[seed], measure)
    ]
    if not found:
        return math.nan
    means = np.mean(found, axis=0)
    return float(means.std() / math.sqrt(len(means)))


def has_bits(run: Mapping[str, Any], measure: str) -> bool:
    """Return whether a record has the correct images; older records do not."""
    return measure in run.get("correct", {})


def bits(run: Mapping[str, Any], measure: str) -> NDArray[np.bool_]:
    """Return whether each test image was classified correctly."""
    return unpack(run["correct"][measure], run["test_images"])

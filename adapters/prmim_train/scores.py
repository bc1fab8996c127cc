"""What is told of a classifier: accuracy with its confidence interval, accuracy by class, who is taken for whom."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["confusion_matrix", "format_score", "score", "wilson_interval"]

_QUANTILE = 1.959963984540054  # of the normal distribution, for 95 % between it and its negative


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share, by Wilson's formula.

    Parameters
    ----------
    correct
        How many were right.
    total
        Out of how many, at least 1.

    Returns
    -------
    low, high
        In [0, 1]. It tells how sure the accuracy is for want of more test images; not how it would differ with another
        seed.

    References
    ----------
    Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    Examples
    --------
    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    share, spread = correct / total, _QUANTILE**2 / total
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def confusion_matrix(truth: NDArray[Any], predicted: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Count how often each class was taken for each.

    Parameters
    ----------
    truth, predicted
        int (images,).
    num_classes
        How many classes there are.

    Returns
    -------
    array
        int64 (classes, classes): true class by row, predicted class by column.

    Examples
    --------
    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = np.asarray(truth, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def score(truth: NDArray[Any], predicted: NDArray[Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Return what `evaluation.json` says of predictions.

    Parameters
    ----------
    truth, predicted
        int (images,), of one image at least.
    class_names
        Of every class.

    Returns
    -------
    dict
        Accuracy, its 95 % confidence interval, and accuracy and number of images of each class that has any.

    Examples
    --------
    >>> found = score(np.array([0, 0, 1]), np.array([0, 1, 1]), ["cat", "dog"])
    >>> found["correct"], found["per_class"]["cat"]
    (2, {'images': 2, 'accuracy': 0.5})
    """
    images = np.bincount(truth, minlength=len(class_names))
    right = np.bincount(truth[truth == predicted], minlength=len(class_names))
    per_class = {
        name: {"images": int(number), "accuracy": float(correct / number)}
        for name, number, correct in zip(class_names, images, right, strict=True)
        if number
    }
    correct = int(right.sum())
    return {
        "accuracy": correct / len(truth),
        "confidence_interval": list(wilson_interval(correct, len(truth))),
        "correct": correct,
        "test_images": len(truth),
        "per_class": per_class,
    }


def format_score(found: dict[str, Any]) -> str:
    """Write accuracy and interval of what `score` returns in words.

    Examples
    --------
    >>> format_score({"accuracy": 0.9, "confidence_interval": [0.8256, 0.9448], "test_images": 100})
    '90.0 % of 100 test images right (95 % confidence: 82.6 to 94.5 %)'
    """
    low, high = found["confidence_interval"]
    return (
        f"{100 * found['accuracy']:.1f} % of {found['test_images']:,} test images right "
        f"(95 % confidence: {100 * low:.1f} to {100 * high:.1f} %)"
    )

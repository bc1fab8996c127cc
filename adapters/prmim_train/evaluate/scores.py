"""Scores of a classifier: accuracy, confidence interval, and accuracy per class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.weight_files import write_atomically

__all__ = ["format_score", "score", "write_predictions"]


def score(truth: NDArray[Any], predicted: NDArray[Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Score predictions, for `evaluation.json`.

    Parameters
    ----------
    truth, predicted
        int (images,), at least one image.
    class_names
        Name of every class.

    Returns
    -------
    dict
        Accuracy, its 95 % confidence interval, and accuracy and number of images of each class that has images.

    Notes
    -----
    The interval is Wilson's. It covers the finite number of test images, not the variation between seeds.

    Examples
    --------
    >>> found = score(np.array([0, 0, 1]), np.array([0, 1, 1]), ["cat", "dog"])
    >>> found["correct"], found["per_class"]["cat"]
    (2, {'images': 2, 'accuracy': 0.5})
    """
    from scipy.stats import binomtest

    images = np.bincount(truth, minlength=len(class_names))
    right = np.bincount(truth[truth == predicted], minlength=len(class_names))
    per_class = {
        name: {"images": int(number), "accuracy": float(correct / number)}
        for name, number, correct in zip(class_names, images, right, strict=True)
        if number
    }
    correct = int(right.sum())
    low, high = binomtest(correct, len(truth)).proportion_ci(method="wilson")
    return {
        "accuracy": correct / len(truth),
        "confidence_interval": [float(low), float(high)],
        "correct": correct,
        "test_images": len(truth),
        "per_class": per_class,
    }


def format_score(found: dict[str, Any]) -> str:
    """Format the accuracy and confidence interval of a score.

    Examples
    --------
    >>> interval = [0.8256, 0.9448]
    >>> format_score({"accuracy": 0.9, "confidence_interval": interval, "test_images": 100})
    '90.0 % of 100 test images correct (95 % confidence interval: 82.6 to 94.5 %)'
    """
    low, high = found["confidence_interval"]
    return (
        f"{100 * found['accuracy']:.1f} % of {found['test_images']:,} test images correct "
        f"(95 % confidence interval: {100 * low:.1f} to {100 * high:.1f} %)"
    )


def write_predictions(path: Path, truth: NDArray[Any], predicted: Mapping[str, NDArray[Any]]) -> None:
    """Write true and predicted classes of the test images to a ``.npz`` file.

    Parameters
    ----------
    path
        The file. It is written atomically.
    truth
        int (images,), stored as ``truth``.
    predicted
        int (images,), stored under the name of the protocol.
    """
    path.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {"truth": truth, **predicted}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

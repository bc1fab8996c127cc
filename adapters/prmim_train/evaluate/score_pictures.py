"""Pictures of a classifier: confusion matrix and learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_train.report.figures import new_figure, plain_text, save_figure

MOST_DRAWN = 1000  # number of classes above which cells would be invisible
MOST_NAMED = 40  # number of classes up to which names fit next to the matrix
MOST_NUMBERED = 20  # number of classes up to which a cell fits a number
TRAIN_COLOUR = "#1f2933"
TEST_COLOUR = "#e07b28"


def draw_confusion(
    path: Path, truth: NDArray[Any], predicted: NDArray[Any], class_names: Sequence[str], title: str
) -> bool:
    """Draw the confusion matrix, normalized over each true class.

    Parameters
    ----------
    path
        The `.png` file.
    truth, predicted
        int (images,).
    class_names
        Name of every class.
    title
        Title of the picture.

    Returns
    -------
    bool
        Whether a picture was drawn: only for up to 1,000 classes.
    """
    from sklearn.metrics import confusion_matrix

    count = len(class_names)
    if count > MOST_DRAWN:
        return False
    matrix = confusion_matrix(truth, predicted, labels=np.arange(count))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 3.2 + 0.22 * count)
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    # aspect="auto": with square cells, long names would push the axis label out of the picture.
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    if count <= MOST_NAMED:
        names = [plain_text(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    if count <= MOST_NUMBERED:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "#1f2933"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=6, color=colour)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, fraction=0.046)
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)
    return True


def draw_learning(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss and accuracy on training and test images over the epochs.

    Parameters
    ----------
    path
        The `.png` file.
    records
        Lines of `metrics.jsonl`.
    """
    figure = new_figure(6.4, 5.0)
    axes = figure.subplots(2, 1, sharex=True)
    for plot, name, factor in zip(axes, ("loss", "accuracy"), (1.0, 100.0), strict=True):
        for key, label, colour, marker in (
            (name, "training images, augmented", TRAIN_COLOUR, None),
            (f"test_{name}", "test images", TEST_COLOUR, "o"),
        ):
            known = [record for record in records if record.get(key) is not None and "epoch" in record]
            points = [(record["epoch"], factor * record[key]) for record in known]
            if points:
                plot.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=3)
        plot.set_ylabel("loss" if name == "loss" else "accuracy in %")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].set_xlabel("epoch")
    figure.align_ylabels(list(axes))
    save_figure(figure, path)

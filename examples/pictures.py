"""Pictures of the examples: columns of small images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HIDDEN = (0.90, 0.91, 0.93)
"""Colour of pixels without a value."""


def draw_columns(path: Path, columns: Mapping[str, Any], colours: str = "gray_r") -> None:
    """Draw columns of images under their titles.

    Parameters
    ----------
    path
        The file.
    columns
        Images by title: grey (rows, height, width), with NaN for hidden pixels, or RGB (rows, height, width, 3).
    colours
        Colour map of the grey images.
    """
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.3 * len(columns), 1.2 * rows + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for place, (title, images) in enumerate(columns.items()):
        grid[0, place].set_title(title, fontsize=9)
        for axes, image in zip(grid[:, place], np.asarray(images), strict=True):
            axes.set_facecolor(HIDDEN)
            axes.imshow(image, cmap=colours, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Picture: {path}")

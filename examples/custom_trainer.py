"""Shared code of the custom trainers: digits, schedule and picture."""

from pathlib import Path

import numpy as np
from pictures import draw_columns
from sklearn.datasets import load_digits

from prmim_core import Grid, Schedule, count_tokens

GRID = Grid((8, 8))
"""A token is one pixel of a digit."""
SCHEDULE = Schedule(GRID, count_tokens(64, mask_ratio=0.75, throw_ratio=0.5))
"""Numbers of tokens and strategy: static, for both frameworks."""


def read_pixels(num_train: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out digits, float32 (digits, 64, 1) in [0, 1]."""
    pixels = np.float32(load_digits().data / 16)[..., None]
    return pixels[:num_train], pixels[num_train:]


def draw(path: Path, pixels: np.ndarray, predicted: np.ndarray, order: np.ndarray, rows: int = 5) -> None:
    """Draw input, visible, decoded and thrown tokens, and all of them together.

    Parameters
    ----------
    path
        The file.
    pixels
        (batch, 64, 1).
    predicted
        Predictions of the masked tokens (batch, masked, 1).
    order
        Order of the plan (batch, 64).
    rows
        Number of digits to draw.
    """
    counts = SCHEDULE.counts
    known = np.take_along_axis(pixels[:rows, :, 0], order[:rows, : counts.visible], axis=1)
    values = np.concatenate([known, predicted[:rows, :, 0]], axis=1)  # in the order of the plan
    rank = np.argsort(order[:rows], axis=1)  # position of each token in that order
    parts = {
        f"visible: {counts.visible}": (0, counts.visible),
        f"decoded: {counts.decoded}": (counts.visible, counts.visible + counts.decoded),
        f"thrown: {counts.thrown}": (counts.visible + counts.decoded, 64),
        "visible + predicted": (0, 64),
    }
    columns = {"input": pixels[:rows, :, 0]}
    for title, (start, stop) in parts.items():
        is_part = (rank >= start) & (rank < stop)
        columns[title] = np.where(is_part, np.take_along_axis(values, rank, axis=1), np.nan)
    draw_columns(path, {title: column.reshape(rows, *GRID.shape) for title, column in columns.items()})

"""Building blocks of pictures: figures, images, token maps and captions.

matplotlib is imported only when a picture is drawn.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, unpatchify
from prmim_methods.weight_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIDDEN = (0.90, 0.91, 0.93)
DOTS_PER_INCH = 150
WIDE = 2.5
"""Ratio of width to height above which an image is wide, and below whose inverse it is tall."""
PAGE_WIDTH = 12.0
TALLEST = 5.0
GAP = 0.3
"""Inches: the width of a large picture, the height of a tall image, and the gap between two samples in a row."""
SHORT = 10
"""Characters that fit above a tall image."""


def to_rgb(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert to three channels.

    Repeats the first of one or two channels; otherwise takes the first three.
    """
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def shown_channels(channels: int) -> str:
    """Describe the channels that `to_rgb` shows; empty if it shows all of them.

    Examples
    --------
    >>> shown_channels(13)
    'The first three of 13 channels are shown, as red, green and blue.'
    """
    if channels == 2:
        return "The first of two channels is shown, in grey."
    return f"The first three of {channels} channels are shown, as red, green and blue." if channels > 3 else ""


def frames_in_a_row(values: NDArray[Any], fill: float) -> NDArray[Any]:
    """Put the frames of clips side by side, with gaps of a given value.

    From (batch, frames, height, width, ...) to (batch, height, total width, ...). A gap of this value separates them.
    """
    gap = max(1, values.shape[3] // 16)
    pads = [(0, 0)] * values.ndim
    pads[3] = (0, gap)
    padded = np.pad(values, pads, constant_values=fill)
    return np.concatenate([*np.moveaxis(padded, 1, 0)], axis=2)[:, :, :-gap]


def token_pixels(is_token: NDArray[np.bool_], patch_size: tuple[int, ...], grid: Grid) -> NDArray[np.bool_]:
    """Convert a token mask (batch, N) to a pixel mask.

    The result is (batch, [frames,] height, width, 1).
    """
    patches = np.broadcast_to(is_token[..., None], (*is_token.shape, int(np.prod(patch_size))))
    pixels: NDArray[np.bool_] = unpatchify(patches, patch_size, grid)
    return pixels


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty figure without a window. Sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_axes(
    samples: int, panels: int, aspect: float, *, side: float, extra: float
) -> tuple["Figure", NDArray[np.object_]]:
    """Create a figure with a row of panels for each sample.

    The layout suits images of all proportions. Samples are stacked, with their panels side by side. Panels of wide
    images are stacked, too. Samples of tall images are placed side by side, as many as fit.

    Parameters
    ----------
    samples, panels
        Number of samples, and of panels per sample.
    aspect
        Width over height of a panel.
    side
        Inches of a side of a square panel.
    extra
        Inches above and below all panels.

    Returns
    -------
    Figure, array of Axes (samples, panels)
    """
    if aspect > WIDE:
        figure = new_figure(max(6.0, min(PAGE_WIDTH, 0.9 * aspect)), samples * panels * 1.15 + extra)
        return figure, figure.subplots(samples * panels, 1, squeeze=False).reshape(samples, panels)
    if aspect >= 1 / WIDE:
        size = panels * side * max(1.0, aspect), samples * side * max(1.0, 1 / aspect) + extra
        figure = new_figure(*size)
        return figure, figure.subplots(samples, panels, squeeze=False)
    width = max(0.8, TALLEST * aspect)
    fitting = min(samples, max(1, int(PAGE_WIDTH / (panels * width + GAP))))
    rows = -(-samples // fitting)
    figure = new_figure(fitting * (panels * width + GAP), rows * (TALLEST + 0.4) + extra)
    axes = figure.subplots(
        rows, fitting * (panels + 1), squeeze=False, width_ratios=([width] * panels + [GAP]) * fitting
    ).reshape(rows * fitting, panels + 1)
    for unused in (*axes[:, -1], *axes[samples:, :-1].ravel()):
        unused.set_axis_off()
    return figure, axes[:samples, :-1]


def show_image(axes: "Axes", image: NDArray[np.float64]) -> None:
    """Show an RGB image in [0, 1] without axes, with its upper left corner at (0, 0)."""
    height, width = image.shape[:2]
    axes.imshow(image, interpolation="nearest", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_axis_off()


def wrapped(title: str, aspect: float) -> str:
    r"""Break a title into short lines if it stands above a tall image.

    Examples
    --------
    >>> wrapped("visible + predicted", 0.1)
    'visible +\npredicted'
    """
    return "\n".join(textwrap.wrap(title, SHORT)) if aspect < 1 / WIDE else title


def label_row(axes: "Axes", text: str) -> None:
    """Write a label to the left of an image."""
    axes.text(-0.01, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=9)


def draw_cells(axes: "Axes", height: int, width: int) -> None:
    """Draw thin lines between tokens.

    Large grids get none: lines would cover the content.
    """
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if max(height, width) <= 32:
        axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)


def plain_text(text: str) -> str:
    r"""Escape text for matplotlib, which would parse text between two $ as a formula.

    Examples
    --------
    >>> plain_text("a$b$c")
    'a\\$b\\$c'
    """
    return text.replace("$", r"\$")


def write_caption(figure: "Figure", text: str) -> None:
    """Write a caption below the figure."""
    characters = max(40, int(figure.get_figwidth() * 16))  # per line, in an 8 point font
    figure.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=8, color="#52606d")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure atomically, in the format of the file's suffix."""
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=DOTS_PER_INCH))

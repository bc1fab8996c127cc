"""What the pictures share: figures without a window, images and maps of tokens, captions.

matplotlib is imported only when a picture is drawn.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, unpatchify
from prmim_train.run_directory import temporary_sibling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIDDEN = (0.90, 0.91, 0.93)
DOTS_PER_INCH = 150


def to_rgb(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make three channels of any number: grey is repeated, of more than three the first three are taken."""
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def token_mask(index: NDArray[Any], num_tokens: int) -> NDArray[np.bool_]:
    """Turn tokens (batch, n) into a mask (batch, num_tokens)."""
    mask = np.zeros((len(index), num_tokens), dtype=bool)
    np.put_along_axis(mask, np.asarray(index, dtype=np.int64), True, axis=1)
    return mask


def token_pixels(is_token: NDArray[np.bool_], patch_size: tuple[int, ...], grid: Grid) -> NDArray[np.bool_]:
    """Turn a mask of tokens (batch, N) into one of pixels (batch, height, width, 1)."""
    patches = np.broadcast_to(is_token[..., None], (*is_token.shape, int(np.prod(patch_size))))
    pixels: NDArray[np.bool_] = unpatchify(patches, patch_size, grid)
    return pixels


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, sizes in inches, that needs no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def show_image(axes: "Axes", image: NDArray[np.float64]) -> None:
    """Show an RGB image in [0, 1], nothing around it; its upper left corner lies at (0, 0)."""
    height, width = image.shape[:2]
    axes.imshow(image, interpolation="nearest", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_axis_off()


def draw_cells(axes: "Axes", height: int, width: int) -> None:
    """Draw thin lines between the tokens, unless there are so many that lines would be all one sees."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if max(height, width) <= 32:
        axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)


def write_caption(figure: "Figure", text: str) -> None:
    """Write a few lines below everything else."""
    characters = max(40, int(figure.get_figwidth() * 16))  # of an 8 point font fit into the width
    figure.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=8, color="#52606d")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure whole or not at all."""
    with temporary_sibling(path) as sibling:
        figure.savefig(sibling, dpi=DOTS_PER_INCH)

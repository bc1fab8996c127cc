"""Pictures of predicted and target features: maps of cosine similarities."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, is_member
from prmim_methods import MethodConfig
from prmim_methods.encoder import times
from prmim_methods.outputs import Comparison
from prmim_train.report.figures import (
    HIDDEN,
    TALLEST,
    new_figure,
    save_figure,
    show_image,
    shown_channels,
    to_rgb,
    token_pixels,
    write_caption,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

QUERY_COLOUR = "#e63946"
HATCH_COLOUR = "#b8bec6"


@dataclass(frozen=True)
class SimilarityMaps:
    """Cosine similarities per token, in raster order.

    NaN for tokens without a student feature.

    Parameters
    ----------
    query
        Token that the others are compared with, int (batch,).
    teacher, student
        Similarity of each token to the query, within the teacher and within the student: float (batch, N).
    agreement
        Similarity of student and teacher at the same token, float (batch, N).
    is_visible
        Tokens visible to the student, bool (batch, N).
    """

    query: NDArray[np.int64]
    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    agreement: NDArray[np.float64]
    is_visible: NDArray[np.bool_]


def similarity_maps(comparison: Comparison) -> SimilarityMaps:
    """Compute the maps of `similarity.png`.

    The query is the visible token nearest to the centre: photographs show their subject there. If visible tokens have
    no student feature, the query is the nearest token with one.

    Parameters
    ----------
    comparison
        Features of student and teacher.

    Returns
    -------
    SimilarityMaps
    """
    schedule, order = comparison.schedule, np.asarray(comparison.order)
    is_visible = is_member(order[:, : schedule.counts.visible], schedule.counts.num_tokens)
    has_feature = np.isfinite(comparison.student).all(-1)
    query = central_token(schedule.grid, has_feature & (is_visible | ~(has_feature & is_visible).any(1, keepdims=True)))
    student, teacher = _unit_length(comparison.student), _unit_length(comparison.teacher)
    rows = np.arange(len(order))
    return SimilarityMaps(
        query,
        teacher=np.einsum("bnd,bd->bn", teacher, teacher[rows, query]),
        student=np.einsum("bnd,bd->bn", student, student[rows, query]),
        agreement=np.einsum("bnd,bnd->bn", student, teacher),
        is_visible=is_visible,
    )


def central_token(grid: Grid, is_candidate: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the candidate nearest to the centre of each image.

    Ties go to the first in raster order.

    Parameters
    ----------
    grid
        Grid of the tokens.
    is_candidate
        bool (batch, N), at least one True in every row.

    Returns
    -------
    array
        int64 (batch,).

    Examples
    --------
    >>> central_token(Grid((3, 3)), np.array([[True] * 9, [True] + [False] * 8])).tolist()
    [4, 0]
    """
    centre = (np.asarray(grid.shape) - 1) / 2
    positions = np.stack(np.unravel_index(np.arange(grid.num_tokens), grid.shape), axis=1)
    distance = np.sum((positions - centre) ** 2, axis=1)
    return np.asarray(np.argmin(np.where(is_candidate, distance, np.inf), axis=1), dtype=np.int64)


def draw_similarity(path: Path, images: NDArray[Any], comparison: Comparison, method: MethodConfig) -> None:
    """Draw one row per image: input, visible tokens, and maps of feature similarity.

    Parameters
    ----------
    path
        The `.png` file.
    images
        (batch, height, width, channels), values from 0 to 255.
    comparison
        Features of student and teacher.
    method
        Options of the method. It names the features.
    """
    patch_size, (student, teacher) = method.patch_size, method.compared
    maps = similarity_maps(comparison)
    grid = comparison.schedule.grid
    rows, height, width = images.shape[:3]
    pixels = to_rgb(images / 255.0)
    seen = np.where(token_pixels(maps.is_visible, patch_size, grid), pixels, HIDDEN)
    panel_width = 1.6 * max(1.0, (width / height) ** 0.5)  # wide images get flat panels; titles need some width
    panel_height = min(TALLEST, panel_width * height / width)
    figure = new_figure(5 * panel_width + 0.6, rows * (panel_height + 0.2) + 1.3)
    places = figure.add_gridspec(rows + 1, 5, height_ratios=[*[panel_height] * rows, 0.1])
    axes = np.array([[figure.add_subplot(places[row, column]) for column in range(5)] for row in range(rows)])
    titles = ["input and query", f"visible: {comparison.schedule.counts.visible}"]
    titles += [f"{teacher} vs. query", f"{student} vs. query", f"{student} vs. {teacher}"]
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title, fontsize=9)
    likeness = {"cmap": "viridis", "vmin": _lower_end(maps.teacher, maps.student)}
    agreement = {"cmap": "magma", "vmin": _lower_end(maps.agreement)}
    for row in range(rows):
        show_image(axes[row, 0], pixels[row])
        show_image(axes[row, 1], seen[row])
        to_query = _show_map(axes[row, 2], maps.teacher[row].reshape(grid.shape), (height, width), likeness)
        _show_map(axes[row, 3], maps.student[row].reshape(grid.shape), (height, width), likeness)
        to_teacher = _show_map(axes[row, 4], maps.agreement[row].reshape(grid.shape), (height, width), agreement)
        for column in (0, 2, 3):
            _frame_token(axes[row, column], int(maps.query[row]), grid, patch_size)
        axes[row, 4].set_xlabel(_mean_text(maps.agreement[row], maps.is_visible[row]), fontsize=8, labelpad=2)
    for shown, place, label in (
        (to_query, places[-1, 2:4], "cosine with the query"),
        (to_teacher, places[-1, 4], f"cosine with the {teacher}"),
    ):
        bar = figure.colorbar(shown, cax=figure.add_subplot(place), orientation="horizontal")
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7.5)
        bar.ax.locator_params(nbins=4)
    write_caption(figure, _caption_text(comparison, maps.is_visible[0], method))
    save_figure(figure, path)


def _unit_length(features: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = np.asarray(features, dtype=np.float64)
    # A feature of norm 0 has similarity 0 to all features, including itself.
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))


def _lower_end(*maps: NDArray[np.float64]) -> float:
    """Lower end of the colour scale.

    The first percentile, rounded down to a multiple of 0.1.
    """
    values = np.concatenate([part[np.isfinite(part)] for part in maps])
    return float(np.clip(np.floor(10 * np.percentile(values, 1)) / 10, -1.0, 0.9))


def _show_map(
    axes: "Axes", values: NDArray[np.float64], image_size: tuple[int, int], colours: Mapping[str, Any]
) -> "AxesImage":
    """Show a map of tokens at the size of the image.

    Tokens without a value are hatched.
    """
    from matplotlib.patches import Rectangle

    height, width = image_size
    axes.add_patch(
        Rectangle((0, 0), width, height, facecolor=HIDDEN, edgecolor=HATCH_COLOUR, hatch="////", linewidth=0)
    )
    shown = axes.imshow(
        np.ma.masked_invalid(values),
        vmax=1.0,
        extent=(0, width, height, 0),
        interpolation="nearest",
        zorder=2,
        **colours,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return shown


def _frame_token(axes: "Axes", token: int, grid: Grid, patch_size: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    row, column = divmod(token, grid.shape[1])
    height, width = patch_size
    place = (column * width, row * height)
    axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor="white", linewidth=2.6, zorder=3))
    axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor=QUERY_COLOUR, linewidth=1.5, zorder=4))


def _mean_text(agreement: NDArray[np.float64], is_visible: NDArray[np.bool_]) -> str:
    has_value = np.isfinite(agreement)
    parts = {"visible": agreement[is_visible & has_value], "masked": agreement[~is_visible & has_value]}
    return ", ".join(f"{name} {values.mean():.2f}" for name, values in parts.items() if values.size)


def _caption_text(comparison: Comparison, is_visible: NDArray[np.bool_], method: MethodConfig) -> str:
    has_feature = np.isfinite(comparison.student[0]).all(-1)
    shown = "visible" if has_feature[is_visible].any() else "predicted"
    parts = [
        f"{method.compared_text} {comparison.teacher.shape[-1]} numbers for each of the "
        f"{times(comparison.schedule.grid.shape)} tokens. The query (red frame) is the {shown} token nearest to the "
        "centre."
    ]
    hatched = {"visible": int((is_visible & ~has_feature).sum()), "masked": int((~is_visible & ~has_feature).sum())}
    if any(hatched.values()):
        counted = " and ".join(f"{number} {kind}" for kind, number in hatched.items() if number)
        parts.append(f"Hatched: {counted} tokens, which this method does not predict.")
    parts += ["Numbers below the last column are its means.", shown_channels(method.channels)]
    return " ".join(filter(None, parts))

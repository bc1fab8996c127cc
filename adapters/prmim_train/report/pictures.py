"""Pictures of a run: reconstructions, sampling and loss curves."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, Schedule, nearest_known_distance, patchify, unpatchify
from prmim_methods import PixelConfig
from prmim_methods.encoder import times
from prmim_methods.files import expanded
from prmim_methods.outputs import Reconstruction
from prmim_train.config.packages import check_installed
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.depth import in_8_bit_range
from prmim_train.data.sources import ImageSource, UnreadableImageError
from prmim_train.data.three_axes import read_center
from prmim_train.report.figures import (
    HIDDEN,
    WIDE,
    draw_cells,
    frames_in_a_row,
    label_row,
    new_figure,
    panel_axes,
    save_figure,
    show_image,
    shown_channels,
    to_rgb,
    token_pixels,
    wrapped,
    write_caption,
)
from prmim_train.report.similarity import draw_similarity
from prmim_train.run.directory import METRICS, RunDirectory
from prmim_train.run.engine import Engine
from prmim_train.run.prepare import RunData, open_run_data, read_run_config, restore_engine
from prmim_train.run.processes import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("reconstructions", "similarity", "schedule", "loss")
KINDS_OF = {
    "pixels": ("reconstructions", "schedule", "loss"),
    "features": ("similarity", "schedule", "loss"),
}
"""Kinds of pictures by the targets of the method."""

BAR = 0.8
"""Width of the colour bar, in inches."""
SHOWN_LAYERS = 8
"""Maximum number of token layers of a clip or a volume in pictures of reconstructions."""

MAX_WIDTH = 16
"""Maximum width, in inches, of clips and volumes side by side."""

NOT_PREDICTED = (0.98, 0.84, 0.68)
VISIBLE_COLOUR = "#3d4651"
DECODED_COLOUR = "#e07b28"

# Metric to label, colour and width of its curve. Other losses get a default colour of matplotlib.
LOSS_CURVES: dict[str, tuple[str, str | None, float]] = {
    "loss": ("all supervised tokens", "#1f2933", 1.8),
    "loss_visible": ("visible", "#7a5195", 1.0),
    "loss_decoded": ("decoded", DECODED_COLOUR, 1.0),
    "loss_thrown": ("thrown", "#3a8fb7", 1.0),
    "loss_cells": ("cells of other tokens", "#d4a017", 1.0),
}

CELL_NORM_AREAS = {"image": "the true image", "window": "the true patch and its neighbours", "none": None}
"""Area whose statistics normalize predicted cells, by the option `cell_norm`."""

PROBE_CURVES = {"probe_knn": ("nearest neighbours", "#7cb518"), "probe_linear": ("linear probe", "#386641")}


def draw_run(run: RunDirectory, config: PretrainConfig, data: RunData, engine: Engine) -> list[Path]:
    """Draw all pictures of a run into its folder.

    Parameters
    ----------
    run
        The run.
    config
        Options of the run. Shows `config.pictures` images.
    data
        Images of the run. Shows held-out images, if there are any.
    engine
        The trained engine.

    Returns
    -------
    list of Path
        Files written.
    """
    return draw_images(run, config, data, engine) + (draw_curve(run) if engine.rank == 0 else [])


def draw_images(
    run: RunDirectory, config: PretrainConfig, data: RunData, engine: Engine, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Draw predictions and sampling, from the same images and masks.

    Predicted pixels go to `reconstructions.png`, predicted features to `similarity.png`.

    Parameters
    ----------
    run, config, data, engine
        As for `draw_run`.
    kinds
        Subset of `KINDS`. Kinds that the method does not have are ignored.

    Returns
    -------
    list of Path
        Files written. Empty in all but the main process.

    Raises
    ------
    ValueError
        If no image can be read.
    """
    shown = data.held_out if len(data.held_out) else data.train
    if not len(data.held_out):
        say("No images are held out: the pictures show training images.")
    images, sample = _read_some(data.source, shown, max(1, config.pictures), config.method.image_size)
    pixels = in_8_bit_range(images, config.method.pixel_range)
    paths = []
    if engine.rank > 0:  # only the main process draws, but all processes must compute
        kinds = ()
    if isinstance(config.method, PixelConfig):
        attention = engine.attention(images) if config.method.needs_weights else None
        reconstruction = engine.reconstruct(images, sample)
        order, schedule = reconstruction.order, reconstruction.schedule
        if "reconstructions" in kinds:
            paths.append(run.path / "reconstructions.png")
            draw_reconstructions(paths[-1], pixels, reconstruction, config.method)
    else:
        attention, comparison = None, engine.compare(images, sample)
        order, schedule = comparison.order, comparison.schedule
        if "similarity" in kinds:
            paths.append(run.path / "similarity.png")
            draw_similarity(paths[-1], pixels, comparison, config.method)
    if "schedule" in kinds:
        paths.append(run.path / "schedule.png")
        is_reconstructed = config.method.is_reconstructed
        draw_schedule(
            paths[-1],
            np.asarray(order),
            schedule,
            patch_size=config.method.patch_size,
            is_reconstructed=is_reconstructed,
            attention=attention,
        )
    return paths


def draw_curve(run: RunDirectory) -> list[Path]:
    """Draw `loss.png`, if at least two steps are logged. Returns the files written."""
    records = [record for record in run.read_metrics() if {"epoch", "loss"} <= record.keys()]
    if len(records) < 2:
        return []
    draw_loss(run.path / "loss.png", records)
    return [run.path / "loss.png"]


def picture_command(
    run: str,
    *,
    kind: str | None = None,
    allow_changes: bool = False,
    **options: Any,
) -> None:
    """Draw pictures of the last checkpoint into the run directory, and print paths.

    Parameters
    ----------
    run
        Folder of the run.
    kind
        One of `KINDS`. None: all kinds of the method.
    allow_changes
        See `prmim_train.run.prepare.open_run_data`.
    **options
        Options that replace those of the run.

    Raises
    ------
    ValueError
        If the kind is unknown or does not apply to the method, or there is nothing to draw.
    FileNotFoundError
        If there is no run or no checkpoint.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected {' or '.join(KINDS)}, got {kind!r}")
    check_installed("pictures", "matplotlib")
    kinds = KINDS if kind is None else (kind,)
    directory = RunDirectory.open(expanded(run))
    paths = draw_curve(directory) if "loss" in kinds else []
    if kind != "loss":
        config = read_run_config(directory, **options)
        method = config.method
        if kind is not None and kind not in KINDS_OF[method.predicts]:
            expected = " or ".join(KINDS_OF[method.predicts])
            raise ValueError(f"kind: expected {expected} of a run of method {method.name}, got {kind!r}")
        images = open_run_data(directory, config, allow_changes=allow_changes)
        with closing(restore_engine(directory, config, images.budget)) as engine:
            paths = draw_images(directory, config, images, engine, kinds) + paths
    if not paths:
        raise ValueError(f"run: expected at least two lines in {directory.path / METRICS} to draw a curve")
    for path in paths:
        print(f"Picture: {path}")


def draw_reconstructions(path: Path, images: NDArray[Any], reconstruction: Reconstruction, method: PixelConfig) -> None:
    """Draw one row per image: input, visible, decoded, thrown, and all tokens.

    For a clip or a volume, each panel is a row of frames or slices, one per layer of tokens, at most 8.

    Parameters
    ----------
    path
        The `.png` file.
    images
        (batch, [frames,] height, width, channels), values from 0 to 255.
    reconstruction
        Reconstruction of the images.
    method
        Options of the method. The caption explains its targets.
    """
    schedule = reconstruction.schedule
    columns = reconstruction_panels(images, reconstruction, method.patch_size)
    titles = {
        "input": "input",
        "visible": f"visible: {schedule.counts.visible}",
        "decoded": f"decoded: {schedule.counts.decoded}",
        "thrown": f"thrown: {schedule.counts.thrown}",
        "whole": "visible + predicted",
    }
    if images.ndim == 5:
        figure = _draw_stacks(columns, titles, shown_frames(images.shape[1], method.patch_size[0]))
    else:
        figure = _draw_panels(columns, titles)
    write_caption(figure, _reconstruction_caption(method))
    save_figure(figure, path)


def _draw_panels(columns: Mapping[str, NDArray[np.float64]], titles: Mapping[str, str]) -> "Figure":
    """Draw one row per image."""
    rows, height, width = columns["input"].shape[:3]
    aspect = width / height
    figure, axes = panel_axes(rows, len(columns), aspect, side=1.45, extra=0.75)
    for column, (name, panels) in enumerate(columns.items()):
        for row in range(rows):
            show_image(axes[row, column], panels[row])
            if row == 0 or not 1 / WIDE <= aspect <= WIDE:
                axes[row, column].set_title(wrapped(titles[name], aspect), fontsize=9)
    return figure


def _draw_stacks(
    columns: Mapping[str, NDArray[np.float64]], titles: Mapping[str, str], shown: Sequence[int]
) -> "Figure":
    """Draw a block of rows per clip or volume, each a row of the shown frames."""
    strips = {name: frames_in_a_row(panels[:, shown], 1.0) for name, panels in columns.items()}
    blocks, total, height, width, _ = columns["input"].shape
    panel = 0.95
    across, down = 1.4 + len(shown) * panel * max(1.0, width / height), 0.3 + len(strips) * panel * 1.05
    side_by_side = max(1, min(blocks, int(MAX_WIDTH // across)))
    lines = -(-blocks // side_by_side)
    figure = new_figure(side_by_side * across, lines * down + 0.6)
    parts = np.ravel(figure.subfigures(lines, side_by_side, squeeze=False))
    for block, part in enumerate(parts[:blocks]):
        axes = part.subplots(len(strips), 1, squeeze=False)[:, 0]
        for row, (name, strip) in enumerate(strips.items()):
            show_image(axes[row], strip[block])
            axes[row].set_anchor("E")  # all remaining space is for the label
            label_row(axes[row], titles[name].replace(", ", ",\n").replace(" + ", " +\n"))
        step = strips["input"].shape[2] / len(shown)
        for place, frame in enumerate(shown):
            text = f"{frame + 1} of {total}" if place == 0 else str(frame + 1)
            axes[0].text((place + 0.5) * step, -0.04 * height, text, ha="center", va="bottom", fontsize=8)
    return figure


def shown_frames(number: int, thickness: int) -> list[int]:
    """Return the middle frame or slice of up to 8 evenly spaced layers of tokens.

    Parameters
    ----------
    number
        Frames of the clip, or slices of the volume.
    thickness
        Frames of a token.

    Examples
    --------
    >>> shown_frames(96, 16), shown_frames(16, 1)
    ([8, 24, 40, 56, 72, 88], [1, 3, 5, 7, 9, 11, 13, 15])
    """
    layers = number // thickness
    count = min(layers, SHOWN_LAYERS)
    return [((2 * k + 1) * layers // (2 * count)) * thickness + thickness // 2 for k in range(count)]


def reconstruction_panels(
    images: NDArray[Any], reconstruction: Reconstruction, patch_size: tuple[int, ...]
) -> dict[str, NDArray[np.float64]]:
    """Columns of the picture of reconstructions.

    Parameters
    ----------
    images
        (batch, [frames,] height, width, channels), values from 0 to 255.
    reconstruction
        Reconstruction of the images.
    patch_size
        Pixels of a patch along each axis.

    Returns
    -------
    dict
        Column name to RGB images, float (batch, [frames,] height, width, 3) in [0, 1]. Without the column `thrown` if
        no tokens are thrown.
    """
    schedule = reconstruction.schedule
    kinds = token_kinds(np.asarray(reconstruction.order), schedule)
    inputs = patchify(images / 255.0, patch_size)
    predicted = np.clip(reconstruction.patches.astype(np.float64), 0.0, 1.0)

    def paint(patches: NDArray[np.float64], is_shown: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Show some tokens.

        Hidden tokens and tokens without a prediction have one colour each.
        """
        pixels = to_rgb(unpatchify(patches, patch_size, schedule.grid))
        pixels = np.where(np.isnan(pixels), NOT_PREDICTED, pixels)
        return np.where(token_pixels(is_shown, patch_size, schedule.grid), pixels, HIDDEN)

    is_visible = kinds == 0
    everything = np.ones(kinds.shape, dtype=bool)
    panels = {
        "input": paint(inputs, everything),
        "visible": paint(inputs, is_visible),
        "decoded": paint(predicted, kinds == 1),
        "thrown": paint(predicted, kinds >= 2),
        "whole": paint(np.where(is_visible[..., None], inputs, predicted), everything),
    }
    if schedule.counts.thrown == 0:
        del panels["thrown"]
    return panels


def draw_schedule(
    path: Path,
    order: NDArray[Any],
    schedule: Schedule,
    *,
    patch_size: tuple[int, ...] | None = None,
    is_reconstructed: bool = True,
    attention: NDArray[np.floating[Any]] | None = None,
) -> None:
    """Draw the roles of tokens, and the distances of thrown to known tokens.

    Parameters
    ----------
    path
        The `.png` file.
    order
        Order of the tokens, int (batch, N).
    schedule
        Static boundaries of `order`.
    patch_size
        Pixels of a patch along each axis, so that tokens have its proportions. None: squares.
    is_reconstructed
        Whether thrown tokens are reconstructed in stages. Otherwise they are shown as one group.
    attention
        Attention maps that weighted the sampling, float (batch, N) in [0, 1], drawn in a third row. None: no third row.
    """
    from matplotlib.colors import ListedColormap

    grid, counts = schedule.grid, schedule.counts
    kinds = token_kinds(order, schedule)
    distance = np.sqrt(nearest_known_distance(grid, kinds <= 1))
    names, colours = role_colours(schedule, is_reconstructed=is_reconstructed)
    kinds = np.minimum(kinds, len(names) - 1)

    columns = len(order)
    kind_maps, distance_maps = (_token_maps(values, grid) for values in (kinds, distance))
    height, width = kind_maps.shape[1:]
    panel = 1.7
    rows = 2 if attention is None else 3
    stretch = 1.0 if patch_size is None else patch_size[-2] / patch_size[-1]
    aspect = width / (height * stretch)
    is_usual = 1 / WIDE <= aspect <= WIDE
    if is_usual:
        size = columns * panel * max(1.0, aspect) + 0.7, rows * panel * max(1.0, 1 / aspect) + 1.1
        figure = new_figure(*size)
        axes = figure.subplots(rows, columns, squeeze=False)
    else:
        figure, axes = panel_axes(columns, rows, aspect, side=panel, extra=1.1)
        figure.set_figwidth(figure.get_figwidth() + BAR)
        axes = axes.T
    colour_map = ListedColormap(colours)
    for column in range(columns):
        top, bottom = axes[:2, column]
        top.imshow(kind_maps[column], cmap=colour_map, vmin=-0.5, vmax=len(colours) - 0.5, aspect=stretch)
        draw_cells(top, height, width)
        top.set_title(f"image {column + 1}", fontsize=9)
        shown = bottom.imshow(
            distance_maps[column], cmap="YlGnBu", vmin=0, vmax=max(2.0, float(distance.max())), aspect=stretch
        )
        draw_cells(bottom, height, width)
        bottom.set_title(wrapped(f"largest distance: {distance[column].max():.2f}", aspect), fontsize=8)
        if attention is not None:
            values = _token_maps(attention, grid)[column]
            axes[2, column].imshow(values, cmap="magma", vmin=0, vmax=1, aspect=stretch)
            draw_cells(axes[2, column], height, width)
            axes[2, column].set_title(wrapped("attention, 0 to 1", aspect), fontsize=8)
    where = {"ax": axes[1].tolist()} if is_usual else {"ax": axes.ravel().tolist(), "shrink": 0.6, "aspect": 30}
    bar = figure.colorbar(shown, fraction=0.05, pad=0.02, **where)
    bar.set_label(f"distance to the nearest\n{'visible or decoded' if counts.decoded else 'visible'} token", fontsize=8)
    bar.ax.locator_params(nbins=4)
    bar.ax.tick_params(labelsize=8)
    draw_roles(figure, names, colours)
    if grid.axes == 3:
        write_caption(figure, "A row shows the layers of tokens along the first axis, from its start to its end.")
    save_figure(figure, path)


def role_colours(schedule: Schedule, *, is_reconstructed: bool) -> tuple[list[str], list[str]]:
    """Labels, with numbers of tokens, and colours of the kinds of `token_kinds`.

    Parameters
    ----------
    schedule
        Static boundaries of a plan.
    is_reconstructed
        Whether thrown tokens are reconstructed in stages. Otherwise the last label covers all thrown tokens.
    """
    counts = schedule.counts
    names = [f"visible: {counts.visible}", f"decoded: {counts.decoded}"]
    if is_reconstructed:
        names += [f"stage {stage}: {size}" for stage, size in enumerate(schedule.stage_sizes, start=1) if size]
    elif counts.thrown:
        names.append(f"thrown: {counts.thrown}")
    return names, [VISIBLE_COLOUR, DECODED_COLOUR, *_stage_colours(len(names) - 2)]


def draw_roles(figure: "Figure", names: Sequence[str], colours: Sequence[str]) -> None:
    """Draw a legend above a figure, without roles that no token has."""
    from matplotlib.patches import Patch

    legend = [pair for pair in zip(names, colours, strict=True) if not pair[0].endswith(": 0")]
    handles = [Patch(facecolor=colour, label=name) for name, colour in legend]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)


def _token_maps(values: NDArray[Any], grid: Grid) -> NDArray[np.float64]:
    """Arrange values of tokens (batch, N) as maps (batch, height, width).

    Frames are side by side, with NaN in between.
    """
    if grid.axes == 3:
        return frames_in_a_row(values.astype(np.float64).reshape(-1, *grid.shape), np.nan)
    return values.astype(np.float64).reshape(len(values), -1, grid.shape[-1])


def token_kinds(order: NDArray[Any], schedule: Schedule) -> NDArray[np.int64]:
    """Role of each token in raster order.

    0 is visible, 1 decoded, 2 first stage, 3 second stage, ...

    Parameters
    ----------
    order
        Order of the tokens, int (batch, N).
    schedule
        Static boundaries of `order`.

    Returns
    -------
    array
        int64 (batch, N).
    """
    counts = schedule.counts
    sizes = [counts.visible, counts.decoded, *(size for size in schedule.stage_sizes if size)]
    in_plan_order = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    kinds = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(kinds, np.asarray(order, dtype=np.int64), np.broadcast_to(in_plan_order, order.shape), axis=1)
    return kinds


def draw_loss(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss, learning rate and any online probes over the epochs.

    Parameters
    ----------
    path
        The `.png` file.
    records
        Lines of `metrics.jsonl`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    epochs = [record["epoch"] for record in records]
    figure = new_figure(6.4, 4.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name in (name for name in records[-1] if name == "loss" or name.startswith("loss_")):
        label, colour, line_width = LOSS_CURVES.get(name, (name.removeprefix("loss_"), None, 1.0))
        values = [np.nan if record.get(name) is None else float(record[name]) for record in records]
        # No curve for tokens that the method does not have or does not supervise.
        if np.isfinite(values).any() and (name == "loss" or np.any(np.asarray(values) != 0)):
            top.plot(epochs, values, label=label, color=colour, linewidth=line_width)
    losses = [record["loss"] for record in records if record["loss"] is not None]  # None: no finite step
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        top.set_yscale("log")  # on a linear scale, the first steps would hide later changes
        top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        top.yaxis.set_major_formatter(ScalarFormatter())
        top.yaxis.set_minor_formatter(NullFormatter())
    top.set_ylabel("loss")
    if not _draw_probes(figure, top, records):
        top.legend(frameon=False, fontsize=9)
    bottom.plot(epochs, [record["lr"] for record in records], color="#7b8794", linewidth=1.5)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels([top, bottom])
    save_figure(figure, path)


def _draw_probes(figure: "Figure", axes: "Axes", records: Sequence[Mapping[str, Any]]) -> bool:
    """Draw probe accuracies on a second axis, and the legend.

    Returns whether there were any.
    """
    lines = {
        name: [(record["epoch"], 100 * record[name]) for record in records if record.get(name) is not None]
        for name in PROBE_CURVES
    }
    if not any(lines.values()):
        return False
    right = axes.twinx()
    for name, points in lines.items():
        label, colour = PROBE_CURVES[name]
        right.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.2, marker="o", markersize=3)
    right.set_ylabel("accuracy of the probe in %")
    right.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    # Above the plot, since curves occupy all corners.
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return True


def _read_some(
    source: ImageSource, indices: NDArray[np.int64], count: int, image_size: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Read center crops of evenly spaced images.

    An unreadable image is replaced by the next one.
    """
    count = min(count, len(indices))
    images: dict[int, NDArray[Any]] = {}
    for place in np.linspace(0, len(indices), count, endpoint=False).astype(np.int64):
        for index in map(int, np.roll(indices, -place)[: len(indices)]):
            if index in images:
                continue
            try:
                images[index] = read_center(source, index, image_size)
            except UnreadableImageError:
                continue
            break
    if not images:
        raise ValueError(f"data: expected at least one readable image to draw, got none of {len(indices)}")
    return np.stack(list(images.values())), np.array(list(images), dtype=np.int64)


def _reconstruction_caption(method: PixelConfig) -> str:
    counts = method.counts
    parts = [f"Numbers count tokens of the {times(method.grid.shape)} grid."]
    tokens = ["decoded"] * (counts.decoded > 0) + ["thrown"] * (method.is_reconstructed and not method.thrown_cells)
    if tokens:
        area = "the true patch" if method.norm_pix else None
        pixels = "all pixels of their patch" + (" after a low-pass filter" if method.low_pass is not None else "")
        parts.append(_predicted(" and ".join(tokens), pixels, area))
    if method.thrown_cells:
        cells = f"the means of {times(method.cell_shape)} cells of their patch"
        parts.append(_predicted("thrown", cells, CELL_NORM_AREAS[method.cell_norm]))
    if counts.thrown and not method.is_reconstructed:
        parts.append("Orange tokens are not predicted: this method does not supervise them.")
    if method.grid.axes == 3:
        parts.append("Numbers above the rows count frames or slices: the middle one of a layer of tokens.")
    parts.append(shown_channels(method.channels))
    return " ".join(filter(None, parts))


def _predicted(tokens: str, target: str, area: str | None) -> str:
    """Describe what tokens predict, and how the prediction is shown.

    An area of the input can set brightness and contrast.
    """
    shown = "" if area is None else f", shown with the brightness and contrast of {area}"
    return f"{tokens.capitalize()} tokens predict {target}{shown}."


def _stage_colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["GnBu"](level)) for level in np.linspace(0.3, 0.85, count)] if count else []

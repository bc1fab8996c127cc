"""Pictures of a run: what the method rebuilds, how it samples, how the loss fell."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, Schedule, nearest_known_distance, patchify, unpatchify
from prmim_train.config import PretrainConfig
from prmim_train.engine import Comparison, Engine, Reconstruction
from prmim_train.figures import (
    HIDDEN,
    draw_cells,
    new_figure,
    save_figure,
    show_image,
    to_rgb,
    token_mask,
    token_pixels,
    write_caption,
)
from prmim_train.prepare import RunData, open_data, read_run_config, restore_engine
from prmim_train.run_directory import RunDirectory
from prmim_train.similarity import draw_similarity
from prmim_train.sources import ImageSource, UnreadableImageError
from prmim_train.transforms import center_crop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("reconstructions", "similarity", "schedule", "loss")
KINDS_OF = {
    "pixels": ("reconstructions", "schedule", "loss"),
    "features": ("similarity", "schedule", "loss"),
}
"""The pictures that there are of a method, by what it predicts."""

NOT_PREDICTED = (0.98, 0.84, 0.68)
VISIBLE_COLOUR = "#3d4651"
DECODED_COLOUR = "#e07b28"

# Name in the metrics to label, colour and width of its curve; a loss of another name gets a colour of matplotlib's.
LOSS_CURVES: dict[str, tuple[str, str | None, float]] = {
    "loss": ("all supervised tokens", "#1f2933", 1.8),
    "loss_visible": ("visible", "#7a5195", 1.0),
    "loss_decoded": ("decoded", DECODED_COLOUR, 1.0),
    "loss_thrown": ("thrown", "#3a8fb7", 1.0),
}

PROBE_CURVES = {"probe_knn": ("nearest neighbours", "#7cb518"), "probe_linear": ("linear probe", "#386641")}


def draw_run(run: RunDirectory, config: PretrainConfig, data: RunData, engine: Engine) -> list[Path]:
    """Draw all pictures of a run into its folder.

    Parameters
    ----------
    run
        The run.
    config
        Its options; `config.pictures` images are shown.
    data
        Its images; held-out ones are shown where there are any.
    engine
        The trained engine.

    Returns
    -------
    list of Path
        The files written.
    """
    return draw_images(run, config, data, engine) + (draw_curve(run) if engine.rank == 0 else [])


def draw_images(
    run: RunDirectory, config: PretrainConfig, data: RunData, engine: Engine, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Draw what the method rebuilds and how it samples, or one of them, from the same images and masks.

    What is rebuilt is drawn into `reconstructions.png` where it is pixels, into `similarity.png` where it is features.

    Parameters
    ----------
    run, config, data, engine
        As for `draw_run`.
    kinds
        Which pictures: see `KINDS`. Those that there are not of this method are left out.

    Returns
    -------
    list of Path
        The files written; of several processes, by the main one alone.

    Raises
    ------
    ValueError
        If no image can be read.
    """
    shown = data.held_out if len(data.held_out) else data.train
    images, sample = _read_some(data.source, shown, max(1, config.pictures), config.image_plane)
    paths = []
    seen: Reconstruction | Comparison
    is_main = engine.rank == 0
    if engine.predicts == "features":
        seen = compared = engine.compare(images, sample)
        if is_main and "similarity" in kinds:
            paths.append(run.path / "similarity.png")
            draw_similarity(paths[-1], images, compared, config.patch_shape)
    else:
        seen = rebuilt = engine.reconstruct(images, sample)
        if is_main and "reconstructions" in kinds:
            paths.append(run.path / "reconstructions.png")
            norm_pix = "norm_pix" in config.traits.options and config.norm_pix
            draw_reconstructions(paths[-1], images, rebuilt, config.patch_shape, norm_pix=norm_pix)
    if is_main and "schedule" in kinds:
        paths.append(run.path / "schedule.png")
        draw_schedule(paths[-1], np.asarray(seen.order), seen.schedule, is_rebuilt=config.is_rebuilt)
    return paths


def draw_curve(run: RunDirectory) -> list[Path]:
    """Draw `loss.png` of a run that logged at least two steps; return the files written."""
    records = run.read_metrics()
    if len(records) < 2:
        return []
    draw_loss(run.path / "loss.png", records)
    return [run.path / "loss.png"]


def picture_command(
    run: str,
    *,
    data: str | None = None,
    holdout: float | None = None,
    device: str | None = None,
    kind: str | None = None,
    pictures: int | None = None,
) -> None:
    """Draw pictures of the last checkpoint of a run into its folder, and print their names.

    Parameters
    ----------
    run
        The run's folder.
    data, holdout, device, pictures
        In place of the run's own options.
    kind
        One of `KINDS`; None is all that there are of the method.

    Raises
    ------
    ValueError
        If the kind is unknown, or there is none of this method, or there is nothing to draw.
    FileNotFoundError
        If there is no run, or no checkpoint yet.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected {' or '.join(KINDS)}, got {kind!r}")
    kinds = KINDS if kind is None else (kind,)
    directory = RunDirectory.open(Path(run))
    paths = draw_curve(directory) if "loss" in kinds else []
    if kind != "loss":
        config = read_run_config(directory, data=data, holdout=holdout, device=device, pictures=pictures)
        images = open_data(config)
        with closing(restore_engine(directory, config, images.budget)) as engine:
            if kind is not None and kind not in KINDS_OF[engine.predicts]:
                expected = " or ".join(KINDS_OF[engine.predicts])
                raise ValueError(f"kind: expected {expected} of a run of method {config.method}, got {kind!r}")
            paths = draw_images(directory, config, images, engine, kinds) + paths
    if not paths:
        raise ValueError(f"run: expected at least two lines in {directory.path / 'metrics.jsonl'} to draw a curve of")
    for path in paths:
        print(f"Picture: {path}")


def draw_reconstructions(
    path: Path,
    images: NDArray[np.uint8],
    reconstruction: Reconstruction,
    patch_size: tuple[int, ...],
    *,
    norm_pix: bool = True,
) -> None:
    """Draw one row per image: the input, what the encoder sees, what decoder and stages made of the rest.

    Parameters
    ----------
    path
        The `.png` file.
    images
        uint8 (batch, height, width, channels).
    reconstruction
        What the engine made of them.
    patch_size
        Height and width of a patch.
    norm_pix
        Whether patches were normalised; the caption then says how that was undone.
    """
    schedule = reconstruction.schedule
    columns = reconstruction_panels(images, reconstruction, patch_size)
    titles = {
        "input": "input",
        "visible": f"visible: {schedule.counts.visible}",
        "decoded": f"decoded: {schedule.counts.decoded}",
        "thrown": f"thrown, rebuilt: {schedule.counts.thrown}",
        "whole": "visible + rebuilt",
    }
    is_complete = bool(np.isfinite(reconstruction.patches).all())
    if not is_complete:
        titles["thrown"] = f"thrown: {schedule.counts.thrown}"
    rows, height, width = images.shape[:3]
    panel = 1.45
    figure = new_figure(len(columns) * panel * max(1.0, width / height), rows * panel * max(1.0, height / width) + 0.75)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, panels) in enumerate(columns.items()):
        axes[0, column].set_title(titles[name], fontsize=9)
        for row in range(rows):
            show_image(axes[row, column], panels[row])
    write_caption(figure, _reconstruction_caption(images.shape[-1], norm_pix, is_complete, schedule.grid))
    save_figure(figure, path)


def reconstruction_panels(
    images: NDArray[np.uint8], reconstruction: Reconstruction, patch_size: tuple[int, ...]
) -> dict[str, NDArray[np.float64]]:
    """Return the columns of the picture of reconstructions.

    Parameters
    ----------
    images
        uint8 (batch, height, width, channels).
    reconstruction
        What the engine made of them.
    patch_size
        Height and width of a patch.

    Returns
    -------
    dict
        Column name to RGB images, float (batch, height, width, 3) in [0, 1]; there is no column `thrown` where nothing
        is thrown.
    """
    schedule = reconstruction.schedule
    order = np.asarray(reconstruction.order)
    counts = schedule.counts
    inputs = patchify(images / 255.0, patch_size)
    predicted = np.clip(reconstruction.patches.astype(np.float64), 0.0, 1.0)
    ends = np.cumsum([counts.visible, counts.decoded, counts.thrown])
    groups = {
        "visible": token_mask(order[:, : ends[0]], counts.num_tokens),
        "decoded": token_mask(order[:, ends[0] : ends[1]], counts.num_tokens),
        "thrown": token_mask(order[:, ends[1] :], counts.num_tokens),
    }

    def paint(patches: NDArray[np.float64], is_shown: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Show some tokens; the others, and those without a prediction, take a colour of their own."""
        pixels = to_rgb(unpatchify(patches, patch_size, schedule.grid))
        pixels = np.where(np.isnan(pixels), NOT_PREDICTED, pixels)
        return np.where(token_pixels(is_shown, patch_size, schedule.grid), pixels, HIDDEN)

    everything = np.ones(order.shape, dtype=bool)
    panels = {
        "input": paint(inputs, everything),
        "visible": paint(inputs, groups["visible"]),
        "decoded": paint(predicted, groups["decoded"]),
        "thrown": paint(predicted, groups["thrown"]),
        "whole": paint(np.where(groups["visible"][..., None], inputs, predicted), everything),
    }
    if counts.thrown == 0:
        del panels["thrown"]
    return panels


def draw_schedule(path: Path, order: NDArray[Any], schedule: Schedule, *, is_rebuilt: bool = True) -> None:
    """Draw the plan of several images: which token is what, and how far the thrown ones lie from their neighbours.

    Parameters
    ----------
    path
        The `.png` file.
    order
        Plans, int (batch, N).
    schedule
        Their boundaries.
    is_rebuilt
        Whether the thrown tokens are rebuilt, stage after stage; else they are shown as one group.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    grid, counts = schedule.grid, schedule.counts
    kinds = token_kinds(order, schedule)
    distance = np.sqrt(nearest_known_distance(grid, kinds <= 1))
    names = [f"visible: {counts.visible}", f"decoded: {counts.decoded}"]
    if is_rebuilt:
        names += [f"stage {stage}: {size}" for stage, size in enumerate(schedule.stage_sizes, start=1) if size]
    elif counts.thrown:
        names.append(f"thrown: {counts.thrown}")
        kinds = np.minimum(kinds, 2)
    colours = [VISIBLE_COLOUR, DECODED_COLOUR, *_stage_colours(len(names) - 2)]

    columns = len(order)
    height, width = grid.shape[-2:] if grid.axes > 1 else (1, grid.shape[0])
    panel = 1.7
    figure = new_figure(columns * panel * max(1.0, width / height) + 0.7, 2 * panel * max(1.0, height / width) + 1.1)
    axes = figure.subplots(2, columns, squeeze=False)
    colour_map = ListedColormap(colours)
    shown = None
    for column in range(columns):
        top, bottom = axes[:, column]
        top.imshow(kinds[column].reshape(height, width), cmap=colour_map, vmin=-0.5, vmax=len(colours) - 0.5)
        draw_cells(top, height, width)
        top.set_title(f"image {column + 1}", fontsize=9)
        shown = bottom.imshow(
            distance[column].reshape(height, width), cmap="YlGnBu", vmin=0, vmax=max(2.0, float(distance.max()))
        )
        draw_cells(bottom, height, width)
        bottom.set_title(f"largest distance: {distance[column].max():.2f}", fontsize=8)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[1, :].tolist(), fraction=0.05, pad=0.02)
        bar.set_label(
            f"distance to the nearest\n{'visible or decoded' if counts.decoded else 'visible'} token", fontsize=8
        )
        bar.ax.locator_params(nbins=4)
        bar.ax.tick_params(labelsize=8)
    legend = [pair for pair in zip(names, colours, strict=True) if not pair[0].endswith(": 0")]
    handles = [Patch(facecolor=colour, label=name) for name, colour in legend]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    save_figure(figure, path)


def token_kinds(order: NDArray[Any], schedule: Schedule) -> NDArray[np.int64]:
    """Return what each token is, in raster order: 0 visible, 1 decoded, 2 first stage, 3 second stage, ...

    Parameters
    ----------
    order
        Plans, int (batch, N).
    schedule
        Their boundaries.

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
    """Draw the loss, the accuracy of online probes where there were any, and the learning rate over the epochs.

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
    for name in [name for name in records[-1] if name == "loss" or name.startswith("loss_")]:
        label, colour, line_width = LOSS_CURVES.get(name, (name.removeprefix("loss_"), None, 1.0))
        values = [np.nan if record.get(name) is None else float(record[name]) for record in records]
        # A method without thrown tokens, or one that does not supervise them, has no curve for them.
        if np.isfinite(values).any() and (name == "loss" or np.any(np.asarray(values) != 0)):
            top.plot(epochs, values, label=label, color=colour, linewidth=line_width)
    losses = [record["loss"] for record in records if record["loss"] is not None]  # None: no finite step
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        # The first steps would press all others flat.
        top.set_yscale("log")
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
    """Draw the accuracy of probes on an axis of its own, and the legend; say whether there was any."""
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
    # Above the plot: one curve or another goes through every corner of it.
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return True


def _read_some(
    source: ImageSource, indices: NDArray[np.int64], count: int, image_size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the centres of some images, spread over all of them; one that cannot be read gives way to the next."""
    count = min(count, len(indices))
    images: dict[int, NDArray[np.uint8]] = {}
    for place in np.linspace(0, len(indices), count, endpoint=False).astype(np.int64):
        for index in map(int, np.roll(indices, -place)[: len(indices)]):
            if index in images:
                continue
            try:
                images[index] = center_crop(source.read(index), image_size)
            except UnreadableImageError:
                continue
            break
    if not images:
        raise ValueError(f"data: expected at least one readable image to draw, got none of {len(indices)}")
    return np.stack(list(images.values())), np.array(list(images), dtype=np.int64)


def _reconstruction_caption(channels: int, norm_pix: bool, is_complete: bool, grid: Grid) -> str:
    parts = [f"Numbers count tokens of the {' x '.join(map(str, grid.shape))} grid."]
    if norm_pix:
        parts.append(
            "The network predicts normalised patches; that is undone with each patch's true mean and standard "
            "deviation, so brightness and contrast of every patch come from the input."
        )
    if not is_complete:
        parts.append("Tokens in orange are not predicted: this method does not supervise them.")
    if channels == 2:
        parts.append("The first of two channels is shown, in grey.")
    elif channels > 3:
        parts.append(f"The first three of {channels} channels are shown, as red, green and blue.")
    return " ".join(parts)


def _stage_colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["GnBu"](level)) for level in np.linspace(0.3, 0.85, count)] if count else []

"""Contact sheet of a run's first training samples: `prmim inspect --sheet`."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_core import Grid, Plan, counter_noise, make_plan, unpatchify
from prmim_methods import MethodConfig
from prmim_methods.encoder import times
from prmim_methods.messages import printable, shorten
from prmim_train.config.packages import check_installed
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.batches import Batch
from prmim_train.data.depth import in_8_bit_range
from prmim_train.data.sources import ImageSource
from prmim_train.data.transforms import plane_of
from prmim_train.report.figures import (
    HIDDEN,
    PAGE_WIDTH,
    WIDE,
    draw_cells,
    frames_in_a_row,
    new_figure,
    plain_text,
    save_figure,
    show_image,
    shown_channels,
    to_rgb,
    token_pixels,
    write_caption,
)
from prmim_train.report.pictures import draw_roles, role_colours, shown_frames, token_kinds
from prmim_train.run.prepare import RunData, open_data, training_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SAMPLES = 8
NUM_WIDE_SAMPLES = 4
SUFFIXES = (".png", ".pdf", ".svg")
OUTLINE = "#e63946"
LONGEST_SIDE = 512
"""Maximum number of pixels of a source image on the sheet, along each side."""
LONG = 12
"""Ratio of width to height above which samples are stacked in one column."""
MAX_NAME = 40


@dataclass(frozen=True)
class Samples:
    """The first training samples of a run.

    Parameters
    ----------
    batch
        Augmented crops, their records and boxes.
    step
        Optimizer step that uses each sample, int64 (batch,).
    plan
        Visible, decoded and thrown tokens of each sample.
    """

    batch: Batch
    step: NDArray[np.int64]
    plan: Plan


def first_samples(config: PretrainConfig, data: RunData, number: int = NUM_SAMPLES) -> Samples:
    """Return the images, crops, flips and masks of the first steps of a run.

    Needs no framework.

    Parameters
    ----------
    config
        Options of the run.
    data
        Its images.
    number
        Maximum number of samples. There are fewer if an epoch or the run has fewer images.

    Returns
    -------
    Samples
        If masks follow the attention of a teacher, which is not loaded, the plans are drawn uniformly.

    Examples
    --------
    >>> from prmim_train.config.pretrain import pretrain_config
    >>> config = pretrain_config(channels=1, image_size=16, patch_size=4, batch_size=3)
    >>> samples = first_samples(config, open_data(config), 4)
    >>> samples.batch.images.shape, samples.step.tolist(), samples.plan.visible.shape
    ((4, 16, 16, 1), [0, 0, 0, 1], (4, 4))
    """
    number = min(number, len(data.train), config.batch_size * data.budget.total_steps)
    with training_batches(config, data, batch_size=number, total_steps=1) as batches:
        batch = next(batches)
    step = np.arange(number, dtype=np.int64) // config.batch_size
    method = config.method
    tokens = method.counts.num_tokens
    noise = np.concatenate(
        [counter_noise(config.seed, int(now), batch.index[step == now], tokens) for now in np.unique(step)]
    )
    # Attention is first computed after an epoch or later. Until then, all weights are equal.
    weights = np.ones(noise.shape, np.float32) if method.needs_weights else None
    return Samples(batch, step, make_plan(method.schedule, noise, **method.plan_arguments(noise, weights)))


def sheet_command(config: PretrainConfig, path: str) -> None:
    """Draw the contact sheet of a run that has not started, and print its path.

    Parameters
    ----------
    config
        Options of the run.
    path
        The file to write: `.png`, `.pdf` or `.svg`. An existing file is replaced.

    Raises
    ------
    ValueError
        If the file name has another ending, or images cannot be read.
    FileNotFoundError
        If the folder does not exist.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"sheet: expected a file name that ends in {', '.join(SUFFIXES)}, got {path}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"sheet: expected a file in an existing folder, got {path}")
    check_installed("sheet", "matplotlib")
    data = open_data(config)
    number = NUM_SAMPLES if row_aspect(config.method) <= WIDE else NUM_WIDE_SAMPLES
    draw_sheet(file, config, data.source, first_samples(config, data, number))
    print(f"Sheet: {file}")


def row_aspect(method: MethodConfig) -> float:
    """Width over height of an image, or of shown frames side by side.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> row_aspect(MAEConfig(image_size=(1024, 128)))
    0.125
    """
    height, width = plane_of(method.image_size)
    return max(1, len(_shown(method))) * width / height


def _shown(method: MethodConfig) -> list[int]:
    """Return the frames or slices of a crop that the sheet shows; empty for an image."""
    is_stack = len(method.image_size) == 3
    return shown_frames(method.image_size[0], method.patch_size[0]) if is_stack else []


def draw_sheet(path: Path, config: PretrainConfig, source: ImageSource, samples: Samples) -> None:
    """Draw samples: source image and crop, augmented crop, visible tokens, and plan.

    For a clip or a volume, each panel is a row of frames or slices, one per layer of tokens, at most 8.

    Parameters
    ----------
    path
        The file; its suffix is the format.
    config
        Options of the run.
    source
        Its images.
    samples
        Its first samples.
    """
    method = config.method
    panels = sheet_panels(config, samples)
    number, aspect = len(samples.batch.index), row_aspect(method)
    is_wide = aspect > WIDE
    columns, rows = _layout(number, aspect)
    figure = new_figure(*_figure_size(columns, rows, aspect))
    blocks = figure.subfigures(rows, columns, squeeze=False).ravel().tolist()
    names, colours = role_colours(method.schedule, is_reconstructed=method.is_reconstructed)
    records = zip(blocks[:number], samples.batch.index.tolist(), strict=True)
    for place, (block, record) in enumerate(_progress(records, number)):
        axes = block.subplots(*((4, 1) if is_wide else (1, 4)), squeeze=False).ravel()
        box = samples.batch.boxes[place]
        _draw_source(axes[0], source, record, config, box)
        show_image(axes[1], panels["crop"][place])
        axes[1].set_title("mirrored" if box[1] > box[3] else "crop", fontsize=8)
        show_image(axes[2], panels["visible"][place])
        axes[2].set_title("visible", fontsize=8)
        _draw_plan(axes[3], panels["plan"][place], method.grid, colours)
        size = times(source.header(record).shape)
        name = plain_text(shorten(printable(source.name(record)), MAX_NAME))
        block.supxlabel(f"{name}, {size}, step {samples.step[place] + 1}", fontsize=8)
    draw_roles(figure, names, colours)
    write_caption(figure, _caption(config))
    save_figure(figure, path)


def sheet_panels(config: PretrainConfig, samples: Samples) -> dict[str, NDArray[np.float64]]:
    """Panels of the sheet, frames of clips side by side.

    Parameters
    ----------
    config
        Options of the run.
    samples
        Its first samples.

    Returns
    -------
    dict
        `crop` and `visible`: RGB in [0, 1], (batch, height, width, 3). `plan`: the kind of the token of each pixel, as
        `token_kinds` numbers them, (batch, height, width).
    """
    method, plan = config.method, samples.plan
    crops = to_rgb(in_8_bit_range(samples.batch.images, method.pixel_range) / 255.0)
    kinds = token_kinds(np.asarray(plan.order), method.schedule)
    if not method.is_reconstructed:
        kinds = np.minimum(kinds, 2)
    visible = np.where(token_pixels(kinds == 0, method.patch_size, method.grid), crops, HIDDEN)
    patches = np.broadcast_to(kinds[..., None].astype(np.float64), (*kinds.shape, prod(method.patch_size)))
    panels = {
        "crop": crops,
        "visible": visible,
        "plan": unpatchify(patches, method.patch_size, method.grid)[..., 0],
    }
    if shown := _shown(method):
        panels = {
            name: frames_in_a_row(values[:, shown], np.nan if name == "plan" else 1.0)
            for name, values in panels.items()
        }
    return panels


def _progress(samples: Iterator[Any], number: int) -> Iterator[Any]:
    """Show a progress bar if reading the source images takes long."""
    with closing(tqdm(samples, total=number, desc="sheet", delay=2, leave=False, disable=None)) as bar:
        yield from bar


def _layout(number: int, aspect: float) -> tuple[int, int]:
    """Return columns and rows of samples whose crops have this width over height."""
    most = 1 if aspect > LONG else 2 if aspect > 0.5 else 4
    columns = min(number, most)
    return columns, -(-number // columns)


def _figure_size(columns: int, rows: int, aspect: float) -> tuple[float, float]:
    """Return width and height in inches."""
    if aspect > WIDE:  # four panels below one another
        width = min(PAGE_WIDTH / columns, 1.1 * aspect)
        return max(6.0, columns * width), rows * (4 * (width / aspect + 0.25) + 0.35) + 0.9
    height = 1.4 * max(1.0, min(3.0, 1 / aspect))
    return max(6.0, columns * 4 * (height * aspect + 0.15)), rows * (height + 0.5) + 0.8


def _draw_source(
    axes: "Axes", source: ImageSource, record: int, config: PretrainConfig, box: NDArray[np.float32]
) -> None:
    """Show a whole source image, and the outline of a crop.

    The crop is (top, left, bottom, right), as fractions.
    """
    from matplotlib.patches import Rectangle

    image = to_rgb(in_8_bit_range(_thumbnail(source, record, config), config.method.pixel_range) / 255.0)
    is_stack = image.ndim == 4
    shown = frames_in_a_row(image[None], 1.0)[0] if is_stack else image
    show_image(axes, shown)
    axes.set_title("image", fontsize=8)
    if not np.isfinite(box).all():
        return
    height, width = image.shape[-3:-1]
    step = (shown.shape[1] - width) / (len(image) - 1) if is_stack and len(image) > 1 else 0.0
    top, left, bottom, right = box[0] * height, min(box[1::2]) * width, box[2] * height, max(box[1::2]) * width
    for frame in range(len(image) if is_stack else 1):
        corner = left + frame * step, top
        axes.add_patch(
            Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=OUTLINE, linewidth=1.2, clip_on=False)
        )


def _thumbnail(source: ImageSource, record: int, config: PretrainConfig) -> NDArray[Any]:
    """Read a whole image of at most `LONGEST_SIDE` pixels per side.

    For clips and volumes, evenly spaced frames. Returns ([frames,] height, width, C).
    """
    height, width = plane_of(source.header(record).shape)
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    count = len(_shown(config.method))
    if not count:
        return source.read_crop(record, size, lambda shape: (0, 0, *shape))

    def choose(shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], tuple[int, int, int, int]]:
        return (2 * np.arange(count) + 1) * shape[0] // (2 * count), (0, 0, shape[1], shape[2])

    return source.read_crop(record, (count, *size), choose)


def _draw_plan(axes: "Axes", kinds: NDArray[np.float64], grid: Grid, colours: list[str]) -> None:
    """Draw the kind of each pixel's token, with lines between the tokens of an image."""
    from matplotlib.colors import ListedColormap

    shown = axes.imshow(
        kinds, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, interpolation="nearest"
    )
    axes.set_title("plan", fontsize=8)
    if grid.axes != 2:
        axes.set_axis_off()
        return
    (height, width), (rows, columns) = kinds.shape, grid.shape
    shown.set_extent((-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes.set_aspect(height * columns / (rows * width))
    draw_cells(axes, rows, columns)


def _caption(config: PretrainConfig) -> str:
    method = config.method
    size = times(method.image_size)
    if config.volumes:
        crops = f"Crops are random boxes of the volume, resized to {size} voxels."
    elif config.crop_padding is not None:
        crops = f"Crops are windows of the resized image with {config.crop_padding} mirrored pixels around it."
    else:
        crops = f"Red: the area of the crop, which is resized to {size} pixels."
    parts = [f"The first training samples with seed {config.seed}, as the run will see them.", crops]
    if method.pixel_range is not None:
        low, high = method.pixel_range
        parts.append(f"Black is {low:g}, white {high:g}.")
    if method.follows_teacher:
        parts.append("The masks of the run follow the teacher's attention; these are drawn uniformly.")
    if method.grid.axes == 3:
        parts.append(
            "One frame or slice of each layer of tokens is shown; those of the source image cover its whole length."
        )
    parts.append(shown_channels(method.channels))
    return " ".join(filter(None, parts))

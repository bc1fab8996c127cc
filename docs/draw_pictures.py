"""Draw the pictures of the documentation: python -m docs.draw_pictures [--digits RUN] [--photographs RUN].

The command starts in the top folder. Reconstructions need trained runs: `make pretrain`, and a run on photographs, such
as those of `python -m benchmarks.quality --study grid14`.
"""

import argparse
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from benchmarks.methods import RECIPES, arms_of, forward_macs, with_teacher
from benchmarks.targets import IMAGE, ITSELF, LUMINANCE, explain
from prmim_core import (
    Grid,
    Plan,
    Schedule,
    block_visible,
    cell_means,
    count_tokens,
    counter_noise,
    expand_cells,
    is_member,
    make_plan,
    nearest_known_distance,
    patchify,
    unpatchify,
)
from prmim_train.config.layers import read_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.report.pictures import DECODED_COLOUR, VISIBLE_COLOUR, picture_command, token_kinds
from prmim_train.report.sheet import draw_sheet, first_samples
from prmim_train.run.prepare import open_data

IMAGES = Path(__file__).parent / "images"
STRATEGIES = Path(__file__).parent / "guides" / "strategies.md"
GRID = Grid((14, 14))
COUNTS = count_tokens(GRID.num_tokens, 0.75, 0.5)
PATCH = (16, 16)
REBUILT, NEUTRAL, INK = ("#bfe3c0", "#3f88c5"), "#7b8794", "#1f2933"
"""Colours of thrown tokens by stage, of what is compared with them, and of text."""
KIND_COLOURS = (VISIBLE_COLOUR, DECODED_COLOUR, *REBUILT)
"""Colours of the kinds of `token_kinds`, with two stages."""


def draw_coverage(path: Path, images: int = 4096) -> None:
    """Draw how far thrown tokens lie from the nearest known one, under furthest and under random throwing."""
    noise = counter_noise(0, 0, np.arange(images), GRID.num_tokens)
    figure = Figure(figsize=(6.4, 3.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, (throwing, colour) in enumerate((("furthest", DECODED_COLOUR), ("random", NEUTRAL))):
        plan = make_plan(Schedule(GRID, COUNTS, throwing=throwing), noise)
        is_known = is_member(plan.known(1), GRID.num_tokens)
        squared = nearest_known_distance(GRID, is_known)[~is_known]
        share = np.bincount(squared, minlength=6) / squared.size
        bars = np.array([1, 2, 4, 5])  # the smallest squared distances of a grid
        heights = [*share[bars], share[6:].sum()]
        mean = np.sqrt(squared).mean()
        axes.bar(
            np.arange(len(heights)) + 0.4 * place - 0.2,
            heights,
            0.38,
            color=colour,
            label=f"{throwing}: mean {mean:.2f}",
        )
    labels = [f"{np.sqrt(square):.2f}".rstrip("0").rstrip(".") for square in bars]
    axes.set_xticks(range(len(labels) + 1), [*labels, "more"])
    axes.set_xlabel("distance to the nearest visible or decoded token, in tokens")
    axes.set_ylabel("share of thrown tokens")
    axes.set_title(f"14 x 14 tokens, {COUNTS.visible} visible, {COUNTS.decoded} decoded, {images:,} images", fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_plans(path: Path, plans: Mapping[str, Plan], images: int = 4) -> None:
    """Draw a row of plans under each label: those of a few images."""
    names = ["visible", "decoded", *(f"thrown, stage {stage}" for stage in (1, 2))]
    figure = Figure(figsize=(9.2, 0.9 + 2.25 * len(plans)), dpi=150, layout="constrained")
    axes = figure.subplots(len(plans), images)
    for row, (label, plan) in zip(axes, plans.items(), strict=True):
        grid = plan.schedule.grid
        kinds = token_kinds(plan.order, plan.schedule)
        distance = nearest_known_distance(grid, kinds <= 1)
        for image, place in enumerate(row):
            place.imshow(kinds[image].reshape(grid.shape), cmap=ListedColormap(KIND_COLOURS), vmin=-0.5, vmax=3.5)
            place.set_xticks(np.arange(0.5, grid.shape[1]), [])
            place.set_yticks(np.arange(0.5, grid.shape[0]), [])
            place.grid(color="white", linewidth=0.8)
            place.tick_params(length=0)
            place.spines[:].set_visible(False)
            rows, columns = np.divmod(np.flatnonzero(distance[image] > 1), grid.shape[1])
            place.plot(columns, rows, "x", color="#c1121f", markersize=6, markeredgewidth=1.8)
        row[0].set_ylabel(label, fontsize=14)
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, KIND_COLOURS, strict=True)]
    cross = {"marker": "x", "color": "#c1121f", "linestyle": "none", "markeredgewidth": 1.8}
    handles.append(Line2D([], [], label="thrown, no known neighbour", **cross))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=14, frameon=False)
    figure.savefig(path)


def mae_plans(images: int = 4) -> dict[str, Plan]:
    """Return plans of MAE under furthest and under random throwing, from the same noise."""
    noise = counter_noise(0, 0, np.arange(images), GRID.num_tokens)
    return {
        f"{throwing} sampling": make_plan(Schedule(GRID, COUNTS, throwing=throwing), noise)
        for throwing in ("furthest", "random")
    }


def own_plans(images: int = 4) -> dict[str, Plan]:
    """Return plans of MAE under furthest and random throwing, and under the strategies of docs/guides/strategies.md."""
    block = re.search(r"^```python\n(.*?)^```$", STRATEGIES.read_text(), flags=re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(block[1], page)  # type: ignore[index]  # there is one
    noise = counter_noise(0, 0, np.arange(images), GRID.num_tokens)
    strategies = {"furthest": "furthest", **{n: page[n] for n in ("checkerboard", "centre_first")}, "random": "random"}
    return {name: make_plan(Schedule(GRID, COUNTS, throwing=throwing), noise) for name, throwing in strategies.items()}


def pixio_plans(images: int = 4) -> dict[str, Plan]:
    """Return plans of 16 x 16 tokens: masked one by one as in MAE, and in units of 4 x 4 as in Pixio."""
    grid = Grid((16, 16))
    noise = counter_noise(0, 0, np.arange(images), grid.num_tokens)
    plans = {}
    for label, side, throwing in (
        ("MAE, furthest", 1, "furthest"),
        ("Pixio, furthest", 4, "furthest"),
        ("Pixio, random", 4, "random"),
    ):
        counts = count_tokens(grid.num_tokens, 0.75, 0.5, mask_unit=side**2)
        visible = block_visible(grid, (side, side), counts.visible // side**2, noise)
        plans[label] = make_plan(Schedule(grid, counts, throwing=throwing), noise, visible=visible)
    return plans


def photograph(name: str) -> NDArray[np.uint8]:
    """Return a photograph that comes with scikit-learn, uint8 (427, 640, 3).

    On Flickr, under CC BY 2.0: china by danielbuechele, flower by vultilion.
    """
    image: NDArray[np.uint8] = np.array(load_sample_image(f"{name}.jpg"))
    return image


def draw_sampling(path: Path) -> None:
    """Animate a plan on a photograph: furthest sampling pick by pick, then the stages."""
    side = GRID.shape[0] * PATCH[0]
    square = Image.fromarray(photograph("flower")[20:420, 110:510]).resize((side, side), Image.Resampling.BICUBIC)
    patches = patchify(np.asarray(square, np.float64)[None], PATCH)
    plan = make_plan(Schedule(GRID, COUNTS), counter_noise(0, 0, np.arange(1), GRID.num_tokens))
    rebuilt = rebuild_cells(patches, plan)
    frames, seconds = [], []

    def show(text: str, hold: float, kinds: NDArray[np.int64], last: tuple[int, ...] = ()) -> None:
        frames.append(_sampling_frame(np.where(kinds[:, None] >= 2, rebuilt, patches[0]), kinds, last, text))
        seconds.append(hold)

    kinds = np.zeros(GRID.num_tokens, int)  # 0: visible or not marked, 1: decoded, 2 and 3: thrown, -1: unknown
    show("One image, 14 x 14 patches", 1.5, kinds)
    kinds = np.full(GRID.num_tokens, -1)
    kinds[plan.visible[0]] = 0
    show("49 visible: input of the encoder", 2.0, kinds)
    for number, token in enumerate(plan.decoded[0], start=1):
        kinds[token] = 1
        show(f"Furthest sampling picks {number} of 49 to decode", 0.4 if number < 6 else 0.12, kinds, (token,))
    show("No other patch is without a known neighbour", 2.0, kinds)
    for stage in (1, 2):
        kinds[plan.stage(stage)[0]] = 1 + stage
        show(f"Stage {stage}: neighbours rebuild 49 of the 98 thrown", 2.0, kinds)
    show("Every masked patch is supervised", 3.0, np.where(kinds >= 2, 4, 0))
    every = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for place, frame in enumerate((frames[0], frames[1], frames[-2])):
        every.paste(frame, (0, place * frame.height))
    palette = every.quantize(160, method=Image.Quantize.MAXCOVERAGE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 * hold) for hold in seconds]
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)


def rebuild_cells(patches: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """Return patches (N, P) as visible and decoded tokens predict them, in 2 x 2 cells.

    The weights are those that the reconstruction `kernel` starts with: a softmax over minus the squared distance.
    """
    cells = (2, 2)
    values = cell_means(patches, PATCH, cells)[0]
    positions = GRID.positions
    for stage in (1, 2):
        thrown, known = plan.stage(stage)[0], plan.known(stage)[0]
        weights = np.exp(-((positions[thrown][:, None] - positions[known]) ** 2).sum(axis=-1))
        values[thrown] = (weights / weights.sum(axis=1, keepdims=True)) @ values[known]
    return expand_cells(values, PATCH, cells)


def _sampling_frame(
    patches: NDArray[np.float64], kinds: NDArray[np.int64], last: tuple[int, ...], text: str
) -> Image.Image:
    """Draw the image with its tokens, and the distance of each token to the nearest known one."""
    cell, gap, edge = 22, 26, 8
    side = cell * GRID.shape[0]
    frame = Image.new("RGB", (2 * (side + edge) + gap, side + 50), "white")
    draw = ImageDraw.Draw(frame)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    pixels = unpatchify(patches[None], PATCH, GRID)[0].round().astype(np.uint8)
    frame.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX), (edge, 26))
    distance = np.sqrt(nearest_known_distance(GRID, (kinds >= 0)[None])[0])
    rows, columns = GRID.coordinates(kinds)
    for token, (row, column, kind) in enumerate(zip(rows, columns, kinds, strict=True)):
        left, top = edge + cell * column, 26 + cell * row
        box = [left, top, left + cell - 1, top + cell - 1]
        if kind < 0:
            draw.rectangle(box, fill="#e6e8ed")
        elif 1 <= kind <= 3:
            draw.rectangle(box, outline=KIND_COLOURS[kind], width=2)
        right = [box[0] + side + gap, box[1], box[2] + side + gap, box[3]]
        draw.rectangle(right, fill=_distance_colour(float(distance[token])), outline="#e6e8ed")
        if token in last:
            draw.rectangle(right, fill=DECODED_COLOUR)
    draw.text((edge, 4), text, fill=INK, font=font)
    draw.text((edge + side + gap, 4), "distance to a known patch", fill=INK, font=font)
    legend = [("decoded", DECODED_COLOUR), ("stage 1", REBUILT[0]), ("stage 2", REBUILT[1])]
    for place, (name, colour) in enumerate(legend):
        left = edge + 96 * place
        draw.rectangle([left, side + 33, left + 11, side + 44], outline=colour, width=2)
        draw.text((left + 17, side + 31), name, fill=INK, font=small)
    for place in range(4):
        left = edge + side + gap + 56 * place
        draw.rectangle([left, side + 33, left + 11, side + 44], fill=_distance_colour(place), outline="#c8ccd4")
        draw.text((left + 17, side + 31), str(place) if place < 3 else "3 or more", fill=INK, font=small)
    return frame


def _distance_colour(distance: float) -> tuple[int, ...]:
    """Return the colour of a distance: white for 0, that of visible tokens from 3 on."""
    share = min(distance / 3, 1.0)
    return tuple(round(255 + share * (part - 255)) for part in ImageColor.getrgb(VISIBLE_COLOUR))


def draw_costs(path: Path) -> None:
    """Draw the cost of every method, dense, partial and with PR-MIM, by the formulas of docs/results/cost.md."""
    figure = Figure(figsize=(7.6, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = {
        "dense": (VISIBLE_COLOUR, "dense"),
        "partial": (NEUTRAL, "partial: thrown tokens are not supervised"),
        "PR-MIM": (DECODED_COLOUR, "PR-MIM: thrown tokens are supervised"),
    }
    macs = dict(sorted(method_macs().items(), key=lambda item: item[1]["PR-MIM"] / item[1]["dense"]))
    for place, arms in enumerate(macs.values()):
        for row, (arm, (colour, _)) in enumerate(styles.items()):
            if arm in arms:
                share, height = arms[arm] / arms["dense"], place + 0.27 * (row - 1)
                axes.barh(height, share, 0.25, color=colour)
                axes.text(share + 0.008, height, f"{arms[arm] / 1e9:.1f} G", va="center", fontsize=6.5)
    axes.set_yticks(range(len(macs)), macs)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("forward multiply-accumulates of an image, relative to the dense method (labels: absolute)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(facecolor=colour, label=label) for colour, label in styles.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)


def method_macs() -> dict[str, dict[str, int]]:
    """Return the forward multiply-accumulates of the ViT-B recipe of each method, by arm."""
    titles = {
        "amt_mae": "AMT on MAE",
        "amt_simmim": "AMT on SimMIM",
        "crossmae": "CrossMAE",
        "localmim": "LocalMIM",
        "mae": "MAE",
        "maskalign": "MaskAlign",
        "mff": "MFF",
        "pixio": "Pixio",
        "pixmim": "PixMIM",
        "simmim": "SimMIM",
        "videomae": "VideoMAE",
    }
    with tempfile.TemporaryDirectory() as folder:
        return {
            titles[name]: {
                arm: forward_macs(config) for arm, config in with_teacher(arms_of(name), Path(folder)).items()
            }
            for name in RECIPES
        }


def draw_frequencies(path: Path, patch: int = 8) -> None:
    """Draw what adjacent patches explain of a patch of a photograph: by frequency, and by size of the cells."""
    found = explain(crops(), (patch, patch))
    figure = Figure(figsize=(9.6, 3.2), dpi=150, layout="constrained")
    waves, shares, bars = figure.subplots(1, 3)
    frequency = np.arange(patch)
    basis = np.cos(np.pi * (np.arange(patch)[:, None] + 0.5) * frequency / patch)  # (pixel, frequency)
    tiles = np.einsum("ya,xb->aybx", basis, basis)
    padded = np.pad(tiles, ((0, 0), (0, 1), (0, 0), (0, 1)), constant_values=np.nan)
    waves.imshow(padded.reshape((patch + 1) * patch, -1), cmap="gray")
    waves.set(xticks=[], yticks=[], title="a patch is a sum of waves ...")
    shares.imshow(100 * found.coefficients[IMAGE], cmap=_from_white(DECODED_COLOUR), vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(found.coefficients[IMAGE]):
        colour = "white" if share > 0.6 else INK
        shares.text(column, row, f"{100 * max(share, 0):.0f}", ha="center", va="center", fontsize=7, color=colour)
    shares.set(xticks=[], yticks=[], title="... and neighbours know the slow ones (%)")
    titles = {IMAGE: "whole patch", ITSELF: "whole patch,\nnormalized by itself"}
    names = [*(name for name in reversed(found.targets) if name != ITSELF), ITSELF]
    values = [100 * found.targets[name][1] for name in names]
    bars.barh([titles.get(name, name) for name in names], values, color=[*[DECODED_COLOUR] * (len(names) - 1), NEUTRAL])
    for place, value in enumerate(values):
        bars.text(value - 2, place, f"{value:.0f}", va="center", ha="right", fontsize=8, color="white")
    bars.invert_yaxis()
    bars.set(xlim=(0, 100), title="explained by neighbours (%)")
    bars.spines[["top", "right"]].set_visible(False)
    for axes in (waves, shares, bars):
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


def crops(size: int = 96, step: int = 106) -> NDArray[np.float64]:
    """Return the luminance of crops of two photographs, (crops, size, size, 1).

    The first quarter, on which :func:`explain` tests, is the third row of both photographs; others do not overlap it.
    """
    images = [photograph(name) @ np.array(LUMINANCE) / 255 for name in ("china", "flower")]
    corners = [
        (step * row + shift[0], step * column + shift[1])
        for row in (2, 0, 1, 3)
        for column in range(6)
        for shift in ((0, 0), (5, 3), (2, 7), (7, 5))
    ]
    cut = [image[top : top + size, left : left + size] for top, left in corners for image in images]
    return np.stack(cut)[..., None]


def _from_white(colour: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("from white", ["white", colour])


def draw_digits_sheet(path: Path, number: int = 4) -> None:
    """Draw the contact sheet of the embedded digits, with fewer samples than ``prmim inspect --sheet``."""
    config = pretrain_config(**read_options("digits"))
    data = open_data(config)
    draw_sheet(path, config, data.source, first_samples(config, data, number))


def draw_logo(path: Path, side: int = 6, cell: int = 10, gap: int = 2) -> None:
    """Draw the plan of one small image as an SVG of coloured squares."""
    schedule = Schedule(Grid((side, side)), count_tokens(side * side, 0.75, 0.5))
    plan = make_plan(schedule, counter_noise(0, 0, np.arange(1), side * side))
    kinds = token_kinds(plan.order, schedule)[0]
    squares = "".join(
        f'<rect x="{token % side * (cell + gap)}" y="{token // side * (cell + gap)}" width="{cell}" height="{cell}" '
        f'rx="2" fill="{KIND_COLOURS[kind]}"/>\n'
        for token, kind in enumerate(kinds)
    )
    length = side * (cell + gap) - gap
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {length} {length}" role="img" '
        f'aria-label="Tokens of a plan">\n{squares}</svg>\n'
    )


def draw_reconstructions(path: Path, run: Path, number: int = 3, **data: Any) -> None:
    """Draw what a run reconstructs of some images: its held-out images, or others if `data` and `holdout` are given."""
    picture_command(str(run), kind="reconstructions", pictures=number, **data)
    shutil.copy(run / "reconstructions.png", path)


def draw_photographs(path: Path, run: Path) -> None:
    """Draw what a run reconstructs of parts of photographs that it was not trained on."""
    china, flower = photograph("china"), photograph("flower")
    parts = (china[:, :427], flower[:, 100:527], china[120:420, 300:600])
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            Image.fromarray(part).save(Path(folder) / f"{number}.png")
        draw_reconstructions(path, run, len(parts), data=folder, holdout=0.0)


def main() -> None:
    """Draw them all into docs/images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, metavar="RUN", help="run on the embedded digits")
    parser.add_argument("--photographs", type=Path, metavar="RUN", help="run on photographs")
    runs = parser.parse_args()
    if runs.digits is not None:
        draw_reconstructions(IMAGES / "reconstructions.png", runs.digits)
    if runs.photographs is not None:
        draw_photographs(IMAGES / "photographs.png", runs.photographs)
    draw_logo(IMAGES / "logo.svg")
    draw_plans(IMAGES / "schedule.png", mae_plans())
    draw_plans(IMAGES / "pixio.png", pixio_plans())
    draw_plans(IMAGES / "strategies.png", own_plans())
    draw_coverage(IMAGES / "coverage.png")
    draw_sampling(IMAGES / "sampling.gif")
    draw_costs(IMAGES / "costs.png")
    draw_frequencies(IMAGES / "frequencies.png")
    draw_digits_sheet(IMAGES / "sheet.png")


if __name__ == "__main__":
    main()

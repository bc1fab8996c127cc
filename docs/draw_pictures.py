"""Draw the pictures of the documentation that no run leaves: python docs/draw_pictures.py."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from prmim_core import (
    Grid,
    Plan,
    Schedule,
    block_visible,
    count_tokens,
    counter_noise,
    is_member,
    make_plan,
    nearest_known_distance,
)
from prmim_train.report.pictures import token_kinds

IMAGES = Path(__file__).parent / "images"
STRATEGIES = Path(__file__).parent / "strategies.md"
GRID = Grid((14, 14))
COUNTS = count_tokens(GRID.num_tokens, 0.75, 0.5)


def draw_coverage(path: Path, images: int = 4096) -> None:
    """Draw how far thrown tokens lie from the nearest known one, under furthest and under random throwing."""
    noise = counter_noise(0, 0, np.arange(images), GRID.num_tokens)
    figure = Figure(figsize=(6.4, 3.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, (throwing, colour) in enumerate((("furthest", "#e07b28"), ("random", "#7b8794"))):
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
    colours = ["#3d4651", "#e07b28", "#bfe3c0", "#3f88c5"]
    figure = Figure(figsize=(9.2, 0.5 + 2.25 * len(plans)), dpi=150, layout="constrained")
    axes = figure.subplots(len(plans), images)
    for row, (label, plan) in zip(axes, plans.items(), strict=True):
        grid = plan.schedule.grid
        kinds = token_kinds(plan.order, plan.schedule)
        distance = nearest_known_distance(grid, kinds <= 1)
        for image, place in enumerate(row):
            place.imshow(kinds[image].reshape(grid.shape), cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5)
            place.set_xticks(np.arange(0.5, grid.shape[1]), [])
            place.set_yticks(np.arange(0.5, grid.shape[0]), [])
            place.grid(color="white", linewidth=0.8)
            place.tick_params(length=0)
            place.spines[:].set_visible(False)
            rows, columns = np.divmod(np.flatnonzero(distance[image] > 1), grid.shape[1])
            place.plot(columns, rows, "x", color="#c1121f", markersize=6, markeredgewidth=1.8)
        row[0].set_ylabel(label, fontsize=11)
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    cross = {"marker": "x", "color": "#c1121f", "linestyle": "none", "markeredgewidth": 1.8}
    handles.append(Line2D([], [], label="thrown, no known neighbour", **cross))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    figure.savefig(path)


def mae_plans(images: int = 4) -> dict[str, Plan]:
    """Return plans of MAE under furthest and under random throwing, from the same noise."""
    noise = counter_noise(0, 0, np.arange(images), GRID.num_tokens)
    return {
        f"{throwing} sampling": make_plan(Schedule(GRID, COUNTS, throwing=throwing), noise)
        for throwing in ("furthest", "random")
    }


def own_plans(images: int = 4) -> dict[str, Plan]:
    """Return plans of MAE under furthest and random throwing, and under the strategies of docs/strategies.md."""
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


def main() -> None:
    """Draw them all into docs/images."""
    draw_plans(IMAGES / "schedule.png", mae_plans())
    draw_plans(IMAGES / "pixio.png", pixio_plans())
    draw_plans(IMAGES / "strategies.png", own_plans())
    draw_coverage(IMAGES / "coverage.png")


if __name__ == "__main__":
    main()

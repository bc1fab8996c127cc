"""Draw the pictures of the documentation that no run leaves: python docs/draw_pictures.py."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from prmim_core import Grid, Schedule, count_tokens, counter_noise, is_member, make_plan, nearest_known_distance
from prmim_train.pictures import draw_schedule

IMAGES = Path(__file__).parent / "images"
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


def main() -> None:
    """Draw them all into docs/images."""
    schedule = Schedule(GRID, COUNTS)
    plan = make_plan(schedule, counter_noise(0, 0, np.arange(4), GRID.num_tokens))
    draw_schedule(IMAGES / "schedule.png", plan.order, schedule)
    draw_coverage(IMAGES / "coverage.png")


if __name__ == "__main__":
    main()

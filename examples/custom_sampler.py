"""A custom sampler and its coverage: python examples/custom_sampler.py."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from prmim_core import (
    Grid,
    Plan,
    Schedule,
    count_tokens,
    counter_noise,
    is_member,
    make_plan,
    nearest_known_distance,
    random_decoded,
)

GRID = Grid((14, 14))
THROW_RATIOS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)


def lonely_first(grid, counts, noise, is_visible):
    """Decode the masked tokens with the fewest visible neighbours.

    Tokens are chosen in the order of a Bayer matrix. A Bayer matrix interleaves the bits of (row xor column) and row.
    Printers use it to spread dots evenly. Here it breaks ties, with a random shift for each image. It uses array
    arithmetic only, so it also runs in compiled PyTorch and JAX.
    """
    rows, columns = grid.coordinates(noise)
    is_adjacent = abs(rows[:, None] - rows) + abs(columns[:, None] - columns) == 1  # (N, N)
    neighbours = (is_visible[:, None, :] & is_adjacent).sum(-1)  # (batch, N): 0 to 4

    shift = noise[:, :1] & 255
    rows, columns = rows + (shift >> 4), columns + (shift & 15)
    threshold = 0 * rows
    for bit in range(4):  # the lowest bit is the most significant one of the threshold
        threshold = 4 * threshold + 2 * (((rows ^ columns) >> bit) & 1) + ((rows >> bit) & 1)
    return random_decoded(counts.decoded, 256 * neighbours + threshold, is_visible)


STRATEGIES = {"furthest": "furthest", "lonely first": lonely_first, "random": "random"}
COLOURS = {"furthest": "#e07b28", "lonely first": "#2a9d5c", "random": "#7b8794"}


class Coverage(NamedTuple):
    """Coverage: distances of thrown tokens to known ones, and isolated tokens.

    Mean distance, and the share without a known neighbour.
    """

    plan: Plan
    mean: float
    lonely: float


def cover(throwing, throw_ratio: float, images: int) -> Coverage:
    """Plan images, and measure the distances of thrown tokens to known ones."""
    counts = count_tokens(GRID.num_tokens, mask_ratio=0.75, throw_ratio=throw_ratio)
    noise = counter_noise(seed=0, step=0, sample=np.arange(images), num_tokens=GRID.num_tokens)
    plan = make_plan(Schedule(GRID, counts, throwing=throwing), noise)
    plan.check()
    is_known = is_member(plan.known(1), GRID.num_tokens)
    distance = np.sqrt(nearest_known_distance(GRID, is_known)[~is_known])
    return Coverage(plan, float(distance.mean()), float(np.mean(distance > 1)))


def main(out: Path = Path("runs/examples"), images: int = 512) -> dict[str, Coverage]:
    """Draw plans and coverage, and return the coverage at a throw ratio of 0.5."""
    found = {
        name: {ratio: cover(throwing, ratio, images) for ratio in THROW_RATIOS} for name, throwing in STRATEGIES.items()
    }
    for name, at_ratio in found.items():
        half = at_ratio[0.5]
        print(f"{name:>12}: mean distance {half.mean:.3f}; {half.lonely:.1%} of thrown tokens have no known neighbour")
    draw(out / "custom_sampler.png", found)
    return {name: at_ratio[0.5] for name, at_ratio in found.items()}


def draw(path: Path, found: dict[str, dict[float, Coverage]]) -> None:
    """Draw a plan of each strategy, and its coverage against the throw ratio."""
    figure = Figure(figsize=(6.8, 5.2), dpi=150, layout="constrained")
    plans, curves = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    colours = ListedColormap(["#3d4651", "#e07b28", "#bfe3c0", "#3f88c5"])
    for axes, (name, at_ratio) in zip(plans.subplots(1, 3), found.items(), strict=True):
        schedule, order = at_ratio[0.5].plan.schedule, at_ratio[0.5].plan.order[0]
        bounds = [schedule.num_known(stage) for stage in (1, 2)]
        kinds = np.searchsorted([schedule.counts.visible, *bounds], np.argsort(order), side="right")
        axes.imshow(kinds.reshape(GRID.shape), cmap=colours, vmin=0, vmax=3)
        axes.set_title(name, color=COLOURS[name], fontweight="bold")
        axes.set(xticks=np.arange(0.5, 13), xticklabels=[], yticks=np.arange(0.5, 13), yticklabels=[])
        axes.grid(color="white", linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    distance, lonely = curves.subplots(1, 2)
    for name, at_ratio in found.items():
        style = {"color": COLOURS[name], "marker": "o", "markersize": 4, "label": name}
        distance.plot(at_ratio.keys(), [coverage.mean for coverage in at_ratio.values()], **style)
        lonely.plot(at_ratio.keys(), [100 * coverage.lonely for coverage in at_ratio.values()], **style)
    distance.set(xlabel="throw ratio", ylabel="mean distance to a known token")
    lonely.set(xlabel="throw ratio", ylabel="% of thrown tokens\nwithout a known neighbour")
    for axes in (distance, lonely):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()

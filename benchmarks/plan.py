"""Time from noise to order, per image: on every array library at hand, against fpsample, and how it grows.

Each batch has as many images as make ``--images`` times 14x14 tokens. A quarter of the tokens is visible and a quarter
decoded, except where the number of picks is varied. Times are medians; arms take turns in one process.

Furthest sampling is timed alone too, from noise and visible tokens to picks, because that is all that the peer does.
``fpsample`` (C++, no dependency of ours: ``pip install fpsample``) takes float32 points of one image at a time, so it
is called in a loop over images; points and start sets are made beforehand. ``fps`` is its ``fps_sampling`` with the
visible tokens as the start set, the same job as ours (version 1.0 or newer). The other two start from one point and
pick as many, which leaves the visible tokens out and so is less work: ``fps, one start``, and ``kdline, one start``,
its fastest (``bucket_fps_kdline_sampling``). None of the three breaks ties by noise. It runs on one core; so does ours
on NumPy.

"torch, core" is the core on tensors; "torch" is ``prmim_torch``, which on a CPU hands the core NumPy views of them, and
on CUDA runs a Triton kernel; "torch compiled" calls it under ``torch.compile``.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

import prmim_torch
from benchmarks.report import Report, argument_parser, ratio, take_turns
from prmim_core import Grid, Schedule, TokenCounts, counter_noise, furthest_point_sampling, make_plan, noise_rank

GRIDS = ((14, 14), (24, 24), (32, 32), (64, 64), (8, 14, 14))
SIDES = (8, 12, 16, 24, 32, 48, 64)
PICKS = (8, 16, 32, 64, 128, 256, 512)
PICKED_FROM = (32, 32)

Run = Callable[[], object]


def microseconds(run: Run, images: int, repeats: int) -> float:
    """Return the median time per image, after a run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / images


@dataclass(frozen=True)
class Case:
    """A batch of images of one grid, of whose tokens some are visible and some are to be picked."""

    grid: Grid
    num_picks: int
    images: int

    @classmethod
    def of(cls, shape: Sequence[int], images: int, num_picks: int | None = None) -> "Case":
        """Return the case of a grid, with as many tokens in all as ``images`` of 14x14 tokens have."""
        grid = Grid(tuple(shape))
        return cls(grid, num_picks or grid.num_tokens // 4, max(1, images * 196 // grid.num_tokens))

    @property
    def num_visible(self) -> int:
        """How many are visible."""
        return self.grid.num_tokens // 4

    @property
    def schedule(self) -> Schedule:
        """What a plan of it follows."""
        thrown = self.grid.num_tokens - self.num_visible - self.num_picks
        return Schedule(self.grid, TokenCounts(self.num_visible, self.num_picks, thrown))

    @cached_property
    def noise(self) -> np.ndarray:
        """The noise of its plans."""
        return counter_noise(0, 0, np.arange(self.images), self.grid.num_tokens)

    @cached_property
    def visible(self) -> np.ndarray:
        """Whether each token is visible."""
        return noise_rank(self.noise) < self.num_visible


def plan_runs(case: Case, device: str) -> dict[str, Run]:
    """Return what makes the plans of a case, by name."""
    noise, on_device = case.noise, torch.from_numpy(case.noise).to(device)
    compiled = torch.compile(
        lambda noise: prmim_torch.make_plan(case.schedule, noise).order, fullgraph=True, dynamic=False
    )
    return {
        "NumPy": partial(make_plan, case.schedule, noise),
        "torch, core": _waiting(partial(make_plan, case.schedule, on_device), device),
        "torch": _waiting(partial(prmim_torch.make_plan, case.schedule, on_device), device),
        "torch compiled": _waiting(partial(compiled, on_device), device),
        "JAX jit": _jitted(lambda noise: make_plan(case.schedule, noise).order, noise),
    }


def sampling_runs(case: Case, device: str) -> dict[str, Run]:
    """Return what picks the tokens of a case, by name."""
    arrays = (case.noise, case.visible)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    pick = partial(furthest_point_sampling, case.grid, case.num_picks)
    runs = {"NumPy": partial(pick, *arrays), "torch, core": _waiting(partial(pick, *tensors), device)}
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from prmim_torch.furthest import furthest_point_sampling as kernel

        runs["Triton"] = _waiting(partial(kernel, case.grid, case.num_picks, *tensors), device)
    return runs | {"JAX jit": _jitted(pick, *arrays)} | peer_runs(case)


def peer_runs(case: Case) -> dict[str, Run]:
    """Return what fpsample has to offer, where it is installed."""
    if importlib.util.find_spec("fpsample") is None:
        return {}
    import fpsample

    points, number = case.grid.positions.astype(np.float32), case.num_picks
    start_sets = [np.flatnonzero(row).tolist() for row in case.visible]
    bucket = 3 if case.grid.num_tokens < 2048 else 5  # the faster one, as its documentation advises

    def with_start_sets() -> None:
        for start in start_sets:
            fpsample.fps_sampling(points, len(start) + number, start_idx=start)

    def plain() -> None:
        for start in start_sets:
            fpsample.fps_sampling(points, number, start_idx=start[0])

    def bucketed() -> None:
        for start in start_sets:
            fpsample.bucket_fps_kdline_sampling(points, number, bucket, start_idx=start[0])

    runs: dict[str, Run] = {"fps, one start": plain, "kdline, one start": bucketed}
    knows_start_sets = int(importlib.metadata.version("fpsample").partition(".")[0]) >= 1
    return {"fps": with_start_sets, **runs} if knows_start_sets else runs


def _waiting(run: Run, device: str) -> Run:
    """Return a run that waits for the GPU, where there is one."""

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait if device == "cuda" else run


def _jitted(function: Callable[..., object], *arrays: np.ndarray) -> Run:
    import jax

    compiled = jax.jit(function)
    there = [jax.numpy.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*there))


def _medians(times: Mapping[str, list[float]], case: Case) -> dict[str, float]:
    return {name: 1e6 * statistics.median(seconds) / case.images for name, seconds in times.items()}


def _table(report: Report, title: str, rows: Mapping[str, Mapping[str, float]], last: Mapping[str, str]) -> None:
    """Print rows of microseconds, and of the columns ``last`` in their own formats; an arm that is missing is empty."""
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    formats = {name: ".1f" for name in columns if name not in last} | dict(last)
    report.table(title, formats, {label: [row.get(name) for name in formats] for label, row in rows.items()})


def growth(cases: Mapping[int, Case], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Time sampling case by case; return rows by what grows, and last the exponents of the upper half."""
    rows = {}
    for size, case in cases.items():
        rows[str(size)] = _medians(take_turns(sampling_runs(case, device), repeats), case)
    upper = list(rows.items())[(len(rows) - 1) // 2 :]
    sizes = [math.log(int(size)) for size, _ in upper]
    rows["exponent"] = {
        name: float(np.polyfit(sizes, [math.log(row[name]) for _, row in upper], 1)[0]) for name in upper[0][1]
    }
    return rows


def draw_growth(path: Path, sweeps: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Draw what :func:`growth` returned, a panel for each, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(sweeps), sharey=True)
    for place, (title, rows) in zip(axes, sweeps.items(), strict=True):
        sizes = [size for size in rows if size != "exponent"]
        for name in rows["exponent"]:
            place.loglog([int(size) for size in sizes], [rows[size][name] for size in sizes], "o-", ms=3, label=name)
        place.set_xlabel(title)
        place.set_xticks([int(size) for size in sizes], [f"{int(size):,}" for size in sizes], fontsize=8)
        place.minorticks_off()
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("furthest sampling, us per image")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    options = _parse(arguments)
    # Otherwise JAX takes most of a GPU's memory before the other one has begun.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device, repeats = options.device, options.repeats
    settings = {"images": options.images, "repeats": repeats, "device": device}
    report = Report("plan", settings, options.json)

    rows: dict[str, dict[str, float]] = {}
    for case in _cases(options.images):
        rows[_name(case)] = _medians(take_turns(plan_runs(case, device), repeats), case)
    _table(report, "noise to order, us per image", rows, {})

    rows = {}
    for case in _cases(options.images):
        times = take_turns(sampling_runs(case, device), repeats)
        rows[f"{_name(case)}, {case.num_picks} picks"] = _medians(times, case) | {
            f"ours to {peer}": ratio(times["Triton" if "Triton" in times else "NumPy"], times[peer])
            for peer in times
            if peer.startswith(("fps", "kdline"))
        }
    ratios = {name: ".2f" for row in rows.values() for name in row if name.startswith("ours to")}
    _table(report, "sampling alone, us per image", rows, ratios)

    by_tokens = {case.grid.num_tokens: case for case in (Case.of((side, side), options.images) for side in SIDES)}
    by_picks = {number: Case.of(PICKED_FROM, options.images, number) for number in PICKS}
    sweeps = {}
    for title, cases in (
        ("tokens, a quarter of them picked", by_tokens),
        (f"picks of {math.prod(PICKED_FROM):,} tokens", by_picks),
    ):
        sweeps[title] = growth(cases, device, repeats)
        _table(report, title, sweeps[title], {})
    if options.plot is not None:
        draw_growth(options.plot, sweeps)


def _cases(images: int) -> Iterator[Case]:
    return (Case.of(shape, images) for shape in GRIDS)


def _name(case: Case) -> str:
    return "x".join(map(str, case.grid.shape))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="of 14x14 tokens; fewer of larger grids")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw how sampling grows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

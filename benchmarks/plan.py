"""Time of a plan per image (noise to order), compared with fpsample.

Each batch has as many tokens as ``--images`` images of 14 x 14 tokens. A quarter of the tokens is visible and a quarter
is decoded, except where the number of picks varies. Times are medians; arms take turns in one process.

Furthest sampling (noise and visible tokens to picks) is also timed alone, since the peer has no other step.
``fpsample`` is a C++ package (``pip install fpsample``; not a dependency). It takes float32 points of one image at a
time, so it is called in a loop over images; points and start sets are prepared before. ``fps`` is its ``fps_sampling``
with the visible tokens as start set (version 1.0 or newer), the same task as ours. ``fps, one start`` and ``kdline, one
start`` (``bucket_fps_kdline_sampling``, its fastest function) start from one point and ignore the visible tokens, which
is less work. No function of fpsample breaks ties by noise. fpsample and our NumPy code each use one core.

"torch, core" is the core on tensors. "torch" is ``prmim_torch``, which uses NumPy views on a CPU and a Triton kernel on
CUDA. "torch compiled" is ``prmim_torch`` under ``torch.compile``.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

import prmim_torch
from benchmarks.report import Report, argument_parser, ratio, take_turns
from prmim_core import (
    Grid,
    Schedule,
    TokenCounts,
    counter_noise,
    furthest_point_sampling,
    is_member,
    make_plan,
    random_visible,
)

GRIDS = ((14, 14), (24, 24), (32, 32), (64, 64), (8, 14, 14))
SIDES = (8, 12, 16, 24, 32, 48, 64)
PICKS = (8, 16, 32, 64, 128, 256, 512)
PICKED_FROM = (32, 32)

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A batch of images of one grid, and the number of tokens to pick."""

    grid: Grid
    num_picks: int
    images: int

    @classmethod
    def of(cls, shape: Sequence[int], images: int, num_picks: int | None = None) -> "Case":
        """Return a case with as many tokens as ``images`` images of 14 x 14 tokens."""
        grid = Grid(tuple(shape))
        return cls(grid, num_picks or grid.num_tokens // 4, max(1, images * 196 // grid.num_tokens))

    @property
    def num_visible(self) -> int:
        """Number of visible tokens per image."""
        return self.grid.num_tokens // 4

    @property
    def schedule(self) -> Schedule:
        """Schedule of the plans."""
        thrown = self.grid.num_tokens - self.num_visible - self.num_picks
        return Schedule(self.grid, TokenCounts(self.num_visible, self.num_picks, thrown))

    @cached_property
    def noise(self) -> np.ndarray:
        """Noise of the plans, int32 (images, N)."""
        return counter_noise(0, 0, np.arange(self.images), self.grid.num_tokens)

    @cached_property
    def is_visible(self) -> np.ndarray:
        """Visible tokens, bool (images, N)."""
        return is_member(random_visible(self.num_visible, self.noise), self.grid.num_tokens)


def plan_runs(case: Case, device: str) -> dict[str, Run]:
    """Return functions that make the plans of a case, by name."""
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
    """Return functions that pick the tokens of a case, by name."""
    arrays = (case.noise, case.is_visible)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    pick = partial(furthest_point_sampling, case.grid, case.num_picks)
    runs = {"NumPy": partial(pick, *arrays), "torch, core": _waiting(partial(pick, *tensors), device)}
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from prmim_torch.furthest import furthest_point_sampling as kernel

        runs["Triton"] = _waiting(partial(kernel, case.grid, case.num_picks, *tensors), device)
    return runs | {"JAX jit": _jitted(pick, *arrays)} | peer_runs(case)


def peer_runs(case: Case) -> dict[str, Run]:
    """Return the functions of fpsample; empty if it is not installed."""
    if importlib.util.find_spec("fpsample") is None:
        return {}
    import fpsample

    points, number = case.grid.positions.astype(np.float32), case.num_picks
    start_sets = [np.flatnonzero(row).tolist() for row in case.is_visible]
    bucket = 3 if case.grid.num_tokens < 2048 else 5  # height of its tree, as its documentation recommends

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
    """Return a function that synchronizes with the GPU, if the device is one."""

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
    """Print rows of microseconds; the columns ``last`` have their own formats."""
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    formats = {name: ".1f" for name in columns if name not in last} | dict(last)
    report.table(title, formats, {label: [row.get(name) for name in formats] for label, row in rows.items()})


def growth(cases: Mapping[int, Case], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return sampling times by size, and exponents fitted to the larger sizes."""
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
    """Draw the results of :func:`growth` on logarithmic axes, one panel each."""
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
    # By default, JAX reserves most of the GPU's memory, which PyTorch needs too.
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

    if options.growth:
        _growth_tables(options, report)


def _growth_tables(options: argparse.Namespace, report: Report) -> None:
    """Print sampling times by numbers of tokens and picks; optionally draw them."""
    by_tokens = {case.grid.num_tokens: case for case in (Case.of((side, side), options.images) for side in SIDES)}
    by_picks = {number: Case.of(PICKED_FROM, options.images, number) for number in PICKS}
    sweeps = {}
    for title, cases in (
        ("tokens, a quarter of them picked", by_tokens),
        (f"picks of {math.prod(PICKED_FROM):,} tokens", by_picks),
    ):
        sweeps[title] = growth(cases, options.device, options.repeats)
        _table(report, title, sweeps[title], {})
    if options.plot is not None:
        draw_growth(options.plot, sweeps)


def _cases(images: int) -> Iterator[Case]:
    return (Case.of(shape, images) for shape in GRIDS)


def _name(case: Case) -> str:
    return "x".join(map(str, case.grid.shape))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="images of 14 x 14 tokens; fewer for larger grids")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the growth of sampling to this file")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="only the usual grids")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Time from noise to order, per image, on every array library at hand."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.arms import machine
from prmim_core import Grid, Schedule, count_tokens, counter_noise, make_plan


def microseconds(run: Callable[[], object], images: int, repeats: int) -> float:
    """Return the median time per image, after a run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / images


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    print(f"Plan (noise to order), us per image, {options.images} images, mask 0.75, throw 0.5  [{machine()}]")
    print(f"{'grid':14}{'throwing':12}{'NumPy':>10}{'torch':>10}{'JAX jit':>10}")
    for shape in ((14, 14), (32, 32)):
        for throwing in ("furthest", "random"):
            grid = Grid(shape)
            schedule = Schedule(grid, count_tokens(grid.num_tokens, 0.75, 0.5), throwing=throwing)
            noise = counter_noise(0, 0, np.arange(options.images), grid.num_tokens)
            runs = (
                partial(make_plan, schedule, noise),
                partial(make_plan, schedule, torch.from_numpy(noise)),
                _jitted(schedule, noise),
            )
            cells = "".join(f"{microseconds(run, options.images, options.repeats):>10.1f}" for run in runs)
            print(f"{'x'.join(map(str, shape)):14}{throwing:12}{cells}")


def _jitted(schedule: Schedule, noise: np.ndarray) -> Callable[[], object]:
    import jax

    compiled = jax.jit(make_plan, static_argnums=0)
    on_device = jax.numpy.asarray(noise)
    return lambda: compiled(schedule, on_device).order.block_until_ready()


if __name__ == "__main__":
    main()

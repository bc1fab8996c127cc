"""Time, size and share of training time of a checkpoint, on both backends.

A run waits while its state is copied; writing, checksums and flushing to disk happen in the background. Both are timed
without other work, so "written whole" is the time of a synchronous checkpoint. The share is
``wait / (wait + steps * step)`` for the steps between two checkpoints of the published ImageNet recipe. The time of a
step is measured for ``--batch`` images and scaled to the recipe's batch, or given by ``--step-seconds``.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import prmim_jax
import prmim_torch
from benchmarks.report import Report, argument_parser, random_images
from prmim_methods import MAEConfig, TrainingConfig
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.run.budget import training_budget
from prmim_train.run.directory import RunDirectory

PACKAGES = {"torch": prmim_torch, "JAX": prmim_jax}
IMAGENET = 1_281_167


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def total_size(folder: Path) -> int:
    """Return the total bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def share(wait: float, step: float, steps: int) -> float:
    """Return the share of training time spent waiting for checkpoints.

    Parameters
    ----------
    wait
        Seconds of waiting per checkpoint.
    step
        Seconds per training step.
    steps
        Steps between two checkpoints.

    Examples
    --------
    >>> share(wait=10.0, step=0.5, steps=180)
    0.1
    """
    return wait / (wait + steps * step)


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return times (median seconds) and size (bytes) of a backend's checkpoints."""
    size = (options.image_size,) * 2
    config = MAEConfig(model=options.model, image_size=size, decoder_depth=options.decoder_depth)
    engine = PACKAGES[name].Engine(
        config, TrainingConfig(total_steps=1000, learning_rate=1e-4, precision="float32", device=options.device)
    )
    images = random_images((options.batch, options.image_size, options.image_size, 3))

    def step() -> None:
        engine.train_step(images, np.arange(options.batch))
        engine.read_metrics()

    step()  # compiles, and makes the optimizer's moments nonzero: zeros compress to nothing
    found = {"step": statistics.median(timed(step)[0] for _ in range(options.repeats))}
    run = RunDirectory(folder)
    run.write_config("")  # creates the folders
    times: dict[str, list[float]] = {"wait": [], "save": [], "verify": [], "restore": []}
    for number in range(1, options.repeats + 1):
        wait, writing = timed(partial(run.start_checkpoint, engine, number, keep=1))
        rest, place = timed(writing.finish)
        times["wait"].append(wait)
        times["save"].append(wait + rest)
        times["verify"].append(timed(run.latest_checkpoint)[0])
        times["restore"].append(timed(partial(engine.restore, place))[0])
    engine.close()
    found["size"] = total_size(place)
    return found | {what: statistics.median(seconds) for what, seconds in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--step-seconds", type=float, help="seconds per step of the recipe (default: measured)")
    parser.add_argument("--folder", type=Path, help="parent folder of the checkpoints (default: a temporary folder)")
    options = parser.parse_args(arguments)
    recipe = PretrainConfig()
    steps = training_budget(recipe, IMAGENET).checkpoint_steps
    settings = {name: getattr(options, name) for name in ("model", "image_size", "decoder_depth", "repeats")}
    report = Report("checkpoint", settings, options.json)
    found = {}
    for name in PACKAGES:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            found[name] = measure(name, options, folder)
        finally:
            shutil.rmtree(folder)
    for row in found.values():
        row["recipe"] = row["step"] / options.batch * recipe.batch_size
        if options.step_seconds is not None:
            row["recipe"] = options.step_seconds
    rows: dict[str, Callable[[dict[str, float]], float]] = {
        "size, MB": lambda row: row["size"] / 1e6,
        "training waits, s": lambda row: row["wait"],
        "written whole, s": lambda row: row["save"],
        "verify, s": lambda row: row["verify"],
        "restore, s": lambda row: row["restore"],
        f"step of {recipe.batch_size} images, s": lambda row: row["recipe"],
        f"share of training, every {steps} steps, %": lambda row: 100 * share(row["wait"], row["recipe"], steps),
    }
    report.table(
        "checkpoint",
        dict.fromkeys(PACKAGES, ".4g"),
        {label: map(value, found.values()) for label, value in rows.items()},
    )


if __name__ == "__main__":
    main()

"""Time and size of a checkpoint, and its share of training, on both backends.

Saving is all that a run waits for: weights and training state written, flushed to the disk, and checksummed. The share
is `save / (save + steps * step)`, for the steps between two checkpoints of the published recipe on ImageNet. The time
of a step is measured here for `--batch` images and scaled to the recipe's, or given with `--step-seconds`.
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
from benchmarks.arms import machine
from prmim_train.budget import training_budget
from prmim_train.config import PretrainConfig
from prmim_train.run_directory import RunDirectory

PACKAGES = {"torch": prmim_torch, "JAX": prmim_jax}
IMAGENET = 1_281_167


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def total_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def share(save: float, step: float, steps: int) -> float:
    """Return the part of the time of training that goes into checkpoints.

    Parameters
    ----------
    save
        Seconds that a checkpoint takes.
    step
        Seconds that a training step takes.
    steps
        Steps between two checkpoints.

    Examples
    --------
    >>> share(save=10.0, step=0.5, steps=180)
    0.1
    """
    return save / (save + steps * step)


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return times in seconds and the size in bytes of checkpoints of one backend."""
    method = {"name": "mae", "model": options.model, "image_size": (options.image_size,) * 2}
    method |= {"decoder_depth": options.decoder_depth}
    engine = PACKAGES[name].Engine(
        method, seed=0, total_steps=1000, warmup_steps=0, learning_rate=1e-4, device=options.device
    )
    shape = (options.batch, options.image_size, options.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def step() -> None:
        engine.train_step(images, np.arange(options.batch))
        engine.read_metrics()

    step()  # compiles; and without it the optimiser's moments would be zeros, which are stored in no space
    found = {"step": statistics.median(timed(step) for _ in range(options.repeats))}
    run = RunDirectory(folder)
    run.write_config("")  # which makes the folders
    times: dict[str, list[float]] = {"save": [], "verify": [], "restore": []}
    for number in range(1, options.repeats + 1):
        times["save"].append(timed(partial(run.save_checkpoint, engine, number, keep=1)))
        times["verify"].append(timed(run.latest_checkpoint))
        place = run.checkpoints()[-1]
        times["restore"].append(timed(partial(engine.restore, place)))
    found["size"] = total_size(place)
    return found | {what: statistics.median(seconds) for what, seconds in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--step-seconds", type=float, help="time of a step of the whole recipe on your machines")
    parser.add_argument("--folder", type=Path, help="where to write; by default where temporary files go")
    options = parser.parse_args(arguments)
    recipe = PretrainConfig()
    steps = training_budget(recipe, IMAGENET).checkpoint_steps
    print(
        f"Checkpoint, {options.model} MAE, decoder of {options.decoder_depth} blocks, {options.image_size} px, "
        f"median of {options.repeats}  [{machine()}]"
    )
    found = {}
    for name in PACKAGES:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            found[name] = measure(name, options, folder)
        finally:
            shutil.rmtree(folder)
    print(f"{'':38}" + "".join(f"{name:>10}" for name in PACKAGES))
    _row("size, MB", [row["size"] / 1e6 for row in found.values()], digits=1)
    for what in ("save", "verify", "restore"):
        _row(f"{what}, s", [row[what] for row in found.values()], digits=2)
    per_recipe = [
        row["step"] / options.batch * recipe.batch_size if options.step_seconds is None else options.step_seconds
        for row in found.values()
    ]
    _row(f"step of {recipe.batch_size} images, s", per_recipe, digits=2)
    shares = [100 * share(row["save"], step, steps) for row, step in zip(found.values(), per_recipe, strict=True)]
    _row(f"share of training, every {steps} steps, %", shares, digits=4)


def _row(label: str, values: list[float], *, digits: int) -> None:
    print(f"{label:38}" + "".join(f"{value:>10.{digits}f}" for value in values))


if __name__ == "__main__":
    main()

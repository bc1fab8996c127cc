"""JAX against torch: one method from the same weights on the same batch, with both engines.

The engines take turns in one process; in turns in a process each they take the same time, on a CPU. JAX's first step is
traced, lowered and compiled; PyTorch runs as it is written.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch

import prmim_jax
import prmim_torch
from benchmarks.arms import ARMS
from benchmarks.report import Report, argument_parser, ratio, take_turns
from prmim_core import Schedule, counter_noise, make_plan

PACKAGES = {"torch": prmim_torch, "JAX": prmim_jax}
COMPARED = ("dense", "PR-MIM 0.5")
COMPILING = "/jax/core/compile/"

Engine = prmim_torch.Engine | prmim_jax.Engine
Key = tuple[str, str]
"""The name of an arm, and that of a backend."""


def build(options: argparse.Namespace, device: str) -> dict[Key, Engine]:
    """Return an engine of every arm on every backend, those of one arm with the same weights."""
    sizes = {name: getattr(options, name) for name in ("model", "decoder_dim", "decoder_depth", "decoder_heads")}
    for name in ("image_size", "patch_size"):
        sizes[name] = (getattr(options, name),) * 2
    training = {"seed": 0, "total_steps": 1000, "warmup_steps": 0, "learning_rate": 1e-4}
    training |= {"precision": options.precision, "device": device}
    engines = {
        (arm, name): package.Engine({"name": "mae", **sizes, **ARMS[arm]}, **training)
        for arm in COMPARED
        for name, package in PACKAGES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        for arm in COMPARED:
            prmim_torch.save_weights(engines[arm, "torch"].method, path)
            engines[arm, "JAX"].load_weights(path)
    return engines


def common_device() -> str:
    """Return "cuda" where both backends find a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def step(engine: Engine, images: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """Take a training step; return its seconds, the wait for its end among them, and its loss."""
    start = time.perf_counter()
    engine.train_step(images, sample)
    loss = engine.read_metrics()["loss"]
    return time.perf_counter() - start, loss


@contextmanager
def compilation() -> Iterator[dict[str, float]]:
    """Sum what JAX reports of its compilations inside, in seconds, by the name of the event."""
    seconds: dict[str, float] = defaultdict(float)

    def add(event: str, duration: float, **_: object) -> None:
        if event.startswith(COMPILING):
            seconds[event.removeprefix(COMPILING)] += duration

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(add)


def plans(schedule: Schedule, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """Return, by backend, a function that makes the plan of a batch and waits for it."""
    noise = counter_noise(0, 0, np.arange(batch), schedule.grid.num_tokens)
    for_torch = torch.from_numpy(noise).to(device)
    for_jax = jax.device_put(noise, jax.local_devices(backend=device)[0])
    compiled = jax.jit(make_plan, static_argnums=0)

    def eager() -> None:
        make_plan(schedule, for_torch)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"torch": eager, "JAX": lambda: compiled(schedule, for_jax).order.block_until_ready()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = _parse(arguments)
    # Otherwise JAX takes most of a GPU's memory before the other one has begun.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = common_device() if options.device == "auto" else options.device
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "device")}
    report = Report("backends", settings | {"device": device}, options.json)
    engines = build(options, device)
    images = np.random.default_rng(0).integers(0, 256, (options.batch, *[options.image_size] * 2, 3), dtype=np.uint8)
    take = partial(step, images=images, sample=np.arange(options.batch))
    first, compiling = {}, {}
    for key, engine in engines.items():
        with compilation() as compiling[key]:
            first[key] = take(engine)
    second = {key: take(engine) for key, engine in engines.items()}
    names = {key: ", ".join(key) for key in engines}
    times = take_turns({names[key]: partial(take, engine) for key, engine in engines.items()}, options.repeats)
    runs = plans(engines["PR-MIM 0.5", "torch"].method.schedule, options.batch, device)
    planning = take_turns(runs, 5 * options.repeats)

    rows: dict[str, tuple[float | None, ...]] = {}
    for arm in COMPARED:
        pair = [times[names[arm, name]] for name in PACKAGES]
        per_image = (1e3 * statistics.median(own) / options.batch for own in pair)
        rows[f"{arm}, ms per image"] = (*per_image, ratio(*reversed(pair)))
    to_dense = (ratio(times[names["PR-MIM 0.5", name]], times[names["dense", name]]) for name in PACKAGES)
    rows["PR-MIM 0.5 to dense"] = (*to_dense, None)
    per_image = (1e6 * statistics.median(planning[name]) / options.batch for name in PACKAGES)
    rows["plan, us per image"] = (*per_image, ratio(planning["JAX"], planning["torch"]))
    for arm in COMPARED:
        rows[f"{arm}, first step, s"] = (*(first[arm, name][0] for name in PACKAGES), None)
        seconds = compiling[arm, "JAX"]
        compile_only = seconds["backend_compile_duration"]
        rows[f"{arm}, trace and lower, s"] = (None, sum(seconds.values()) - compile_only, None)
        rows[f"{arm}, compile, s"] = (None, compile_only, None)
    for number, taken in enumerate((first, second), start=1):
        for arm in COMPARED:
            losses = [taken[arm, name][1] for name in PACKAGES]
            rows[f"{arm}, loss of step {number}"] = (*losses, losses[1] / losses[0])
    report.table("JAX against torch", {"torch": ".6g", "JAX": ".6g", "JAX to torch": ".6f"}, rows)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="vit_tiny")
    # The rest of the recipe photos_vit_tiny, but for the batch.
    sizes = {"image_size": 112, "patch_size": 8, "decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4}
    for name, size in {**sizes, "batch": 16, "repeats": 15}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

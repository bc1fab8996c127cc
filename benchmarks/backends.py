"""Training steps of JAX compared with PyTorch.

Both engines train one method from the same weights on the same batch. They take turns in one process; on a CPU,
separate processes give the same times. The first step of JAX includes tracing, lowering and compilation; PyTorch runs
eagerly.
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
from benchmarks.report import Report, argument_parser, random_images, ratio, take_turns
from prmim_core import Schedule, counter_noise, make_plan
from prmim_methods import MAEConfig, TrainingConfig

PACKAGES = {"torch": prmim_torch, "JAX": prmim_jax}
COMPARED = ("dense", "PR-MIM 0.5")
COMPILING = "/jax/core/compile/"

Engine = prmim_torch.Engine | prmim_jax.Engine
Key = tuple[str, str]
"""Names of an arm and of a backend."""


def build(options: argparse.Namespace, device: str) -> dict[Key, Engine]:
    """Return an engine per arm and backend; engines of an arm share initial weights."""
    sizes = {name: getattr(options, name) for name in ("model", "decoder_dim", "decoder_depth", "decoder_heads")}
    for name in ("image_size", "patch_size"):
        sizes[name] = (getattr(options, name),) * 2
    training = TrainingConfig(total_steps=1000, learning_rate=1e-4, precision=options.precision, device=device)
    engines = {
        (arm, name): package.Engine(MAEConfig(**sizes, **ARMS[arm]), training)
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
    """Return "cuda" if both backends find a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def step(engine: Engine, images: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """Run a synchronous training step; return its seconds and its loss."""
    start = time.perf_counter()
    engine.train_step(images, sample)
    loss = engine.read_metrics()["loss"]
    return time.perf_counter() - start, loss


@contextmanager
def compilation() -> Iterator[dict[str, float]]:
    """Collect the seconds of JAX's compilation phases, by name of the event."""
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
    """Return a synchronous function per backend that makes the plan of a batch."""
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
    # By default, JAX reserves most of the GPU's memory, which PyTorch needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = common_device() if options.device == "auto" else options.device
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "device")}
    report = Report("backends", settings | {"device": device}, options.json)
    engines = build(options, device)
    images = random_images((options.batch, options.image_size, options.image_size, 3))
    take = partial(step, images=images, sample=np.arange(options.batch))
    first, compiling = {}, {}
    for key, engine in engines.items():
        with compilation() as compiling[key]:
            first[key] = take(engine)
    second = {key: take(engine) for key, engine in engines.items()}
    names = {key: ", ".join(key) for key in engines}
    times = take_turns({names[key]: partial(take, engine) for key, engine in engines.items()}, options.repeats)
    runs = plans(engines["PR-MIM 0.5", "torch"].method.config.schedule, options.batch, device)
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
    # Other sizes are those of the recipe photos_vit_tiny, except for the batch.
    sizes = {"image_size": 112, "patch_size": 8, "decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4}
    for name, size in {**sizes, "batch": 16, "repeats": 15}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

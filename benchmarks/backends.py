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
from benchmarks.arms import ARMS, machine
from benchmarks.plan import microseconds
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
    engines = build(options, device)
    where = "; ".join(f"{name} on {engines['dense', name].device}" for name in PACKAGES)
    print(
        f"JAX against torch: training step, {options.model}, decoder {options.decoder_depth} x {options.decoder_dim}, "
        f"patch {options.patch_size}, {options.image_size} px, mask 0.75, {options.precision}, batch {options.batch}, "
        f"median of {options.repeats}  [{machine()}; jax {jax.__version__}; {where}]"
    )
    images = np.random.default_rng(0).integers(0, 256, (options.batch, *[options.image_size] * 2, 3), dtype=np.uint8)
    take = partial(step, images=images, sample=np.arange(options.batch))
    first, compiling = {}, {}
    for key, engine in engines.items():
        with compilation() as compiling[key]:
            first[key] = take(engine)
    second = {key: take(engine) for key, engine in engines.items()}
    times: dict[Key, list[float]] = {key: [] for key in engines}
    for _ in range(options.repeats):  # engines take turns, so that a slow moment hits them all
        for key, engine in engines.items():
            times[key].append(take(engine)[0])
    runs = plans(engines["PR-MIM 0.5", "torch"].method.schedule, options.batch, device)
    plan = [microseconds(runs[name], options.batch, 5 * options.repeats) for name in PACKAGES]

    print(f"{'':28}{'torch':>10}{'JAX':>10}{'JAX to torch':>14}")
    for arm in COMPARED:
        pair = [times[arm, name] for name in PACKAGES]
        per_image = (1e3 * statistics.median(own) / options.batch for own in pair)
        _row(f"{arm}, ms per image", *per_image, _ratio(*reversed(pair)), digits=2)
    _row("PR-MIM 0.5 to dense", *(_ratio(times["PR-MIM 0.5", name], times["dense", name]) for name in PACKAGES))
    _row("plan, us per image", *plan, plan[1] / plan[0], digits=1)
    for arm in COMPARED:
        _row(f"{arm}, first step, s", *(first[arm, name][0] for name in PACKAGES), digits=2)
        seconds = compiling[arm, "JAX"]
        compile_only = seconds["backend_compile_duration"]
        _row(f"{arm}, trace and lower", None, sum(seconds.values()) - compile_only, digits=2)
        _row(f"{arm}, compile", None, compile_only, digits=2)
    for number, taken in enumerate((first, second), start=1):
        for arm in COMPARED:
            losses = [taken[arm, name][1] for name in PACKAGES]
            _row(f"{arm}, loss of step {number}", *losses, losses[1] / losses[0], digits=6)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny")
    # The rest of the recipe photos_vit_tiny, but for the batch.
    sizes = {"image_size": 112, "patch_size": 8, "decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4}
    for name, size in {**sizes, "batch": 16, "repeats": 15}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(arguments)


def _ratio(own: list[float], other: list[float]) -> float:
    """Return the median ratio, turn by turn."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def _row(label: str, ours: float | None, theirs: float, ratio: float | None = None, *, digits: int = 3) -> None:
    cells = "".join(f"{'' if value is None else f'{value:.{digits}f}':>10}" for value in (ours, theirs))
    print(f"{label:28}{cells}" + ("" if ratio is None else f"{ratio:>14.{max(digits, 3)}f}"))


if __name__ == "__main__":
    main()

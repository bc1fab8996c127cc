"""Time of a training step: forward, backward and AdamW; arms of one model take turns in one process.

On torch, methods run as they are written, beside peers that are fed pixels which are on the device already. On JAX, by
its engine. The plan's share is the time of the plan alone over that of the step.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import arms
from benchmarks.report import Report, argument_parser, ratio, take_turns
from prmim_core import Schedule, counter_noise

WARM_UP = 2
"""The second step is the first one whose memory is all there: an optimiser's state comes into being in the first."""

Runs = dict[str, Callable[[], object]]

GOALS = {"PR-MIM 0.5": 0.75, "dense": 0.95, "plan": 0.005}
"""At most: a step of PR-MIM over the dense one; the dense one over the fastest peer; the plan's share of a step."""


def torch_runs(model: str, method: str, options: argparse.Namespace, device: str) -> tuple[Runs, Schedule]:
    """Return a training step of every arm and peer of a model, and the schedule of PR-MIM 0.5."""
    names = [*arms.METHODS[method]]
    if method == "mae" and options.peers:
        names += [arms.OFFICIAL, *arms.PEERS]
    modules = {name: arms.build(name, model, method=method).to(device) for name in names}
    arms.share_weights(modules.values())
    images, noise = arms.inputs(options.batch, device)
    pixels = torch.randn(options.batch, 3, 224, 224, device=device)
    runs: Runs = {}
    for name, module in modules.items():
        batch = (pixels if name in arms.PEERS else images, noise)
        runs[name] = torch_step(module, batch, precision=options.precision, compile=options.compile)
    return runs, modules["PR-MIM 0.5"].schedule


def torch_step(
    module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], *, precision: str = "float32", compile: bool = False
) -> Callable[[], None]:
    """Return a training step that waits for its end."""
    device = batch[0].device
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    is_ours = not isinstance(module, arms.TransformersMAE)
    forward = torch.compile(module, fullgraph=is_ours, dynamic=False) if compile else module

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = arms.loss(forward, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def jax_runs(model: str, method: str, options: argparse.Namespace, device: str) -> tuple[Runs, Schedule]:
    """Return a training step of every arm of a model, and the schedule of PR-MIM 0.5."""
    from prmim_jax import Engine

    training = {"seed": 0, "total_steps": 1000, "warmup_steps": 0, "learning_rate": 1e-4}
    images = np.random.default_rng(0).integers(0, 256, (options.batch, 224, 224, 3), dtype=np.uint8)

    def step(engine: Engine) -> None:
        engine.train_step(images, np.arange(options.batch))
        engine.read_metrics()

    runs: Runs = {}
    for name, changes in arms.METHODS[method].items():
        engine = Engine(
            {"name": method, "model": model, **changes}, precision=options.precision, device=device, **training
        )
        runs[name] = partial(step, engine)
        if name == "PR-MIM 0.5":
            schedule = engine.method.schedule
    return runs, schedule


def plan_run(schedule: Schedule, backend: str, batch: int, device: str) -> Callable[[], None]:
    """Return the plan of a batch alone."""
    noise = counter_noise(0, 0, np.arange(batch), schedule.grid.num_tokens)
    if backend == "torch":
        import prmim_torch

        on_device = torch.from_numpy(noise).to(device)

        def make() -> None:
            prmim_torch.make_plan(schedule, on_device)
            if device == "cuda":
                torch.cuda.synchronize()

        return make
    import jax

    import prmim_jax

    compiled = jax.jit(prmim_jax.make_plan, static_argnums=0)
    array = jax.device_put(noise, jax.local_devices(backend=device)[0])
    return lambda: compiled(schedule, array).order.block_until_ready()


def verdict(value: float, name: str) -> str:
    """Say whether a goal is met."""
    return (
        f"goal {GOALS[name]:.1%}"
        if name == "plan"
        else f"goal {GOALS[name]:.2f}" + (": met" if value <= GOALS[name] else ": MISSED")
    )


def table(model: str, method: str, options: argparse.Namespace, device: str, report: Report) -> None:
    """Measure the arms of one model, and print their table."""
    make_runs = torch_runs if options.backend == "torch" else jax_runs
    runs, schedule = make_runs(model, method, options, device)
    times = take_turns(runs, options.repeats, warm_up=WARM_UP)
    plan = take_turns({"plan": plan_run(schedule, options.backend, options.batch, device)}, 5 * options.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    peers = [name for name in arms.PEERS if name in times]
    fastest = min(peers, key=medians.__getitem__, default=None)
    rows: dict[str, tuple[Any, ...]] = {}
    for name, seconds in times.items():
        to_dense = ratio(seconds, times["dense"])
        to_peer = None if fastest is None else ratio(seconds, times[fastest])
        goal = None
        if name == "dense" and to_peer is not None:
            goal = verdict(to_peer, name)
        elif name == "PR-MIM 0.5" and method == "mae":
            goal = verdict(to_dense, name)
        rows[name] = (1e3 * medians[name] / options.batch, to_dense, to_peer, goal)
    share = statistics.median(plan["plan"]) / medians["PR-MIM 0.5"]
    rows["plan of PR-MIM 0.5"] = (
        1e3 * statistics.median(plan["plan"]) / options.batch,
        None,
        None,
        f"{share:.2%} of its step",
    )
    report.table(
        f"{method}, {model}",
        {"ms per image": ".2f", "to dense": ".3f", "to fastest peer": ".3f", "": ""},
        rows,
    )


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every model and method."""
    options = _parse(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shown: Mapping[str, Any] = {
        "backend": options.backend,
        "device": device,
        "precision": options.precision,
        "compiled": "yes" if options.compile or options.backend == "jax" else "no",
        "batch": options.batch,
        "pixels": 224,
        "patch": 16,
        "median of": options.repeats,
    }
    name = f"step-{options.backend}-{device}-{options.precision}" + "-compiled" * options.compile
    report = Report(name, shown, options.json)
    for model in options.models:
        for method in options.methods:
            table(model, method, options, device, report)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_base"], help="names of encoders")
    parser.add_argument("--methods", nargs="+", choices=tuple(arms.METHODS), default=["mae"])
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, ours and the peers'")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what is not ours")
    options = parser.parse_args(arguments)
    if options.compile and options.backend == "jax":
        parser.error("--compile: JAX compiles in any case")
    return options


if __name__ == "__main__":
    main()

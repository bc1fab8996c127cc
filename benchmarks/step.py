"""Time of a training step: forward, backward, AdamW.

The arms of one model take turns in one process. PyTorch runs our modules and those of peers, eagerly or compiled. The
input of peers is float images on the device. JAX runs its engine. The share of the plan is the time of the plan alone
relative to the step.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import arms
from benchmarks.report import Report, argument_parser, pick_device, random_images, ratio, take_turns, verdict
from prmim_core import Schedule, counter_noise

WARM_UP = 2
"""The first step allocates the optimizer state, so only the second one runs with all memory in place."""

CAPABILITY = "ATEN_CPU_CAPABILITY"
"""Environment variable that restricts the CPU instructions of PyTorch, to measure as on another CPU."""

Runs = dict[str, Callable[[], object]]

GOALS = {"PR-MIM 0.5": 0.75, "dense": 0.90}
"""Upper bounds: PR-MIM relative to dense, dense relative to the fastest peer."""
CROSS_GOAL = 1.02
"""Upper bound of PR-MIM on CrossMAE relative to CrossMAE, which decodes as many tokens."""


def torch_runs(model: str, method: str, options: argparse.Namespace, device: str) -> tuple[Runs, Schedule]:
    """Return training steps of arms and peers in PyTorch, and PR-MIM 0.5's schedule."""
    names = [name for name in arms.METHODS[method] if name in GOALS or not options.goals]
    if method == "mae" and options.peers:
        names += [*([] if options.goals else [arms.OFFICIAL]), *arms.PEERS]
    modules = {name: arms.build(name, model, method=method).to(device) for name in names}
    arms.share_weights(modules.values())
    images, noise = arms.inputs(options.batch, device)
    pixels = torch.randn(options.batch, 3, 224, 224, device=device)
    runs: Runs = {}
    for name, module in modules.items():
        batch = (pixels if name in arms.PEERS else images, noise)
        runs[name] = torch_step(module, batch, precision=options.precision, compile=options.compile)
    return runs, modules["PR-MIM 0.5"].config.schedule


def torch_step(
    module: nn.Module, batch: tuple[torch.Tensor, ...], *, precision: str = "float32", compile: bool = False
) -> Callable[[], None]:
    """Return a synchronous training step."""
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
    """Return training steps of all arms in JAX, and PR-MIM 0.5's schedule."""
    images = random_images((options.batch, 224, 224, 3))

    def step(engine: Any) -> None:
        engine.train_step(images, np.arange(options.batch))
        engine.read_metrics()

    engines = {
        name: arms.jax_engine(name, model, method=method, precision=options.precision, device=device)
        for name in arms.METHODS[method]
        if name in GOALS or not options.goals
    }
    runs = {name: partial(step, engine) for name, engine in engines.items()}
    return runs, engines["PR-MIM 0.5"].method.config.schedule


def plan_run(schedule: Schedule, backend: str, batch: int, device: str) -> Callable[[], None]:
    """Return a function that makes the plan of a batch."""
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


def goal_verdict(value: float, name: str) -> str:
    """Return a goal and whether a value meets it, in words."""
    return f"goal {GOALS[name]:.2f}: {verdict(value, GOALS[name])}"


def table(model: str, method: str, options: argparse.Namespace, device: str, report: Report) -> None:
    """Print the step times of one model and method."""
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
            goal = goal_verdict(to_peer, name)
        elif name == "PR-MIM 0.5" and method == "mae":
            goal = goal_verdict(to_dense, name)
        elif name == "PR-MIM 0.5" and "partial 0.5" in times:
            to_partial = ratio(seconds, times["partial 0.5"])
            goal = f"{to_partial:.3f} of partial 0.5, goal {CROSS_GOAL:.2f}: {verdict(to_partial, CROSS_GOAL)}"
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
    """Print a table for each model and method."""
    options = _parse(arguments)
    device = pick_device(options.device)
    shown: Mapping[str, Any] = {
        "backend": options.backend,
        "device": f"{device}, {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device,
        "precision": options.precision,
        "compiled": "yes" if options.compile or options.backend == "jax" else "no",
        "batch": options.batch,
        "pixels": 224,
        "patch": 16,
        "median of": options.repeats,
    }
    name = f"step-{options.backend}-{device}-{options.precision}" + "-compiled" * options.compile
    if CAPABILITY in os.environ:
        name += f"-{os.environ[CAPABILITY]}"
    report = Report(name, shown, options.json)
    for model in options.models:
        for method in options.methods:
            table(model, method, options, device, report)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_base"], help="encoder sizes")
    parser.add_argument("--methods", nargs="+", choices=tuple(arms.METHODS), default=["mae"])
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our modules and the peers with torch.compile")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--goals", action="store_true", help="only the arms and peers that goals compare")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="skip peers and the official layout")
    options = parser.parse_args(arguments)
    if options.compile and options.backend == "jax":
        parser.error("--compile: not an option of JAX, which always compiles")
    return options


if __name__ == "__main__":
    main()

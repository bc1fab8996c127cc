"""Memory of a training step per image: saved for the backward pass, and peak.

Both numbers are the increase per additional image in the batch, without parameters and their half-precision copies.
Parameter gradients exist from the start, as in gradient accumulation. The formulas are ``activation_bytes`` and
``peak_activation_bytes`` of ``prmim_methods.cost``; the peak includes gradients of activations. The official MAE trains
with half-precision autocast.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import arms
from benchmarks.report import Report, argument_parser, pick_device, verdict

RECOMPUTED = ", recomputed"
EXPLICIT = ", explicit"
GOALS = {("PR-MIM 0.5", arms.OFFICIAL): 0.64, ("PR-MIM 0.5", "dense"): 0.72}
"""Upper bounds of the bytes that PR-MIM saves, relative to another arm."""


def build(arm: str, model: str, method: str) -> nn.Module:
    """Return the module of an arm; its name may end with EXPLICIT or RECOMPUTED."""
    plain = arm.removesuffix(RECOMPUTED).removesuffix(EXPLICIT)
    module = arms.build(plain, model, method=method, **{"recompute_blocks": True} if RECOMPUTED in arm else {})
    return arms.explicit(module) if EXPLICIT in arm else module


def names(method: str) -> list[str]:
    """Return the names of a method's arms, the official layout first."""
    half = "PR-MIM 0.5"
    extra = [arm + ending for ending in (EXPLICIT, RECOMPUTED) for arm in ("dense", half)]
    return [arms.OFFICIAL] * (method == "mae") + [*arms.METHODS[method], *extra]


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Count the bytes saved for the backward pass: each storage once, no parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # Keep the graph alive until here: a freed address may be reused, and its storage would be lost or counted twice.
    del output
    return sum(kept.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return the peak of allocated bytes during a step, beyond those at its start."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # All allocations and frees in order, including the workspace of operators.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in changes)]).max())


def per_image(measure: Callable[[int], int], batch: int) -> float:
    """Return the increase of a measurement by one more image in the batch."""
    half = batch // 2
    return (measure(batch) - measure(half)) / (batch - half)


def measure(module: nn.Module, precision: str, batch: int, device: str) -> tuple[float, float]:
    """Return saved bytes and peak bytes, both per image."""
    module.to(device)
    images, noise = arms.inputs(batch, device)
    parameters = list(module.parameters())

    def forward(size: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return arms.loss(module, images[:size], noise[:size])

    def step(size: int) -> None:
        forward(size).backward()

    step(2)  # allocates the gradients
    saved = per_image(lambda size: saved_bytes(partial(forward, size), parameters), batch)
    peak = per_image(lambda size: peak_bytes(partial(step, size), device), batch)
    return saved, peak


def jax_temporary_bytes(arm: str, model: str, method: str, precision: str, batch: int) -> float:
    """Return the temporary bytes of XLA's compiled training step, per image."""
    plain, recompute = arm.removesuffix(RECOMPUTED), RECOMPUTED in arm
    engine = arms.jax_engine(plain, model, method=method, precision=precision, recompute_blocks=recompute)
    return per_image(lambda size: arms.compile_step(engine, size).memory_analysis().temp_size_in_bytes, batch)


def table(model: str, method: str, precision: str, options: argparse.Namespace, device: str, report: Report) -> None:
    """Print the memory of one model, method and precision."""
    measured: dict[str, tuple[float, ...]] = {}
    expected = {}
    for name in names(method):
        module = build(name, model, method)
        measured[name] = measure(module, precision, options.batch, device)
        # SimMIM's attention has a learned bias, which PyTorch's fused CPU kernel does not support.
        is_math = method == "simmim" and device == "cpu" and precision == "float32"
        is_explicit = EXPLICIT in name or is_math
        attention = "explicit" if is_explicit else "fused"
        expected[name] = arms.formula(module, attention=attention, compute_bytes=2 if precision == "bfloat16" else 4)
        del module
        gc.collect()
    rows: dict[str, tuple[Any, ...]] = {}
    columns = {"saved MB": ".1f", "to formula": ".3f", "to dense": ".3f", "peak MB": ".1f", "to formula ": ".3f"}
    columns |= {"to dense ": ".3f"}
    if method == "mae":
        columns |= {"saved to official": ".3f", "peak to official": ".3f"}
    if options.jax:
        columns["JAX MB"] = ".1f"
    for name, (saved, peak) in measured.items():
        dense = measured["dense"]
        cost = expected[name]
        rows[name] = (
            *(saved / 1e6, saved / cost.activation_bytes, saved / dense[0]),
            *(peak / 1e6, peak / cost.peak_activation_bytes, peak / dense[1]),
        )
        if method == "mae":
            rows[name] += tuple(own / other for own, other in zip((saved, peak), measured[arms.OFFICIAL], strict=True))
        if options.jax:
            is_there = EXPLICIT not in name and name != arms.OFFICIAL
            value = jax_temporary_bytes(name, model, method, precision, options.batch) / 1e6 if is_there else None
            rows[name] += (value,)
    report.table(f"{method}, {model}, {precision}", columns, rows)
    for (own, other), goal in GOALS.items():
        if method == "mae":
            share = measured[own][0] / measured[other][0]
            print(f"goal, saved by {own} to {other}: at most {goal}: {share:.3f}, {verdict(share, goal)}")


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each model, method and precision."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_base"], help="encoder sizes")
    parser.add_argument("--methods", nargs="+", choices=tuple(arms.METHODS), default=["mae"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], metavar="PRECISION"
    )
    parser.add_argument("--jax", action="store_true", help="add a column with the temporary memory of a step in JAX")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    settings = {"device": device, "batch": options.batch, "pixels": 224, "patch": 16, "per": "image"}
    report = Report(f"memory-{device}", settings, options.json)
    for model in options.models:
        for method in options.methods:
            for precision in options.precisions:
                table(model, method, precision, options, device, report)


if __name__ == "__main__":
    main()

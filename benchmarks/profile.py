"""Time of a training step by kind of operation, compared with device limits.

The limits are measured in the same run: FLOP/s of a large matrix product, and bandwidth of a copy. The column "at the
limit" is the time of a kind of operation at its limit. Matrix products count their FLOP. The optimizer
counts 28 bytes per parameter: it reads weight, gradient and two moments, and writes all but the gradient. All other
operations count one write and one read of the tensors saved for the backward pass. JAX fuses operations, so its step is
compared as a whole.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arms
from benchmarks.report import Report, argument_parser, pick_device, random_images
from benchmarks.step import WARM_UP, torch_step
from prmim_torch.vit import linear

PRODUCTS = "matrix products"
OTHERS = "sums, masks, loss"
KINDS = {
    "plan": ("prmim::",),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "softmax"),
    PRODUCTS: ("aten::mm", "addmm", "bmm", "conv", "gemm", "cutlass", "nvjet"),
    "normalization": ("layer_norm",),
    "GELU": ("gelu",),
    "optimizer": ("adamw", "Optimizer"),
    "copies and gathers": ("copy_", "clone", "aten::cat", "gather", "scatter", "index", "embedding", "slice_backward"),
}
"""Kinds of operations by substrings of their names; the first match counts."""
STREAM_BYTES = 2**28
OPTIMIZER_BYTES = 28


def kind_of(name: str) -> str:
    """Return the kind of an operation.

    Examples
    --------
    >>> kind_of("aten::addmm"), kind_of("aten::native_layer_norm_backward"), kind_of("aten::add")
    ('matrix products', 'normalization', 'sums, masks, loss')
    """
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHERS)


def fastest(run: Callable[[], object], repeats: int, device: str) -> float:
    """Return the minimum time of a function in seconds, after one untimed call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_flops(precision: str, device: str, repeats: int = 5) -> float:
    """Return the FLOP/s of a large matrix product, by PyTorch's fastest kernel."""
    size = 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, weight = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    bias = torch.zeros(size, dtype=dtype, device=device)
    with torch.no_grad():
        ways = (lambda: x @ weight.T, lambda: linear(x.view(32, 64, size), weight, bias))
        return 2 * size**3 / min(fastest(way, repeats, device) for way in ways)


def bandwidth(device: str, repeats: int = 5) -> float:
    """Return the bandwidth of a copy in bytes/s, reads and writes together."""
    source = torch.ones(STREAM_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * STREAM_BYTES / fastest(lambda: target.copy_(source), repeats, device)


def time_by_kind(step: Callable[[], None], device: str) -> tuple[dict[str, float], dict[str, int]]:
    """Return seconds and number of operations of a step, by kind."""
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
    seconds: dict[str, float] = dict.fromkeys((*KINDS, OTHERS), 0.0)
    calls = dict.fromkeys(seconds, 0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6
        calls[kind_of(event.key)] += event.count if event.key.startswith(("aten::", "prmim::")) else 0
    return seconds, calls


def products_of(step: Callable[[], None]) -> float:
    """Return the FLOP of the matrix products of a step, without those of attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if kind_of(f"aten::{operator}") != "attention")


def torch_table(arm: str, options: argparse.Namespace, device: str, peak: float, stream: float, report: Report) -> None:
    """Profile a step of an arm in PyTorch and print its table."""
    module = arms.build(arm, options.model, method=options.method).to(device)
    step = torch_step(module, arms.inputs(options.batch, device), precision=options.precision)
    for _ in range(WARM_UP):
        step()
    # Medians are taken for each kind separately.
    profiled = [time_by_kind(step, device) for _ in range(options.repeats)]
    seconds = {kind: statistics.median(times[kind] for times, _ in profiled) for kind in (*KINDS, OTHERS)}
    calls = profiled[0][1]
    total = sum(seconds.values())
    saved = arms.formula(module, compute_bytes=2 if options.precision == "bfloat16" else 4).activation_bytes
    learned = sum(parameter.numel() for parameter in module.parameters())
    limits = {
        PRODUCTS: products_of(step) / peak,
        "optimizer": OPTIMIZER_BYTES * learned / stream,
        "all others": 2 * saved * options.batch / stream,
    }
    others = {kind: value for kind, value in seconds.items() if kind not in (PRODUCTS, "optimizer")}
    seconds["all others"], calls["all others"] = sum(others.values()), sum(calls[kind] for kind in others)
    order = (PRODUCTS, "optimizer", "all others", *sorted(others, key=others.__getitem__, reverse=True))
    rows: dict[str, tuple[Any, ...]] = {}
    for kind in order:
        limit = limits.get(kind)
        at_limit = (None, None) if limit is None else (1e3 * limit / options.batch, limit / seconds[kind])
        name = f"  {kind}" if kind in others else kind
        rows[name] = (1e3 * seconds[kind] / options.batch, seconds[kind] / total, calls[kind], *at_limit)
    rows["step"] = (1e3 * total / options.batch, 1.0, sum(calls[kind] for kind in order[:3]), None, None)
    columns = {"ms per image": ".2f", "share": ".1%", "calls": "d", "at the limit": ".2f", "of the limit": ".1%"}
    report.table(f"{options.method}, {arm}", columns, rows)


def jax_table(options: argparse.Namespace, device: str, peak: float, stream: float, report: Report) -> None:
    """Print the compiled steps of all arms in JAX, compared with the limits."""
    images, sample = random_images((options.batch, 224, 224, 3)), np.arange(options.batch)
    rows = {}
    for arm in options.arms:
        engine = arms.jax_engine(arm, options.model, method=options.method, precision=options.precision, device=device)

        def step(engine: Any = engine) -> None:
            engine.train_step(images, sample)
            engine.read_metrics()

        seconds = fastest(step, options.repeats, "cpu")  # reading the metrics synchronizes
        compiled = arms.compile_step(engine, options.batch)
        cost = compiled.cost_analysis()
        operations = Counter(
            line.split("(")[0].split()[-1] for line in compiled.as_text().splitlines() if " = " in line
        )
        rows[arm] = (
            1e3 * seconds / options.batch,
            1e3 * cost["flops"] / peak / options.batch,
            cost["flops"] / peak / seconds,
            1e3 * cost["bytes accessed"] / stream / options.batch,
            *(operations[name] for name in ("fusion", "dot", "transpose", "copy", "gather")),
        )
    columns = {"ms per image": ".2f", "flops at limit": ".2f", "of limit": ".1%", "bytes at limit": ".2f"}
    columns |= dict.fromkeys(("fusions", "dots", "transposes", "copies", "gathers"), "d")
    report.table(f"{options.method} on JAX", columns, rows)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each arm, or one for all arms in JAX."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--method", choices=tuple(arms.METHODS), default="mae")
    parser.add_argument("--arms", nargs="+", default=["dense", "PR-MIM 0.5"])
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    peak, stream = peak_flops(options.precision, device), bandwidth(device)
    settings = {
        "backend": options.backend,
        "device": device,
        "model": options.model,
        "precision": options.precision,
        "batch": options.batch,
        "peak": f"{peak / 1e9:.0f} GFLOP/s",
        "bandwidth": f"{stream / 1e9:.1f} GB/s",
    }
    report = Report(f"profile-{options.backend}-{device}-{options.precision}-{options.model}", settings, options.json)
    if options.backend == "jax":
        jax_table(options, device, peak, stream, report)
        return
    for arm in options.arms:
        torch_table(arm, options, device, peak, stream, report)


if __name__ == "__main__":
    main()

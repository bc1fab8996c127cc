"""Compile time of deep models in JAX, with and without ``scan_blocks``.

Compile times are CPU seconds summed over cores, which other load hardly changes.
"""

import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.report import Report, argument_parser, random_images, take_turns
from prmim_jax import Engine
from prmim_methods import MAEConfig, TrainingConfig


def make_engine(depth: int, decoder_depth: int, dim: int, scan_blocks: bool) -> Engine:
    """Return an engine that trains an MAE of given depths."""
    config = MAEConfig(
        image_size=(64, 64),
        patch_size=(8, 8),
        embed_dim=dim,
        depth=depth,
        num_heads=4,
        decoder_dim=64,
        decoder_depth=decoder_depth,
        decoder_heads=4,
        scan_blocks=scan_blocks,
    )
    return Engine(
        config, TrainingConfig(total_steps=100, warmup_steps=10, learning_rate=1e-3, clip_grad=1.0, precision="float32")
    )


def compile_seconds(program: Any, *arguments: Any) -> tuple[float, int]:
    """Compile a program; return the CPU seconds and the lines of the result."""
    start = time.process_time()
    compiled = program.lower(*arguments).compile()
    return time.process_time() - start, compiled.as_text().count("\n")


def take_step(engine: Engine, images: Any, sample: Any) -> None:
    """Run a synchronous training step."""
    engine.train_step(images, sample)
    jax.block_until_ready(engine._state)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 32])
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    images, sample = random_images((options.batch, 64, 64, 3)), np.arange(options.batch)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    report = Report("scan", settings, options.json)
    rows: dict[str, tuple[float, ...]] = {}
    for depth in options.depths:
        compiled, engines = {}, {}
        for kind in ("loop", "scan"):
            engine = engines[kind] = make_engine(depth, options.decoder_depth, options.dim, kind == "scan")
            inputs = engine._inputs(images, sample)
            noise = engine._noise(inputs[1], 0)
            gradient, state = jax.jit(engine._gradients), engine._state
            compiled[kind] = (
                *compile_seconds(gradient, state.parameters, state.statistics, engine._buffers, inputs[0], noise),
                *compile_seconds(engine._train, state, engine._buffers, inputs, 0, 0.0),
            )
        times = take_turns(
            {kind: partial(take_step, engine, images, sample) for kind, engine in engines.items()}, options.repeats
        )
        for kind in engines:
            rows[f"{depth} blocks, {kind}"] = (*compiled[kind], 1e3 * statistics.median(times[kind]))
    columns = {"gradient, s": ".1f", "lines": "d", "whole step, s": ".1f", "its lines": "d", "a step, ms": ".1f"}
    report.table("compilation", columns, rows)


if __name__ == "__main__":
    main()

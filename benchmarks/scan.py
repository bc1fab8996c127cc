"""What JAX takes to compile a deep model, block by block (loop) and with one block that is looped over (`scan_blocks`).

Compilation is given in seconds of processor time, all cores together, which other work on the machine disturbs little.
"""

import argparse
import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from prmim_jax import Engine


def make_engine(depth: int, decoder_depth: int, dim: int, scan_blocks: bool) -> Engine:
    """Return an engine with an MAE of so many blocks."""
    method = {
        "name": "mae",
        "image_size": (64, 64),
        "patch_size": (8, 8),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": 4,
        "decoder_dim": 64,
        "decoder_depth": decoder_depth,
        "decoder_heads": 4,
        "scan_blocks": scan_blocks,
    }
    return Engine(method, seed=0, total_steps=100, warmup_steps=10, learning_rate=1e-3, clip_grad=1.0)


def compile_seconds(program: Any, *arguments: Any) -> tuple[float, int]:
    """Trace, lower and compile a program; return the seconds that it takes, and the lines of the result."""
    start = time.process_time()
    compiled = program.lower(*arguments).compile()
    return time.process_time() - start, compiled.as_text().count("\n")


def step_seconds(engine: Engine, images: Any, sample: Any) -> float:
    """Take a training step and wait for it."""
    start = time.perf_counter()
    engine.train_step(images, sample)
    jax.block_until_ready(engine._state)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 32])
    parser.add_argument("--decoder-depth", type=int, default=8)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    images = np.random.default_rng(0).integers(0, 256, (options.batch, 64, 64, 3), dtype=np.uint8)
    sample = np.arange(options.batch)
    print(
        f"MAE of width {options.dim}, 8x8 tokens, {options.decoder_depth} decoder blocks of width 64, "
        f"batch {options.batch}  "
        f"[jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores]"
    )
    print(f"{'':12}{'gradient':>21}{'whole step':>21}{'of a step':>11}")
    print(f"{'blocks':12}{'compile s':>12}{'lines':>9}{'compile s':>12}{'lines':>9}{'ms':>11}")
    for depth in options.depths:
        rows, engines = {}, {}
        for kind in ("loop", "scan"):
            engine = engines[kind] = make_engine(depth, options.decoder_depth, options.dim, kind == "scan")
            inputs = engine._inputs(images, sample)
            noise = engine._noise(inputs[1], 0)
            gradient = jax.jit(engine._gradients)
            seconds, lines = compile_seconds(gradient, engine._state.parameters, engine._buffers, inputs[0], noise)
            rows[kind] = f"{seconds:>12.1f}{lines:>9}"
            seconds, lines = compile_seconds(engine._train, engine._state, engine._buffers, *inputs, 0, 0.0)
            rows[kind] += f"{seconds:>12.1f}{lines:>9}"
        times: dict[str, list[float]] = {kind: [] for kind in engines}
        for turn in range(options.repeats + 1):  # in turns, so that a slow moment hits both
            for kind, engine in engines.items():
                seconds = step_seconds(engine, images, sample)
                if turn:
                    times[kind].append(seconds)
        for kind, row in rows.items():
            print(f"{f'{depth} {kind}':12}{row}{1e3 * statistics.median(times[kind]):>11.1f}", flush=True)


if __name__ == "__main__":
    main()

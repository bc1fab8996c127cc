"""Run short benchmarks in a few minutes, or with ``--full`` all of them.

The full benchmarks use the settings of the documentation. Each benchmark runs in its own process, so that the memory
state of one does not affect another.
"""

import os
import subprocess
import sys
import time

from benchmarks.report import argument_parser

SHORT = {
    "macs": [[]],
    "targets": [["--channels", "1", "--patch_size", "2"]],
    "step": [["--models", "vit_small", "--batch", "16", "--repeats", "2"]],
    "memory": [["--models", "vit_small", "--precisions", "float32"]],
    "methods": [["--recipes", "mae", "--batch", "2", "--repeats", "1"]],
    "profile": [["--model", "vit_small", "--arms", "PR-MIM 0.5", "--repeats", "1"]],
    "plan": [["--images", "64", "--repeats", "3"]],
    "backends": [["--repeats", "5"]],
    "checkpoint": [["--model", "vit_tiny", "--repeats", "1", "--step-seconds", "10"]],
    "scale": [["--no-check", "--models", "vit_base"]],
    "input": [["--images", "64", "--repeats", "1"]],
    "row_groups": [["--images", "400", "--repeats", "1"]],
    "startup": [["--repeats", "1"]],
}
FULL = {
    "macs": [[]],
    "targets": [["--channels", "1", "--patch_size", "2"]],
    "step": [
        ["--models", "vit_base", "vit_small", "--methods", "mae", "simmim", "--repeats", "7"],
        ["--models", "vit_base", "--precision", "bfloat16", "--repeats", "7"],
        ["--models", "vit_base", "--compile", "--repeats", "7"],
        ["--models", "vit_small", "--backend", "jax", "--methods", "mae", "simmim", "--repeats", "7"],
    ],
    "memory": [
        ["--models", "vit_base", "--methods", "mae", "simmim"],
        ["--models", "vit_small", "--precisions", "float32", "--jax"],
    ],
    "methods": [[]],
    "profile": [
        ["--model", "vit_base", "--repeats", "5"],
        ["--model", "vit_small", "--repeats", "5"],
        ["--model", "vit_small", "--backend", "jax", "--repeats", "5"],
    ],
    "plan": [[]],
    "backends": [[]],
    "checkpoint": [[]],
    "scale": [[]],
    "scan": [[]],
    "input": [[]],
    "row_groups": [[]],
    "startup": [[]],
}
"""Runs of each benchmark, as lists of options."""

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
"""Settings that make glibc keep large blocks between steps, which makes times repeatable."""
TIMED = ("step", "methods", "profile", "backends")
"""Benchmarks that time large allocations."""


def main(arguments: list[str] | None = None) -> int:
    """Run all benchmarks, even after failures; return the number of failures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--full", action="store_true", help="all benchmarks at full length")
    parser.add_argument("--only", nargs="+", choices=tuple(FULL), metavar="NAME", help=f"some of {', '.join(FULL)}")
    options = parser.parse_args(arguments)
    chosen = FULL if options.full else SHORT
    failed = 0
    for name, runs in chosen.items():
        if options.only and name not in options.only:
            continue
        for settings in runs:
            words = [f"benchmarks.{name}", *settings]
            print(f"== python -m {' '.join(words)}", flush=True)
            start = time.perf_counter()
            command = [sys.executable, "-m", *words, "--json", str(options.json)]
            environment = {**os.environ, **(KEPT_MEMORY if name in TIMED else {})}
            code = subprocess.run(command, env=environment, check=False).returncode
            failed += code != 0
            print(
                f"== {time.perf_counter() - start:.0f} s" + (f", FAILED with {code}" if code else "") + "\n", flush=True
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())

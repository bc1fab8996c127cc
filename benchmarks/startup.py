"""Start-up time of commands, each in its own process.

The goal is in CPU seconds: other load hardly changes them, and on an idle core they equal the waiting time of the user.
"""

import statistics
import subprocess
import sys
import tempfile
from resource import RUSAGE_CHILDREN, getrusage

from benchmarks.report import Report, argument_parser, verdict

GOAL = 1.5
"""Upper bound of the CPU seconds of a command."""
PRMIM = ("-m", "prmim_train")
COMMANDS = {
    "prmim --help": (*PRMIM, "--help"),
    "prmim pretrain --help": (*PRMIM, "pretrain", "--help"),
    "prmim inspect": (*PRMIM, "inspect"),
    "prmim inspect, ViT-B": (*PRMIM, "inspect", "--data", "digits", "--config", "mae_vit_base"),
    "error: an option": (*PRMIM, "inspect", "--image_size", "31"),
    "error: no data": (*PRMIM, "pretrain", "--data", "nowhere"),
    "error: no run": (*PRMIM, "evaluate", "--run", "nowhere"),
}
"""Words after `python`."""
IMPORTS = {f"import {name}": ("-c", f"import {name}") for name in ("numpy", "sklearn.datasets", "torch", "jax")}
"""Imports to compare with."""


def cpu_seconds(words: tuple[str, ...], folder: str) -> float:
    """Run Python in a folder; return the CPU seconds of the process."""
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=False)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    """Print the seconds, also relative to an import of NumPy, and the goal."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    report = Report("startup", {"repeats": options.repeats}, options.json)
    with tempfile.TemporaryDirectory() as folder:
        seconds = {
            name: statistics.median(cpu_seconds(words, folder) for _ in range(options.repeats))
            for name, words in (COMMANDS | IMPORTS).items()
        }
    rows = {name: (value, value / seconds["import numpy"]) for name, value in seconds.items()}
    report.table("start-up", {"CPU s": ".2f", "to NumPy": ".1f"}, rows)
    slowest = max(seconds[name] for name in COMMANDS)
    print(f"goal for commands: at most {GOAL} CPU s: {slowest:.2f}, {verdict(slowest, GOAL)}")


if __name__ == "__main__":
    main()

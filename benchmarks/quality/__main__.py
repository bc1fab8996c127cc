"""Train and evaluate the arms of a study for a given time, then print the tables.

The command is idempotent: it skips finished trainings and resumes interrupted ones.
"""

import sys
import time
from pathlib import Path

from benchmarks.quality import data, records, tables
from benchmarks.quality.arms import STUDIES
from benchmarks.quality.runs import Run, carry_out
from benchmarks.quality.speed import time_steps
from benchmarks.report import Report, argument_parser

RESULTS = Path(__file__).parent / "results"
"""Records that are kept with the code."""


def main(arguments: list[str] | None = None) -> int:
    """Continue a study and print its tables; return 1 if something failed."""
    start = time.monotonic()
    parser = argument_parser(__doc__)
    parser.add_argument("--study", choices=tuple(STUDIES), default="confirm", help="name of the study")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes of training; 0: only print the tables")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="train only these arms of the study")
    parser.add_argument("--seeds", type=int, help="number of seeds per arm (default: the study's)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="FOLDER", help="data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), metavar="FOLDER", help="trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="records, one file per study")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time; they share the CPU cores equally")
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch", help="framework that trains")
    parser.add_argument("--time", type=int, default=0, metavar="TURNS", help="also time this many steps of each arm")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against throw ratio to this file")
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    unknown = set(options.arms or ()) - set(study.arms)
    if unknown:
        parser.error(f"--arms: expected some of {'; '.join(study.arms)}, got {min(unknown)}")
    failure = ""
    if options.minutes > 0:
        try:
            images = data.find(study.world, options.data, options.runs / "data")
            runs = [
                Run(study, arm, seed, images, options.runs, options.backend)
                for arm, seed in study.order(options.arms or study.arms, options.seeds or study.seeds)
            ]
            done = records.load(study, options.results)
            left = [run for run in runs if run.seed not in done[run.arm]]
            print(f"{study.name}: {len(runs) - len(left)} of {len(runs)} runs are done")
            carry_out(left, options.results, jobs=options.jobs, deadline=start + 60 * options.minutes)
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            failure = str(error)
    settings = {"study": study.name, "epochs": study.epochs}
    report = Report(f"quality-{study.name}", settings, options.json)
    tables.show(records.load(study, options.results), report)
    try:
        if options.time:
            time_steps(study, options.arms or list(study.arms), options.time, options.backend, report)
        if options.plot is not None:
            caption = f"{study.world.data}, {study.epochs} epochs. Bars: standard errors over seeds; no bar: one seed."
            tables.draw(records.load_alike(study, options.results), options.plot, caption)
    except (FileNotFoundError, ValueError) as error:
        failure = failure or str(error)
    if failure:
        print(failure, file=sys.stderr)
    return bool(failure)


if __name__ == "__main__":
    sys.exit(main())

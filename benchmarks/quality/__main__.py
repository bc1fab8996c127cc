"""Train and evaluate the arms of a study, as far as the time allows, and print what is known so far.

Run it again to go on: what is done is skipped, and what was stopped goes on from its checkpoint.
"""

import sys
import time
from pathlib import Path

from benchmarks.quality import data, tables
from benchmarks.quality.arms import STUDIES
from benchmarks.quality.runs import Run, carry_out
from benchmarks.quality.speed import time_steps
from benchmarks.report import Report, argument_parser

RESULTS = Path(__file__).parent / "results"
"""Results that are kept with the code."""


def main(arguments: list[str] | None = None) -> int:
    """Go on with a study; return 1 if something failed."""
    start = time.monotonic()
    parser = argument_parser(__doc__)
    parser.add_argument("--study", choices=tuple(STUDIES), default="confirm", help="which one")
    parser.add_argument("--minutes", type=float, default=0.0, help="time for training; 0: print what is known alone")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="those alone, of the arms of the study")
    parser.add_argument("--seeds", type=int, help="in place of the study's number")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="FOLDER", help="of the images")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), metavar="FOLDER", help="of the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="one JSON file for each run")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on its share of cores")
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    parser.add_argument("--time", type=int, default=0, metavar="TURNS", help="time training steps too, in turns")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw accuracy against throw ratio")
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    unknown = set(options.arms or ()) - set(study.arms)
    if unknown:
        parser.error(f"--arms: expected some of {'; '.join(study.arms)}, got {min(unknown)}")
    failure = ""
    if options.minutes > 0:
        try:
            images = data.find(study.world.data, options.data, options.runs / "data")
            runs = [
                Run(study, arm, seed, images, options.runs, options.backend)
                for seed in range(options.seeds or study.seeds)
                for arm in options.arms or study.arms
            ]
            left = [run for run in runs if not run.is_done(options.results)]
            print(f"{study.name}: {len(runs) - len(left)} of {len(runs)} runs are done")
            carry_out(left, options.results, jobs=options.jobs, deadline=start + 60 * options.minutes)
        except (FileNotFoundError, RuntimeError) as error:
            failure = str(error)
    results = tables.load(study, options.results)
    settings = {"study": study.name, "epochs": study.epochs}
    report = Report(f"quality-{study.name}", settings, options.json)
    tables.show(results, report)
    if options.time:
        time_steps(study, options.arms or list(study.arms), options.time, options.backend, report)
    if options.plot is not None:
        caption = f"{study.world.data}, {study.epochs} epochs. Bars: standard errors over seeds; no bar: one seed."
        tables.draw(tables.load_alike(study, options.results), options.plot, caption)
    if failure:
        print(failure, file=sys.stderr)
    return bool(failure)


if __name__ == "__main__":
    sys.exit(main())

"""Trainings of a study, as sequences of resumable ``prmim`` commands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import records
from benchmarks.quality.arms import ARMS, Study
from benchmarks.quality.correct import read_correct
from benchmarks.quality.data import Images
from benchmarks.report import environment
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import read_run_config

PATIENCE = 120.0
"""Seconds reserved for an interrupted training to write its checkpoint."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training of an arm and its evaluation.

    Parameters
    ----------
    study
        The study.
    arm
        Name of the arm.
    seed
        Random seed.
    images
        Paths of the images.
    folder
        Parent folder of all trainings.
    backend
        ``"torch"`` or ``"jax"``.
    """

    study: Study
    arm: str
    seed: int
    images: Images
    folder: Path
    backend: str

    @property
    def title(self) -> str:
        """Name in messages."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def label(self) -> str:
        """Name in paths."""
        return f"{self.arm}-{self.seed}".replace(", ", "-").replace(" ", "-")

    @property
    def path(self) -> Path:
        """Folder of the training."""
        return self.folder / self.study.name / self.label

    @property
    def log(self) -> Path:
        """File with the output of all commands."""
        return self.path.with_name(f"{self.label}.log")

    def options(self) -> dict[str, Any]:
        """Return the options of ``prmim pretrain``, except those of saving and reports."""
        epochs = self.study.arm_epochs(self.arm)
        options = {"data": self.images.train, "epochs": epochs, **self.study.options(self.arm)}
        holdout = {} if self.images.test is None else {"holdout": 0.0}
        return {**options, **holdout, "seed": self.seed, "backend": self.backend}

    def commands(self) -> Iterator[list[str]]:
        """Yield the commands in order; each resumes, and is a no-op if it is done."""
        program = "benchmarks.quality.detached" if ARMS[self.arm].detached else "prmim_train"
        saving = {"resume": True, "checkpoint_minutes": self.study.world.minutes, "keep_checkpoints": 1}
        quiet = {"eval_limit": 0, "pictures": 0}
        yield command("pretrain", {**self.options(), **saving, **quiet, "out": self.path}, program)
        test = {"run": self.path} | ({} if self.images.test is None else {"test_data": self.images.test})
        if not (self.path / "evaluation.json").exists():
            yield command("evaluate", {**test, "eval_limit": 10**6, "baselines": self.study.baselines})
        if self.study.finetuned:
            finetune = {"protocol": "finetune", **test, **self.study.world.finetune, **saving, "seed": self.seed}
            yield command("evaluate", {**finetune, "test_every": 10**6})

    def record(self) -> records.Record:
        """Return the record of a finished training; losses are means over the last epoch."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["epoch"] > lines[-1]["epoch"] - 1]
        losses = [name for name in lines[-1] if name.startswith("loss")]
        features = _read(self.path / "evaluation.json")
        config = read_run_config(RunDirectory(self.path))
        finetune, finetune_options = {}, {}
        if self.study.finetuned:
            finetune = {"finetune": _read(self.path / "finetune" / "evaluation.json")["accuracy"]}
            finetune_options = {"finetune_options": dict(self.study.world.finetune)}
        files = (self.path / folder / "predictions.npz" for folder in ("evaluation", "finetune"))
        correct = {name: digits for file in files for name, digits in read_correct(file).items()}
        # Held-out images differ between seeds, so they cannot be paired.
        correct_images = {"correct": correct} if correct and self.images.test is not None else {}
        return {
            "study": self.study.name,
            "arm": self.arm,
            "seed": self.seed,
            **{name: features["protocols"][name]["accuracy"] for name in records.FROZEN},
            **finetune,
            **{name: features[name] for name in records.BASELINES if name in features},
            "macs_to_dense": self.study.cost_ratio(self.arm),
            "epochs": config.epochs,
            "steps": lines[-1]["step"],
            "seconds": lines[-1]["seconds"],
            **{name: sum(line[name] for line in last) / len(last) for name in losses},
            "test_images": features["test_images"],
            "options": {name: value for name, value in self.options().items() if name not in ("data", "seed")},
            **finetune_options,
            **environment(),
            **correct_images,
        }


def command(name: str, options: Mapping[str, Any], program: str = "prmim_train") -> list[str]:
    """Return a ``prmim`` command as a list of words.

    Examples
    --------
    >>> command("pretrain", {"crop_scale": (0.2, 1.0), "flip": True, "clip_grad": None})[2:]
    ['prmim_train', 'pretrain', '--crop_scale', '[0.2,1.0]', '--flip', 'true', '--clip_grad', 'null']
    """
    words = [sys.executable, "-m", program, name]
    for option, value in options.items():
        is_json = value is None or isinstance(value, bool | tuple | list)
        words += [f"--{option}", json.dumps(value, separators=(",", ":")) if is_json else str(value)]
    return words


def carry_out(runs: list[Run], results: Path, *, jobs: int, deadline: float) -> None:
    """Run trainings in order, several at a time, until all are done or time is over.

    Parameters
    ----------
    runs
        Trainings without records.
    results
        Folder of the records; each is saved as soon as its training is done.
    jobs
        Number of trainings at a time; each gets an equal share of the CPU cores.
    deadline
        Stop time on the clock of ``time.monotonic``. Unfinished trainings leave a checkpoint.

    Raises
    ------
    RuntimeError
        If a command fails. The message names the log file.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(runs)
    working: dict[Run, tuple[Iterator[list[str]], subprocess.Popen[bytes]]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs and time.monotonic() < deadline:
                run = waiting.pop(0)
                print(f"{run.title} ...", flush=True)
                commands = run.commands()
                working[run] = (commands, _start(run, next(commands), threads))
            time.sleep(0.2)
            for run, (commands, process) in list(working.items()):
                if process.poll() is None:
                    continue
                del working[run]
                if process.returncode:
                    raise RuntimeError(f"{run.title}: {' '.join(map(str, process.args))} failed: see {run.log}")
                following = next(commands, None)
                if following is not None:
                    working[run] = (commands, _start(run, following, threads))
                else:
                    records.save(run.record() | {"threads": threads}, run.study, results)
            if time.monotonic() >= deadline:
                break
    finally:
        _stop([process for _, process in working.values()])


def _start(run: Run, words: list[str], threads: int) -> subprocess.Popen[bytes]:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(words, env=variables, stdout=log, stderr=subprocess.STDOUT)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt trainings and wait for their checkpoints."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content

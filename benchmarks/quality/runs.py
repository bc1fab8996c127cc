"""Trainings of a study, in pieces: each is a few commands of ``prmim`` that go on where they were stopped."""

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

from benchmarks.quality.arms import ARMS, Arm, Options, Study
from benchmarks.quality.data import Images
from benchmarks.report import environment
from prmim_train.config import PretrainConfig
from prmim_train.cost import cost_reports
from prmim_train.prepare import read_run_config
from prmim_train.run_directory import RunDirectory

PATIENCE = 120.0
"""Seconds that a training that was told to stop has for its checkpoint."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training of an arm, with what it is evaluated by.

    Parameters
    ----------
    study
        The study.
    arm
        The name of the arm.
    seed
        The seed.
    images
        Where the images are.
    folder
        Folder of the runs of all studies.
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
        """What to call it."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def label(self) -> str:
        """Its name in paths."""
        return f"{self.arm}-{self.seed}".replace(", ", "-").replace(" ", "-")

    @property
    def path(self) -> Path:
        """Folder of the training."""
        return self.folder / self.study.name / self.label

    def result_path(self, results: Path) -> Path:
        """Return where its result is written."""
        return results / self.study.name / f"{self.label}.json"

    def is_done(self, results: Path) -> bool:
        """Say whether there is a result of the options that the study has now."""
        path = self.result_path(results)
        return path.exists() and self.study.has(read(path))

    def options(self) -> dict[str, Any]:
        """Return the options of ``prmim pretrain`` that say what is trained."""
        world, arm = self.study.world, ARMS[self.arm]
        options = {"data": self.images.train, "epochs": self.study.epochs, **world.pretrain, **arm.options}
        if arm.equal_compute:
            options["epochs"] = round(self.study.epochs / cost_ratio(world.pretrain, arm))
        holdout = {} if self.images.test is None else {"holdout": 0.0}
        return {**options, **holdout, "seed": self.seed, "backend": self.backend}

    def commands(self) -> Iterator[list[str]]:
        """Yield the commands, each of which goes on if it was stopped, and does nothing if it is done."""
        world, program = self.study.world, "prmim_train"
        if ARMS[self.arm].detached:
            program = "benchmarks.quality.detached"
        saving = {"resume": True, "checkpoint_minutes": world.minutes, "keep_checkpoints": 1}
        quiet = {"eval_limit": 0, "pictures": 0}
        yield command("pretrain", {**self.options(), **saving, **quiet, "out": self.path}, program)
        test = {"run": self.path} | ({} if self.images.test is None else {"test_data": self.images.test})
        if not (self.path / "evaluation.json").exists():
            yield command("evaluate", {**test, "eval_limit": 10**6, "baselines": False})
        if self.study.finetuned:
            finetune = {"protocol": "finetune", **test, **world.finetune, **saving, "seed": self.seed}
            yield command("evaluate", {**finetune, "test_every": 10**6})

    def result(self) -> dict[str, Any]:
        """Put together what the commands have left."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["epoch"] > lines[-1]["epoch"] - 1]
        losses = [name for name in lines[-1] if name.startswith("loss")]
        features = read(self.path / "evaluation.json")
        config = read_run_config(RunDirectory(self.path))
        ours, dense = _costs(config)
        found = {
            "study": self.study.name,
            "arm": self.arm,
            "seed": self.seed,
            "steps": lines[-1]["step"],
            "epochs": config.epochs,
            "macs_to_dense": ours / dense,
            "seconds": lines[-1]["seconds"],
            **{name: sum(line[name] for line in last) / len(last) for name in losses},
            **{name: features["protocols"][name]["accuracy"] for name in ("linear", "knn")},
            "test_images": features["test_images"],
        }
        if self.study.finetuned:
            found["finetune"] = read(self.path / "finetune" / "evaluation.json")["accuracy"]
            found["finetune_options"] = dict(self.study.world.finetune)
        shown = {name: value for name, value in self.options().items() if name not in ("data", "seed")}
        return {**found, "options": shown, **environment()}


def cost_ratio(world: Options, arm: Arm) -> float:
    """Return the multiply-accumulates of an arm over those of the dense one."""
    ours, dense = _costs(PretrainConfig(**{**world, **arm.options}))
    return ours / dense


def _costs(config: PretrainConfig) -> tuple[int, int]:
    reports = cost_reports(config)
    assert reports is not None  # there is no teacher whose size would have to be known
    return reports[0].macs, reports[1].macs


def command(name: str, options: Mapping[str, Any], program: str = "prmim_train") -> list[str]:
    """Write a command of ``prmim``.

    Examples
    --------
    >>> command("pretrain", {"crop_scale": (0.2, 1.0), "flip": True, "clip_grad": None})[2:]
    ['prmim_train', 'pretrain', '--crop_scale', '[0.2,1.0]', '--flip', 'true', '--clip_grad', 'null']
    """
    words = [sys.executable, "-m", program, name]
    for option, value in options.items():
        words += [f"--{option}", json.dumps(value, separators=(",", ":")) if _is_json(value) else str(value)]
    return words


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | tuple | list)


def read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def carry_out(runs: list[Run], results: Path, *, jobs: int, deadline: float) -> None:
    """Go on with runs until all are done or the time is over, some at a time.

    Parameters
    ----------
    runs
        Those without results, the ones to do first in front.
    results
        Where the result of each is written, as soon as it is there.
    jobs
        How many are at work at a time, each on its share of the cores.
    deadline
        When to stop, as ``time.monotonic`` tells it. What is not done then has left a checkpoint.

    Raises
    ------
    RuntimeError
        If a command fails; its output is in the file ``log.txt`` beside the folder of the run.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    waiting = list(runs)
    working: dict[Run, tuple[Iterator[list[str]], subprocess.Popen[bytes]]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs and time.monotonic() < deadline:
                run = waiting.pop(0)
                print(f"{run.title} ...", flush=True)
                commands = run.commands()
                working[run] = (commands, _start(run, next(commands), environment))
            time.sleep(0.2)
            for run, (commands, process) in list(working.items()):
                if process.poll() is None:
                    continue
                del working[run]
                if process.returncode:
                    raise RuntimeError(f"{run.title}: {' '.join(map(str, process.args))} failed: see {_log(run)}")
                following = next(commands, None)
                if following is not None:
                    working[run] = (commands, _start(run, following, environment))
                else:
                    _write(run.result() | {"threads": int(threads)}, run.result_path(results))
            if time.monotonic() >= deadline:
                break
    finally:
        _stop([process for _, process in working.values()])


def _log(run: Run) -> Path:
    return run.path.with_name(f"{run.label}.log")


def _start(run: Run, words: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with _log(run).open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let trainings save, and end."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)

"""The training loop shared by pre-training and classifiers."""

import json
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from prmim_methods.sizes import Transformer
from prmim_methods.weight_files import WEIGHTS_FILE
from prmim_train.config.layers import dump_options, stored_options
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.config.training import CHANGEABLE, TrainingOptions
from prmim_train.data.batches import Batch, BatchIterator
from prmim_train.run.budget import Budget
from prmim_train.run.checkpoints import Checkpoints, agreed
from prmim_train.run.directory import CHECKPOINTS, SUMMARY, RunDirectory
from prmim_train.run.engine import Trainer, check_backend, check_launcher
from prmim_train.run.log import Log, NonFiniteLoss, duration, loss_text
from prmim_train.run.manifest import step_of
from prmim_train.run.origin import Origin, check_origin, record_origin
from prmim_train.run.processes import is_main, launched, on_main, say
from prmim_train.run.trackers import check_tracker

__all__ = ["Interrupted", "Job", "NonFiniteLoss", "train"]

E = TypeVar("E", bound=Trainer)

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals sent by Ctrl-C, by batch systems, and by a closing terminal (not on Windows)."""
SLOW = 1.1
"""Time in bfloat16, relative to float32, above which the user is warned."""
MOMENT = 1.0
"""Seconds within which a repeated Ctrl-C counts as one."""


class Interrupted(Exception):  # noqa: N818  # not an error: the user asked for it
    """The user stopped the run. A checkpoint was written.

    Parameters
    ----------
    message
        How to resume.
    signal_number
        The signal received.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Job(ABC, Generic[E]):
    """Interface between `train` and one kind of training.

    Attributes
    ----------
    config : TrainingOptions
        Options of the run.
    budget : Budget
        Length of the run.
    command : str
        Command that resumes the run.
    measure_epochs : int or None
        Epochs between two calls of `measure`. None: never call it.
    """

    config: TrainingOptions
    budget: Budget
    command: str
    measure_epochs: int | None = None

    @property
    @abstractmethod
    def size(self) -> Transformer:
        """Size of the encoder."""

    @abstractmethod
    def create_engine(self) -> E:
        """Build the engine at step 0."""

    def begin(self, engine: E) -> None:
        """Prepare the engine of a new run, before the first step."""
        return

    @abstractmethod
    def describe(self, engine: E) -> str:
        """Describe the training, for the user."""

    @abstractmethod
    def batches(self, engine: E) -> BatchIterator[Batch]:
        """Iterate over this process's share of the remaining batches."""

    @abstractmethod
    def take_step(self, engine: E, batch: Batch) -> None:
        """Train on a batch."""

    def measure(self, engine: E) -> dict[str, Any]:
        """Return metrics to log every `measure_epochs` epochs and at the end.

        Not counted as training time.
        """
        return {}

    @abstractmethod
    def origin(self) -> Origin:
        """Return the origin of the training: images, split, teacher.

        Slow: examines all files.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the first entries of the summary."""

    @abstractmethod
    def conclude(self, run: RunDirectory, engine: E, summary: dict[str, Any]) -> None:
        """Evaluate after the last step. Adds results to `summary`."""

    @abstractmethod
    def restart_hint(self, weights: Path) -> str:
        """Explain how to continue with another backend, from a weight file."""


def train(job: Job[E]) -> dict[str, Any]:
    """Start or resume a run, and train it to the end.

    Parameters
    ----------
    job
        The training.

    Returns
    -------
    dict
        Content of `summary.json`.

    Raises
    ------
    ValueError, TypeError, OSError, Interrupted, NonFiniteLoss, FailedElsewhereError
        See :func:`prmim_train.pretrain.pretrain`.
    """
    run = RunDirectory(job.config.run_path)
    _check_batch_size(job.config, launched().world_size, "processes")
    check_backend(job.config.backend)
    check_tracker(job.config.tracker)
    with run.locked() if launched().rank == 0 else nullcontext():
        return _train(job, run)


def _train(job: Job[E], run: RunDirectory) -> dict[str, Any]:
    """Train in a locked folder."""
    config = job.config
    is_resumed = config.resume and RunDirectory.holds_run(run.path)
    if not is_resumed:
        run.check_is_free()  # before slow work: examining the images, building the engine
    origin = job.origin() if launched().rank == 0 else None
    if is_resumed:
        _check_backend(job, run)
        if origin is not None:
            _check_changes(config, run, origin)
        summary = _finished_summary(run, job.budget)
        if summary is not None:
            say(f"The run in {run.path} is finished. Its summary:")
            say(json.dumps(summary, indent=2))
            return summary

    with closing(job.create_engine()) as engine:
        # Engines of a distributed run wait for each other, so every process has examined the folder by now.
        check_launcher(config.backend, engine)
        _check_batch_size(config, engine.num_devices, "devices")
        on_main(engine, run.remove_leftovers)
        if is_resumed:
            _restore(run, engine, job.budget)
        if engine.step == 0:
            job.begin(engine)
        on_main(engine, partial(_record, run, config, origin, has_stepped=engine.step > 0))

        say(job.describe(engine))
        _say_choices(job, engine)
        say(f"Run directory: {run.path}" + (f", resuming after step {engine.step}" if engine.step else ""))
        summary = _take_steps(job, run, engine)
        job.conclude(run, engine, summary)
        on_main(engine, lambda: run.write_summary(summary))
    say(f"Summary: {run.path / SUMMARY}")
    return summary


def _say_choices(job: Job[E], engine: E) -> None:
    """Print number format and compilation in effect.

    Warns about a number format that is slow on this CPU.
    """
    precision, compiled = engine.precision, engine.compiled
    how = "compiled" if compiled.value else "not compiled"
    say(f"Precision: {precision.value} ({precision.reason}); {how} ({compiled.reason})")
    slowdown = engine.measure_slowdown(job.size) if engine.rank == 0 else None
    if slowdown is not None and slowdown > SLOW:
        print(
            f"prmim: warning: precision: bfloat16 takes {slowdown:.1f} times as long as float32 on this CPU (measured "
            "on a layer of the encoder); --precision auto avoids it",
            file=sys.stderr,
            flush=True,
        )


def _take_steps(job: Job[E], run: RunDirectory, engine: E) -> dict[str, Any]:
    """Take the remaining steps. Returns the summary of the training."""
    config, budget = job.config, job.budget
    batches = job.batches(engine)
    unreadable: dict[str, str] = {}
    with (
        _stop_signals() as stop,
        batches,
        Checkpoints(run, config, engine) as checkpoints,
        Log(run, config, budget, engine, checkpoints) as log,
    ):
        for batch in log.timed(batches):
            job.take_step(engine, batch)
            log.advance()
            unreadable |= {str(record): reason for record, reason in batch.unreadable}
            step = engine.step
            is_last = step == budget.total_steps
            # Only step numbers decide what is logged, so that resumed runs write the same lines.
            is_measured = job.measure_epochs is not None and (budget.is_end_of(job.measure_epochs, step) or is_last)
            is_logged = step == 1 or step % config.log_every == 0 or is_last or is_measured
            if is_logged:
                log.write(step, partial(job.measure, engine) if is_measured else None)
            is_stopping = agreed(engine, stop.is_set, is_logged) and not is_last
            checkpoints.finish_if_done(is_logged)
            is_due = step % budget.checkpoint_steps == 0 or is_last or is_stopping
            if is_due or checkpoints.are_due(is_logged):
                checkpoints.start(step)
            if is_stopping:
                checkpoints.finish()
                number = stop.number or signal.SIGTERM  # 0: another process received the signal
                raise Interrupted(
                    f"Stopped after step {step} of {budget.total_steps} and saved a checkpoint. "
                    f"Resume with: {job.command}",
                    number,
                )
        checkpoints.finish()

    if engine.world_size > 1:
        reasons = _gather_notes(run, engine, unreadable)
        batches.unreadable.add((int(record), reason) for record, reason in reasons.items())
    say(f"Trained {engine.step} steps in {duration(log.seconds)}; {loss_text(log.last)}.")
    if len(batches.unreadable):
        say(batches.unreadable.report())
    return {
        **job.facts(),
        "device": engine.device,
        "precision": engine.precision.value,
        "parameters": engine.num_parameters,
        "steps": engine.step,
        "epochs": config.epochs,
        **log.final_numbers(),
        "unreadable_images": batches.unreadable.reasons,
    }


def _gather_notes(run: RunDirectory, engine: Trainer, note: dict[str, str]) -> dict[str, str]:
    """Send each process's note to the main process.

    Returns {} in the other processes.
    """
    if engine.rank > 0 and note:
        run.leave_note(engine.rank, note)
    engine.any(False)  # barrier: all notes are written
    return on_main(engine, run.collect_notes) or {}


def _check_batch_size(config: TrainingOptions, number: int, parts: str) -> None:
    """Check that processes or devices, and accumulation, divide the batch evenly."""
    if config.batch_size % (number * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of the {number} {parts} times accumulate ({config.accumulate}), "
            f"got {config.batch_size}"
        )


def _check_backend(job: Job[E], run: RunDirectory) -> None:
    """Check that the backend can read the run's training state."""
    backend = run.read_config().get("backend", PretrainConfig.backend)
    checkpoints = run.checkpoints()
    if checkpoints and backend != job.config.backend:
        raise ValueError(
            f"backend: expected {backend}, as in the run in {run.path}, got {job.config.backend}; "
            f"{job.restart_hint(checkpoints[-1] / WEIGHTS_FILE)}"
        )


def _record(run: RunDirectory, config: TrainingOptions, origin: Origin | None, *, has_stepped: bool) -> None:
    """Record options and origin, before the next step is taken."""
    run.write_config(dump_options(config))
    if origin is not None:  # as in the main process
        record_origin(run, origin, has_stepped=has_stepped)


def _check_changes(config: TrainingOptions, run: RunDirectory, origin: Origin) -> None:
    """Report options and origin that changed since the last step.

    Rejects changes that past steps depend on.
    """
    if not run.checkpoints() and run.read_summary() is None:  # no step is kept
        return
    stored = run.read_config()
    changed = {name: value for name, value in stored_options(config).items() if stored.get(name, value) != value}
    texts = {name: f"{name} from {stored[name]!r} to {value!r}" for name, value in changed.items()}
    fixed = [text for name, text in texts.items() if name not in CHANGEABLE]
    if fixed and not config.allow_changes:
        raise ValueError(
            f"resume: expected the options of the run in {run.path}, got a change of {', '.join(fixed)}, which past "
            "steps depend on; start another run with --out, or add --allow_changes"
        )
    check_origin(run, origin, config.allow_changes)
    if changed:
        say(f"Options changed since the last start: {', '.join(texts.values())}.")


def _restore(run: RunDirectory, engine: Trainer, budget: Budget) -> None:
    """Reset engine and metrics to the last good checkpoint, if there is one."""
    on_main(engine, lambda: run.latest_checkpoint(set_aside=True))
    checkpoints = run.checkpoints()  # the main process has set damaged ones aside: the newest is good
    if checkpoints:
        engine.restore(checkpoints[-1])
    if engine.step > budget.total_steps:
        raise ValueError(
            f"epochs: expected more than the {engine.step} steps already taken by the run in {run.path}, got "
            f"{budget.total_steps}"
        )
    on_main(engine, lambda: run.cut_metrics(engine.step))


def _finished_summary(run: RunDirectory, budget: Budget) -> dict[str, Any] | None:
    """Summary of a finished run; None if steps remain."""
    summary = run.read_summary()
    if summary is None or summary["steps"] != budget.total_steps:
        return None
    if budget.total_steps not in map(step_of, run.checkpoints()):
        raise FileNotFoundError(
            f"run: expected the last checkpoint of the finished run in {run.path / CHECKPOINTS}, got none of step "
            f"{budget.total_steps}; train again with another --out"
        )
    return summary


@dataclass
class _Stop:
    """Whether the user requested a stop, and by which signal."""

    is_set: bool = False
    number: int = 0
    since: float = 0.0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn signals into a flag, polled after each step.

    A second Ctrl-C raises KeyboardInterrupt. This holds for Ctrl-C only: batch systems, `torchrun`, shells and
    terminals send the other signals repeatedly. `torchrun` also repeats Ctrl-C, so repetitions within a moment count as
    one.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            if number == signal.SIGINT and time.monotonic() - stop.since > MOMENT:
                raise KeyboardInterrupt
            return
        stop.is_set, stop.number, stop.since = True, number, time.monotonic()
        if is_main():
            with suppress(RuntimeError, OSError):  # RuntimeError: the signal arrived during another print
                print(
                    "\nStopping after this step. A second Ctrl-C stops at once, without a checkpoint.",
                    file=sys.stderr,
                )

    previous: dict[int, Callable[..., Any] | int | None] = {}
    for name in STOPPING:
        number = getattr(signal, name, None)
        if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # started by nohup
            continue
        previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

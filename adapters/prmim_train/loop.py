"""Training, from the first image to the summary, in the order of events: what all runs share, and pre-training."""

import json
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from prmim_train.budget import Budget
from prmim_train.checkpointing import Checkpoints, agreed
from prmim_train.config import PretrainConfig
from prmim_train.data import Batch, BatchIterator, train_batches
from prmim_train.engine import Engine, Trainer, check_launcher, create_engine
from prmim_train.evaluate import evaluate_run, format_evaluation, probe_run
from prmim_train.inspect import format_brief
from prmim_train.layers import dump_options, parse_options
from prmim_train.log import Log, NonFiniteLoss, duration, loss_text
from prmim_train.pictures import draw_run
from prmim_train.prepare import open_data, why_not
from prmim_train.processes import is_main, launched, on_main, say
from prmim_train.run_directory import RunDirectory
from prmim_train.trackers import check_tracker
from prmim_train.training_options import TrainingOptions

__all__ = ["Interrupted", "Job", "NonFiniteLoss", "Pretraining", "pretrain", "train"]

E = TypeVar("E", bound=Trainer)


class Interrupted(Exception):  # noqa: N818  # not an error: the user asked for it
    """The user stopped the run; a checkpoint was written.

    Parameters
    ----------
    message
        How to go on.
    signal_number
        The signal that came.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Job(ABC, Generic[E]):
    """One kind of training: what `train` has to know of it.

    Attributes
    ----------
    config : TrainingOptions
        The options of the run.
    budget : Budget
        Its length.
    command : str
        What goes on with the run after a stop.
    measure_epochs : int or None
        Epochs between two calls of `measure`; None: it is never called.
    """

    config: TrainingOptions
    budget: Budget
    command: str
    measure_epochs: int | None = None

    @abstractmethod
    def create_engine(self) -> E:
        """Build the engine, at step 0."""

    def begin(self, engine: E) -> None:
        """Prepare an engine that has taken no step."""
        return

    @abstractmethod
    def describe(self, engine: E) -> str:
        """Say what is about to be trained."""

    @abstractmethod
    def batches(self, engine: E) -> BatchIterator[Batch]:
        """Return the batches of the steps that are left, this process's share of each."""

    @abstractmethod
    def take_step(self, engine: E, batch: Batch) -> None:
        """Hand a batch to the engine."""

    def measure(self, engine: E) -> dict[str, Any]:
        """Measure something that is no training, every `measure_epochs` epochs and at the end, for the log."""
        return {}

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what the summary begins with."""

    @abstractmethod
    def conclude(self, run: RunDirectory, engine: E, summary: dict[str, Any]) -> None:
        """Do what is left when all steps are taken; what it found goes into the summary."""

    @abstractmethod
    def elsewhere(self, weights: Path) -> str:
        """Say how to go on from some weights with another backend."""


def train(job: Job[E]) -> dict[str, Any]:
    """Carry out a training from wherever its folder says that it stands, to its summary.

    Parameters
    ----------
    job
        What is trained.

    Returns
    -------
    dict
        What `summary.json` holds.

    Raises
    ------
    ValueError, TypeError, OSError, Interrupted, NonFiniteLoss, FailedElsewhereError
        See `pretrain`.
    """
    config = job.config
    run = RunDirectory(config.run_path)
    _check_processes(config)
    check_tracker(config.tracker)
    goes_on = config.resume and RunDirectory.holds_run(run.path)
    if goes_on:
        _check_backend(job, run)
        summary = _finished_summary(run, job.budget)
        if summary is not None:
            say(f"The run in {run.path} is finished: nothing is left to do. Its summary:")
            say(json.dumps(summary, indent=2))
            return summary
    else:
        run.check_is_free()  # before the time that building an engine takes

    with closing(job.create_engine()) as engine:
        # Where there are several processes, none comes here before all have looked at the folder.
        check_launcher(config.backend, engine)
        on_main(engine, run.remove_leftovers)
        if goes_on:
            _take_up(run, engine, job.budget)
        if engine.step == 0:
            job.begin(engine)
        on_main(engine, lambda: run.write_config(dump_options(config)))

        say(job.describe(engine))
        say(f"Run directory: {run.path}" + (f", going on after step {engine.step}" if engine.step else ""))
        summary = _take_steps(job, run, engine)
        job.conclude(run, engine, summary)
        on_main(engine, lambda: run.write_summary(summary))
    say(f"Summary: {run.path / 'summary.json'}")
    return summary


def _take_steps(job: Job[E], run: RunDirectory, engine: E) -> dict[str, Any]:
    """Take the steps that are left; return what the summary says of all of them."""
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
            # What a line holds follows from step numbers alone: not from checkpoints, nor from where a run was resumed.
            is_measured = job.measure_epochs is not None and (budget.is_end_of(job.measure_epochs, step) or is_last)
            is_logged = step == 1 or step % config.log_every == 0 or is_last or is_measured
            if is_logged:
                log.write(step, partial(job.measure, engine) if is_measured else None)
            is_stopping = agreed(engine, stop.is_set, is_logged) and not is_last
            checkpoints.look_after(is_logged)
            is_due = step % budget.checkpoint_steps == 0 or is_last or is_stopping
            if is_due or checkpoints.are_due(is_logged):
                checkpoints.start(step)
            if is_stopping:
                checkpoints.finish()
                number = stop.number or signal.SIGTERM  # 0: it came to another process
                raise Interrupted(
                    f"Stopped after step {step} of {budget.total_steps}; a checkpoint is written. "
                    f"Go on with: {job.command}",
                    number,
                )
        checkpoints.finish()

    if engine.world_size > 1:
        reasons = _share_notes(run, engine, unreadable)
        batches.unreadable.add((int(record), reason) for record, reason in reasons.items())
    say(f"Trained {engine.step} steps in {duration(log.seconds)}; {loss_text(log.last)}.")
    if len(batches.unreadable):
        say(batches.unreadable.report())
    return {
        **job.facts(),
        "device": engine.device,
        "parameters": engine.num_parameters,
        "steps": engine.step,
        "epochs": config.epochs,
        **log.final_numbers(),
        "unreadable_images": batches.unreadable.reasons,
    }


def _share_notes(run: RunDirectory, engine: Trainer, note: dict[str, str]) -> dict[str, str]:
    """Return the notes of all other processes in the main one, and nothing in them."""
    if engine.rank > 0 and note:
        run.leave_note(engine.rank, note)
    engine.any(False)  # until all notes are there
    return on_main(engine, run.collect_notes) or {}


def _check_processes(config: TrainingOptions) -> None:
    """Raise ValueError unless every process gets as many images of a batch as every other, in every part of it."""
    world_size = launched().world_size
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of the {world_size} processes times accumulate ({config.accumulate}), "
            f"got {config.batch_size}"
        )


def _check_backend(job: Job[E], run: RunDirectory) -> None:
    """Raise ValueError where a run is to go on with a framework that cannot read its training state."""
    backend = parse_options(run.read_config(), str(run.path)).get("backend", PretrainConfig.backend)
    checkpoints = run.checkpoints()
    if checkpoints and backend != job.config.backend:
        raise ValueError(
            f"backend: expected {backend}, with which the run in {run.path} was trained, got {job.config.backend}; "
            f"{job.elsewhere(checkpoints[-1] / 'weights.safetensors')}"
        )


def _take_up(run: RunDirectory, engine: Trainer, budget: Budget) -> None:
    """Bring engine and folder to where the last good checkpoint is."""
    on_main(engine, lambda: run.latest_checkpoint(set_aside=True))
    checkpoints = run.checkpoints()  # the newest of which is good now: the main process has read it
    if checkpoints:
        engine.restore(checkpoints[-1])
    if engine.step > budget.total_steps:
        raise ValueError(
            f"epochs: expected more than the {engine.step} steps that the run in {run.path} has taken already, got "
            f"{budget.total_steps}"
        )
    on_main(engine, lambda: run.cut_metrics(engine.step))


def _finished_summary(run: RunDirectory, budget: Budget) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = run.read_summary()
    return summary if summary is not None and summary["steps"] == budget.total_steps else None


class Pretraining(Job[Engine]):
    """Pre-training: the method's loss on masked images; at the end frozen features are judged and pictures drawn.

    Parameters
    ----------
    config
        The options of the run.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config: PretrainConfig = config
        self.data = open_data(config)
        self.budget = self.data.budget
        self.command = f"prmim pretrain --out {config.run_path} --resume"
        if config.probe_every is not None:
            if reason := why_not(self.data):
                raise ValueError(f"probe_every: expected labelled images, some of them held out, but {reason}")
            self.measure_epochs = config.probe_every

    def create_engine(self) -> Engine:
        """Build the engine of the method."""
        return create_engine(self.config, self.budget)

    def begin(self, engine: Engine) -> None:
        """Take the weights to begin with."""
        weights = self.config.init_weights
        if weights is not None:
            if not Path(weights).is_file():
                raise FileNotFoundError(f"init_weights: expected a .safetensors file, there is none at {weights}")
            engine.load_weights(Path(weights))

    def describe(self, engine: Engine) -> str:
        """Tell what `prmim inspect` tells, in brief."""
        return format_brief(self.config, self.data, engine)

    def batches(self, engine: Engine) -> BatchIterator[Batch]:
        """Return random crops of the images that are not held out."""
        config = self.config
        return train_batches(
            self.data.source,
            indices=self.data.train,
            batch_size=config.batch_size,
            image_size=config.image_plane,
            seed=config.seed,
            start_step=engine.step,
            total_steps=self.budget.total_steps,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            flip=config.flip,
            workers=config.workers,
            rank=engine.rank,
            world_size=engine.world_size,
        )

    def take_step(self, engine: Engine, batch: Batch) -> None:
        """Mask the images, and learn to rebuild what is hidden."""
        engine.train_step(batch.images, batch.index)

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Judge the frozen features of now."""
        return probe_run(self.config, self.data, engine)

    def facts(self) -> dict[str, Any]:
        """Return method and data."""
        return {
            "method": self.config.method,
            "data": self.data.source.description,
            "train_images": len(self.data.train),
            "held_out_images": len(self.data.held_out),
        }

    def conclude(self, run: RunDirectory, engine: Engine, summary: dict[str, Any]) -> None:
        """Evaluate the frozen features, and draw pictures."""
        if self.config.eval_limit:
            say("Evaluating the frozen features ...")
            summary["evaluation"] = evaluate_run(self.config, self.data, engine)
            if engine.rank == 0:
                say(format_evaluation(summary["evaluation"]))
        if self.config.pictures:
            for path in draw_run(run, self.config, self.data, engine):
                say(f"Picture: {path}")

    def elsewhere(self, weights: Path) -> str:
        """Say that weights can be begun with."""
        return f"its weights alone go over: --init_weights {weights} --out ANOTHER"


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run a whole pre-training: train, write checkpoints and metrics, evaluate, draw pictures.

    Where several processes were started, by `torchrun` or the like, each of them calls this, and they share the work;
    the main one alone prints and writes.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    dict
        What `summary.json` holds: final loss, speed, unreadable images, evaluation of the frozen features (of several
        processes, in the main one alone).

    Raises
    ------
    ValueError, TypeError
        If an option does not fit the data or the backend.
    OSError
        If data cannot be read, or a checkpoint not written; the last good checkpoint is intact then.
    Interrupted
        On Ctrl-C or SIGTERM, after the current step and a checkpoint; of several processes, after the next step that is
        logged.
    NonFiniteLoss
        After a rescue checkpoint.
    FailedElsewhereError
        If something failed in the main process, which raises it as it is.
    """
    return train(Pretraining(config))


@dataclass
class _Stop:
    """Whether the user asked to stop."""

    is_set: bool = False
    number: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn Ctrl-C and SIGTERM into a wish that the loop looks at after each step; a second one stops at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set, stop.number = True, number
        if is_main():
            print("\nStopping after this step; once more stops at once and loses the steps since.", file=sys.stderr)

    previous: dict[int, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT.value, signal.SIGTERM.value):
        previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

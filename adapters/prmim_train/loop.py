"""Pre-training, from the first image to the last picture, in the order of events."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from prmim_train.budget import Budget
from prmim_train.config import PretrainConfig
from prmim_train.data import Batch, train_batches
from prmim_train.engine import Engine, create_engine
from prmim_train.evaluate import evaluate_run, format_evaluation
from prmim_train.inspect import format_brief
from prmim_train.layers import dump_options, parse_options
from prmim_train.pictures import draw_run
from prmim_train.prepare import RunData, open_data
from prmim_train.processes import is_main, launched, on_main, say
from prmim_train.run_directory import RESCUE, RunDirectory, Writing
from prmim_train.trackers import NoTracker, Tracker, check_tracker, open_tracker

NUM_PRINTED_LINES = 20  # of progress, where the output is no terminal and a bar would fill a log file


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


class NonFiniteLoss(ArithmeticError):  # noqa: N818  # the name says what happened
    """The loss or a gradient was not finite; a rescue checkpoint was written."""


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
    data = open_data(config)
    run = RunDirectory(config.run_path)
    _check_processes(config)
    check_tracker(config.tracker)
    goes_on = config.resume and RunDirectory.holds_run(run.path)
    if goes_on:
        _check_backend(config, run)
        summary = _finished_summary(run, data.budget)
        if summary is not None:
            say(f"The run in {run.path} is finished: nothing is left to do. Its summary:")
            say(json.dumps(summary, indent=2))
            return summary
    else:
        run.check_is_free()  # before the time that building an engine takes

    with closing(create_engine(config, data.budget)) as engine:
        # Where there are several processes, none comes here before all have looked at the folder.
        _check_launcher(config, engine)
        on_main(engine, run.remove_leftovers)
        if goes_on:
            _take_up(run, engine, data.budget)
        if engine.step == 0 and config.init_weights is not None:
            if not Path(config.init_weights).is_file():
                raise FileNotFoundError(
                    f"init_weights: expected a .safetensors file, there is none at {config.init_weights}"
                )
            engine.load_weights(Path(config.init_weights))
        on_main(engine, lambda: run.write_config(dump_options(config)))

        say(format_brief(config, data, engine))
        say(f"Run directory: {run.path}" + (f", going on after step {engine.step}" if engine.step else ""))
        summary = _train(config, data, run, engine)
        if config.eval_limit:
            say("Evaluating the frozen features ...")
            summary["evaluation"] = evaluate_run(config, data, engine)
            if engine.rank == 0:
                say(format_evaluation(summary["evaluation"]))
        if config.pictures:
            for path in draw_run(run, config, data, engine):
                say(f"Picture: {path}")
        on_main(engine, lambda: run.write_summary(summary))
    say(f"Summary: {run.path / 'summary.json'}")
    return summary


def _train(config: PretrainConfig, data: RunData, run: RunDirectory, engine: Engine) -> dict[str, Any]:
    """Take the steps that are left; return what the summary says of all of them."""
    budget = data.budget
    batches = train_batches(
        data.source,
        indices=data.train,
        batch_size=config.batch_size,
        image_size=config.image_plane,
        seed=config.seed,
        start_step=engine.step,
        total_steps=budget.total_steps,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        workers=config.workers,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    unreadable: dict[str, str] = {}
    with (
        _stop_signals() as stop,
        batches,
        _Checkpoints(run, config, engine) as checkpoints,
        _Log(run, config, budget, engine, checkpoints) as log,
    ):
        for batch in log.timed(batches):
            engine.train_step(batch.images, batch.index)
            log.advance()
            unreadable |= {str(record): reason for record, reason in batch.unreadable}
            step = engine.step
            is_last = step == budget.total_steps
            # What a line holds follows from step numbers alone: not from checkpoints, nor from where a run was resumed.
            is_logged = step == 1 or step % config.log_every == 0 or is_last
            if is_logged:
                log.write(step)
            is_stopping = _agreed(engine, stop.is_set, is_logged) and not is_last
            checkpoints.look_after(is_logged)
            is_due = step % budget.checkpoint_steps == 0 or is_last or is_stopping
            if is_due or checkpoints.are_due(is_logged):
                checkpoints.start(step)
            if is_stopping:
                checkpoints.finish()
                number = stop.number or signal.SIGTERM  # 0: it came to another process
                raise Interrupted(_how_to_go_on(run, step, budget), number)
        checkpoints.finish()

    if engine.world_size > 1:
        reasons = _share_notes(run, engine, unreadable)
        batches.unreadable.add((int(record), reason) for record, reason in reasons.items())
    say(f"Trained {engine.step} steps in {_duration(log.seconds)}; {_loss_text(log.last)}.")
    if len(batches.unreadable):
        say(batches.unreadable.report())
    return {
        "method": config.method,
        "data": data.source.description,
        "train_images": len(data.train),
        "held_out_images": len(data.held_out),
        "device": engine.device,
        "parameters": engine.num_parameters,
        "steps": engine.step,
        "epochs": config.epochs,
        **log.final_numbers(),
        "unreadable_images": batches.unreadable.reasons,
    }


def _share_notes(run: RunDirectory, engine: Engine, note: dict[str, str]) -> dict[str, str]:
    """Return the notes of all other processes in the main one, and nothing in them."""
    if engine.rank > 0 and note:
        run.leave_note(engine.rank, note)
    engine.any(False)  # until all notes are there
    return on_main(engine, run.collect_notes) or {}


def _check_processes(config: PretrainConfig) -> None:
    """Raise ValueError unless every process gets as many images of a batch as every other, in every part of it."""
    world_size = launched().world_size
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of the {world_size} processes times accumulate ({config.accumulate}), "
            f"got {config.batch_size}"
        )


def _check_launcher(config: PretrainConfig, engine: Engine) -> None:
    """Raise ValueError where processes that were started together know nothing of each other."""
    if engine.world_size != launched().world_size:
        raise ValueError(
            f"backend: expected one that joins the {launched().world_size} processes that were started, got "
            f"{config.backend}, which sees {engine.world_size}; torch takes them from torchrun, jax from "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )


def _check_backend(config: PretrainConfig, run: RunDirectory) -> None:
    """Raise ValueError where a run is to go on with a framework that cannot read its training state."""
    backend = parse_options(run.read_config(), str(run.path)).get("backend", PretrainConfig.backend)
    checkpoints = run.checkpoints()
    if checkpoints and backend != config.backend:
        raise ValueError(
            f"backend: expected {backend}, with which the run in {run.path} was trained, got {config.backend}; its "
            f"weights alone go over: --init_weights {checkpoints[-1] / 'weights.safetensors'} --out ANOTHER"
        )


def _take_up(run: RunDirectory, engine: Engine, budget: Budget) -> None:
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


def _agreed(engine: Engine, wish: bool, is_logged: bool) -> bool:
    """Return what all processes do about the wish of one: at once if it is alone, else at the next line of the log."""
    return wish if engine.world_size == 1 else is_logged and engine.any(wish)


def _how_to_go_on(run: RunDirectory, step: int, budget: Budget) -> str:
    return (
        f"Stopped after step {step} of {budget.total_steps}; a checkpoint is written. "
        f"Go on with: prmim pretrain --out {run.path} --resume"
    )


class _Checkpoints:
    """Writes checkpoints behind the training, one at a time."""

    def __init__(self, run: RunDirectory, config: PretrainConfig, engine: Engine) -> None:
        self.run, self.engine, self.keep = run, engine, config.keep_checkpoints
        self.minutes = config.checkpoint_minutes
        self.started = time.monotonic()
        self.writing: Writing | None = None

    def __enter__(self) -> "_Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writing is not None:  # after an error of something else, which is the one to report
            self.writing.wait()

    def are_due(self, is_logged: bool) -> bool:
        """Say whether the minutes between two of them are over, in the main process."""
        if self.minutes is None:
            return False
        is_late = self.engine.rank == 0 and time.monotonic() - self.started >= 60 * self.minutes
        return _agreed(self.engine, is_late, is_logged)

    def start(self, step: int, prefix: str = "") -> None:
        """Begin to write one, when the one before is finished."""
        self.finish()
        self.writing = self.run.start_checkpoint(self.engine, step, keep=self.keep, prefix=prefix)
        self.started = time.monotonic()

    def finish(self) -> Path | None:
        """Wait for the one that is being written, if any, and raise what went wrong with it."""
        writing, self.writing = self.writing, None
        return None if writing is None else writing.finish()

    def look_after(self, is_logged: bool) -> None:
        """Finish the one that is being written if that takes no waiting."""
        if self.writing is None or (self.engine.world_size > 1 and not is_logged):
            return
        if not self.engine.any(not self.writing.is_done()):
            self.finish()


class _Log:
    """Progress bar, `metrics.jsonl` and tracker; ends the run where the loss is not finite.

    Every process has one and goes through the same readings; that of the main process alone shows and writes them.
    """

    def __init__(
        self, run: RunDirectory, config: PretrainConfig, budget: Budget, engine: Engine, checkpoints: _Checkpoints
    ) -> None:
        self.run, self.config, self.budget, self.engine = run, config, budget, engine
        self.checkpoints = checkpoints
        self.is_main = engine.rank == 0
        records = run.read_metrics()
        self.last: dict[str, Any] = records[-1] if records else {}
        self.first_step = self.read_step = engine.step
        self.rescued = run.rescued_steps()
        self.earlier_seconds = float(self.last.get("seconds", 0.0))
        self.speed = SpeedMeter()
        self.waited = 0.0
        self.print_every = max(1, budget.total_steps // NUM_PRINTED_LINES)
        self.printed_step = engine.step
        self.tracker: Tracker = NoTracker()
        self.started = time.perf_counter()

    def __enter__(self) -> "_Log":
        options = parse_options(dump_options(self.config), "")
        name = self.config.tracker if self.is_main else "none"
        self.tracker = (
            on_main(self.engine, lambda: open_tracker(name, self.run, options, self.engine.step)) or NoTracker()
        )
        self.started = self.written = time.perf_counter()
        self.bar = tqdm(
            total=self.budget.total_steps,
            initial=self.engine.step,
            disable=None if self.is_main else True,  # None: no bar where the output is no terminal
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self._track(lambda: self.tracker.close())

    @property
    def seconds(self) -> float:
        """Time spent training, that before a resume included, up to the last step that was logged."""
        return float(self.last.get("seconds", 0.0))

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hand batches on, and add up the time that they were waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def advance(self) -> None:
        """Move the bar; the device may still be busy with the step."""
        self.bar.update(1)

    def write(self, step: int) -> None:
        """Read the engine's metrics, check them, write them down; waits for the device."""
        metrics = self.engine.read_metrics()
        now = time.perf_counter()
        self.speed.update((step - self.read_step) * self.config.batch_size, now)
        self._check_finite(metrics, step)
        self.read_step = step
        speed = self.speed.recent
        self.last = {
            "step": step,
            "epoch": round(step / self.budget.steps_per_epoch, 4),
            **_losses(metrics),
            "lr": metrics["learning_rate"],
            "grad_norm": _finite(metrics["grad_norm"]),
            **({"skipped": metrics["skipped"]} if metrics["skipped"] else {}),
            "images_per_second": None if speed is None else round(speed, 1),
            "waiting": round(self.waited / (now - self.written), 4),
            "seconds": round(self.earlier_seconds + now - self.started, 3),
        }
        self.waited, self.written = 0.0, now
        if self.is_main:
            self.run.append_metrics(self.last)
            numbers = {name: value for name, value in self.last.items() if name != "step" and value is not None}
            self._track(lambda: self.tracker.log(step, numbers))
            self._show(step, self.last["loss"], speed)

    def final_numbers(self) -> dict[str, Any]:
        """Return what the summary takes from the log."""
        speed = self.speed.overall
        return {"loss": None, **_losses(self.last)} | {
            "images_per_second": None if speed is None else round(speed, 1),
            "seconds": self.seconds,
        }

    def _show(self, step: int, loss: float | None, speed: float | None) -> None:
        text = _loss_text({"loss": loss}) + ("" if speed is None else f", {speed:,.0f} images/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif step - self.printed_step >= self.print_every or step == self.budget.total_steps:
            self.printed_step = step
            print(f"step {step}/{self.budget.total_steps}: {text}, {_duration(self.seconds)}", flush=True)

    def _track(self, call: Callable[[], None]) -> None:
        """Let the tracker do something; a service that is down must not end a training run."""
        try:
            call()
        except Exception as error:
            self.tracker = NoTracker()
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"prmim: warning: tracker {self.config.tracker} failed, and is not used any more: {reason}; all "
                f"numbers are in {self.run.path / 'metrics.jsonl'}",
                file=sys.stderr,
                flush=True,
            )

    def _check_finite(self, metrics: Mapping[str, Any], step: int) -> None:
        """End the run if too many of the steps since the last reading were not finite."""
        skipped, in_a_row, first = metrics["skipped"], metrics["skipped_in_a_row"], metrics["nonfinite_step"]
        if not skipped:
            return
        if self.config.nonfinite == "skip":
            if in_a_row > self.config.max_skipped:
                self._rescue(step, f"at none of the last {in_a_row} steps up to step {step}", limit=True)
        elif self.read_step < first <= step:
            self._rescue(first, f"not at step {first}")
        # A checkpoint may lie between a step that was not finite and the reading that ended the run for it. Whoever
        # goes on from there, with that step still to be read, was told and has seen to it.
        elif self.read_step > self.first_step or first not in self.rescued:
            self._rescue(step, f"not at {skipped} of the last steps up to step {step}")

    def _rescue(self, step: int, when: str, *, limit: bool = False) -> None:
        self.checkpoints.start(step, RESCUE)
        place = self.checkpoints.finish()
        advice = "" if self.config.clip_grad is not None else " --clip_grad 1,"
        advice += "" if self.config.precision == "float32" else " --precision float32,"
        known = f" (max_skipped is {self.config.max_skipped})" if limit else ""
        raise NonFiniteLoss(
            f"loss: expected a finite loss and gradient, but {when}{known}; the weights, untouched by that, are in "
            f"{place}; try{advice} or a lower --base_learning_rate"
        )


def _finite(value: float) -> float | None:
    """Return None in place of a mean of nothing, which JSON has no number for."""
    return value if math.isfinite(value) else None


def _losses(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the losses out of what was measured: `loss`, and its parts by the names that the method gives them."""
    return {
        name: value if value is None else _finite(value)
        for name, value in numbers.items()
        if name == "loss" or name.startswith("loss_")
    }


def _loss_text(numbers: Mapping[str, Any]) -> str:
    """Write the losses in words, as in `loss 0.4321 (decoded 0.4000, thrown 0.4500)`; a part of 0 is not supervised."""
    if numbers.get("loss") is None:
        return "no finite loss"
    parts = {name.removeprefix("loss_"): value for name, value in _losses(numbers).items() if name != "loss" and value}
    text = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
    return f"loss {numbers['loss']:.4f}" + (f" ({text})" if parts else "")


@dataclass
class SpeedMeter:
    """Images per second, from the times at which steps were known to be done.

    The first update only starts the clock: what came before it was start-up (compilation, first allocations), which
    says nothing about the steps that follow.

    Examples
    --------
    >>> meter = SpeedMeter()
    >>> meter.update(64, now=10.0)
    >>> meter.recent is None
    True
    >>> meter.update(128, now=12.0)
    >>> meter.update(128, now=13.0)
    >>> meter.recent, round(meter.overall, 1)
    (128.0, 85.3)
    """

    recent: float | None = None
    images: int = 0
    started: float | None = None
    latest: float = field(default=0.0, repr=False)

    def update(self, images: int, now: float) -> None:
        """Count images whose steps were done at time `now`, in seconds of any steady clock."""
        if self.started is None:
            self.started = now
        else:
            self.images += images
            self.recent = images / (now - self.latest) if now > self.latest else None
        self.latest = now

    @property
    def overall(self) -> float | None:
        """Mean speed since the first update, None before the second."""
        if self.started is None or self.latest <= self.started:
            return None
        return self.images / (self.latest - self.started)


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


def _duration(seconds: float) -> str:
    """Write a time as people do: 43 s, 2 min 5 s, 3 h 10 min."""
    whole = math.floor(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

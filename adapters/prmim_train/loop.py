"""Pre-training, from the first image to the last picture, in the order of events."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from prmim_train.budget import Budget
from prmim_train.config import PretrainConfig
from prmim_train.data import train_batches
from prmim_train.engine import Engine, create_engine
from prmim_train.evaluate import evaluate_run, format_evaluation
from prmim_train.inspect import format_brief
from prmim_train.layers import dump_options
from prmim_train.pictures import draw_run
from prmim_train.prepare import open_data
from prmim_train.run_directory import RunDirectory

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

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    dict
        What `summary.json` holds: final loss, speed, unreadable images, evaluation of the frozen features.

    Raises
    ------
    ValueError, TypeError
        If an option does not fit the data or the backend.
    OSError
        If data cannot be read, or a checkpoint not written; the last good checkpoint is intact then.
    Interrupted
        On Ctrl-C or SIGTERM, after the current step and a checkpoint.
    NonFiniteLoss
        After a rescue checkpoint.
    """
    data = open_data(config)
    run = RunDirectory(config.run_path)
    goes_on = config.resume and RunDirectory.holds_run(run.path)
    if goes_on:
        summary = _finished_summary(run, data.budget)
        if summary is not None:
            print(f"The run in {run.path} is finished: nothing is left to do. Its summary:")
            print(json.dumps(summary, indent=2))
            return summary
    else:
        run.check_is_free()  # before the time that building an engine takes

    engine = create_engine(config, data.budget)
    if goes_on:
        run.remove_leftovers()
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None:
            engine.restore(checkpoint)
        if engine.step > data.budget.total_steps:
            raise ValueError(
                f"epochs: expected more than the {engine.step} steps that the run in {run.path} has taken already, got "
                f"{data.budget.total_steps}"
            )
        run.cut_metrics(engine.step)
    if engine.step == 0 and config.init_weights is not None:
        if not Path(config.init_weights).is_file():
            raise FileNotFoundError(
                f"init_weights: expected a .safetensors file, there is none at {config.init_weights}"
            )
        engine.load_weights(Path(config.init_weights))
    run.write_config(dump_options(config))

    print(format_brief(config, data, engine))
    print(f"Run directory: {run.path}" + (f", going on after step {engine.step}" if engine.step else ""), flush=True)

    batches = train_batches(
        data.source,
        indices=data.train,
        batch_size=config.batch_size,
        image_size=config.image_plane,
        seed=config.seed,
        start_step=engine.step,
        total_steps=data.budget.total_steps,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        workers=config.workers,
    )
    log = _Log(run, config, data.budget, engine)
    with _stop_signals() as stop, batches, log:
        for batch in batches:
            engine.train_step(batch.images, batch.index)
            log.advance()
            step = engine.step
            is_last = step == data.budget.total_steps
            is_stopping = stop.is_set and not is_last
            is_checkpoint = step % data.budget.checkpoint_steps == 0 or is_last or is_stopping
            if is_checkpoint or log.is_due(step):
                log.write(step)
            if is_checkpoint:
                run.save_checkpoint(engine, step, keep=config.keep_checkpoints)
            if is_stopping:
                raise Interrupted(_how_to_go_on(run, step, data.budget), stop.number)

    summary = {
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
    print(f"Trained {engine.step} steps in {_duration(log.seconds)}; {_loss_text(log.last)}.")
    if len(batches.unreadable):
        print(batches.unreadable.report())
    if config.eval_limit:
        print("Evaluating the frozen features ...", flush=True)
        summary["evaluation"] = evaluate_run(config, data, engine)
        print(format_evaluation(summary["evaluation"]))
    if config.pictures:
        for path in draw_run(run, config, data, engine):
            print(f"Picture: {path}")
    run.write_summary(summary)
    print(f"Summary: {run.path / 'summary.json'}")
    return summary


def _finished_summary(run: RunDirectory, budget: Budget) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = run.read_summary()
    return summary if summary is not None and summary["steps"] == budget.total_steps else None


def _how_to_go_on(run: RunDirectory, step: int, budget: Budget) -> str:
    return (
        f"Stopped after step {step} of {budget.total_steps}; a checkpoint is written. "
        f"Go on with: prmim pretrain --out {run.path} --resume"
    )


class _Log:
    """Progress bar and `metrics.jsonl`; stops the run where the loss is not finite."""

    def __init__(self, run: RunDirectory, config: PretrainConfig, budget: Budget, engine: Engine) -> None:
        self.run, self.config, self.budget, self.engine = run, config, budget, engine
        records = run.read_metrics()
        self.last: dict[str, Any] = records[-1] if records else {}
        self.first_step = engine.step + 1
        self.logged_step = engine.step
        self.earlier_seconds = float(self.last.get("seconds", 0.0))
        self.speed = SpeedMeter()
        self.print_every = max(1, budget.total_steps // NUM_PRINTED_LINES)
        self.printed_step = engine.step

        self.started = time.perf_counter()

    def __enter__(self) -> "_Log":
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=self.budget.total_steps,
            initial=self.engine.step,
            disable=None,  # None: no bar where the output is no terminal
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        """Time spent training, that before a resume included, up to the last step that was logged."""
        return float(self.last.get("seconds", 0.0))

    def advance(self) -> None:
        """Move the bar; the device may still be busy with the step."""
        self.bar.update(1)

    def is_due(self, step: int) -> bool:
        # The first step is read by itself: it compiles and fills caches, and would spoil the speed of the others.
        return step == self.first_step or step % self.config.log_every == 0

    def write(self, step: int) -> None:
        """Read the engine's metrics, check them, write them down; waits for the device."""
        if step == self.logged_step:
            return
        metrics = self.engine.read_metrics()
        self.speed.update((step - self.logged_step) * self.config.batch_size, time.perf_counter())
        self.logged_step = step
        if metrics["nonfinite_step"] is not None:
            self._rescue(int(metrics["nonfinite_step"]))
        speed = self.speed.recent
        self.last = {
            "step": step,
            "epoch": round(step / self.budget.steps_per_epoch, 4),
            **_losses(metrics),
            "lr": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            "images_per_second": None if speed is None else round(speed, 1),
            "seconds": round(self.earlier_seconds + time.perf_counter() - self.started, 3),
        }
        self.run.append_metrics(self.last)
        self._show(step, metrics["loss"], speed)

    def final_numbers(self) -> dict[str, Any]:
        """Return what the summary takes from the log."""
        speed = self.speed.overall
        return {"loss": None, **_losses(self.last)} | {
            "images_per_second": None if speed is None else round(speed, 1),
            "seconds": self.seconds,
        }

    def _show(self, step: int, loss: float, speed: float | None) -> None:
        text = f"loss {loss:.4f}" + ("" if speed is None else f", {speed:,.0f} images/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif step - self.printed_step >= self.print_every or step == self.budget.total_steps:
            self.printed_step = step
            print(f"step {step}/{self.budget.total_steps}: {text}, {_duration(self.seconds)}", flush=True)

    def _rescue(self, step: int) -> None:
        place = self.run.save_checkpoint(self.engine, step, keep=self.config.keep_checkpoints, prefix="rescue_")
        advice = "" if self.config.clip_grad is not None else " --clip_grad 1,"
        advice += "" if self.config.precision == "float32" else " --precision float32,"
        raise NonFiniteLoss(
            f"loss: expected a finite loss and gradient, but not at step {step}; the weights, untouched by that step, "
            f"are in {place}; try{advice} or a lower --base_learning_rate"
        )


def _losses(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the losses out of what was measured: `loss`, and its parts by the names that the method gives them."""
    return {name: value for name, value in numbers.items() if name == "loss" or name.startswith("loss_")}


def _loss_text(numbers: Mapping[str, Any]) -> str:
    """Write the losses in words, as in `loss 0.4321 (decoded 0.4000, thrown 0.4500)`; a part of 0 is not supervised."""
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

"""What a training run tells while it goes on: progress bar, `metrics.jsonl`, tracker, speed."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from prmim_train.budget import Budget
from prmim_train.checkpointing import Checkpoints
from prmim_train.data import Batch
from prmim_train.engine import Trainer
from prmim_train.layers import dump_options, parse_options
from prmim_train.processes import on_main
from prmim_train.run_directory import RESCUE, RunDirectory
from prmim_train.trackers import NoTracker, Tracker, open_tracker
from prmim_train.training_options import TrainingOptions

NUM_PRINTED_LINES = 20  # of progress, where the output is no terminal and a bar would fill a log file
SHARES = ("accuracy", "test_accuracy", "probe_knn", "probe_linear")
"""Numbers in [0, 1] that a line may have, told in percent."""


class NonFiniteLoss(ArithmeticError):  # noqa: N818  # the name says what happened
    """The loss or a gradient was not finite; a rescue checkpoint was written."""


class Log:
    """Progress bar, `metrics.jsonl` and tracker; ends the run where the loss is not finite.

    Every process has one and goes through the same readings; that of the main process alone shows and writes them.
    """

    def __init__(
        self, run: RunDirectory, config: TrainingOptions, budget: Budget, engine: Trainer, checkpoints: Checkpoints
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

    def __enter__(self) -> "Log":
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

    def write(self, step: int, measure: Callable[[], dict[str, Any]] | None = None) -> None:
        """Read the engine's metrics, check them, write them down; waits for the device.

        Parameters
        ----------
        step
            Steps done so far.
        measure
            Returns more numbers for this line. The time that it takes is no training time.
        """
        metrics = self.engine.read_metrics()
        now = time.perf_counter()
        self.speed.update((step - self.read_step) * self.config.batch_size, now)
        self._check_finite(metrics, step)
        self.read_step = step
        speed = self.speed.recent
        self.last = {
            "step": step,
            "epoch": round(step / self.budget.steps_per_epoch, 4),
            **_measured(metrics),
            "lr": metrics["learning_rate"],
            "grad_norm": _finite(metrics["grad_norm"]),
            **({"skipped": metrics["skipped"]} if metrics["skipped"] else {}),
            "images_per_second": None if speed is None else round(speed, 1),
            "waiting": round(self.waited / (now - self.written), 4),
            "seconds": round(self.earlier_seconds + now - self.started, 3),
        }
        self.waited, self.written = 0.0, now
        if measure is not None:
            self.last |= measure()
            self._pause(time.perf_counter() - now)
        if self.is_main:
            self.run.append_metrics(self.last)
            numbers = {name: value for name, value in self.last.items() if name != "step" and value is not None}
            self._track(lambda: self.tracker.log(step, numbers))
            self._show(step, speed)

    def final_numbers(self) -> dict[str, Any]:
        """Return what the summary takes from the log."""
        speed = self.speed.overall
        return {"loss": None, **_measured(self.last)} | {
            "images_per_second": None if speed is None else round(speed, 1),
            "seconds": self.seconds,
        }

    def _pause(self, seconds: float) -> None:
        """Let all clocks pass over the latest seconds."""
        self.started += seconds
        self.written += seconds
        self.speed.pause(seconds)

    def _show(self, step: int, speed: float | None) -> None:
        text = loss_text(self.last, parts=False) + ("" if speed is None else f", {speed:,.0f} images/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif step - self.printed_step >= self.print_every or step == self.budget.total_steps:
            self.printed_step = step
            print(f"step {step}/{self.budget.total_steps}: {text}, {duration(self.seconds)}", flush=True)

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


def _measured(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Pick out what steps measure: `loss`, its parts by the names that the method gives them, and `accuracy`."""
    return {
        name: value if value is None else _finite(value)
        for name, value in numbers.items()
        if name in ("loss", "accuracy") or name.startswith("loss_")
    }


def loss_text(numbers: Mapping[str, Any], *, parts: bool = True) -> str:
    """Write what was measured in words; a part of the loss that is 0 is not supervised.

    Examples
    --------
    >>> loss_text({"loss": 0.4321, "loss_decoded": 0.4, "loss_thrown": 0.45})
    'loss 0.4321 (decoded 0.4000, thrown 0.4500)'
    >>> loss_text({"loss": 0.9, "accuracy": 0.5, "test_accuracy": 0.625})
    'loss 0.9000, accuracy 50.0 %, test accuracy 62.5 %'
    """
    if numbers.get("loss") is None:
        return "no finite loss"
    named = {name.removeprefix("loss_"): value for name, value in numbers.items() if name.startswith("loss_") and value}
    text = ", ".join(f"{name} {value:.4f}" for name, value in named.items()) if parts else ""
    shares = {name.replace("_", " "): numbers.get(name) for name in SHARES}
    return (
        f"loss {numbers['loss']:.4f}"
        + (f" ({text})" if text else "")
        + "".join(f", {name} {100 * value:.1f} %" for name, value in shares.items() if value is not None)
    )


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

    def pause(self, seconds: float) -> None:
        """Leave the latest seconds out of the count."""
        if self.started is not None:
            self.started += seconds
            self.latest += seconds

    @property
    def overall(self) -> float | None:
        """Mean speed since the first update, None before the second."""
        if self.started is None or self.latest <= self.started:
            return None
        return self.images / (self.latest - self.started)


def duration(seconds: float) -> str:
    """Write a time as people do: 43 s, 2 min 5 s, 3 h 10 min."""
    whole = math.floor(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

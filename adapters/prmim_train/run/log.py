"""Progress of a run: progress bar, `metrics.jsonl`, tracker and speed."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from prmim_methods.messages import one_line
from prmim_train.config.layers import stored_options
from prmim_train.config.training import TrainingOptions
from prmim_train.data.batches import Batch
from prmim_train.run.budget import Budget
from prmim_train.run.checkpoints import Checkpoints
from prmim_train.run.directory import METRICS, RESCUE, RunDirectory
from prmim_train.run.engine import Trainer
from prmim_train.run.processes import on_main
from prmim_train.run.trackers import NoTracker, Tracker, open_tracker

NUM_PRINTED_LINES = 20  # lines of progress if the output is not a terminal: a bar would fill the log file
SHARES = ("accuracy", "test_accuracy", "probe_knn", "probe_linear")
"""Metrics in [0, 1], printed in percent."""


class NonFiniteLoss(ArithmeticError):  # noqa: N818  # the name says what happened
    """The loss or a gradient was not finite. A rescue checkpoint was written."""


class Log:
    """Progress bar, `metrics.jsonl` and tracker.

    Ends the run if the loss is not finite. Every process has a log and reads the same metrics. Only the main process
    shows and writes them.
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
        options = stored_options(self.config)
        name = self.config.tracker if self.is_main else "none"
        self.tracker = (
            on_main(self.engine, lambda: open_tracker(name, self.run, options, self.engine.step)) or NoTracker()
        )
        self.started = self.written = time.perf_counter()
        self.bar = tqdm(
            total=self.budget.total_steps,
            initial=self.engine.step,
            disable=None if self.is_main else True,  # None: no bar if the output is not a terminal
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self._track(self.tracker.close)

    @property
    def seconds(self) -> float:
        """Training time up to the last logged step, including the time before a resume."""
        return float(self.last.get("seconds", 0.0))

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches, and measure the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def advance(self) -> None:
        """Advance the progress bar. The device may still be working on the step."""
        self.bar.update(1)

    def write(self, step: int, measure: Callable[[], dict[str, Any]] | None = None) -> None:
        """Read, check and log the engine's metrics. Waits for the device.

        Parameters
        ----------
        step
            Steps completed.
        measure
            Returns more metrics for this line. Not counted as training time.
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
        """Return final loss, speed and time, for the summary."""
        speed = self.speed.overall
        return {"loss": None, **_measured(self.last)} | {
            "images_per_second": None if speed is None else round(speed, 1),
            "seconds": self.seconds,
        }

    def _pause(self, seconds: float) -> None:
        """Exclude the latest seconds from all clocks."""
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
        """Call the tracker.

        On failure, warns and disables it: the run must survive an outage.
        """
        try:
            call()
        except Exception as error:
            self.tracker = NoTracker()
            print(
                f"prmim: warning: tracker {self.config.tracker} failed and is disabled: {one_line(error)}; all metrics "
                f"are in {self.run.path / METRICS}",
                file=sys.stderr,
                flush=True,
            )

    def _check_finite(self, metrics: Mapping[str, Any], step: int) -> None:
        """End the run if too many steps since the last reading were not finite."""
        skipped, in_a_row, first = metrics["skipped"], metrics["skipped_in_a_row"], metrics["nonfinite_step"]
        if not skipped:
            return
        if self.config.nonfinite == "skip":
            if in_a_row > self.config.max_skipped:
                limit = f" (max_skipped is {self.config.max_skipped})"
                self._rescue(step, f"{in_a_row} non-finite steps in a row up to step {step}{limit}")
        elif self.read_step < first <= step:
            self._rescue(first, f"a non-finite step {first}")
        # Before it was resumed, the run may have ended because of this step, if a checkpoint lies between the step and
        # its reading. Then the user knows, and resumed on purpose.
        elif self.read_step > self.first_step or first not in self.rescued:
            self._rescue(step, f"non-finite steps up to step {step}: {skipped}")

    def _rescue(self, step: int, reason: str) -> None:
        self.checkpoints.start(step, RESCUE)
        place = self.checkpoints.finish()
        advice = "" if self.config.clip_grad is not None else " --clip_grad 1,"
        advice += "" if self.engine.precision.value == "float32" else " --precision float32,"
        raise NonFiniteLoss(
            f"loss: expected a finite loss and gradient, got {reason}; the last finite weights are in {place}; "
            f"try{advice} or a lower --base_learning_rate"
        )


def _finite(value: float) -> float | None:
    """Replace NaN, the mean of no steps, by None: JSON has no NaN."""
    return value if math.isfinite(value) else None


def _measured(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Select the loss, its parts, the accuracy and the layer weights.

    Names: `loss`, `loss_...`, `accuracy`, `layer_weight_...`.
    """
    return {
        name: value if value is None else _finite(value)
        for name, value in numbers.items()
        if name in ("loss", "accuracy") or name.startswith(("loss_", "layer_weight_"))
    }


def loss_text(numbers: Mapping[str, Any], *, parts: bool = True) -> str:
    """Format loss and accuracies for printing.

    Parts of the loss that are 0 are not supervised, and are omitted.

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
    """Images per second.

    The first update only starts the clock, to exclude start-up (compilation, first allocations).

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
        """Count images whose steps were completed at time `now`.

        Seconds of any monotonic clock.
        """
        if self.started is None:
            self.started = now
        else:
            self.images += images
            self.recent = images / (now - self.latest) if now > self.latest else None
        self.latest = now

    def pause(self, seconds: float) -> None:
        """Exclude the latest seconds."""
        if self.started is not None:
            self.started += seconds
            self.latest += seconds

    @property
    def overall(self) -> float | None:
        """Mean speed since the first update; None before the second update."""
        if self.started is None or self.latest <= self.started:
            return None
        return self.images / (self.latest - self.started)


def duration(seconds: float) -> str:
    """Format a duration: 43 s, 2 min 5 s, 3 h 10 min."""
    whole = math.floor(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

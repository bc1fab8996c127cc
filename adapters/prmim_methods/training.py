"""Options of training engines, for methods and classifiers."""

import re
from typing import ClassVar

from prmim_methods.learning_rate import DECAYS, learning_rate_at
from prmim_methods.record import Record, option, record


@record
class EngineOptions(Record):
    """Options that the command line passes to an engine unchanged."""

    group: ClassVar[str] = "Optimization"

    seed: int = option(
        "Seed of the weights, the held-out split, the order of the images, the crops and the masks.",
        default=0,
        at_least=0,
        at_most=2**31 - 1,
    )
    warmup_learning_rate: float = option("Learning rate at the start of the warm-up.", default=0.0, at_least=0)
    min_learning_rate: float = option("Lowest learning rate after the warm-up.", default=0.0, at_least=0)
    decay: str = option("Decay of the learning rate after the warm-up.", default="cosine", choices=DECAYS)
    weight_decay: float = option("Weight decay; biases and norms have none.", default=0.05, at_least=0)
    betas: tuple[float, float] = option("Decay rates of AdamW.", default=(0.9, 0.95), at_least=0, below=1)
    clip_grad: float | None = option(
        "Maximum norm of the gradient; larger gradients are scaled down. Null: no clipping.", default=None, above=0
    )
    accumulate: int = option(
        "Gradient accumulation: number of sequential parts of a batch, to save memory.", default=1, at_least=1
    )
    precision: str = option(
        "Number format of the forward and backward pass (weights are float32).",
        default="auto",
        choices={"auto": "bfloat16 where the device is faster in it, else float32", "float32": "", "bfloat16": ""},
    )
    compile: bool | None = option(
        "Compile the training step: takes minutes once, then steps are faster. Null: on CUDA only. Backend jax always "
        "compiles.",
        default=None,
    )
    device: str = option("Device: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.", default="auto")
    parallel: str = option(
        "Distribution of the weights over processes or devices.",
        default="ddp",
        choices={
            "ddp": "each holds all weights",
            "fsdp": "each holds a part of weights, gradients and optimizer state",
        },
    )

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        if not re.fullmatch(r"auto|mps|(cpu|cuda)(:[0-9]{1,4})?", self.device):
            raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {self.device!r}")


@record
class TrainingConfig(EngineOptions):
    """All options of a training run that an engine needs.

    Examples
    --------
    >>> TrainingConfig(total_steps=10, warmup_steps=11, learning_rate=1e-3)
    Traceback (most recent call last):
    ...
    ValueError: warmup_steps: expected at most total_steps 10, got 11
    """

    total_steps: int = option("Optimizer steps of the run.", default=1, at_least=1)
    warmup_steps: int = option("Steps of linear warm-up.", default=0, at_least=0)
    learning_rate: float = option("Peak learning rate.", default=1e-3, at_least=0)
    timeout: float = option(
        "Timeout in seconds of communication between processes in a training step.", default=45.0, above=0
    )

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps: expected at most total_steps {self.total_steps}, got {self.warmup_steps}")
        check_peak(self, self.learning_rate)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return learning_rate_at(
            step,
            self.total_steps,
            self.warmup_steps,
            self.learning_rate,
            self.min_learning_rate,
            self.decay,
            self.warmup_learning_rate,
        )


def check_peak(options: EngineOptions, peak: float) -> None:
    """Raise ValueError if the start or minimum of the learning rate exceeds its peak."""
    for name in ("warmup_learning_rate", "min_learning_rate"):
        rate = getattr(options, name)
        if rate > peak:
            raise ValueError(f"{name}: expected at most the peak learning rate {peak:g}, got {rate:g}")

"""What the options of every training have in common, be it pre-training or the training of a classifier."""

from collections.abc import Collection
from pathlib import Path

from prmim_train.checks import check_flag, check_integer, check_multiple, check_name, check_number, check_text

PRECISIONS = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("ddp", "fsdp")
NONFINITE = ("stop", "skip")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow")


class TrainingOptions:
    """The base of `PretrainConfig` and `ClassifyConfig`: the options that both have, their checks, what follows.

    Both are frozen dataclasses, and declare these options again, each with defaults, an order and documentation of its
    own.
    """

    data: str
    holdout: float
    epochs: int
    batch_size: int
    accumulate: int
    base_learning_rate: float
    min_learning_rate: float
    warmup_epochs: float | None
    weight_decay: float
    betas: tuple[float, float]
    clip_grad: float | None
    nonfinite: str
    max_skipped: int
    precision: str
    compile: bool
    device: str
    parallel: str
    seed: int
    workers: int
    backend: str
    out: str | None
    resume: bool
    log_every: int
    checkpoint_every: int
    checkpoint_minutes: float | None
    keep_checkpoints: int
    tracker: str

    @property
    def run_path(self) -> Path:
        """The folder of the run."""
        raise NotImplementedError

    @property
    def foreign_options(self) -> Collection[str]:
        """Options that have no effect together with the others."""
        raise NotImplementedError

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in effect: `warmup_epochs`, or the published share of all."""
        raise NotImplementedError

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, scaled by the number of images per step."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def micro_batch(self) -> int:
        """Images that go through the network at a time."""
        return self.batch_size // self.accumulate

    def _check_training(self) -> None:
        """Raise unless these options are in range."""
        for name in ("epochs", "batch_size", "accumulate"):
            check_integer(name, getattr(self, name), at_least=1)
        check_multiple("batch_size", self.batch_size, "accumulate", self.accumulate)
        self._check_rates()
        check_number("weight_decay", self.weight_decay, "at least 0", lambda x: x >= 0)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, "in [0, 1)", lambda x: 0 <= x < 1)
        if self.clip_grad is not None:
            check_number("clip_grad", self.clip_grad, "above 0", lambda x: x > 0)
        check_name("precision", self.precision, PRECISIONS)
        check_flag("compile", self.compile)
        check_name("device", self.device, DEVICES)
        check_name("parallel", self.parallel, PARALLEL)
        check_name("nonfinite", self.nonfinite, NONFINITE)
        check_integer("max_skipped", self.max_skipped, at_least=0)
        check_integer("seed", self.seed, at_least=0, at_most=2**31 - 1)
        check_integer("workers", self.workers, at_least=0)
        self._check_run()

    def _check_rates(self) -> None:
        check_number("base_learning_rate", self.base_learning_rate, "above 0", lambda x: x > 0)
        check_number("min_learning_rate", self.min_learning_rate, "at least 0", lambda x: x >= 0)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected at most the peak learning rate {self.learning_rate:g}, "
                f"got {self.min_learning_rate:g}"
            )
        if self.warmup_epochs is not None:
            check_number("warmup_epochs", self.warmup_epochs, "at least 0", lambda x: x >= 0)
            if self.warmup_epochs >= self.epochs:
                raise ValueError(
                    f"warmup_epochs: expected fewer than the {self.epochs} epochs, got {self.warmup_epochs:g}"
                )

    def _check_run(self) -> None:
        check_text("backend", self.backend)
        if self.out is not None:
            check_text("out", self.out)
        check_flag("resume", self.resume)
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.checkpoint_minutes is not None:
            check_number("checkpoint_minutes", self.checkpoint_minutes, "above 0", lambda x: x > 0)
        check_name("tracker", self.tracker, TRACKERS)

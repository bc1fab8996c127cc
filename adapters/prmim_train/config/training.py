"""Options that pre-training and the training of classifiers share, one record per group."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from prmim_methods.record import Record, option, options, record
from prmim_methods.training import EngineOptions, check_peak

DIGITS = "digits"
"""Name of the embedded data."""

TRACKERS = ("none", "tensorboard", "wandb", "mlflow")


CHANGEABLE = (
    *("data", "teacher", "workers", "max_pixels"),  # the origin of the run says whether images or teacher are others
    *("epochs", "warmup_epochs", "base_learning_rate", "scale_learning_rate", "min_learning_rate", "decay"),
    *("weight_decay", "betas", "warmup_learning_rate", "clip_grad", "accumulate", "precision", "compile"),
    *("scan_blocks", "device", "parallel"),
    *("nonfinite", "max_skipped", "backend", "log_every", "checkpoint_every", "checkpoint_minutes"),
    *("keep_checkpoints", "tracker", "eval_limit", "probe_every", "pictures", "test_every", "checkpoint"),
)
"""Options that a resumed run may change. The others give the steps already taken their meaning."""


@record
class DataOptions(Record):
    """Images and random crops."""

    group: ClassVar[str] = "Data"

    data: str = option(
        "The images: digits (1,797 embedded handwritten digits), a folder, an .npz file or tar shards. Labels come "
        "from class folders.",
        default=DIGITS,
    )
    image_key: str | None = option(
        "Which member of a sample in tar shards is the image: jpg for s000.jpg, seg.png for s000.seg.png, jpg;png for "
        "the first of both that there is. Null: the one with a single image ending, a photograph first.",
        default=None,
    )
    crop_scale: tuple[float, float] = option(
        "Smallest and largest share of an image's area that a random crop takes.",
        default=(0.2, 1.0),
        above=0,
        at_most=1,
        rising=True,
    )
    crop_ratio: tuple[float, float] = option(
        "Smallest and largest ratio of width to height of a random crop, relative to that of image_size.",
        default=(0.75, 4 / 3),
        above=0,
        rising=True,
    )
    crop_draw: str = option(
        "What happens to a drawn crop that is larger than the image along one side.",
        default="retry",
        choices={
            "retry": "it is drawn again, up to ten times, then the largest central crop is taken, as in torchvision",
            "clamp": "that side becomes the image's, as in MAE's linear probe",
        },
    )
    crop_padding: int | None = option(
        "Train on random windows of the whole image in place of random areas: it is resized (bilinear) until it just "
        "covers image_size, and extended on all sides by this many mirrored pixels. Null: random areas.",
        default=None,
        at_least=0,
        at_most=1024,
    )
    flip: bool = option("Mirror half of the crops left to right.", default=True)
    holdout: float = option(
        "Share of the images that is held out: never trained on, used to evaluate.", default=0.1, at_least=0, below=1
    )
    max_pixels: int = option(
        "Most pixels of an image file. Larger images count as unreadable and are skipped.",
        default=89_478_485,
        at_least=1,
    )
    workers: int = option(
        "Processes that read and crop images. 0: threads of the main process, which is enough for most disks.",
        default=0,
        at_least=0,
        at_most=1024,
    )


@record
class RunOptions(Record):
    """The run directory, checkpoints and logs."""

    group: ClassVar[str] = "Run"

    backend: str = option("Framework that computes: torch or jax.", default="torch")
    out: str | None = option("Folder of the run. Null: a name from the method and the data.", default=None)
    resume: bool = option(
        "Continue the run in that folder from its last checkpoint with its options, or start it if there is none.",
        default=False,
    )
    allow_changes: bool = option(
        "Continue or evaluate a run although its images, their split, its teacher, or options that give the steps "
        "already taken their meaning have changed.",
        default=False,
    )
    log_every: int = option("Steps between two lines of metrics.jsonl.", default=10, at_least=1)
    checkpoint_every: int = option(
        "Epochs between two checkpoints. The last step always writes one.", default=20, at_least=1
    )
    checkpoint_minutes: float | None = option(
        "Most minutes between two checkpoints. Null: no limit.", default=None, above=0
    )
    keep_checkpoints: int = option("Number of checkpoints to keep.", default=2, at_least=1)
    tracker: str = option(
        "Tracker that also receives the metrics.", default="none", choices=dict.fromkeys(TRACKERS, "")
    )


@record
class TrainingOptions(RunOptions, EngineOptions, DataOptions, ABC):
    """Options of every training."""

    group: ClassVar[str] = "Optimisation"

    epochs: int = option("Passes through the training images.", default=800, at_least=1)
    batch_size: int = option("Images per optimizer step, over all processes and parts.", default=4096, at_least=1)
    base_learning_rate: float = option(
        "Peak learning rate for 256 images per step; the rate in effect is this times batch_size / 256.",
        default=1.5e-4,
        above=0,
    )
    warmup_epochs: float | None = option(
        "Epochs of linear warm-up. Null: a share of the epochs.", default=None, at_least=0
    )
    nonfinite: str = option(
        "What to do after a step whose loss or gradient is not finite, which never changes the weights.",
        default="stop",
        choices={"stop": "end the run with a rescue checkpoint", "skip": "continue and count it"},
    )
    max_skipped: int = option(
        "Most non-finite steps in a row with nonfinite=skip; more end the run as stop does.", default=10, at_least=0
    )

    def check(self) -> None:
        """Validate options that depend on one another."""
        super().check()
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate {self.accumulate}, got {self.batch_size}")
        check_peak(self, self.learning_rate)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected fewer than the {self.epochs} epochs, got {self.warmup_epochs:g}")

    def flat(self) -> dict[str, Any]:
        """Return all options by name, in one flat list."""
        return {item.name: getattr(self, item.name) for item in options(type(self))}

    @property
    @abstractmethod
    def run_path(self) -> Path:
        """The folder of the run."""

    @property
    def foreign_options(self) -> Collection[str]:
        """Options that have no effect in this run."""
        return ()

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in effect."""
        return self.warmup_share * self.epochs if self.warmup_epochs is None else self.warmup_epochs

    @property
    def warmup_share(self) -> float:
        """Share of the epochs that is warm-up if ``warmup_epochs`` is None."""
        return 1 / 20

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, scaled by the batch size."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def micro_batch(self) -> int:
        """Images that pass through the network at a time."""
        return self.batch_size // self.accumulate

"""Options shared by pre-training and classifiers, one record per group."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from prmim_methods.files import expanded
from prmim_methods.record import Record, option, options, record
from prmim_methods.training import EngineOptions, check_peak
from prmim_train.config.axes import ThreeAxes

DIGITS = "digits"
"""Name of the embedded data."""

CLIP_EXAMPLE = "--image_size 16,224,224 --patch_size 2,16,16"
VOLUME_EXAMPLE = (
    "--volumes true --image_size 96,96,96 --patch_size 16,16,16 --decoder_dim 384 (or --config volume_vit_small)"
)
"""Options of volumes, for messages."""

LARGEST_EVALUATION_BATCH = 256

TRACKERS = ("none", "tensorboard", "wandb", "mlflow")


CHANGEABLE = (
    *(
        "data",
        "teacher",
        "workers",
        "max_pixels",
        "cache",
        "cache_size",
    ),  # the origin of the run says whether images or teacher are others
    *("epochs", "warmup_epochs", "base_learning_rate", "scale_learning_rate", "min_learning_rate", "decay"),
    *("weight_decay", "betas", "warmup_learning_rate", "clip_grad", "accumulate", "precision", "compile"),
    *("recompute_blocks", "scan_blocks", "device", "parallel"),
    *("nonfinite", "max_skipped", "backend", "log_every", "checkpoint_every", "checkpoint_minutes"),
    *("keep_checkpoints", "tracker", "eval_limit", "probe_every", "pictures", "test_every"),
)
"""Options that may change when a run is resumed. All others define its past steps."""


@record
class SourceOptions(Record):
    """Source of the images, and which of them to use."""

    group: ClassVar[str] = "Data"

    data: str = option(
        "Images: digits (1,797 embedded handwritten digits), a folder, an .npz file, tar shards, parquet files, an "
        "LMDB, hf:OWNER/NAME or hf:FOLDER (Hugging Face datasets), or package.module:function (a source of your own).",
        default=DIGITS,
    )
    image_key: str | None = option(
        "Where a sample holds its image. In tar shards, an extension: jpg for s000.jpg, seg.png for s000.seg.png; "
        "jpg;png takes the first that exists. In tables, a column. Null: in tar shards, the member with a single image "
        "ending, photographs first; in tables, the only column of image bytes.",
        default=None,
    )
    label_key: str | None = option(
        "Column of a table that holds the class, as integers or text. Null: label, labels, cls, class, class_id, "
        "class_name or fine_label.",
        default=None,
    )
    split: str | None = option(
        "Split of data. Null: the only one, or train. For test_data always the only one, test or validation.",
        default=None,
    )
    cache: str | None = option(
        "Cache folder for remote data (https://, s3://, gs://), shared by all runs. Null: no cache.",
        default="~/.cache/prmim",
    )
    cache_size: int = option(
        "Maximum size of the cache in bytes. The least recently used parts are deleted.",
        default=10 * 2**30,
        at_least=2**20,
        at_most=2**50,
    )


SOURCE_OPTIONS = tuple(item.name for item in options(SourceOptions))
"""Options of a source of images."""
OF_DATA = tuple(name for name in SOURCE_OPTIONS if name != "data" and not name.startswith("cache"))
"""Options that describe the data, not the machine. Evaluation on other data does not inherit them from the run."""


def is_same_data(data: str, other: str) -> bool:
    """Whether two values of `data` name the same images, possibly by two paths of one file or folder.

    Examples
    --------
    >>> is_same_data("photos", "./photos/"), is_same_data("photos", "birds"), is_same_data("digits", "./digits")
    (True, False, False)
    """
    if data == other or DIGITS in (data, other):
        return data == other
    return expanded(data).resolve() == expanded(other).resolve()


@record
class DataOptions(SourceOptions):
    """Images and random crops."""

    crop_scale: tuple[float, float] = option(
        "Range of the fraction of an image's area, or of a volume, that a random crop covers.",
        default=(0.2, 1.0),
        above=0,
        at_most=1,
        rising=True,
    )
    crop_ratio: tuple[float, float] = option(
        "Range of the ratio of width to height of a random crop, relative to that of image_size. For volumes, also the "
        "ratio of height to depth; both in millimetres.",
        default=(0.75, 4 / 3),
        above=0,
        rising=True,
    )
    crop_draw: str = option(
        "Handling of a random crop that is larger than the image along one side.",
        default="retry",
        choices={
            "retry": "draw again, up to ten times, then take the largest central crop, as in torchvision",
            "clamp": "shorten that side to the image's, as in MAE's linear probe",
        },
    )
    crop_padding: int | None = option(
        "Train on padded crops in place of random resized crops. The image is resized (bilinear) to just cover "
        "image_size and padded with this many mirrored pixels; the crop is a random window. Null: random resized "
        "crops.",
        default=None,
        at_least=0,
        at_most=1024,
    )
    flip: bool = option("Mirror half of the crops left to right; for volumes, half along each axis.", default=True)
    frame_stride: int = option(
        "Clips: step between the frames of a crop, which starts at a random frame.", default=1, at_least=1
    )
    volumes: bool = option(
        "Treat the first of three axes as space, not time: crops are boxes, resized and mirrored along all three axes.",
        default=False,
    )
    spacing: tuple[float, float, float] | None = option(
        "Volumes: millimetres per voxel along depth, height and width. Crops keep their proportions in millimetres. "
        "Null: from the file, or equal along all axes if unknown.",
        default=None,
        above=0,
    )
    holdout: float = option(
        "Fraction of the images that is held out: never trained on, used for evaluation.",
        default=0.1,
        at_least=0,
        below=1,
    )
    max_pixels: int = option(
        "Maximum number of pixels of an image file. Larger images count as unreadable and are skipped.",
        default=89_478_485,
        at_least=1,
    )
    workers: int = option(
        "Worker processes that read and crop images. 0: threads of the main process, enough for most disks.",
        default=0,
        at_least=0,
        at_most=1024,
    )

    def sampled_axes(self, image_size: tuple[int, ...]) -> ThreeAxes | None:
        """Return the sampling of clips or volumes along the first axis; None for images."""
        if len(image_size) != 3:
            return None
        return ThreeAxes(image_size[0], self.frame_stride, self.volumes, self.spacing)

    def check(self) -> None:
        """Validate options that depend on one another."""
        super().check()
        if self.volumes and self.frame_stride > 1:
            raise ValueError(f"frame_stride: expected 1 with volumes, got {self.frame_stride}")
        if self.volumes and self.crop_padding is not None:
            raise ValueError(f"crop_padding: expected null with volumes, got {self.crop_padding}")
        if self.spacing is not None and not self.volumes:
            raise ValueError(f"spacing: expected null without volumes, got {self.spacing}")


SAMPLING = ("frame_stride", "volumes", "spacing")
"""Options of the sampling of clips and volumes."""


@record
class RunOptions(Record):
    """The run directory, checkpoints and logs."""

    group: ClassVar[str] = "Run"

    backend: str = option("Framework: torch or jax.", default="torch")
    out: str | None = option("Folder of the run. Null: named after the method and the data.", default=None)
    resume: bool = option(
        "Resume the run in that folder from its last checkpoint, with its options. Start a new run if there is none.",
        default=False,
    )
    allow_changes: bool = option(
        "Resume or evaluate a run even if its images, their split, its teacher, or options that define its past steps "
        "have changed.",
        default=False,
    )
    log_every: int = option("Steps between two lines of metrics.jsonl.", default=10, at_least=1)
    checkpoint_every: int = option(
        "Epochs between two checkpoints. The last step always writes one.", default=20, at_least=1
    )
    checkpoint_minutes: float | None = option(
        "Maximum number of minutes between two checkpoints. Null: no limit.", default=None, above=0
    )
    keep_checkpoints: int = option("Number of checkpoints to keep.", default=2, at_least=1)
    tracker: str = option(
        "Tracker that also receives the metrics.", default="none", choices=dict.fromkeys(TRACKERS, "")
    )


@record
class TrainingOptions(RunOptions, EngineOptions, DataOptions, ABC):
    """Options of every training."""

    group: ClassVar[str] = "Optimization"

    epochs: int = option("Passes through the training images.", default=800, at_least=1)
    batch_size: int = option("Images per optimizer step, over all processes and parts.", default=4096, at_least=1)
    base_learning_rate: float = option(
        "Peak learning rate for 256 images per step. The effective rate is this value times batch_size / 256.",
        default=1.5e-4,
        above=0,
    )
    warmup_epochs: float | None = option(
        "Epochs of linear warm-up. Null: a share of the epochs.", default=None, at_least=0
    )
    nonfinite: str = option(
        "Action after a step with a non-finite loss or gradient, which never changes the weights.",
        default="stop",
        choices={"stop": "end the run with a rescue checkpoint", "skip": "continue and count it"},
    )
    max_skipped: int = option(
        "Maximum number of consecutive non-finite steps with nonfinite=skip. More of them end the run.",
        default=10,
        at_least=0,
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
        """Effective number of warm-up epochs."""
        return self.warmup_share * self.epochs if self.warmup_epochs is None else self.warmup_epochs

    @property
    def warmup_share(self) -> float:
        """Warm-up as a fraction of the epochs if ``warmup_epochs`` is None."""
        return 1 / 20

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, scaled by the batch size."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, over all processes."""
        return self.batch_size // self.accumulate

    @property
    def evaluation_batch(self) -> int:
        """Images per forward pass of an evaluation, in each process."""
        return min(LARGEST_EVALUATION_BATCH, self.micro_batch)

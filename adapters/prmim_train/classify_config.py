"""What the training of a classifier is: one flat, frozen record of options, checked when it is made.

`finetune` trains encoder and head, `linear` the head alone.  Options that nobody gave come, in this order, from the run
whose encoder is used (`INHERITED`), and from the published recipe of the protocol (`RECIPES`), which is laid over the
defaults below.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmim_train.checks import check_flag, check_integer, check_name, check_number, check_range, check_text
from prmim_train.config import DIGITS, PretrainConfig
from prmim_train.training_options import TrainingOptions

POOLS = ("mean", "cls")

INHERITED = ("data", "holdout", "flip", "workers", "precision", "device", "parallel", "seed", "backend")
"""Options that are those of the run whose encoder is used, unless given."""

RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "linear": {
        "pool": "cls",
        "rand_augment": 0.0,
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.0,
        "epochs": 90,
        "batch_size": 16384,
        "base_learning_rate": 0.1,
        "min_learning_rate": 0.0,
        "weight_decay": 0.0,
    },
}
"""What differs from the defaults, by protocol."""

DIGITS_RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {
        "crop_scale": (0.8, 1.0),
        "rand_augment": 0.0,
        "erasing": 0.0,
        "test_crop": 1.0,
        "epochs": 20,
        "batch_size": 64,
        "base_learning_rate": 2e-3,
    },
    "linear": {
        "crop_scale": (0.8, 1.0),
        "test_crop": 1.0,
        "epochs": 30,
        "batch_size": 64,
        "base_learning_rate": 50.0,  # few steps, which have to lead as far as many do: see `Classification.describe`
    },
}
"""The same for the embedded digits, which are few and small, above the published ones."""

FOREIGN = {"finetune": ("momentum", "trust"), "linear": ("drop_path", "layer_decay", "betas")}
WARMUP = {"finetune": 1 / 20, "linear": 1 / 9}
OPTIMIZERS = {"finetune": "adamw", "linear": "lars"}


@dataclass(frozen=True)
class ClassifyConfig(TrainingOptions):
    """The options of a classifier's training.

    The defaults are the published recipe by which MAE fine-tunes ViT-B/16 for ImageNet.

    Parameters
    ----------
    protocol
        `finetune` (encoder and head) or `linear` (the head alone, on frozen features).
    data
        Labelled images to learn from, but for those held out: see prmim pretrain --help.
    holdout
        Share of those images that is held out, to be tested on.
    test_data
        Other labelled images to test on, all of them, with the same class names. Null: those held out.
    crop_scale
        Smallest and largest share of an image's area that a random crop takes.
    crop_ratio
        Smallest and largest ratio of width to height of a random crop.
    flip
        Mirror half of the crops left to right.
    rand_augment
        Mean strength of RandAugment's operations, from 0 to 10. 0: no RandAugment.
    rand_augment_operations
        How many operations of RandAugment an image gets, each with probability one half.
    rand_augment_spread
        Standard deviation of that strength.
    erasing
        Share of the images a random box of which is replaced by noise.
    mixup
        Parameter of the beta distribution from which mixup draws its share. 0: no mixup.
    cutmix
        The same for cutmix. 0: no cutmix.
    mix_switch
        Where there are both: share of the batches that get cutmix.
    label_smoothing
        Share of each target that is spread evenly over all classes.
    test_crop
        Sides of the central box of a test image that is looked at, relative to the largest such box.
    workers
        Processes that read and crop images. 0: threads of the main process.
    checkpoint
        Step of the run's checkpoint to take the encoder from. Null: the last one.
    pool
        What the head sees: `mean` (the mean of the patch tokens, normalised) or `cls` (the class token).
    drop_path
        Rate at which the branches of the last block are dropped for an image, rising linearly from 0 at the first.
    epochs
        How often the training goes through the images.
    batch_size
        Images per optimiser step, whatever `accumulate` says.
    accumulate
        Parts a batch is cut into, one after the other, to save memory.
    base_learning_rate
        Peak learning rate for 256 images per step; the rate used is this times `batch_size` / 256.
    min_learning_rate
        Learning rate at the end of its cosine.
    warmup_epochs
        Epochs of linear warm-up from zero. Null: a twentieth of the epochs, for linear a ninth.
    weight_decay
        Weight decay; none on biases, norms, class token and position table.
    layer_decay
        Factor by which the learning rate falls from each block to the one before it.
    betas
        The two decay rates of AdamW.
    momentum
        Momentum of LARS.
    trust
        Trust coefficient of LARS.
    ema_decay
        Decay of a running mean of the weights, which is tested in their place, as in 0.9999. Null: none.
    clip_grad
        Largest norm of the gradient; longer ones are scaled down. Null: no clipping.
    nonfinite
        What becomes of a step whose loss or gradient is not finite, which never changes the weights: `stop` or `skip`,
        as in prmim pretrain.
    max_skipped
        With nonfinite=skip: the most such steps in a row.
    precision
        Number format of the forward and backward pass: `float32` or `bfloat16`.
    compile
        Compile the training step first, where the backend leaves the choice.
    device
        Where to compute: `auto` (a GPU where there is one), `cpu` or `cuda`.
    parallel
        How several processes share the work: `ddp` or `fsdp`.
    seed
        Seed of the head, of the order of the images and of all augmentation; the split is that of the run.
    backend
        Framework that computes: `torch` or `jax`; either reads the weights of the other.
    out
        Folder of the classifier. Null: one named after the protocol, in that of the run.
    resume
        Go on with the classifier in that folder from its last checkpoint, or begin one where there is none; its own
        options hold unless given again.
    log_every
        Steps between two lines of `metrics.jsonl`.
    test_every
        Epochs between two tests on the test images. One is always made at the end, and that one counts.
    checkpoint_every
        Epochs between two checkpoints. One is always written at the end.
    checkpoint_minutes
        Minutes after which a checkpoint is written in any case. Null: by epochs alone.
    keep_checkpoints
        How many checkpoints to keep; older ones are deleted.
    tracker
        Where the numbers of metrics.jsonl go besides: `none`, `tensorboard`, `wandb` or `mlflow`.

    Raises
    ------
    ValueError, TypeError
        If an option is of the wrong kind, out of its range, or has no effect in this protocol; the message is one line.

    Examples
    --------
    >>> ClassifyConfig(protocol="linear", layer_decay=0.5)
    Traceback (most recent call last):
    ...
    ValueError: layer_decay: protocol linear has no such option
    """

    protocol: str = "finetune"
    # Data
    data: str = DIGITS
    holdout: float = 0.1
    test_data: str | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    rand_augment: float = 9.0
    rand_augment_operations: int = 2
    rand_augment_spread: float = 0.5
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.1
    test_crop: float = 0.875
    workers: int = 0
    # Model
    checkpoint: int | None = None
    pool: str = "mean"
    drop_path: float = 0.1
    # Optimisation
    epochs: int = 100
    batch_size: int = 1024
    accumulate: int = 1
    base_learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    trust: float = 0.001
    ema_decay: float | None = None
    clip_grad: float | None = None
    nonfinite: str = "stop"
    max_skipped: int = 10
    precision: str = "bfloat16"
    compile: bool = False
    device: str = "auto"
    parallel: str = "ddp"
    seed: int = 0
    # Run
    backend: str = "torch"
    out: str | None = None
    resume: bool = False
    log_every: int = 10
    test_every: int = 5
    checkpoint_every: int = 5
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 2
    tracker: str = "none"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as YAML gives it
                object.__setattr__(self, field.name, tuple(value))
        check_name("protocol", self.protocol, tuple(RECIPES))
        for field in dataclasses.fields(self):
            if field.name in self.foreign_options and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: protocol {self.protocol} has no such option")
        self._check_data()
        self._check_classifier()
        self._check_training()

    def _check_data(self) -> None:
        check_text("data", self.data)
        if self.test_data is not None:
            check_text("test_data", self.test_data)
        check_number("holdout", self.holdout, "in [0, 1)", lambda x: 0 <= x < 1)
        check_range("crop_scale", self.crop_scale, low_open=0.0, high=1.0)
        check_range("crop_ratio", self.crop_ratio, low_open=0.0, high=math.inf)
        check_flag("flip", self.flip)
        check_number("rand_augment", self.rand_augment, "in [0, 10]", lambda x: 0 <= x <= 10)
        check_integer("rand_augment_operations", self.rand_augment_operations, at_least=1)
        for name in ("rand_augment_spread", "mixup", "cutmix"):
            check_number(name, getattr(self, name), "at least 0", lambda x: x >= 0)
        for name in ("erasing", "mix_switch"):
            check_number(name, getattr(self, name), "in [0, 1]", lambda x: 0 <= x <= 1)
        check_number("label_smoothing", self.label_smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("test_crop", self.test_crop, "in (0, 1]", lambda x: 0 < x <= 1)

    def _check_classifier(self) -> None:
        check_name("pool", self.pool, POOLS)
        if self.checkpoint is not None:
            check_integer("checkpoint", self.checkpoint, at_least=0)
        check_number("drop_path", self.drop_path, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("layer_decay", self.layer_decay, "in (0, 1]", lambda x: 0 < x <= 1)
        check_number("momentum", self.momentum, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("trust", self.trust, "above 0", lambda x: x > 0)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, "in (0, 1)", lambda x: 0 < x < 1)
        check_integer("test_every", self.test_every, at_least=1)

    @property
    def run_path(self) -> Path:
        """The folder of the classifier: `out`, which `classify_config` always sets."""
        return Path(self.protocol if self.out is None else self.out)

    @property
    def foreign_options(self) -> Collection[str]:
        """The options that the protocol does not have."""
        return FOREIGN[self.protocol]

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in effect: `warmup_epochs`, or the published share of all."""
        return WARMUP[self.protocol] * self.epochs if self.warmup_epochs is None else self.warmup_epochs

    def classifier_options(self) -> dict[str, Any]:
        """Return the arguments of an adapter's `ClassifierEngine` that other engines do not have."""
        is_linear = self.protocol == "linear"
        options = {name: getattr(self, name) for name in ("pool", "ema_decay")}
        options |= {"frozen": is_linear, "norm": "batch" if is_linear else "layer"}
        options |= {"optimizer": OPTIMIZERS[self.protocol]}
        own = FOREIGN["finetune" if is_linear else "linear"]  # what the other protocol does not have
        return options | {name: getattr(self, name) for name in own if name != "betas"}


def classify_config(base: PretrainConfig, given: Mapping[str, Any]) -> ClassifyConfig:
    """Lay the layers of a classifier's options over each other, and check the result.

    Parameters
    ----------
    base
        The options of the run whose encoder is used.
    given
        Options given by the user; `protocol` is among them.

    Returns
    -------
    ClassifyConfig

    Examples
    --------
    >>> config = classify_config(PretrainConfig(data="photos", seed=3), {"protocol": "linear", "epochs": 50})
    >>> config.seed, config.batch_size, config.base_learning_rate, config.epochs
    (3, 16384, 0.1, 50)
    """
    protocol = given["protocol"]
    check_name("protocol", protocol, tuple(RECIPES))
    inherited = {name: getattr(base, name) for name in INHERITED}
    layers = {**inherited, **RECIPES[protocol]}
    if given.get("data", base.data) == DIGITS:
        layers |= DIGITS_RECIPES[protocol]
    return ClassifyConfig(**{**layers, "out": str(base.run_path / protocol), **given})

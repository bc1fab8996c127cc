"""The options of a classifier's training.

Options that are not given come from the run whose encoder is used (`INHERITED`), then from the packaged recipe of the
protocol (`RECIPES`), then from the defaults below.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from prmim_methods import ClassifierConfig, classifier
from prmim_methods.files import expanded
from prmim_methods.record import Record, find_option, option, record
from prmim_train.config.layers import merge_layers, read_options
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.config.training import DIGITS, OF_DATA, SAMPLING, SOURCE_OPTIONS, TrainingOptions, is_same_data

INHERITED = (
    *SOURCE_OPTIONS,
    "holdout",
    "flip",
    "max_pixels",
    *SAMPLING,
    "workers",
    "precision",
    "compile",
    "device",
    "parallel",
    "seed",
    "backend",
)
"""Options that are inherited from the run of the encoder, unless given."""

RECIPES = {"finetune": "mae_vit_base_finetune", "linear": "mae_vit_base_linear"}
"""Packaged recipe with the defaults of each protocol."""

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
        "crop_draw": "retry",
        "test_crop": 1.0,
        "epochs": 30,
        "batch_size": 64,
        "base_learning_rate": 50.0,  # few steps must go as far as many: see `Classification.describe`
    },
}
"""Defaults for the embedded digits, which are few and small."""

LARGEST_CROPPED = 224
CROPPED_SHARE = 0.875
"""Default of `test_crop` up to 224 pixels, which corresponds to resizing to 256; larger models see the whole image."""

FOREIGN = {**classifier.FOREIGN, "linear": (*classifier.FOREIGN["linear"], "betas")}
"""Options without effect, by protocol."""

WARMUP = {"finetune": 1 / 20, "linear": 1 / 9}
"""Warm-up as a fraction of the epochs if `warmup_epochs` is None, as in the published recipe."""


@record
class AugmentOptions(Record):
    """Augmentation of classifier training."""

    group: ClassVar[str] = "Augmentation"

    rand_augment: float = option(
        "Mean strength of RandAugment's operations. 0: no RandAugment.", default=9.0, at_least=0, at_most=10
    )
    rand_augment_operations: int = option(
        "Number of RandAugment operations for an image, each applied with probability one half.",
        default=2,
        at_least=1,
        at_most=100,
    )
    rand_augment_spread: float = option("Standard deviation of the strength of RandAugment.", default=0.5, at_least=0)
    erasing: float = option(
        "Probability of random erasing, which replaces a random box by noise.", default=0.25, at_least=0, at_most=1
    )
    mixup: float = option("Parameter of mixup's beta distribution. 0: no mixup.", default=0.8, at_least=0)
    cutmix: float = option("Parameter of cutmix's beta distribution. 0: no cutmix.", default=1.0, at_least=0)
    mix_switch: float = option(
        "With both mixup and cutmix: fraction of the batches that get cutmix.", default=0.5, at_least=0, at_most=1
    )
    label_smoothing: float = option(
        "Label smoothing: fraction of a target that is spread uniformly over all classes.",
        default=0.1,
        at_least=0,
        below=1,
    )
    test_data: str | None = option(
        "Other labelled images to test on, with the same class names. Null: the held-out images.", default=None
    )
    test_crop: float | None = option(
        "Side of the central crop of a test image, relative to the largest such crop. Null: 0.875 up to 224 pixels, 1 "
        "above.",
        default=None,
        above=0,
        at_most=1,
    )


@record
class ClassifyConfig(AugmentOptions, TrainingOptions, ClassifierConfig):
    """The options of a classifier's training.

    The defaults are MAE's published recipe for fine-tuning ViT-B/16 on ImageNet (`mae_vit_base_finetune`), except
    `warmup_epochs`.
    """

    group: ClassVar[str] = "Run"

    crop_scale: tuple[float, float] = (0.08, 1.0)
    epochs: int = 100
    batch_size: int = 1024
    base_learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    out: str | None = option(
        "Folder of the classifier. Null: a subfolder of the run, named after the protocol.", default=None
    )
    checkpoint_every: int = 5
    checkpoint: int | None = option(
        "Step of the run's checkpoint to take the encoder from. Null: the last one.", default=None, at_least=0
    )
    test_every: int = option(
        "Epochs between two tests. The result is the test after the last step.", default=5, at_least=1
    )

    @property
    def run_path(self) -> Path:
        """The folder of the classifier, `out`, which `classify_config` always sets."""
        return expanded(self.protocol if self.out is None else self.out)

    @property
    def foreign_options(self) -> Collection[str]:
        """Options that have no effect in the protocol."""
        return FOREIGN[self.protocol]

    @property
    def warmup_share(self) -> float:
        """Warm-up as a fraction of the epochs if `warmup_epochs` is None."""
        return WARMUP[self.protocol]

    def test_share(self, image_size: tuple[int, ...]) -> float:
        """Return `test_crop`, or its default for images of this size."""
        if self.test_crop is not None:
            return self.test_crop
        return CROPPED_SHARE if max(image_size[-2:]) <= LARGEST_CROPPED else 1.0


def protocol_defaults(protocol: str) -> dict[str, Any]:
    """Return the options of the packaged recipe of a protocol, without the protocol."""
    defaults = read_options(RECIPES[protocol], "evaluate")
    del defaults["protocol"]
    return defaults


def classify_config(base: PretrainConfig, given: Mapping[str, Any]) -> ClassifyConfig:
    """Return the configuration of a classifier.

    Given options override those of the run, which override the recipe of the protocol.

    Parameters
    ----------
    base
        The options of the run whose encoder is used.
    given
        Options given by the user, including `protocol`.

    Raises
    ------
    ValueError, TypeError
        If an option is unknown, not allowed, or contradicts another one.

    Examples
    --------
    >>> from prmim_train.config.pretrain import pretrain_config
    >>> base = pretrain_config(data="photos", seed=3)
    >>> config = classify_config(base, {"protocol": "linear", "epochs": 50})
    >>> config.seed, config.batch_size, config.base_learning_rate, config.epochs
    (3, 16384, 0.1, 50)
    """
    protocol = find_option(ClassifyConfig, "protocol").check(given["protocol"])
    is_other = not is_same_data(given.get("data", base.data), base.data)
    inherited = {name: getattr(base, name) for name in INHERITED if not (is_other and name in OF_DATA)}
    digits = DIGITS_RECIPES[protocol] if given.get("data", base.data) == DIGITS else {}
    own = {"out": str(base.run_path / protocol), **given}
    return ClassifyConfig(**merge_layers(protocol_defaults(protocol), inherited, digits, own))

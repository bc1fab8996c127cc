"""Classifiers on a trained encoder: fine-tuning, and the linear probe."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from prmim_methods.encoder import EncoderConfig, EncoderOptions
from prmim_methods.method import drop_path_option
from prmim_methods.positions import SHARED_TABLE
from prmim_methods.record import Record, find_option, option, record

T = TypeVar("T")

BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1
"""Smallest weight of a batch in the running statistics, which start as the mean of all batches."""

BLOCK_TABLE = "encoder.blocks.{}.attn.relative_position_bias_table"
"""Name of the table of one block."""

FOREIGN = {"finetune": ("momentum", "trust", "batch_norm"), "linear": ("drop_path", "layer_decay")}
"""Options without effect, by protocol."""


@record
class ClassifierConfig(Record):
    """Options of a classifier: an encoder with a linear head.

    ``finetune`` trains the encoder and the head with AdamW. ``linear`` trains only the head with LARS, on frozen
    features after a batch norm without learned factors.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.

    Examples
    --------
    >>> ClassifierConfig(protocol="linear", layer_decay=0.5)
    Traceback (most recent call last):
    ...
    ValueError: layer_decay: protocol linear has no such option
    """

    group: ClassVar[str] = "Classifier"
    losses: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    protocol: str = option(
        "Trained parts.", default="finetune", choices={"finetune": "encoder and head", "linear": "the head alone"}
    )
    pool: str = option(
        "Input of the head.",
        default="mean",
        choices={"mean": "the mean of the patch tokens, normalized", "cls": "the class token, or the mean of several"},
    )
    image_size: tuple[int, ...] | None = option(
        "Size of the images in pixels, in place of the run's: one number for both sides, or height,width.",
        default=None,
        at_least=1,
    )
    drop_path: float = drop_path_option()
    layer_decay: float = option(
        "Factor of the learning rate from each block to the one before it.", default=0.65, above=0, at_most=1
    )
    momentum: float = option("Momentum of LARS.", default=0.9, at_least=0, below=1)
    trust: float = option("Trust coefficient of LARS.", default=0.001, above=0)
    batch_norm: str = option(
        "Images over which batch norm takes its statistics in training.",
        default="device",
        choices={
            "device": "those of each device, as published",
            "all": "those of all devices, so that their number has no effect",
        },
    )
    ema_decay: float | None = option(
        "Decay of the exponential moving average of the weights, which is evaluated in their place. Null: none.",
        default=None,
        above=0,
        below=1,
    )

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        for name in self.foreign_options:
            if getattr(self, name) != find_option(type(self), name).default:
                raise ValueError(f"{name}: protocol {self.protocol} has no such option")

    @property
    def foreign_options(self) -> Collection[str]:
        """Options that have no effect in the protocol."""
        return FOREIGN[self.protocol]

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder is frozen."""
        return self.protocol == "linear"

    @property
    def drop_rate(self) -> float:
        """Drop-path rate of the last block in training; 0 for a frozen encoder."""
        return 0.0 if self.is_frozen else self.drop_path

    @property
    def head_std(self) -> float:
        """Standard deviation of the head's initial weights."""
        return 0.01 if self.is_frozen else 2e-5

    @property
    def norm(self) -> str:
        """The norm before the head, ``"batch"`` for a frozen encoder, else ``"layer"``."""
        return "batch" if self.is_frozen else "layer"

    def encoder(self, method: EncoderOptions) -> EncoderConfig:
        """Return the record of a method's encoder, for the classifier's image size."""
        return method.encoder_config(self.image_size)

    def position(self, method: EncoderOptions) -> str:
        """Return how the encoder represents positions.

        :attr:`MethodConfig.position`, or ``"relative_per_block"`` if relative positions are fine-tuned: each block then
        trains its own copy of the method's table, as in SimMIM.
        """
        return "relative_per_block" if method.position == "relative" and not self.is_frozen else method.position

    def architecture(self, method: EncoderOptions, num_classes: int) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`.

        Parameters
        ----------
        method
            The method whose encoder the classifier takes.
        num_classes
            Number of classes.
        """
        return {
            "kind": "classifier",
            **self.encoder(method).encoder_architecture(),
            "position": self.position(method),
            "num_classes": num_classes,
            "pool": self.pool,
            "norm": self.norm,
        }

    def not_decayed(self) -> frozenset[str]:
        """Return the multi-axis parameters that the recipes exempt from weight decay."""
        return frozenset({"encoder.cls_token", "encoder.pos_embed"})

    def rate_scale(self, name: str, depth: int) -> float:
        """Return a parameter's learning-rate factor.

        The factor is ``layer_decay ** (depth + 1 - group)``. Group 0 holds the patch embedding, the class token and the
        position table; group i + 1 is block i, with its table of relative position bias; group ``depth + 1`` is the
        rest: the final norm and the head.

        Parameters
        ----------
        name
            Name of the parameter, as in files.
        depth
            Number of blocks.

        References
        ----------
        Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254.

        Examples
        --------
        >>> config = ClassifierConfig(layer_decay=0.5)
        >>> names = "encoder.cls_token", "encoder.blocks.1.norm1.bias", "head.weight"
        >>> [config.rate_scale(name, 2) for name in names]
        [0.125, 0.5, 1.0]
        """
        group = depth + 1
        if name.startswith("encoder.blocks."):
            group = 1 + int(name.split(".")[2])
        elif name.startswith("encoder.") and not name.startswith("encoder.norm."):
            group = 0
        return float(self.layer_decay ** (depth + 1 - group))


def copy_table(weights: Mapping[str, T], depth: int) -> dict[str, T]:
    """Copy a shared table of relative position bias to each block.

    No-op without such a table.

    Parameters
    ----------
    weights
        Tensors by name, as in the file of a method.
    depth
        Number of blocks.

    Examples
    --------
    >>> sorted(copy_table({SHARED_TABLE: 1.0}, 2))[:2]
    ['encoder.blocks.0.attn.relative_position_bias_table', 'encoder.blocks.1.attn.relative_position_bias_table']
    """
    copies = {BLOCK_TABLE.format(block): weights[SHARED_TABLE] for block in range(depth) if SHARED_TABLE in weights}
    return {**weights, **copies}


def check_targets(targets: Any, batch: int, num_classes: int) -> None:
    """Raise TypeError or ValueError unless targets are float32 (batch, num_classes)."""
    if targets.dtype != np.float32:
        raise TypeError(f"targets: expected float32, got {targets.dtype}")
    if tuple(targets.shape) != (batch, num_classes):
        raise ValueError(f"targets: expected shape {(batch, num_classes)}, got {tuple(targets.shape)}")

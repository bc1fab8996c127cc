"""What classifiers of every adapter share: what is in range, how they start, and which weights learn more slowly."""

from typing import Any, Literal, get_args

import numpy as np

from prmim_core.options import check_flag, check_fraction, positive_integers

Norm = Literal["layer", "batch"]
Optimizer = Literal["adamw", "lars"]

POOLS = ("mean", "cls")

BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1
"""Share of a batch's statistics in the running ones, once there have been as many batches as make it their mean."""

NOT_DECAYED = frozenset({"encoder.cls_token", "encoder.pos_embed", "encoder.rel_pos_bias.relative_position_bias_table"})
"""Parameters of several axes that the recipes of fine-tuning spare from weight decay."""


def head_std(frozen: bool) -> float:
    """Return the standard deviation of a head's weights at first: on an encoder that is frozen, or that learns.

    Examples
    --------
    >>> head_std(frozen=True), head_std(frozen=False)
    (0.01, 2e-05)
    """
    return 0.01 if frozen else 2e-5


def rate_scale(name: str, depth: int, layer_decay: float) -> float:
    """Return what the learning rate of a parameter of a classifier is multiplied with.

    It is ``layer_decay ** (depth + 1 - group)``. Group 0 are patch embedding, cls token and position tables, group
    i + 1 is block i, group ``depth + 1`` all else: the final norm and the head.

    Parameters
    ----------
    name
        Name of the parameter, as in files.
    depth
        Number of blocks.
    layer_decay
        In (0, 1].

    References
    ----------
    Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254.

    Examples
    --------
    >>> [rate_scale(name, 2, 0.5) for name in ("encoder.cls_token", "encoder.blocks.1.norm1.bias", "head.weight")]
    [0.125, 0.5, 1.0]
    """
    group = depth + 1
    if name.startswith("encoder.blocks."):
        group = 1 + int(name.split(".")[2])
    elif name.startswith("encoder.") and not name.startswith("encoder.norm."):
        group = 0
    return float(layer_decay ** (depth + 1 - group))


def check_classifier(num_classes: int, pool: str, frozen: bool, drop_path: float, norm: str) -> None:
    """Raise TypeError or ValueError unless the options of a classifier are in range and fit together."""
    positive_integers("num_classes", (num_classes,))
    check_flag("frozen", frozen)
    check_fraction("drop_path", drop_path)
    for name, value, known in (("pool", pool, POOLS), ("norm", norm, get_args(Norm))):
        if value not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
    if frozen and drop_path:
        raise ValueError(f"drop_path: expected 0 for a frozen encoder, got {drop_path}")
    if norm == "batch" and not frozen:
        raise ValueError("norm: expected 'layer' for an encoder that is not frozen, got 'batch'")


def check_optimizer(
    optimizer: str, frozen: bool, layer_decay: float, momentum: float, trust: float, ema_decay: float | None
) -> None:
    """Raise ValueError unless the options of a classifier's optimiser are in range and fit together."""
    if optimizer not in get_args(Optimizer):
        raise ValueError(f"optimizer: expected 'adamw' or 'lars', got {optimizer!r}")
    if optimizer == "lars" and not frozen:
        raise ValueError("optimizer: expected 'adamw' for an encoder that is not frozen, got 'lars'")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a number in (0, 1], got {layer_decay}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    if not 0 < trust < float("inf"):
        raise ValueError(f"trust: expected a positive number, got {trust}")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay: expected a number in (0, 1) or None, got {ema_decay}")


def check_targets(targets: Any, batch: int, num_classes: int) -> None:
    """Raise TypeError or ValueError unless targets are float32 (batch, num_classes)."""
    if targets.dtype != np.float32:
        raise TypeError(f"targets: expected float32, got {targets.dtype}")
    if tuple(targets.shape) != (batch, num_classes):
        raise ValueError(f"targets: expected shape {(batch, num_classes)}, got {tuple(targets.shape)}")

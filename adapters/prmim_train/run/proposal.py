"""Rules for small data sets.

They detect options that do not suit the number of images, and propose others.
"""

from collections.abc import Iterator
from math import ceil, sqrt
from typing import Any

from prmim_methods.messages import counted
from prmim_methods.sizes import VIT_SIZES, Transformer
from prmim_train.config.pretrain import PretrainConfig, change
from prmim_train.run.budget import Budget

__all__ = ["LEAST_IMAGES", "doubts", "propose"]

STEPS_PER_EPOCH = 64
"""Steps per epoch that a proposal aims at; ImageNet in batches of 4,096 has 313."""
SMALLEST_BATCH = 32
"""Smallest proposed batch, unless there are fewer images."""
FEWEST_WARMUP_STEPS = 20
"""Steps of warm-up below which there is a warning: the averaging window of AdamW's squared gradients with beta 0.95."""
FEWEST_STEPS = 1_000
"""Steps of a run below which there is a warning."""
PROPOSED_STEPS = 10_000
"""Steps that a proposal aims at; a third of 100 epochs of ImageNet in batches of 4,096."""
MOST_EPOCHS = 1_600
"""Maximum number of proposed epochs: that of MAE's longest run."""
MOST_PARAMETERS = 500
"""Maximum number of encoder parameters per training image: ViT-H on ImageNet, the largest ratio in MAE."""
LEAST_IMAGES = ceil(min(size.parameters() for size in VIT_SIZES.values()) / MOST_PARAMETERS)
"""Number of images below which even the smallest named model exceeds that ratio."""
SIGNIFICANT = 2
"""Significant digits of a proposed learning rate."""


def doubts(config: PretrainConfig, budget: Budget) -> list[str]:
    """Describe the options that do not suit the number of images.

    One sentence for each; empty if all suit.

    Parameters
    ----------
    config
        Options of the run.
    budget
        Its length.

    Examples
    --------
    >>> from prmim_train.run.budget import training_budget
    >>> config = PretrainConfig()  # for ImageNet
    >>> doubts(config, training_budget(config, 1_281_167))
    []
    >>> doubts(config, training_budget(config, 11))[0]
    'a batch of 4,096 shows each of the 11 training images 372 times; an epoch is shorter than a batch'
    """
    return list(_doubts(config, budget))


def _doubts(config: PretrainConfig, budget: Budget) -> Iterator[str]:
    images, batch = budget.num_images, config.batch_size
    if images < batch:
        yield (
            f"a batch of {batch:,} shows each of the {images:,} training images {batch / images:.3g} times; an epoch "
            "is shorter than a batch"
        )
    if budget.total_steps < FEWEST_STEPS:
        yield f"the run takes {counted(budget.total_steps, 'step')} in all; published runs take tens of thousands"
    if config.warmup > 0 and budget.warmup_steps < FEWEST_WARMUP_STEPS:
        yield (
            f"the warm-up takes {counted(budget.warmup_steps, 'step')}; below {FEWEST_WARMUP_STEPS}, AdamW takes full "
            "steps before it has averaged gradients"
        )
    size = config.method.encoder_size
    if _is_too_large(size, images) and _smaller(size):
        yield (
            f"the encoder has {size.parameters() / images:,.0f} parameters per training image; published runs have at "
            f"most {MOST_PARAMETERS}"
        )


def propose(config: PretrainConfig, budget: Budget) -> dict[str, Any]:
    """Propose options that suit the number of images; empty without `doubts`.

    Parameters
    ----------
    config
        Options of the run.
    budget
        Its length.

    Returns
    -------
    dict
        Options by name, only those that change: `model` with its decoder, `batch_size`, the learning rates, `epochs`,
        and `accumulate`.

    Notes
    -----
    With n training images:

    - batch: the largest power of two up to n / 64, at least 32 (or all images if there are fewer), at most the given
      one;
    - learning rates: times the square root of the change of the batch, the rule for Adam (Malladi et al., arXiv
      2205.10287), not the linear rule of the option `base_learning_rate`;
    - epochs: at least those that make 10,000 steps, but at most 1,600, and not fewer than given;
    - model: the largest named one whose encoder has at most 500 parameters per image, or the smallest one. The
      number of decoder heads shrinks with the encoder's width; the width of a head stays. A decoder whose width
      would then not be allowed, custom models, and students of a teacher keep their size.

    Examples
    --------
    >>> from prmim_train.run.budget import training_budget
    >>> config = PretrainConfig()  # for ImageNet
    >>> propose(config, training_budget(config, 900))["batch_size"]
    32
    """
    if not doubts(config, budget):
        return {}
    images = budget.num_images
    batch = min(config.batch_size, max(_power(images / STEPS_PER_EPOCH), min(SMALLEST_BATCH, _power(images))))
    found: dict[str, Any] = {**_smaller_model(config, images), "batch_size": batch}
    if batch % config.accumulate:
        found["accumulate"] = 1
    root = sqrt(config.batch_size / batch)
    found["base_learning_rate"] = _rounded(config.base_learning_rate * root)
    if root > 1:
        found |= {
            name: _rounded(getattr(config, name) / root) for name in ("min_learning_rate", "warmup_learning_rate")
        }
    found["epochs"] = max(config.epochs, min(MOST_EPOCHS, ceil(PROPOSED_STEPS * batch / images)))
    given = config.flat()
    found = {name: value for name, value in found.items() if value != given[name]}
    change(config, **found)  # raises what is wrong with it
    return found


def _smaller_model(config: PretrainConfig, images: int) -> dict[str, Any]:
    """Return the options of the largest suitable named model, with its decoder.

    Empty if it is already given.
    """
    method, given = config.method, config.flat()
    size = method.encoder_size
    is_own = any(given[name] is not None for name in ("embed_dim", "depth", "num_heads"))
    smaller = _smaller(size)
    if is_own or "teacher" in given or not smaller or not _is_too_large(size, images):
        return {}
    fitting = [name for name in smaller if not _is_too_large(VIT_SIZES[name], images)]
    model = fitting[0] if fitting else smaller[-1]
    if "decoder_heads" not in given:
        return {"model": model}
    heads = max(1, round(given["decoder_heads"] * VIT_SIZES[model].dim / size.dim))
    width = given["decoder_dim"] // given["decoder_heads"]
    found = {"model": model, "decoder_dim": heads * width, "decoder_heads": heads}
    try:
        change(config, **found)
    except ValueError:  # images of three axes, for example, need a multiple of 6
        return {"model": model}
    return found


def _smaller(size: Transformer) -> list[str]:
    """Return the names of the smaller models, the largest first."""
    named = sorted(VIT_SIZES, key=lambda name: -VIT_SIZES[name].parameters())
    return [name for name in named if VIT_SIZES[name].parameters() < size.parameters()]


def _is_too_large(size: Transformer, images: int) -> bool:
    return size.parameters() > MOST_PARAMETERS * images


def _rounded(rate: float) -> float:
    return float(f"{rate:.{SIGNIFICANT}g}")


def _power(number: float) -> int:
    """Return the largest power of two up to a number, at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)

"""The options that every method of every adapter shares, checked once."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import get_args

from prmim_core.cost import Variant
from prmim_core.counts import TokenCounts, count_tokens
from prmim_core.grid import Grid
from prmim_core.schedule import Schedule

THROWING = ("furthest", "random", "cell", "none")
"""Rules for what is thrown, of those that need nothing but noise."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def positive_integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return values that are all positive integers as a tuple; ``name`` names the option in errors."""
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise TypeError(f"{name}: expected integers, got {values!r}")
    if not all(value > 0 for value in values):
        raise ValueError(f"{name}: expected positive integers, got {values!r}")
    return tuple(values)


def check_counts(grid: Grid, mask_ratio: float | None, throw_ratio: float, throwing: str) -> TokenCounts:
    """Return the counts of a method: at least one visible and one masked token, none thrown that is not masked."""
    if throwing not in THROWING:
        raise ValueError(f"throwing: expected one of {', '.join(THROWING)}, got {throwing!r}")
    mask_ratio = 0.75 if mask_ratio is None else mask_ratio
    throw_ratio = 0.0 if throwing == "none" else throw_ratio
    counts = count_tokens(grid.num_tokens, mask_ratio, throw_ratio)  # checks types and [0, 1]
    for name, ratio in (("mask_ratio", mask_ratio), ("throw_ratio", throw_ratio)):
        if ratio >= 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {ratio}")
    # As the decimals that are written: 0.3 and 3 * 0.1 name different ones.
    if Fraction(str(throw_ratio)) > Fraction(str(mask_ratio)):
        raise ValueError(f"throw_ratio: expected at most mask_ratio {mask_ratio}, got {throw_ratio}")
    if counts.visible == 0:
        raise ValueError(
            f"mask_ratio: expected a ratio that leaves a visible token of {grid.num_tokens}, got {mask_ratio}"
        )
    if counts.masked == 0:
        raise ValueError(f"mask_ratio: expected a ratio that masks a token of {grid.num_tokens}, got {mask_ratio}")
    return counts


def check_schedule(grid: Grid, counts: TokenCounts, stages: int, throwing: str, seed: str) -> Schedule:
    """Return the schedule of a method; ``throwing="none"`` throws nothing."""
    if throwing == "none":
        throwing = "random"
    schedule = Schedule(grid, counts, stages=stages, throwing=throwing, seed=seed)  # type: ignore[arg-type]  # checked
    if counts.thrown == 0:
        # All masked tokens are decoded, so their order changes nothing: take the cheapest one.
        return replace(schedule, throwing="random", seed="visible")
    return schedule


def check_variant(variant: str, counts: TokenCounts) -> str:
    """Return the variant in effect: ``"none"`` where nothing is thrown."""
    allowed = get_args(Variant)
    if variant not in allowed:
        raise ValueError(f"variant: expected one of {', '.join(allowed)}, got {variant!r}")
    return variant if counts.thrown else "none"


def check_thrown_weight(thrown_weight: float, counts: TokenCounts, variant: str) -> float:
    """Return the weight of thrown tokens in the loss, of which at least one token must be left."""
    if isinstance(thrown_weight, bool) or not isinstance(thrown_weight, int | float):
        raise TypeError(f"thrown_weight: expected a number, got {thrown_weight!r}")
    if not 0 <= thrown_weight < float("inf"):
        raise ValueError(f"thrown_weight: expected a number of at least 0, got {thrown_weight}")
    if counts.decoded == 0 and (variant == "none" or thrown_weight == 0):
        raise ValueError(
            f"throw_ratio: expected at least one supervised token, got none ({counts}, variant {variant!r}, "
            f"thrown_weight {thrown_weight})"
        )
    return float(thrown_weight)


def pixel_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: those given, ImageNet's for three channels, or 0.5."""
    imagenet = channels == 3
    mean = (IMAGENET_MEAN if imagenet else (0.5,) * channels) if mean is None else mean
    std = (IMAGENET_STD if imagenet else (0.5,) * channels) if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one per channel, got {values!r}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std: expected positive numbers, got {std!r}")
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)

"""The options that every method of every adapter shares, checked once."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
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


def check_unit(name: str, unit: int | Sequence[int], grid: Grid) -> tuple[int, ...]:
    """Return tokens along each axis of what is masked as a whole: one size for all axes, or one for each."""
    sizes = positive_integers(name, (unit,) * grid.axes if isinstance(unit, int) else unit)
    if len(sizes) != grid.axes or any(n % size for n, size in zip(grid.shape, sizes, strict=True)):
        raise ValueError(f"{name}: expected a divisor of the grid {'x'.join(map(str, grid.shape))}, got {unit}")
    return sizes


def check_counts(
    grid: Grid,
    mask_ratio: float | None,
    throw_ratio: float | None,
    throwing: str,
    *,
    default: tuple[float, float | None] = (0.75, 0.5),
    mask_unit: Sequence[int] | None = None,
    throw_unit: Sequence[int] | None = None,
) -> TokenCounts:
    """Return the counts of a method: at least one visible and one masked token, none thrown that is not masked.

    Parameters
    ----------
    grid
        The grid of the tokens.
    mask_ratio, throw_ratio
        Fractions of all tokens; None: those of the method.
    throwing
        One of :data:`THROWING`; ``"none"`` throws nothing, whatever the ratio.
    default
        The ratios of the method: MAE's. A throw ratio of None is for a method that decodes nothing: all masked tokens
        are thrown, ``throw_ratio`` must be None and ``throwing`` chooses nothing.
    mask_unit, throw_unit
        Tokens along each axis of what is masked or thrown as a whole; None: single tokens.

    Raises
    ------
    TypeError
        If a ratio is not a number.
    ValueError
        If an option is out of range or the ratios do not fit together.

    Examples
    --------
    >>> check_counts(Grid((14, 14)), None, None, "furthest")
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> check_counts(Grid((14, 14)), None, None, "furthest", default=(0.6, 0.25), mask_unit=(2, 2))
    TokenCounts(visible=76, decoded=71, thrown=49)
    >>> check_counts(Grid((14, 14)), None, None, "none", default=(0.7, None))
    TokenCounts(visible=58, decoded=0, thrown=138)
    """
    if throwing not in THROWING:
        raise ValueError(f"throwing: expected one of {', '.join(THROWING)}, got {throwing!r}")
    mask_ratio = default[0] if mask_ratio is None else mask_ratio
    if default[1] is None:
        if throw_ratio is not None:
            raise ValueError(f"throw_ratio: expected None, since all masked tokens are thrown, got {throw_ratio!r}")
        throw_ratio = mask_ratio
    elif throwing == "none":
        throw_ratio = 0.0
    elif throw_ratio is None:
        throw_ratio = default[1]
    # Checks types and [0, 1].
    counts = count_tokens(
        grid.num_tokens,
        mask_ratio,
        1 if default[1] is None else throw_ratio,  # 1 throws all that is masked, however it was rounded
        mask_unit=prod(mask_unit or ()),
        throw_unit=prod(throw_unit or ()),
    )
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


def check_schedule(
    grid: Grid, counts: TokenCounts, stages: int, throwing: str, seed: str, *, unit: Sequence[int] | None = None
) -> Schedule:
    """Return the schedule of a method; ``unit``: what is thrown as a whole, in tokens along each axis."""
    schedule = Schedule(
        grid,
        counts,
        stages=stages,
        throwing="random" if throwing == "none" else throwing,  # type: ignore[arg-type]  # checked there
        seed=seed,  # type: ignore[arg-type]
        unit=None if unit is None else tuple(unit),
    )
    if counts.thrown == 0 or counts.decoded == 0:
        # Nothing is chosen among the masked tokens, so take the cheapest way to do that.
        return replace(schedule, throwing="random", seed="visible", unit=None)
    return schedule


def check_variant(variant: str, counts: TokenCounts) -> str:
    """Return the variant in effect: ``"none"`` where nothing is thrown."""
    allowed = get_args(Variant)
    if variant not in allowed:
        raise ValueError(f"variant: expected one of {', '.join(allowed)}, got {variant!r}")
    return variant if counts.thrown else "none"


def check_thrown_weight(
    thrown_weight: float, counts: TokenCounts, variant: str, *, visible_supervised: bool = False
) -> float:
    """Return the weight of thrown tokens in the loss, of which at least one token must be left.

    ``visible_supervised``: whether visible tokens are part of the loss, as in MaskAlign.
    """
    if isinstance(thrown_weight, bool) or not isinstance(thrown_weight, int | float):
        raise TypeError(f"thrown_weight: expected a number, got {thrown_weight!r}")
    if not 0 <= thrown_weight < float("inf"):
        raise ValueError(f"thrown_weight: expected a number of at least 0, got {thrown_weight}")
    if not visible_supervised and counts.decoded == 0 and (variant == "none" or thrown_weight == 0):
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


def check_flag(name: str, value: bool) -> bool:
    """Return a value that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Return a number in [0, 1) as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return float(value)

"""Conversion of ratios to token counts."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from numbers import Rational, Real
from typing import Literal

from prmim_core._checks import check_choice, check_integer, shown

Rounding = Literal["mae", "amt", "mae_float", "simmim_float", "amt_float"]


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of visible, decoded and thrown tokens per image.

    Parameters
    ----------
    visible
        V, a non-negative integer.
    decoded
        M, likewise.
    thrown
        T, likewise. V + M + T = N.

    Examples
    --------
    >>> TokenCounts(49, 49, 98).num_tokens
    196
    >>> TokenCounts(49, 49, 98).masked
    147
    """

    visible: int
    decoded: int
    thrown: int

    def __post_init__(self) -> None:
        for name in ("visible", "decoded", "thrown"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 0))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, N."""
        return self.visible + self.decoded + self.thrown

    @property
    def masked(self) -> int:
        """Number of masked tokens, M + T."""
        return self.decoded + self.thrown


def count_tokens(
    num_tokens: int,
    mask_ratio: float | Fraction,
    throw_ratio: float | Fraction = 0.0,
    rounding: Rounding = "mae",
    *,
    mask_unit: int = 1,
    throw_unit: int = 1,
) -> TokenCounts:
    """Convert ratios to token counts.

    Parameters
    ----------
    num_tokens
        N, tokens per image.
    mask_ratio
        Masked fraction of all tokens, in [0, 1].
    throw_ratio
        Thrown fraction of **all** tokens, in [0, 1]. Only masked tokens are thrown, so 1 means that none are decoded.
    rounding
        ``"mae"`` rounds the visible count down, V = floor(N (1 - mask_ratio)), as in MAE, SimMIM and MaskAlign.
        ``"amt"`` rounds the masked count down, N - V = floor(N mask_ratio), as in AMT and VideoMAE. Both are exact.
        ``"mae_float"`` computes V = int(N * (1 - mask_ratio)) in floating point, as in the code of MAE and MaskAlign.
        ``"simmim_float"`` computes N - V = ceil(N * mask_ratio) in floating point, as in the code of SimMIM.
        ``"amt_float"`` computes N - V = int(N * mask_ratio) in floating point, as in the code of VideoMAE.
    mask_unit
        Number of tokens that are masked together; a divisor of ``num_tokens``. SimMIM's 2x2 units have 4.
    throw_unit
        Number of tokens that are thrown together; a divisor of ``mask_unit``.

    Returns
    -------
    TokenCounts
        V as above, T = min(floor(N throw_ratio), N - V), M = N - V - T. T is computed in the arithmetic of the rule.
        With units, the rules count units: V is a multiple of ``mask_unit``, T of ``throw_unit``.

    Raises
    ------
    TypeError
        If a count is not an integer or a ratio is not a number.
    ValueError
        If a count is not positive, a unit is not a divisor, a ratio lies outside [0, 1] or the rounding is unknown.

    Notes
    -----
    Exact arithmetic reads a ratio as its shortest decimal. 0.9 is 9/10, so 10 of 100 tokens are visible. In floating
    point, 1 - 0.9 is below 0.1, and 9 of 100 tokens are visible. The ``float`` rules reproduce these counts.

    Examples
    --------
    >>> count_tokens(196, 0.75, 0.5)
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> count_tokens(10, 0.9)
    TokenCounts(visible=1, decoded=9, thrown=0)
    >>> count_tokens(49, 0.6).masked, count_tokens(196, 0.45, rounding="amt").masked
    (30, 88)
    >>> count_tokens(100, 0.9).visible, count_tokens(100, 0.9, rounding="mae_float").visible
    (10, 9)
    >>> count_tokens(196, 0.6, 0.25, mask_unit=4)
    TokenCounts(visible=76, decoded=71, thrown=49)
    >>> count_tokens(196, 0.6, 0.25, mask_unit=4, throw_unit=4)
    TokenCounts(visible=76, decoded=72, thrown=48)
    """
    num_tokens = check_integer("num_tokens", num_tokens, 1)
    mask_unit = check_integer("mask_unit", mask_unit, 1)
    throw_unit = check_integer("throw_unit", throw_unit, 1)
    if num_tokens % mask_unit:
        raise ValueError(f"mask_unit: expected a divisor of the {num_tokens} tokens, got {mask_unit}")
    if mask_unit % throw_unit:
        raise ValueError(f"throw_unit: expected a divisor of mask_unit {mask_unit}, got {throw_unit}")
    check_choice("rounding", rounding, Rounding)
    number = float if rounding.endswith("_float") else Fraction
    masked_part = number(_exact_ratio("mask_ratio", mask_ratio))
    thrown_part = number(_exact_ratio("throw_ratio", throw_ratio))
    units = num_tokens // mask_unit
    if rounding in ("amt", "amt_float"):
        visible = mask_unit * (units - floor(units * masked_part))
    elif rounding == "simmim_float":
        visible = mask_unit * (units - ceil(units * masked_part))
    else:
        visible = mask_unit * floor(units * (1 - masked_part))
    thrown = min(throw_unit * floor(num_tokens // throw_unit * thrown_part), num_tokens - visible)
    return TokenCounts(visible, num_tokens - visible - thrown, thrown)


def _exact_ratio(name: str, ratio: float | Fraction) -> Fraction:
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"{name}: expected a number in [0, 1], got {shown(ratio)}")
    if not 0 <= ratio <= 1:  # NaN fails this too
        raise ValueError(f"{name}: expected a number in [0, 1], got {ratio}")
    return Fraction(ratio) if isinstance(ratio, Rational) else Fraction(str(ratio))

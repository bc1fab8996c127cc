"""Ratios become integers here and nowhere else."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from numbers import Rational, Real
from typing import Literal

Rounding = Literal["mae", "amt"]


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens of an image are visible, decoded and thrown.

    Parameters
    ----------
    visible, decoded, thrown
        V, M and T: integers, not negative. V + M + T = N.

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
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"{name}: expected an integer, got {count!r}")
            if count < 0:
                raise ValueError(f"{name}: expected a count of at least 0, got {count}")

    @property
    def num_tokens(self) -> int:
        """All tokens, N."""
        return self.visible + self.decoded + self.thrown

    @property
    def masked(self) -> int:
        """Tokens that the encoder does not see, M + T."""
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
    """Turn ratios into counts.

    Parameters
    ----------
    num_tokens
        N, tokens per image.
    mask_ratio
        Fraction of all tokens that is masked, in [0, 1].
    throw_ratio
        Fraction of **all** tokens that is thrown, in [0, 1]; at most all that are masked are thrown, so 1 means
        "decode nothing".
    rounding
        Which count is rounded down: ``"mae"`` the visible one, V = floor(N (1 - mask_ratio)), as in MAE, MaskAlign and
        SimMIM (which rounds the masked one up: the same); ``"amt"`` the masked one, floor(N mask_ratio), as in AMT.
    mask_unit
        Tokens that are masked as a whole; must divide ``num_tokens``. SimMIM masks units of 2x2 tokens, so 4.
    throw_unit
        Tokens that are thrown as a whole; must divide ``mask_unit``.

    Returns
    -------
    TokenCounts
        V as above, T = min(floor(N throw_ratio), N - V), and M the rest. With units, units are counted by these rules
        and then turned into tokens: V is a multiple of ``mask_unit``, T of ``throw_unit``.

    Raises
    ------
    TypeError
        If a number of tokens is not an integer or a ratio is not a number.
    ValueError
        If a number of tokens is not positive, a unit does not divide what it must, a ratio lies outside [0, 1] or the
        rule is not known.

    Notes
    -----
    A ratio is read as the decimal number that is written, so 0.7 is 7/10 exactly: 10 tokens at 0.9 leave one visible,
    where floating-point arithmetic leaves none.

    Examples
    --------
    >>> count_tokens(196, 0.75, 0.5)
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> count_tokens(10, 0.9)
    TokenCounts(visible=1, decoded=9, thrown=0)
    >>> count_tokens(49, 0.6).masked, count_tokens(196, 0.45, rounding="amt").masked
    (30, 88)
    >>> count_tokens(196, 0.6, 0.25, mask_unit=4)
    TokenCounts(visible=76, decoded=71, thrown=49)
    >>> count_tokens(196, 0.6, 0.25, mask_unit=4, throw_unit=4)
    TokenCounts(visible=76, decoded=72, thrown=48)
    """
    for name, number in (("num_tokens", num_tokens), ("mask_unit", mask_unit), ("throw_unit", throw_unit)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an integer, got {number!r}")
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if num_tokens % mask_unit:
        raise ValueError(f"mask_unit: expected a divisor of the {num_tokens} tokens, got {mask_unit}")
    if mask_unit % throw_unit:
        raise ValueError(f"throw_unit: expected a divisor of mask_unit {mask_unit}, got {throw_unit}")
    masked_part = _exact_ratio("mask_ratio", mask_ratio)
    thrown_part = _exact_ratio("throw_ratio", throw_ratio)
    units = num_tokens // mask_unit
    if rounding == "mae":
        visible = mask_unit * floor(units * (1 - masked_part))
    elif rounding == "amt":
        visible = mask_unit * (units - floor(units * masked_part))
    else:
        raise ValueError(f"rounding: expected 'mae' or 'amt', got {rounding!r}")
    thrown = min(throw_unit * floor(num_tokens // throw_unit * thrown_part), num_tokens - visible)
    return TokenCounts(visible, num_tokens - visible - thrown, thrown)


def _exact_ratio(name: str, ratio: float | Fraction) -> Fraction:
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"{name}: expected a number in [0, 1], got {ratio!r}")
    if not 0 <= ratio <= 1:  # NaN fails this too
        raise ValueError(f"{name}: expected a number in [0, 1], got {ratio}")
    # str() of a float is the shortest decimal that names it: the number which was written.
    return Fraction(ratio) if isinstance(ratio, Rational) else Fraction(str(ratio))

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
    num_tokens: int, mask_ratio: float | Fraction, throw_ratio: float | Fraction = 0.0, rounding: Rounding = "mae"
) -> TokenCounts:
    """Turn ratios into counts.

    Parameters
    ----------
    num_tokens
        N, tokens per image (or units of tokens, where whole units are masked).
    mask_ratio
        Fraction of all tokens that is masked, in [0, 1].
    throw_ratio
        Fraction of **all** tokens that is thrown, in [0, 1]; at most all that are masked are thrown, so 1 means
        "decode nothing".
    rounding
        Which count is rounded down: ``"mae"`` the visible one, V = floor(N (1 - mask_ratio)), as in MAE, MaskAlign and
        SimMIM (which rounds the masked one up: the same); ``"amt"`` the masked one, floor(N mask_ratio), as in AMT.

    Returns
    -------
    TokenCounts
        V as above, T = min(floor(N throw_ratio), N - V), and M the rest.

    Raises
    ------
    TypeError
        If ``num_tokens`` is not an integer or a ratio is not a number.
    ValueError
        If ``num_tokens`` is not positive, a ratio lies outside [0, 1] or the rule is not known.

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
    """
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
        raise TypeError(f"num_tokens: expected an integer, got {num_tokens!r}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
    masked_part = _exact_ratio("mask_ratio", mask_ratio)
    thrown_part = _exact_ratio("throw_ratio", throw_ratio)
    if rounding == "mae":
        visible = floor(num_tokens * (1 - masked_part))
    elif rounding == "amt":
        visible = num_tokens - floor(num_tokens * masked_part)
    else:
        raise ValueError(f"rounding: expected 'mae' or 'amt', got {rounding!r}")
    thrown = min(floor(num_tokens * thrown_part), num_tokens - visible)
    return TokenCounts(visible, num_tokens - visible - thrown, thrown)


def _exact_ratio(name: str, ratio: float | Fraction) -> Fraction:
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"{name}: expected a number in [0, 1], got {ratio!r}")
    if not 0 <= ratio <= 1:  # NaN fails this too
        raise ValueError(f"{name}: expected a number in [0, 1], got {ratio}")
    # str() of a float is the shortest decimal that names it: the number which was written.
    return Fraction(ratio) if isinstance(ratio, Rational) else Fraction(str(ratio))

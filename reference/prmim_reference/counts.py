"""Token counts: exact conversion of ratios to integers."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of visible, decoded and thrown tokens of an image."""

    visible: int
    decoded: int
    thrown: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens, N."""
        return self.visible + self.decoded + self.thrown

    @property
    def masked(self) -> int:
        """Number of masked tokens."""
        return self.decoded + self.thrown


def rounding_rule(rounding: str, float_rule: str, exact_rule: str = "mae") -> str:
    """Return the rule of `count_tokens` for a method's option ``rounding``.

    ``float_rule`` is the rule of the method's original code.

    Examples
    --------
    >>> rounding_rule("exact", "simmim_float"), rounding_rule("float", "simmim_float")
    ('mae', 'simmim_float')
    """
    if rounding not in ("exact", "float"):
        raise ValueError(f'rounding: expected "exact" or "float", got {rounding!r}')
    return float_rule if rounding == "float" else exact_rule


def count_tokens(
    num_tokens: int,
    mask_ratio: float,
    throw_ratio: float = 0.0,
    rounding: str = "mae",
    *,
    mask_unit: int = 1,
    throw_unit: int = 1,
) -> TokenCounts:
    """Convert ratios to token counts.

    A ratio is read as the decimal number that it prints as: 0.7 is exactly 7/10. The "float" rules use binary
    floating-point numbers instead.

    Parameters
    ----------
    num_tokens : int
        N, tokens per image.
    mask_ratio, throw_ratio : float
        Fractions of **all** tokens, in [0, 1].
    rounding : {"mae", "amt", "mae_float", "simmim_float", "amt_float"}
        "mae": the visible count is floor(N (1 - mask_ratio)). "amt": the masked count is floor(N mask_ratio).
        "mae_float": like "mae", in floating point. "simmim_float": the masked count is ceil(N mask_ratio), in floating
        point. "amt_float": like "amt", in floating point.
    mask_unit, throw_unit : int
        Numbers of tokens that are masked or thrown together. The rules above then count units instead of tokens.

    Returns
    -------
    TokenCounts
        The thrown count is floor(N throw_ratio), but at most the masked count. The decoded count is the rest.

    Raises
    ------
    ValueError
        If a ratio lies outside [0, 1], the rounding is unknown, the mask unit does not divide N or the throw unit does
        not divide the mask unit.

    Examples
    --------
    >>> count_tokens(196, 0.75, 0.5)
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> count_tokens(10, 0.9).visible, count_tokens(10, 0.9, rounding="mae_float").visible
    (1, 0)
    >>> count_tokens(196, 0.6, 0.25, mask_unit=4)  # 19 of 49 units are visible
    TokenCounts(visible=76, decoded=71, thrown=49)
    """
    for name, ratio in (("mask_ratio", mask_ratio), ("throw_ratio", throw_ratio)):
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {ratio}")
    if mask_unit < 1 or num_tokens % mask_unit != 0:
        raise ValueError(f"mask_unit: expected a divisor of {num_tokens}, got {mask_unit}")
    if throw_unit < 1 or mask_unit % throw_unit != 0:
        raise ValueError(f"throw_unit: expected a divisor of {mask_unit}, got {throw_unit}")
    units = num_tokens // mask_unit
    masked_fraction = Fraction(str(mask_ratio))
    thrown_units = math.floor(num_tokens // throw_unit * Fraction(str(throw_ratio)))
    if rounding == "mae":
        visible_units = math.floor(units * (1 - masked_fraction))
    elif rounding == "amt":
        visible_units = units - math.floor(units * masked_fraction)
    elif rounding == "mae_float":
        visible_units = int(units * (1 - float(mask_ratio)))
        thrown_units = int(num_tokens // throw_unit * float(throw_ratio))
    elif rounding == "simmim_float":
        visible_units = units - math.ceil(units * float(mask_ratio))
        thrown_units = int(num_tokens // throw_unit * float(throw_ratio))
    elif rounding == "amt_float":
        visible_units = units - int(units * float(mask_ratio))
        thrown_units = int(num_tokens // throw_unit * float(throw_ratio))
    else:
        rules = '"mae", "amt", "mae_float", "simmim_float" or "amt_float"'
        raise ValueError(f"rounding: expected {rules}, got {rounding!r}")
    visible = visible_units * mask_unit
    thrown = min(thrown_units * throw_unit, num_tokens - visible)
    return TokenCounts(visible=visible, decoded=num_tokens - visible - thrown, thrown=thrown)

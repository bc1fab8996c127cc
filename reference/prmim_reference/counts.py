"""How many tokens are visible, decoded and thrown: ratios become integers, exactly."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class TokenCounts:
    """The three counts of a plan; they add up to the number of tokens."""

    visible: int
    decoded: int
    thrown: int

    @property
    def num_tokens(self) -> int:
        """All tokens of an image."""
        return self.visible + self.decoded + self.thrown

    @property
    def masked(self) -> int:
        """Decoded and thrown tokens."""
        return self.decoded + self.thrown


def count_tokens(num_tokens: int, mask_ratio: float, throw_ratio: float = 0.0, rounding: str = "mae") -> TokenCounts:
    """Turn the two ratios into counts.

    A ratio is read as the decimal number that it prints as, so 0.7 is seven tenths and not the binary fraction next
    to it.

    Parameters
    ----------
    num_tokens : int
        N, the tokens of one image.
    mask_ratio, throw_ratio : float
        Fractions of **all** tokens, in [0, 1].
    rounding : {"mae", "amt"}
        "mae": the visible count is floor(N (1 - mask_ratio)). "amt": the masked count is floor(N mask_ratio).

    Returns
    -------
    TokenCounts
        thrown is floor(N throw_ratio), at most the masked tokens; decoded is the rest.

    Raises
    ------
    ValueError
        If a ratio lies outside [0, 1] or the rounding has no such name.

    Examples
    --------
    >>> count_tokens(196, 0.75, 0.5)
    TokenCounts(visible=49, decoded=49, thrown=98)
    >>> count_tokens(10, 0.9).visible  # floating point would give 0
    1
    """
    for name, ratio in (("mask_ratio", mask_ratio), ("throw_ratio", throw_ratio)):
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {ratio}")
    masked_fraction = Fraction(str(mask_ratio))
    thrown_fraction = Fraction(str(throw_ratio))
    if rounding == "mae":
        visible = math.floor(num_tokens * (1 - masked_fraction))
    elif rounding == "amt":
        visible = num_tokens - math.floor(num_tokens * masked_fraction)
    else:
        raise ValueError(f'rounding: expected "mae" or "amt", got {rounding!r}')
    thrown = min(math.floor(num_tokens * thrown_fraction), num_tokens - visible)
    return TokenCounts(visible=visible, decoded=num_tokens - visible - thrown, thrown=thrown)

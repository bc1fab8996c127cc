from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction

import pytest

from prmim_reference.counts import TokenCounts, count_tokens


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "throw_ratio", "rounding", "expected"),
    [
        (196, 0.75, 0.5, "mae", (49, 49, 98)),  # ViT-B/16 at 224
        (196, 0.75, 0.0, "mae", (49, 147, 0)),
        (256, 0.75, 0.5, "mae", (64, 64, 128)),  # ViT-H/14
        (196, 0.7, 0.0, "mae", (58, 138, 0)),  # MaskAlign: 58.8 visible
        (196, 0.6, 0.0, "mae", (78, 118, 0)),
        (196, 0.6, 0.0, "amt", (79, 117, 0)),
        (196, 0.45, 0.4, "amt", (108, 10, 78)),
        (49, 0.6, 0.0, "mae", (19, 30, 0)),  # SimMIM masks ceil(29.4) units
        (10, 0.9, 0.0, "mae", (1, 9, 0)),  # 1 - 0.9 is below 0.1 in binary
        (100, 0.29, 0.29, "amt", (71, 0, 29)),  # 100 * 0.29 is below 29 in binary
        (100, 0.29, 0.29, "mae_float", (71, 1, 28)),
        (100, 0.29, 0.29, "amt_float", (72, 0, 28)),
        (100, 0.9, 0.0, "mae_float", (9, 91, 0)),
        (10, 0.9, 0.0, "mae_float", (0, 10, 0)),
        (25, 0.28, 0.0, "simmim_float", (17, 8, 0)),  # 25 * 0.28 is above 7 in binary
        (49, 0.6, 0.0, "simmim_float", (19, 30, 0)),
        (196, 0.75, 1.0, "mae", (49, 0, 147)),  # no more than the masked can be thrown
        (196, 0.75, 0.9, "mae", (49, 0, 147)),
        (196, 0, 0.5, "mae", (196, 0, 0)),
        (196, 1, 0.5, "mae", (0, 98, 98)),
        (7, Fraction(1, 3), Fraction(1, 7), "mae", (4, 2, 1)),
    ],
)
def test_counts_by_hand(num_tokens, mask_ratio, throw_ratio, rounding, expected):
    counts = count_tokens(num_tokens, mask_ratio, throw_ratio, rounding)
    assert (counts.visible, counts.decoded, counts.thrown) == expected
    assert counts.num_tokens == num_tokens
    assert counts.masked == expected[1] + expected[2]


@pytest.mark.parametrize("num_tokens", [1, 9, 10, 49, 196, 1568])
def test_every_two_digit_ratio_agrees_with_decimal_arithmetic(num_tokens):
    for hundredths in range(101):
        ratio = Decimal(hundredths) / 100
        visible = int((num_tokens * (1 - ratio)).to_integral_value(ROUND_FLOOR))
        thrown = min(int((num_tokens * ratio).to_integral_value(ROUND_FLOOR)), num_tokens - visible)
        expected = TokenCounts(visible, num_tokens - visible - thrown, thrown)
        assert count_tokens(num_tokens, hundredths / 100, hundredths / 100) == expected


@pytest.mark.parametrize(
    ("num_tokens", "ratios", "units", "expected"),
    [
        (196, (0.6, 0.25), (4, 1), (76, 71, 49)),  # SimMIM: ceil(29.4) of 49 units masked
        (196, (0.6, 0.25), (4, 4), (76, 72, 48)),  # 12.25 units thrown
        (196, (0.6, 0.25), (4, 2), (76, 72, 48)),  # 24.5 pairs thrown
        (196, (0.6, 0.9), (4, 4), (76, 0, 120)),
        (12, (0.5, 0.5), (12, 4), (0, 8, 4)),
    ],
)
def test_units_by_hand(num_tokens, ratios, units, expected):
    counts = count_tokens(num_tokens, *ratios, mask_unit=units[0], throw_unit=units[1])
    assert (counts.visible, counts.decoded, counts.thrown) == expected


def test_amt_rounds_the_masked_units_down():
    # The released code of AMT takes ceil(49 * 0.44) = 22; the rule here is floor.
    assert count_tokens(196, 0.44, 0.0, "amt", mask_unit=4).masked == 21 * 4


@pytest.mark.parametrize(
    ("mask_unit", "throw_unit", "message"),
    [
        (5, 1, "mask_unit: expected a divisor of 196"),
        (0, 1, "mask_unit"),
        (4, 3, "throw_unit: .* of 4"),
        (4, 0, "throw_unit"),
    ],
)
def test_units_that_do_not_divide_are_refused(mask_unit, throw_unit, message):
    with pytest.raises(ValueError, match=message):
        count_tokens(196, 0.5, 0.5, mask_unit=mask_unit, throw_unit=throw_unit)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_ratios_outside_their_range_are_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio: expected a number in \[0, 1\]"):
        count_tokens(4, ratio)
    with pytest.raises(ValueError, match=r"throw_ratio: expected a number in \[0, 1\]"):
        count_tokens(4, 0.5, ratio)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding: expected"):
        count_tokens(4, 0.5, rounding="ceil")

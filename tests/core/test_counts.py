from fractions import Fraction
from math import ceil, floor
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import TokenCounts, count_tokens
from prmim_core.counts import Rounding

RATIOS = st.builds(lambda hundredths: hundredths / 1000, st.integers(0, 1000))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((196, 0.75, 0.5), (49, 49, 98)),
        ((256, 0.75, 0.5), (64, 64, 128)),
        ((196, 0.75), (49, 147, 0)),
        ((10, 0.9), (1, 9, 0)),  # floating point leaves none visible
        ((10, 0.7), (3, 7, 0)),
        ((10, 0.3, 0.3), (7, 0, 3)),
        ((49, 0.6), (19, 30, 0)),  # SimMIM: 30 of 49 units
        ((196, 0.0, 0.5), (196, 0, 0)),
        ((196, 1.0, 0.0), (0, 196, 0)),
        ((196, 1.0, 1.0), (0, 0, 196)),
        ((196, 0.75, 1.0), (49, 0, 147)),
        ((196, 1, 0), (0, 196, 0)),
        ((1, 0.5, 0.5), (0, 1, 0)),
        ((100, Fraction(1, 3), Fraction(1, 3)), (66, 1, 33)),
        ((196, np.float32(0.7), np.float64(0.1)), (58, 119, 19)),
    ],
)
def test_counts(arguments, expected):
    counts = count_tokens(*arguments)
    assert (counts.visible, counts.decoded, counts.thrown) == expected
    assert counts.masked == counts.decoded + counts.thrown
    assert counts.num_tokens == arguments[0]


def test_numpy_integers_are_integers():
    counts = count_tokens(np.int64(196), np.int64(1), 0.5, mask_unit=np.int32(4), throw_unit=np.uint8(2))
    assert repr(counts) == repr(count_tokens(196, 1, 0.5, mask_unit=4, throw_unit=2))
    assert repr(TokenCounts(np.int64(1), np.uint8(2), np.int16(3))) == repr(TokenCounts(1, 2, 3))


def test_rounding_rules_differ_where_they_should():
    assert count_tokens(196, 0.6).masked == 118
    assert count_tokens(196, 0.6, rounding="amt").masked == 117
    assert count_tokens(196, 0.75) == count_tokens(196, 0.75, rounding="amt")
    assert [count_tokens(100, 0.9, rounding=rule).visible for rule in get_args(Rounding)] == [10, 10, 9, 10, 10]
    assert [count_tokens(25, 0.28, rounding=rule).masked for rule in get_args(Rounding)] == [7, 7, 7, 8, 7]


@pytest.mark.parametrize("num_tokens", [1, 5, 10, 25, 49, 100, 196, 256, 1568])
def test_float_rules_are_the_formulas_in_python(num_tokens):
    for thousandths in range(1001):
        ratio = thousandths / 1000
        by_mae = count_tokens(num_tokens, ratio, ratio, "mae_float")
        assert by_mae.visible == int(num_tokens * (1 - ratio))
        by_simmim = count_tokens(num_tokens, ratio, ratio, "simmim_float")
        assert by_simmim.masked == ceil(num_tokens * ratio)
        by_amt = count_tokens(num_tokens, ratio, ratio, "amt_float")
        assert by_amt.masked == int(num_tokens * ratio)
        for counts in (by_mae, by_simmim, by_amt):
            assert counts.thrown == min(int(num_tokens * ratio), counts.masked)


@pytest.mark.parametrize("num_tokens", [49, 196, 256, 1568])
def test_the_arithmetic_does_not_matter_at_published_sizes(num_tokens):
    for hundredths in range(101):
        exact = count_tokens(num_tokens, hundredths / 100, hundredths / 100)
        for rule in ("mae_float", "simmim_float"):
            assert count_tokens(num_tokens, hundredths / 100, hundredths / 100, rule) == exact


@pytest.mark.parametrize(
    ("arguments", "units", "expected"),
    [
        ((196, 0.6, 0.25), {"mask_unit": 4}, (76, 71, 49)),  # SimMIM: 19 of 49 units are visible
        ((196, 0.6, 0.25), {"mask_unit": 4, "throw_unit": 4}, (76, 72, 48)),
        ((196, 0.6, 0.25), {"mask_unit": 4, "throw_unit": 2}, (76, 72, 48)),
        ((196, 0.6, 0.26), {"mask_unit": 4, "throw_unit": 2}, (76, 70, 50)),
        ((196, 0.6, 1.0), {"mask_unit": 4, "throw_unit": 4}, (76, 0, 120)),
        ((196, 0.44, 0.26, "amt"), {"mask_unit": 4}, (112, 34, 50)),  # 21 of 49 units are masked
        ((1568, 0.9, 0.5, "amt"), {"mask_unit": 8}, (160, 624, 784)),  # VideoMAE: 176 of 196 tubes are masked
        ((24, 0.5), {"mask_unit": 24}, (0, 24, 0)),
        ((24, 0.0, 0.5), {"mask_unit": 24}, (24, 0, 0)),
    ],
)
def test_units_are_counted_whole(arguments, units, expected):
    counts = count_tokens(*arguments, **units)
    assert (counts.visible, counts.decoded, counts.thrown) == expected


@given(
    throw_unit=st.integers(1, 9), factors=st.tuples(st.integers(1, 9), st.integers(1, 60)), mask=RATIOS, throw=RATIOS
)
@pytest.mark.parametrize("rounding", get_args(Rounding))
def test_units_match_the_reference(throw_unit, factors, mask, throw, rounding):
    mask_unit = throw_unit * factors[0]
    num_tokens = mask_unit * factors[1]
    counts = count_tokens(num_tokens, mask, throw, rounding, mask_unit=mask_unit, throw_unit=throw_unit)
    expected = reference.counts.count_tokens(
        num_tokens, mask, throw, rounding, mask_unit=mask_unit, throw_unit=throw_unit
    )
    assert (counts.visible, counts.decoded, counts.thrown) == (expected.visible, expected.decoded, expected.thrown)
    assert counts.num_tokens == num_tokens
    assert counts.visible == mask_unit * count_tokens(factors[1], mask, rounding=rounding).visible
    assert counts.thrown % throw_unit == 0


@given(num_tokens=st.integers(1, 5000), mask=RATIOS, throw=RATIOS, rounding=st.sampled_from(["mae", "amt"]))
def test_counts_are_exact(num_tokens, mask, throw, rounding):
    counts = count_tokens(num_tokens, mask, throw, rounding)
    exact_mask, exact_throw = (Fraction(round(ratio * 1000), 1000) for ratio in (mask, throw))
    masked = ceil(num_tokens * exact_mask) if rounding == "mae" else floor(num_tokens * exact_mask)
    assert counts.masked == masked
    assert counts.thrown == min(floor(num_tokens * exact_throw), masked)
    expected = reference.counts.count_tokens(num_tokens, mask, throw, rounding)
    assert (counts.visible, counts.decoded, counts.thrown) == (expected.visible, expected.decoded, expected.thrown)


@given(num_tokens=st.integers(1, 500), ratios=st.tuples(RATIOS, RATIOS), throw=RATIOS)
def test_more_masking_masks_more(num_tokens, ratios, throw):
    less, more = (count_tokens(num_tokens, ratio, throw) for ratio in sorted(ratios))
    assert less.visible >= more.visible
    assert less.thrown <= more.thrown
    less, more = (count_tokens(num_tokens, throw, ratio) for ratio in sorted(ratios))
    assert less.visible == more.visible
    assert less.thrown <= more.thrown


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((196, 1.5), ValueError, r"mask_ratio: expected a number in \[0, 1\], got 1.5"),
        ((196, -0.1), ValueError, r"mask_ratio: .* got -0.1"),
        ((196, float("nan")), ValueError, "mask_ratio: .* got nan"),
        ((196, 0.5, float("inf")), ValueError, "throw_ratio: .* got inf"),
        ((196, "0.5"), TypeError, r"mask_ratio: expected a number in \[0, 1\], got '0.5'"),
        ((196, 0.5, None), TypeError, "throw_ratio: .* got None"),
        ((196, True), TypeError, "mask_ratio: .* got True"),
        ((0, 0.5), ValueError, "num_tokens: expected at least 1, got 0"),
        ((196.0, 0.5), TypeError, "num_tokens: expected an integer, got 196.0"),
        ((True, 0.5), TypeError, "num_tokens: expected an integer, got True"),
        ((np.bool_(True), 0.5), TypeError, "num_tokens: expected an integer, got np.True_"),
        ((np.arange(1000), 0.5), TypeError, r"num_tokens: expected an integer, got array\(.{1,40}$"),
        (
            (196, 0.5, 0.5, "mean"),
            ValueError,
            "rounding: expected one of mae, amt, mae_float, simmim_float, amt_float, got 'mean'",
        ),
        (
            (196, 0.5, 0.5, None),
            ValueError,
            "rounding: expected one of mae, amt, mae_float, simmim_float, amt_float, got None",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        count_tokens(*arguments)


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        ({"mask_unit": 5}, ValueError, "mask_unit: expected a divisor of the 196 tokens, got 5"),
        ({"mask_unit": 0}, ValueError, "mask_unit: expected at least 1, got 0"),
        ({"mask_unit": 4.0}, TypeError, "mask_unit: expected an integer, got 4.0"),
        ({"throw_unit": 2}, ValueError, "throw_unit: expected a divisor of mask_unit 1, got 2"),
        ({"mask_unit": 4, "throw_unit": 8}, ValueError, "throw_unit: expected a divisor of mask_unit 4, got 8"),
        ({"mask_unit": 4, "throw_unit": -1}, ValueError, "throw_unit: expected at least 1, got -1"),
        ({"throw_unit": True}, TypeError, "throw_unit: expected an integer, got True"),
    ],
)
def test_units_are_checked(units, error, message):
    with pytest.raises(error, match=message):
        count_tokens(196, 0.6, 0.25, **units)


@pytest.mark.parametrize("name", ["visible", "decoded", "thrown"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "expected at least 0, got -1"),
        (1.0, TypeError, "expected an integer, got 1.0"),
        (True, TypeError, "expected an integer, got True"),
    ],
)
def test_counts_are_checked(name, value, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        TokenCounts(**{"visible": 1, "decoded": 1, "thrown": 1, name: value})

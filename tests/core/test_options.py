import numpy as np
import pytest

from prmim_core import Grid, Schedule, TokenCounts
from prmim_core.options import (
    IMAGENET_MEAN,
    check_counts,
    check_fraction,
    check_schedule,
    check_thrown_weight,
    check_unit,
    check_variant,
    pixel_statistics,
    positive_integers,
)

GRID = Grid((14, 14))
SIMMIM = {"default": (0.6, 0.25), "mask_unit": (2, 2)}
MASKALIGN = {"default": (0.7, None)}


@pytest.mark.parametrize(
    ("ratios", "throwing", "options", "expected"),
    [
        ((None, None), "furthest", {}, (49, 49, 98)),
        ((0.75, 0.5), "random", {}, (49, 49, 98)),
        ((0.5, None), "furthest", {}, (98, 0, 98)),
        ((None, 0.25), "cell", {}, (49, 98, 49)),
        ((None, None), "none", {}, (49, 147, 0)),
        ((None, 0.5), "none", {}, (49, 147, 0)),
        ((None, None), "furthest", SIMMIM, (76, 71, 49)),
        ((None, None), "furthest", {**SIMMIM, "throw_unit": (2, 2)}, (76, 72, 48)),
        ((0.5, 0.5), "furthest", SIMMIM, (96, 2, 98)),
        ((None, None), "none", {**SIMMIM, "throw_unit": (2, 2)}, (76, 120, 0)),
        ((None, None), "furthest", MASKALIGN, (58, 0, 138)),
        ((None, None), "none", MASKALIGN, (58, 0, 138)),
        ((0.5, None), "random", MASKALIGN, (98, 0, 98)),
    ],
)
def test_counts_of_methods(ratios, throwing, options, expected):
    assert check_counts(GRID, *ratios, throwing, **options) == TokenCounts(*expected)


@pytest.mark.parametrize(
    ("ratios", "throwing", "options", "error", "message"),
    [
        ((None, None), "weighted", {}, ValueError, "throwing: expected one of furthest, .*, none, got 'weighted'"),
        ((1.0, 0.5), "random", {}, ValueError, r"mask_ratio: expected a number in \[0, 1\), got 1.0"),
        ((1.0, None), "random", MASKALIGN, ValueError, r"mask_ratio: expected a number in \[0, 1\), got 1.0"),
        ((0.75, 1), "random", {}, ValueError, r"throw_ratio: expected a number in \[0, 1\), got 1"),
        ((0.5, 0.6), "random", {}, ValueError, "throw_ratio: expected at most mask_ratio 0.5, got 0.6"),
        ((0.2, None), "random", SIMMIM, ValueError, "throw_ratio: expected at most mask_ratio 0.2, got 0.25"),
        (("0.5", None), "random", {}, TypeError, r"mask_ratio: expected a number in \[0, 1\], got '0.5'"),
        ((0.0, 0.0), "random", {}, ValueError, "mask_ratio: expected a ratio that masks a token of 196, got 0.0"),
        ((0.0, None), "random", MASKALIGN, ValueError, "mask_ratio: expected a ratio that masks a token of 196"),
        ((0.99, 0.5), "random", SIMMIM, ValueError, "mask_ratio: .* leaves a visible token of 196, got 0.99"),
        ((None, 0.5), "random", MASKALIGN, ValueError, "throw_ratio: expected None, since all .* thrown, got 0.5"),
        ((None, 0.0), "none", MASKALIGN, ValueError, "throw_ratio: expected None, since all .* thrown, got 0.0"),
    ],
)
def test_ratios_are_checked(ratios, throwing, options, error, message):
    with pytest.raises(error, match=message):
        check_counts(GRID, *ratios, throwing, **options)


@pytest.mark.parametrize(
    ("unit", "grid", "expected"),
    [(2, GRID, (2, 2)), (1, Grid((3, 5)), (1, 1)), ((1, 2), Grid((3, 4)), (1, 2)), ([7, 2], GRID, (7, 2))],
)
def test_units_of_methods(unit, grid, expected):
    assert check_unit("mask_unit", unit, grid) == expected


@pytest.mark.parametrize(
    ("unit", "grid", "error", "message"),
    [
        (2, Grid((7, 7)), ValueError, "mask_unit: expected a divisor of the grid 7x7, got 2"),
        (2, Grid((4, 4, 5)), ValueError, "mask_unit: expected a divisor of the grid 4x4x5, got 2"),
        ((2,), GRID, ValueError, r"mask_unit: expected a divisor of the grid 14x14, got \(2,\)"),
        (0, GRID, ValueError, "mask_unit: expected positive integers"),
        (2.0, GRID, TypeError, "mask_unit: expected integers, got 2.0"),
        (True, GRID, TypeError, "mask_unit: expected integers"),
        ("22", GRID, TypeError, "mask_unit: expected integers, got '22'"),
    ],
)
def test_units_are_checked(unit, grid, error, message):
    with pytest.raises(error, match=message):
        check_unit("mask_unit", unit, grid)


def test_schedules_of_methods():
    counts = TokenCounts(76, 72, 48)
    schedule = check_schedule(GRID, counts, 3, "cell", "visible", unit=[2, 2])
    assert schedule == Schedule(GRID, counts, stages=3, throwing="cell", unit=(2, 2))
    assert check_schedule(GRID, counts, 3, "none", "visible").throwing == "random"


@pytest.mark.parametrize("counts", [TokenCounts(76, 120, 0), TokenCounts(76, 0, 120)], ids=str)
def test_where_nothing_is_chosen_the_choice_is_cheap(counts):
    schedule = check_schedule(GRID, counts, 2, "furthest", "none", unit=(2, 2))
    assert schedule == Schedule(GRID, counts, stages=2, throwing="random")


def test_schedules_are_checked_even_then():
    with pytest.raises(ValueError, match="seed: expected one of visible, none, got 'masked'"):
        check_schedule(GRID, TokenCounts(76, 120, 0), 2, "furthest", "masked")
    with pytest.raises(ValueError, match="unit: expected sizes that divide"):
        check_schedule(GRID, TokenCounts(76, 120, 0), 2, "furthest", "visible", unit=(3, 2))


@pytest.mark.parametrize(("thrown", "expected"), [(98, "conv"), (0, "none")])
def test_no_variant_where_nothing_is_thrown(thrown, expected):
    assert check_variant("conv", TokenCounts(49, 147 - thrown, thrown)) == expected
    with pytest.raises(ValueError, match="variant: expected one of kernel, interpolate, conv, none, got 'linear'"):
        check_variant("linear", TokenCounts(49, 147 - thrown, thrown))


def test_a_loss_needs_a_token():
    counts = TokenCounts(58, 0, 138)
    assert check_thrown_weight(2, counts, "kernel") == 2.0
    for variant, weight in (("kernel", 0), ("none", 1.0)):
        with pytest.raises(ValueError, match="throw_ratio: expected at least one supervised token, got none"):
            check_thrown_weight(weight, counts, variant)
        assert check_thrown_weight(weight, counts, variant, visible_supervised=True) == weight


@pytest.mark.parametrize(
    ("weight", "error"), [(-1, ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_thrown_weights_are_checked(weight, error):
    with pytest.raises(error, match=r"thrown_weight: expected a number.* got"):
        check_thrown_weight(weight, TokenCounts(49, 49, 98), "kernel")


@pytest.mark.parametrize(("value", "error"), [(1, ValueError), (-0.1, ValueError), ("0", TypeError), (True, TypeError)])
def test_fractions_are_checked(value, error):
    assert check_fraction("drop_path", 0) == 0.0
    with pytest.raises(error, match=r"drop_path: expected a number in \[0, 1\), got"):
        check_fraction("drop_path", value)


def test_pixel_statistics_of_images():
    assert pixel_statistics(None, None, 3)[0] == IMAGENET_MEAN
    assert pixel_statistics(None, None, 1) == ((0.5,), (0.5,))
    assert pixel_statistics([1, 2], [3, 4], 2) == ((1.0, 2.0), (3.0, 4.0))
    with pytest.raises(ValueError, match="mean: expected 3 numbers, one per channel"):
        pixel_statistics([0.5], None, 3)
    with pytest.raises(ValueError, match="std: expected positive numbers"):
        pixel_statistics(None, [1, 0, 1], 3)


@pytest.mark.parametrize(
    ("values", "error"), [((1, 0), ValueError), ((1, 2.0), TypeError), (3, TypeError), ((np.int64(2),), TypeError)]
)
def test_sizes_are_positive_integers(values, error):
    assert positive_integers("patch_size", [4, 2]) == (4, 2)
    with pytest.raises(error, match="patch_size: expected"):
        positive_integers("patch_size", values)

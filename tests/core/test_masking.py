import numpy as np
import pytest
from scipy import stats

import prmim_reference as reference
from prmim_core import (
    Grid,
    attention_weights,
    block_visible,
    count_tokens,
    counter_noise,
    random_visible,
    tube_visible,
    unattended_visible,
    weighted_decoded,
    weighted_visible,
)
from prmim_core._arrays import array_namespace, device_of
from prmim_core.masking import _unit_tokens

GRID = Grid((4, 6))
NOISE = counter_noise(0, 0, np.arange(3), GRID.num_tokens)
TIED = np.random.default_rng(0).integers(-3, 3, (3, GRID.num_tokens))
WEIGHTS = np.random.default_rng(1).random((3, GRID.num_tokens), dtype=np.float32)
WEIGHTS[:, :5] = 0


@pytest.mark.parametrize("num_visible", [0, 6, GRID.num_tokens])
@pytest.mark.parametrize("noise", [NOISE, TIED, NOISE / np.float32(2**31)], ids=["int32", "tied", "float32"])
def test_random_visible_matches_the_reference(library, noise, num_visible):
    expected = [reference.masking.random_visible(num_visible, row) for row in noise.tolist()]
    visible = library.run(lambda noise: random_visible(num_visible, noise), noise)
    library.assert_equal(visible, np.reshape(np.asarray(expected, dtype=int), (3, num_visible)), dtype="index")


BLOCKS = [
    (Grid((4, 6)), (2, 2), 0),
    (Grid((4, 6)), (2, 2), 2),
    (Grid((4, 6)), (2, 3), 4),
    (Grid((4, 6)), (4, 6), 1),
    (Grid((24,)), (4,), 2),
    (Grid((2, 4, 3)), (2, 2, 1), 3),
]


@pytest.mark.parametrize(("grid", "unit", "number"), BLOCKS, ids=str)
@pytest.mark.parametrize("noise", [NOISE, TIED], ids=["int32", "tied"])
def test_block_visible_matches_the_reference(library, grid, unit, number, noise):
    expected = [reference.masking.block_visible(grid.shape, unit, number, row) for row in noise.tolist()]
    visible = library.run(lambda noise: block_visible(grid, unit, number, noise), noise)
    expected = np.reshape(np.asarray(expected, dtype=int), (3, number * int(np.prod(unit))))
    library.assert_equal(visible, expected, dtype="index")


@pytest.mark.parametrize(("grid", "unit", "number"), BLOCKS, ids=str)
def test_tokens_of_units_match_the_reference(library, grid, unit, number):
    tokens = library.run(lambda like: _unit_tokens(array_namespace(like), grid, unit, device_of(like)), NOISE)
    library.assert_equal(tokens, reference.masking.unit_tokens(grid.shape, unit))


def test_units_of_one_token_are_plain_random_masking():
    np.testing.assert_array_equal(block_visible(GRID, (1, 1), 7, NOISE), random_visible(7, NOISE))


def test_simmim_masks_30_of_49_units():
    noise = counter_noise(0, 0, np.arange(2), 196)
    visible = block_visible(Grid((14, 14)), (2, 2), count_tokens(49, 0.6).visible, noise)
    assert visible.shape == (2, 19 * 4)
    is_visible = np.zeros((2, 196), dtype=bool)
    np.put_along_axis(is_visible, visible, True, axis=1)
    per_unit = is_visible.reshape(2, 7, 2, 7, 2).sum(axis=(2, 4))
    assert set(per_unit.ravel().tolist()) == {0, 4}


@pytest.mark.parametrize("num_visible", [0, 6, 24])
def test_weighted_visible_matches_the_reference(xp, num_visible):
    visible = xp.run(lambda noise, weights: weighted_visible(num_visible, noise, weights), NOISE, WEIGHTS)
    rows = zip(NOISE.tolist(), WEIGHTS.tolist(), strict=True)
    expected = [reference.masking.weighted_visible(num_visible, noise, weights) for noise, weights in rows]
    expected = np.reshape(np.asarray(expected, dtype=int), (3, num_visible))
    # Logarithms differ in their last bit between libraries: compare the times of arrival and not the arrivals.
    xp.assert_equal(visible, xp.to_numpy(visible), dtype="index")
    np.testing.assert_allclose(arrivals(xp.to_numpy(visible)), arrivals(expected), rtol=1e-5)
    assert all(np.unique(row).size == num_visible for row in xp.to_numpy(visible))


def arrivals(tokens):
    uniforms = np.asarray([[reference.noise.uniform(value) for value in row] for row in NOISE.tolist()])
    late = 17 * (WEIGHTS == 0)
    times = (late - np.log(uniforms)) / np.maximum(WEIGHTS, 2.0**-100)
    return np.take_along_axis(times, tokens, axis=1)


def test_weights_of_zero_come_last_and_negative_ones_count_as_zero():
    order = weighted_visible(24, NOISE, np.where(WEIGHTS == 0, -1, WEIGHTS))
    np.testing.assert_array_equal(order, weighted_visible(24, NOISE, WEIGHTS))
    assert [sorted(row) for row in order[:, -5:].tolist()] == [[0, 1, 2, 3, 4]] * 3


def test_the_smallest_weights_still_come_before_those_of_zero(xp):
    noise = np.zeros((1, 6), np.int32)  # of which the times of arrival are longest
    weights = np.asarray([[0.0, 2e-38, 1.0, 0.0, 2e-38, 0.0]], np.float32)
    drawn = xp.run(lambda noise, weights: weighted_visible(6, noise, weights), noise, weights)
    expected = reference.masking.weighted_visible(6, noise[0].tolist(), weights[0].tolist())
    xp.assert_equal(drawn, np.asarray([expected]), dtype="index")
    assert expected == [2, 1, 4, 0, 3, 5]


def test_tokens_of_weight_zero_are_drawn_uniformly():
    noise = counter_noise(0, 0, np.arange(20_000), 5)
    weights = np.broadcast_to(np.float32([0, 0, 1, 0, 0]), noise.shape)
    order = weighted_visible(5, noise, weights)
    assert (order[:, 0] == 2).all()
    for place in (1, 4):
        assert stats.chisquare(np.bincount(order[:, place], minlength=5)[[0, 1, 3, 4]]).pvalue > 1e-6


def test_scale_of_the_weights_does_not_matter():
    np.testing.assert_array_equal(weighted_visible(9, NOISE, WEIGHTS), weighted_visible(9, NOISE, WEIGHTS * 1024))


def test_draws_are_in_proportion_to_weights():
    weights = np.broadcast_to(np.float32([1, 2, 3, 4]), (20_000, 4))
    draws = weighted_visible(2, counter_noise(0, 0, np.arange(20_000), 4), weights)
    first = np.bincount(draws[:, 0], minlength=4)
    assert stats.chisquare(first, [2000, 4000, 6000, 8000]).pvalue > 1e-6
    second = np.bincount(draws[draws[:, 0] == 3, 1], minlength=4)
    assert second[3] == 0
    assert stats.chisquare(second[:3], second.sum() * np.asarray([1, 2, 3]) / 6).pvalue > 1e-6


UNEQUAL = 1 + np.random.default_rng(2).permutation(3 * GRID.num_tokens).reshape(3, -1) ** 2.0
"""Weights whose times of arrival lie far apart."""


@pytest.mark.parametrize(("unit", "number"), [((1, 1), 0), ((1, 1), 7), ((2, 2), 2), ((2, 3), 4)], ids=str)
def test_unattended_visible_matches_the_reference(library, unit, number):
    visible = library.run(lambda *given: unattended_visible(GRID, unit, number, *given), NOISE, UNEQUAL)
    rows = zip(NOISE.tolist(), UNEQUAL.tolist(), strict=True)
    expected = [reference.masking.unattended_visible(GRID.shape, unit, number, *row) for row in rows]
    expected = np.reshape(np.asarray(expected, dtype=int), (3, number * int(np.prod(unit))))
    library.assert_equal(visible, expected, dtype="index")


def test_one_draw_masks_throws_and_leaves_tokens_visible():
    drawn = weighted_visible(24, NOISE, UNEQUAL)
    visible = unattended_visible(GRID, (1, 1), 7, NOISE, UNEQUAL)
    np.testing.assert_array_equal(visible, drawn[:, :-8:-1])
    is_visible = np.zeros((3, 24), dtype=bool)
    np.put_along_axis(is_visible, visible, True, axis=1)
    np.testing.assert_array_equal(weighted_decoded(9, NOISE, is_visible, UNEQUAL), drawn[:, :9])


def test_attended_tokens_tend_to_be_masked_and_equal_weights_draw_evenly():
    noise = counter_noise(0, 0, np.arange(20_000), 4)
    shares = []
    for weights in ([1, 1, 1, 1], [1, 2, 3, 4]):
        visible = unattended_visible(Grid((4,)), (1,), 1, noise, np.broadcast_to(np.float32(weights), noise.shape))
        shares.append(np.bincount(visible[:, 0], minlength=4))
    assert stats.chisquare(shares[0]).pvalue > 1e-6
    assert sorted(shares[1], reverse=True) == shares[1].tolist()
    assert shares[1][0] > 3 * shares[1][3]


def test_attention_weights_match_the_reference(library):
    attention = np.random.default_rng(3).random((3, 4, 24), dtype=np.float32)
    attention[1, 2] = 0.25  # a head that attends to all patches alike
    expected = [reference.masking.attention_weights(heads) for heads in attention.astype(float).tolist()]
    found = library.run(attention_weights, attention)
    library.assert_close(found, np.float32(expected), rtol=1e-5, atol=1e-6, dtype="float32")


@pytest.mark.parametrize(
    ("shape", "num_visible"), [((2, 12), 0), ((2, 12), 6), ((2, 3, 4), 8), ((2, 3, 4), 24), ((24, 1), 24)], ids=str
)
def test_tube_visible_matches_the_reference(library, shape, num_visible):
    expected = [reference.masking.tube_visible(shape, num_visible, row) for row in NOISE.tolist()]
    visible = library.run(lambda noise: tube_visible(Grid(shape), num_visible, noise), NOISE)
    library.assert_equal(visible, np.reshape(np.asarray(expected, dtype=int), (3, num_visible)), dtype="index")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_visible(3, NOISE[0]), ValueError, r"noise: expected shape \(batch, N\), got \(24,\)"),
        (lambda: random_visible(25, NOISE), ValueError, "num_visible: expected 0 to 24, got 25"),
        (lambda: random_visible(-1, NOISE), ValueError, "num_visible: expected 0 to 24, got -1"),
        (lambda: random_visible(1, [[1, 2]]), TypeError, "list"),
        (lambda: block_visible(GRID, (3, 2), 1, NOISE), ValueError, r"unit: .* divide the grid \(4, 6\), got \(3, 2\)"),
        (lambda: block_visible(GRID, (2,), 1, NOISE), ValueError, r"unit: .* got \(2,\)"),
        (lambda: block_visible(GRID, (0, 2), 1, NOISE), ValueError, r"unit: .* got \(0, 2\)"),
        (lambda: block_visible(GRID, (2, 2), 7, NOISE), ValueError, "num_visible_units: expected 0 to 6, got 7"),
        (lambda: block_visible(GRID, (2, 2), 1, NOISE[:, 1:]), ValueError, r"noise: .* \(batch, 24\), got \(3, 23\)"),
        (lambda: weighted_visible(3, NOISE, WEIGHTS[:1]), ValueError, r"weights: .* \(3, 24\), got \(1, 24\)"),
        (lambda: weighted_visible(25, NOISE, WEIGHTS), ValueError, "num_visible: expected 0 to 24, got 25"),
        (lambda: weighted_visible(3, NOISE.astype(int), WEIGHTS), TypeError, "noise: expected int32, got int64"),
        (lambda: unattended_visible(GRID, (5, 1), 1, NOISE, WEIGHTS), ValueError, r"unit: .* got \(5, 1\)"),
        (
            lambda: unattended_visible(GRID, (2, 2), 7, NOISE, WEIGHTS),
            ValueError,
            "num_visible_units: expected 0 to 6, got 7",
        ),
        (lambda: unattended_visible(GRID, (2, 2), 1, NOISE, WEIGHTS[:1]), ValueError, r"weights: .* got \(1, 24\)"),
        (lambda: attention_weights(NOISE[None]), TypeError, "attention: expected floats, got int32"),
        (
            lambda: attention_weights(WEIGHTS),
            ValueError,
            r"attention: expected shape \(batch, heads, N\), got \(3, 24\)",
        ),
        (lambda: tube_visible(Grid((24,)), 3, NOISE), ValueError, r"grid: expected a time axis .* got shape \(24,\)"),
        (lambda: tube_visible(Grid((2, 12)), 3, NOISE), ValueError, "num_visible: expected a multiple of the 2 time"),
        (lambda: tube_visible(Grid((2, 12)), 26, NOISE), ValueError, "num_visible: expected 0 to 24, got 26"),
        (lambda: tube_visible(Grid((2, 12)), 2, NOISE[:2, :5]), ValueError, "noise: expected shape"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

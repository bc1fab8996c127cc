from collections import Counter

import numpy as np
import pytest
from scipy import stats

from prmim_reference.masking import block_visible, random_visible, tube_visible, weighted_draw, weighted_visible
from prmim_reference.noise import counter_noise, uniform


@pytest.mark.parametrize("num_visible", [0, 1, 49, 196])
def test_random_visible_is_the_start_of_the_sorted_noise(num_visible):
    noise = counter_noise(0, 0, 0, 196)
    assert random_visible(num_visible, noise) == np.argsort(noise, kind="stable")[:num_visible].tolist()


def test_random_visible_keeps_raster_order_among_equals():
    assert random_visible(4, [1, 0, 1, 0, 1]) == [1, 3, 0, 2]


@pytest.mark.parametrize("num_visible", [-1, 5])
def test_random_visible_refuses_impossible_counts(num_visible):
    with pytest.raises(ValueError, match="num_visible: expected 0 to 4"):
        random_visible(num_visible, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("shape", "unit"), [((12,), (3,)), ((4, 6), (2, 2)), ((4, 6), (1, 3)), ((2, 4, 4), (2, 2, 2)), ((4, 4), (4, 4))]
)
def test_block_visible_agrees_with_slices_of_a_map(shape, unit):
    noise = np.array(counter_noise(1, 2, 3, int(np.prod(shape)))).reshape(shape)
    numbers = np.arange(noise.size).reshape(shape)
    units = [length // side for length, side in zip(shape, unit, strict=True)]
    corner = noise[tuple(slice(None, None, side) for side in unit)]
    num_visible_units = max(1, corner.size // 2)
    expected = []
    for number in np.argsort(corner.ravel(), kind="stable")[:num_visible_units]:
        start = np.unravel_index(number, units)
        box = tuple(slice(s * side, (s + 1) * side) for s, side in zip(start, unit, strict=True))
        expected.extend(numbers[box].ravel().tolist())
    assert block_visible(shape, unit, num_visible_units, noise.ravel().tolist()) == expected


def test_block_visible_refuses_units_that_do_not_divide_the_grid():
    for unit in ((2, 2), (2,)):
        with pytest.raises(ValueError, match="unit: expected divisors"):
            block_visible((4, 3), unit, 1, [0] * 12)


def test_weighted_draw_is_successive_sampling_without_replacement():
    weights = np.array([1.0, 2.0, 3.0, 6.0])
    draws = 6000
    counter = Counter(tuple(weighted_visible(2, counter_noise(0, 0, i, 4), weights.tolist())) for i in range(draws))
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    expected = [draws * weights[a] / 12 * weights[b] / (12 - weights[a]) for a, b in pairs]
    assert stats.chisquare([counter[pair] for pair in pairs], expected).pvalue > 1e-3


def test_weighted_draw_takes_tokens_without_weight_last():
    noise = counter_noise(0, 0, 0, 6)
    drawn = weighted_visible(6, noise, [0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert set(drawn[:3]) == {1, 3, 5}
    assert drawn[3:] == sorted([0, 2, 4], key=lambda token: -uniform(noise[token]))


def test_weighted_draw_does_not_depend_on_the_scale_of_the_weights():
    noise = counter_noise(0, 0, 5, 30)
    weights = np.random.default_rng(0).uniform(0.1, 1.0, 30)
    assert weighted_visible(20, noise, weights.tolist()) == weighted_visible(20, noise, (4 * weights).tolist())


def test_weighted_draw_looks_at_its_candidates_only():
    noise = counter_noise(0, 0, 5, 10)
    everything = weighted_visible(10, noise, [1.0] * 10)
    candidates = [8, 2, 5]
    assert weighted_draw(3, noise, [1.0] * 10, candidates) == [token for token in everything if token in candidates]
    with pytest.raises(ValueError, match="num_drawn: expected 0 to 3"):
        weighted_draw(4, noise, [1.0] * 10, candidates)


def test_tube_visible_repeats_the_first_frames_mask():
    noise = np.array(counter_noise(0, 0, 0, 4 * 9)).reshape(4, 9)
    in_frame = np.argsort(noise[0], kind="stable")[:3]
    expected = (np.arange(4)[:, None] * 9 + in_frame).ravel().tolist()
    assert tube_visible((4, 3, 3), 12, noise.ravel().tolist()) == expected


def test_tube_visible_refuses_counts_that_frames_cannot_share():
    with pytest.raises(ValueError, match="num_visible: expected a multiple of 4"):
        tube_visible((4, 3, 3), 13, [0] * 36)

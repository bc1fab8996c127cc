import numpy as np
import pytest

from prmim_reference.masking import random_visible
from prmim_reference.noise import counter_noise
from prmim_reference.throwing import (
    cell_decoded,
    cell_phase,
    choose_decoded,
    choose_decoded_units,
    furthest_decoded,
    random_decoded,
)

STRATEGIES = ["furthest", "random", "weighted", "cell"]


@pytest.mark.parametrize("throwing", STRATEGIES)
@pytest.mark.parametrize("shape", [(12,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_decoded_tokens_are_distinct_and_masked(throwing, shape, share):
    num_tokens = int(np.prod(shape))
    noise = counter_noise(0, 0, 0, num_tokens)
    visible = random_visible(num_tokens // 4, noise)
    num_decoded = int(share * (num_tokens - len(visible)))
    weights = np.random.default_rng(0).uniform(size=num_tokens).tolist()
    decoded = choose_decoded(throwing, shape, num_decoded, noise, visible, weights=weights)
    assert len(set(decoded)) == num_decoded
    assert not set(decoded) & set(visible)


def test_furthest_from_visible_or_from_nothing():
    noise = [0, 1, 2, 9, 3, 4, 5]
    assert furthest_decoded((7,), 2, noise, [0]) == [6, 3]  # 6 is furthest from 0; then the middle
    assert furthest_decoded((7,), 2, noise, [0], furthest_from="none") == [
        3,
        6,
    ]  # 3 has the highest noise; 6 is furthest from 3
    with pytest.raises(ValueError, match="furthest_from: expected"):
        furthest_decoded((7,), 2, noise, [0], furthest_from="masked")


def test_spacing_changes_what_is_furthest():
    noise = list(range(9))
    assert furthest_decoded((3, 3), 1, noise, [0, 8]) == [
        6
    ]  # corners 2 and 6 tie at distance 2; 6 has the higher noise
    assert furthest_decoded((3, 3), 1, noise, [0, 2, 6], spacing=(1, 1)) == [8]
    assert furthest_decoded((3, 3), 1, noise, [0, 2], spacing=(1, 9)) == [7]
    assert furthest_decoded((3, 3), 1, noise, [0, 2], spacing=(9, 1)) == [7]
    assert furthest_decoded((3, 3), 1, noise, [0, 6], spacing=(9, 1)) == [5]


def test_random_continues_the_order_of_the_visible():
    noise = counter_noise(0, 0, 0, 50)
    visible = random_visible(10, noise)
    assert visible + random_decoded(15, noise, visible) == np.argsort(noise).tolist()[:25]


def test_phases_of_a_clip():
    cell = np.array([[0, 1], [2, 3]])
    for offset in range(4):
        for time in range(5):
            expected = (np.tile(cell, (2, 3)) + time + offset) % 4
            found = [[cell_phase((time, row, column), offset) for column in range(6)] for row in range(4)]
            assert np.array_equal(found, expected)
    assert [cell_phase((i,), 3) for i in range(6)] == [3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("first_noise", [-5, 0, 3])
def test_cell_decodes_whole_phases_first(first_noise):
    noise = counter_noise(0, 0, 0, 36)
    noise[0] = first_noise
    decoded = cell_decoded((6, 6), 18, noise, visible=[])
    phases = [cell_phase(divmod(token, 6), first_noise % 4) for token in decoded]
    assert phases == [0] * 9 + [1] * 9
    for half in (decoded[:9], decoded[9:]):
        assert [noise[token] for token in half] == sorted(noise[token] for token in half)


def test_units_by_hand():
    # Units of two tokens, numbered 0 to 5; their noise is that of tokens 0, 2, 4, 6, 8, 10.
    noise = [3, 0, 9, 0, 1, 0, 5, 0, 7, 0, 2, 0]
    units = {"shape": (12,), "unit": (2,), "noise": noise, "visible": [0, 1], "num_decoded": 4}
    assert choose_decoded_units("furthest", **units) == [10, 11, 6, 7]  # unit 5; then 3 and 2 tie, and 3 has more noise
    assert choose_decoded_units("random", **units) == [4, 5, 10, 11]
    weights = [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2]  # of units: 3 and 5 weigh two each
    assert set(choose_decoded_units("weighted", **units, weights=weights)) == {6, 7, 10, 11}


@pytest.mark.parametrize("throwing", STRATEGIES)
def test_units_of_one_token_are_tokens(throwing):
    noise = counter_noise(0, 0, 0, 24)
    weights = np.random.default_rng(0).uniform(size=24).tolist()
    arguments = {"noise": noise, "visible": random_visible(6, noise), "num_decoded": 8, "weights": weights}
    spaced = {"spacing": (2, 1)}
    expected = choose_decoded(throwing, (4, 6), **arguments, **spaced)
    assert choose_decoded_units(throwing, (4, 6), (1, 1), **arguments, **spaced) == expected


@pytest.mark.parametrize("throwing", STRATEGIES)
def test_units_are_chosen_as_tokens_of_a_coarser_grid_are(throwing):
    # Noise that is constant over each unit; visible: the first unit.
    coarse = counter_noise(0, 0, 0, 6)
    fine = np.kron(np.reshape(coarse, (2, 3)), np.ones((2, 2), int)).ravel().tolist()
    number = np.kron(np.arange(6).reshape(2, 3), np.ones((2, 2), int)).ravel()
    weights = np.random.default_rng(0).integers(1, 9, 6)
    chosen = choose_decoded(throwing, (2, 3), 3, coarse, [0], spacing=(4, 2), weights=weights.tolist())
    tokens = choose_decoded_units(
        throwing,
        (4, 6),
        (2, 2),
        12,
        fine,
        np.flatnonzero(number == 0).tolist(),
        spacing=(2, 1),
        weights=(weights[number] / 4).tolist(),
    )
    assert tokens == [token for unit in chosen for token in np.flatnonzero(number == unit)]


def test_units_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="visible: expected whole units, got 1 tokens"):
        choose_decoded_units("random", (4,), (2,), 2, [0, 1, 2, 3], [0])
    with pytest.raises(ValueError, match="num_decoded: expected a multiple of the 2 tokens of a unit, got 1"):
        choose_decoded_units("random", (4,), (2,), 1, [0, 1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="unit: expected divisors"):
        choose_decoded_units("random", (4,), (3,), 3, [0, 1, 2, 3], [])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="throwing: expected"):
        choose_decoded("nearest", (4,), 1, [0, 1, 2, 3], [0])
    with pytest.raises(ValueError, match="weights: expected one weight per token"):
        choose_decoded("weighted", (4,), 1, [0, 1, 2, 3], [0])
    with pytest.raises(ValueError, match="num_decoded: expected 0 to 3"):
        choose_decoded("random", (4,), 4, [0, 1, 2, 3], [0])

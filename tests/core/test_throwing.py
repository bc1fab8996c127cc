import numpy as np
import pytest

import prmim_reference as reference
from prmim_core import (
    Grid,
    cell_decoded,
    counter_noise,
    furthest_decoded,
    is_member,
    random_decoded,
    random_visible,
    weighted_decoded,
)

GRIDS = [Grid((12,)), Grid((4, 6)), Grid((3, 4, 2), (4, 1, 1))]
CASES = [  # (visible, decoded) of 24 tokens; the 12 of the line take half
    (6, 6),
    (0, 10),
    (6, 18),
    (24, 0),
    (0, 0),
]


STRATEGIES = {
    "furthest from visible": furthest_decoded,
    "furthest from none": lambda *a: furthest_decoded(*a, furthest_from="none"),
    "random": lambda _, *a: random_decoded(*a),
    "cell": cell_decoded,
}


def masked_case(grid, visible):
    noise = counter_noise(3, 0, np.arange(3), grid.num_tokens)
    tokens = random_visible(visible, noise[:, ::-1])  # unrelated to the noise that decodes
    return noise, tokens, is_member(tokens, grid.num_tokens)


@pytest.mark.parametrize(("visible", "decoded"), CASES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_match_the_reference(grid, visible, decoded, name):
    throwing, _, furthest_from = name.partition(" from ")
    visible, decoded = visible * grid.num_tokens // 24, decoded * grid.num_tokens // 24
    noise, tokens, is_visible = masked_case(grid, visible)
    expected = [
        reference.throwing.choose_decoded(
            throwing, grid.shape, decoded, row, known, furthest_from=furthest_from or "visible", spacing=grid.spacing
        )
        for row, known in zip(noise.tolist(), tokens.tolist(), strict=True)
    ]
    actual = STRATEGIES[name](grid, decoded, noise, is_visible)
    np.testing.assert_array_equal(actual, np.reshape(expected, (3, decoded)))


def on_every_library(grid):
    noise, _, is_visible = masked_case(grid, 6 * grid.num_tokens // 24)
    weights = np.random.default_rng(0).integers(1, 99, noise.shape).astype(np.float32)
    return noise, is_visible, weights


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cells_are_equal_on_every_library(library, grid):
    noise, is_visible, _ = on_every_library(grid)
    expected = cell_decoded(grid, 4, noise, is_visible)
    library.assert_equal(library.run(lambda *a: cell_decoded(grid, 4, *a), noise, is_visible), expected, dtype="index")


def test_simple_strategies_are_equal_on_every_library(xp):
    noise, is_visible, weights = on_every_library(GRIDS[1])
    strategies = [
        lambda noise, is_visible, weights: furthest_decoded(GRIDS[1], 4, noise, is_visible),
        lambda noise, is_visible, weights: furthest_decoded(GRIDS[1], 4, noise, is_visible, furthest_from="none"),
        lambda noise, is_visible, weights: random_decoded(4, noise, is_visible),
        lambda noise, is_visible, weights: weighted_decoded(4, noise, is_visible, weights),
    ]
    results = xp.run(lambda *a: [strategy(*a) for strategy in strategies], noise, is_visible, weights)
    for strategy, result in zip(strategies, results, strict=True):
        xp.assert_equal(result, strategy(noise, is_visible, weights), dtype="index")


def test_weighted_draws_only_masked_tokens_even_of_weight_zero():
    noise, tokens, is_visible = masked_case(GRIDS[1], 6)
    # All weight on the visible: nothing else has any, and still 18 masked tokens can be drawn.
    drawn = weighted_decoded(18, noise, is_visible, is_visible.astype(np.float32))
    assert not (drawn[:, :, None] == tokens[:, None, :]).any()
    assert all(np.unique(row).size == 18 for row in drawn)


def test_cells_run_with_time():
    # One masked token more than a phase holds: the first phase is used up at every time, and moves on from one time
    # to the next, so that it comes to every place of the cell once in four.
    grid = Grid((4, 2, 2))
    noise = counter_noise(0, 0, np.arange(8), 16)
    decoded = cell_decoded(grid, 4, noise, np.zeros((8, 16), dtype=bool))
    assert (np.sort(decoded // 4, axis=1) == np.arange(4)).all()  # one at every time
    assert (np.sort(decoded % 4, axis=1) == np.arange(4)).all()  # one at every place
    assert np.unique(np.sort(decoded, axis=1), axis=0).shape[0] > 1  # and the offset is drawn


def test_cells_do_not_stretch_with_the_spacing():
    noise = counter_noise(0, 0, np.arange(3), 24)
    nobody = np.zeros((3, 24), dtype=bool)
    np.testing.assert_array_equal(
        cell_decoded(Grid((4, 6)), 9, noise, nobody), cell_decoded(Grid((4, 6), (5, 2)), 9, noise, nobody)
    )


NOISE = np.zeros((2, 4), dtype=np.int32)
NOBODY = np.zeros((2, 4), dtype=bool)
WEIGHTS = np.ones((2, 4))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, NOISE, NOBODY), ValueError, "num_decoded: expected 0 to 4, got 5"),
        ((-1, NOISE, NOBODY), ValueError, "num_decoded: expected 0 to 4, got -1"),
        ((1, NOISE[0], NOBODY), ValueError, r"noise: expected shape \(batch, .\), got \(4,\)"),
        ((1, NOISE, NOISE), TypeError, "is_visible: expected bool, got int32"),
        ((1, NOISE, NOBODY[:1]), ValueError, r"is_visible: .* shape of noise, \(2, 4\), got \(1, 4\)"),
    ],
)
def test_errors_name_the_argument(name, arguments, error, message):
    with pytest.raises(error, match=message):
        STRATEGIES[name](Grid((4,)), *arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: furthest_decoded(Grid((5,)), 1, NOISE, NOBODY), ValueError, r"noise: .* \(batch, 5\), got \(2, 4\)"),
        (lambda: cell_decoded(Grid((5,)), 1, NOISE, NOBODY), ValueError, r"noise: .* \(batch, 5\), got \(2, 4\)"),
        (lambda: cell_decoded(Grid((4,)), 1, NOISE / 2, NOBODY), TypeError, "noise: expected integers, got float64"),
        (
            lambda: furthest_decoded(Grid((4,)), 1, NOISE, NOBODY, furthest_from="edges"),
            ValueError,
            "furthest_from: expected one of visible, none, got 'edges'",
        ),
        (lambda: weighted_decoded(5, NOISE, NOBODY, WEIGHTS), ValueError, "num_decoded: expected 0 to 4, got 5"),
        (lambda: weighted_decoded(1, NOISE, NOBODY, WEIGHTS[:, :3]), ValueError, r"weights: .* got \(2, 3\)"),
        (lambda: weighted_decoded(1, NOISE / 2, NOBODY, WEIGHTS), TypeError, "noise: expected int32, got float64"),
    ],
)
def test_errors_of_single_strategies_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

import numpy as np
import pytest

import prmim_reference as reference
from prmim_core import Grid, counter_noise, is_member, random_visible
from prmim_core.throwing import cell_decoded, choose_decoded, furthest_decoded, random_decoded, weighted_decoded

GRIDS = [Grid((12,)), Grid((4, 6)), Grid((3, 4, 2), (4, 1, 1))]
CASES = [  # (visible, decoded) of 24 tokens; the 12 of the line take half
    (6, 6),
    (0, 10),
    (6, 18),
    (24, 0),
    (0, 0),
]


def masked_case(grid, visible):
    noise = counter_noise(3, 0, np.arange(3), grid.num_tokens)
    tokens = random_visible(noise[:, ::-1], visible)  # unrelated to the noise that decodes
    return noise, tokens, is_member(tokens, grid.num_tokens)


@pytest.mark.parametrize(("visible", "decoded"), CASES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("throwing", "seed"), [("furthest", "visible"), ("furthest", "none"), ("random", "visible"), ("cell", "visible")]
)
def test_strategies_match_the_reference(grid, visible, decoded, throwing, seed):
    visible, decoded = visible * grid.num_tokens // 24, decoded * grid.num_tokens // 24
    noise, tokens, is_visible = masked_case(grid, visible)
    expected = [
        reference.throwing.choose_decoded(throwing, grid.shape, row, known, decoded, seed=seed, spacing=grid.spacing)
        for row, known in zip(noise.tolist(), tokens.tolist(), strict=True)
    ]
    actual = choose_decoded(throwing, grid, noise, is_visible, decoded, seed=seed)
    np.testing.assert_array_equal(actual, np.reshape(expected, (3, decoded)))


def on_every_library(grid):
    noise, _, is_visible = masked_case(grid, 6 * grid.num_tokens // 24)
    weights = np.random.default_rng(0).integers(1, 99, noise.shape).astype(np.float32)
    return noise, is_visible, weights


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cells_are_equal_on_every_library(library, grid):
    noise, is_visible, _ = on_every_library(grid)
    expected = cell_decoded(grid, noise, is_visible, 4)
    library.assert_equal(library.run(lambda *a: cell_decoded(grid, *a, 4), noise, is_visible), expected, dtype="index")


def test_simple_strategies_are_equal_on_every_library(xp):
    noise, is_visible, weights = on_every_library(GRIDS[1])
    strategies = [
        lambda noise, is_visible, weights: furthest_decoded(GRIDS[1], noise, is_visible, 4),
        lambda noise, is_visible, weights: furthest_decoded(GRIDS[1], noise, is_visible, 4, seed="none"),
        lambda noise, is_visible, weights: random_decoded(noise, is_visible, 4),
        lambda noise, is_visible, weights: weighted_decoded(noise, is_visible, 4, weights),
    ]
    results = xp.run(lambda *a: [strategy(*a) for strategy in strategies], noise, is_visible, weights)
    for strategy, result in zip(strategies, results, strict=True):
        xp.assert_equal(result, strategy(noise, is_visible, weights), dtype="index")


def test_weighted_draws_only_masked_tokens_even_of_weight_zero():
    noise, tokens, is_visible = masked_case(GRIDS[1], 6)
    # All weight on the visible: nothing else has any, and still 18 masked tokens can be drawn.
    drawn = weighted_decoded(noise, is_visible, 18, is_visible.astype(np.float32))
    assert not (drawn[:, :, None] == tokens[:, None, :]).any()
    assert all(np.unique(row).size == 18 for row in drawn)


def test_cells_run_with_time():
    # One masked token more than a phase holds: the first phase is used up at every time, and moves on from one time
    # to the next, so that it comes to every place of the cell once in four.
    grid = Grid((4, 2, 2))
    noise = counter_noise(0, 0, np.arange(8), 16)
    decoded = cell_decoded(grid, noise, np.zeros((8, 16), dtype=bool), 4)
    assert (np.sort(decoded // 4, axis=1) == np.arange(4)).all()  # one at every time
    assert (np.sort(decoded % 4, axis=1) == np.arange(4)).all()  # one at every place
    assert np.unique(np.sort(decoded, axis=1), axis=0).shape[0] > 1  # and the offset is drawn


def test_cells_do_not_stretch_with_the_spacing():
    noise = counter_noise(0, 0, np.arange(3), 24)
    nobody = np.zeros((3, 24), dtype=bool)
    np.testing.assert_array_equal(
        cell_decoded(Grid((4, 6)), noise, nobody, 9), cell_decoded(Grid((4, 6), (5, 2)), noise, nobody, 9)
    )


@pytest.mark.parametrize(
    ("throwing", "weights", "message"),
    [
        ("weighted", None, "weights: expected an array with throwing='weighted' only, got None with 'weighted'"),
        ("random", np.ones((1, 4)), "weights: .* got an array with 'random'"),
        ("nearest", None, "throwing: expected one of furthest, random, weighted, cell, got 'nearest'"),
    ],
)
def test_errors_name_the_argument(throwing, weights, message):
    noise = np.zeros((1, 4), dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        choose_decoded(throwing, Grid((4,)), noise, noise > 0, 1, weights=weights)

import numpy as np
import pytest

from prmim_core import Grid, Plan, Schedule, TokenCounts, counter_noise, make_plan, pool_units, unit_index

CASES = [(Grid((4, 6)), (2, 3)), (Grid((6,)), (2,)), (Grid((2, 4, 2)), (2, 2, 1))]


def place(grid, unit, token):
    """Return the number of the unit of a token."""
    cells = [position // size for position, size in zip(np.unravel_index(token, grid.shape), unit, strict=True)]
    return int(np.ravel_multi_index(cells, [n // size for n, size in zip(grid.shape, unit, strict=True)]))


@pytest.mark.parametrize(("grid", "unit"), CASES, ids=str)
def test_each_token_is_in_its_unit(library, grid, unit):
    tokens = np.random.default_rng(0).integers(0, grid.num_tokens, (2, 5))
    expected = [[place(grid, unit, token) for token in row] for row in tokens]
    library.assert_equal(library.run(lambda tokens: unit_index(grid, unit, tokens), tokens), expected)


@pytest.mark.parametrize(("grid", "unit", "missing"), [(*CASES[0], 0), (*CASES[0], 9), (*CASES[2], 15)], ids=str)
def test_a_unit_is_the_mean_of_what_is_known_of_it(library, grid, unit, missing):
    counts = TokenCounts(1, grid.num_tokens - 1, 0)
    order = make_plan(Schedule(grid, counts), counter_noise(0, 0, np.arange(2), grid.num_tokens)).order
    features = np.random.default_rng(0).random((2, grid.num_tokens - missing, 3), np.float32)
    expected = np.zeros((2, grid.units(unit).num_tokens, 3))
    for image in range(2):
        known = np.array([place(grid, unit, token) for token in order[image, : grid.num_tokens - missing]])
        for number in set(known):
            expected[image, number] = features[image, known == number].mean(0)
    found = library.run(lambda order, x: pool_units(x, Plan(order, Schedule(grid, counts)), unit), order, features)
    library.assert_close(found, expected, rtol=1e-5, dtype="float32")


def test_wrong_arguments_are_refused():
    plan = Plan(np.arange(6)[None], Schedule(Grid((2, 3)), TokenCounts(2, 4, 0)))
    with pytest.raises(ValueError, match=r"features: expected shape \(1, at most 6, dim\), got \(1, 7, 2\)"):
        pool_units(np.zeros((1, 7, 2)), plan, (2, 1))
    with pytest.raises(ValueError, match=r"unit: expected sizes that divide the grid \(2, 3\), got \(2, 2\)"):
        pool_units(np.zeros((1, 6, 2)), plan, (2, 2))
    with pytest.raises(IndexError, match=r"tokens: expected tokens in \[0, 6\)"):
        unit_index(Grid((2, 3)), (2, 1), np.array([[6]]))

import numpy as np
import pytest

import prmim_reference as reference
from prmim_core import Grid
from prmim_core.grid import INT32_MAX

GRIDS = [
    Grid((1,)),
    Grid((7,), (3,)),
    Grid((4, 6)),
    Grid((5, 4), (3, 1)),
    Grid((1, 9)),
    Grid((3, 4, 2), (4, 1, 1)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_positions_match_the_reference(grid):
    expected = reference.grid.positions(grid.shape, grid.spacing)
    assert grid.positions.dtype == np.int32
    assert [tuple(row) for row in grid.positions.tolist()] == expected
    assert grid.num_tokens == reference.grid.num_tokens(grid.shape)
    assert grid.axes == len(grid.shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_max_squared_distance_is_that_of_the_furthest_pair(grid):
    positions = grid.positions.astype(np.int64)
    assert grid.max_squared_distance == ((positions[:, None] - positions[None]) ** 2).sum(axis=2).max()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_coordinates_are_made_by_the_library(library, grid):
    columns = library.run(grid.coordinates, np.arange(3))  # values are not read
    assert len(columns) == grid.axes
    for axis, column in enumerate(columns):
        library.assert_equal(column, grid.positions[:, axis], dtype="int32")


def test_grids_of_equal_content_are_one_key():
    assert Grid((2, 3)) == Grid([2, 3], (1, 1)) == Grid((np.int64(2), 3))
    assert hash(Grid((2, 3))) == hash(Grid((2, 3), [1, 1]))
    assert Grid((2, 3)) != Grid((2, 3), (1, 2))
    assert type(Grid((np.int64(2),)).shape[0]) is int


@pytest.mark.parametrize(
    ("shape", "spacing", "error", "message"),
    [
        ((), None, ValueError, r"shape: expected one to three axes, got \(\)"),
        ((1, 1, 1, 1), None, ValueError, "shape: expected one to three axes"),
        ((2, 0), None, ValueError, r"shape: expected positive integers, got \(2, 0\)"),
        ((2, -1), None, ValueError, "shape: expected positive integers"),
        ((2.0, 1), None, TypeError, r"shape: expected integers, got \(2.0, 1\)"),
        ((True, 1), None, TypeError, "shape: expected integers"),
        (5, None, TypeError, "shape: expected a tuple of integers, got 5"),
        ((2, 2), (1,), ValueError, r"spacing: expected one number for each of the 2 axes, got \(1,\)"),
        ((2, 2), (1, 0), ValueError, "spacing: expected positive integers"),
        ((2, 2), 1, TypeError, "spacing: expected a tuple of integers, got 1"),
        ((2, 2), (1, 2**15), ValueError, r"squared distances below 2\*\*30"),
        ((2**15 + 1,), None, ValueError, r"squared distances below 2\*\*30"),
    ],
)
def test_errors_name_the_argument(shape, spacing, error, message):
    with pytest.raises(error, match=message):
        Grid(shape, spacing)


@pytest.mark.parametrize(
    ("grid", "unit", "expected"),
    [
        (Grid((14, 14)), (2, 2), Grid((7, 7), (2, 2))),
        (Grid((4, 6), (3, 1)), (2, 3), Grid((2, 2), (6, 3))),
        (Grid((4, 6)), (1, 1), Grid((4, 6))),
        (Grid((4, 6)), (4, 6), Grid((1, 1), (4, 6))),
        (Grid((12,)), [4], Grid((3,), (4,))),
        (Grid((2, 4, 2), (4, 1, 1)), (2, 2, 1), Grid((1, 2, 2), (8, 2, 1))),
    ],
)
def test_units_lie_where_their_first_tokens_do(grid, unit, expected):
    assert grid.units(unit) == expected
    firsts = [tokens[0] for tokens in reference.masking.unit_tokens(grid.shape, unit)]
    np.testing.assert_array_equal(grid.units(unit).positions, grid.positions[firsts])


@pytest.mark.parametrize(
    ("unit", "error", "message"),
    [
        ((3, 2), ValueError, r"unit: expected sizes that divide the grid \(4, 6\), got \(3, 2\)"),
        ((2,), ValueError, r"unit: .* got \(2,\)"),
        ((2, 0), ValueError, r"unit: expected positive integers, got \(2, 0\)"),
        ((2, 2.0), TypeError, r"unit: expected integers, got \(2, 2.0\)"),
        (2, TypeError, "unit: expected a tuple of integers, got 2"),
    ],
)
def test_units_must_divide_the_grid(unit, error, message):
    with pytest.raises(error, match=message):
        Grid((4, 6)).units(unit)


def test_the_largest_grids_that_int32_carries():
    assert Grid((2**15,)).max_squared_distance == (2**15 - 1) ** 2 < 2**30 < INT32_MAX
    assert Grid((2, 1), (2**15 - 1, 1)).max_squared_distance < 2**30

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, spatial

import prmim_core.coverage
import prmim_reference as reference
from prmim_core import Grid, covering_radius, nearest_known_distance, testing
from prmim_core._arrays import array_namespace
from prmim_core.coverage import _squared_distances
from prmim_core.grid import INT32_MAX

GRIDS = [Grid((7,), (3,)), Grid((4, 6)), Grid((5, 4), (3, 1)), Grid((3, 4, 2), (4, 1, 1)), Grid((1, 1))]


def known_masks(length):
    """Return nothing known, everything, one token, and a few at random."""
    one = np.arange(length) == length // 2
    rest = np.random.default_rng(0).random((2, length)) < 0.2
    return np.stack([np.zeros(length, bool), np.ones(length, bool), one, *rest])


def tokens(mask):
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_measures_match_the_reference(library, grid):
    is_known = known_masks(grid.num_tokens)
    positions = reference.grid.positions(grid.shape, grid.spacing)

    def measures(is_known):
        return nearest_known_distance(grid, is_known), covering_radius(grid, is_known)

    nearest, radius = library.run(measures, is_known)
    expected = [reference.coverage.nearest_squared_distances(positions, tokens(mask)) for mask in is_known]
    library.assert_equal(nearest, expected, dtype="int32")
    expected = [reference.coverage.covering_radius(positions, tokens(mask)) for mask in is_known]
    library.assert_close(radius, expected, rtol=1e-6, dtype="float32")


@pytest.mark.parametrize("kind", ["own array", "numpy", "grid"])
def test_positions_may_be_arrays(xp, kind):
    grid = GRIDS[2]
    is_known = known_masks(grid.num_tokens)
    positions = {"own array": None, "numpy": grid.positions, "grid": grid}[kind]

    def measures(is_known, own):
        where = own if positions is None else positions
        return nearest_known_distance(where, is_known), covering_radius(where, is_known)

    nearest, radius = xp.run(measures, is_known, grid.positions)
    xp.assert_equal(nearest, nearest_known_distance(grid, is_known), dtype="int32")
    xp.assert_close(radius, covering_radius(grid, is_known), rtol=1e-6, dtype="float32")


@given(testing.grids(), st.data())
def test_grid_distances_match_scipys_distance_transform(grid, data):
    is_known = data.draw(testing.visible_masks(grid.num_tokens))
    for mask, distance in zip(is_known, nearest_known_distance(grid, is_known), strict=True):
        if mask.any():
            expected = ndimage.distance_transform_edt(~mask.reshape(grid.shape), sampling=grid.spacing).ravel()
            np.testing.assert_array_equal(distance, np.rint(expected**2))
        else:
            assert (distance == INT32_MAX).all()


@given(
    st.sets(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=30), st.integers(0, 2**30 - 1)
)
def test_distances_of_free_points_match_scipys_tree(points, bits):
    positions = np.asarray(sorted(points), dtype=np.int32)
    mask = (bits >> np.arange(len(positions)) & 1).astype(bool)
    nearest = nearest_known_distance(positions, mask[None])[0]
    if not mask.any():
        assert (nearest == INT32_MAX).all()
        return
    expected, _ = spatial.cKDTree(positions[mask]).query(positions)
    np.testing.assert_array_equal(nearest, np.rint(expected**2))
    assert covering_radius(positions, mask[None])[0] == pytest.approx(expected.max(), rel=1e-6)


def test_squared_distances_match_scipy(xp):
    generator = np.random.default_rng(0)
    first, second = (generator.integers(-99, 99, (n, 3)).astype(np.int32) for n in (4, 5))
    expected = np.rint(spatial.distance.cdist(first, second, "sqeuclidean")).astype(np.int64)
    squared = xp.run(lambda *a: _squared_distances(array_namespace(*a), *a), first, second)
    xp.assert_equal(squared, expected, dtype="int32")


def test_large_grids_match_scipy():
    grid = Grid((64, 96), (2, 3))
    mask = np.random.default_rng(0).random((1, grid.num_tokens)) < 0.01
    expected = ndimage.distance_transform_edt(~mask.reshape(grid.shape), sampling=grid.spacing).ravel()
    np.testing.assert_array_equal(nearest_known_distance(grid, mask)[0], np.rint(expected**2))


def test_distances_near_the_limit_of_int32_are_exact():
    grid = Grid((2, 3), (20_000, 12_000))
    mask = np.asarray([[True, *[False] * 5]])
    expected = [[0, 12_000**2, 24_000**2, 20_000**2, 20_000**2 + 12_000**2, 20_000**2 + 24_000**2]]
    np.testing.assert_array_equal(nearest_known_distance(grid, mask), expected)
    np.testing.assert_array_equal(nearest_known_distance(grid.positions, mask), expected)


@pytest.mark.parametrize("pairs", [1, 100, 300, 10**9])
def test_blocks_of_any_size_give_the_same(monkeypatch, pairs):
    grid = GRIDS[1]
    is_known = known_masks(grid.num_tokens)
    expected = nearest_known_distance(grid, is_known)
    monkeypatch.setattr(prmim_core.coverage, "_PAIRS_AT_ONCE", pairs)
    np.testing.assert_array_equal(nearest_known_distance(grid.positions, is_known), expected)


@pytest.mark.parametrize("pairs", [1, 50, 10**9])
def test_blocks_of_an_axis_give_the_same(monkeypatch, pairs):
    grid = GRIDS[3]
    is_known = known_masks(grid.num_tokens)
    expected = nearest_known_distance(grid.positions, is_known)
    monkeypatch.setattr(prmim_core.coverage, "_PAIRS_OF_AN_IMAGE", pairs)
    np.testing.assert_array_equal(nearest_known_distance(grid, is_known), expected)


def test_memory_of_a_long_axis_is_bounded():
    is_known = np.zeros((1, 4096), dtype=bool)
    tracemalloc.start()
    nearest_known_distance(Grid((4096,)), is_known)
    assert tracemalloc.get_traced_memory()[1] < 2**25  # all pairs would take 64 MiB
    tracemalloc.stop()


@pytest.mark.parametrize("measure", [nearest_known_distance, covering_radius])
@pytest.mark.parametrize(
    ("positions", "is_known", "error", "message"),
    [
        (Grid((4,)), np.zeros((1, 4), dtype=int), TypeError, "is_known: expected bool, got int64"),
        (Grid((4,)), np.zeros((1, 5), dtype=bool), ValueError, r"is_known: expected shape \(batch, 4\), got \(1, 5\)"),
        (Grid((4,)), np.zeros(4, dtype=bool), ValueError, r"is_known: .* got \(4,\)"),
        (np.arange(4), np.zeros((1, 4), dtype=bool), ValueError, r"positions: .* \(N, axes\), got shape \(4,\)"),
        (np.zeros((4, 2)), np.zeros((1, 4), dtype=bool), TypeError, "positions: expected integers, got float64"),
    ],
)
def test_errors_name_the_argument(measure, positions, is_known, error, message):
    with pytest.raises(error, match=message):
        measure(positions, is_known)

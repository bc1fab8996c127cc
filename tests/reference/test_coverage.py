import math

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from prmim_reference.coverage import NOTHING_KNOWN, covering_radius, nearest_squared_distances
from prmim_reference.grid import positions

GRIDS = [((9,), None), ((5, 7), None), ((5, 7), (3, 2)), ((2, 3, 4), (4, 1, 1))]


def some_known(shape, count, seed=0):
    return np.random.default_rng(seed).permutation(int(np.prod(shape)))[:count].tolist()


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nearest_distances_agree_with_scipy_three_ways(shape, spacing, count):
    known = some_known(shape, count)
    points = np.array(positions(shape, spacing))
    found = np.array(nearest_squared_distances(points.tolist(), known))
    assert np.array_equal(found, cdist(points, points[known], "sqeuclidean").min(axis=1))
    assert np.allclose(np.sqrt(found), cKDTree(points[known]).query(points)[0])
    is_unknown = np.ones(int(np.prod(shape)), bool)
    is_unknown[known] = False
    transform = distance_transform_edt(is_unknown.reshape(shape), sampling=spacing)
    assert np.allclose(np.sqrt(found), transform.ravel())


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("count", [2, 5])
def test_radius_agrees_with_scipy(shape, spacing, count):
    known = some_known(shape, count, seed=1)
    points = np.array(positions(shape, spacing))
    assert covering_radius(points.tolist(), known) == pytest.approx(cdist(points, points[known]).min(axis=1).max())


def test_nothing_and_everything_known():
    points = positions((2, 2))
    assert nearest_squared_distances(points, []) == [NOTHING_KNOWN] * 4
    assert covering_radius(points, []) == math.inf
    assert covering_radius(points, [0, 1, 2, 3]) == 0.0

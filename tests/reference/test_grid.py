import numpy as np
import pytest

from prmim_reference.grid import num_tokens, positions, raster_number


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1)])
def test_positions_are_numpys_indices_in_raster_order(shape):
    expected = np.indices(shape).reshape(len(shape), -1).T
    assert positions(shape) == [tuple(index) for index in expected.tolist()]
    assert num_tokens(shape) == len(expected)


def test_spacing_multiplies_each_axis():
    expected = np.array(positions((2, 3, 2))) * [4, 1, 7]
    assert np.array_equal(positions((2, 3, 2), (4, 1, 7)), expected)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_raster_number_inverts_positions(shape):
    assert [raster_number(index, shape) for index in positions(shape)] == list(range(num_tokens(shape)))


@pytest.mark.parametrize(("shape", "spacing"), [((), None), ((0, 2), None), ((2, 2), (1,)), ((2, 2), (1, 0))])
def test_bad_grids_are_refused(shape, spacing):
    with pytest.raises(ValueError, match=r"^(shape|spacing): expected"):
        positions(shape, spacing)

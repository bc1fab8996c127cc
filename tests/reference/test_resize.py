import numpy as np
import pytest

from prmim_reference.resize import cubic, resize_image, resize_table, taps


def test_the_weights_of_any_place_sum_to_one():
    for place in np.linspace(0, 1, 11):
        assert sum(cubic(place - neighbour) for neighbour in range(-1, 3)) == pytest.approx(1, abs=1e-14)


def test_the_kernel_is_smooth_and_ends():
    assert cubic(2.5) == cubic(-2) == 0
    for knot in (0.0, 1.0, 2.0):
        before, after = cubic(knot - 1e-7), cubic(knot + 1e-7)
        assert before == pytest.approx(after, abs=1e-6)
    slopes = [(cubic(1 + step) - cubic(1)) / step for step in (-1e-6, 1e-6)]
    assert slopes == pytest.approx([-0.75, -0.75], abs=1e-4)  # the slope at 1 is the parameter


def test_taps_by_hand():
    # From 4 to 8 pixels: places -0.25, 0.25, 0.75, ...
    assert [neighbour for neighbour, _ in taps(0, 4, 8)] == [0, 0, 0, 1]
    assert [neighbour for neighbour, _ in taps(3, 4, 8)] == [0, 1, 2, 3]
    assert [neighbour for neighbour, _ in taps(7, 4, 8)] == [2, 3, 3, 3]
    assert [weight for _, weight in taps(3, 4, 8)] == [cubic(1.25), cubic(0.25), cubic(0.75), cubic(1.75)]


def test_equal_shapes_change_nothing():
    image = np.random.default_rng(0).random((3, 4, 2))
    np.testing.assert_array_equal(resize_image(image, (3, 4)), image)


def test_doubling_and_halving_by_hand():
    # At a quarter of the way between two pixels; the coefficients are those of a = -0.75.
    row = np.array([[0.0], [0], [1], [0], [0], [0]])
    doubled = resize_image(row, (12,))[:, 0]
    np.testing.assert_allclose(doubled[[2, 3, 4, 5, 6, 7]], [cubic(d) for d in (1.25, 0.75, 0.25, 0.25, 0.75, 1.25)])
    halved = resize_image(np.array([[16.0], [32], [0], [0], [0], [0]]), (3,))[:, 0]  # the border counts twice
    np.testing.assert_allclose(halved, [8 + 32 * 0.59375, -32 * 0.09375, 0])


def test_axes_are_resized_one_by_one():
    image = np.random.default_rng(0).random((3, 5, 2))
    in_turn = np.stack([resize_image(row, (4,)) for row in resize_image(image.reshape(3, 10), (6,)).reshape(6, 5, 2)])
    np.testing.assert_allclose(resize_image(image, (6, 4)), in_turn, rtol=0, atol=1e-14)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_table_keeps_the_rows_of_its_class_tokens(number):
    table = np.random.default_rng(0).random((number + 6, 3))
    resized = resize_table(table, (2, 3), (4, 2), number)
    np.testing.assert_array_equal(resized[:number], table[:number])
    expected = resize_image(table[number:].reshape(2, 3, 3), (4, 2)).reshape(8, 3)
    np.testing.assert_array_equal(resized[number:], expected)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="shape: expected 2 positive lengths"):
        resize_image(np.zeros((2, 2, 1)), (2,))
    with pytest.raises(ValueError, match="shape: expected 1 positive lengths"):
        resize_image(np.zeros((2, 1)), (0,))
    with pytest.raises(ValueError, match="table: expected 5 rows"):
        resize_table(np.zeros((4, 3)), (2, 2), (3, 3))

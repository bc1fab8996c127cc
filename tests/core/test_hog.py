"""Histograms of oriented gradients, compared with the reference and scikit-image."""

import numpy as np
import pytest

import prmim_reference as reference
from prmim_core import hog, hog_pyramid
from prmim_core._arrays import array_namespace
from prmim_core.hog import _direction_bin

CASES = [  # (height, width), channels, cell, bins
    ((6, 10), 2, (3, 2), 9),
    ((2, 3), 1, (1, 1), 4),
]


def images(size, channels, levels=256):
    return np.random.default_rng(0).integers(0, levels, (2, *size, channels)).astype(np.float32)


def specified(pixels, cell, bins):
    return np.stack([reference.hog.hog(image.astype(float), cell, bins) for image in pixels])


@pytest.mark.parametrize(("size", "channels", "cell", "bins"), CASES, ids=str)
def test_histograms_match_the_reference(library, size, channels, cell, bins):
    pixels = images(size, channels)
    found = library.run(lambda pixels: hog(pixels, cell, bins), pixels)
    library.assert_close(found, specified(pixels, cell, bins), rtol=1e-5, atol=1e-7, dtype="float32")


def test_gradients_on_the_edge_of_a_bin(library):
    # With three values, most gradients are 0, diagonal, or along an axis. All of these are edges of eight bins.
    pixels = images((8, 8), 2, levels=3)
    found = library.run(lambda pixels: hog(pixels, (2, 2), 8), pixels)
    library.assert_close(found, specified(pixels, (2, 2), 8), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bins", [3, 8, 9, 18])
def test_bins_of_integer_gradients_are_exact_in_float32(bins):
    # All gradients of 8-bit pixels that are near the largest one, where rounding errors are largest, and small ones.
    numbers = np.concatenate([np.arange(-1020, -900), np.arange(-20, 21), np.arange(900, 1021)])
    u, v = (part[~((u == 0) & (v == 0))] for u, v in [np.meshgrid(numbers, numbers)] for part in (u, v))
    expected = np.floor(np.arctan2(u, v) / np.pi * bins).astype(int) % bins
    for dtype in (np.float32, np.float64):
        found = _direction_bin(array_namespace(u), u.astype(dtype), v.astype(dtype), bins)
        np.testing.assert_array_equal(found, expected)


def test_a_pyramid_holds_the_histograms_of_each_cell_size(library):
    pixels, sizes = images((8, 12), 2), ((2, 3), (4, 6), (8, 12))
    found = library.run(lambda pixels: hog_pyramid(pixels, sizes, 3), pixels)
    for maps, size in zip(found, sizes, strict=True):
        library.assert_close(maps, specified(pixels, size, 3), rtol=1e-5, atol=1e-6, dtype="float32")


def test_affine_changes_of_a_channel_change_nothing():
    pixels = images((8, 8), 3).astype(np.float64)
    pixels[0, :5] = 7  # flat cells, and the row below them
    changed = pixels * np.array([0.01, 1.0, 30.0]) + np.array([5.0, -2.0, 0.0])
    found = hog(pixels, (4, 4))
    # Directions on the edge of a bin would fall to either side.
    np.testing.assert_allclose(hog(changed, (4, 4), 1), hog(pixels, (4, 4), 1), atol=1e-9)
    norms = np.linalg.norm(found.reshape(2, 2, 2, 3, 9), axis=-1)
    np.testing.assert_allclose(norms[1], 1)
    assert not found[0, 0].any()


def test_flat_images_have_empty_histograms(library):
    found = library.run(lambda pixels: hog(pixels, (2, 2), 2), np.full((1, 4, 4, 3), 200.0, np.float32))
    library.assert_equal(found, np.zeros((1, 2, 2, 6)))


def test_histograms_of_scikit_image_where_the_definitions_coincide():
    """For images f(row) + g(column), and blocks of a single cell.

    scikit-image takes central differences, which are 0 at the border, in place of Sobel's. In such images both are the
    same up to the factor -4. It measures angles from the other axis, so its histograms are those of the transpose.
    """
    feature = pytest.importorskip("skimage.feature")
    rng = np.random.default_rng(0)
    image = rng.random((24, 1)) * 99 + rng.random((1, 16)) * 99
    for bins, cell in ((9, (4, 4)), (18, (8, 2)), (4, (6, 8))):
        expected = feature.hog(
            image.T, bins, cell[::-1], (1, 1), block_norm="L2", feature_vector=False, channel_axis=None
        )[:, :, 0, 0]
        found = hog(image[None, :, :, None], cell, bins)[0]
        np.testing.assert_allclose(found, expected.swapaxes(0, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("pixels", "sizes", "bins", "error", "message"),
    [
        (np.zeros((1, 4, 4)), [(2, 2)], 9, ValueError, r"images: expected shape \(batch, height, width, channels\)"),
        (np.zeros((1, 4, 1, 3)), [(1, 1)], 9, ValueError, r"at least 2 x 2 pixels, got \(1, 4, 1, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), [(2, 2)], 9, TypeError, "images: expected floats, got uint8"),
        (np.zeros((1, 4, 4, 3)), [(2, 2)], 0, ValueError, "bins: expected at least 1, got 0"),
        (np.zeros((1, 4, 4, 3)), [(2, 3)], 9, ValueError, r"sizes that divide the image \(4, 4\), got \(2, 3\)"),
        (np.zeros((1, 4, 4, 3)), [(2, 2), (1, 4)], 9, ValueError, r"expected a multiple of \(2, 2\), got \(1, 4\)"),
    ],
)
def test_wrong_arguments_are_refused(pixels, sizes, bins, error, message):
    with pytest.raises(error, match=message):
        hog_pyramid(pixels, sizes, bins)

import numpy as np
import pytest

from prmim_reference.targets import (
    cell_means,
    cell_targets,
    denormalize_patches,
    expand_cells,
    grid_shape,
    normalize_patches,
    patchify,
    unpatchify,
)

CASES = [((12,), (3,), 2), ((4, 6), (2, 3), 1), ((4, 6), (2, 2), 3), ((4, 4, 6), (2, 2, 3), 2), ((4, 4), (1, 1), 5)]


def patchify_by_reshape(image, patch_size):
    axes = len(patch_size)
    split = [n for length, side in zip(image.shape, patch_size, strict=False) for n in (length // side, side)]
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2), 2 * axes]
    tokens = image.reshape(*split, image.shape[-1]).transpose(order)
    return tokens.reshape(int(np.prod(tokens.shape[:axes])), -1)


@pytest.mark.parametrize(("lengths", "patch_size", "channels"), CASES)
def test_patchify_agrees_with_reshaping_and_is_undone(lengths, patch_size, channels):
    image = np.random.default_rng(0).normal(size=(*lengths, channels))
    tokens = patchify(image, patch_size)
    assert np.array_equal(tokens, patchify_by_reshape(image, patch_size))
    assert np.array_equal(unpatchify(tokens, patch_size, grid_shape(lengths, patch_size)), image)


def test_pixel_order_is_row_column_channel():
    image = np.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    assert patchify(image, (2, 2))[1].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("patch_size", [(3, 2), (2,)])
def test_patches_that_do_not_fit_are_refused(patch_size):
    with pytest.raises(ValueError, match="patch_size: expected divisors"):
        patchify(np.zeros((4, 4, 1)), patch_size)


def test_normalisation_agrees_with_numpys_unbiased_variance_and_is_undone():
    patches = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 12))
    patches[4] = 7.0  # a flat patch is only kept finite by eps
    normalized = normalize_patches(patches)
    expected = (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.var(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(normalized, expected, atol=1e-12)
    assert np.array_equal(normalized[4], np.zeros(12))
    assert np.allclose(denormalize_patches(normalized, patches), patches, atol=1e-12)


def test_a_patch_of_one_value_has_no_unbiased_variance():
    with pytest.raises(ValueError, match="patch: expected at least 2 values"):
        normalize_patches(np.zeros((3, 1)))


def test_cell_means_agree_with_reshaping():
    patches = np.random.default_rng(0).normal(size=(5, 4 * 6 * 3))
    means = patches.reshape(5, 2, 2, 3, 2, 3).mean(axis=(2, 4))
    assert np.allclose(cell_means(patches, (4, 6), (2, 3)), means.reshape(5, -1), atol=1e-12)
    blocks = np.repeat(np.repeat(means, 2, axis=1), 2, axis=2)
    assert np.allclose(expand_cells(means.reshape(5, -1), (4, 6), (2, 3)), blocks.reshape(5, -1), atol=1e-12)


@pytest.mark.parametrize(("cell_norm", "tokens"), [("image", range(6)), ("window", [0, 1, 3, 4]), ("none", None)])
def test_targets_of_cells_are_normalised_by_channel(cell_norm, tokens):
    patches = np.random.default_rng(0).normal(3.0, 2.0, size=(6, 2 * 2 * 3))
    target = cell_targets(patches, [0], (2, 2), (2, 3), (1, 1), cell_norm)
    expected = patches[0].reshape(4, 3).mean(axis=0)
    if tokens is not None:
        pixels = patches[list(tokens)].reshape(-1, 3)
        expected = (expected - pixels.mean(axis=0)) / (pixels.std(axis=0) + 1e-3)
    assert np.allclose(target[0], expected, atol=1e-12)


def test_wrong_cells_are_refused():
    with pytest.raises(ValueError, match="cells: expected divisors"):
        cell_means(np.zeros((1, 16)), (4, 4), (3, 2))
    with pytest.raises(ValueError, match="cell_norm: expected"):
        cell_targets(np.zeros((1, 16)), [0], (4, 4), (1, 1), (2, 2), "patch")

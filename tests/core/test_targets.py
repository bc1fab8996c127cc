import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import Grid, denormalize_patches, normalize_patches, patch_grid, patchify, unpatchify

CASES = [  # (image axes, channels, patch)
    ((12,), 2, (3,)),
    ((4, 6), 3, (2, 3)),
    ((6, 4), 1, (2, 4)),
    ((4, 4, 2), 2, (2, 1, 2)),
]


def images(axes, channels, dtype=np.float32):
    return np.random.default_rng(0).integers(0, 256, (2, *axes, channels)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("axes", "channels", "patch"), CASES, ids=str)
def test_patchify_matches_the_reference(library, axes, channels, patch, dtype):
    pixels = images(axes, channels, dtype)
    expected = np.stack([reference.targets.patchify(image, patch) for image in pixels]).astype(dtype)
    library.assert_equal(
        library.run(lambda pixels: patchify(pixels, patch), pixels), expected, dtype=np.dtype(dtype).name
    )


@pytest.mark.parametrize(("axes", "channels", "patch"), CASES, ids=str)
def test_unpatchify_matches_the_reference(library, axes, channels, patch):
    grid = patch_grid(axes, patch)
    tokens = np.random.default_rng(0).random((2, grid.num_tokens, int(np.prod(patch)) * channels), dtype=np.float32)
    expected = np.stack([reference.targets.unpatchify(image, patch, grid.shape) for image in tokens])
    library.assert_equal(library.run(lambda tokens: unpatchify(tokens, patch, grid), tokens), expected, dtype="float32")


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    patch=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    channels=st.integers(1, 4),
)
def test_unpatchify_inverts_patchify(shape, patch, channels):
    patch = tuple(patch[: len(shape)])
    axes = tuple(n * size for n, size in zip(shape, patch, strict=True))
    pixels = images(axes, channels)
    grid = patch_grid(axes, patch)
    assert grid == Grid(tuple(shape))
    np.testing.assert_array_equal(unpatchify(patchify(pixels, patch), patch, grid), pixels)


def test_the_order_in_a_token_is_that_of_mae():
    # Row, column, channel: what einsum says in MAE's own words, nhwpqc.
    pixels = images((6, 8), 3)
    expected = np.einsum("nhpwqc->nhwpqc", pixels.reshape(2, 3, 2, 2, 4, 3)).reshape(2, 6, 24)
    np.testing.assert_array_equal(patchify(pixels, (2, 4)), expected)


PATCHES = np.random.default_rng(0).normal(3, 2, (2, 3, 12)).astype(np.float32)
PATCHES[0, 0] = 0.25  # a flat patch: only eps keeps it from a division by zero


def test_normalisation_matches_the_reference(xp):
    expected = np.stack([reference.targets.normalize_patches(image.astype(float)) for image in PATCHES])
    normalized = xp.run(normalize_patches, PATCHES)
    xp.assert_close(normalized, expected, rtol=1e-4, atol=1e-5, dtype="float32")
    predicted = np.float32(expected[::-1])
    expected = np.stack(
        [
            reference.targets.denormalize_patches(ours.astype(float), image.astype(float))
            for ours, image in zip(predicted, PATCHES, strict=True)
        ]
    )
    denormalized = xp.run(denormalize_patches, predicted, PATCHES)
    xp.assert_close(denormalized, expected, rtol=1e-4, atol=1e-5, dtype="float32")


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.0])
def test_denormalisation_inverts_normalisation(eps):
    patches = PATCHES[1:]
    normalized = normalize_patches(patches, eps)
    np.testing.assert_allclose(denormalize_patches(normalized, patches, eps), patches, rtol=1e-5, atol=1e-5)


def test_normalised_patches_have_mean_zero_and_unbiased_variance_one():
    normalized = normalize_patches(PATCHES[1:].astype(float))
    np.testing.assert_allclose(normalized.mean(axis=-1), 0, atol=1e-12)
    np.testing.assert_allclose(normalized.var(axis=-1, ddof=1), 1, atol=1e-5)


def test_flat_patches_become_zero(xp):
    xp.assert_equal(xp.run(normalize_patches, PATCHES[:1, :1]), np.zeros((1, 1, 12)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: patch_grid((4, 5), (2, 2)), ValueError, r"patch_size: .* divide the image \(4, 5\), got \(2, 2\)"),
        (lambda: patch_grid((4, 4), (2,)), ValueError, r"patch_size: .* got \(2,\)"),
        (lambda: patch_grid((4, 4), (0, 2)), ValueError, r"patch_size: .* got \(0, 2\)"),
        (lambda: patch_grid((4,) * 4, (2,) * 4), ValueError, "shape: expected one to three axes"),
        (lambda: patchify(np.zeros((1, 4, 5, 3)), (2, 2)), ValueError, "patch_size: .* divide the image"),
        (lambda: patchify(np.zeros((1, 4, 4)), (2, 2)), ValueError, "patch_size: .* divide the image"),
        (lambda: unpatchify(np.zeros((1, 3, 8)), (2, 2), Grid((2, 2))), ValueError, r"tokens: .* got \(1, 3, 8\)"),
        (lambda: unpatchify(np.zeros((1, 4, 7)), (2, 2), Grid((2, 2))), ValueError, r"\(batch, 4, a multiple of 4\)"),
        (lambda: unpatchify(np.zeros((1, 4, 0)), (2, 2), Grid((2, 2))), ValueError, r"tokens: .* got \(1, 4, 0\)"),
        (lambda: unpatchify(np.zeros((4, 8)), (2, 2), Grid((2, 2))), ValueError, r"tokens: .* got \(4, 8\)"),
        (lambda: unpatchify(np.zeros((1, 4, 8)), (4,), Grid((2, 2))), ValueError, r"patch_size: .* 2 axes, got \(4,\)"),
        (lambda: normalize_patches(np.zeros((1, 4, 1))), ValueError, "patches: expected at least 2 values .* got 1"),
        (lambda: denormalize_patches(np.zeros((1, 1)), np.zeros((1, 1))), ValueError, "patches: expected at least 2"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

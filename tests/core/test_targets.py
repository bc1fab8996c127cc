import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import (
    Grid,
    cell_means,
    denormalize_patches,
    denormalize_values,
    expand_cells,
    image_statistics,
    low_pass,
    normalize_over_image,
    normalize_patches,
    normalize_values,
    patch_grid,
    patch_statistics,
    patchify,
    take_tokens,
    unpatchify,
    window_statistics,
)

# Many shapes, each a program of JAX; test_every_function.py has every function under the full compiler.
pytestmark = pytest.mark.usefixtures("quick_compiler")

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


def test_normalisation_per_channel_matches_the_reference(xp):
    expected = np.stack([reference.targets.normalize_patch_channels(image.astype(float), 3) for image in PATCHES])
    normalized = xp.run(lambda x: normalize_values(x, *patch_statistics(x, 3), 1e-6), PATCHES)
    xp.assert_close(normalized, expected, rtol=1e-4, atol=1e-5, dtype="float32")


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax:jit"], indirect=True)
def test_patches_of_one_colour_become_zero_per_channel(xp):
    patches = np.tile(np.float32([0.3, -1.7, 0.1]), (2, 4, 512))
    normalized = xp.run(lambda x: normalize_values(x, *patch_statistics(x, 3), 1e-6), patches)
    xp.assert_equal(normalized, np.zeros(patches.shape))


CELLS = [  # image axes, channels, patch, cells
    ((12,), 2, (6,), (3,)),
    ((4, 8), 3, (2, 4), (2, 1)),
    ((8, 4), 1, (4, 2), (2, 2)),
    ((4, 4, 2), 2, (2, 4, 2), (1, 2, 2)),
    ((6, 6), 3, (2, 2), (1, 1)),
]


@pytest.mark.parametrize(("axes", "channels", "patch", "cells"), CELLS, ids=str)
def test_cells_match_the_reference(xp, axes, channels, patch, cells):
    patches = patchify(images(axes, channels), patch)
    expected = np.stack([reference.targets.cell_means(image.astype(float), patch, cells) for image in patches])
    xp.assert_close(xp.run(lambda x: cell_means(x, patch, cells), patches), expected, rtol=1e-6, dtype="float32")
    values = np.float32(expected)
    expected = np.stack([reference.targets.expand_cells(image, patch, cells) for image in values])
    xp.assert_close(xp.run(lambda x: expand_cells(x, patch, cells), values), expected, rtol=1e-6, dtype="float32")


@pytest.mark.parametrize(("axes", "channels", "patch", "cells"), CELLS, ids=str)
def test_expanding_cells_keeps_their_means(axes, channels, patch, cells):
    values = cell_means(patchify(images(axes, channels), patch), patch, cells)
    np.testing.assert_allclose(cell_means(expand_cells(values, patch, cells), patch, cells), values, rtol=1e-6)
    pixels = patchify(images(axes, channels), patch)
    np.testing.assert_array_equal(cell_means(pixels, patch, patch), pixels)
    np.testing.assert_array_equal(expand_cells(pixels, patch, patch), pixels)


@pytest.mark.parametrize("cell_norm", ["image", "window", "none"])
@pytest.mark.parametrize(("axes", "channels", "patch", "cells"), CELLS, ids=str)
def test_normalised_cells_match_the_reference(xp, axes, channels, patch, cells, cell_norm):
    grid = patch_grid(axes, patch)
    patches = patchify(images(axes, channels), patch) / np.float32(64)
    index = np.stack([np.random.default_rng(i).permutation(grid.num_tokens)[:2] for i in range(len(patches))])

    def targets(patches, index):
        values = cell_means(take_tokens(patches, index), patch, cells)
        if cell_norm == "image":
            return normalize_over_image(values, patches, channels)
        if cell_norm == "none":
            return values
        return normalize_values(values, *(take_tokens(a, index) for a in window_statistics(patches, channels, grid)))

    expected = np.stack(
        [
            reference.targets.cell_targets(image.astype(float), tokens.tolist(), patch, grid.shape, cells, cell_norm)
            for image, tokens in zip(patches, index, strict=True)
        ]
    )
    xp.assert_close(xp.run(targets, patches, index), expected, rtol=1e-4, atol=1e-5, dtype="float32")


@pytest.mark.parametrize("radius", [1.5, 2.0, 100.0])
@pytest.mark.parametrize(("axes", "channels"), [((12,), 2), ((7, 10), 3), ((4, 5, 6), 1)], ids=str)
def test_low_pass_matches_the_reference(xp, axes, channels, radius):
    pixels = images(axes, channels) / np.float32(255)
    expected = np.stack([reference.targets.low_pass(image.astype(float), radius) for image in pixels])
    filtered = xp.run(lambda pixels: low_pass(pixels, radius), pixels)
    xp.assert_close(filtered, expected, rtol=1e-4, atol=1e-5, dtype="float32")


def test_the_low_pass_filter_keeps_what_is_inside_and_removes_what_is_outside():
    place = np.arange(32) * 2 * np.pi / 32
    waves = {periods: (1 + np.cos(periods * place)).reshape(1, 32, 1) for periods in (3, 8)}
    np.testing.assert_allclose(low_pass(waves[3], 5.0), waves[3], atol=1e-12)
    np.testing.assert_allclose(low_pass(waves[8], 5.0), 1, atol=1e-12)


def test_denormalisation_inverts_normalisation_by_any_statistics():
    patches = patchify(images((4, 6), 3), (2, 2))
    for statistics in (image_statistics(patches, 3), window_statistics(patches, 3, Grid((2, 3)))):
        normalized = normalize_values(patches, *statistics)
        assert np.abs(normalized).max() < 4
        np.testing.assert_allclose(denormalize_values(normalized, *statistics), patches, rtol=1e-5, atol=1e-4)


def test_pixels_normalised_over_the_image_have_mean_zero_and_deviation_one():
    patches = patchify(images((4, 6), 3, np.float64), (2, 2))
    pixels = normalize_over_image(patches, patches, 3, eps=0).reshape(2, -1, 3)
    np.testing.assert_allclose(pixels.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(pixels.std(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax:jit"], indirect=True)
def test_cells_of_images_of_one_colour_are_zero(xp):
    patches = np.tile(np.float32([0.3, -1.7, 2.1]), (2, 49, 64))
    cells = xp.run(lambda patches: cell_means(normalize_over_image(patches, patches, 3), (8, 8), (2, 2)), patches)
    xp.assert_equal(cells, np.zeros((2, 49, 12)))


def test_a_window_is_accurate_where_the_image_is_bright_and_flat():
    patches = np.full((1, 3, 2), 1000, np.float32)
    patches[0, :, 1] += np.float32(0.125)
    _, deviation = window_statistics(patches, 1, Grid((3,)))
    np.testing.assert_allclose(deviation, 0.0625, rtol=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        normalize_patches,
        lambda x: image_statistics(x, 1),
        lambda x: window_statistics(x, 1, Grid((2,))),
        lambda x: patch_statistics(x, 1),
        lambda x: normalize_over_image(x, x, 1),
    ],
)
@pytest.mark.parametrize("xp", ["numpy", "torch", "jax"], indirect=True)
def test_unsigned_integers_are_refused_because_their_differences_wrap_around(xp, call):
    with pytest.raises(TypeError, match=r"^patches: expected floats, got .*uint8$"):
        xp.run(call, np.uint8([[[10, 200], [3, 250]]]))


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
        (lambda: cell_means(np.zeros((1, 16)), (4, 4), (3, 2)), ValueError, r"cells: .* \(4, 4\), got \(3, 2\)"),
        (lambda: cell_means(np.zeros((1, 16)), (4, 4), (2,)), ValueError, r"cells: .* got \(2,\)"),
        (lambda: cell_means(np.zeros((1, 16)), (4, 4), (0, 2)), ValueError, r"cells: .* got \(0, 2\)"),
        (lambda: cell_means(np.zeros((1, 17)), (4, 4), (2, 2)), ValueError, "patches: .* multiple of 16 .* got 17"),
        (lambda: expand_cells(np.zeros((1, 16)), (4, 4), (3, 2)), ValueError, r"cells: .* got \(3, 2\)"),
        (lambda: expand_cells(np.zeros((1, 3)), (4, 4), (2, 2)), ValueError, "values: .* multiple of 4 values, got 3"),
        (lambda: image_statistics(np.zeros((1, 4, 9)), 2), ValueError, "channels: expected a divisor .* 9 .* got 2"),
        (lambda: image_statistics(np.zeros((1, 4, 9)), 0), ValueError, "channels: expected a divisor .* 9 .* got 0"),
        (lambda: image_statistics(np.zeros((4, 9)), 3), ValueError, r"patches: .* \(batch, N, P\), got \(4, 9\)"),
        (lambda: patch_statistics(np.zeros((1, 4, 3)), 3), ValueError, "patches: expected at least 2 pixels .* got 1"),
        (lambda: low_pass(np.zeros((1, 4, 4, 1)), 0), ValueError, "radius: expected a positive number, got 0"),
        (lambda: window_statistics(np.zeros((1, 4, 9)), 3, Grid((5,))), ValueError, "patches: expected 5 .* got 4"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

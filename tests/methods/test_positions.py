"""Tables of positions on another grid."""

from dataclasses import replace
from itertools import product
from math import cos, sin

import numpy as np
import pytest

from prmim_core import Grid, num_offsets, offset_squared_distances
from prmim_methods import LocalMIMConfig, MAEConfig, SimMIMConfig, VideoMAEConfig
from prmim_methods.encoder import EncoderConfig
from prmim_methods.positions import (
    fit_positions,
    fixed_table,
    offset_matrix,
    raster_table,
    sincos_table,
    spline_matrix,
)
from prmim_reference import vit as reference

GENERATOR = np.random.default_rng(0)
SIZES = {"patch_size": (2, 2), "embed_dim": 8, "depth": 1, "num_heads": 2}
BIAS, KERNEL = "encoder.rel_pos_bias.relative_position_bias_table", "reconstruct.table"


def test_fixed_tables_start_with_zeros_and_encode_the_column_first():
    table = sincos_table((3, 5), 8)
    assert table.shape == (1, 16, 8)
    assert table.dtype == np.float32
    assert not table[0, 0].any()
    row, column = 2, 3
    expected = [f(i * w) for i in (column, row) for f in (sin, cos) for w in (1, 0.01)]
    np.testing.assert_allclose(table[0, 1 + row * 5 + column], expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "dim"), [((7,), 6), ((3, 4), 8), ((2, 3, 4), 12)])
def test_fixed_tables_are_those_of_the_reference(shape, dim):
    np.testing.assert_allclose(sincos_table(shape, dim)[0], reference.sin_cos_table(shape, dim), atol=1e-7)
    number = int(np.prod(shape))
    np.testing.assert_allclose(raster_table(number, dim, 0)[0], reference.raster_table(number, dim), atol=1e-7)


@pytest.mark.parametrize(("shape", "dim"), [((4,), 3), ((4, 4), 6), ((4, 4, 4), 8), ((4,), 0)])
def test_fixed_tables_need_channels_for_every_axis(shape, dim):
    with pytest.raises(ValueError, match=r"^dim: expected a positive multiple of \d"):
        sincos_table(shape, dim)


# --- interpolation of functions of the offset --------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4, 5, 12])
def test_splines_are_those_of_scipy(number):
    interpolate = pytest.importorskip("scipy.interpolate")
    places = np.sort(GENERATOR.random(number)) * 10
    wanted = np.concatenate([places, np.linspace(places[0], places[-1], 31)])
    expected = interpolate.CubicSpline(places, np.eye(number), bc_type="not-a-knot")(wanted)
    np.testing.assert_allclose(spline_matrix(places, wanted), expected, rtol=0, atol=1e-10)


def beit_places(source, target):
    """Return source positions as in BEiT: the step-by-step search for the ratio."""
    half, goal = source - 1, target - 1
    low, high = 1.01, float(max(goal, 2))
    while high - low > 1e-12:
        ratio = (low + high) / 2
        if (1 - ratio**half) / (1 - ratio) > goal:
            high = ratio
        else:
            low = ratio
    distances, place = [], 0.0
    for power in range(half):
        place += low**power
        distances.append(place)
    return np.array([*(-distance for distance in reversed(distances)), 0.0, *distances])


def beit_table(table, source, target):
    """Interpolate (offsets, heads) as BEiT does: one bicubic spline per head."""
    interpolate = pytest.importorskip("scipy.interpolate")
    places = [beit_places(*sizes) for sizes in zip(source, target, strict=True)]
    wanted = [np.arange(1 - size, size) for size in target]
    heads = []
    for values in table.T:
        shaped = values.reshape([2 * size - 1 for size in source])
        # The search ends short of the border, by 1e-11.
        inside = [np.clip(w, p[0], p[-1]) for w, p in zip(wanted, places, strict=True)]
        heads.append(interpolate.RectBivariateSpline(*places, shaped, s=0)(*inside).ravel())
    return np.stack(heads, 1)


@pytest.mark.parametrize(("source", "target"), [((14, 14), (28, 28)), ((4, 7), (14, 9)), ((3, 5), (4, 24))], ids=str)
def test_biases_are_interpolated_as_in_beit(source, target):
    before, after = (
        SimMIMConfig(**SIZES, mask_unit=1, image_size=[2 * n for n in shape]) for shape in (source, target)
    )
    table = GENERATOR.random((num_offsets(before.grid) + 3, 2), dtype=np.float32)
    fitted = fit_positions({BIAS: table}, before, after)[BIAS]
    assert fitted.shape == (num_offsets(after.grid) + 3, 2)
    assert fitted.dtype == np.float32
    np.testing.assert_array_equal(fitted[-3:], table[-3:])
    np.testing.assert_allclose(fitted[:-3], beit_table(table[:-3], source, target), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("source", "target"), [(4, 14), (14, 28), (3, 5), (14, 7), (2, 5), (2, 2), (1, 3), (5, 1), (13, 14)]
)
def test_offsets_keep_constants_signs_and_ends(source, target):
    matrix = offset_matrix(source, target)
    assert matrix.shape == (2 * target - 1, 2 * source - 1)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], rtol=0, atol=1e-12)
    near = min(source, target, 2)  # offsets up to 1 keep their values, and the farthest ones
    kept = np.eye(2 * source - 1)[source - near : source + near - 1]
    np.testing.assert_allclose(matrix[target - near : target + near - 1], kept, rtol=0, atol=1e-12)
    if source <= target:
        np.testing.assert_allclose(matrix[-1], np.eye(2 * source - 1)[-1], rtol=0, atol=1e-9)
    else:
        np.testing.assert_array_equal(matrix, np.eye(2 * source - 1)[source - target : source + target - 1])


def test_distances_grow_geometrically():
    matrix = offset_matrix(5, 16)  # 1 + q + q^2 + q^3 = 15 for q = 2
    np.testing.assert_allclose(matrix[15 + np.array([0, 1, 3, 7, 15])], np.eye(9)[4:], rtol=0, atol=1e-9)


# --- whole files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["absolute", "raster"])
def test_fixed_tables_are_computed_again(position):
    source = MAEConfig(**SIZES, image_size=(8, 8), position=position, class_tokens=2, decoder_dim=16)
    target = replace(source, image_size=(12, 6))
    trained = {
        f"{part}.pos_embed": np.ones((1, 18, dim), np.float32) for part, dim in (("encoder", 8), ("decoder", 16))
    }
    other = {"encoder.norm.bias": np.ones(8)}
    fitted = fit_positions({**trained, **other}, source, target)
    for name, dim in (("encoder.pos_embed", 8), ("decoder.pos_embed", 16)):
        np.testing.assert_array_equal(fitted[name], fixed_table(position, (6, 3), dim, 2))
    assert fitted["encoder.norm.bias"] is other["encoder.norm.bias"]


@pytest.mark.parametrize(("shape", "wanted"), [((8, 8), (12, 20)), ((8, 12), (4, 4))], ids=str)
def test_learned_tables_are_interpolated_as_torch_does(shape, wanted):
    torch = pytest.importorskip("torch")
    source = EncoderConfig(**SIZES, image_size=shape, position="learned", class_tokens=1)
    target = replace(source, image_size=wanted)
    table = torch.from_numpy(GENERATOR.random((1, 1 + source.grid.num_tokens, 8), dtype=np.float32))
    fitted = fit_positions({"encoder.pos_embed": table}, source, target)["encoder.pos_embed"]
    rows = table[0, 1:].T.reshape(1, 8, *source.grid.shape)
    rows = torch.nn.functional.interpolate(rows, target.grid.shape, mode="bicubic", align_corners=False)
    torch.testing.assert_close(fitted[:, 1:], rows.flatten(2).mT, rtol=0, atol=1e-5)
    assert torch.equal(fitted[:, :1], table[:, :1])


@pytest.mark.parametrize(
    ("source", "target"), [((8, 8), (12, 20)), ((12, 8), (6, 6)), ((4, 8, 8), (8, 8, 12)), ((8,), (20,))], ids=str
)
def test_kernels_start_again_from_distances_and_keep_what_was_learned(source, target):
    sizes = {**SIZES, "patch_size": (2,) * len(source), "embed_dim": 12, "decoder_dim": 12, "decoder_heads": 2}
    before, after = (MAEConfig(**sizes, image_size=size) for size in (source, target))
    start, new_start = (-offset_squared_distances(config.grid).astype(np.float32) for config in (before, after))
    untrained = fit_positions({KERNEL: np.tile(start, (4, 1))}, before, after)[KERNEL]
    np.testing.assert_allclose(untrained, np.tile(new_start, (4, 1)), rtol=0, atol=1e-4)
    learned = GENERATOR.random((4, len(start)), dtype=np.float32)
    fitted = fit_positions({KERNEL: start + learned}, before, after)[KERNEL] - new_start
    places = [np.arange(1 - size, size) for size in after.grid.shape]
    sides = [2 * size - 1 for size in before.grid.shape]
    matrices = [offset_matrix(*pair) for pair in zip(before.grid.shape, after.grid.shape, strict=True)]
    for number, offset in list(enumerate(product(*places)))[:: max(1, len(new_start) // 40)]:
        weights = np.ones(())
        for matrix, along, size in zip(matrices, offset, after.grid.shape, strict=True):
            weights = np.multiply.outer(weights, matrix[along + size - 1])
        expected = (learned.reshape(4, *sides) * weights).reshape(4, -1).sum(1)
        np.testing.assert_allclose(fitted[:, number], expected, rtol=0, atol=1e-4)


def test_every_decoder_of_a_method_is_fitted():
    sizes = {**SIZES, "depth": 4, "decoder_dim": 8, "decoder_heads": 2, "scales": (2, 1), "target": "pixels"}
    source, target = (LocalMIMConfig(**sizes, image_size=size) for size in ((8, 8), (16, 16)))
    names = ["encoder.pos_embed", "decoders.0.pos_embed", "decoders.1.pos_embed"]
    fitted = fit_positions(dict.fromkeys(names, sincos_table((4, 4), 8)), source, target)
    for name in names:
        np.testing.assert_array_equal(fitted[name], sincos_table((8, 8), 8))


def test_equal_grids_change_nothing():
    config = SimMIMConfig(**SIZES, image_size=(8, 8))
    weights = {BIAS: GENERATOR.random((52, 2))}
    assert fit_positions(weights, config, replace(config, mask_ratio=0.5))[BIAS] is weights[BIAS]


@pytest.mark.parametrize(
    ("weights", "target", "message"),
    [
        ({BIAS: np.ones((49, 2))}, (16, 16), rf"weights: {BIAS}: expected shape \(52, n\), got \(49, 2\)"),
        ({KERNEL: np.ones((4, 52))}, (16, 16), r"weights: reconstruct.table: expected shape \(n, 49\), got \(4, 52\)"),
        ({KERNEL: np.ones(49)}, (16, 16), r"weights: .* got \(49,\)"),
        ({}, (4, 8, 8), "image_size: expected 2 axes, as in the weights, got 4 x 8 x 8"),
    ],
    ids=str,
)
def test_errors_name_the_table(weights, target, message):
    source = SimMIMConfig(**SIZES, image_size=(8, 8))
    other = (
        VideoMAEConfig(image_size=target, patch_size=(2, 2, 2))
        if len(target) == 3
        else replace(source, image_size=target)
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit_positions(weights, source, other)


def test_grids_of_offsets_have_the_size_that_methods_expect():
    assert len(offset_matrix(3, 4)) * len(offset_matrix(2, 6)) == num_offsets(Grid((4, 6)))

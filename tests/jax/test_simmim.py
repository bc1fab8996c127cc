"""SimMIM: equal to the reference, economical, and reproducible."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise, drop_path_scales, patchify, take_tokens
from prmim_jax import SimMIM, vit
from prmim_jax.interop import named_variables, named_weights
from prmim_methods import SimMIMConfig
from prmim_reference import simmim as reference
from prmim_reference.method import image_patches
from prmim_reference.targets import cell_means, cell_targets, expand_cells

# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (2, 2), 3),
    "signal": ((48,), (3,), 1),
    "volume": ((8, 8, 4), (2, 2, 1), 1),
}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def make_case(make_images, shape="square", batch=3, dtype=np.float32, compute_dtype=None, **options):
    image_size, patch_size, channels = SHAPES[shape]
    options = {**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options}
    method = SimMIM(SimMIMConfig(**options), dtype=compute_dtype)
    method.eval()
    rng = np.random.default_rng(1)
    for variable in named_variables(method).values():
        value = np.asarray(variable[...], dtype)
        is_learned = isinstance(variable, nnx.Param)  # break the symmetries of the initial weights
        noise = (0.1 * rng.normal(size=value.shape)).astype(dtype) if is_learned else 0
        variable.set_value(jnp.asarray(value + noise, dtype))
    images = jnp.asarray(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, jnp.arange(batch), method.num_tokens)


def run(method, images, noise):
    graph, state = nnx.split(method)
    return jax.jit(lambda state, images, noise: nnx.merge(graph, state)(images, noise))(state, images, noise)


def reference_output(method, images, noise, **options):
    ours = {"shape", "position", "scan_blocks"}
    return reference.forward(
        named_weights(method),
        np.asarray(images),
        np.asarray(noise),
        patch_size=method.config.patch_size,
        num_heads=method.config.encoder_size.heads,
        **{"drop_path": 0.0, **{name: value for name, value in options.items() if name not in ours}},
    )


def assert_agrees(output, expected, rtol):
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_array_equal(output.plan.order, expected.order)
    for name in ("predicted", "predicted_cells"):
        predicted, wanted = getattr(output, name), getattr(expected, name)
        if wanted.size == 0:
            assert predicted is None or predicted.size == 0
        else:
            np.testing.assert_allclose(predicted, wanted, rtol=100 * rtol, atol=100 * rtol, err_msg=name)


# More are compared in tests/parity, with the reference as well.
CASES = [
    {"reconstruction": "conv", "throw_by": "unit"},
    {"reconstruction": "interpolate", "position": "absolute"},
    {"throw_ratio": 0.0},
    {"shape": "volume", "throwing": "cell", "throw_by": "unit"},
    {"shape": "signal", "mask_unit": 4, "mask_ratio": 0.5, "throwing": "random"},
    {"furthest_from": "none", "stages": 3, "mask_ratio": 0.75, "throw_ratio": 0.5, "thrown_weight": 0.25},
    {"shape": "volume", "cell_norm": "window", "extra_cells": "known", "extra_cells_weight": 0.5},
    {"thrown_target": "patch", "extra_cells": "decoded", "cells": 1},
]


@pytest.mark.parametrize(
    ("options", "dtype", "rtol"),
    [*((options, np.float64, 1e-10) for options in CASES), ({"reconstruction": "kernel"}, np.float32, 1e-5)],
    ids=lambda value: str(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_loss_is_the_reference_one(make_images, options, dtype, rtol):
    with jax.enable_x64(dtype == np.float64):
        method, images, noise = make_case(make_images, dtype=dtype, **options)
        output = run(method, images, noise)
    assert output.loss.dtype == dtype
    assert_agrees(output, reference_output(method, images, noise, **options), rtol)


@pytest.mark.parametrize(
    ("options", "dtype", "rtol"),
    [
        ({"throw_by": "unit", "scan_blocks": True}, np.float64, 1e-10),
        ({"throw_ratio": 0.0}, np.float32, 1e-5),
    ],
    ids=["scan-float64", "dense-float32"],
)
def test_drop_path_is_the_reference_one_and_of_training_only(make_images, options, dtype, rtol):
    with jax.enable_x64(dtype == np.float64):
        method, images, noise = make_case(make_images, batch=8, dtype=dtype, drop_path=0.5, **options)
        evaluated = run(method, images, noise)
        method.train()
        trained, again = (run(method, images, noise) for _ in range(2))
    assert (drop_path_scales(2, 0.5, noise) == 0).any()
    assert_agrees(evaluated, reference_output(method, images, noise, **options), rtol)
    assert_agrees(trained, reference_output(method, images, noise, **options, drop_path=0.5), rtol)
    assert trained.loss == again.loss != evaluated.loss


def test_whole_images_are_encoded_as_in_the_reference(make_images):
    with jax.enable_x64(True):
        method, images, _ = make_case(make_images, drop_path=0.9, dtype=np.float64)
        method.train()
        encoded, pooled = method.encode(images), method.features(images)
    expected = reference.encode(
        named_weights(method), np.asarray(images), patch_size=method.config.patch_size, num_heads=2
    )
    np.testing.assert_allclose(encoded, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pooled, expected[:, 1:].mean(1), rtol=1e-9, atol=1e-12)


def test_whole_units_are_masked_and_thrown(make_images):
    method, images, noise = make_case(make_images, throw_by="unit")
    plan = run(method, images, noise).plan
    for tokens in (plan.visible, plan.decoded, plan.thrown):
        for image in tokens.tolist():
            units = [(token // 8 // 2, token % 8 // 2) for token in image]
            assert all(units.count(unit) == 4 for unit in units)


@pytest.mark.parametrize(
    ("options", "length"), [({}, 49), ({"throw_by": "unit"}, 49), ({"throw_ratio": 0.0}, 65)], ids=str
)
def test_the_encoder_never_sees_thrown_tokens(make_images, monkeypatch, options, length):
    seen = []
    call = vit.Block.__call__
    monkeypatch.setattr(vit.Block, "__call__", lambda self, x, *more: seen.append(x.shape) or call(self, x, *more))
    method, images, noise = make_case(make_images, **options)
    output = jax.eval_shape(method, images, noise)
    assert set(seen) == {(3, length, 24)}
    num_cells = method.config.counts.thrown
    assert output.predicted.shape == (3, 40 - num_cells, 12)
    assert (output.predicted_cells is None) == (num_cells == 0)
    assert num_cells == 0 or output.predicted_cells.shape == (3, num_cells, 12)


def test_pixels_of_a_perfect_prediction_are_the_image(make_images):
    method, images, noise = make_case(make_images, thrown_target="patch")
    output = run(method, images, noise)
    patches = patchify(images, method.config.patch_size).astype(jnp.float32) / 255
    mean, std = (jnp.tile(jnp.asarray(values), 4) for values in (method.config.pixel_mean, method.config.pixel_std))
    output.predicted = (take_tokens(patches, output.plan.masked) - mean) / std
    np.testing.assert_allclose(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell_norm", ["image", "window", "none"])
def test_pixels_of_perfect_cells_are_their_means(make_images, cell_norm):
    method, images, noise = make_case(make_images, "volume", cell_norm=cell_norm, extra_cells="decoded")
    output, config = run(method, images, noise), method.config
    places = slice(config.cell_places.start, config.cell_places.stop)
    size, cells, targets, cuts = config.patch_size, config.cell_shape, [], []
    for pixels, order in zip(np.asarray(images), output.plan.order.tolist(), strict=True):
        patches = image_patches(pixels, size, config.pixel_mean, config.pixel_std)
        targets.append(cell_targets(patches, order[places], size, config.grid.shape, cells, cell_norm))
        cuts.append(image_patches(pixels, size, [0.0] * config.channels, [1.0] * config.channels))
    assert output.predicted_cells.shape == np.shape(targets)
    output.predicted_cells = jnp.asarray(targets)
    drawn = np.asarray(method.rebuilt_pixels(images, output))
    for found, own, plan in zip(drawn, cuts, output.plan.order.tolist(), strict=True):
        visible, thrown = plan[: config.counts.visible], plan[-config.counts.thrown :]
        np.testing.assert_allclose(found[visible], own[visible], atol=1e-6)
        means = expand_cells(cell_means(own[thrown], size, cells), size, cells)
        np.testing.assert_allclose(found[thrown], means, atol=1e-5)


def test_bfloat16_keeps_residual_stream_and_loss_in_float32(make_images, monkeypatch):
    method, images, noise = make_case(make_images)
    exact = run(method, images, noise)
    lower, *_ = make_case(make_images, compute_dtype=jnp.bfloat16)
    seen = []
    call = vit.Block.__call__
    monkeypatch.setattr(vit.Block, "__call__", lambda self, x, *more: seen.append(x.dtype) or call(self, x, *more))
    rough = run(lower, images, noise)
    assert set(seen) == {jnp.dtype(jnp.float32)}
    assert {rough.loss.dtype, rough.loss_decoded.dtype, rough.loss_thrown.dtype} == {jnp.dtype(jnp.float32)}
    assert rough.predicted.dtype == jnp.bfloat16
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"extra_cells": "known"}, {"throw_ratio": 0.0}, {"reconstruction": "interpolate", "throw_by": "unit"}],
    ids=str,
)
def test_macs_are_those_of_the_formula(options, dot_macs):
    config = SimMIMConfig(image_size=(64, 64), patch_size=(8, 8), depth=2, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: SimMIM(config)))
    images, noise = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8), jax.ShapeDtypeStruct((2, 64), jnp.int32)
    macs = dot_macs(lambda state, *inputs: nnx.merge(graph, state)(*inputs).loss, state, images, noise)
    assert macs == 2 * config.cost().macs


def test_weights_begin_as_in_the_recipe():
    state = named_weights(
        SimMIM(SimMIMConfig(image_size=(32, 32), patch_size=(4, 4), embed_dim=64, depth=3, num_heads=4))
    )
    assert np.abs(state["encoder.patch_embed.proj.weight"]).max() <= 0.02
    assert state["encoder.blocks.0.attn.qkv.weight"].std() == pytest.approx(0.0108, rel=0.03)  # cut at one sigma
    for name in ("attn.proj", "mlp.fc2"):
        first, third = (state[f"encoder.blocks.{number}.{name}.weight"] for number in (0, 2))
        assert np.abs(first).max() <= 0.02 / 2**0.5
        assert np.abs(third).max() <= 0.02 / 6**0.5
        assert third.std() == pytest.approx(first.std() / 3**0.5, rel=0.05)
    for name in ("patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"):
        assert not state[f"encoder.{name}.bias"].any()
    assert (state["encoder.blocks.1.ls2.gamma"] == np.float32(0.1)).all()
    assert not state["encoder.rel_pos_bias.relative_position_bias_table"].any()
    for token in ("cls_token", "mask_token"):
        assert 0.015 < np.abs(state[f"encoder.{token}"]).max() <= 0.02
    assert (state["encoder.cls_token"] != state["encoder.mask_token"]).all()
    for name in ("weight", "bias"):
        assert 0.9 / 8 < np.abs(state[f"head.{name}"]).max() <= 1 / 8


def test_names_follow_vits(tiny_simmim):
    state = named_weights(SimMIM(SimMIMConfig(**tiny_simmim)))
    assert state["encoder.rel_pos_bias.relative_position_bias_table"].shape == (52, 2)
    assert state["encoder.mask_token"].shape == (1, 1, 16)
    assert state["head.weight"].shape == (48, 16)
    assert state["cell_head.weight"].shape == (12, 16)
    part = r"(patch_embed\.proj|norm|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    part += r"|cls_token|mask_token|blocks\.\d\.ls[12]\.gamma|rel_pos_bias\.relative_position_bias_table"
    assert not [
        name for name in state if not re.fullmatch(rf"encoder\.({part})|(cell_)?head\..*|reconstruct\..*", name)
    ]
    assert set(named_weights(SimMIM(SimMIMConfig(**tiny_simmim, scan_blocks=True)))) == set(state)
    assert "encoder.pos_embed" in named_weights(SimMIM(SimMIMConfig(**tiny_simmim, position="absolute")))

"""MAE: equal to the reference, efficient, with clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise, normalize_patches, patchify, take_tokens
from prmim_jax import MAE
from prmim_jax.interop import named_variables, named_weights
from prmim_methods import MAEConfig
from prmim_reference import mae as reference
from prmim_reference.method import image_patches
from prmim_reference.targets import cell_means, cell_targets, expand_cells

# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (4, 4), 3),
    "multispectral": ((8, 16), (2, 4), 4),
    "odd": ((12, 15), (4, 3), 2),
}
SIZES = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}


def make_case(make_images, shape="square", batch=3, dtype=np.float32, compute_dtype=None, **options):
    image_size, patch_size, channels = SHAPES[shape]
    options = {**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options}
    method = MAE(MAEConfig(**options), dtype=compute_dtype)
    rng = np.random.default_rng(1)
    for variable in named_variables(method).values():
        value = variable[...].astype(dtype)
        is_learned = isinstance(variable, nnx.Param)  # break the symmetries of the initial weights
        variable.set_value(value + 0.1 * rng.normal(size=value.shape).astype(dtype) if is_learned else value)
    images = jnp.asarray(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, jnp.arange(batch), method.num_tokens)


def run(method, images, noise):
    graph, state = nnx.split(method)
    return jax.jit(lambda state, images, noise: nnx.merge(graph, state)(images, noise))(state, images, noise)


# The other variants and geometries are compared in tests/parity, with the reference as well.
CASES = [
    {"shape": "multispectral", "reconstruction": "conv"},
    {"throwing": "cell", "stages": 3},
    {"furthest_from": "none", "mask_ratio": 0.6, "throw_ratio": 0.3, "thrown_weight": 0.25, "norm_pix": False},
    {"mask_ratio": 0.5, "throw_ratio": 0.5, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.7)},
    {"thrown_target": "patch"},
    {"shape": "odd", "cell_norm": "window", "extra_cells": "known"},
    {"cell_norm": "none", "cells": 4, "extra_cells": "decoded", "extra_cells_weight": 0.5},
    {"throw_ratio": 0.0, "extra_cells": "known"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_loss_is_the_reference_one(make_images, options):
    with jax.enable_x64(True):
        method, images, noise = make_case(make_images, dtype=np.float64, **options)
        output = run(method, images, noise)
    expected = reference.forward(
        named_weights(method),
        np.asarray(images),
        np.asarray(noise),
        patch_size=method.config.patch_size,
        num_heads=method.config.encoder_size.heads,
        decoder_heads=method.config.decoder_heads,
        **{key: value for key, value in options.items() if key != "shape"},
    )
    assert output.loss.dtype == jnp.float64
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name), rel=1e-10), name
    np.testing.assert_array_equal(output.plan.order, expected.order)
    for name in ("predicted", "predicted_cells"):
        predicted, wanted = getattr(output, name), getattr(expected, name)
        if wanted.size == 0:
            assert predicted is None or predicted.size == 0
        else:
            np.testing.assert_allclose(predicted, wanted, rtol=1e-8, atol=1e-8, err_msg=name)


def test_features_are_the_reference_ones(make_images):
    with jax.enable_x64(True):
        method, images, _ = make_case(make_images, dtype=np.float64)
        expected = reference.encode(
            named_weights(method), np.asarray(images), patch_size=method.config.patch_size, num_heads=2
        )
        np.testing.assert_allclose(method.encode(images), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(method.features(images), expected[:, 1:].mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(method.features(images, "cls"), expected[:, 0], rtol=1e-9, atol=1e-12)


def change_token(images, method, token):
    """Return the images with all pixels of one token of image 0 inverted."""
    config = method.config
    mask = np.zeros((1, config.grid.num_tokens, config.patch_dim), np.uint8)
    mask[0, token] = 255
    height, width = config.grid.shape
    cut = mask.reshape(height, width, *config.patch_size, 3).transpose(0, 2, 1, 3, 4).reshape(images[0].shape)
    return jnp.concatenate([images[:1] ^ cut, images[1:]])


def test_a_patch_is_seen_by_what_it_should_be_seen_by(make_images):
    method, images, noise = make_case(make_images, cell_norm="none")
    before = run(method, images, noise)
    for kind, other in (("decoded", "thrown"), ("thrown", "decoded")):
        after = run(method, change_token(images, method, int(getattr(before.plan, kind)[0, 2])), noise)
        np.testing.assert_array_equal(after.predicted, before.predicted)
        np.testing.assert_array_equal(after.predicted_cells, before.predicted_cells)
        assert getattr(after, f"loss_{other}") == getattr(before, f"loss_{other}")
        assert getattr(after, f"loss_{kind}") != getattr(before, f"loss_{kind}")
    after = run(method, change_token(images, method, int(before.plan.visible[0, 2])), noise)
    assert (after.predicted[0] != before.predicted[0]).any()
    np.testing.assert_array_equal(after.predicted[1:], before.predicted[1:])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixels_of_a_perfect_prediction_are_the_image(make_images, norm_pix):
    method, images, noise = make_case(make_images, norm_pix=norm_pix, thrown_target="patch")
    output = run(method, images, noise)
    patches = patchify(images, method.config.patch_size).astype(jnp.float32) / 255
    mean, std = (jnp.tile(jnp.asarray(values), 16) for values in (method.config.pixel_mean, method.config.pixel_std))
    truth = (take_tokens(patches, output.plan.masked) - mean) / std
    output.predicted = normalize_patches(truth) if norm_pix else truth
    np.testing.assert_allclose(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell_norm", ["image", "window", "none"])
def test_pixels_of_perfect_cells_are_their_means(make_images, cell_norm):
    method, images, noise = make_case(make_images, "odd", cell_norm=cell_norm, extra_cells="decoded")
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


def test_pixels_without_prediction_are_nan(make_images):
    method, images, noise = make_case(make_images, reconstruction="none")
    output = run(method, images, noise)
    is_nan = np.isnan(method.rebuilt_pixels(images, output))
    for image in range(3):
        assert np.flatnonzero(is_nan[image].all(-1)).tolist() == sorted(output.plan.thrown[image].tolist())
        assert is_nan[image].any(-1).sum() == 8


def test_pixels_if_all_masked_tokens_are_thrown(make_images):
    method, images, noise = make_case(make_images, mask_ratio=0.5, throw_ratio=0.5)
    assert np.isfinite(method.rebuilt_pixels(images, run(method, images, noise))).all()


@pytest.mark.parametrize("cell_norm", ["image", "window"])
def test_bfloat16_keeps_targets_and_loss_in_float32(make_images, monkeypatch, cell_norm):
    options = {"cell_norm": cell_norm, "extra_cells": "decoded"}
    method, images, noise = make_case(make_images, **options)
    exact = run(method, images, noise)
    lower, *_ = make_case(make_images, compute_dtype=jnp.bfloat16, **options)
    targets, error = [], MAE._error
    monkeypatch.setattr(MAE, "_error", lambda self, rough, to: targets.append(to.dtype) or error(self, rough, to))
    rough = run(lower, images, noise)
    assert targets == [jnp.float32] * 2
    assert {rough.loss.dtype, rough.loss_thrown.dtype, rough.loss_cells.dtype} == {jnp.dtype(jnp.float32)}
    assert rough.predicted.dtype == rough.predicted_cells.dtype == jnp.bfloat16
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert float(getattr(rough, name)) == pytest.approx(float(getattr(exact, name)), rel=0.02), name


@pytest.mark.parametrize(
    "options", [{"extra_cells": "known"}, {"throw_ratio": 0.0}, {"reconstruction": "interpolate"}], ids=str
)
def test_macs_are_those_of_the_formula(options, dot_macs):
    method = MAE(MAEConfig(**SIZES, image_size=(16, 32), patch_size=(4, 4), **options))
    graph, state = nnx.split(method)
    images, noise = jnp.zeros((2, 16, 32, 3), jnp.uint8), jnp.zeros((2, 32), jnp.int32)
    assert dot_macs(lambda state: nnx.merge(graph, state)(images, noise).loss, state) == 2 * method.config.cost().macs


def test_flops_of_vit_base_are_those_of_the_formula():
    """XLA counts two operations per MAC, plus additions, norms and exponentials."""
    flops, macs = {}, {}
    for name, options in {"dense": {"throw_ratio": 0.0}, "PR-MIM": {}}.items():
        config = MAEConfig(**options)
        graph, state = nnx.split(nnx.eval_shape(lambda config=config: MAE(config)))
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
        noise = jax.ShapeDtypeStruct((1, 196), jnp.int32)
        forward = jax.jit(lambda state, *inputs, graph=graph: nnx.merge(graph, state)(*inputs).loss)
        flops[name] = forward.lower(state, images, noise).compile().cost_analysis()["flops"]
        macs[name] = config.cost().macs
        assert 2 * macs[name] <= flops[name] <= 1.03 * 2 * macs[name]
    assert macs["dense"] <= 9.70e9
    assert macs["PR-MIM"] <= 6.95e9
    assert flops["PR-MIM"] / flops["dense"] == pytest.approx(macs["PR-MIM"] / macs["dense"], rel=0.005)


def test_names_follow_vits(tiny):
    method = MAE(MAEConfig(**tiny))
    state = named_weights(method)
    assert state["encoder.patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert state["encoder.pos_embed"].shape == (1, 17, 16)
    assert state["encoder.blocks.0.attn.qkv.weight"].shape == (48, 16)
    assert state["decoder.pred.bias"].shape == (48,)
    assert state["cell_head.weight"].shape == (12, 8)
    assert state["reconstruct.table"].shape == (4, 49)
    learned = {name for name, v in named_variables(method).items() if isinstance(v, nnx.Param)}
    assert set(named_variables(method)) - learned == {"encoder.pos_embed", "decoder.pos_embed"}


@pytest.mark.parametrize("options", [{"thrown_weight": 0}, {"throw_ratio": 0}, {"reconstruction": "none"}], ids=str)
def test_without_reconstruction_there_are_no_parameters_of_it(tiny, options):
    method = MAE(MAEConfig(**tiny, **options))
    assert not [name for name in named_weights(method) if name.startswith(("reconstruct", "cell_head"))]
    assert method.architecture()["reconstruction"] == "none"


@pytest.mark.parametrize(
    ("images", "noise", "error", "message"),
    [
        (jnp.zeros((2, 16, 16, 3)), None, TypeError, "images: expected uint8, got float32"),
        (
            jnp.zeros((2, 3, 16, 16), jnp.uint8),
            None,
            ValueError,
            r"images: expected shape \(batch, 16, 16, 3\), got \(2, 3, 16, 16\)",
        ),
        (None, jnp.zeros((2, 9), jnp.int32), ValueError, r"noise: expected shape \(2, 16\), got \(2, 9\)"),
        (None, jnp.zeros((3, 16), jnp.int32), ValueError, r"noise: expected shape \(2, 16\), got \(3, 16\)"),
        (None, jnp.zeros((2, 16)) > 0, TypeError, "noise: expected integers or real numbers, got bool"),
        (
            jnp.zeros((0, 16, 16, 3), jnp.uint8),
            jnp.zeros((0, 16), jnp.int32),
            ValueError,
            "images: expected at least one image, got an empty batch",
        ),
    ],
)
def test_wrong_inputs(tiny, images, noise, error, message):
    images = jnp.zeros((2, 16, 16, 3), jnp.uint8) if images is None else images
    noise = jnp.zeros((2, 16), jnp.int32) if noise is None else noise
    with pytest.raises(error, match=f"^{message}$"):
        MAE(MAEConfig(**tiny))(images, noise)


def test_unknown_pool(tiny):
    with pytest.raises(ValueError, match=r"^pool: expected 'mean' or 'cls', got 'max'$"):
        MAE(MAEConfig(**tiny)).features(jnp.zeros((1, 16, 16, 3), jnp.uint8), pool="max")


def test_outputs_of_another_method_are_refused(tiny, make_images):
    images, noise = jnp.asarray(make_images(2, 16, 16, 3)), counter_noise(0, 0, jnp.arange(2), 16)
    other = MAE(MAEConfig(**tiny, stages=1))
    graph, state = nnx.split(other)
    output = jax.jit(lambda state: nnx.merge(graph, state)(images, noise))(state)
    message = r"^output: expected one of this method, got one with the plan of Schedule\(.*stages=1"
    with pytest.raises(ValueError, match=message):
        MAE(MAEConfig(**tiny)).rebuilt_pixels(images, output)

"""The masked autoencoder: equal to the reference, economical, and clear about wrong options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise, normalize_patches, patchify, take_tokens
from prmim_jax import MAE
from prmim_jax.interop import named_variables
from prmim_jax.vit import set_compute_dtype
from prmim_reference import mae as reference

# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (4, 4), 3),
    "multispectral": ((8, 16), (2, 4), 4),
}
SIZES = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}


def make_case(make_images, shape="square", batch=3, dtype=np.float32, **options):
    image_size, patch_size, channels = SHAPES[shape]
    method = MAE(**{**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options})
    rng = np.random.default_rng(1)
    for variable in named_variables(method).values():
        value = variable[...].astype(dtype)
        is_learned = isinstance(variable, nnx.Param)  # away from the symmetries of the first values
        variable.set_value(value + 0.1 * rng.normal(size=value.shape).astype(dtype) if is_learned else value)
    images = jnp.asarray(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, jnp.arange(batch), method.grid.num_tokens)


def run(method, images, noise):
    graph, state = nnx.split(method)
    return jax.jit(lambda state, images, noise: nnx.merge(graph, state)(images, noise))(state, images, noise)


def weights_of(method):
    return {name: np.asarray(variable[...]) for name, variable in named_variables(method).items()}


# The other variants and geometries are compared in tests/parity, with the reference as well.
CASES = [
    {"shape": "multispectral", "variant": "conv"},
    {"throwing": "cell", "stages": 3},
    {"seed": "none", "mask_ratio": 0.6, "throw_ratio": 0.3, "thrown_weight": 0.25, "norm_pix": False},
    {"mask_ratio": 0.5, "throw_ratio": 0.5, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.7)},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_loss_is_the_reference_one(make_images, options):
    with jax.enable_x64(True):
        method, images, noise = make_case(make_images, dtype=np.float64, **options)
        output = run(method, images, noise)
    expected = reference.forward(
        weights_of(method),
        np.asarray(images),
        np.asarray(noise),
        patch_size=method.patch_size,
        num_heads=method.num_heads,
        decoder_heads=method.decoder_heads,
        **{key: value for key, value in options.items() if key != "shape"},
    )
    assert output.loss.dtype == jnp.float64
    for name in ("loss", "loss_decoded", "loss_thrown"):
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name), rel=1e-10), name
    np.testing.assert_array_equal(output.plan.order, expected.order)
    np.testing.assert_allclose(output.predicted, expected.predicted, rtol=1e-8, atol=1e-8)


def test_features_are_the_reference_ones(make_images):
    with jax.enable_x64(True):
        method, images, _ = make_case(make_images, dtype=np.float64)
        expected = reference.encode(
            weights_of(method), np.asarray(images), patch_size=method.patch_size, num_heads=method.num_heads
        )
        np.testing.assert_allclose(method.encode(images), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(method.features(images), expected[:, 1:].mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(method.features(images, "cls"), expected[:, 0], rtol=1e-9, atol=1e-12)


def change_token(images, method, token):
    """Return the images with all pixels of one token of image 0 inverted."""
    mask = np.zeros((1, method.grid.num_tokens, method.patch_dim), np.uint8)
    mask[0, token] = 255
    height, width = method.grid.shape
    cut = mask.reshape(height, width, *method.patch_size, 3).transpose(0, 2, 1, 3, 4).reshape(images[0].shape)
    return jnp.concatenate([images[:1] ^ cut, images[1:]])


def test_a_patch_is_seen_by_what_it_should_be_seen_by(make_images):
    method, images, noise = make_case(make_images)
    before = run(method, images, noise)
    for kind, other in (("decoded", "thrown"), ("thrown", "decoded")):
        after = run(method, change_token(images, method, int(getattr(before.plan, kind)[0, 2])), noise)
        np.testing.assert_array_equal(after.predicted, before.predicted)
        assert getattr(after, f"loss_{other}") == getattr(before, f"loss_{other}")
        assert getattr(after, f"loss_{kind}") != getattr(before, f"loss_{kind}")
    after = run(method, change_token(images, method, int(before.plan.visible[0, 2])), noise)
    assert (after.predicted[0] != before.predicted[0]).any()
    np.testing.assert_array_equal(after.predicted[1:], before.predicted[1:])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixels_of_a_perfect_prediction_are_the_image(make_images, norm_pix):
    method, images, noise = make_case(make_images, norm_pix=norm_pix)
    output = run(method, images, noise)
    patches = patchify(images, method.patch_size).astype(jnp.float32) / 255
    mean, std = (jnp.tile(jnp.asarray(values), 16) for values in (method.mean, method.std))
    truth = (take_tokens(patches, output.plan.masked) - mean) / std
    output.predicted = normalize_patches(truth) if norm_pix else truth
    np.testing.assert_allclose(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


def test_pixels_without_prediction_are_nan(make_images):
    method, images, noise = make_case(make_images, variant="none")
    output = run(method, images, noise)
    is_nan = np.isnan(method.rebuilt_pixels(images, output))
    for image in range(3):
        assert np.flatnonzero(is_nan[image].all(-1)).tolist() == sorted(output.plan.thrown[image].tolist())
        assert is_nan[image].any(-1).sum() == 8


def test_bfloat16_keeps_the_loss_in_float32(make_images):
    method, images, noise = make_case(make_images)
    exact = run(method, images, noise)
    set_compute_dtype(method, jnp.bfloat16)
    rough = run(method, images, noise)
    assert rough.loss.dtype == jnp.float32
    assert rough.predicted.dtype == jnp.bfloat16
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"throwing": "none"}, {"variant": "interpolate"}], ids=str)
def test_macs_are_those_of_the_formula(options, dot_macs):
    method = MAE(**SIZES, image_size=(16, 32), patch_size=(4, 4), **options)
    graph, state = nnx.split(method)
    images, noise = jnp.zeros((2, 16, 32, 3), jnp.uint8), jnp.zeros((2, 32), jnp.int32)
    lowered = jax.jit(lambda state: nnx.merge(graph, state)(images, noise).loss).lower(state)
    assert dot_macs(lowered) == 2 * method.cost().macs


def test_flops_of_vit_base_are_those_of_the_formula():
    """XLA counts two operations per MAC; additions, norms and exponentials come on top."""
    flops, macs = {}, {}
    for name, options in {"dense": {"throwing": "none"}, "PR-MIM": {}}.items():
        graph, state = nnx.split(nnx.eval_shape(lambda options=options: MAE(**options)))
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
        noise = jax.ShapeDtypeStruct((1, 196), jnp.int32)
        forward = jax.jit(lambda state, *inputs, graph=graph: nnx.merge(graph, state)(*inputs).loss)
        flops[name] = forward.lower(state, images, noise).compile().cost_analysis()["flops"]
        macs[name] = nnx.merge(graph, state).cost().macs
        assert 2 * macs[name] <= flops[name] <= 1.03 * 2 * macs[name]
    assert macs["dense"] <= 9.70e9
    assert macs["PR-MIM"] <= 7.00e9
    assert flops["PR-MIM"] / flops["dense"] == pytest.approx(macs["PR-MIM"] / macs["dense"], rel=0.005)


def test_names_follow_vits(tiny):
    state = weights_of(MAE(**tiny))
    assert state["encoder.patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert state["encoder.pos_embed"].shape == (1, 17, 16)
    assert state["encoder.blocks.0.attn.qkv.weight"].shape == (48, 16)
    assert state["decoder.pred.bias"].shape == (48,)
    assert state["reconstruct.table"].shape == (4, 49)
    learned = {name for name, v in named_variables(MAE(**tiny)).items() if isinstance(v, nnx.Param)}
    assert set(state) - learned == {"encoder.pos_embed", "decoder.pos_embed"}


@pytest.mark.parametrize("options", [{"throwing": "none"}, {"throw_ratio": 0}, {"variant": "none"}], ids=str)
def test_without_reconstruction_there_are_no_parameters_of_it(tiny, options):
    method = MAE(**tiny, **options)
    assert not [name for name in weights_of(method) if name.startswith("reconstruct")]
    assert method.architecture()["variant"] == "none"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": (16, 18)}, ValueError, r"patch_size: expected sizes that divide the image \(16, 18\), got .*"),
        ({"image_size": (16,)}, ValueError, r"patch_size: expected sizes that divide the image \(16,\), got .*"),
        ({"image_size": (16, 0)}, ValueError, r"image_size: expected positive integers, got \(16, 0\)"),
        ({"image_size": 16}, TypeError, "image_size: expected integers, got 16"),
        ({"patch_size": (4.0, 4)}, TypeError, r"patch_size: expected integers, got \(4.0, 4\)"),
        ({"channels": 0}, ValueError, r"channels: expected positive integers, got \(0,\)"),
        ({"mask_ratio": 1.5}, ValueError, r"mask_ratio: expected a number in \[0, 1\], got 1.5"),
        ({"mask_ratio": 1}, ValueError, r"mask_ratio: expected a number in \[0, 1\), got 1"),
        ({"mask_ratio": "0.75"}, TypeError, r"mask_ratio: expected a number in \[0, 1\], got '0.75'"),
        ({"mask_ratio": 0.97}, ValueError, "mask_ratio: expected a ratio that leaves a visible token of 16, got 0.97"),
        (
            {"mask_ratio": 0, "throw_ratio": 0},
            ValueError,
            "mask_ratio: expected a ratio that masks a token of 16, got 0",
        ),
        ({"throw_ratio": 0.8}, ValueError, "throw_ratio: expected at most mask_ratio 0.75, got 0.8"),
        ({"throw_ratio": -0.1}, ValueError, r"throw_ratio: expected a number in \[0, 1\], got -0.1"),
        (
            {"throw_ratio": 0.75, "variant": "none"},
            ValueError,
            "throw_ratio: expected at least one supervised token, .*",
        ),
        (
            {"throw_ratio": 0.75, "thrown_weight": 0},
            ValueError,
            "throw_ratio: expected at least one supervised token, .*",
        ),
        ({"thrown_weight": -1}, ValueError, "thrown_weight: expected a number of at least 0, got -1"),
        ({"thrown_weight": "1"}, TypeError, "thrown_weight: expected a number, got '1'"),
        (
            {"throwing": "weighted"},
            ValueError,
            "throwing: expected one of furthest, random, cell, none, got 'weighted'",
        ),
        ({"variant": "spline"}, ValueError, "variant: expected one of kernel, interpolate, conv, none, got 'spline'"),
        ({"seed": "all", "throwing": "none"}, ValueError, "seed: expected one of visible, none, got 'all'"),
        ({"seed": "all"}, ValueError, "seed: expected one of visible, none, got 'all'"),
        ({"stages": 0}, ValueError, "stages: expected at least 1, got 0"),
        ({"model": "vit_gigantic"}, ValueError, "model: expected one of vit_tiny, .*, got 'vit_gigantic'"),
        ({"num_heads": 5}, ValueError, "embed_dim: expected a positive multiple of the number of heads, got 16 for 5"),
        (
            {"decoder_heads": 3},
            ValueError,
            "decoder_dim: expected a positive multiple of the number of heads, got 8 for 3",
        ),
        (
            {"decoder_dim": 6, "decoder_heads": 3, "variant": "conv"},
            ValueError,
            "decoder_dim: expected a multiple of 4 for a grid of 2 axes, got 6",
        ),
        (
            {"image_size": (16,), "patch_size": (4,), "decoder_dim": 6},
            ValueError,
            "decoder_dim: expected a multiple of 4 for variant 'kernel', got 6",
        ),
        ({"scan_blocks": 1}, TypeError, "scan_blocks: expected True or False, got 1"),
        ({"init_seed": "0"}, TypeError, "init_seed: expected an integer, got '0'"),
        ({"mean": (0.5,)}, ValueError, r"mean: expected 3 numbers, one per channel, got \(0.5,\)"),
        ({"std": (0.5, 0, 1)}, ValueError, r"std: expected positive numbers, got \(0.5, 0, 1\)"),
        (
            {"image_size": (4, 4), "patch_size": (1, 1), "channels": 1},
            ValueError,
            "norm_pix: expected patches of at least 2 values to normalise them, got patches of 1",
        ),
    ],
    ids=str,
)
def test_wrong_options(tiny, options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        MAE(**{**tiny, **options})


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
        (None, jnp.zeros((2, 16)), TypeError, "noise: expected integers, got float32"),
    ],
)
def test_wrong_inputs(tiny, images, noise, error, message):
    images = jnp.zeros((2, 16, 16, 3), jnp.uint8) if images is None else images
    noise = jnp.zeros((2, 16), jnp.int32) if noise is None else noise
    with pytest.raises(error, match=f"^{message}$"):
        MAE(**tiny)(images, noise)


def test_unknown_pool(tiny):
    with pytest.raises(ValueError, match=r"^pool: expected 'mean' or 'cls', got 'max'$"):
        MAE(**tiny).features(jnp.zeros((1, 16, 16, 3), jnp.uint8), pool="max")

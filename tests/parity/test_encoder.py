"""Encoders alone: the same features in both adapters and in the method."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import prmim_jax
import prmim_torch
from prmim_methods import TrainingConfig, create_config
from prmim_methods.encoder import EncoderConfig
from prmim_methods.weight_files import dump_architecture
from prmim_torch.interop import named_weights, write_weights

SIZES = {"image_size": (8, 8), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
METHODS = {
    "absolute": ("mae", DECODER),
    "learned": ("mae", {**DECODER, "position": "learned", "class_tokens": 2}),
    "relative": ("simmim", {"mask_unit": 1}),
    "raster": ("videomae", {**DECODER, "image_size": (2, 8, 8), "patch_size": (1, 4, 4)}),
}
GENERATOR = np.random.default_rng(0)


def draw(shape):
    return GENERATOR.integers(0, 256, (2, *shape, 3), np.uint8)


@pytest.fixture(params=METHODS)
def method(request):
    """Return a PyTorch method with random weights, also where they start at zero."""
    name, given = METHODS[request.param]
    made = prmim_torch.METHODS[name](create_config(name, **{**SIZES, **given})).eval()
    torch.manual_seed(0)
    for key, parameter in made.named_parameters():
        if "relative_position" in key or "gamma" in key:
            torch.nn.init.normal_(parameter)
    return made


def run(encoder, images, *call):
    return encoder(torch.from_numpy(images), *call).numpy()


def test_features_are_those_of_the_method(method, tmp_path):
    path = tmp_path / "weights.safetensors"
    prmim_torch.save_weights(method, path)
    images = draw(method.config.image_size)
    encoder, pixels = prmim_torch.load_encoder(path), torch.from_numpy(images)
    with torch.no_grad():
        assert np.array_equal(run(encoder, images), method.features(pixels).numpy())
        assert np.array_equal(run(encoder, images, None), method.encode(pixels).numpy())
        inner, patches = method.encoder, method._normalize(method._patches(pixels))
        states = inner.hidden_states(inner.place(inner.patch_embed(patches)))
        assert np.array_equal(run(encoder, images, "mean", 1), states[1][:, inner.class_tokens :].mean(1).numpy())
        if inner.class_tokens:
            assert np.array_equal(run(encoder, images, "cls"), method.features(pixels, "cls").numpy())
    floats = run(encoder, images / np.float32(255))
    np.testing.assert_allclose(floats, run(encoder, images), rtol=0, atol=1e-5)


def test_images_of_another_size_have_the_same_features_in_both_adapters(method, tmp_path):
    path = tmp_path / "weights.safetensors"
    prmim_torch.save_weights(method, path)
    size = (*method.config.image_size[:-2], 12, 16)
    images = draw(size)
    here = prmim_torch.load_encoder(path, image_size=size)
    larger = type(method)(replace(method.config, image_size=size)).eval()
    prmim_torch.load_weights(larger, path, resize=True)
    with torch.no_grad():
        assert np.array_equal(run(here, images), larger.features(torch.from_numpy(images)).numpy())
    with pytest.raises(ValueError, match=r"^weights: image_size: expected \[.*12, 16\], got \[.*8, 8\]$"):
        prmim_torch.load_weights(larger, path)
    there = prmim_jax.load_encoder(path, image_size=size, device="cpu")
    calls = [("mean", None), (None, 1)]
    program = nnx.jit(lambda encoder, images: [encoder(images, *call) for call in calls])
    for call, theirs in zip(calls, program(there, jnp.asarray(images)), strict=True):
        np.testing.assert_allclose(theirs, run(here, images, *call), rtol=0, atol=1e-5)


@pytest.mark.parametrize("package", [prmim_torch, prmim_jax])
def test_a_file_of_an_encoder_alone_and_the_engine(package, tmp_path):
    path = tmp_path / "encoder.safetensors"
    config = EncoderConfig(**SIZES, position="learned", layer_scale=0.1)
    torch.manual_seed(1)
    write_weights(named_weights(prmim_torch.ImageEncoder(config)), dump_architecture(config), path)
    encoder = package.load_encoder(path)
    assert encoder.config.architecture() == config.architecture()
    images = draw((8, 8))
    array = torch.from_numpy(images) if package is prmim_torch else images
    expected = np.asarray(encoder(array, "cls", 2))
    engine = package.EncoderEngine(config, TrainingConfig(device="cpu", precision="float32"), path)
    np.testing.assert_allclose(engine.features(images, "cls", 2), expected, rtol=0, atol=1e-6)
    assert (engine.rank, engine.world_size, engine.any(True)) == (0, 1, True)
    engine.close()


@pytest.mark.parametrize("package", [prmim_torch, prmim_jax])
def test_the_engine_of_a_new_method_has_its_initial_weights(package):
    config = create_config("simmim", **SIZES, mask_unit=1)
    engine = package.EncoderEngine(config, TrainingConfig(device="cpu", precision="float32"), None, (12, 12))
    method = package.METHODS["simmim"](config)
    weights = (prmim_torch.interop if package is prmim_torch else prmim_jax.interop).named_weights
    found, expected = (weights(module) for module in (engine.module, method))
    for name in ("encoder.cls_token", "encoder.blocks.1.attn.qkv.weight", "encoder.blocks.0.ls1.gamma"):
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))
    assert np.shape(found["encoder.rel_pos_bias.relative_position_bias_table"]) == (28, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda e: e(torch.zeros(1, 8, 8, 3, dtype=torch.int64)),
            TypeError,
            "images: expected .*uint8, got torch.int64",
        ),
        (lambda e: e(torch.zeros(1, 8, 9, 3)), ValueError, r"images: expected shape \(batch, 8, 8, 3\), got .*"),
        (lambda e: e(torch.zeros(1, 8, 8, 3), "max"), ValueError, "pool: expected 'mean' or 'cls', got 'max'"),
        (lambda e: e(torch.zeros(1, 8, 8, 3), "cls"), ValueError, "pool: expected 'mean' for an encoder without .*"),
        (lambda e: e(torch.zeros(1, 8, 8, 3), layer=3), ValueError, "layer: expected 0 to 2, the number of blocks, .*"),
        (lambda e: e(torch.zeros(1, 8, 8, 3), layer=-1), ValueError, "layer: expected 0 to 2, .*, got -1"),
    ],
)
def test_wrong_calls(call, error, message):
    encoder = prmim_torch.ImageEncoder(EncoderConfig(**SIZES, class_tokens=0))
    with pytest.raises(error, match=f"^{message}$"):
        call(encoder)


@pytest.mark.parametrize("package", [prmim_torch, prmim_jax])
def test_wrong_files(package, tmp_path):
    path = tmp_path / "weights.safetensors"
    config = EncoderConfig(**SIZES)
    weights = named_weights(prmim_torch.ImageEncoder(config))
    with pytest.raises(FileNotFoundError, match=r"^path: expected a file of weights or the folder of a run, got"):
        package.load_encoder(path)
    write_weights(weights, {"format": "pt"}, path)
    with pytest.raises(ValueError, match=r"^path: expected weights written by prmim, got .* without an architecture$"):
        package.load_encoder(path)
    write_weights(weights, dump_architecture(config), path)
    with pytest.raises(ValueError, match=r"^image_size: expected multiples of the patch size 4 x 4, got 10 x 10$"):
        package.load_encoder(path, image_size=10)
    write_weights(weights, dump_architecture(EncoderConfig(**{**SIZES, "depth": 2**31 - 1})), path)
    with pytest.raises(ValueError, match=r"^path: expected the weights of an encoder, got [\d,]* values in "):
        package.load_encoder(path)
    weights["encoder.norm.scale"] = weights.pop("encoder.norm.bias")
    write_weights(weights, dump_architecture(config), path)
    with pytest.raises(ValueError, match=r"^path: expected a tensor 'encoder.norm.bias', got none in "):
        package.load_encoder(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"^path: expected a safetensors file, got "):
        package.load_encoder(path)

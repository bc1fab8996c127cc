"""Weights of other code: formats, sizes, and what is refused."""

import json

import numpy as np
import pytest

from prmim_methods import MAEConfig
from prmim_methods.encoder import EncoderConfig
from prmim_methods.foreign import Checkpoint, convert
from prmim_methods.foreign_formats import encoder_shapes
from prmim_methods.layouts import BEIT, PIXIO, TIMM, TIMM_RELATIVE, VIT, to_library
from prmim_methods.positions import sincos_table
from prmim_methods.weight_files import METADATA_KEY

DIM, DEPTH = 16, 2


def vit(**changes):
    """Return a small ViT by timm's names."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, DIM), "pos_embed": (1, 17, DIM), "patch_embed.proj.weight": (DIM, 3, 4, 4)}
    shapes |= {"patch_embed.proj.bias": (DIM,), "norm.weight": (DIM,), "norm.bias": (DIM,)}
    layers = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
    for block in range(DEPTH):
        for name, shape in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        shapes |= {
            f"blocks.{block}.{norm}.{part}": (DIM,) for norm in ("norm1", "norm2") for part in ("weight", "bias")
        }
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def read(arrays, config=None, preprocessing=None, **given):
    checkpoint = Checkpoint("there", arrays, config=config or {}, preprocessing=preprocessing or {})
    return convert(checkpoint, **{"num_heads": 2, **given})


def test_sizes_follow_from_the_shapes():
    found = read(vit(pos_embed=sincos_table((4, 4), DIM)))
    expected = MAEConfig(embed_dim=DIM, depth=DEPTH, num_heads=2, image_size=(16, 16), patch_size=(4, 4))
    assert found.architecture == expected.encoder_architecture()
    assert found.format == "ViT (timm's names)"
    assert found.notes == ("mean and std of pixels: those of ImageNet assumed",)
    assert found.weights["encoder.blocks.1.attn.qkv.bias"].shape == (3 * DIM,)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.", "backbone.", "model.encoder."])
def test_prefixes_of_wrappers_are_removed(prefix):
    found = read({prefix + name: array for name, array in vit().items()})
    np.testing.assert_array_equal(found.weights["encoder.cls_token"], vit()["cls_token"])


def test_a_head_outside_the_encoder_is_left_out():
    arrays = {f"backbone.{name}": array for name, array in vit().items()}
    found = read({**arrays, "head.weight": np.zeros((2, DIM), np.float32)})
    assert found.notes[-1] == "left out: head.weight"


@pytest.mark.parametrize(
    ("changes", "given", "fields"),
    [
        ({}, {}, {"image_size": [16, 16], "position": "learned"}),
        ({"pos_embed": np.ones((1, 33, DIM))}, {"image_size": (32, 16)}, {"image_size": [32, 16]}),
        ({"cls_token": np.ones((1, 2, DIM)), "pos_embed": np.ones((1, 18, DIM))}, {}, {"class_tokens": 2}),
        ({"cls_token": None, "pos_embed": np.ones((1, 16, DIM))}, {}, {"class_tokens": 0}),
        ({"pos_embed": np.ones((1, 16, DIM))}, {}, {"image_size": [16, 16]}),
        (
            {"pos_embed": None, "rel_pos_bias.relative_position_bias_table": np.ones((52, 2))},
            {"num_heads": None},
            {"position": "relative", "num_heads": 2},
        ),
        ({f"blocks.{b}.ls{n}.gamma": np.ones(DIM) for b in (0, 1) for n in (1, 2)}, {}, {"layer_scale": True}),
        ({f"blocks.{b}.gamma_{n}": np.ones(DIM) for b in (0, 1) for n in (1, 2)}, {}, {"layer_scale": True}),
    ],
    ids=["plain", "not square", "class tokens", "none", "without a position", "relative", "layer scale", "gamma"],
)
def test_variants_of_encoders(changes, given, fields):
    found = read(vit(**changes), **given)
    assert {name: found.architecture[name] for name in fields} == fields
    if "cls_token" not in changes and changes.get("pos_embed") is not None and changes["pos_embed"].shape[1] == 16:
        assert not found.weights["encoder.pos_embed"][0, 0].any()


def test_statistics_of_pixels_and_heads_of_the_configuration_count():
    preprocessing = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    found = read(vit(), {"num_attention_heads": 4, "image_size": 16}, preprocessing)
    assert found.architecture["mean"] == [0.5] * 3
    assert found.architecture["num_heads"] == 4
    assert found.notes == ()
    found = read(vit(), {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}})
    assert found.architecture["mean"] == [0.1, 0.2, 0.3]


def test_keys_without_a_bias_get_one_of_zeros():
    arrays, q, v = vit(), np.full(DIM, 2.0), np.full(DIM, 3.0)
    for block in range(DEPTH):
        del arrays[f"blocks.{block}.attn.qkv.bias"]
    found = read(arrays)
    assert not found.weights["encoder.blocks.0.attn.qkv.bias"].any()
    assert "biases of queries, keys and values: not in the source; filled with zeros" in found.notes
    arrays |= {f"blocks.{b}.attn.{part}_bias": bias for b in (0, 1) for part, bias in (("q", q), ("v", v))}
    expected = np.concatenate([q, np.zeros(DIM), v])
    np.testing.assert_array_equal(read(arrays).weights["encoder.blocks.1.attn.qkv.bias"], expected)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"norm.bias": None}, {}, "source: expected the tensors of ViT in there, got missing: encoder.norm.bias"),
        ({"a": np.ones(1)}, {}, "source: expected the tensors of ViT in there, got unexpected: a"),
        (
            {f"blocks.0.attn.{name}": np.ones(1) for name in "abcd"},
            {},
            r"source: .* got unexpected: blocks.0.attn.a, blocks.0.attn.b, blocks.0.attn.c and 1 more",
        ),
        (
            {"blocks.0.mlp.fc1.weight": np.ones((DIM, DIM)), "norm.weight": None},
            {},
            r"source: .* missing: encoder.norm.weight; mismatched: encoder.blocks.0.mlp.fc1.weight \(16, 16\) .*",
        ),
        (
            {"norm.bias": np.full(DIM, np.nan)},
            {},
            "source: expected finite numbers, got others in 'norm.bias' of there",
        ),
        (
            {"norm.bias": np.ones(DIM, np.int64)},
            {},
            "source: expected floating-point values, got int64 in encoder.norm.*",
        ),
        (
            {},
            {"num_heads": None},
            "num_heads: expected the attention heads of the encoder, which the weights do not .*",
        ),
        ({}, {"num_heads": 3}, "embed_dim: expected a multiple of num_heads 3, got 16"),
        ({"pos_embed": None}, {}, "source: expected a table of positions, or a relative position bias .*, got neither"),
        (
            {"pos_embed": np.ones((1, 21, DIM))},
            {},
            "image_size: expected the size of images of 20 patches of 4 x 4, which the weights do not determine, .*",
        ),
        ({}, {"config": {"image_size": 32}}, "image_size: expected images of 16 or 17 patches .*json, got 32"),
        ({}, {"config": {"hidden_act": "relu"}}, "source: expected the activation 'gelu', got 'relu'"),
        (
            {"decoder_blocks.0.attn.qkv.weight": np.ones((8, 24)), "decoder_norm.bias": np.ones(8)},
            {"decoder_heads": 2},
            r"source: .* of MAE in there, got missing: .* and \d+ more; mismatched: decoder.blocks.0.attn.qkv.*",
        ),
        (
            {"decoder_blocks.0.attn.qkv.weight": np.ones((24, 8))},
            {},
            "source: expected a tensor decoder.mask_token, which determines the width of the decoder, got none",
        ),
        (
            {"other.patch_embed.proj.weight": np.ones((DIM, 3, 4, 4))},
            {},
            "source: expected one model in there, got 2: .*",
        ),
    ],
)
def test_other_weights_are_refused_with_a_list(changes, given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(vit(**changes), **given)


def test_parts_around_an_encoder_can_be_left_out():
    arrays = vit(**{"decoder_embed.weight": np.ones((8, DIM)), "mask_token": np.ones((1, 1, 8))})
    found = read(arrays, encoder_only=True)
    assert found.notes[-1] == "left out: decoder_embed.weight, mask_token"
    assert all(name.startswith("encoder.") for name in found.weights)


OURS = EncoderConfig(embed_dim=DIM, depth=DEPTH, num_heads=2, image_size=(16, 16), patch_size=(4, 4))


def read_ours(architecture, **changes):
    """Read a file of prmim with changed arrays; None: no such array."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in encoder_shapes(OURS).items()} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return convert(Checkpoint("there", arrays, {METADATA_KEY: json.dumps(architecture)}))


@pytest.mark.parametrize("more", [{}, {"method": "mae", "decoder_dim": 8}], ids=["encoder", "method"])
def test_tensors_of_our_files_are_validated(more):
    architecture = OURS.architecture() | more
    assert len(read_ours(architecture, **{"decoder.mask_token": np.zeros((1, 1, 8))}).weights) == 31
    name = "encoder.blocks.0.attn.qkv.weight"
    with pytest.raises(ValueError, match=f"^source: expected the tensors of our encoder in there, got missing: {name}"):
        read_ours(architecture, **{name: None})
    with pytest.raises(ValueError, match=r"got unexpected: encoder\.more$"):
        read_ours(architecture, **{"encoder.more": np.zeros(1)})


def test_metadata_of_our_files_is_validated():
    architecture = OURS.architecture()
    with pytest.raises(ValueError, match=r"^architecture: expected that of a method or an encoder, got a classifier$"):
        read_ours({**architecture, "kind": "classifier"})
    del architecture["num_heads"]
    with pytest.raises(ValueError, match=r"^architecture: expected the field 'num_heads', got none$"):
        read_ours(architecture)


RELATIVE = {"position": "relative", "layer_scale": 1.0}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (VIT, {"position": "learned"}),
        (PIXIO, {"position": "learned", "class_tokens": 3}),
        (BEIT, RELATIVE),
        (TIMM, {"position": "learned", "layer_scale": 1.0}),
        (TIMM_RELATIVE, RELATIVE),
    ],
    ids=["vit", "pixio", "beit", "timm", "timm relative"],
)
def test_what_is_exported_can_be_imported(layout, options):
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "image_size": (16, 16), "patch_size": (4, 4)}
    encoder, rng = EncoderConfig(**sizes, **options), np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in encoder_shapes(encoder).items()}
    for name in weights:
        if name.endswith("qkv.bias"):
            weights[name][DIM : 2 * DIM] = 0  # BEiT's keys have none
    found = read(to_library(weights, layout))
    assert found.architecture == encoder.architecture()
    assert found.weights.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found.weights[name], array, err_msg=name)

"""From the metadata of weight files back to records."""

import json

import pytest

from prmim_methods import create_config
from prmim_methods.architecture import config_of, encoder_of
from prmim_methods.encoder import EncoderConfig

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CROSS = {**DECODER, "decoder": "cross"}
CASES = [
    ("mae", DECODER),
    ("mae", {**DECODER, "reconstruction": "none"}),
    ("mae", {**DECODER, "reconstruction": "none", "extra_cells": "known", "channels": 1, "mean": 0.25, "std": 0.5}),
    ("mae", {**DECODER, "thrown_target": "patch", "norm_pix": False, "fusion": "mff", "depth": 3}),
    ("mae", {**DECODER, "throw_ratio": 0, "position": "learned", "class_tokens": 3}),
    ("mae", {**DECODER, "cells": 4, "cell_norm": "window", "low_pass": 3.5, "position": "raster"}),
    ("mae", {**DECODER, "patch_size": (4, 1), "class_tokens": 0, "reconstruction": "conv"}),
    ("mae", CROSS),
    ("mae", {**CROSS, "reconstruction": "none", "extra_cells": "known"}),
    ("mae", {**CROSS, "reconstruction": "none", "extra_cells": "decoded"}),
    ("mae", {**CROSS, "reconstruction": "none"}),
    ("simmim", {"layer_scale": 0.5}),
    ("simmim", {"position": "absolute", "reconstruction": "interpolate", "extra_cells": "decoded"}),
    ("localmim", DECODER),
    ("localmim", {**DECODER, "target": "pixels", "scales": (2, 1), "layers": (1, 2), "reconstruction": "none"}),
    ("localmim", {**DECODER, "bins": 5}),
    ("maskalign", {"teacher_layers": 2, "fusion": "sum"}),
    ("videomae", {**DECODER, "image_size": (4, 16, 16), "patch_size": (2, 4, 4)}),
    ("videomae", {**DECODER, "image_size": (4, 16, 16), "patch_size": (2, 4, 4), "norm_over": "patch"}),
    ("videomae", {**DECODER, "norm_pix": False, "position": "absolute", "class_tokens": 1, "mask_ratio": 0.5}),
]


def made(method, given, folder):
    given = {**SIZES, **given}
    for name in ("mean", "std"):
        if name in given:
            given[name] = (given[name],)
    if method == "maskalign":
        teacher = {"model_type": "clip_vision_model", "patch_size": 4, "image_size": 16}
        (folder / "config.json").write_text(json.dumps(teacher))
        given["teacher"] = str(folder)
    return create_config(method, **given)


@pytest.mark.parametrize(("method", "given"), CASES, ids=str)
def test_records_come_back_from_what_a_file_says(method, given, tmp_path):
    config = made(method, given, tmp_path)
    architecture = json.loads(json.dumps(config.architecture()))
    more = {name: getattr(config, name) for name in ("teacher", "mask_ratio") if hasattr(config, name)}
    found = config_of(architecture, **more)
    assert type(found) is type(config)
    assert found.architecture() == architecture
    assert found.parameters() == config.parameters()
    encoder = encoder_of(architecture)
    for name in ("grid", "patch_size", "pixel_mean", "pixel_std", "encoder_size", "position", "class_tokens"):
        assert getattr(encoder, name) == getattr(config, name), name
    assert (encoder.layer_scale is None) == (config.layer_scale is None)
    assert encoder.parameters() == config._encoder_parameters()


@pytest.mark.parametrize(
    "given", [{}, {"position": "learned", "class_tokens": 5}, {"position": "relative", "layer_scale": 0.1}], ids=str
)
def test_an_encoder_alone_comes_back(given):
    config = EncoderConfig(**SIZES, **given)
    architecture = json.loads(json.dumps(config.architecture()))
    assert not {"method", "kind"} & set(architecture)
    assert encoder_of(architecture).architecture() == architecture
    larger = encoder_of(architecture, image_size=(32, 8))
    assert larger.architecture() == {**architecture, "image_size": [32, 8]}


GOOD = create_config("mae", **SIZES, **DECODER).architecture()
ALONE = EncoderConfig(**SIZES).architecture()


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (config_of, {"method": "dino"}, "architecture: expected the method mae, simmim, .*, got 'dino'"),
        (config_of, {"method": ["mae"]}, r"architecture: expected the method .*, got \['mae'\]"),
        (config_of, {"method": None}, "architecture: expected that of a method, got that of an encoder alone"),
        (encoder_of, {"kind": "classifier"}, "architecture: expected that of a method or an encoder, got a classifier"),
        (config_of, {"norm_pix": ...}, "architecture: expected the field 'norm_pix', got none"),
        (encoder_of, {"depth": ...}, "architecture: expected the field 'depth', got none"),
        (config_of, {"depth": "many"}, "architecture: depth: expected a whole number of at least 1.*, got 'many'"),
        (encoder_of, {"image_size": [16, None]}, r"architecture: image_size: .*, got \[16, None\]"),
        (config_of, {"num_heads": 5}, "embed_dim: expected a multiple of num_heads 5, got 24"),
        (config_of, {"fourier": 3}, "weights: fourier: expected None, got 3"),
        (config_of, {"cells": 3}, "architecture: .*"),
        (config_of, {"mean": [0.5]}, "mean: expected one number for each of the 3 channels, got .*"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_errors_are_one_line(read, change, message):
    architecture = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(architecture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fourier": 3}, "weights: fourier: expected None, got 3"),
        ({"position": "rotary"}, "position: expected one of absolute, .*, got 'rotary'"),
        ({"position": "relative", "class_tokens": 2}, "class_tokens: expected 1 for position 'relative', got 2"),
    ],
    ids=str,
)
def test_encoders_alone_have_no_other_fields(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        encoder_of({**ALONE, **change})


@pytest.mark.parametrize("size", [15, (16,), (16, 16, 16), (16, 18)], ids=str)
def test_patches_must_divide_the_images(size):
    with pytest.raises(ValueError, match=r"^image_size: expected multiples of the patch size 4 x 4, got"):
        encoder_of(ALONE, image_size=size)

"""Records of methods: counts, schedules, sizes, and one table of wrong options."""

import json
import re
from dataclasses import replace

import pytest

from prmim_core import Grid, Schedule, TokenCounts
from prmim_methods import (
    METHODS,
    LocalMIMConfig,
    MAEConfig,
    MaskAlignConfig,
    PixelConfig,
    SimMIMConfig,
    Transformer,
    create_config,
)
from prmim_methods.encoder import IMAGENET_MEAN, IMAGENET_STD
from prmim_methods.record import options

TEACHER = {"teacher": "owner/model"}
BASE = {"mae": {}, "simmim": {}, "maskalign": TEACHER, "localmim": {}, "videomae": {}}
SMALL = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
HUNDRED = {"image_size": (160, 160)}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def make(method, **given):
    return create_config(method, **BASE[method], **given)


# --- what follows from the options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("mae", {}, (49, 49, 98)),
        ("mae", {"throw_ratio": 0.25}, (49, 98, 49)),
        ("mae", {"throw_ratio": 0.25, "throwing": "cell"}, (49, 98, 49)),
        ("mae", {"throw_ratio": 0}, (49, 147, 0)),
        ("mae", {"throw_ratio": 0.75}, (49, 0, 147)),
        ("mae", {"mask_ratio": 0.5, "throw_ratio": 0.5}, (98, 0, 98)),
        ("mae", {"mask_ratio": 0.4, "throw_ratio": 0}, (117, 79, 0)),
        ("mae", {"image_size": (224, 448)}, (98, 98, 196)),
        ("mae", {"image_size": 256, "mask_unit": 4}, (64, 64, 128)),
        ("mae", {"mask_unit": 2}, (48, 50, 98)),  # 12 of 49 units are visible
        ("mae", {"image_size": (32, 32, 32), "patch_size": (8, 8, 8), "decoder_dim": 48}, (16, 16, 32)),
        ("simmim", {}, (76, 71, 49)),
        ("simmim", {"throw_by": "unit"}, (76, 72, 48)),
        ("simmim", {"throw_ratio": 0.5}, (76, 22, 98)),
        # AMT: 88 masked, 78 thrown of 196 tokens; 22 masked, 13 thrown of 49 units.
        ("mae", {"throwing": "weighted", "mask_ratio": 0.846, "throw_ratio": 0.4}, (30, 88, 78)),
        (
            "simmim",
            {"throwing": "weighted", "mask_ratio": 0.7, "throw_ratio": 0.27, "throw_by": "unit"},
            (56, 88, 52),
        ),
        ("simmim", {"mask_ratio": 0.5, "throw_ratio": 0.5}, (96, 2, 98)),
        ("simmim", {"throw_ratio": 0, "throw_by": "unit"}, (76, 120, 0)),
        ("simmim", {"mask_unit": 1}, (78, 69, 49)),
        ("maskalign", {}, (58, 0, 138)),
        ("maskalign", {"reconstruction": "none"}, (58, 0, 138)),
        ("maskalign", {"mask_ratio": 0.5}, (98, 0, 98)),
        # 100 tokens, or 25 units of 4. MAE's code keeps 9 tokens at 0.9; SimMIM's code masks 8 units at 0.28.
        ("mae", {**HUNDRED, "mask_ratio": 0.9}, (10, 40, 50)),
        ("mae", {**HUNDRED, "mask_ratio": 0.9, "rounding": "float"}, (9, 41, 50)),
        ("mae", {**HUNDRED, "throw_ratio": 0.29, "rounding": "float"}, (25, 47, 28)),
        ("maskalign", {**HUNDRED, "mask_ratio": 0.9, "rounding": "float"}, (9, 0, 91)),
        ("simmim", {**HUNDRED, "mask_ratio": 0.28}, (72, 3, 25)),
        ("simmim", {**HUNDRED, "mask_ratio": 0.28, "rounding": "float"}, (68, 7, 25)),
        ("simmim", {**HUNDRED, "mask_ratio": 0.9, "mask_unit": 1, "rounding": "float"}, (10, 65, 25)),
    ],
    ids=str,
)
def test_ratios_become_counts(method, given, expected):
    config = make(method, **given)
    assert config.counts == config.schedule.counts == TokenCounts(*expected)


def test_schedules_follow_the_options():
    assert MAEConfig(stages=3, throwing="cell").schedule == Schedule(
        Grid((14, 14)), TokenCounts(49, 49, 98), stages=3, throwing="cell"
    )
    assert MAEConfig(furthest_from="none").schedule.furthest_from == "none"
    assert SimMIMConfig().schedule.unit is None
    units = SimMIMConfig(throw_by="unit", stages=3)
    assert units.schedule == Schedule(Grid((14, 14)), TokenCounts(76, 72, 48), stages=3, unit=(2, 2))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("mae", {"throw_ratio": 0, "furthest_from": "none"}),
        ("mae", {"throw_ratio": 0.75, "throwing": "cell"}),
        ("simmim", {"throw_ratio": 0, "throw_by": "unit"}),
        ("maskalign", {}),
    ],
    ids=str,
)
def test_where_nothing_is_chosen_the_choice_is_cheap(method, given):
    config = make(method, **given)
    assert config.schedule == Schedule(Grid((14, 14)), config.counts, stages=2, throwing="random")


@pytest.mark.parametrize(
    ("method", "given", "is_reconstructed"),
    [
        ("mae", {}, True),
        ("mae", {"reconstruction": "none"}, False),
        ("mae", {"throw_ratio": 0}, False),
        ("mae", {"thrown_weight": 0}, False),
        ("simmim", {"reconstruction": "conv"}, True),
        ("simmim", {"throw_ratio": 0}, False),
        ("maskalign", {}, True),
        ("maskalign", {"reconstruction": "none"}, False),
        ("maskalign", {"thrown_weight": 0}, False),
    ],
    ids=str,
)
def test_whether_thrown_tokens_are_reconstructed(method, given, is_reconstructed):
    config = make(method, **given)
    assert config.is_reconstructed is is_reconstructed
    assert config.reconstruction_in_effect == (config.reconstruction if is_reconstructed else "none")


def test_sequences_and_supervised_tokens():
    mae, simmim = MAEConfig(), SimMIMConfig()
    assert (mae.encoder_length, mae.decoder_length, mae.num_supervised) == (50, 99, 147)
    assert (simmim.encoder_length, simmim.num_supervised) == (148, 120)
    assert (MAEConfig(reconstruction="none").num_supervised, MAEConfig(thrown_weight=0).num_supervised) == (49, 49)
    assert MaskAlignConfig(**TEACHER).encoder_length == 59


@pytest.mark.parametrize(
    ("given", "mixes", "first_feature", "visible_features", "queries"),
    [
        ({}, (13, 13), 0, True, 49),
        ({"reconstruction": "none"}, (12, 13), 49, False, 49),
        ({"thrown_weight": 0, "depth": 3}, (12, 4), 49, False, 49),
        ({"throw_ratio": 0}, (12, 13), 49, False, 147),
        ({"throw_ratio": 0, "extra_cells": "decoded"}, (12, 13), 49, False, 147),
        ({"throw_ratio": 0, "extra_cells": "known"}, (13, 13), 0, True, 147),
    ],
    ids=str,
)
def test_what_a_decoder_of_cross_attention_reads(given, mixes, first_feature, visible_features, queries):
    config = MAEConfig(decoder="cross", decoder_depth=12, **given)
    assert (config.layer_mixes, config.first_feature, config.decoder_length) == (mixes, first_feature, queries)
    architecture = config.architecture()
    assert (architecture["decoder"], architecture["visible_features"]) == ("cross", visible_features)
    attended = "attend to 50 encoder tokens in 12 mixes of layers"
    assert dict(config.describe())["decoder queries"] == f"{queries} (dense: 147), {attended}"
    assert "decoder sequence" not in dict(config.describe())
    assert config.summary().endswith(f"; decoder queries {queries}")
    assert config.baseline().decoder == "cross"
    assert "decoder" not in MAEConfig(**given).architecture()
    assert MAEConfig(**given).first_feature == 0


@pytest.mark.parametrize(
    ("given", "patches", "cells", "num_extra"),
    [
        ({}, range(49, 98), range(98, 196), 0),
        ({"thrown_target": "patch"}, range(49, 196), range(0), 0),
        ({"extra_cells": "decoded"}, range(49, 98), range(49, 196), 49),
        ({"extra_cells": "known"}, range(49, 98), range(196), 98),
        ({"thrown_target": "patch", "extra_cells": "decoded"}, range(49, 196), range(49, 98), 49),
        ({"thrown_target": "patch", "extra_cells": "known"}, range(49, 196), range(98), 98),
        ({"reconstruction": "none"}, range(49, 98), range(0), 0),
        ({"reconstruction": "none", "extra_cells": "known"}, range(49, 98), range(98), 98),
        ({"thrown_weight": 0}, range(49, 98), range(0), 0),
        ({"throw_ratio": 0}, range(49, 196), range(0), 0),
        ({"throw_ratio": 0, "extra_cells": "decoded"}, range(49, 196), range(49, 196), 147),
        ({"throw_ratio": 0.75, "extra_cells": "decoded"}, range(0), range(49, 196), 0),
    ],
    ids=str,
)
def test_which_tokens_predict_patches_and_cells(given, patches, cells, num_extra):
    config = MAEConfig(**given)
    assert (config.patch_places, config.cell_places, config.num_extra_cells) == (patches, cells, num_extra)
    assert config.thrown_cells is (config.counts.thrown > 0 and 195 in cells)
    assert config.losses == ("loss", "loss_decoded", "loss_thrown", "loss_cells")[: 4 if num_extra else 3]
    assert ("cells" in config.architecture()) is ("cell_norm" in config.architecture()) is bool(cells)
    rows = dict(config.describe())
    all_pixels = f"{len(patches)} tokens predict all 16 x 16 pixels, normalized over the patch"
    means = f"{len(cells)} tokens predict the means of 2 x 2 cells, normalized over the image"
    assert rows.get("  patches") == (all_pixels if patches else None)
    assert rows.get("  cells") == (means if cells else None)


@pytest.mark.parametrize(
    ("given", "shape", "dim"),
    [
        ({}, (2, 2), 12),
        ({"cells": 4, "channels": 1}, (4, 4), 16),
        ({"cells": 1}, (1, 1), 3),
        ({"image_size": (224, 210), "patch_size": (16, 15)}, (2, 1), 6),
        ({"image_size": (24, 30), "patch_size": (12, 15), "cells": 3}, (3, 3), 27),
        ({"image_size": (60,), "patch_size": (5,), "channels": 2}, (1,), 2),
        ({"image_size": (4, 8, 9), "patch_size": (2, 4, 3), "decoder_dim": 48}, (2, 2, 1), 12),
    ],
    ids=str,
)
def test_cells_of_a_patch(given, shape, dim):
    config = MAEConfig(**given)
    assert (config.cell_shape, config.cell_dim) == (shape, dim)
    assert config.architecture()["cells"] == list(shape)


def test_reports_of_targets():
    rows = dict(SimMIMConfig(cells=4, cell_norm="window", low_pass=40).describe())
    over = "the patch and its neighbours"
    assert rows["  patches"] == "71 tokens predict all 16 x 16 pixels, up to 40 periods per image"
    assert rows["  cells"] == f"49 tokens predict the means of 4 x 4 cells, normalized over {over}"


@pytest.mark.parametrize("method", METHODS)
def test_the_baseline_is_the_published_method(method):
    predicts_pixels = issubclass(METHODS[method], PixelConfig)
    given = {"extra_cells": "known", "extra_cells_weight": 2} if predicts_pixels else {}
    config = make(method, stages=3, depth=2, **given)
    baseline = config.baseline()
    changed = {"reconstruction": "none"} if method == "maskalign" else {"throw_ratio": 0.0}
    changed |= {"extra_cells": "none"} if predicts_pixels else {}
    assert baseline == replace(config, **changed)
    assert not baseline.is_reconstructed
    assert baseline.baseline() == baseline


def test_sizes_of_models():
    assert MAEConfig().encoder_size == Transformer(768, 12, 12)
    assert MAEConfig().decoder_size == Transformer(512, 8, 16)
    assert MAEConfig(model="vit_small", depth=6).encoder_size == Transformer(384, 6, 6)
    given = {"embed_dim": 96, "depth": 4, "num_heads": 3}
    assert MAEConfig(model="vit_huge", **given).encoder_size == Transformer(96, 4, 3)


def test_sizes_of_images():
    config = MAEConfig(image_size=(32, 96), patch_size=(8, 16), channels=1)
    assert (config.grid, config.patch_dim) == (Grid((4, 6)), 128)
    assert MAEConfig(image_size=32, patch_size=8) == MAEConfig(image_size=[32, 32], patch_size=(8, 8))
    assert SimMIMConfig(mask_unit=7).mask_shape == (7, 7)


def test_pixel_statistics():
    assert (MAEConfig().pixel_mean, MAEConfig().pixel_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (MAEConfig(channels=1).pixel_mean, MAEConfig(channels=2).pixel_std) == ((0.5,), (0.5, 0.5))
    config = MAEConfig(channels=2, mean=[1, 2], std=[3, 4])
    assert (config.pixel_mean, config.pixel_std) == ((1.0, 2.0), (3.0, 4.0))


def test_encoders_of_the_methods():
    mae, simmim, maskalign = (make(method) for method in ("mae", "simmim", "maskalign"))
    assert [config.position for config in (mae, simmim, maskalign)] == ["absolute", "relative", "absolute"]
    assert [config.layer_scale for config in (mae, simmim, maskalign)] == [None, 0.1, None]
    assert [config.drop_path for config in (mae, simmim, maskalign)] == [0.0, 0.1, 0.1]
    assert [config.predicts for config in (mae, simmim, maskalign)] == ["pixels", "pixels", "features"]
    assert [config.class_tokens for config in (mae, simmim, maskalign)] == [1, 1, 1]


def test_class_tokens_and_learned_positions_of_mae():
    config = MAEConfig(**SMALL, **DECODER, class_tokens=3, position="learned")
    assert (config.encoder_length, config.decoder_length, config.baseline().decoder_length) == (4 + 3, 8 + 3, 16 + 3)
    plain = MAEConfig(**SMALL, **DECODER)
    # Two class tokens more, and the tables of 16 tokens and 3 class tokens in both widths.
    assert config.parameters().learned - plain.parameters().learned == 2 * 16 + 19 * (16 + 8)
    assert (config.parameters().fixed, plain.parameters().fixed) == (0, 17 * (16 + 8))
    assert MAEConfig(**SMALL, **DECODER, class_tokens=0).parameters().fixed == 16 * (16 + 8)
    changed = {"class_tokens": 3, "position": "learned"}
    assert config.architecture() == {**plain.architecture(), **changed}
    assert not changed.keys() & plain.architecture().keys()
    assert config.encoder_architecture() == {**plain.encoder_architecture(), "class_tokens": 3}
    rows = dict(config.describe())
    assert (rows["encoder sequence"], rows["decoder sequence"]) == ("7, with 3 class tokens", "11 (dense: 19)")
    assert dict(MAEConfig(class_tokens=0).describe())["encoder sequence"] == "49, no class token"
    # Only a sine-cosine table divides the width among the axes.
    assert MAEConfig(embed_dim=10, num_heads=2, decoder_dim=12, decoder_heads=2, position="learned").position


def test_a_pool_needs_the_tokens_that_it_averages():
    MAEConfig(class_tokens=3).check_pool("cls")
    MAEConfig(class_tokens=0).check_pool("mean")
    with pytest.raises(ValueError, match=r"^pool: expected 'mean' for an encoder without class tokens, got 'cls'$"):
        MAEConfig(class_tokens=0).check_pool("cls")
    with pytest.raises(ValueError, match=r"^pool: expected 'mean' or 'cls', got 'max'$"):
        MAEConfig().check_pool("max")


def test_parameters_without_weight_decay():
    tokens = {"encoder.cls_token", "decoder.mask_token"}
    exempt = {"simmim": {"encoder.cls_token"}, "maskalign": {"fusion"}, "videomae": tokens}
    assert all(make(method).not_decayed() == exempt.get(method, set()) for method in METHODS)
    assert MAEConfig(token_decay=False).not_decayed() == tokens


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(1, (0,)), (2, (0, 1)), (6, (0, 1, 2, 3, 4, 5)), (12, (0, 2, 4, 6, 8, 11)), (32, (0, 5, 10, 16, 21, 31))],
)
def test_fused_blocks_are_spread_over_the_encoder(depth, blocks):
    config = MAEConfig(depth=depth, fusion="mff")
    assert config.fused_blocks == blocks
    assert config.losses == ("loss", "loss_decoded", "loss_thrown", *(f"layer_weight_{block}" for block in blocks))
    assert dict(config.describe())["fused blocks"] == ", ".join(map(str, blocks))
    assert MAEConfig(depth=depth).fused_blocks == ()
    assert config.baseline().fusion == "mff"


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_an_architecture_is_plain_and_free_of_sampling(method):
    config = create_config(method, image_size=(64, 128))
    architecture = config.architecture()
    assert json.loads(json.dumps(architecture)) == architecture
    assert (architecture["method"], architecture["image_size"], architecture["num_heads"]) == (method, [64, 128], 12)
    assert (architecture["cells"], architecture["cell_norm"]) == ([2, 2], "image")
    sampling = {"mask_ratio": 0.5, "throw_ratio": 0.25, "throwing": "random", "stages": 4}
    weights = {"thrown_weight": 2, "extra_cells": "known", "extra_cells_weight": 2}
    assert replace(config, **sampling, **weights).architecture() == architecture
    other_weights = [{"channels": 1}, {"depth": 2}, {"low_pass": 9.0}, {"reconstruction": "conv"}, {"throw_ratio": 0}]
    other_weights += [{"fusion": "mff"}] if method == "mae" else []
    for changes in (*other_weights, {"cells": 4}, {"cell_norm": "window"}):
        assert replace(config, **changes).architecture() != architecture
    patches = {name: value for name, value in architecture.items() if name not in ("cells", "cell_norm")}
    assert replace(config, thrown_target="patch").architecture() == patches
    assert config.baseline().architecture() == {**patches, "reconstruction": "none"}


def test_methods_are_named_once():
    assert list(METHODS) == ["mae", "simmim", "maskalign", "localmim", "videomae"]
    assert all(config.name == name for name, config in METHODS.items())


def test_none_stands_for_the_default():
    assert create_config("simmim", mask_ratio=None, depth=None) == SimMIMConfig()


@pytest.mark.parametrize(
    ("given", "scales", "layers", "cells"),
    [
        ({}, (4, 2, 1, 0.5), (2, 4, 10, 12), (4, 8, 16, 32)),
        ({"model": "vit_large"}, (4, 2, 1, 0.5), (2, 4, 22, 24), (4, 8, 16, 32)),
        ({"depth": 3}, (4, 2, 1, 0.5), (1, 2, 3, 3), (4, 8, 16, 32)),
        ({"depth": 1}, (4, 2, 1, 0.5), (1, 1, 1, 1), (4, 8, 16, 32)),
        ({"image_size": 240}, (4, 2, 1), (4, 10, 12), (4, 8, 16)),
        ({"image_size": 16, "patch_size": 2}, (2, 1, 0.5), (4, 10, 12), (1, 2, 4)),
        ({"image_size": 8, "patch_size": 1}, (1, 0.5), (10, 12), (1, 2)),
        ({"image_size": 7, "patch_size": 1}, (1,), (12,), (1,)),
        ({"scales": (8, 0.5), "layers": (3, 12)}, (8, 0.5), (3, 12), (2, 32)),
        ({"scales": 1}, (1,), (12,), (16,)),
        ({"scales": 0.5}, (0.5,), (12,), (32,)),
    ],
    ids=str,
)
def test_scales_and_layers_of_localmim_suit_the_sizes(given, scales, layers, cells):
    config = LocalMIMConfig(**given)
    assert (config.scales_in_effect, config.layers_in_effect) == (scales, layers)
    assert config.cell_sizes == tuple((cell, cell) for cell in cells)
    assert (config.architecture()["scales"], config.architecture()["layers"]) == (list(scales), list(layers))
    assert [row for row, _ in config.describe() if row.startswith("  scale")] == [f"  scale {n:g}" for n in scales]


def test_an_architecture_of_localmim_says_what_the_weights_mean():
    config = LocalMIMConfig()
    architecture = config.architecture()
    assert json.loads(json.dumps(architecture)) == architecture
    assert replace(config, throw_ratio=0.25, stages=3, thrown_weight=2, mask_ratio=0.5).architecture() == architecture
    for changes in ({"bins": 18}, {"target": "pixels"}, {"scales": 1}, {"decoder_dim": 128}, {"throw_ratio": 0}):
        assert replace(config, **changes).architecture() != architecture
    assert "bins" not in LocalMIMConfig(target="pixels").architecture()


def own(grid, counts, noise, is_visible):
    """Decode the masked tokens of lowest noise."""
    return (noise + 2**40 * is_visible).argsort(1)[:, : counts.decoded]


@pytest.mark.parametrize("method", ["mae", "simmim", "localmim", "videomae"])
def test_functions_of_ones_own(method):
    config = create_config(method, throwing=own, reconstruction=len)
    named = create_config(method, reconstruction="interpolate")
    assert config.schedule == replace(named.schedule, throwing=own)
    rows = dict(config.describe())
    assert rows["decoded"].endswith(", chosen by own")
    assert rows["  stage 1"].endswith(" known, len")
    # Weights fit a mixing module of one's own only, whatever chose the tokens.
    assert config.architecture() == {**named.architecture(), "reconstruction": "custom"}
    cost, expected = config.cost(), named.cost()
    assert expected.is_known
    assert not cost.is_known
    assert [name for name, part in cost.parts.items() if not part.is_known] == ["stages"]
    assert cost.macs == expected.macs - expected.parts["stages"].macs
    assert config.baseline().cost().is_known


def test_nothing_is_asked_of_a_function_where_nothing_is_thrown():
    assert MAEConfig(throw_ratio=0, throwing=own).schedule.throwing == "random"


# --- wrong options -------------------------------------------------------------------------------------------------

MODELS = "vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_1b, vit_5b"
OWN = "or package.module:function"
RECONSTRUCTIONS = f"kernel, interpolate, conv, none, {OWN}"
PER_AXIS = "a whole number of at least 1, or one for each axis"
SEED = "a whole number in [0, 4294967295]"
THROWN = "TokenCounts(visible=4, decoded=0, thrown=12)"
MAE = {**SMALL, **DECODER}
ALIGN = {**SMALL, **TEACHER}

WRONG = [
    # every method
    ("mea", {}, ValueError, f"method: expected one of {', '.join(METHODS)}, got 'mea'"),
    (["mae"], {}, TypeError, f"method: expected one of {', '.join(METHODS)}, got ['mae']"),
    ("mae", {"stage": 3}, ValueError, "stage: method mae has no such option"),
    ("mae", {"seed": 0}, ValueError, "seed: method mae has no such option"),
    ("mae", {"model": "resnet50"}, ValueError, f"model: expected one of {MODELS}, got 'resnet50'"),
    ("mae", {**MAE, "image_size": (16, 18)}, ValueError,
     "patch_size: expected sizes that divide the image (16, 18), got (4, 4)"),
    ("mae", {"image_size": 225}, ValueError,
     "patch_size: expected sizes that divide the image (225, 225), got (16, 16)"),
    ("mae", {**MAE, "image_size": (16,)}, ValueError,
     "patch_size: expected one number for each of the 1 axes, got (4, 4)"),
    ("simmim", {**SMALL, "image_size": (16,)}, ValueError,
     "patch_size: expected one number for each of the 1 axes, got (4, 4)"),
    ("mae", {"image_size": (16, 0)}, ValueError, f"image_size: expected {PER_AXIS}, got (16, 0)"),
    ("mae", {"image_size": "16"}, TypeError, f"image_size: expected {PER_AXIS}, got '16'"),
    ("mae", {"image_size": (4,) * 4, "patch_size": (2,) * 4}, ValueError,
     "shape: expected one to three axes, got (2, 2, 2, 2)"),
    ("mae", {"patch_size": 0}, ValueError, f"patch_size: expected {PER_AXIS}, got 0"),
    ("mae", {"patch_size": (4.0, 4)}, TypeError, f"patch_size: expected {PER_AXIS}, got (4.0, 4)"),
    ("mae", {"channels": 0}, ValueError, "channels: expected a whole number in [1, 10000], got 0"),
    ("mae", {"mean": (0.5,)}, ValueError, "mean: expected one number for each of the 3 channels, got [0.5]"),
    ("mae", {"std": (0.5, 0, 1)}, ValueError,
     "std: expected one number above 0 for each channel, or null, got (0.5, 0, 1)"),
    ("mae", {"depth": 0}, ValueError, "depth: expected a whole number of at least 1, or null, got 0"),
    ("mae", {"num_heads": 0}, ValueError, "num_heads: expected a whole number of at least 1, or null, got 0"),
    ("mae", {"num_heads": 5}, ValueError, "embed_dim: expected a multiple of num_heads 5, got 768"),
    ("mae", {"embed_dim": 100, "num_heads": 3}, ValueError, "embed_dim: expected a multiple of num_heads 3, got 100"),
    ("mae", {"embed_dim": 6, "num_heads": 3}, ValueError,
     "embed_dim: expected a multiple of 4 for images of 2 axes, got 6"),
    ("mae", {"mask_ratio": 1.5}, ValueError, "mask_ratio: expected a number in (0, 1), got 1.5"),
    ("mae", {"mask_ratio": 1}, ValueError, "mask_ratio: expected a number in (0, 1), got 1"),
    ("maskalign", {**ALIGN, "mask_ratio": 1}, ValueError, "mask_ratio: expected a number in (0, 1), got 1"),
    ("mae", {"mask_ratio": 0, "throw_ratio": 0}, ValueError, "mask_ratio: expected a number in (0, 1), got 0"),
    ("mae", {"mask_ratio": float("nan")}, ValueError, "mask_ratio: expected a number in (0, 1), got nan"),
    ("mae", {"mask_ratio": "0.75"}, TypeError, "mask_ratio: expected a number in (0, 1), got '0.75'"),
    ("mae", {**MAE, "mask_ratio": 0.97}, ValueError,
     "mask_ratio: expected a ratio that leaves a visible token of 16, got 0.97"),
    ("simmim", {**SMALL, "mask_ratio": 0.9}, ValueError,
     "mask_ratio: expected a ratio that leaves a visible token of 16, got 0.9"),
    ("simmim", {"mask_ratio": 0.99, "mask_unit": 14}, ValueError,
     "mask_ratio: expected a ratio that leaves a visible token of 196, got 0.99"),
    ("maskalign", {**ALIGN, "mask_ratio": 0.99999}, ValueError,
     "mask_ratio: expected a ratio that leaves a visible token of 16, got 0.99999"),
    ("mae", {"stages": 0}, ValueError, "stages: expected a whole number in [1, 1000], got 0"),
    ("maskalign", {**ALIGN, "stages": 0}, ValueError, "stages: expected a whole number in [1, 1000], got 0"),
    ("mae", {"reconstruction": "spline"}, ValueError,
     f"reconstruction: expected one of {RECONSTRUCTIONS}, got 'spline'"),
    ("mae", {"reconstruction": "spline", "throw_ratio": 0}, ValueError,
     f"reconstruction: expected one of {RECONSTRUCTIONS}, got 'spline'"),
    ("mae", {"pixel_range": (3, 3)}, ValueError, "pixel_range: expected low,high with low < high, got (3.0, 3.0)"),
    ("mae", {"thrown_weight": -1}, ValueError, "thrown_weight: expected a number of at least 0, got -1"),
    ("mae", {"thrown_weight": float("inf")}, ValueError, "thrown_weight: expected a number of at least 0, got inf"),
    ("mae", {"thrown_weight": "1"}, TypeError, "thrown_weight: expected a number of at least 0, got '1'"),
    ("mae", {"thrown_weight": True}, TypeError, "thrown_weight: expected a number of at least 0, got True"),
    ("mae", {"recompute_blocks": 1}, TypeError, "recompute_blocks: expected true or false, got 1"),
    ("mae", {"scan_blocks": "yes"}, TypeError, "scan_blocks: expected true or false, got 'yes'"),
    ("mae", {"init_seed": "0"}, TypeError, f"init_seed: expected {SEED}, got '0'"),
    ("mae", {"init_seed": -1}, ValueError, f"init_seed: expected {SEED}, got -1"),
    ("mae", {"init_seed": 2**32}, ValueError, f"init_seed: expected {SEED}, got 4294967296"),
    # methods of pixels
    ("mae", {"throw_ratio": 1}, ValueError, "throw_ratio: expected a number in [0, 1), got 1"),
    ("mae", {"throw_ratio": -0.1}, ValueError, "throw_ratio: expected a number in [0, 1), got -0.1"),
    ("mae", {"throw_ratio": 0.8}, ValueError, "throw_ratio: expected at most mask_ratio 0.75, got 0.8"),
    ("mae", {"mask_ratio": 0.3, "throw_ratio": 3 * 0.1}, ValueError,
     "throw_ratio: expected at most mask_ratio 0.3, got 0.30000000000000004"),
    ("simmim", {"throw_ratio": 0.7}, ValueError, "throw_ratio: expected at most mask_ratio 0.6, got 0.7"),
    ("simmim", {"mask_ratio": 0.2}, ValueError, "throw_ratio: expected at most mask_ratio 0.2, got 0.25"),
    ("videomae", {"mask_ratio": 0.001, "throw_ratio": 0}, ValueError,
     "mask_ratio: expected at least one masked token of 1568, got 0.001"),
    ("mae", {**MAE, "throw_ratio": 0.75, "reconstruction": "none"}, ValueError,
     f"throw_ratio: expected at least one supervised token, got none ({THROWN}, reconstruction 'none', "
     "thrown_weight 1)"),
    ("mae", {**MAE, "throw_ratio": 0.75, "thrown_weight": 0}, ValueError,
     f"throw_ratio: expected at least one supervised token, got none ({THROWN}, reconstruction 'kernel', "
     "thrown_weight 0)"),
    ("mae", {"throwing": "none"}, ValueError,
     f"throwing: expected one of furthest, random, cell, weighted, {OWN}, got 'none'"),
    ("mae", {"throwing": "no_such_module:f", "throw_ratio": 0}, ValueError,
     "throwing: expected a function to import, got 'no_such_module:f' (ModuleNotFoundError: No module named "
     "'no_such_module')"),
    ("mae", {"throwing": "math:lattice"}, ValueError,
     "throwing: expected a function to import, got 'math:lattice' (AttributeError: module 'math' has no attribute "
     "'lattice')"),
    ("maskalign", {**ALIGN, "reconstruction": "math:pi"}, ValueError,
     "reconstruction: expected a function at math:pi, got 3.141592653589793"),
    ("mae", {"furthest_from": "all"}, ValueError, "furthest_from: expected one of visible, none, got 'all'"),
    ("mae", {"furthest_from": "all", "throw_ratio": 0}, ValueError,
     "furthest_from: expected one of visible, none, got 'all'"),
    ("mae", {"low_pass": 0}, ValueError, "low_pass: expected a number above 0, or null, got 0"),
    ("simmim", {"low_pass": "40"}, TypeError, "low_pass: expected a number above 0, or null, got '40'"),
    ("mae", {**MAE, "cells": 3}, ValueError, "cells: expected a divisor of the patch 4 x 4, or null, got 3"),
    ("mae", {**MAE, "cells": 8}, ValueError, "cells: expected a divisor of the patch 4 x 4, or null, got 8"),
    ("simmim", {**SMALL, "image_size": (16, 24), "patch_size": (4, 6), "cells": 4, "thrown_target": "patch"},
     ValueError, "cells: expected a divisor of the patch 4 x 6, or null, got 4"),
    ("mae", {"cells": 0}, ValueError, "cells: expected a whole number of at least 1, or null, got 0"),
    ("mae", {"cells": 2.0}, TypeError, "cells: expected a whole number of at least 1, or null, got 2.0"),
    ("mae", {"extra_cells_weight": 0}, ValueError, "extra_cells_weight: expected a number above 0, got 0"),
    ("mae", {"extra_cells_weight": float("inf")}, ValueError,
     "extra_cells_weight: expected a number above 0, got inf"),
    ("simmim", {"thrown_target": "pixels"}, ValueError,
     "thrown_target: expected one of cells, patch, got 'pixels'"),
    ("mae", {"cell_norm": "patch"}, ValueError, "cell_norm: expected one of image, window, none, got 'patch'"),
    ("mae", {"extra_cells": "visible"}, ValueError,
     "extra_cells: expected one of none, decoded, known, got 'visible'"),
    # MAE
    ("mae", {"norm_pix": 1}, TypeError, "norm_pix: expected true or false, got 1"),
    ("mae", {"image_size": 4, "patch_size": 1, "channels": 1}, ValueError,
     "norm_pix: expected patches of at least 2 values to normalize, got patches of 1"),
    ("mae", {"decoder_depth": 0}, ValueError, "decoder_depth: expected a whole number of at least 1, got 0"),
    ("mae", {"decoder_heads": 0}, ValueError, "decoder_heads: expected a whole number of at least 1, got 0"),
    ("mae", {"decoder_dim": 100}, ValueError, "decoder_dim: expected a multiple of decoder_heads 16, got 100"),
    ("mae", {"mask_unit": 4}, ValueError, "mask_unit: expected a divisor of the grid 14 x 14, got 4"),
    ("mae", {"class_tokens": -1}, ValueError, "class_tokens: expected a whole number in [0, 1000], got -1"),
    ("mae", {"position": "relative"}, ValueError,
     "position: expected one of absolute, raster, learned, got 'relative'"),
    ("mae", {**MAE, "decoder_heads": 3}, ValueError, "decoder_dim: expected a multiple of decoder_heads 3, got 8"),
    ("mae", {**MAE, "decoder_dim": 6, "decoder_heads": 3, "reconstruction": "conv"}, ValueError,
     "decoder_dim: expected a multiple of 4 for images of 2 axes, got 6"),
    ("mae", {**MAE, "image_size": (16,), "patch_size": (4,), "decoder_dim": 6}, ValueError,
     "decoder_dim: expected a multiple of 4 for reconstruction 'kernel', got 6"),
    ("mae", {"throw_by": "unit"}, ValueError, "throw_by: method mae has no such option"),
    ("mae", {"teacher": "clip"}, ValueError, "teacher: method mae has no such option"),
    ("mae", {"layer_scale": 0.1}, ValueError, "layer_scale: method mae has no such option"),
    # SimMIM
    ("simmim", {"image_size": 112}, ValueError, "mask_unit: expected a divisor of the grid 7 x 7, got 2"),
    ("simmim", {"image_size": (96, 112)}, ValueError, "mask_unit: expected a divisor of the grid 6 x 7, got 2"),
    ("simmim", {"image_size": (16, 16, 20), "patch_size": (4, 4, 4)}, ValueError,
     "mask_unit: expected a divisor of the grid 4 x 4 x 5, got 2"),
    ("simmim", {"mask_unit": 3}, ValueError, "mask_unit: expected a divisor of the grid 14 x 14, got 3"),
    ("simmim", {"mask_unit": 0}, ValueError, "mask_unit: expected a whole number of at least 1, got 0"),
    ("simmim", {"mask_unit": 2.0}, TypeError, "mask_unit: expected a whole number of at least 1, got 2.0"),
    ("simmim", {"mask_unit": True}, TypeError, "mask_unit: expected a whole number of at least 1, got True"),
    ("simmim", {"throw_by": "patch"}, ValueError, "throw_by: expected one of token, unit, got 'patch'"),
    ("simmim", {"position": "x"}, ValueError, "position: expected one of relative, absolute, learned, got 'x'"),
    ("simmim", {"layer_scale": 0}, ValueError, "layer_scale: expected a number in (0, 1), got 0"),
    ("simmim", {"drop_path": 1.0}, ValueError, "drop_path: expected a number in [0, 1), got 1.0"),
    ("simmim", {"drop_path": -0.1}, ValueError, "drop_path: expected a number in [0, 1), got -0.1"),
    ("simmim", {"drop_path": "0.1"}, TypeError, "drop_path: expected a number in [0, 1), got '0.1'"),
    ("simmim", {**SMALL, "embed_dim": 18, "num_heads": 3}, ValueError,
     "embed_dim: expected a multiple of 4 for reconstruction 'kernel', got 18"),
    ("simmim", {"decoder_dim": 256}, ValueError, "decoder_dim: method simmim has no such option"),
    ("simmim", {"norm_pix": False}, ValueError, "norm_pix: method simmim has no such option"),
    ("simmim", {"fusion": "sum"}, ValueError, "fusion: method simmim has no such option"),
    # LocalMIM
    ("localmim", {**MAE, "target": "sift"}, ValueError, "target: expected one of hog, pixels, got 'sift'"),
    ("localmim", {**MAE, "bins": 0}, ValueError, "bins: expected a whole number in [1, 1000], got 0"),
    ("localmim", {**MAE, "scales": (2, 0.25)}, ValueError,
     "scales: expected numbers of at least 0.5, or null, got (2, 0.25)"),
    ("localmim", {**MAE, "scales": (3, 1)}, ValueError, "scales: expected 0.5 or powers of 2, got [3.0, 1.0]"),
    ("localmim", {**MAE, "scales": (1, 2)}, ValueError, "scales: expected decreasing numbers, got [1.0, 2.0]"),
    ("localmim", {**MAE, "scales": 8}, ValueError,
     "scales: expected scales that cut patches of 4 x 4 pixels, or a grid of 4 x 4 tokens, into whole cells, got 8"),
    ("localmim", {**MAE, "image_size": (12, 16), "scales": 0.5}, ValueError,
     "scales: expected scales that cut patches of 4 x 4 pixels, or a grid of 3 x 4 tokens, into whole cells, got 0.5"),
    ("localmim", {**MAE, "scales": ()}, ValueError, "scales: expected numbers of at least 0.5, or null, got ()"),
    ("localmim", {**MAE, "layers": (1, 2)}, ValueError, "layers: expected one for each of the 4 scales, got [1, 2]"),
    ("localmim", {**MAE, "scales": (1, 0.5), "layers": (1, 1)}, ValueError,
     "layers: expected the last to be the depth 2, got [1, 1]"),
    ("localmim", {**MAE, "scales": (1, 0.5), "layers": (2, 1)}, ValueError,
     "layers: expected ascending whole numbers of at least 1, or null, got (2, 1)"),
    ("localmim", {**MAE, "layers": (1.5, 2)}, TypeError,
     "layers: expected ascending whole numbers of at least 1, or null, got (1.5, 2)"),
    ("localmim", {**MAE, "image_size": (16, 16, 16), "patch_size": (4, 4, 4), "embed_dim": 12, "decoder_dim": 12},
     ValueError,
     "target: expected 'pixels' unless images have two axes of at least 2 pixels, got 'hog' for 16 x 16 x 16"),
    ("localmim", {"image_size": 32, "decoder_dim": 20, "decoder_heads": 2, "scales": (8, 1), "layers": (2, 12)},
     ValueError, "decoder_dim: expected a multiple of 8 for scale 8, got 20"),
    ("localmim", {**MAE, "decoder_heads": 3}, ValueError, "decoder_dim: expected a multiple of decoder_heads 3, got 8"),
    ("localmim", {"cells": 2}, ValueError, "cells: method localmim has no such option"),
    ("mae", {"decoder": "both"}, ValueError, "decoder: expected one of self, cross, got 'both'"),
    (
        "mae",
        {**MAE, "decoder": "cross", "fusion": "mff"},
        ValueError,
        "fusion: expected 'none' for decoder 'cross', got 'mff'",
    ),
    # MaskAlign
    ("maskalign", {}, ValueError,
     "teacher: expected the folder of a vision transformer, or its name on the hub, got null"),
    ("maskalign", {"teacher": ""}, ValueError, "teacher: expected text, or null, got ''"),
    ("maskalign", {**ALIGN, "teacher_layers": 0}, ValueError,
     "teacher_layers: expected a whole number of at least 1, got 0"),
    ("maskalign", {**ALIGN, "teacher_layers": "5"}, TypeError,
     "teacher_layers: expected a whole number of at least 1, got '5'"),
    ("maskalign", {**ALIGN, "masking": "blocks"}, ValueError,
     "masking: expected one of attention, random, got 'blocks'"),
    ("maskalign", {**ALIGN, "fusion": "mean"}, ValueError, "fusion: expected one of linear, sum, got 'mean'"),
    ("maskalign", {**ALIGN, "drop_path": 1.0}, ValueError, "drop_path: expected a number in [0, 1), got 1.0"),
    ("maskalign", {**ALIGN, "reconstruction": "spline"}, ValueError,
     f"reconstruction: expected one of {RECONSTRUCTIONS}, got 'spline'"),
    ("maskalign", {**ALIGN, "thrown_weight": -1}, ValueError,
     "thrown_weight: expected a number of at least 0, got -1"),
    ("maskalign", {**ALIGN, "embed_dim": 18, "num_heads": 3}, ValueError,
     "embed_dim: expected a multiple of 4 for images of 2 axes, got 18"),
    ("maskalign", {**ALIGN, "throw_ratio": 0.5}, ValueError, "throw_ratio: method maskalign has no such option"),
    ("maskalign", {**ALIGN, "throwing": "random"}, ValueError, "throwing: method maskalign has no such option"),
    ("maskalign", {**ALIGN, "furthest_from": "none"}, ValueError,
     "furthest_from: method maskalign has no such option"),
    ("maskalign", {**ALIGN, "cells": 2}, ValueError, "cells: method maskalign has no such option"),
    ("maskalign", {**ALIGN, "mask_unit": 4}, ValueError, "mask_unit: method maskalign has no such option"),
]  # fmt: skip


def case_id(method, given):
    """Name a case: the method, and options that differ from a small model's."""
    own = {name: value for name, value in given.items() if {**MAE, **TEACHER}.get(name) != value}
    return f"{method}-" + "-".join(f"{name}={value}" for name, value in own.items())


@pytest.mark.parametrize(
    ("method", "given", "error", "message"), WRONG, ids=[case_id(method, given) for method, given, _, _ in WRONG]
)
def test_wrong_options(method, given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        create_config(method, **given)


NAMED = [
    pytest.param(method, item, id=f"{method}-{item.name}")
    for method, config in METHODS.items()
    for item in options(config)
    if item.rule.choices or item.is_flag
]


@pytest.mark.parametrize(("method", "item"), NAMED)
def test_wrong_names_and_flags(method, item):
    error = TypeError if item.is_flag else ValueError
    with pytest.raises(error, match=f"^{re.escape(f'{item.name}: expected {item.expected}, got')} 'wrong'$"):
        create_config(method, **{**({"teacher": "folder"} if method == "maskalign" else {}), item.name: "wrong"})


def test_every_option_with_a_range_is_in_the_table():
    tested = {name for _, given, _, message in WRONG for name in given if message.startswith(f"{name}: ")}
    named = {parameters.values[1].name for parameters in NAMED}
    assert tested | named >= {item.name for config in METHODS.values() for item in options(config)}

"""Records of methods: counts, schedules, sizes, and one table of wrong options."""

import json
import re
from dataclasses import replace

import pytest

from prmim_core import Grid, Schedule, TokenCounts
from prmim_methods import METHODS, MAEConfig, MaskAlignConfig, SimMIMConfig, Transformer, create_config
from prmim_methods.method import IMAGENET_MEAN, IMAGENET_STD
from prmim_methods.record import options

TEACHER = {"teacher": "owner/model"}
BASE = {"mae": {}, "simmim": {}, "maskalign": TEACHER}
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
        ("mae", {"image_size": (32, 32, 32), "patch_size": (8, 8, 8), "decoder_dim": 48}, (16, 16, 32)),
        ("simmim", {}, (76, 71, 49)),
        ("simmim", {"throw_by": "unit"}, (76, 72, 48)),
        ("simmim", {"throw_ratio": 0.5}, (76, 22, 98)),
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
    all_pixels = f"{len(patches)} tokens predict all 16 x 16 pixels, normalised over the patch"
    means = f"{len(cells)} tokens predict the means of 2 x 2 cells, normalised over the image"
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
    over = "the patch and those next to it"
    assert rows["  patches"] == "71 tokens predict all 16 x 16 pixels, up to 40 periods per image"
    assert rows["  cells"] == f"49 tokens predict the means of 4 x 4 cells, normalised over {over}"


@pytest.mark.parametrize("method", METHODS)
def test_the_baseline_is_the_published_method(method):
    given = {} if method == "maskalign" else {"extra_cells": "known", "extra_cells_weight": 2}
    config = make(method, stages=3, depth=2, **given)
    baseline = config.baseline()
    changed = {"reconstruction": "none"} if method == "maskalign" else {"throw_ratio": 0.0, "extra_cells": "none"}
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
    mae, simmim, maskalign = (make(method) for method in METHODS)
    assert [config.position for config in (mae, simmim, maskalign)] == ["absolute", "relative", "absolute"]
    assert [config.layer_scale for config in (mae, simmim, maskalign)] == [None, 0.1, None]
    assert [config.drop_rate for config in (mae, simmim, maskalign)] == [0.0, 0.1, 0.1]
    assert [config.predicts for config in (mae, simmim, maskalign)] == ["pixels", "pixels", "features"]
    assert SimMIMConfig(position="absolute", drop_path=0.2).drop_rate == 0.2
    assert not simmim.has_position_table
    assert SimMIMConfig(position="absolute").has_position_table


def test_parameters_without_weight_decay():
    assert [make(method).not_decayed() for method in METHODS] == [set(), {"encoder.cls_token"}, {"fusion"}]


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
    for changes in (*other_weights, {"cells": 4}, {"cell_norm": "window"}):
        assert replace(config, **changes).architecture() != architecture
    patches = {name: value for name, value in architecture.items() if name not in ("cells", "cell_norm")}
    assert replace(config, thrown_target="patch").architecture() == patches
    assert config.baseline().architecture() == {**patches, "reconstruction": "none"}


def test_methods_are_named_once():
    assert list(METHODS) == ["mae", "simmim", "maskalign"]
    assert all(config.name == name for name, config in METHODS.items())


def test_none_stands_for_the_default():
    assert create_config("simmim", mask_ratio=None, depth=None) == SimMIMConfig()


# --- wrong options -------------------------------------------------------------------------------------------------

MODELS = "vit_tiny, vit_small, vit_base, vit_large, vit_huge"
RECONSTRUCTIONS = "kernel, interpolate, conv, none"
PER_AXIS = "a whole number of at least 1, or one for each axis"
SEED = "a whole number in [0, 4294967295]"
THROWN = "TokenCounts(visible=4, decoded=0, thrown=12)"
MAE = {**SMALL, **DECODER}
ALIGN = {**SMALL, **TEACHER}

WRONG = [
    # every method
    ("mea", {}, ValueError, "method: expected one of mae, simmim, maskalign, got 'mea'"),
    (["mae"], {}, TypeError, "method: expected one of mae, simmim, maskalign, got ['mae']"),
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
    ("mae", {**MAE, "throw_ratio": 0.75, "reconstruction": "none"}, ValueError,
     f"throw_ratio: expected at least one supervised token, got none ({THROWN}, reconstruction 'none', "
     "thrown_weight 1)"),
    ("mae", {**MAE, "throw_ratio": 0.75, "thrown_weight": 0}, ValueError,
     f"throw_ratio: expected at least one supervised token, got none ({THROWN}, reconstruction 'kernel', "
     "thrown_weight 0)"),
    ("mae", {"throwing": "weighted"}, ValueError, "throwing: expected one of furthest, random, cell, got 'weighted'"),
    ("mae", {"throwing": "none"}, ValueError, "throwing: expected one of furthest, random, cell, got 'none'"),
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
     "norm_pix: expected patches of at least 2 values to normalise, got patches of 1"),
    ("mae", {"decoder_depth": 0}, ValueError, "decoder_depth: expected a whole number of at least 1, got 0"),
    ("mae", {"decoder_heads": 0}, ValueError, "decoder_heads: expected a whole number of at least 1, got 0"),
    ("mae", {"decoder_dim": 100}, ValueError, "decoder_dim: expected a multiple of decoder_heads 16, got 100"),
    ("mae", {**MAE, "decoder_heads": 3}, ValueError, "decoder_dim: expected a multiple of decoder_heads 3, got 8"),
    ("mae", {**MAE, "decoder_dim": 6, "decoder_heads": 3, "reconstruction": "conv"}, ValueError,
     "decoder_dim: expected a multiple of 4 for images of 2 axes, got 6"),
    ("mae", {**MAE, "image_size": (16,), "patch_size": (4,), "decoder_dim": 6}, ValueError,
     "decoder_dim: expected a multiple of 4 for reconstruction 'kernel', got 6"),
    ("mae", {"mask_unit": 4}, ValueError, "mask_unit: method mae has no such option"),
    ("mae", {"teacher": "clip"}, ValueError, "teacher: method mae has no such option"),
    ("mae", {"drop_path": 0.1}, ValueError, "drop_path: method mae has no such option"),
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
    ("simmim", {"position": "learned"}, ValueError, "position: expected one of relative, absolute, got 'learned'"),
    ("simmim", {"layer_scale": 0}, ValueError, "layer_scale: expected a number in (0, 1), got 0"),
    ("simmim", {"drop_path": 1.0}, ValueError, "drop_path: expected a number in [0, 1), got 1.0"),
    ("simmim", {"drop_path": -0.1}, ValueError, "drop_path: expected a number in [0, 1), got -0.1"),
    ("simmim", {"drop_path": "0.1"}, TypeError, "drop_path: expected a number in [0, 1), got '0.1'"),
    ("simmim", {**SMALL, "embed_dim": 18, "num_heads": 3}, ValueError,
     "embed_dim: expected a multiple of 4 for reconstruction 'kernel', got 18"),
    ("simmim", {"decoder_dim": 256}, ValueError, "decoder_dim: method simmim has no such option"),
    ("simmim", {"norm_pix": False}, ValueError, "norm_pix: method simmim has no such option"),
    ("simmim", {"fusion": "sum"}, ValueError, "fusion: method simmim has no such option"),
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
    """Return a name of a case: the method and the options that are not those of a small model."""
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

"""What classifiers of every adapter share."""

import re

import numpy as np
import pytest

from prmim_core.classifier import check_classifier, check_optimizer, check_targets, rate_scale

CLASSIFIER = {"num_classes": 3, "pool": "mean", "frozen": False, "drop_path": 0.0, "norm": "layer"}
OPTIMIZER = {
    "optimizer": "adamw",
    "frozen": True,
    "layer_decay": 1.0,
    "momentum": 0.9,
    "trust": 0.001,
    "ema_decay": None,
}


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("encoder.patch_embed.proj.weight", 13),
        ("encoder.patch_embed.proj.bias", 13),
        ("encoder.cls_token", 13),
        ("encoder.pos_embed", 13),
        ("encoder.rel_pos_bias.relative_position_bias_table", 13),
        ("encoder.blocks.0.norm1.weight", 12),
        ("encoder.blocks.1.attn.qkv.weight", 11),
        ("encoder.blocks.11.ls2.gamma", 1),
        ("encoder.norm.weight", 0),
        ("fc_norm.bias", 0),
        ("head.weight", 0),
    ],
)
def test_layers_near_the_images_learn_more_slowly(name, power):
    assert rate_scale(name, 12, 0.65) == pytest.approx(0.65**power, rel=1e-12)
    assert rate_scale(name, 12, 1.0) == 1.0


def test_options_that_fit():
    for changes in ({}, {"pool": "cls"}, {"drop_path": 0.3}, {"frozen": True, "norm": "batch"}, {"frozen": True}):
        check_classifier(**{**CLASSIFIER, **changes})
    for changes in ({}, {"optimizer": "lars"}, {"frozen": False}, {"ema_decay": 0.9}, {"momentum": 0}):
        check_optimizer(**{**OPTIMIZER, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected positive integers, got (0,)"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected integers, got (2.0,)"),
        ({"pool": "max"}, ValueError, "pool: expected 'mean' or 'cls', got 'max'"),
        ({"norm": "group"}, ValueError, "norm: expected 'layer' or 'batch', got 'group'"),
        ({"frozen": 1}, TypeError, "frozen: expected True or False, got 1"),
        ({"drop_path": 1.0}, ValueError, "drop_path: expected a number in [0, 1), got 1.0"),
        (
            {"drop_path": 0.1, "frozen": True},
            ValueError,
            "drop_path: expected 0 for a frozen encoder, got 0.1",
        ),
        (
            {"norm": "batch"},
            ValueError,
            "norm: expected 'layer' for an encoder that is not frozen, got 'batch'",
        ),
    ],
    ids=str,
)
def test_wrong_options_of_a_classifier(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_classifier(**{**CLASSIFIER, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected 'adamw' or 'lars', got 'sgd'"),
        (
            {"optimizer": "lars", "frozen": False},
            "optimizer: expected 'adamw' for an encoder that is not frozen, got 'lars'",
        ),
        ({"layer_decay": 0.0}, "layer_decay: expected a number in (0, 1], got 0.0"),
        ({"layer_decay": 1.1}, "layer_decay: expected a number in (0, 1], got 1.1"),
        ({"momentum": 1.0}, "momentum: expected a number in [0, 1), got 1.0"),
        ({"trust": 0.0}, "trust: expected a positive number, got 0.0"),
        ({"trust": float("inf")}, "trust: expected a positive number, got inf"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number in (0, 1) or None, got 1.0"),
        ({"ema_decay": float("nan")}, "ema_decay: expected a number in (0, 1) or None, got nan"),
    ],
    ids=str,
)
def test_wrong_options_of_an_optimizer(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_optimizer(**{**OPTIMIZER, **changes})


def test_wrong_targets():
    check_targets(np.zeros((4, 3), np.float32), 4, 3)
    with pytest.raises(TypeError, match=r"^targets: expected float32, got float64$"):
        check_targets(np.zeros((4, 3)), 4, 3)
    for shape in ((4,), (4, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"^targets: expected shape \(4, 3\), got "):
            check_targets(np.zeros(shape, np.float32), 4, 3)

"""Options of classifiers, and what follows from them."""

import re

import numpy as np
import pytest

from prmim_methods import ClassifierConfig, MAEConfig, SimMIMConfig
from prmim_methods.classifier import FOREIGN, check_targets, copy_table
from prmim_methods.positions import SHARED_TABLE


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("encoder.patch_embed.proj.weight", 13),
        ("encoder.patch_embed.proj.bias", 13),
        ("encoder.cls_token", 13),
        ("encoder.pos_embed", 13),
        ("encoder.blocks.0.norm1.weight", 12),
        ("encoder.blocks.1.attn.qkv.weight", 11),
        ("encoder.blocks.2.attn.relative_position_bias_table", 10),
        ("encoder.blocks.11.ls2.gamma", 1),
        ("encoder.norm.weight", 0),
        ("fc_norm.bias", 0),
        ("head.weight", 0),
    ],
)
def test_layers_near_the_images_learn_more_slowly(name, power):
    assert ClassifierConfig().rate_scale(name, 12) == pytest.approx(0.65**power, rel=1e-12)
    assert ClassifierConfig(layer_decay=1).rate_scale(name, 12) == 1.0


def test_the_protocol_decides_what_is_trained():
    finetune, linear = ClassifierConfig(drop_path=0.3), ClassifierConfig(protocol="linear", pool="cls")
    assert (finetune.is_frozen, finetune.drop_rate, finetune.norm, finetune.head_std) == (False, 0.3, "layer", 2e-5)
    assert (linear.is_frozen, linear.drop_rate, linear.norm, linear.head_std) == (True, 0.0, "batch", 0.01)
    assert finetune.not_decayed() == {"encoder.cls_token", "encoder.pos_embed"}


@pytest.mark.parametrize(
    ("method", "protocol", "position"),
    [
        (MAEConfig(), "finetune", "absolute"),
        (MAEConfig(), "linear", "absolute"),
        (SimMIMConfig(), "finetune", "relative_per_block"),
        (SimMIMConfig(), "linear", "relative"),
        (SimMIMConfig(position="absolute"), "finetune", "absolute"),
    ],
)
def test_fine_tuned_blocks_have_tables_of_their_own(method, protocol, position):
    config = ClassifierConfig(protocol=protocol)
    assert config.position(method) == config.architecture(method, 3)["position"] == position


def test_the_shared_table_is_copied_under_the_names_of_the_blocks():
    weights = {SHARED_TABLE: "table", "head.weight": "head"}
    blocks = {f"encoder.blocks.{block}.attn.relative_position_bias_table": "table" for block in range(3)}
    assert copy_table(weights, 3) == weights | blocks
    assert copy_table({"head.weight": "head"}, 3) == {"head.weight": "head"}


def test_an_architecture_describes_the_encoder_and_the_head():
    method = MAEConfig(image_size=32, patch_size=8, depth=2)
    architecture = ClassifierConfig().architecture(method, 10)
    encoder = {name: value for name, value in method.architecture().items() if name in architecture}
    assert architecture == {
        "kind": "classifier",
        **encoder,
        "position": "absolute",
        "num_classes": 10,
        "pool": "mean",
        "norm": "layer",
    }
    assert set(encoder) == {
        *("image_size", "patch_size", "channels", "mean", "std"),
        *("embed_dim", "depth", "num_heads"),
    }
    linear = ClassifierConfig(protocol="linear", pool="cls").architecture(SimMIMConfig(), 3)
    assert (linear["position"], linear["pool"], linear["norm"]) == ("relative", "cls", "batch")


NUMBER = "a number in"
WRONG = [
    ({"protocol": "knn"}, ValueError, "protocol: expected one of finetune, linear, got 'knn'"),
    ({"pool": "max"}, ValueError, "pool: expected one of mean, cls, got 'max'"),
    ({"drop_path": 1.0}, ValueError, f"drop_path: expected {NUMBER} [0, 1), got 1.0"),
    ({"drop_path": -0.1}, ValueError, f"drop_path: expected {NUMBER} [0, 1), got -0.1"),
    ({"layer_decay": 0.0}, ValueError, f"layer_decay: expected {NUMBER} (0, 1], got 0.0"),
    ({"layer_decay": 1.1}, ValueError, f"layer_decay: expected {NUMBER} (0, 1], got 1.1"),
    ({"protocol": "linear", "momentum": 1.0}, ValueError, f"momentum: expected {NUMBER} [0, 1), got 1.0"),
    ({"protocol": "linear", "momentum": -1.0}, ValueError, f"momentum: expected {NUMBER} [0, 1), got -1.0"),
    ({"protocol": "linear", "trust": 0.0}, ValueError, "trust: expected a number above 0, got 0.0"),
    ({"protocol": "linear", "trust": float("inf")}, ValueError, "trust: expected a number above 0, got inf"),
    ({"ema_decay": 0.0}, ValueError, f"ema_decay: expected {NUMBER} (0, 1), or null, got 0.0"),
    ({"ema_decay": 1.0}, ValueError, f"ema_decay: expected {NUMBER} (0, 1), or null, got 1.0"),
    ({"ema_decay": float("nan")}, ValueError, f"ema_decay: expected {NUMBER} (0, 1), or null, got nan"),
    ({"ema_decay": "0.9"}, TypeError, f"ema_decay: expected {NUMBER} (0, 1), or null, got '0.9'"),
    ({"momentum": 0.5}, ValueError, "momentum: protocol finetune has no such option"),
    ({"trust": 0.5}, ValueError, "trust: protocol finetune has no such option"),
    ({"batch_norm": "all"}, ValueError, "batch_norm: protocol finetune has no such option"),
    ({"protocol": "linear", "batch_norm": "sync"}, ValueError,
     "batch_norm: expected one of device, all, got 'sync'"),
    ({"protocol": "linear", "drop_path": 0.2}, ValueError, "drop_path: protocol linear has no such option"),
    ({"protocol": "linear", "layer_decay": 0.5}, ValueError, "layer_decay: protocol linear has no such option"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[str(given) for given, _, _ in WRONG])
def test_wrong_options(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ClassifierConfig(**given)


@pytest.mark.parametrize("protocol", FOREIGN)
def test_defaults_of_foreign_options_may_be_given(protocol):
    config = ClassifierConfig(protocol=protocol)
    assert ClassifierConfig(protocol=protocol, **{name: getattr(config, name) for name in FOREIGN[protocol]}) == config


def test_wrong_targets():
    check_targets(np.zeros((4, 3), np.float32), 4, 3)
    with pytest.raises(TypeError, match=r"^targets: expected float32, got float64$"):
        check_targets(np.zeros((4, 3)), 4, 3)
    for shape in ((4,), (4, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"^targets: expected shape \(4, 3\), got "):
            check_targets(np.zeros(shape, np.float32), 4, 3)

"""Names of our weights in the files of other libraries."""

import numpy as np
import pytest

from prmim_methods.layouts import BEIT, PIXIO, TIMM, TIMM_RELATIVE, VIT, VIT_MAE, left_out, their_names, to_library


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("encoder.blocks.10.mlp.fc2.weight", VIT, ["encoder.layer.10.output.dense.weight"]),
        ("decoder.blocks.7.mlp.fc1.bias", VIT_MAE, ["decoder.decoder_layers.7.intermediate.dense.bias"]),
        ("encoder.norm.weight", VIT_MAE, ["vit.layernorm.weight"]),
        ("encoder.blocks.2.norm2.bias", PIXIO, ["encoder.layer.2.norm2.bias"]),
        ("encoder.blocks.11.ls2.gamma", BEIT, ["encoder.layer.11.lambda_2"]),
        ("encoder.blocks.11.ls2.gamma", TIMM, ["blocks.11.ls2.gamma"]),
        (
            "encoder.rel_pos_bias.relative_position_bias_table",
            TIMM_RELATIVE,
            ["shared_rel_pos.relative_position_bias_table"],
        ),
        ("encoder.mask_token", TIMM, []),
        ("encoder.blocks.0.ls1.gamma", VIT, []),
        ("decoder.pred.bias", VIT, []),
    ],
)
def test_the_longest_beginning_names_a_weight(name, layout, expected):
    assert their_names(name, layout) == expected


def test_keys_without_a_bias_are_left_out():
    bias = np.arange(6)
    found = to_library({"encoder.blocks.0.attn.qkv.bias": bias}, BEIT)
    assert [part.tolist() for part in found.values()] == [[0, 1], [4, 5]]
    assert all(np.shares_memory(part, bias) for part in found.values())


def test_weights_without_a_place_are_listed():
    assert left_out(["encoder.norm.bias", "cell_head.bias", "rebuild.table"], VIT_MAE) == [
        "cell_head.bias",
        "rebuild.table",
    ]

"""Fusion of encoder layers, against one product of all maps and weights."""

import numpy as np
import pytest

from prmim_reference import mae
from prmim_reference.fusion import fuse, fused_blocks
from prmim_reference.noise import counter_noise

DIM = 6


def fusion_weights(random_weights, number):
    weights = random_weights()
    for place in range(number - 1):
        weights.linear(f"fusion.projections.{place}", DIM, DIM)
    weights["fusion.layer_weights"] = weights.normal(number)
    return weights


@pytest.mark.parametrize("depth", [1, 2, 7, 12])
def test_the_outputs_are_averaged_with_softmax_weights(random_weights, oracle, depth):
    number = min(depth, 6)
    weights = fusion_weights(random_weights, number)
    states = np.random.default_rng(1).normal(size=(depth, 5, DIM))
    blocks = [*(depth * k // 6 for k in range(6 - number, 5)), depth - 1] if depth > 6 else range(depth)
    maps = [oracle.affine(states[k], weights, f"fusion.projections.{i}") for i, k in enumerate(blocks[:-1])]
    logits = np.exp(weights["fusion.layer_weights"])
    expected = np.tensordot(logits / logits.sum(), [*maps, states[-1]], axes=1)
    assert fused_blocks(depth) == list(blocks)
    np.testing.assert_allclose(fuse(list(states), weights), expected, rtol=1e-12)


def test_with_all_weight_on_the_last_block_it_is_mae(random_weights):
    weights = fusion_weights(random_weights, 2)
    weights.encoder((2, 3), (2, 2), 1, DIM, depth=2)
    weights["encoder.pos_embed"] = weights.normal(1, 7, DIM)
    weights.blocks("decoder", DIM, depth=1)
    weights.norm("decoder.norm", DIM)
    weights.linear("decoder.embed", DIM, DIM)
    weights.linear("decoder.pred", DIM, 4)
    weights["decoder.mask_token"], weights["decoder.pos_embed"] = weights.normal(1, 1, DIM), weights.normal(1, 7, DIM)
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 1), np.uint8)
    noise = np.array([counter_noise(0, 0, 0, 6)])
    given = {"patch_size": (2, 2), "num_heads": 2, "decoder_heads": 2, "mask_ratio": 0.5, "throw_ratio": 0.0}
    fused, plain = (mae.forward(weights, images, noise, fusion=fusion, **given).loss for fusion in ("mff", "none"))
    assert fused != pytest.approx(plain, rel=1e-3)
    weights["fusion.layer_weights"] = np.array([-50.0, 50.0])
    assert mae.forward(weights, images, noise, fusion="mff", **given).loss == pytest.approx(plain, rel=1e-12)

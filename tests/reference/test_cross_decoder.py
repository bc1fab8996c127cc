"""The decoder of CrossMAE against what follows from its definition."""

import numpy as np
import pytest

from prmim_reference.cross_decoder import cross_attention, cross_block, cross_decode, mix_of_layers

DIM, CONTEXT, HEADS = 6, 4, 3


def random_weights(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def layer(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def normal(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


ATTENTION = {**layer("attn.q", DIM, DIM), **layer("attn.kv", CONTEXT, 2 * DIM), **layer("attn.proj", DIM, DIM)}
BLOCK = {
    **ATTENTION,
    **normal("norm1", DIM),
    **normal("norm_context", CONTEXT),
    **normal("norm2", DIM),
    **layer("mlp.fc1", DIM, 2 * DIM),
    **layer("mlp.fc2", 2 * DIM, DIM),
}


def test_equal_keys_are_averaged():
    weights = random_weights(ATTENTION)
    weights["attn.kv.weight"][:DIM] = 0  # all keys are the bias
    weights["attn.proj.weight"], weights["attn.proj.bias"] = np.eye(DIM), np.zeros(DIM)
    rng = np.random.default_rng(1)
    context = rng.normal(size=(5, CONTEXT))
    values = context @ weights["attn.kv.weight"][DIM:].T + weights["attn.kv.bias"][DIM:]
    found = cross_attention(rng.normal(size=DIM), context, weights, "attn", HEADS)
    np.testing.assert_allclose(found, values.mean(0), rtol=1e-12)


def test_the_largest_score_wins_head_by_head():
    weights = {name: np.zeros(shape) for name, shape in ATTENTION.items()}
    weights["attn.q.bias"] = np.array([1000.0, 0, -1000, 0, 1000, 0])  # heads look for +, -, + of channel 0
    weights["attn.kv.weight"][[0, 2, 4], 0] = 1
    weights["attn.kv.weight"][DIM:, 1] = 1
    weights["attn.proj.weight"] = np.eye(DIM)
    context = np.array([[1.0, 5, 0, 0], [-1, 7, 0, 0]])
    found = cross_attention(np.zeros(DIM), context, weights, "attn", HEADS)
    assert found.tolist() == [5, 5, 7, 7, 5, 5]


def test_a_head_must_divide_the_width():
    with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of 6, got 4$"):
        cross_attention(np.zeros(DIM), np.zeros((1, CONTEXT)), random_weights(ATTENTION), "attn", 4)


def test_a_block_without_branches_changes_nothing():
    weights = random_weights({f"0.{name}": shape for name, shape in BLOCK.items()})
    for name in ("attn.proj", "mlp.fc2"):
        weights[f"0.{name}.weight"][:], weights[f"0.{name}.bias"][:] = 0, 0
    x = np.arange(6.0)
    assert cross_block(x, np.ones((2, CONTEXT)), weights, "0", HEADS).tolist() == x.tolist()


def test_every_block_reads_its_own_mix_and_visible_tokens_one_more():
    blocks = {f"decoder.blocks.{number}.{name}": shape for number in (0, 1) for name, shape in BLOCK.items()}
    rest = {"decoder.mask_token": (1, 1, DIM), "decoder.pos_embed": (1, 5, DIM), **normal("decoder.norm", DIM)}
    embed = {**normal("decoder.norm_visible", CONTEXT), **layer("decoder.embed", CONTEXT, DIM)}
    weights = random_weights({**blocks, **rest, **embed, "decoder.mix": (3, 2)})
    rng = np.random.default_rng(1)
    layers = [rng.normal(size=(3, CONTEXT)) for _ in range(2)]
    features = cross_decode(layers, [0, 2], [3, 1], weights, HEADS)
    assert features.shape == (4, DIM)
    np.testing.assert_array_equal(mix_of_layers(layers, [1, 0]), layers[0])
    for row, changed in enumerate(([2, 3], [2, 3], [0, 1])):
        other = {**weights, "decoder.mix": weights["decoder.mix"] + (np.arange(3) == row)[:, None]}
        found = cross_decode(layers, [0, 2], [3, 1], other, HEADS)
        assert [place for place in range(4) if (found[place] != features[place]).any()] == changed
    plain = {name: array for name, array in weights.items() if name not in embed}
    found = cross_decode(layers, [0, 2], [3, 1], plain, HEADS)
    assert np.isnan(found[:2]).all()
    np.testing.assert_array_equal(found[2:], features[2:])

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import erf
from scipy.special import softmax as scipy_softmax

from prmim_reference import vit
from prmim_reference.targets import patchify


def random_linear(rng, name, rows, columns):
    return {f"{name}.weight": rng.normal(size=(rows, columns)), f"{name}.bias": rng.normal(size=rows)}


def random_block(rng, name, dim):
    weights = {}
    for norm in ("norm1", "norm2"):
        weights[f"{name}.{norm}.weight"] = rng.normal(size=dim)
        weights[f"{name}.{norm}.bias"] = rng.normal(size=dim)
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for layer, (rows, columns) in layers.items():
        weights |= random_linear(rng, f"{name}.{layer}", rows, columns)
    return weights


def einsum_attention(x, weights, name, num_heads):
    """All heads at once."""
    length, dim = x.shape
    qkv = np.einsum("nd,ed->ne", x, weights[f"{name}.qkv.weight"]) + weights[f"{name}.qkv.bias"]
    query, key, value = qkv.reshape(length, 3, num_heads, dim // num_heads).transpose(1, 0, 2, 3)
    scores = np.einsum("ihc,jhc->hij", query, key) * (dim // num_heads) ** -0.5
    mixed = np.einsum("hij,jhc->ihc", scipy_softmax(scores, axis=-1), value).reshape(length, dim)
    return mixed @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]


def numpy_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def test_gelu_agrees_with_scipys_error_function():
    x = np.linspace(-8, 8, 401)
    assert np.allclose(vit.gelu(x), 0.5 * x * (1 + erf(x / np.sqrt(2))), rtol=1e-13, atol=0)
    assert vit.gelu(np.zeros((0, 3))).shape == (0, 3)


def test_softmax_agrees_with_scipy_and_survives_large_numbers():
    x = np.random.default_rng(0).normal(size=(3, 7)) * 5
    assert np.allclose(vit.softmax(x), scipy_softmax(x, axis=-1), rtol=1e-13)
    assert vit.softmax(np.array([1e4, 0.0])).tolist() == [1.0, 0.0]


def test_layer_norm_agrees_with_numpys_variance():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(3, 2, size=(5, 8)), rng.normal(size=8), rng.normal(size=8)
    assert np.allclose(vit.layer_norm(x, weight, bias), numpy_norm(x, weight, bias), atol=1e-13)
    assert np.allclose(vit.layer_norm(x), numpy_norm(x, 1, 0), atol=1e-13)
    assert np.array_equal(vit.layer_norm(np.full((1, 4), 3.0)), np.zeros((1, 4)))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_agrees_with_einsum(num_heads):
    rng = np.random.default_rng(num_heads)
    weights = random_block(rng, "block", 8)
    x = rng.normal(size=(6, 8))
    expected = einsum_attention(x, weights, "block.attn", num_heads)
    assert np.allclose(vit.attention(x, weights, "block.attn", num_heads), expected, atol=1e-12)


def test_heads_divide_the_width():
    weights = random_block(np.random.default_rng(0), "block", 8)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 8, got 3"):
        vit.attention(np.zeros((2, 8)), weights, "block.attn", 3)


def test_a_transformer_is_pre_norm_blocks_and_a_final_norm():
    rng = np.random.default_rng(0)
    dim, heads = 8, 2
    weights = random_block(rng, "encoder.blocks.0", dim) | random_block(rng, "encoder.blocks.1", dim)
    weights |= {"encoder.norm.weight": rng.normal(size=dim), "encoder.norm.bias": rng.normal(size=dim)}
    assert vit.depth(weights, "encoder") == 2
    x = start = rng.normal(size=(5, dim))
    for name in ("encoder.blocks.0", "encoder.blocks.1"):
        normed = numpy_norm(x, weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"])
        x = x + einsum_attention(normed, weights, f"{name}.attn", heads)
        normed = numpy_norm(x, weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"])
        hidden = normed @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"]
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
        x = x + hidden @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]
    expected = numpy_norm(x, weights["encoder.norm.weight"], weights["encoder.norm.bias"])
    assert np.allclose(vit.transformer(start, weights, "encoder", heads), expected, atol=1e-10)


@pytest.mark.parametrize(("lengths", "patch_size"), [((12,), (3,)), ((6, 8), (3, 2)), ((4, 4, 6), (2, 2, 3))])
def test_patch_embedding_is_a_strided_convolution(lengths, patch_size):
    rng = np.random.default_rng(0)
    axes, channels, dim = len(lengths), 3, 5
    weights = {"proj.weight": rng.normal(size=(dim, channels, *patch_size)), "proj.bias": rng.normal(size=dim)}
    image = rng.normal(size=(*lengths, channels))
    first = np.moveaxis(image, -1, 0)  # channels first, as the convolution has it
    windows = sliding_window_view(first, patch_size, axis=tuple(range(1, axes + 1)))
    windows = windows[(slice(None), *(slice(None, None, side) for side in patch_size))]
    expected = np.tensordot(weights["proj.weight"], windows, (range(1, axes + 2), (0, *range(axes + 1, 2 * axes + 1))))
    expected = expected.reshape(dim, -1).T + weights["proj.bias"]
    assert np.allclose(vit.patch_embedding(patchify(image, patch_size), weights, "proj"), expected, atol=1e-12)


def test_sin_cos_table_encodes_the_column_first_then_the_row():
    height, width, dim = 3, 5, 16
    table = vit.sin_cos_table((height, width), dim)
    assert table.shape == (1 + height * width, dim)
    assert not table[0].any()
    rows, columns = np.mgrid[:height, :width]
    frequency = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    for start, index in ((0, columns), (dim // 2, rows)):
        angle = index.ravel()[:, None] * frequency
        half = table[1:, start : start + dim // 2]
        assert np.allclose(half, np.concatenate([np.sin(angle), np.cos(angle)], axis=1), atol=1e-14)


def test_sin_cos_table_values_by_hand():
    token = vit.sin_cos_table((2, 3), 8)[1 + 5]  # row 1, column 2; frequencies 1 and 0.01
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    assert np.allclose(token, expected, atol=1e-15)


@pytest.mark.parametrize(("shape", "dim"), [((6,), 8), ((2, 3, 4), 12), ((2, 3, 4), 18)])
def test_sin_cos_table_gives_every_axis_an_equal_part_the_last_first(shape, dim):
    table = vit.sin_cos_table(shape, dim)
    axes = len(shape)
    pairs = dim // axes // 2
    index = np.indices(shape).reshape(axes, -1)
    for part, axis in enumerate(reversed(range(axes))):
        wave = np.exp(1j * index[axis][:, None] * np.exp(-np.log(10000) * np.arange(pairs) / pairs))
        found = table[1:, part * 2 * pairs : (part + 1) * 2 * pairs]
        assert np.allclose(found, np.concatenate([wave.imag, wave.real], axis=1), atol=1e-13)


def test_sin_cos_table_refuses_widths_that_axes_cannot_share():
    with pytest.raises(ValueError, match="dim: expected a multiple of 6 for 3 axes, got 16"):
        vit.sin_cos_table((2, 2, 2), 16)

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import erf
from scipy.special import softmax as scipy_softmax

from prmim_reference import reconstruct, vit
from prmim_reference.grid import positions
from prmim_reference.targets import patchify


def random_block(rng, name, dim, *, layer_scale=False):
    weights = {}
    for norm in ("norm1", "norm2"):
        weights[f"{name}.{norm}.weight"] = rng.normal(size=dim)
        weights[f"{name}.{norm}.bias"] = rng.normal(size=dim)
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for layer, (rows, columns) in layers.items():
        weights[f"{name}.{layer}.weight"] = rng.normal(size=(rows, columns))
        weights[f"{name}.{layer}.bias"] = rng.normal(size=rows)
    if layer_scale:
        weights |= {f"{name}.ls1.gamma": rng.normal(size=dim), f"{name}.ls2.gamma": rng.normal(size=dim)}
    return weights


def random_encoder(seed=0, *, dim=8, depth=2, layer_scale=False):
    rng = np.random.default_rng(seed)
    weights = {"encoder.norm.weight": rng.normal(size=dim), "encoder.norm.bias": rng.normal(size=dim)}
    for number in range(depth):
        weights |= random_block(rng, f"encoder.blocks.{number}", dim, layer_scale=layer_scale)
    return weights, rng.normal(size=(5, dim))


def einsum_attention(x, weights, name, num_heads, bias=0.0):
    """All heads at once."""
    length, dim = x.shape
    qkv = np.einsum("nd,ed->ne", x, weights[f"{name}.qkv.weight"]) + weights[f"{name}.qkv.bias"]
    query, key, value = qkv.reshape(length, 3, num_heads, dim // num_heads).transpose(1, 0, 2, 3)
    scores = np.einsum("ihc,jhc->hij", query, key) * (dim // num_heads) ** -0.5 + bias
    mixed = np.einsum("hij,jhc->ihc", scipy_softmax(scores, axis=-1), value).reshape(length, dim)
    return mixed @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]


def einsum_mlp(x, weights, name):
    hidden = x @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"]
    hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
    return hidden @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]


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


def test_layer_norm_adds_eps_to_the_variance():
    x = np.array([[-2.0, 2.0]])  # of variance 4
    assert np.allclose(vit.layer_norm(x, eps=5.0), x / 3, atol=1e-15)
    assert np.allclose(vit.layer_norm(1e-3 * x), 1e-3 * x / np.sqrt(5e-6), atol=1e-13)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_agrees_with_einsum(num_heads, has_bias):
    rng = np.random.default_rng(num_heads)
    weights = random_block(rng, "block", 8)
    x = rng.normal(size=(6, 8))
    bias = rng.normal(0, 3, size=(num_heads, 6, 6)) if has_bias else None
    expected = einsum_attention(x, weights, "block.attn", num_heads, 0.0 if bias is None else bias)
    assert np.allclose(vit.attention(x, weights, "block.attn", num_heads, bias), expected, atol=1e-12)


def test_attention_by_hand():
    # Queries and keys are zero, so the bias alone decides: token 0 looks at token 1 three times as much as at itself.
    weights = {
        "attn.qkv.weight": np.array([[0.0], [0.0], [2.0]]),
        "attn.qkv.bias": np.array([0.0, 0.0, 1.0]),
        "attn.proj.weight": np.array([[10.0]]),
        "attn.proj.bias": np.array([0.5]),
    }
    x = np.array([[1.0], [3.0]])  # values 3 and 7
    bias = np.log(np.array([[[1.0, 3.0], [1.0, 1.0]]]))
    assert np.allclose(vit.attention_maps(x, weights, "attn", 1, bias), [[[0.25, 0.75], [0.5, 0.5]]], atol=1e-15)
    assert np.allclose(vit.attention(x, weights, "attn", 1, bias), [[60.5], [50.5]], atol=1e-13)
    assert np.allclose(vit.attention(x, weights, "attn", 1), [[50.5], [50.5]], atol=1e-13)


def test_a_bias_far_below_zero_hides_a_token():
    rng = np.random.default_rng(0)
    weights, x = random_block(rng, "block", 8), rng.normal(size=(6, 8))
    bias = np.zeros((2, 6, 6))
    bias[:, :, 3] = -1e4
    without = vit.attention(np.delete(x, 3, axis=0), weights, "block.attn", 2)
    assert np.allclose(np.delete(vit.attention(x, weights, "block.attn", 2, bias), 3, axis=0), without, atol=1e-13)
    assert not np.allclose(vit.attention(x, weights, "block.attn", 2)[:3], without[:3], atol=1e-3)


def test_a_bias_per_head_or_query_alone_changes_nothing():
    rng = np.random.default_rng(0)
    weights, x = random_block(rng, "block", 8), rng.normal(size=(6, 8))
    expected = vit.attention(x, weights, "block.attn", 2)
    bias = np.broadcast_to(rng.normal(size=(2, 6, 1)), (2, 6, 6))
    assert np.allclose(vit.attention(x, weights, "block.attn", 2, bias), expected, atol=1e-12)
    transposed = bias.swapaxes(1, 2)
    assert not np.allclose(vit.attention(x, weights, "block.attn", 2, transposed), expected, atol=1e-3)


@pytest.mark.parametrize(("part", "matters"), [(0, True), (1, False), (2, True)], ids=["query", "key", "value"])
def test_a_bias_of_the_keys_changes_nothing(part, matters):
    # So a model without one, such as SimMIM's, is the same function.
    rng = np.random.default_rng(0)
    weights, x = random_block(rng, "block", 8), rng.normal(size=(6, 8))
    before = vit.attention(x, weights, "block.attn", 2)
    weights["block.attn.qkv.bias"][part * 8 : (part + 1) * 8] += rng.normal(size=8)
    assert np.allclose(vit.attention(x, weights, "block.attn", 2), before, atol=1e-12) != matters


def test_heads_divide_the_width():
    weights = random_block(np.random.default_rng(0), "block", 8)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 8, got 3"):
        vit.attention(np.zeros((2, 8)), weights, "block.attn", 3)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_transformer_is_pre_norm_blocks_and_a_final_norm(layer_scale, has_bias):
    heads = 2
    weights, start = random_encoder(layer_scale=layer_scale)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(heads, 5, 5)) if has_bias else None
    scales = rng.normal(size=(2, 2))
    assert vit.depth(weights, "encoder") == 2
    x, states = start, []
    for name, scale in zip(("encoder.blocks.0", "encoder.blocks.1"), scales, strict=True):
        normed = numpy_norm(x, weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"])
        attended = einsum_attention(normed, weights, f"{name}.attn", heads, 0.0 if bias is None else bias)
        x = x + scale[0] * attended * weights.get(f"{name}.ls1.gamma", 1.0)
        normed = numpy_norm(x, weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"])
        x = x + scale[1] * einsum_mlp(normed, weights, f"{name}.mlp") * weights.get(f"{name}.ls2.gamma", 1.0)
        states.append(x)
    found = vit.hidden_states(start, weights, "encoder", heads, bias, scales)
    assert np.allclose(found, states, atol=1e-10)
    expected = numpy_norm(x, weights["encoder.norm.weight"], weights["encoder.norm.bias"])
    assert np.allclose(vit.transformer(start, weights, "encoder", heads, bias, scales), expected, atol=1e-10)


def test_a_transformer_without_blocks_is_its_norm():
    weights, x = random_encoder(depth=0)
    assert vit.hidden_states(x, weights, "encoder", 2) == []
    expected = numpy_norm(x, weights["encoder.norm.weight"], weights["encoder.norm.bias"])
    assert np.allclose(vit.transformer(x, weights, "encoder", 2), expected, atol=1e-13)


def test_layer_scale_of_zero_makes_blocks_the_identity():
    weights, x = random_encoder(layer_scale=True)
    silent = {name: 0 * array if name.endswith("gamma") else array for name, array in weights.items()}
    assert all(np.array_equal(state, x) for state in vit.hidden_states(x, silent, "encoder", 2))
    assert not np.allclose(vit.hidden_states(x, weights, "encoder", 2)[0], x)


def test_layer_scale_of_one_is_none():
    weights, x = random_encoder(layer_scale=True)
    ones = {name: np.ones(8) if name.endswith("gamma") else array for name, array in weights.items()}
    without = {name: array for name, array in weights.items() if not name.endswith("gamma")}
    found = vit.transformer(x, ones, "encoder", 2)
    assert np.array_equal(found, vit.transformer(x, without, "encoder", 2))


@pytest.mark.parametrize(("scale", "silent"), [((0.0, 1.0), "attn.proj"), ((1.0, 0.0), "mlp.fc2")])
def test_a_scale_of_zero_makes_a_branch_vanish(scale, silent):
    weights, x = random_encoder(depth=1)
    found = vit.block(x, weights, "encoder.blocks.0", 2, scales=scale)
    for name in (f"encoder.blocks.0.{silent}.weight", f"encoder.blocks.0.{silent}.bias"):
        weights[name] = np.zeros_like(weights[name])
    assert np.allclose(found, vit.block(x, weights, "encoder.blocks.0", 2), atol=1e-13)
    assert np.array_equal(vit.block(x, weights, "encoder.blocks.0", 2, scales=(0.0, 0.0)), x)


def test_scales_belong_to_their_blocks():
    weights, x = random_encoder(depth=3)
    states = vit.hidden_states(x, weights, "encoder", 2, scales=[(1.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
    assert np.array_equal(states[0], vit.hidden_states(x, weights, "encoder", 2)[0])
    assert np.array_equal(states[1], states[0])
    assert not np.allclose(states[2], states[1])
    with pytest.raises(ValueError, match="scales: expected a pair for each of 3 blocks, got 2"):
        vit.hidden_states(x, weights, "encoder", 2, scales=[(1.0, 1.0)] * 2)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_relative_rows_number_offsets_and_pairs_with_the_class_token(shape):
    cells = positions(shape)
    offsets = int(np.prod([2 * n - 1 for n in shape]))
    tokens = range(len(cells))
    rows = {(i, j): vit.relative_position_row(cells[i], cells[j], shape) for i in tokens for j in tokens}
    assert all(row == reconstruct.offset_column(i, j, shape) for (i, j), row in rows.items())
    assert set(rows.values()) == set(range(offsets))  # every offset occurs
    assert all(rows[i, i] == offsets // 2 for i in tokens)
    assert all(rows[i, j] + rows[j, i] == offsets - 1 for i, j in rows)
    assert {vit.relative_position_row(None, cell, shape) for cell in cells} == {offsets}
    assert {vit.relative_position_row(cell, None, shape) for cell in cells} == {offsets + 1}
    assert vit.relative_position_row(None, None, shape) == offsets + 2


def test_relative_bias_by_hand():
    table = 10.0 * np.arange(3 * 3 + 3)[:, None] + np.arange(2)  # a grid of 2x2, two heads
    # Queries in rows: the class token, token 3 (row 1, column 1), token 1 (row 0, column 1).
    head = np.array([[11, 9, 9], [10, 4, 7], [10, 1, 4]]) * 10.0
    assert np.array_equal(vit.relative_position_bias([3, 1], (2, 2), table), [head, head + 1])


def test_relative_bias_of_some_tokens_is_cut_from_that_of_all(oracle):
    table = np.random.default_rng(0).normal(size=(5 * 7 + 3, 3))
    whole = oracle.relative_bias((3, 4), table)
    assert np.array_equal(vit.relative_position_bias(range(12), (3, 4), table), whole)
    rows = [0, 8, 3, 12]  # with the class token
    found = vit.relative_position_bias([7, 2, 11], (3, 4), table)
    assert np.array_equal(found, whole[:, rows][:, :, rows])
    assert vit.relative_position_bias([], (3, 4), table).tolist() == table[-1][:, None, None].tolist()


def test_the_relative_table_fits_the_grid():
    with pytest.raises(ValueError, match=r"table: expected 38 rows for the grid \(3, 4\), got 35"):
        vit.relative_position_bias([0], (3, 4), np.zeros((35, 2)))


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

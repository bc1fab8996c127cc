"""Parts of the vision transformer: position table, initialisation, embedding."""

from math import cos, sin, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prmim_reference import vit as reference
from prmim_torch import vit
from prmim_torch.vit import Attention, Decoder, Encoder, Linear, PatchProjection, attend, linear, sincos_table


def test_position_table_starts_with_zeros_and_encodes_the_column_first():
    table = sincos_table((3, 5), 8)
    assert table.shape == (1, 16, 8)
    assert table.dtype == torch.float32
    assert not table[0, 0].any()
    row, column = 2, 3
    expected = [f(i * w) for i in (column, row) for f in (sin, cos) for w in (1, 0.01)]
    torch.testing.assert_close(table[0, 1 + row * 5 + column], torch.tensor(expected))


@pytest.mark.parametrize(("shape", "dim"), [((7,), 6), ((3, 4), 8), ((2, 3, 4), 12)])
def test_position_table_is_the_reference_one(shape, dim):
    np.testing.assert_allclose(sincos_table(shape, dim)[0].numpy(), reference.sin_cos_table(shape, dim), atol=1e-7)


@pytest.mark.parametrize(("shape", "dim"), [((4,), 3), ((4, 4), 6), ((4, 4, 4), 8), ((4,), 0)])
def test_position_table_needs_channels_for_every_axis(shape, dim):
    with pytest.raises(ValueError, match=r"^dim: expected a positive multiple of \d"):
        sincos_table(shape, dim)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 192), (64, 64), (64, 256)])
def test_linear_layers_start_xavier_uniform(fan_in, fan_out):
    layer = Linear(fan_in, fan_out)
    bound = sqrt(6 / (fan_in + fan_out))
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.02)
    assert not layer.bias.any()


def test_the_fused_qkv_matrix_counts_as_one_for_xavier():
    weight = Attention(64, 4).qkv.weight
    bound = sqrt(6 / (4 * 64))
    assert 0.99 * bound < weight.abs().max() <= bound


def test_patch_projection_starts_as_a_matrix_with_a_convolutions_bias():
    projection = PatchProjection(256, 3, (8, 8))
    bound = sqrt(6 / (3 * 64 + 256))
    assert 0.99 * bound < projection.weight.abs().max() <= bound
    assert 0.9 / sqrt(3 * 64) < projection.bias.abs().max() <= 1 / sqrt(3 * 64)


@pytest.mark.parametrize("patch_size", [(4,), (4, 2), (2, 4, 3)])
def test_patch_projection_is_the_convolution(patch_size):
    axes = len(patch_size)
    projection = PatchProjection(5, 3, patch_size)
    patches = torch.randn(6, *patch_size, 3)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    expected = convolution(patches.movedim(-1, 1), projection.weight, projection.bias).flatten(1)
    torch.testing.assert_close(projection(patches.flatten(1)), expected)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 4)], ids=["all", "some"])
def test_a_product_as_a_convolution_is_the_same(monkeypatch, rows):
    monkeypatch.setattr(vit, "ONEDNN", True)
    monkeypatch.setattr(vit, "SMALL_PRODUCT", 0)
    inputs = torch.randn(16, 5, 8), torch.randn(6, 8), torch.randn(6)
    ours, theirs = ([part.clone().requires_grad_() for part in inputs] for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        out = linear(ours[0][:, rows], *ours[1:])
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.convolution]
    expected = F.linear(theirs[0][:, rows], *theirs[1:])
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    gradient = torch.randn_like(expected)
    out.backward(gradient)
    expected.backward(gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("case", ["small", "float64", "autocast", "two axes"])
def test_other_products_are_products(monkeypatch, case):
    monkeypatch.setattr(vit, "ONEDNN", True)
    monkeypatch.setattr(vit, "SMALL_PRODUCT", 16 * 5 * 8 * 6 + (case == "small"))
    dtype = torch.float64 if case == "float64" else torch.float32
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((16, 5, 8), (6, 8), (6,)))
    x = x.flatten(0, 1) if case == "two axes" else x
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.addmm]


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("length", [9, 300], ids=["short", "long"])
def test_attention_in_bfloat16_is_that_of_float32_and_keeps_no_scores(length, has_bias):
    values = torch.randn(3, 2, 4, length, 8).bfloat16()
    bias = torch.randn(4, length, length).bfloat16() if has_bias else None
    ours, theirs = (list(values.clone().to(dtype).requires_grad_()) for dtype in (torch.bfloat16, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = attend(*ours, bias)
    if length <= vit.SHORT_SEQUENCE:
        assert all(tensor.numel() <= values[0].numel() or tensor is bias for tensor in kept)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=None if bias is None else bias.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    both = ((out, ours), (expected, theirs))
    gradients, wanted = (torch.autograd.grad(x.float().square().sum(), of) for x, of in both)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.1, rtol=0.1)


def test_learned_tokens_start_with_deviation_002():
    encoder = Encoder((2, 2), (2, 2), 3, dim=1024, depth=0, num_heads=1)
    decoder = Decoder((2, 2), 1024, 12, dim=1024, depth=0, num_heads=1)
    for token in (encoder.cls_token, decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)


def test_encoder_of_a_subset_in_any_order_gives_its_tokens():
    encoder = Encoder((3, 3), (2, 2), 1, dim=8, depth=1, num_heads=2).double()
    patches = torch.randn(1, 9, 4, dtype=torch.float64)
    index = torch.tensor([[7, 0, 4, 2, 8, 1, 6, 3, 5]])
    shuffled = encoder(patches[:, index[0]], index)
    whole = encoder(patches)
    torch.testing.assert_close(shuffled[:, 1:], whole[:, 1 + index[0]])
    torch.testing.assert_close(shuffled[:, 0], whole[:, 0])


def test_heads_divide_the_width():
    with pytest.raises(
        ValueError, match=r"embed_dim: expected a positive multiple of the number of heads, got 8 for 3"
    ):
        Encoder((2, 2), (2, 2), 3, dim=8, depth=1, num_heads=3)
    with pytest.raises(
        ValueError, match=r"decoder_dim: expected a positive multiple of the number of heads, got 8 for 5"
    ):
        Decoder((2, 2), 8, 12, dim=8, depth=1, num_heads=5)

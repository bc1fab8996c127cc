"""Vision transformer: position table, initialisation, embedding, encoder."""

from math import sqrt

import pytest
import torch
import torch.nn.functional as F

from prmim_core import Grid, num_offsets, offset_index
from prmim_torch.vit import Attention, Decoder, Encoder, Linear, PatchProjection, offset_code


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 192), (64, 64), (64, 256)])
def test_linear_layers_start_xavier_uniform(fan_in, fan_out):
    torch.manual_seed(0)
    layer = Linear(fan_in, fan_out)
    bound = sqrt(6 / (fan_in + fan_out))
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.02)
    assert not layer.bias.any()


def test_the_fused_qkv_matrix_counts_as_one_for_xavier():
    torch.manual_seed(0)
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


def test_parts_of_an_encoder_are_chosen_by_arguments():
    sizes = {"dim": 8, "depth": 1, "num_heads": 2}
    patches = torch.randn(2, 4, 12)
    torch.manual_seed(0)
    plain = Encoder((2, 2), (2, 2), 3, **sizes)
    torch.manual_seed(0)
    other = Encoder((2, 2), (2, 2), 3, **sizes, learned_positions=True, mask_token=True, final_norm=False)
    assert set(dict(other.named_parameters())) - set(dict(plain.named_parameters())) == {"pos_embed", "mask_token"}
    assert set(plain.state_dict()) - set(other.state_dict()) == {"norm.weight", "norm.bias"}
    torch.testing.assert_close(plain(patches), F.layer_norm(other(patches), (8,), eps=1e-6))
    assert not other.mask_token.any()
    other(patches).square().sum().backward()
    assert other.pos_embed.grad.any()


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match=r"^position: expected 'absolute' or .* 'relative_per_block', got 'both'$"):
        Encoder((2, 2), (2, 2), 3, dim=8, depth=1, num_heads=2, position="both")
    with pytest.raises(ValueError, match=r"^class_tokens: expected 1 for position 'relative', got 2$"):
        Encoder((2, 2), (2, 2), 3, dim=8, depth=1, num_heads=2, position="relative", class_tokens=2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("index", [None, torch.tensor([[5, 0, 3, 1], [2, 4, 1, 0]])], ids=["all", "some"])
def test_equal_tables_of_blocks_are_one_shared_table(index, recompute):
    sizes = {"dim": 8, "depth": 2, "num_heads": 2, "recompute": recompute}
    shared, per_block = (
        Encoder((2, 3), (2, 2), 3, **sizes, position=position) for position in ("relative", "relative_per_block")
    )
    table = torch.randn(5 * 3 + 3, 2)
    weights = shared.state_dict() | {"rel_pos_bias.relative_position_bias_table": table}
    shared.load_state_dict(weights)
    del weights["rel_pos_bias.relative_position_bias_table"]
    tables = [f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)]
    per_block.load_state_dict({**weights, **dict.fromkeys(tables, table)})
    patches = torch.randn(2, 6 if index is None else 4, 12)
    expected, found = shared(patches, index), per_block(patches, index)
    torch.testing.assert_close(found, expected)
    for encoded in (expected, found):
        (encoded[:, 1:] - 1).square().sum().backward()
    gradients = [per_block.get_parameter(name).grad for name in tables]
    torch.testing.assert_close(sum(gradients), shared.rel_pos_bias.relative_position_bias_table.grad)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_differences_of_codes_are_indices_of_offsets(shape):
    grid = Grid(shape)
    tokens, code = torch.arange(grid.num_tokens)[None], offset_code(grid, torch.device("cpu"))
    offsets = code[:, None] - code[None] + num_offsets(grid) // 2
    assert torch.equal(offsets, offset_index(grid, tokens, tokens)[0])

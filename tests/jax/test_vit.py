"""Parts of the vision transformer: position table, initialisation, embedding."""

from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_jax.vit import (
    Attention,
    Block,
    Decoder,
    Encoder,
    LayerNorm,
    Linear,
    PatchProjection,
    set_compute_dtype,
    sincos_table,
    xavier_uniform,
)
from prmim_reference import vit as reference


def rngs():
    return nnx.Rngs(0)


@pytest.mark.parametrize(("shape", "dim"), [((7,), 6), ((3, 4), 8), ((2, 3, 4), 12)])
def test_position_table_is_the_reference_one(shape, dim):
    table = sincos_table(shape, dim)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table[0], reference.sin_cos_table(shape, dim), atol=1e-7)


@pytest.mark.parametrize(("shape", "dim"), [((4,), 3), ((4, 4), 6), ((4, 4, 4), 8), ((4,), 0)])
def test_position_table_needs_channels_for_every_axis(shape, dim):
    with pytest.raises(ValueError, match=r"^dim: expected a positive multiple of \d"):
        sincos_table(shape, dim)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 192), (64, 256)])
def test_linear_layers_start_xavier_uniform(fan_in, fan_out):
    layer = Linear(fan_in, fan_out, rngs=rngs())
    weight = np.asarray(layer.weight[...])
    bound = sqrt(6 / (fan_in + fan_out))
    assert weight.shape == (fan_out, fan_in)
    assert 0.99 * bound < np.abs(weight).max() <= bound
    assert weight.std() == pytest.approx(bound / sqrt(3), rel=0.02)
    assert not layer.bias[...].any()


def test_the_fused_qkv_matrix_counts_as_one_for_xavier():
    weight = Attention(64, 4, rngs=rngs()).qkv.weight[...]
    bound = sqrt(6 / (4 * 64))
    assert 0.99 * bound < np.abs(weight).max() <= bound


def test_patch_projection_starts_as_a_matrix_with_a_convolutions_bias():
    projection = PatchProjection(256, 3, (8, 8), rngs=rngs())
    bound = sqrt(6 / (3 * 64 + 256))
    assert 0.99 * bound < np.abs(projection.weight[...]).max() <= bound
    assert 0.9 / sqrt(3 * 64) < np.abs(projection.bias[...]).max() <= 1 / sqrt(3 * 64)


def test_learned_tokens_start_with_deviation_002():
    encoder = Encoder((2, 2), (2, 2), 3, dim=1024, depth=0, num_heads=1, rngs=rngs())
    decoder = Decoder((2, 2), 1024, 12, dim=1024, depth=0, num_heads=1, rngs=rngs())
    for token in (encoder.cls_token, decoder.mask_token):
        assert np.asarray(token[...]).std() == pytest.approx(0.02, rel=0.1)


def test_weights_larger_than_a_block_do_not_repeat_and_are_the_same_when_traced():
    weight = np.asarray(xavier_uniform(rngs(), (300, 500)))
    assert len(np.unique(weight)) > 0.95 * weight.size
    np.testing.assert_allclose(jax.jit(lambda: xavier_uniform(nnx.Rngs(0), (300, 500)))(), weight, rtol=1e-6)


@pytest.mark.parametrize("patch_size", [(4,), (4, 2), (2, 4, 3)])
def test_patch_projection_is_the_convolution(patch_size):
    projection = PatchProjection(5, 3, patch_size, rngs=rngs())
    patches = np.random.default_rng(0).normal(size=(6, *patch_size, 3)).astype(np.float32)
    flat = np.moveaxis(patches, -1, 1).reshape(6, -1)  # channels before pixels, as a convolution's weight has them
    expected = flat @ np.asarray(projection.weight[...]).reshape(5, -1).T + np.asarray(projection.bias[...])
    np.testing.assert_allclose(projection(jnp.asarray(patches.reshape(6, -1))), expected, rtol=1e-5, atol=1e-6)


def test_encoder_of_a_subset_in_any_order_gives_its_tokens():
    encoder = Encoder((3, 3), (2, 2), 1, dim=8, depth=1, num_heads=2, rngs=rngs())
    patches = jax.random.normal(jax.random.key(0), (1, 9, 4))
    index = jnp.array([[7, 0, 4, 2, 8, 1, 6, 3, 5]])
    shuffled, whole = encoder(patches[:, index[0]], index), encoder(patches)
    np.testing.assert_allclose(shuffled[:, 1:], whole[:, 1 + index[0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shuffled[:, 0], whole[:, 0], rtol=1e-5, atol=1e-5)


def test_bfloat16_products_leave_norms_and_residual_stream_in_float32():
    block = Block(8, 2, rngs=rngs())
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    exact = block(x)
    set_compute_dtype(block, jnp.bfloat16)
    assert block.mlp.fc1(x).dtype == jnp.bfloat16
    assert block.attn(x).dtype == jnp.bfloat16
    assert block.norm1(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert block(x).dtype == jnp.float32
    np.testing.assert_allclose(block(x), exact, atol=0.1)
    set_compute_dtype(block, None)
    np.testing.assert_array_equal(block(x), exact)


def test_layer_norm_of_large_values_keeps_its_digits():
    x = 1e3 + jax.random.normal(jax.random.key(0), (4, 64))
    normed = np.asarray(LayerNorm(64)(x))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, expected, atol=1e-3)


def test_heads_divide_the_width():
    with pytest.raises(
        ValueError, match=r"embed_dim: expected a positive multiple of the number of heads, got 8 for 3"
    ):
        Encoder((2, 2), (2, 2), 3, dim=8, depth=1, num_heads=3, rngs=rngs())
    with pytest.raises(
        ValueError, match=r"decoder_dim: expected a positive multiple of the number of heads, got 8 for 5"
    ):
        Decoder((2, 2), 8, 12, dim=8, depth=1, num_heads=5, rngs=rngs())

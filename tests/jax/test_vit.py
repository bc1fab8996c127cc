"""Parts of the vision transformer: position table, initialisation, embedding."""

from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_jax.interop import named_variables, named_weights, put_weights
from prmim_jax.vit import (
    Attention,
    Block,
    Decoder,
    Encoder,
    LayerNorm,
    Linear,
    Mlp,
    PatchProjection,
    RelativePositionBias,
    block_outputs,
    freeze,
    run_blocks,
    stack_blocks,
    xavier_uniform,
)
from prmim_reference import method as reference_method
from prmim_reference import vit as reference


def rngs():
    return nnx.Rngs(0)


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
    encoder = Encoder((2, 2), (2, 2), 3, dim=512, depth=1, num_heads=1, rngs=rngs())
    decoder = Decoder((2, 2), 512, 12, dim=512, depth=1, num_heads=1, rngs=rngs())
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
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    block = Block(8, 2, dtype=jnp.bfloat16, rngs=rngs())
    assert block.mlp.fc1(x).dtype == jnp.bfloat16
    assert block.attn(x).dtype == jnp.bfloat16
    assert block.norm1(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert block(x).dtype == jnp.float32
    exact = Block(8, 2, rngs=rngs())(x)
    np.testing.assert_allclose(block(x), exact, atol=0.1)
    assert (block(x) != exact).any()


def test_layer_norm_of_large_values_keeps_its_digits():
    x = 1e3 + jax.random.normal(jax.random.key(0), (4, 64))
    normed = np.asarray(LayerNorm(64)(x))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_relative_position_bias_is_the_reference_one(shape):
    bias = RelativePositionBias(shape, num_heads=2)
    table = np.random.default_rng(0).normal(size=bias.relative_position_bias_table.shape).astype(np.float32)
    assert not bias.relative_position_bias_table[...].any()
    bias.relative_position_bias_table.set_value(jnp.asarray(table))
    index = np.stack([np.random.default_rng(seed).permutation(np.prod(shape))[:4] for seed in range(3)])
    expected = [reference.relative_position_bias(tokens.tolist(), shape, table) for tokens in index]
    np.testing.assert_array_equal(bias(jnp.asarray(index)), expected)
    whole = reference.relative_position_bias(range(np.prod(shape)), shape, table)
    np.testing.assert_array_equal(bias(), whole)


SHAPE = (3, 4)
KINDS = {"absolute": {}, "relative": {"position": "relative", "layer_scale": 0.1}}


def make_encoder(depth=3, dtype=np.float64, **options):
    """Return an encoder without initial symmetries, and inputs for two images."""
    encoder = Encoder(SHAPE, (2, 2), 3, dim=8, depth=depth, num_heads=2, rngs=rngs(), **options)
    rng = np.random.default_rng(1)
    for variable in named_variables(encoder).values():
        is_learned = isinstance(variable, nnx.Param)
        noise = 0.1 * rng.normal(size=variable.shape) if is_learned else 0
        variable.set_value(jnp.asarray(np.asarray(variable[...], dtype) + noise, dtype))
    patches = jnp.asarray(rng.normal(size=(2, 7, 12)), dtype)
    index = jnp.asarray(np.stack([rng.permutation(12)[:7] for _ in range(2)]))
    return encoder, (patches, index, jnp.asarray(rng.random((2, depth, 2)), np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_outputs_of_all_blocks_are_the_reference_ones(kind, scan):
    with jax.enable_x64(True):
        encoder, (patches, index, scales) = make_encoder(scan=scan, **KINDS[kind])
        tokens = encoder.place(encoder.patch_embed(patches), index)
        states = encoder.hidden_states(tokens, index, scales)
        encoded = encoder.encode(tokens, index, scales)
        weights = {f"encoder.{name}": array for name, array in named_weights(encoder).items()}
    assert states.shape == (4, 2, 8, 8)
    for image in range(2):
        all_patches = np.zeros((12, 12))
        all_patches[index[image]] = patches[image]
        expected = reference_method.encoder_states(
            all_patches, index[image].tolist(), SHAPE, weights, 2, scales=np.asarray(scales[image], np.float64)
        )
        np.testing.assert_allclose(states[1:, image], expected, rtol=1e-10, atol=1e-12)
        norm = reference.norm(expected[-1], weights, "encoder.norm")
        np.testing.assert_allclose(encoded[image], norm, rtol=1e-10, atol=1e-12)


def loss_of(encoder, inputs):
    """Return the parameters of an encoder, and a loss as a function of them."""
    graph, parameters, buffers = nnx.split(encoder, nnx.Param, ...)

    def loss(parameters, patches, index, scales):
        encoder = nnx.merge(graph, parameters, buffers)
        tokens = encoder.place(encoder.patch_embed(patches), index)
        states = encoder.hidden_states(tokens, index, scales)[2:]
        return jnp.square(encoder.encode(tokens, index, scales)).mean() + jnp.sin(states).sum()

    return parameters, loss


def gradients_by_name(encoder, gradients):
    graph, _, buffers = nnx.split(encoder, nnx.Param, ...)
    return named_weights(nnx.merge(graph, gradients, buffers))


def as_it_is(function):
    return function


@pytest.mark.parametrize(
    ("kind", "dtype", "rtol"),
    [("absolute", np.float64, 1e-12), ("relative", np.float64, 1e-12), ("relative", np.float32, 1e-5)],
    ids=["absolute-float64", "relative-float64", "relative-float32"],
)
def test_scanned_blocks_give_the_same_loss_and_gradients(kind, dtype, rtol):
    with jax.enable_x64(dtype == np.float64):
        results = []
        for scan, wrap in ((False, as_it_is), (True, as_it_is), (True, jax.checkpoint)):
            encoder, inputs = make_encoder(dtype=dtype, scan=scan, **KINDS[kind])
            parameters, loss = loss_of(encoder, inputs)
            value, gradients = jax.jit(jax.value_and_grad(wrap(loss)))(parameters, *inputs)
            results.append((float(value), gradients_by_name(encoder, gradients)))
    (expected, wanted), *others = results
    for value, gradients in others:
        assert value == pytest.approx(expected, rel=rtol / 10)
        assert set(gradients) == set(wanted)
        for name, gradient in gradients.items():
            # The bias of keys has a gradient of 0, so errors are measured by the whole layer.
            assert np.abs(gradient - wanted[name]).max() <= rtol * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize("wrap", [as_it_is, jax.checkpoint])
def test_a_program_with_scanned_blocks_holds_one_of_them(wrap):
    def lines(depth, scan):
        encoder, inputs = make_encoder(depth, dtype=np.float32, scan=scan)
        parameters, loss = loss_of(encoder, inputs)
        return jax.jit(jax.grad(wrap(loss))).lower(parameters, *inputs).compile().as_text().count("\n")

    assert lines(8, True) < 1.05 * lines(4, True) < 0.5 * lines(8, False)


@pytest.mark.parametrize("scan", [False, True])
def test_stacked_blocks_are_the_blocks_one_after_the_other(scan):
    source = rngs()
    blocks = [Block(8, 2, layer_scale=0.5, rngs=source) for _ in range(3)]
    stack = stack_blocks(blocks)
    x, scales = jax.random.normal(jax.random.key(0), (2, 5, 8)), jnp.linspace(0, 2, 12).reshape(2, 3, 2)
    expected = [x]
    for number, block in enumerate(blocks):
        expected.append(block(expected[-1], None, scales[:, number]))
    outputs = block_outputs(stack, x, None, scales, scan=scan)
    np.testing.assert_allclose(outputs, jnp.stack(expected[1:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run_blocks(stack, x, None, scales, scan=scan), outputs[-1], rtol=1e-6)
    for number, block in enumerate(blocks):
        np.testing.assert_array_equal(stack.mlp.fc1.weight[number], block.mlp.fc1.weight[...])


@pytest.mark.parametrize("scan", [False, True])
def test_every_block_has_a_name_of_its_own_in_files(scan):
    encoder, _ = make_encoder(dtype=np.float32, scan=scan)
    weights = named_weights(encoder)
    assert encoder.blocks.mlp.fc1.weight.shape == (3, 32, 8)
    for number in range(3):
        name = f"blocks.{number}.mlp.fc1.weight"
        np.testing.assert_array_equal(weights[name], encoder.blocks.mlp.fc1.weight[number])
    assert not [name for name in weights if name.startswith("blocks.") and not name[7].isdigit()]


def test_optional_parts_of_the_encoder():
    plain, encoder = (
        Encoder((2, 2), (2, 2), 3, dim=8, depth=1, num_heads=2, rngs=rngs(), **options)
        for options in ({}, {"mask_token": True, "final_norm": False, "learned_positions": True})
    )
    own_norm = {"norm.weight", "norm.bias"}
    assert set(named_weights(encoder)) == (set(named_weights(plain)) - own_norm) | {"mask_token"}
    assert not encoder.mask_token[...].any()
    assert isinstance(encoder.pos_embed, nnx.Param)
    assert not isinstance(plain.pos_embed, nnx.Param)
    patches = jax.random.normal(jax.random.key(0), (1, 4, 12))
    np.testing.assert_allclose(plain.norm(encoder(patches)), plain(patches), rtol=1e-5, atol=1e-6)


def test_frozen_parameters_stay_in_files():
    encoder, (patches, index, _) = make_encoder(dtype=np.float32)
    before, output = named_weights(encoder), encoder(patches, index)
    freeze(encoder)
    assert not [v for v in named_variables(encoder).values() if isinstance(v, nnx.Param)]
    jax.tree.map(np.testing.assert_array_equal, named_weights(encoder), before)
    np.testing.assert_array_equal(encoder(patches, index), output)


def test_parts_of_teachers():
    x = jnp.linspace(-3, 3, 8)[None]
    mlp = Mlp(8, 8, activation="quick_gelu", rngs=rngs())
    hidden = np.asarray(mlp.fc1(x), np.float64)
    expected = mlp.fc2(jnp.asarray(hidden / (1 + np.exp(-1.702 * hidden)), jnp.float32))
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-5)
    block = Block(8, 2, activation="quick_gelu", eps=0.1, rngs=rngs())
    assert block.mlp.activation == "quick_gelu"
    np.testing.assert_allclose(block.norm2(x), (x - x.mean()) / np.sqrt(x.var() + 0.1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^activation: expected 'gelu' or 'quick_gelu', got 'relu'$"):
        Mlp(8, 8, activation="relu", rngs=rngs())


def test_unknown_position():
    with pytest.raises(ValueError, match=r"^position: expected 'absolute' or .* 'relative_per_block', got 'both'$"):
        make_encoder(position="both")
    with pytest.raises(ValueError, match=r"^class_tokens: expected 1 for position 'relative', got 2$"):
        make_encoder(position="relative", class_tokens=2)


@pytest.mark.parametrize(("scan", "recompute"), [(False, False), (True, True)])
def test_equal_tables_of_blocks_are_one_shared_table(scan, recompute):
    options = {"dtype": np.float32, "scan": scan, "recompute": recompute}
    shared, (patches, index, _) = make_encoder(position="relative", **options)
    per_block, _ = make_encoder(position="relative_per_block", **options)
    weights = named_weights(shared)
    table = weights.pop("rel_pos_bias.relative_position_bias_table")
    tables = [f"blocks.{block}.attn.relative_position_bias_table" for block in range(3)]
    put_weights(per_block, {**weights, **dict.fromkeys(tables, table)})

    def outputs_and_gradients(encoder):
        graph, parameters, rest = nnx.split(encoder, nnx.Param, ...)

        @jax.jit
        def run(parameters):
            def loss(parameters):
                encoded = nnx.merge(graph, parameters, rest)(patches, index)
                return jnp.square(encoded[:, 1:] - 1).sum(), encoded

            return jax.grad(loss, has_aux=True)(parameters)

        gradients, encoded = run(parameters)
        return encoded, named_weights(nnx.merge(graph, gradients, rest))

    (expected, wanted), (found, gradients) = outputs_and_gradients(shared), outputs_and_gradients(per_block)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    total = sum(gradients[name] for name in tables)
    np.testing.assert_allclose(total, wanted["rel_pos_bias.relative_position_bias_table"], rtol=1e-4, atol=1e-4)
    assert (gradients[tables[0]] != gradients[tables[1]]).any()


def test_relative_positions_need_no_channels_for_every_axis():
    for position in ("relative", "relative_per_block"):
        encoder = Encoder((2, 2), (2, 2), 3, dim=6, depth=1, num_heads=3, position=position, rngs=rngs())
        assert "pos_embed" not in named_weights(encoder)
    with pytest.raises(ValueError, match=r"^dim: expected a positive multiple of 4 for a grid of 2 axes, got 6$"):
        Encoder((2, 2), (2, 2), 3, dim=6, depth=1, num_heads=3, rngs=rngs())

"""Vision transformer modules.

Parameter names follow timm's ViT, and weights have the layout of PyTorch, (out, in), so that both adapters read the
same files. The initialization is MAE's. Masking is separate: the encoder and the decoder take tokens and indices of
their positions.

The argument ``dtype`` is that of matrix products and their results, for example ``jax.numpy.bfloat16``; None: that of
the parameters. Residual stream, norms and softmax are never narrower than the parameters.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from prmim_core import Grid, num_offsets, offset_index
from prmim_methods.encoder import num_bias_rows
from prmim_methods.positions import fixed_table
from prmim_methods.sizes import LAYER_NORM_EPS
from prmim_methods.teacher import Activation

BLOCK = 2**16

Position = Literal["absolute", "raster", "learned", "relative", "relative_per_block"]


class Buffer(nnx.Variable[Array]):
    """An array that is part of weight files, but not trained."""


class Statistic(Buffer):
    """A buffer that forward passes in training mode change."""


def freeze(module: nnx.Module) -> None:
    """Turn the parameters of a module into buffers, in place."""
    for _, part in nnx.iter_modules(module):
        for name, variable in list(vars(part).items()):
            if isinstance(variable, nnx.Param):
                setattr(part, name, Buffer(variable[...]))


def wide(dtype: DTypeLike) -> np.dtype:
    """Return float32, or ``dtype`` if it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def project(x: Array, weight: Array, bias: Array | None, dtype: DTypeLike | None) -> Array:
    """Return ``x @ weight.T + bias``.

    The product is computed in ``dtype``, by default that of the weight.
    """
    dtype = weight.dtype if dtype is None else dtype
    product = jnp.einsum("...i,oi->...o", x.astype(dtype), weight.astype(dtype), precision=precision(dtype))
    return product if bias is None else product + bias.astype(dtype)


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """Return the precision of products: full for float32 and wider.

    Accelerators round such products by default.
    """
    return None if jnp.dtype(dtype).itemsize < 4 else lax.Precision.HIGHEST


@jax.jit
def _uniform_block(key: Array) -> Array:
    return jax.random.uniform(key, (BLOCK,), jnp.float32, -1.0, 1.0)


@jax.jit
def _normal_block(key: Array) -> Array:
    return jax.random.normal(key, (BLOCK,), jnp.float32)


def draw(block: Callable[[Array], Array], rngs: nnx.Rngs, shape: Sequence[int], scale: float) -> Array:
    """Draw a float32 array in blocks of equal size, times ``scale``.

    Equal blocks need a single program. One program per shape would dominate the start of a small model. Values are
    equal inside traced functions.
    """
    key, size = rngs.params(), prod(shape)
    numbers = range(-(-size // BLOCK))
    if isinstance(key, jax.core.Tracer):
        drawn = jax.vmap(lambda number: block(jax.random.fold_in(key, number)))(jnp.arange(len(numbers)))
        return scale * drawn.reshape(-1)[:size].reshape(shape)
    blocks = [np.asarray(block(jax.random.fold_in(key, number))) for number in numbers]
    return jnp.asarray(np.float32(scale) * np.concatenate(blocks)[:size].reshape(shape))


def uniform(rngs: nnx.Rngs, shape: Sequence[int], bound: float) -> Array:
    """Draw uniform float32 values in (-bound, bound)."""
    return draw(_uniform_block, rngs, shape, bound)


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float) -> Array:
    """Draw normal float32 values with mean 0."""
    return draw(_normal_block, rngs, shape, std)


def xavier_uniform(rngs: nnx.Rngs, shape: Sequence[int]) -> Array:
    """Draw a float32 weight (out, ...), Xavier-uniform as a matrix (out, rest)."""
    return uniform(rngs, shape, sqrt(6 / (shape[0] + prod(shape[1:]))))


def constant(value: float, *shape: int) -> Array:
    """Return a constant float32 array from NumPy; JAX would compile per shape."""
    return jnp.asarray(np.full(shape, value, np.float32))


class Linear(nnx.Module):
    """A linear layer with MAE's initialization: Xavier-uniform weight, zero bias.

    A fused qkv matrix counts as one weight.
    """

    bias: nnx.Param[Array]

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        self.dtype = dtype
        self.weight = nnx.Param(xavier_uniform(rngs, (out_features, in_features)))
        if bias:
            self.bias = nnx.Param(constant(0.0, out_features))

    def __call__(self, x: Array) -> Array:
        """Map (..., in_features) to (..., out_features)."""
        return project(x, self.weight[...], self.bias[...] if hasattr(self, "bias") else None, self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32 or wider."""

    def __init__(self, dim: int, *, elementwise_affine: bool = True, eps: float = LAYER_NORM_EPS) -> None:
        self.eps = eps
        self.weight: nnx.Variable[Array] | None = nnx.Param(constant(1.0, dim)) if elementwise_affine else None
        self.bias: nnx.Variable[Array] | None = nnx.Param(constant(0.0, dim)) if elementwise_affine else None

    def __call__(self, x: Array) -> Array:
        """Map (..., dim) to the same shape."""
        x = x.astype(wide(x.dtype))
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        if self.weight is None or self.bias is None:
            return normed
        return normed * self.weight[...] + self.bias[...]


class PatchProjection(nnx.Module):
    """A patch convolution, applied to patches.

    Parameters
    ----------
    dim
        Output channels, D.
    channels
        Channels of the image, C.
    patch_size
        Pixels of a patch along each axis.
    dtype
        Dtype of the product.
    rngs
        Source of the initial weights: Xavier-uniform as a matrix; the bias as in PyTorch's convolutions, uniform in
        1/sqrt(fan in).

    Notes
    -----
    The weight has the layout of a convolution, channels before pixels, so that files match other ViTs. Patches have
    channels last, so the weight is permuted, not the data.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        patch_size: Sequence[int],
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        bound = 1 / sqrt(channels * prod(patch_size))
        self.weight = nnx.Param(xavier_uniform(rngs, (dim, channels, *patch_size)))
        self.bias = nnx.Param(uniform(rngs, (dim,), bound))

    def __call__(self, patches: Array) -> Array:
        """Project patches (..., prod(patch) * C) to (..., D)."""
        weight = jnp.moveaxis(self.weight[...], 1, -1)
        return project(patches, weight.reshape(len(weight), -1), self.bias[...], self.dtype)


class PatchEmbed(nnx.Module):
    """Container that names the projection ``patch_embed.proj``, as in ViT files."""

    def __init__(
        self,
        dim: int,
        channels: int,
        patch_size: Sequence[int],
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.proj = PatchProjection(dim, channels, patch_size, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Array) -> Array:
        """Project patches (batch, length, prod(patch) * C) to (batch, length, dim)."""
        return self.proj(patches)


class Attention(nnx.Module):
    """Multi-head self-attention with a fused qkv projection; scale 1/sqrt(head_dim).

    The softmax is computed in float32 or wider.

    Parameters
    ----------
    dim, num_heads
        Width, attention heads.
    table_rows
        Rows of the layer's own table of relative position bias, see :class:`RelativePositionBias`; None: no table.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Notes
    -----
    Queries, keys and values have biases. Models without a bias of the keys (BEiT, SimMIM) compute the same function: it
    adds one number to all scores of a query, which does not change the softmax. Its gradient is 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        table_rows: int | None = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        table = None if table_rows is None else nnx.Param(constant(0.0, table_rows, num_heads))
        self.relative_position_bias_table: nnx.Variable[Array] | None = table

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """Map (batch, length, dim) to the same shape.

        ``bias`` is added to the scores: ([batch,] heads, length, length). If the layer has a table, ``bias`` is the row
        of each pair of tokens in it: int ([batch,] length, length).
        """
        if self.relative_position_bias_table is not None and bias is not None:
            bias = look_up(self.relative_position_bias_table[...], bias)
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (qkv[:, :, part] for part in range(3))  # batch, length, heads, head_dim
        return self.proj(attend(q, k, v, bias).reshape(batch, length, dim))

    def first_query(self, x: Array, bias: Array | None = None) -> Array:
        """Return the first token's attention: (batch, heads, length).

        ``bias`` is added to the scores: ([batch,] heads, length, length).
        """
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k = qkv[:, 0, 0], qkv[:, :, 1]
        scores = jnp.einsum("bhd,blhd->bhl", q, k, precision=precision(q.dtype), preferred_element_type=wide(q.dtype))
        scores = scores / sqrt(q.shape[-1])
        return jax.nn.softmax(scores if bias is None else scores + bias[..., 0, :], axis=-1)


def attend(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    """Return scaled dot-product attention of inputs (batch, length, heads, head_dim)."""
    # jax.nn.dot_product_attention is slower on CPUs, and computes softmax in float32 for float64 input.
    exact = precision(q.dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=exact, preferred_element_type=wide(q.dtype))
    scores = scores / sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them.

    The activation is ``"gelu"`` (erf) or ``"quick_gelu"``.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "gelu",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if activation not in get_args(Activation):
            raise ValueError(f"activation: expected 'gelu' or 'quick_gelu', got {activation!r}")
        self.activation = activation
        self.fc1 = Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (batch, length, dim) to the same shape."""
        hidden = self.fc1(x)
        return self.fc2(self._activate(hidden.astype(wide(hidden.dtype))).astype(hidden.dtype))

    def _activate(self, x: Array) -> Array:
        if self.activation == "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        return jax.nn.gelu(x, approximate=False)


class LayerScale(nnx.Module):
    """A learned per-channel factor, initially ``value``."""

    def __init__(self, dim: int, value: float) -> None:
        self.gamma = nnx.Param(constant(value, dim))

    def __call__(self, x: Array) -> Array:
        """Scale (..., dim)."""
        return x * self.gamma[...]


class Block(nnx.Module):
    """A pre-norm transformer block.

    Parameters
    ----------
    dim, num_heads, mlp_ratio
        Width, attention heads, width of the hidden layer over ``dim``.
    layer_scale
        Initial value of LayerScale on both branches; None: no LayerScale.
    activation
        Of the MLP: ``"gelu"``, or CLIP's ``"quick_gelu"``.
    eps
        Of both norms.
    recompute
        Whether to save only the input, and recompute the block in the backward pass (activation checkpointing).
    table_rows
        See :class:`Attention`.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        *,
        layer_scale: float | None = None,
        activation: Activation = "gelu",
        eps: float = LAYER_NORM_EPS,
        recompute: bool = False,
        table_rows: int | None = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.recompute = recompute
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, table_rows=table_rows, dtype=dtype, rngs=rngs)
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_ratio * dim, activation=activation, dtype=dtype, rngs=rngs)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def __call__(self, x: Array, bias: Array | None = None, scales: Array | None = None) -> Array:
        """Apply the block.

        Parameters
        ----------
        x
            (batch, length, dim).
        bias
            See :meth:`Attention.__call__`.
        scales
            (batch, 2): factor of each image's attention branch and MLP branch (drop path).

        Returns
        -------
        jax.Array
            (batch, length, dim).
        """
        add = jax.checkpoint(Block._add) if self.recompute else Block._add
        return add(self, x, bias, scales)

    def first_query(self, x: Array, bias: Array | None = None) -> Array:
        """Return the first token's attention; see :meth:`Attention.first_query`."""
        return self.attn.first_query(self.norm1(x), bias)

    def _add(self, x: Array, bias: Array | None, scales: Array | None) -> Array:
        """Add both branches to the residual stream."""
        x = _add(x, self.attn(self.norm1(x), bias), self.ls1, None if scales is None else scales[:, 0])
        return _add(x, self.mlp(self.norm2(x)), self.ls2, None if scales is None else scales[:, 1])


def _add(x: Array, branch: Array, layer_scale: LayerScale | None, scale: Array | None) -> Array:
    branch = branch if layer_scale is None else layer_scale(branch)
    return x + (branch if scale is None else branch * scale[:, None, None])


# Compiled, since JAX would otherwise compile each operation per shape.
@jax.jit
def stack_blocks(blocks: Sequence[Block]) -> Block:
    """Stack blocks into one module with a leading axis of length depth."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *blocks)


def run_blocks(
    blocks: Block, x: Array, bias: Array | None = None, scales: Array | None = None, *, scan: bool = False
) -> Array:
    """Apply stacked blocks one after the other.

    Parameters
    ----------
    blocks
        From :func:`stack_blocks`.
    x
        (batch, length, dim).
    bias
        Shared by all blocks, see :meth:`Attention.__call__`.
    scales
        (batch, depth, 2): factors of the two branches of every block.
    scan
        Whether the compiled program loops over a single block, or contains all blocks.

    Returns
    -------
    jax.Array
        (batch, length, dim): the output of the last block.
    """
    return _scan(blocks, x, bias, scales, scan=scan, keep=False)[0]


def block_outputs(
    blocks: Block, x: Array, bias: Array | None = None, scales: Array | None = None, *, scan: bool = False
) -> Array:
    """Return all block outputs, (depth, batch, length, dim); see :func:`run_blocks`."""
    return _scan(blocks, x, bias, scales, scan=scan, keep=True)[1]


def _scan(
    blocks: Block, x: Array, bias: Array | None, scales: Array | None, *, scan: bool, keep: bool
) -> tuple[Array, Any]:
    def step(x: Array, of_block: tuple[Block, Array | None]) -> tuple[Array, Array | None]:
        block, scales = of_block
        x = block(x, bias, scales)
        return x, x if keep else None

    return lax.scan(step, x, (blocks, None if scales is None else jnp.moveaxis(scales, 1, 0)), unroll=not scan)


def bias_rows(grid: Grid, index: Array | None) -> Array:
    """Return the table row of each token pair; see :class:`RelativePositionBias`.

    Parameters
    ----------
    grid
        The grid of the tokens, N in all.
    index
        int (batch, length): the tokens; None: all N, in raster order.

    Returns
    -------
    jax.Array
        int32 (batch, 1 + length, 1 + length), queries before keys, class token first; no batch axis for None.
    """
    tokens = jnp.arange(grid.num_tokens)[None] if index is None else index
    offsets = num_offsets(grid)
    row = jnp.pad(offset_index(grid, tokens, tokens), ((0, 0), (1, 0), (1, 0)), constant_values=offsets)
    row = row.at[:, 1:, 0].set(offsets + 1).at[:, 0, 0].set(offsets + 2)
    return row[0] if index is None else row


def look_up(table: Array, rows: Array) -> Array:
    """Look up a bias table at rows ([batch,] length, length).

    Returns ([batch,] heads, length, length).
    """
    return jnp.moveaxis(table[rows], -1, -3)


class RelativePositionBias(nnx.Module):
    """Relative position bias: one learned number per offset and head.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in total.
    num_heads
        Attention heads.

    Notes
    -----
    As in BEiT and SimMIM. The table starts at zero. It has one row per offset (query minus key, in raster order), then
    three rows for the class token: as query, as key, and with itself.
    """

    def __init__(self, grid_shape: Sequence[int], num_heads: int) -> None:
        self.grid = Grid(tuple(grid_shape))
        self.relative_position_bias_table = nnx.Param(constant(0.0, num_bias_rows(self.grid), num_heads))

    def __call__(self, index: Array | None = None) -> Array:
        """Look up the bias of all pairs of the class token and the given tokens.

        Parameters
        ----------
        index
            int (batch, length): the tokens; None: all N, in raster order.

        Returns
        -------
        jax.Array
            (batch, heads, 1 + length, 1 + length), queries before keys, class token first; no batch axis for None.
        """
        return look_up(self.relative_position_bias_table[...], bias_rows(self.grid, index))


def _tokens(rngs: nnx.Rngs, number: int, dim: int) -> nnx.Param[Array]:
    return nnx.Param(normal(rngs, (1, number, dim), 0.02))


def position_table(
    rngs: nnx.Rngs, grid_shape: Sequence[int], dim: int, class_tokens: int, position: str
) -> nnx.Variable[Array]:
    """Return the initial position table (1, C + N, dim).

    A parameter if ``"learned"``, else a buffer.
    """
    if position == "learned":
        # No truncation at +-2 as in timm, since it has no effect.
        return _tokens(rngs, class_tokens + prod(grid_shape), dim)
    return Buffer(jnp.asarray(fixed_table(position, grid_shape, dim, class_tokens)))


class Encoder(nnx.Module):
    """A vision transformer that embeds and encodes only the given patches.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in total.
    patch_size
        Pixels of a patch along each axis.
    channels
        Channels of the image.
    dim, depth, num_heads
        Width, number of blocks, attention heads.
    position
        ``"absolute"``: a sine-cosine table, added to the tokens; ``"raster"``: one of the tokens' numbers in raster
        order; ``"learned"``: a learned table, added to the tokens; ``"relative"``: a learned bias on the attention
        scores, shared by the blocks; ``"relative_per_block"``: such a bias in each block.
    learned_positions
        Whether the table of ``"absolute"`` is a parameter; else it is fixed.
    layer_scale, recompute
        See :class:`Block`.
    class_tokens
        Number of class tokens, C, each with its own position. Relative positions need exactly one.
    mask_token
        Whether there is a mask token, ``mask_token``. It starts at zero, and :meth:`encode` does not use it.
    final_norm
        Whether a layer norm follows the last block.
    scan
        See :func:`run_blocks`.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes, the position is unknown, or the class tokens do not fit it.
    """

    cls_token: nnx.Param[Array]
    mask_token: nnx.Param[Array]
    pos_embed: nnx.Variable[Array]

    def __init__(
        self,
        grid_shape: Sequence[int],
        patch_size: Sequence[int],
        channels: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        position: Position = "absolute",
        learned_positions: bool = False,
        layer_scale: float | None = None,
        class_tokens: int = 1,
        mask_token: bool = False,
        final_norm: bool = True,
        recompute: bool = False,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if position not in get_args(Position):
            raise ValueError(f"position: expected {' or '.join(map(repr, get_args(Position)))}, got {position!r}")
        self._has_table = position in ("absolute", "raster", "learned")
        if class_tokens != 1 and not self._has_table:
            raise ValueError(f"class_tokens: expected 1 for position {position!r}, got {class_tokens}")
        self.position = position
        self.class_tokens = class_tokens
        self.scan = scan
        self.patch_embed = PatchEmbed(dim, channels, patch_size, dtype=dtype, rngs=rngs)
        if class_tokens:
            self.cls_token = _tokens(rngs, class_tokens, dim)
        if mask_token:
            self.mask_token = nnx.Param(constant(0.0, 1, 1, dim))
        self.grid = Grid(tuple(grid_shape))
        rows = num_bias_rows(self.grid) if position == "relative_per_block" else None
        if position == "relative":
            self.rel_pos_bias = RelativePositionBias(grid_shape, num_heads)
        elif self._has_table:
            table = position_table(rngs, grid_shape, dim, class_tokens, position)
            self.pos_embed = nnx.Param(table[...]) if learned_positions else table
        self.blocks = stack_blocks(
            [
                Block(
                    dim,
                    num_heads,
                    layer_scale=layer_scale,
                    recompute=recompute,
                    table_rows=rows,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.norm = LayerNorm(dim) if final_norm else None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters."""
        return self.patch_embed.proj.bias.dtype

    def __call__(self, patches: Array, index: Array | None = None, scales: Array | None = None) -> Array:
        """Encode patches.

        Parameters
        ----------
        patches
            (batch, length, prod(patch) * C), normalized pixels.
        index
            int (batch, length): the token of each patch; None: the patches are all N tokens, in raster order.
        scales
            See :meth:`encode`.

        Returns
        -------
        jax.Array
            (batch, C + length, dim), class tokens first.
        """
        return self.encode(self.place(self.patch_embed(patches), index), index, scales)

    def place(self, tokens: Array, index: Array | None = None) -> Array:
        """Add the position table, if any, at ``index`` to tokens ([batch,] length, dim)."""
        if not self._has_table:
            return tokens
        table = self.pos_embed[0, self.class_tokens :]
        return tokens + (table if index is None else table[index])

    def encode(self, tokens: Array, index: Array | None = None, scales: Array | None = None) -> Array:
        """Run the blocks and the final norm on embedded and placed tokens.

        Parameters
        ----------
        tokens
            (batch, length, dim).
        index
            int (batch, length): the token of each row; None: all N, in raster order.
        scales
            (batch, depth, 2): factors of the branches, see ``prmim_core.drop_path_scales``; None: all 1.

        Returns
        -------
        jax.Array
            (batch, C + length, dim), class tokens first.
        """
        x = run_blocks(self.blocks, self._with_class_tokens(tokens), self._bias(index), scales, scan=self.scan)
        return x if self.norm is None else self.norm(x)

    def hidden_states(self, tokens: Array, index: Array | None = None, scales: Array | None = None) -> Array:
        """Run the blocks on embedded and placed tokens; arguments as for :meth:`encode`.

        Returns
        -------
        jax.Array
            (1 + depth, batch, C + length, dim), class tokens first, before the final norm: item 0 is the input of the
            first block, item k the output of block k, counted from 1.
        """
        x = self._with_class_tokens(tokens)
        outputs = block_outputs(self.blocks, x, self._bias(index), scales, scan=self.scan)
        return jnp.concatenate([x[None].astype(outputs.dtype), outputs])

    def cls_attention(self, tokens: Array) -> Array:
        """Return the attention of the class token to all N patches in the last block.

        Parameters
        ----------
        tokens
            (batch, N, dim): all tokens, embedded and placed, in raster order.

        Returns
        -------
        jax.Array
            (batch, heads, N).
        """
        bias = self._bias(None)
        before, last = (jax.tree.map(lambda array, part=part: array[part], self.blocks) for part in (slice(-1), -1))
        x = run_blocks(before, self._with_class_tokens(tokens), bias, scan=self.scan)
        return last.first_query(x, bias)[:, :, -tokens.shape[1] :]

    def _with_class_tokens(self, tokens: Array) -> Array:
        # The residual stream has at least the precision of the parameters.
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, self.dtype))
        if not self.class_tokens:
            return tokens
        cls_token = self.cls_token[...]
        if self._has_table:
            cls_token = cls_token + self.pos_embed[:, : self.class_tokens]
        return jnp.concatenate([jnp.broadcast_to(cls_token, (tokens.shape[0], *cls_token.shape[1:])), tokens], axis=1)

    def _bias(self, index: Array | None) -> Array | None:
        """Return the blocks' argument ``bias``."""
        if self.position == "relative_per_block":
            return bias_rows(self.grid, index)
        return self.rel_pos_bias(index) if self.position == "relative" else None


class Decoder(nnx.Module):
    """A narrow transformer over encoded tokens and mask tokens.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in total.
    encoder_dim
        Width of the encoder.
    output_dim
        Values to predict per token; None: no prediction head.
    dim, depth, num_heads
        Width, number of blocks, attention heads.
    position
        ``"absolute"``, ``"raster"`` or ``"learned"``, see :class:`Encoder`.
    class_tokens
        Number of class tokens, C, each with its own position.
    embed_bias
        Whether the projection of the encoder's tokens has a bias.
    recompute
        See :class:`Block`.
    scan
        See :func:`run_blocks`.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.
    """

    def __init__(
        self,
        grid_shape: Sequence[int],
        encoder_dim: int,
        output_dim: int | None,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        position: Position = "absolute",
        class_tokens: int = 1,
        embed_bias: bool = True,
        recompute: bool = False,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.class_tokens = class_tokens
        self.scan = scan
        self.embed = Linear(encoder_dim, dim, bias=embed_bias, dtype=dtype, rngs=rngs)
        self.mask_token = _tokens(rngs, 1, dim)
        self.pos_embed = position_table(rngs, grid_shape, dim, class_tokens, position)
        self.blocks = stack_blocks(
            [Block(dim, num_heads, recompute=recompute, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.norm = LayerNorm(dim)
        if output_dim is not None:
            self.pred = Linear(dim, output_dim, dtype=dtype, rngs=rngs)

    def __call__(self, encoded: Array, index: Array) -> Array:
        """Decode; the caller applies the prediction head ``pred`` where needed.

        Parameters
        ----------
        encoded
            (batch, C + V, encoder_dim), class tokens first.
        index
            int (batch, V + M): the visible tokens, in the order of ``encoded``, then the tokens to decode.

        Returns
        -------
        jax.Array
            (batch, V + M, dim): normalized features of the tokens at ``index``, without the class tokens.
        """
        num_class = self.class_tokens
        places = self.pos_embed[0, num_class:][index]
        seen = self.embed(encoded)  # batch, C + V, dim
        num_visible = seen.shape[1] - num_class
        x = jnp.concatenate(
            [
                seen[:, :num_class] + self.pos_embed[:, :num_class],
                seen[:, num_class:] + places[:, :num_visible],
                self.mask_token[...] + places[:, num_visible:],
            ],
            axis=1,
        )
        return self.norm(run_blocks(self.blocks, x, scan=self.scan)[:, num_class:])

"""The parts of a vision transformer: patch embedding, position table, attention, blocks, encoder, decoder.

Parameter names follow timm's ViT, and weights are laid out as in PyTorch, (out, in), so that files fit both adapters.
Initialisation is MAE's. Nothing here knows about masking strategies: the encoder and the decoder take tokens and the
indices of their places.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from prmim_core import Grid, num_offsets, offset_index

LAYER_NORM_EPS = 1e-6
BLOCK = 2**16

Position = Literal["absolute", "relative"]
Activation = Literal["gelu", "quick_gelu"]


class Buffer(nnx.Variable[Array]):
    """An array that goes into files with the parameters, but is not learned."""


class Statistic(Buffer):
    """A buffer that forward passes in training mode change."""


def sincos_table(shape: Sequence[int], dim: int) -> Array:
    """Return the fixed sine-cosine position table of a grid of tokens, with a row of zeros first for the cls token.

    Parameters
    ----------
    shape
        Tokens along each axis; tokens are numbered in raster order.
    dim
        Channels; a multiple of twice the number of axes.

    Returns
    -------
    jax.Array
        float32 (1, 1 + N, dim), computed in float64.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.

    Notes
    -----
    The channels are split evenly among the axes, the **last axis first** (in images: column, then row, as in MAE).
    A part of width w holds sin(p omega_k), then cos(p omega_k), for k = 0 .. w/2 - 1, with omega_k = 10000^(-2k/w) and
    p the token's index along the axis.

    Examples
    --------
    >>> table = sincos_table((2, 3), 4)
    >>> table.shape
    (1, 7, 4)
    >>> table[0, 2].round(4).tolist() == [0.8414999842643738, 0.5403000116348267, 0.0, 1.0]  # row 0, column 1
    True
    """
    axes = len(shape)
    if dim < 1 or dim % (2 * axes):
        raise ValueError(f"dim: expected a positive multiple of {2 * axes} for a grid of {axes} axes, got {dim}")
    width = dim // axes
    omega = 10000.0 ** (-np.arange(width // 2) * 2 / width)
    angles = [index.reshape(-1, 1) * omega for index in reversed(np.indices(shape))]
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return jnp.asarray(np.concatenate([np.zeros((1, dim)), table])[None].astype(np.float32))


def set_compute_dtype(module: nnx.Module, dtype: DTypeLike | None) -> None:
    """Let the matrix products of a module and its parts take and give another dtype than the parameters have.

    Parameters
    ----------
    module
        Any module of this adapter.
    dtype
        For instance ``jax.numpy.bfloat16``; None: that of the parameters. Residual stream, norms, softmax and loss stay
        in the dtype of the parameters. It is part of what ``nnx.split`` calls the graph, so a change compiles anew.
    """
    for _, part in nnx.iter_modules(module):
        if hasattr(part, "compute_dtype"):
            part.compute_dtype = None if dtype is None else jnp.dtype(dtype)


def wide(dtype: DTypeLike) -> np.dtype:
    """Return float32, or ``dtype`` if it holds more."""
    return jnp.promote_types(dtype, jnp.float32)


def project(x: Array, weight: Array, bias: Array, dtype: DTypeLike | None) -> Array:
    """Return ``x @ weight.T + bias``, computed and given in ``dtype`` (None: that of the weight)."""
    dtype = weight.dtype if dtype is None else dtype
    x, weight, bias = (array.astype(dtype) for array in (x, weight, bias))
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision(dtype)) + bias


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """Return how exact a product of this dtype has to be: float32 means float32, on accelerators as well."""
    return None if jnp.dtype(dtype).itemsize < 4 else lax.Precision.HIGHEST


@jax.jit
def _uniform_block(key: Array) -> Array:
    return jax.random.uniform(key, (BLOCK,), jnp.float32, -1.0, 1.0)


@jax.jit
def _normal_block(key: Array) -> Array:
    return jax.random.normal(key, (BLOCK,), jnp.float32)


def draw(block: Callable[[Array], Array], rngs: nnx.Rngs, shape: Sequence[int], scale: float) -> Array:
    """Draw a float32 array from blocks of one size, times ``scale``.

    JAX compiles a program for every shape that is drawn, which for a small model takes longer than all the rest; so
    there is one program, and shapes are cut from what it gives. Inside a traced function the values are the same.
    """
    key, size = rngs.params(), prod(shape)
    numbers = range(-(-size // BLOCK))
    if isinstance(key, jax.core.Tracer):
        drawn = jax.vmap(lambda number: block(jax.random.fold_in(key, number)))(jnp.arange(len(numbers)))
        return scale * drawn.reshape(-1)[:size].reshape(shape)
    blocks = [np.asarray(block(jax.random.fold_in(key, number))) for number in numbers]
    return jnp.asarray(np.float32(scale) * np.concatenate(blocks)[:size].reshape(shape))


def uniform(rngs: nnx.Rngs, shape: Sequence[int], bound: float) -> Array:
    """Draw float32 values evenly from (-bound, bound)."""
    return draw(_uniform_block, rngs, shape, bound)


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float) -> Array:
    """Draw float32 values from the normal distribution around 0."""
    return draw(_normal_block, rngs, shape, std)


def xavier_uniform(rngs: nnx.Rngs, shape: Sequence[int]) -> Array:
    """Draw a float32 weight (out, ...), Xavier-uniform as the matrix (out, everything else)."""
    return uniform(rngs, shape, sqrt(6 / (shape[0] + prod(shape[1:]))))


def constant(value: float, *shape: int) -> Array:
    """Return a float32 array; made by NumPy, since JAX would compile a program for every shape."""
    return jnp.asarray(np.full(shape, value, np.float32))


class Linear(nnx.Module):
    """A linear layer with MAE's initialisation: Xavier-uniform weight (a fused qkv matrix counts as one), zero bias."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(xavier_uniform(rngs, (out_features, in_features)))
        self.bias = nnx.Param(constant(0.0, out_features))
        self.compute_dtype: np.dtype | None = None

    def __call__(self, x: Array) -> Array:
        """Map (..., in_features) to (..., out_features)."""
        return project(x, self.weight[...], self.bias[...], self.compute_dtype)


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
    """The weights of a patch convolution, stored as one, applied to patches that are already cut out.

    Parameters
    ----------
    dim
        Output channels, D.
    channels
        Channels of the image, C.
    patch_size
        Pixels of a patch along each axis.
    rngs
        Source of the initial weights: Xavier-uniform as a matrix; the bias as convolutions have it in PyTorch, uniform
        within 1/sqrt(fan in).

    Notes
    -----
    The weight is stored as a convolution's, channels before pixels, so that files match other ViTs. Patches hold their
    channels last; the small weight is permuted to fit, never the data.
    """

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int], *, rngs: nnx.Rngs) -> None:
        bound = 1 / sqrt(channels * prod(patch_size))
        self.weight = nnx.Param(xavier_uniform(rngs, (dim, channels, *patch_size)))
        self.bias = nnx.Param(uniform(rngs, (dim,), bound))
        self.compute_dtype: np.dtype | None = None

    def __call__(self, patches: Array) -> Array:
        """Project patches (..., prod(patch) * C) to (..., D)."""
        weight = jnp.moveaxis(self.weight[...], 1, -1)
        return project(patches, weight.reshape(len(weight), -1), self.bias[...], self.compute_dtype)


class PatchEmbed(nnx.Module):
    """Holds the projection under the name that ViT files use, ``patch_embed.proj``."""

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int], *, rngs: nnx.Rngs) -> None:
        self.proj = PatchProjection(dim, channels, patch_size, rngs=rngs)

    def __call__(self, patches: Array) -> Array:
        """Project patches (batch, length, prod(patch) * C) to (batch, length, dim)."""
        return self.proj(patches)


class Attention(nnx.Module):
    """Multi-head self-attention with a fused qkv projection; scale 1/sqrt(head_dim), softmax in float32 or wider.

    Notes
    -----
    Queries, keys and values have a bias each. BEiT and SimMIM leave out that of the keys, which is the same: it adds
    one number to all scores of a query, which the softmax does not notice, and its gradient is 0.
    """

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """Map (batch, length, dim) to the same shape.

        ``bias``, ([batch,] heads, length, length), is added to the scores of queries (rows) and keys.
        """
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (qkv[:, :, part] for part in range(3))  # batch, length, heads, head_dim
        exact = precision(q.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=exact, preferred_element_type=wide(q.dtype))
        scores = scores / sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact)
        return self.proj(mixed.reshape(batch, length, dim))


class Mlp(nnx.Module):
    """Two linear layers with an activation between them: the exact (erf) GELU, or CLIP's ``"quick_gelu"``."""

    def __init__(self, dim: int, hidden_dim: int, *, activation: Activation = "gelu", rngs: nnx.Rngs) -> None:
        if activation not in get_args(Activation):
            raise ValueError(f"activation: expected 'gelu' or 'quick_gelu', got {activation!r}")
        self.activation = activation
        self.fc1 = Linear(dim, hidden_dim, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (batch, length, dim) to the same shape."""
        hidden = self.fc1(x)
        return self.fc2(self._activate(hidden.astype(wide(hidden.dtype))).astype(hidden.dtype))

    def _activate(self, x: Array) -> Array:
        if self.activation == "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        return jax.nn.gelu(x, approximate=False)


class LayerScale(nnx.Module):
    """A learned factor per channel, the same for all channels at first."""

    def __init__(self, dim: int, value: float) -> None:
        self.gamma = nnx.Param(constant(value, dim))

    def __call__(self, x: Array) -> Array:
        """Map (..., dim) to the same shape."""
        return x * self.gamma[...]


class Block(nnx.Module):
    """A pre-norm transformer block.

    Parameters
    ----------
    dim, num_heads
        Width and attention heads.
    mlp_ratio
        Width of the hidden layer over ``dim``.
    layer_scale
        First value of a learned factor per channel after each of the two branches; None: no such factors.
    activation
        ``"gelu"``, or ``"quick_gelu"`` as teachers of CLIP have it.
    eps
        Of both norms.
    recompute
        Whether the backward pass computes anew what it needs of the block, from its input, which alone is kept.
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
        rngs: nnx.Rngs,
    ) -> None:
        self.recompute = recompute
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, rngs=rngs)
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_ratio * dim, activation=activation, rngs=rngs)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def __call__(self, x: Array, bias: Array | None = None, scales: Array | None = None) -> Array:
        """Add attention, then the MLP, to the residual stream.

        Parameters
        ----------
        x
            (batch, length, dim).
        bias
            ([batch,] heads, length, length), added to the scores of the attention, or None.
        scales
            (batch, 2): factors of the attention and of the MLP of every image, for drop path; None: 1.

        Returns
        -------
        jax.Array
            (batch, length, dim).
        """
        if not self.recompute:
            return self._add(x, bias, scales)
        graph, weights = nnx.split(self)
        # As a function of the weights, since a module may not cross the border of a transformation.
        out: Array = jax.checkpoint(lambda weights, *inputs: nnx.merge(graph, weights)._add(*inputs))(
            weights, x, bias, scales
        )
        return out

    def _add(self, x: Array, bias: Array | None, scales: Array | None) -> Array:
        x = _add(x, self.attn(self.norm1(x), bias), self.ls1, None if scales is None else scales[:, 0])
        return _add(x, self.mlp(self.norm2(x)), self.ls2, None if scales is None else scales[:, 1])


def _add(x: Array, branch: Array, layer_scale: LayerScale | None, scale: Array | None) -> Array:
    branch = branch if layer_scale is None else layer_scale(branch)
    return x + (branch if scale is None else branch * scale[:, None, None])


class BlockStack(nnx.Module):
    """Blocks that are equal but for their weights, as one whose variables have an axis more in front.

    Parameters
    ----------
    blocks
        One block at least.

    Notes
    -----
    For ``jax.lax.scan``: a program then holds a single block, however many there are.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.depth = len(blocks)
        self.block: Block = nnx.merge(nnx.graphdef(blocks[0]), _stack([nnx.state(block) for block in blocks]))

    def blocks(self) -> list[Block]:
        """Take the blocks apart."""
        graph, weights = nnx.split(self.block)
        return [nnx.merge(graph, part) for part in _unstack(weights, self.depth)]

    def __call__(self, x: Array, bias: Array | None = None, scales: Array | None = None) -> Array:
        """Apply the blocks as :func:`run_blocks` does."""
        last: Array = self._scan(x, bias, scales, keep=False)[0]
        return last

    def outputs(self, x: Array, bias: Array | None = None, scales: Array | None = None) -> list[Array]:
        """Apply the blocks as :func:`block_outputs` does."""
        return list(self._scan(x, bias, scales, keep=True)[1])

    def _scan(self, x: Array, bias: Array | None, scales: Array | None, *, keep: bool) -> tuple[Array, Any]:
        graph, weights = nnx.split(self.block)

        def step(x: Array, of_block: tuple[Any, Array | None]) -> tuple[Array, Array | None]:
            weights, scales = of_block
            x = nnx.merge(graph, weights)(x, bias, scales)
            return x, x if keep else None

        by_block = None if scales is None else jnp.moveaxis(scales, 1, 0)
        last, outputs = lax.scan(step, x, (weights, by_block))
        return last, outputs


# Compiled, since outside of compiled functions they would be a program for every shape.
@jax.jit
def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *each: jnp.stack(each), *trees)


@partial(jax.jit, static_argnums=1)
def _unstack(tree: Any, depth: int) -> list[Any]:
    return [jax.tree.map(lambda each, number=number: each[number], tree) for number in range(depth)]


Blocks = Sequence[Block] | BlockStack


def run_blocks(
    blocks: Blocks, x: Array, bias: Array | None = None, scales: Array | None = None, *, scan: bool = False
) -> Array:
    """Apply blocks one after the other.

    Parameters
    ----------
    blocks
        A list of them, or their stack.
    x
        (batch, length, dim).
    bias
        ([batch,] heads, length, length), for the attention of every block, or None.
    scales
        (batch, depth, 2), for the two branches of every block, or None.
    scan
        Whether to stack a list, at the price of a copy of the weights, and loop over the stack. The same numbers.

    Returns
    -------
    jax.Array
        (batch, length, dim): the output of the last block.
    """
    if isinstance(blocks, BlockStack) or (scan and blocks):
        return _as_stack(blocks)(x, bias, scales)
    for number, block in enumerate(blocks):
        x = block(x, bias, None if scales is None else scales[:, number])
    return x


def block_outputs(
    blocks: Blocks, x: Array, bias: Array | None = None, scales: Array | None = None, *, scan: bool = False
) -> list[Array]:
    """Apply blocks as :func:`run_blocks` does, and return the output of each, (batch, length, dim)."""
    if isinstance(blocks, BlockStack) or (scan and blocks):
        return _as_stack(blocks).outputs(x, bias, scales)
    outputs = []
    for number, block in enumerate(blocks):
        x = block(x, bias, None if scales is None else scales[:, number])
        outputs.append(x)
    return outputs


def _as_stack(blocks: Blocks) -> BlockStack:
    return blocks if isinstance(blocks, BlockStack) else BlockStack(blocks)


def stack_blocks(module: nnx.Module) -> None:
    """Stack the blocks of all parts that scan over theirs, in place; names of parameters change with that.

    Who keeps the weights like this from step to step spares the copy, and an optimiser has fewer, larger arrays.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Encoder | Decoder) and part.scan and part.blocks:
            part.blocks = _as_stack(part.blocks)


def unstack_blocks(module: nnx.Module) -> None:
    """Undo :func:`stack_blocks`, in place."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Encoder | Decoder) and isinstance(part.blocks, BlockStack):
            part.blocks = nnx.List(part.blocks.blocks())


class RelativePositionBias(nnx.Module):
    """A learned number per head and offset between two tokens, for the scores of an attention.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in all.
    num_heads
        Attention heads.

    Notes
    -----
    As in BEiT and SimMIM. The table has a row for every offset of a query from a key, in raster order, then one for the
    cls token as query, one for it as key, and one for both. It starts at 0.
    """

    def __init__(self, grid_shape: Sequence[int], num_heads: int) -> None:
        self.grid = Grid(tuple(grid_shape))
        self.relative_position_bias_table = nnx.Param(constant(0.0, num_offsets(self.grid) + 3, num_heads))

    def __call__(self, index: Array | None = None) -> Array:
        """Look up the numbers of tokens, the cls token put before them.

        Parameters
        ----------
        index
            int (batch, n): tokens; None: all N, in raster order.

        Returns
        -------
        jax.Array
            (batch, heads, 1 + n, 1 + n), queries along the last axis but one; (heads, 1 + N, 1 + N) for all.
        """
        tokens = jnp.arange(self.grid.num_tokens)[None] if index is None else index
        rows = num_offsets(self.grid)
        row = jnp.pad(offset_index(self.grid, tokens, tokens), ((0, 0), (1, 0), (1, 0)), constant_values=rows)
        row = row.at[:, 1:, 0].set(rows + 1).at[:, 0, 0].set(rows + 2)
        bias: Array = jnp.moveaxis(self.relative_position_bias_table[...][row], -1, 1)
        return bias[0] if index is None else bias


def check_width(name: str, dim: int, num_heads: int, axes: int | None) -> None:
    """Raise ValueError unless ``dim`` can be shared out among heads, and (unless None) among the axes of the grid."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"{name}: expected a positive multiple of the number of heads, got {dim} for {num_heads}")
    if axes is not None and dim % (2 * axes):
        raise ValueError(f"{name}: expected a multiple of {2 * axes} for a grid of {axes} axes, got {dim}")


def _token(rngs: nnx.Rngs, dim: int) -> nnx.Param[Array]:
    return nnx.Param(normal(rngs, (1, 1, dim), 0.02))


class Encoder(nnx.Module):
    """A vision transformer that embeds and encodes only the patches it is given.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in all.
    patch_size
        Pixels of a patch along each axis.
    channels
        Channels of the image.
    dim, depth, num_heads
        Width, number of blocks, attention heads.
    position
        How it knows where tokens are: ``"absolute"``, a fixed sine-cosine table added to them; or ``"relative"``, one
        :class:`RelativePositionBias` for all blocks.
    layer_scale, recompute
        See :class:`Block`.
    scan
        See :func:`run_blocks`.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` does not fit the heads or, for the absolute table, the axes; or ``position`` is not known.
    """

    mask_token: nnx.Param[Array]
    """(1, 1, dim): stands for masked tokens; only there if a method that gives such to the encoder has set it."""

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
        layer_scale: float | None = None,
        recompute: bool = False,
        scan: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if position not in get_args(Position):
            raise ValueError(f"position: expected 'absolute' or 'relative', got {position!r}")
        is_absolute = position == "absolute"
        check_width("embed_dim", dim, num_heads, len(grid_shape) if is_absolute else None)
        self.scan = scan
        self.patch_embed = PatchEmbed(dim, channels, patch_size, rngs=rngs)
        self.cls_token = _token(rngs, dim)
        self.pos_embed = Buffer(sincos_table(grid_shape, dim)) if is_absolute else None
        self.rel_pos_bias = None if is_absolute else RelativePositionBias(grid_shape, num_heads)
        blocks = [Block(dim, num_heads, layer_scale=layer_scale, recompute=recompute, rngs=rngs) for _ in range(depth)]
        self.blocks: Blocks = nnx.List(blocks)
        self.norm = LayerNorm(dim)

    def __call__(self, patches: Array, index: Array | None = None) -> Array:
        """Encode patches.

        Parameters
        ----------
        patches
            (batch, length, prod(patch) * C), normalised pixels.
        index
            int (batch, length): the token that each patch is; None: the patches are all N of them, in raster order.

        Returns
        -------
        jax.Array
            (batch, 1 + length, dim), the cls token first, the final norm applied.
        """
        return self.encode(self.place(self.patch_embed(patches), index), index)

    def place(self, tokens: Array, index: Array | None = None) -> Array:
        """Add to embedded tokens ([batch,] length, dim) the absolute positions of ``index``, if the encoder has any."""
        if self.pos_embed is None:
            return tokens
        table = self.pos_embed[0, 1:]
        return tokens + (table if index is None else table[index])

    def encode(self, tokens: Array, index: Array | None = None, scales: Array | None = None) -> Array:
        """Run the blocks and the final norm on tokens that are embedded and placed.

        Parameters
        ----------
        tokens
            (batch, length, dim).
        index
            int (batch, length): the token that each one is; None: all N, in raster order.
        scales
            (batch, depth, 2): what branches are multiplied with, see ``prmim_core.drop_path_scales``; None: nothing.

        Returns
        -------
        jax.Array
            (batch, 1 + length, dim), the cls token first.
        """
        return self.norm(run_blocks(self.blocks, self._with_cls(tokens), self._bias(index), scales, scan=self.scan))

    def hidden_states(
        self, tokens: Array, index: Array | None = None, scales: Array | None = None, *, last: int | None = None
    ) -> list[Array]:
        """Run the blocks on tokens that are embedded and placed; see :meth:`encode` for the arguments.

        Parameters
        ----------
        last
            How many blocks, counted from the last one, to return the outputs of; None: all.

        Returns
        -------
        list of jax.Array
            Outputs (batch, 1 + length, dim) of blocks, the cls token first, before the final norm.
        """
        outputs = block_outputs(self.blocks, self._with_cls(tokens), self._bias(index), scales, scan=self.scan)
        return outputs if last is None else outputs[len(outputs) - last :]

    def _with_cls(self, tokens: Array) -> Array:
        cls_token = self.cls_token[...]
        if self.pos_embed is not None:
            cls_token = cls_token + self.pos_embed[:, :1]
        return jnp.concatenate([jnp.broadcast_to(cls_token, (len(tokens), *cls_token.shape[1:])), tokens], axis=1)

    def _bias(self, index: Array | None) -> Array | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias(index)


class Decoder(nnx.Module):
    """A narrow transformer over the encoded tokens and mask tokens at the places that are to be decoded.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in all.
    encoder_dim
        Width of the encoder.
    output_dim
        Values to predict per token.
    dim, depth, num_heads
        Width, number of blocks, attention heads.
    recompute
        See :class:`Block`.
    scan
        See :func:`run_blocks`.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` does not fit the heads or the axes.
    """

    def __init__(
        self,
        grid_shape: Sequence[int],
        encoder_dim: int,
        output_dim: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        recompute: bool = False,
        scan: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_width("decoder_dim", dim, num_heads, len(grid_shape))
        self.scan = scan
        self.embed = Linear(encoder_dim, dim, rngs=rngs)
        self.mask_token = _token(rngs, dim)
        self.pos_embed = Buffer(sincos_table(grid_shape, dim))
        self.blocks: Blocks = nnx.List([Block(dim, num_heads, recompute=recompute, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, output_dim, rngs=rngs)

    def __call__(self, encoded: Array, index: Array) -> Array:
        """Decode; the prediction head ``pred`` is left to the caller, who knows which tokens need it.

        Parameters
        ----------
        encoded
            (batch, 1 + V, encoder_dim), the cls token first.
        index
            int (batch, V + M): the places of the visible tokens, in the order of ``encoded``, then of the tokens to
            decode.

        Returns
        -------
        jax.Array
            (batch, V + M, dim): the features of the tokens at ``index``, the final norm applied, without cls.
        """
        places = self.pos_embed[0, 1:][index]
        seen = self.embed(encoded)  # batch, 1 + V, dim
        num_visible = seen.shape[1] - 1
        x = jnp.concatenate(
            [
                seen[:, :1] + self.pos_embed[:, :1],
                seen[:, 1:] + places[:, :num_visible],
                self.mask_token[...] + places[:, num_visible:],
            ],
            axis=1,
        )
        return self.norm(run_blocks(self.blocks, x, scan=self.scan)[:, 1:])

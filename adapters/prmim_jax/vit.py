"""The parts of a vision transformer: patch embedding, position table, attention, blocks, encoder, decoder.

Parameter names follow timm's ViT, and weights are laid out as in PyTorch, (out, in), so that files fit both adapters.
Initialisation is MAE's. Nothing here knows about masking strategies: the encoder and the decoder take tokens and the
indices of their places.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

LAYER_NORM_EPS = 1e-6
BLOCK = 2**16


class Buffer(nnx.Variable[Array]):
    """An array that goes into files with the parameters, but is not learned."""


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
    """Layer norm over the last axis with eps 1e-6, computed in float32 or wider."""

    def __init__(self, dim: int, *, elementwise_affine: bool = True) -> None:
        self.weight = nnx.Param(constant(1.0, dim)) if elementwise_affine else None
        self.bias = nnx.Param(constant(0.0, dim)) if elementwise_affine else None

    def __call__(self, x: Array) -> Array:
        """Map (..., dim) to the same shape."""
        x = x.astype(wide(x.dtype))
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
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
    """Multi-head self-attention with a fused qkv projection; scale 1/sqrt(head_dim), softmax in float32 or wider."""

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (batch, length, dim) to the same shape."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (qkv[:, :, part] for part in range(3))  # batch, length, heads, head_dim
        exact = precision(q.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=exact, preferred_element_type=wide(q.dtype))
        weights = jax.nn.softmax(scores / sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact)
        return self.proj(mixed.reshape(batch, length, dim))


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(dim, hidden_dim, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (batch, length, dim) to the same shape."""
        hidden = self.fc1(x)
        return self.fc2(jax.nn.gelu(hidden.astype(wide(hidden.dtype)), approximate=False).astype(hidden.dtype))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, rngs=rngs)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def check_width(name: str, dim: int, num_heads: int, axes: int) -> None:
    """Raise ValueError unless ``dim`` channels can be shared out among heads, and among the axes of the grid."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"{name}: expected a positive multiple of the number of heads, got {dim} for {num_heads}")
    if dim % (2 * axes):
        raise ValueError(f"{name}: expected a multiple of {2 * axes} for a grid of {axes} axes, got {dim}")


def _token(rngs: nnx.Rngs, dim: int) -> nnx.Param[Array]:
    return nnx.Param(draw(_normal_block, rngs, (1, 1, dim), 0.02))


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
        patch_size: Sequence[int],
        channels: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        rngs: nnx.Rngs,
    ) -> None:
        check_width("embed_dim", dim, num_heads, len(grid_shape))
        self.patch_embed = PatchEmbed(dim, channels, patch_size, rngs=rngs)
        self.cls_token = _token(rngs, dim)
        self.pos_embed = Buffer(sincos_table(grid_shape, dim))
        self.blocks = nnx.List([Block(dim, num_heads, rngs=rngs) for _ in range(depth)])
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
        table = self.pos_embed[0, 1:]
        x = self.patch_embed(patches) + (table if index is None else table[index])
        cls_token = self.cls_token[...] + self.pos_embed[:, :1]
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (len(x), *cls_token.shape[1:])), x], axis=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


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
        rngs: nnx.Rngs,
    ) -> None:
        check_width("decoder_dim", dim, num_heads, len(grid_shape))
        self.embed = Linear(encoder_dim, dim, rngs=rngs)
        self.mask_token = _token(rngs, dim)
        self.pos_embed = Buffer(sincos_table(grid_shape, dim))
        self.blocks = nnx.List([Block(dim, num_heads, rngs=rngs) for _ in range(depth)])
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
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])

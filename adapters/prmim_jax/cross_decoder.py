"""The decoder of CrossMAE: mask tokens attend to the encoder's layers only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from prmim_jax.vit import (
    LayerNorm,
    Linear,
    Mlp,
    Position,
    attend,
    normal,
    position_table,
    precision,
    stack_blocks,
    xavier_uniform,
)


class CrossAttention(nnx.Module):
    """Multi-head attention of queries to a context, with scale 1/sqrt(head_dim).

    The softmax is computed in float32 or wider.

    Parameters
    ----------
    dim, context_dim, num_heads
        Width of the queries, width of the context, attention heads.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ) -> None:
        self.num_heads = num_heads
        self.q = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.kv = Linear(context_dim, 2 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        """Map (batch, length, dim) to the same shape; context (batch, n, context_dim)."""
        batch, length, dim = x.shape
        heads = self.num_heads, dim // self.num_heads
        kv = self.kv(context).reshape(batch, context.shape[1], 2, *heads)
        mixed = attend(self.q(x).reshape(batch, length, *heads), kv[:, :, 0], kv[:, :, 1])
        return self.proj(mixed.reshape(batch, length, dim))


class CrossBlock(nnx.Module):
    """A pre-norm block of cross-attention and an MLP, without self-attention.

    Parameters
    ----------
    dim, context_dim, num_heads
        See :class:`CrossAttention`.
    recompute
        See :class:`prmim_jax.vit.Block`.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        recompute: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.recompute = recompute
        self.norm_context = LayerNorm(context_dim)
        self.norm1 = LayerNorm(dim)
        self.attn = CrossAttention(dim, context_dim, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        """Map (batch, length, dim) to the same shape; context (batch, n, context_dim)."""
        add = jax.checkpoint(CrossBlock._add) if self.recompute else CrossBlock._add
        return add(self, x, context)

    def _add(self, x: Array, context: Array) -> Array:
        """Add both branches to the residual stream."""
        x = x + self.attn(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nnx.Module):
    """Cross-attention from mask tokens to learned mixes of the encoder's layers.

    Each block reads its own mix: a weighted sum of the input of the encoder's blocks and the output of each. Decoded
    tokens do not see each other, so their features do not depend on which others are decoded.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in total.
    encoder_dim, encoder_depth
        Width of the encoder, number of its blocks.
    output_dim
        Values to predict per token.
    dim, depth, num_heads
        Width, number of blocks, attention heads.
    position
        ``"absolute"``, ``"raster"`` or ``"learned"``, see :class:`prmim_jax.vit.Encoder`.
    class_tokens
        Number of class tokens of the encoder, C. Their rows of the position table have no effect.
    visible_features
        Whether visible tokens have features too: one more mix, normalized and projected to the decoder's width.
    recompute
        See :class:`prmim_jax.vit.Block`.
    scan
        See :func:`prmim_jax.vit.run_blocks`.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.

    Notes
    -----
    The weights of the mixes start Xavier-uniform, as the matrix (mixes, layers).
    """

    def __init__(
        self,
        grid_shape: Sequence[int],
        encoder_dim: int,
        encoder_depth: int,
        output_dim: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        position: Position = "absolute",
        class_tokens: int = 1,
        visible_features: bool = False,
        recompute: bool = False,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.class_tokens = class_tokens
        self.depth = depth
        self.scan = scan
        self.dtype = dtype
        self.mask_token = nnx.Param(normal(rngs, (1, 1, dim), 0.02))
        self.mix = nnx.Param(xavier_uniform(rngs, (depth + visible_features, 1 + encoder_depth)))
        self.pos_embed = position_table(rngs, grid_shape, dim, class_tokens, position)
        self.blocks = stack_blocks(
            [CrossBlock(dim, encoder_dim, num_heads, recompute=recompute, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.norm_visible = LayerNorm(encoder_dim) if visible_features else None
        self.embed = Linear(encoder_dim, dim, dtype=dtype, rngs=rngs) if visible_features else None
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, output_dim, dtype=dtype, rngs=rngs)

    def __call__(self, states: Array, index: Array) -> Array:
        """Decode; the caller applies the prediction head ``pred`` where needed.

        Parameters
        ----------
        states
            (1 + encoder_depth, batch, C + V, encoder_dim), from :meth:`prmim_jax.vit.Encoder.hidden_states`.
        index
            int (batch, M): the tokens to decode.

        Returns
        -------
        jax.Array
            (batch, M, dim): normalized features of the tokens at ``index``. With ``visible_features``, (batch, V + M,
            dim), visible tokens first.
        """
        dtype = self.mix.dtype if self.dtype is None else self.dtype
        # A single product for all mixes reads the layers once.
        mixes = jnp.einsum(
            "kl,lbnd->kbnd", self.mix[...].astype(dtype), states.astype(dtype), precision=precision(dtype)
        )
        x = self.mask_token[...] + self.pos_embed[0, self.class_tokens :][index]
        x, _ = lax.scan(_step, x, (self.blocks, mixes[: self.depth]), unroll=not self.scan)
        if self.norm_visible is not None and self.embed is not None:
            x = jnp.concatenate([self.embed(self.norm_visible(mixes[-1, :, self.class_tokens :])), x], axis=1)
        return self.norm(x)


def _step(x: Array, of_block: tuple[CrossBlock, Array]) -> tuple[Array, None]:
    block, context = of_block
    return block(x, context), None

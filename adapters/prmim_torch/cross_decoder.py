"""The decoder of CrossMAE: mask tokens attend to the encoder's layers only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prmim_torch.cpu_kernels import attend
from prmim_torch.vit import LayerNorm, Linear, Mlp, Position, add_table, reset_table


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context, with scale 1/sqrt(head_dim).

    Parameters
    ----------
    dim, context_dim, num_heads
        Width of the queries, width of the context, attention heads.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(context_dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape; context (batch, n, context_dim)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # batch, heads, length, head_dim
        k, v = (part.transpose(1, 2) for part in self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2))
        return self.proj(attend(q, k, v, None).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """A pre-norm block of cross-attention and an MLP, without self-attention.

    Parameters
    ----------
    dim, context_dim, num_heads
        See :class:`CrossAttention`.
    recompute
        See :class:`prmim_torch.vit.Block`.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm_context = LayerNorm(context_dim)
        self.norm1 = LayerNorm(dim)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape; context (batch, n, context_dim)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._add, x, context, use_reentrant=False, preserve_rng_state=False)
        return self._add(x, context)

    def _add(self, x: Tensor, context: Tensor) -> Tensor:
        """Add both branches to the residual stream."""
        x = x + self.attn(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
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
        ``"absolute"``, ``"raster"`` or ``"learned"``, see :class:`prmim_torch.vit.Encoder`.
    class_tokens
        Number of class tokens of the encoder, C. Their rows of the position table have no effect.
    visible_features
        Whether visible tokens have features too: one more mix, normalized and projected to the decoder's width.
    recompute
        See :class:`prmim_torch.vit.Block`.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.

    Notes
    -----
    The weights of the mixes start Xavier-uniform, as the matrix (mixes, layers).
    """

    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        self.position = position
        self.class_tokens = class_tokens
        self._grid_shape = tuple(grid_shape)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mix = nn.Parameter(torch.empty(depth + visible_features, 1 + encoder_depth))
        add_table(self, grid_shape, dim, class_tokens, is_learned=position == "learned")
        self.reset_parameters()
        self.blocks = nn.ModuleList(CrossBlock(dim, encoder_dim, num_heads, recompute=recompute) for _ in range(depth))
        self.norm_visible = LayerNorm(encoder_dim) if visible_features else None
        self.embed = Linear(encoder_dim, dim) if visible_features else None
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, output_dim)

    def reset_parameters(self) -> None:
        """Redraw the mask token and the mixes; reset the position table.

        Submodules are not changed.
        """
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.mix)
        reset_table(self.pos_embed, self._grid_shape, self.class_tokens, self.position)

    def forward(self, states: Sequence[Tensor], index: Tensor) -> Tensor:
        """Decode; the caller applies the prediction head ``pred`` where needed.

        Parameters
        ----------
        states
            (batch, C + V, encoder_dim) each, from :meth:`prmim_torch.vit.Encoder.hidden_states`.
        index
            int (batch, M): the tokens to decode.

        Returns
        -------
        Tensor
            (batch, M, dim): normalized features of the tokens at ``index``. With ``visible_features``, (batch, V + M,
            dim), visible tokens first.
        """
        layers = torch.stack(tuple(states))
        # A single product for all mixes reads the layers once.
        mixes = (self.mix @ layers.flatten(1)).view(-1, *layers.shape[1:]).unbind()
        x = self.mask_token + F.embedding(index, self.pos_embed[0, self.class_tokens :])
        for block, context in zip(self.blocks, mixes, strict=False):  # visible tokens may have one more
            x = block(x, context)
        if self.norm_visible is not None and self.embed is not None:
            x = torch.cat([self.embed(self.norm_visible(mixes[-1][:, self.class_tokens :])), x], dim=1)
        return self.norm(x)

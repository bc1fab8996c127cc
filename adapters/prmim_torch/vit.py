"""Vision transformer modules.

Parameter names follow timm's ViT; the initialization is MAE's. Masking is separate: the encoder and the decoder take
tokens and indices of their positions.
"""

from collections.abc import Sequence
from math import prod, sqrt
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from prmim_core import Grid, num_offsets
from prmim_methods.encoder import num_bias_rows
from prmim_methods.positions import fixed_table
from prmim_methods.sizes import LAYER_NORM_EPS
from prmim_torch.cpu_kernels import attend, linear

Position = Literal["absolute", "raster", "learned", "relative", "relative_per_block"]


def constant_like(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a vector with the dtype and device of a tensor, without blocking.

    Constants are not buffers, so that modules built on the meta device have them too.
    """
    return torch.tensor(values, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, whole and equal in all processes, like another one."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a parameter or buffer, in-place.

    If FSDP2 shards it, each process copies its part.
    """
    with torch.no_grad():
        tensor.copy_(spread(values, tensor))


def add_table(module: nn.Module, grid_shape: Sequence[int], dim: int, class_tokens: int, *, is_learned: bool) -> None:
    """Add an uninitialized position table ``pos_embed`` (1, C + N, dim).

    A parameter if learned, else a buffer.
    """
    table = torch.empty(1, class_tokens + prod(grid_shape), dim)
    if is_learned:
        module.register_parameter("pos_embed", nn.Parameter(table))
    else:
        module.register_buffer("pos_embed", table)


def reset_table(table: Tensor, grid_shape: Sequence[int], class_tokens: int, position: str) -> None:
    """Initialize a position table: normal (0.02) if ``"learned"``, else sine-cosine."""
    if position == "learned":
        # No truncation at +-2 as in timm, since it has no effect.
        nn.init.normal_(table, std=0.02)
    else:
        fill(table, torch.from_numpy(fixed_table(position, grid_shape, table.shape[-1], class_tokens)))


class Linear(nn.Linear):
    """``nn.Linear`` with MAE's initialization: Xavier-uniform weight, zero bias.

    A fused qkv matrix counts as one weight.
    """

    def reset_parameters(self) -> None:
        """Redraw the weight from torch's global random state."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis with eps 1e-6."""

    def __init__(self, dim: int, *, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS, elementwise_affine=elementwise_affine)


class PatchProjection(nn.Module):
    """A patch convolution, applied to patches.

    Parameters
    ----------
    dim
        Output channels, D.
    channels
        Channels of the image, C.
    patch_size
        Pixels of a patch along each axis.

    Notes
    -----
    The weight has the layout of a convolution, channels before pixels, so that files match other ViTs. Patches have
    channels last, so the weight is permuted, not the data.
    """

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw the weight (Xavier-uniform as a matrix) and the bias (a convolution's).

        The bias is uniform in 1/sqrt(fan in).
        """
        nn.init.xavier_uniform_(self.weight.view(self.weight.shape[0], -1))
        bound = 1 / sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (..., prod(patch) * C) to (..., D)."""
        return linear(patches, self.weight.movedim(1, -1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Container that names the projection ``patch_embed.proj``, as in ViT files."""

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.proj = PatchProjection(dim, channels, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (batch, length, prod(patch) * C) to (batch, length, dim)."""
        return self.proj(patches)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection; scale 1/sqrt(head_dim).

    Parameters
    ----------
    dim, num_heads
        Width, attention heads.
    table_rows
        Rows of the layer's own table of relative position bias, see :class:`RelativePositionBias`; None: no table.

    Notes
    -----
    Queries, keys and values have biases. Models without a bias of the keys (BEiT, SimMIM) compute the same function: it
    adds one number to all scores of a query, which does not change the softmax. Its gradient is 0.
    """

    def __init__(self, dim: int, num_heads: int, *, table_rows: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        table = None if table_rows is None else nn.Parameter(torch.empty(table_rows, num_heads))
        self.relative_position_bias_table = table
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the table to zero, if there is one; submodules are not changed."""
        if self.relative_position_bias_table is not None:
            nn.init.zeros_(self.relative_position_bias_table)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape.

        ``bias`` is added to the scores: ([batch,] heads, length, length). If the layer has a table, ``bias`` is the row
        of each pair of tokens in it: int ([batch,] length, length).
        """
        if self.relative_position_bias_table is not None and bias is not None:
            bias = look_up(self.relative_position_bias_table, bias)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # batch, length, 3, heads, head_dim
        # Unbinding before transposing saves one of two copies of the gradients in the backward pass.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = attend(q, k, v, None if bias is None else bias.to(q.dtype))  # batch, heads, length, head_dim
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def first_query(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the first token's attention: (batch, heads, length).

        ``bias`` is added to the scores: ([batch,] heads, length, length).
        """
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # batch, length, heads, head_dim
        scores = torch.einsum("bhd,blhd->bhl", q[:, 0], k).to(x.dtype) * q.shape[-1] ** -0.5
        return (scores if bias is None else scores + bias[..., 0, :]).softmax(-1)


def offset_code(grid: Grid, device: torch.device) -> Tensor:
    """Return codes int64 (N,) of tokens, whose differences identify offsets.

    A difference plus ``num_offsets(grid) // 2`` is the index of ``prmim_core.offset_index``. Computed on the device.
    """
    code = torch.zeros(1, dtype=torch.int64, device=device)
    for size in grid.shape:
        code = (code[:, None] * (2 * size - 1) + torch.arange(size, device=device)).flatten()
    return code


def bias_rows(grid: Grid, index: Tensor | None, device: torch.device) -> Tensor:
    """Return the table row of each token pair; see :class:`RelativePositionBias`.

    Parameters
    ----------
    grid
        The grid of the tokens, N in all.
    index
        int (batch, length): the tokens; None: all N, in raster order.
    device
        Where to compute.

    Returns
    -------
    Tensor
        int64 (batch, 1 + length, 1 + length), queries before keys, class token first; no batch axis for None.
    """
    offsets = num_offsets(grid)
    code = offset_code(grid, device)
    code = code if index is None else code[index]
    row = code[..., :, None] - code[..., None, :] + offsets // 2
    # The row and the column of the class token.
    row = F.pad(row, (0, 0, 1, 0), value=offsets)
    row = F.pad(row, (1, 0, 0, 0), value=offsets + 1)
    row[..., 0, 0] = offsets + 2
    return row


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Look up a bias table at rows ([batch,] length, length).

    Returns ([batch,] heads, length, length).
    """
    return F.embedding(rows, table).movedim(-1, -3)


class RelativePositionBias(nn.Module):
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
        super().__init__()
        self._grid = Grid(tuple(grid_shape))
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_bias_rows(self._grid), num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the table to zero."""
        nn.init.zeros_(self.relative_position_bias_table)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Look up the bias of all pairs of the class token and the given tokens.

        Parameters
        ----------
        index
            int (batch, length): the tokens; None: all N, in raster order.

        Returns
        -------
        Tensor
            (batch, heads, 1 + length, 1 + length), queries before keys, class token first; no batch axis for None.
        """
        table = self.relative_position_bias_table
        return look_up(table, bias_rows(self._grid, index, table.device))


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned per-channel factor, initially ``value``."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors to their initial value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., dim)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block.

    Parameters
    ----------
    dim, num_heads, mlp_ratio
        Width, attention heads, width of the hidden layer over ``dim``.
    layer_scale
        Initial value of LayerScale on both branches; None: no LayerScale.
    recompute
        Whether to save only the input, and recompute the block in the backward pass (activation checkpointing).
    table_rows
        See :class:`Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        *,
        layer_scale: float | None = None,
        recompute: bool = False,
        table_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, table_rows=table_rows)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x
            (batch, length, dim).
        bias
            See :meth:`Attention.forward`.
        scales
            (batch, 2): factor of each image's attention branch and MLP branch (drop path).

        Returns
        -------
        Tensor
            (batch, length, dim).
        """
        if self.recompute and torch.is_grad_enabled():
            # No random state to preserve, since drop path is an argument.
            return checkpoint(self._add, x, bias, scales, use_reentrant=False, preserve_rng_state=False)
        return self._add(x, bias, scales)

    def first_query(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the first token's attention; see :meth:`Attention.first_query`."""
        return self.attn.first_query(self.norm1(x), bias)

    def _add(self, x: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
        """Add both branches to the residual stream."""
        attended = self.ls1(self.attn(self.norm1(x), bias))
        x = x + (attended if scales is None else attended * scales[:, 0, None, None])
        mixed = self.ls2(self.mlp(self.norm2(x)))
        return x + (mixed if scales is None else mixed * scales[:, 1, None, None])


class Encoder(nn.Module):
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

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes, the position is unknown, or the class tokens do not fit it.
    """

    cls_token: nn.Parameter
    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        if position not in get_args(Position):
            raise ValueError(f"position: expected {' or '.join(map(repr, get_args(Position)))}, got {position!r}")
        self._has_table = position in ("absolute", "raster", "learned")
        if class_tokens != 1 and not self._has_table:
            raise ValueError(f"class_tokens: expected 1 for position {position!r}, got {class_tokens}")
        self.position = position
        self.class_tokens = class_tokens
        self.patch_embed = PatchEmbed(dim, channels, patch_size)
        if class_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, class_tokens, dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self._grid_shape = tuple(grid_shape)
        if position == "relative":
            self.rel_pos_bias = RelativePositionBias(grid_shape, num_heads)
        elif self._has_table:
            add_table(self, grid_shape, dim, class_tokens, is_learned=learned_positions or position == "learned")
        self.reset_parameters()
        rows = num_bias_rows(Grid(self._grid_shape)) if position == "relative_per_block" else None
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, layer_scale=layer_scale, recompute=recompute, table_rows=rows) for _ in range(depth)
        )
        self.norm = LayerNorm(dim) if final_norm else nn.Identity()

    def reset_parameters(self) -> None:
        """Redraw class tokens; reset the mask token and the position table.

        Submodules are not changed; each has its own ``reset_parameters``.
        """
        if self.class_tokens:
            nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.zeros_(self.mask_token)
        if self._has_table:
            reset_table(self.pos_embed, self._grid_shape, self.class_tokens, self.position)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.patch_embed.proj.bias.dtype

    def forward(self, patches: Tensor, index: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
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
        Tensor
            (batch, C + length, dim), class tokens first.
        """
        return self.encode(self.place(self.patch_embed(patches), index), index, scales)

    def place(self, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Add the position table, if any, at ``index`` to tokens ([batch,] length, dim)."""
        if not self._has_table:
            return tokens
        table = self.pos_embed[0, self.class_tokens :]
        return tokens + (table if index is None else F.embedding(index, table))

    def encode(self, tokens: Tensor, index: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
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
        Tensor
            (batch, C + length, dim), class tokens first.
        """
        x, bias = self._start(tokens, index)
        for number, block in enumerate(self.blocks):
            x = block(x, bias, None if scales is None else scales[:, number])
        return self.norm(x)

    def hidden_states(self, tokens: Tensor, index: Tensor | None = None, scales: Tensor | None = None) -> list[Tensor]:
        """Run the blocks on embedded and placed tokens; arguments as for :meth:`encode`.

        Returns
        -------
        list of Tensor
            (batch, C + length, dim) each, class tokens first, before the final norm: item 0 is the input of the first
            block, item k the output of block k, counted from 1.
        """
        x, bias = self._start(tokens, index)
        states = [x]
        for number, block in enumerate(self.blocks):
            x = block(x, bias, None if scales is None else scales[:, number])
            states.append(x)
        return states

    def cls_attention(self, tokens: Tensor) -> Tensor:
        """Return the attention of the class token to all N patches in the last block.

        Parameters
        ----------
        tokens
            (batch, N, dim): all tokens, embedded and placed, in raster order.

        Returns
        -------
        Tensor
            (batch, heads, N).
        """
        x, bias = self._start(tokens, None)
        for block in self.blocks[:-1]:
            x = block(x, bias)
        return cast(Block, self.blocks[-1]).first_query(x, bias)[:, :, -tokens.shape[1] :]

    def _start(self, tokens: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the first block's input with class tokens, and the blocks' ``bias``."""
        # The residual stream has the precision of the parameters. Under autocast, tokens may have a lower one.
        x = tokens.to(self.dtype)
        if self.class_tokens:
            cls_token = self.cls_token + self.pos_embed[:, : self.class_tokens] if self._has_table else self.cls_token
            x = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), x], dim=1)
        if self.position == "relative_per_block":
            return x, bias_rows(Grid(self._grid_shape), index, x.device)
        return x, None if self._has_table else self.rel_pos_bias(index)


class Decoder(nn.Module):
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

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.
    """

    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        self.position = position
        self.class_tokens = class_tokens
        self.embed = Linear(encoder_dim, dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self._grid_shape = tuple(grid_shape)
        add_table(self, grid_shape, dim, class_tokens, is_learned=position == "learned")
        self.reset_parameters()
        self.blocks = nn.ModuleList(Block(dim, num_heads, recompute=recompute) for _ in range(depth))
        self.norm = LayerNorm(dim)
        if output_dim is not None:
            self.pred = Linear(dim, output_dim)

    def reset_parameters(self) -> None:
        """Redraw the mask token, reset the position table; submodules are not changed."""
        nn.init.normal_(self.mask_token, std=0.02)
        reset_table(self.pos_embed, self._grid_shape, self.class_tokens, self.position)

    def forward(self, encoded: Tensor, index: Tensor) -> Tensor:
        """Decode; the caller applies the prediction head ``pred`` where needed.

        Parameters
        ----------
        encoded
            (batch, C + V, encoder_dim), class tokens first.
        index
            int (batch, V + M): the visible tokens, in the order of ``encoded``, then the tokens to decode.

        Returns
        -------
        Tensor
            (batch, V + M, dim): normalized features of the tokens at ``index``, without the class tokens.
        """
        num_class = self.class_tokens
        places = F.embedding(index, self.pos_embed[0, num_class:])
        seen = self.embed(encoded)  # batch, C + V, dim
        num_visible = seen.shape[1] - num_class
        x = torch.cat(
            [
                seen[:, :num_class] + self.pos_embed[:, :num_class],
                seen[:, num_class:] + places[:, :num_visible],
                self.mask_token + places[:, num_visible:],
            ],
            dim=1,
        )
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, num_class:])

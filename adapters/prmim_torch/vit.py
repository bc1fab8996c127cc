"""The parts of a vision transformer: patch embedding, position table, attention, blocks, encoder, decoder.

Parameter names follow timm's ViT. Initialisation is MAE's. Nothing here knows about masking strategies: the encoder and
the decoder take tokens and the indices of their places.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prmim_core import Grid, num_offsets, offset_index

Position = Literal["absolute", "relative"]

LAYER_NORM_EPS = 1e-6

# Whether PyTorch has, beside the library that multiplies its float32 matrices, one that knows this CPU better.
ONEDNN: bool = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"  # type: ignore[no-untyped-call]
SMALL_PRODUCT = 2**22
"""Multiply-accumulates below which a convolution's preparations cost more than it saves."""
SHORT_SEQUENCE = 256
"""Most tokens for which plain products of bfloat16 on a CPU beat the fused kernel; at 577 it is the other way round."""


def sincos_table(shape: Sequence[int], dim: int) -> Tensor:
    """Return the fixed sine-cosine position table of a grid of tokens, with a row of zeros first for the cls token.

    Parameters
    ----------
    shape
        Tokens along each axis; tokens are numbered in raster order.
    dim
        Channels; a multiple of twice the number of axes.

    Returns
    -------
    Tensor
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
    torch.Size([1, 7, 4])
    >>> table[0, 2]  # row 0, column 1
    tensor([0.8415, 0.5403, 0.0000, 1.0000])
    """
    axes = len(shape)
    if dim < 1 or dim % (2 * axes):
        raise ValueError(f"dim: expected a positive multiple of {2 * axes} for a grid of {axes} axes, got {dim}")
    width = dim // axes
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    indices = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    angles = [index.reshape(-1, 1) * omega for index in reversed(indices)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float()[None]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x @ weight.T + bias``, as ``torch.nn.functional.linear`` does.

    On CPUs with AVX-512 a large product of float32 values goes as a convolution of kernel size 1, which is the same
    sum: PyTorch's matrix products are those of MKL, which uses AVX-512 on Intel's CPUs alone, and its convolutions
    those of oneDNN, which uses it on all. Nothing is copied for that, since channels may come last.
    """
    is_large = x.ndim == 3 and x.numel() * len(weight) >= SMALL_PRODUCT
    is_wide = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # PyTorch's own rule for which convolutions of size 1 go to oneDNN.
    is_taken = len(x) >= 16 or _num_threads() > 1
    if ONEDNN and x.device.type == "cpu" and is_large and is_wide and is_taken:
        return F.conv2d(x.mT.unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).mT
    return F.linear(x, weight, bias)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` does; (..., length, head_dim) all of them.

    Of short sequences of bfloat16 values on a CPU by plain products, computed anew in the backward pass, so that as
    little is kept for it: PyTorch's fused kernel takes up to ten times as long backward.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > SHORT_SEQUENCE:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if not torch.is_grad_enabled():
        return _attend_plainly(q, k, v, bias)
    out: Tensor = checkpoint(_attend_plainly, q, k, v, bias, use_reentrant=False, preserve_rng_state=False)
    return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT
    mixed: Tensor = (scores if bias is None else scores + bias).softmax(-1) @ v
    return mixed


class Linear(nn.Linear):
    """``nn.Linear`` with MAE's initialisation: Xavier-uniform weight (a fused qkv matrix counts as one), zero bias."""

    def reset_parameters(self) -> None:
        """Draw the weight anew from torch's random state."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis with eps 1e-6."""

    def __init__(self, dim: int, *, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS, elementwise_affine=elementwise_affine)


class PatchProjection(nn.Module):
    """The weights of a patch convolution, stored as one, applied to patches that are already cut out.

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
    The weight is stored as a convolution's, channels before pixels, so that files match other ViTs. Patches hold their
    channels last; the small weight is permuted to fit, never the data.
    """

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight Xavier-uniform as a matrix; the bias as convolutions do, uniform within 1/sqrt(fan in)."""
        nn.init.xavier_uniform_(self.weight.view(self.weight.shape[0], -1))
        bound = 1 / sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (..., prod(patch) * C) to (..., D)."""
        return linear(patches, self.weight.movedim(1, -1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection under the name that ViT files use, ``patch_embed.proj``."""

    def __init__(self, dim: int, channels: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.proj = PatchProjection(dim, channels, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (batch, length, prod(patch) * C) to (batch, length, dim)."""
        embedded: Tensor = self.proj(patches)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection; scale 1/sqrt(head_dim).

    Notes
    -----
    The queries', keys' and values' biases are one parameter. Models that have none for the keys (BEiT, SimMIM) are the
    same function: a key's bias adds one number to all scores of a query, which the softmax ignores: its gradient is 0.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape; ``bias`` ([batch,] heads, length, length) goes to the scores."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # batch, length, 3, heads, head_dim
        # Taken apart before heads and tokens change places: the gradients are then put together in one copy, not two.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = attend(q, k, v, None if bias is None else bias.to(q.dtype))  # batch, heads, length, head_dim
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


def offset_code(grid: Grid) -> Tensor:
    """Give each token a number, int64 (N,), whose differences number the offsets from the middle of all of them.

    The number of an offset is linear in both positions, so one subtraction per pair of tokens finds it.
    """
    tokens = torch.arange(grid.num_tokens)[None]
    code: Tensor = offset_index(grid, tokens, tokens[:, :1])[0, :, 0] - num_offsets(grid) // 2
    return code


class RelativePositionBias(nn.Module):
    """What is added to attention scores for the offset between two tokens: one learned number per offset and head.

    Parameters
    ----------
    grid_shape
        Tokens of a whole image along each axis; N in all.
    num_heads
        Attention heads.

    Notes
    -----
    The table has a row per offset, position of the query minus that of the key, in raster order; then three for pairs
    with the cls token: it looks at a token, a token looks at it, it looks at itself. As in BEiT and SimMIM; zeros at
    first.
    """

    _code: Tensor

    def __init__(self, grid_shape: Sequence[int], num_heads: int) -> None:
        super().__init__()
        grid = Grid(tuple(grid_shape))
        self._num_offsets = num_offsets(grid)
        self.register_buffer("_code", offset_code(grid), persistent=False)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self._num_offsets + 3, num_heads))

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Look up the bias of all pairs of cls and tokens.

        Parameters
        ----------
        index
            int (batch, length): the tokens; None: all N of them, in raster order.

        Returns
        -------
        Tensor
            (batch, heads, 1 + length, 1 + length), queries before keys, the cls token first; without batch for None.
        """
        code = self._code if index is None else self._code[index]
        row = code[..., :, None] - code[..., None, :] + self._num_offsets // 2
        # The cls token's row and column: constants on the border of the table of pairs.
        row = F.pad(row, (0, 0, 1, 0), value=self._num_offsets)
        row = F.pad(row, (1, 0, 0, 0), value=self._num_offsets + 1)
        row[..., 0, 0] = self._num_offsets + 2
        return F.embedding(row, self.relative_position_bias_table).movedim(-1, -3)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel, ``value`` at first."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

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
        First value of the factors on what the two branches add; None: no such factors.
    recompute
        Whether the backward pass computes anew what it needs of the block, from its input, which alone is kept.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        *,
        layer_scale: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
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
            ([batch,] heads, length, length), added to the attention scores.
        scales
            (batch, 2): what each image's attention and MLP branch is multiplied with (drop path).

        Returns
        -------
        Tensor
            (batch, length, dim).
        """
        if self.recompute and torch.is_grad_enabled():
            # Nothing in it is random: what drop path skips is an argument.
            out: Tensor = checkpoint(self._add, x, bias, scales, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._add(x, bias, scales)

    def _add(self, x: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
        """Add what the two branches make of the residual stream to it."""
        attended = self.ls1(self.attn(self.norm1(x), bias))
        x = x + (attended if scales is None else attended * scales[:, 0, None, None])
        mixed = self.ls2(self.mlp(self.norm2(x)))
        out: Tensor = x + (mixed if scales is None else mixed * scales[:, 1, None, None])
        return out


def check_width(name: str, dim: int, num_heads: int, axes: int | None) -> None:
    """Raise ValueError unless ``dim`` can be shared out among heads, and (unless None) among the axes of the grid."""
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"{name}: expected a positive multiple of the number of heads, got {dim} for {num_heads}")
    if axes is not None and dim % (2 * axes):
        raise ValueError(f"{name}: expected a multiple of {2 * axes} for a grid of {axes} axes, got {dim}")


class Encoder(nn.Module):
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
        ``"absolute"``: a fixed sine-cosine table added to the tokens; ``"relative"``: a learned bias on the attention
        scores, shared by the blocks.
    layer_scale, recompute
        See :class:`Block`.

    Raises
    ------
    ValueError
        If ``dim`` does not fit the heads or the axes, or the position is not known.
    """

    pos_embed: Tensor
    mask_token: nn.Parameter  # of methods whose encoder sees masked tokens; they add it

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
    ) -> None:
        super().__init__()
        if position not in get_args(Position):
            raise ValueError(f"position: expected 'absolute' or 'relative', got {position!r}")
        self.position = position
        check_width("embed_dim", dim, num_heads, len(grid_shape) if position == "absolute" else None)
        self.patch_embed = PatchEmbed(dim, channels, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        if position == "absolute":
            self.register_buffer("pos_embed", sincos_table(grid_shape, dim))
        else:
            self.rel_pos_bias = RelativePositionBias(grid_shape, num_heads)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, layer_scale=layer_scale, recompute=recompute) for _ in range(depth)
        )
        self.norm = LayerNorm(dim)

    def forward(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """Encode patches.

        Parameters
        ----------
        patches
            (batch, length, prod(patch) * C), normalised pixels.
        index
            int (batch, length): the token that each patch is; None: the patches are all N of them, in raster order.

        Returns
        -------
        Tensor
            (batch, 1 + length, dim), the cls token first, the final norm applied.
        """
        return self.encode(self.place(self.patch_embed(patches), index), index)

    def place(self, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Add to embedded tokens ([batch,] length, dim) the absolute positions of ``index``, if the encoder has any."""
        if self.position == "relative":
            return tokens
        table = self.pos_embed[0, 1:]
        return tokens + (table if index is None else F.embedding(index, table))

    def encode(self, tokens: Tensor, index: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
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
        Tensor
            (batch, 1 + length, dim), the cls token first.
        """
        encoded: Tensor = self.norm(self.hidden_states(tokens, index, scales, last=1)[0])
        return encoded

    def hidden_states(
        self, tokens: Tensor, index: Tensor | None = None, scales: Tensor | None = None, *, last: int | None = None
    ) -> list[Tensor]:
        """Run the blocks on tokens that are embedded and placed; see :meth:`encode` for the arguments.

        Parameters
        ----------
        last
            How many blocks, counted from the last one, to return the outputs of; None: all.

        Returns
        -------
        list of Tensor
            Outputs (batch, 1 + length, dim) of blocks, the cls token first, before the final norm.
        """
        cls_token: Tensor = self.cls_token
        bias: Tensor | None = None
        if self.position == "absolute":
            cls_token = cls_token + self.pos_embed[:, :1]
        else:
            bias = self.rel_pos_bias(index)
        # The residual stream is as wide as the parameters, whatever autocast made of the patches.
        x = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens.to(cls_token.dtype)], dim=1)
        first = 0 if last is None else len(self.blocks) - last
        states = []
        for number, block in enumerate(self.blocks):
            x = block(x, bias, None if scales is None else scales[:, number])
            if number >= first:
                states.append(x)
        return states


class Decoder(nn.Module):
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

    Raises
    ------
    ValueError
        If ``dim`` does not fit the heads or the axes.
    """

    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        check_width("decoder_dim", dim, num_heads, len(grid_shape))
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos_table(grid_shape, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, recompute=recompute) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, output_dim)

    def forward(self, encoded: Tensor, index: Tensor) -> Tensor:
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
        Tensor
            (batch, V + M, dim): the features of the tokens at ``index``, the final norm applied, without cls.
        """
        places = F.embedding(index, self.pos_embed[0, 1:])
        seen = self.embed(encoded)  # batch, 1 + V, dim
        num_visible = seen.shape[1] - 1
        x = torch.cat(
            [
                seen[:, :1] + self.pos_embed[:, :1],
                seen[:, 1:] + places[:, :num_visible],
                self.mask_token + places[:, num_visible:],
            ],
            dim=1,
        )
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x[:, 1:])
        return features

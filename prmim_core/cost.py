"""What a configuration costs, by formula: multiply-accumulates, and the bytes of activations in memory.

One multiply-accumulate (MAC) is one unit, as the papers count "FLOPs"; a forward and backward pass is three times the
forward pass. Biases, norms, softmax and GELU are not counted, as usual.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

from prmim_core.schedule import Schedule

Variant = Literal["kernel", "interpolate", "conv", "none"]
Bookkeeping = Literal["prmim", "official"]
Attention = Literal["fused", "explicit"]


@dataclass(frozen=True)
class Transformer:
    """The size of a stack of transformer blocks.

    Parameters
    ----------
    dim
        Width.
    depth
        Number of blocks.
    heads
        Attention heads.
    mlp_ratio
        Width of the hidden layer over ``dim``.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: int = 4

    def macs(self, length: int) -> int:
        """Count the MACs of all blocks on a sequence: depth * ((4 + 2 mlp_ratio) n d**2 + 2 n**2 d)."""
        linear = (4 + 2 * self.mlp_ratio) * length * self.dim**2
        attention = 2 * length**2 * self.dim
        return self.depth * (linear + attention)

    def activation_bytes(self, length: int, *, compute_bytes: int, attention: Attention) -> int:
        """Count the bytes that all blocks save for the backward pass, the residual stream being float32.

        Per token and block: the two norm inputs in float32 with two statistics each; the inputs of the four linear
        layers and of GELU, and q, k, v. Fused attention adds one float32 per head and token, explicit attention its n *
        n softmax, in float32 and, where that differs, in the compute type.
        """
        norms = 2 * length * (4 * self.dim + 2 * 4)
        linear = (1 + 3 + 1 + 1 + 2 * self.mlp_ratio) * length * self.dim * compute_bytes
        softmax_bytes = 4 if compute_bytes == 4 else 4 + compute_bytes
        scores = self.heads * length * (4 if attention == "fused" else length * softmax_bytes)
        return self.depth * (norms + linear + scores)


VIT_SIZES = {
    "vit_tiny": Transformer(192, 12, 3),
    "vit_small": Transformer(384, 12, 6),
    "vit_base": Transformer(768, 12, 12),
    "vit_large": Transformer(1024, 24, 16),
    "vit_huge": Transformer(1280, 32, 16),
}
"""The vision transformers that have a name."""


def vit_size(
    model: str, embed_dim: int | None = None, depth: int | None = None, num_heads: int | None = None
) -> Transformer:
    """Return the size of a vision transformer: a named one, of which parts may be replaced.

    Parameters
    ----------
    model
        A key of :data:`VIT_SIZES`.
    embed_dim, depth, num_heads
        In place of the named width, number of blocks and heads; None keeps those.

    Raises
    ------
    ValueError
        If the name is not known.

    Examples
    --------
    >>> vit_size("vit_base", depth=6)
    Transformer(dim=768, depth=6, heads=12, mlp_ratio=4)
    """
    if model not in VIT_SIZES:
        raise ValueError(f"model: expected one of {', '.join(VIT_SIZES)}, got {model!r}")
    changes = {"dim": embed_dim, "depth": depth, "heads": num_heads}
    return replace(VIT_SIZES[model], **{name: size for name, size in changes.items() if size is not None})


@dataclass(frozen=True)
class PartCost:
    """The cost of one part of a model, per image.

    Parameters
    ----------
    macs
        Forward multiply-accumulates.
    activation_bytes
        Bytes saved for the backward pass.
    recomputed_bytes
        Bytes that the backward pass makes anew and holds at a time: those of one block, where blocks are recomputed.
    """

    macs: int
    activation_bytes: int
    recomputed_bytes: int = 0

    def times(self, number: int) -> "PartCost":
        """Return the cost of so many of these, of which one at a time is recomputed."""
        return replace(self, macs=number * self.macs, activation_bytes=number * self.activation_bytes)


@dataclass(frozen=True)
class CostReport:
    """The cost of a model, per image and part.

    Parameters
    ----------
    parts
        Costs by the name of the part, in the order of the forward pass.
    """

    parts: Mapping[str, PartCost]

    @property
    def macs(self) -> int:
        """Forward multiply-accumulates of all parts."""
        return sum(part.macs for part in self.parts.values())

    @property
    def activation_bytes(self) -> int:
        """Bytes that all parts save for the backward pass."""
        return sum(part.activation_bytes for part in self.parts.values())

    @property
    def peak_activation_bytes(self) -> int:
        """Most bytes of activations at a time: those that parts have saved, and what one of them recomputes.

        The backward pass goes from the last part to the first, and drops what a part has saved when it is through.
        """
        saved = accumulate(part.activation_bytes for part in self.parts.values())
        return max(kept + part.recomputed_bytes for kept, part in zip(saved, self.parts.values(), strict=True))


def cost(
    schedule: Schedule,
    *,
    patch_dim: int,
    encoder: Transformer,
    decoder: Transformer,
    variant: Variant = "kernel",
    heads: int = 4,
    repeats: int = 3,
    bookkeeping: Bookkeeping = "prmim",
    attention: Attention = "fused",
    recompute_blocks: bool = False,
    compute_bytes: int = 4,
) -> CostReport:
    """Return the cost of an MAE, dense or with thrown tokens, per image.

    Parameters
    ----------
    schedule
        The counts and stages. Nothing thrown is the dense MAE.
    patch_dim
        Values in a patch, P.
    encoder, decoder
        Sizes of the two transformers, both with a cls token.
    variant
        How thrown tokens are rebuilt; ``"none"``: not at all, plain partial reconstruction.
    heads
        Groups of channels with weights of their own, of ``"kernel"``.
    repeats
        Repetitions per stage, of ``"conv"``.
    bookkeeping
        ``"prmim"``: visible patches are embedded and supervised tokens predicted, as our models do. ``"official"``: all
        patches are embedded and every decoder token, cls too, is predicted, as the official MAE does; thrown tokens
        cost nothing then.
    attention
        ``"fused"`` keeps no n * n matrix, ``"explicit"`` does.
    recompute_blocks
        Whether of a block only its input is saved, and the rest computed anew in the backward pass.
    compute_bytes
        Bytes per value in matrix products: 4 for float32, 2 for bfloat16 autocast.

    Returns
    -------
    CostReport
        With the parts patch_embed, encoder, decoder_embed, decoder, stages and head.

    Raises
    ------
    ValueError
        If a name is not known.

    Examples
    --------
    >>> from prmim_core import Grid, Schedule, count_tokens
    >>> vit_base, decoder = Transformer(768, 12, 12), Transformer(512, 8, 16)
    >>> dense = Schedule(Grid((14, 14)), count_tokens(196, 0.75))
    >>> prmim = Schedule(Grid((14, 14)), count_tokens(196, 0.75, 0.5))
    >>> official = cost(dense, patch_dim=768, encoder=vit_base, decoder=decoder, bookkeeping="official").macs
    >>> ours = cost(prmim, patch_dim=768, encoder=vit_base, decoder=decoder).macs
    >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
    (9.781, 6.977, 0.287)
    """
    _check(variant, bookkeeping, attention)
    counts = schedule.counts
    encoded, decoded = counts.visible + 1, counts.visible + counts.decoded + 1  # with cls
    if bookkeeping == "official":
        embedded, predicted, variant = counts.num_tokens, decoded, "none"
    else:
        embedded = counts.visible
        predicted = counts.decoded if variant == "none" else counts.masked
    return CostReport(
        {
            "patch_embed": _linear(embedded, patch_dim, encoder.dim, compute_bytes),
            "encoder": _blocks(encoder, encoded, compute_bytes, attention, recompute_blocks),
            "decoder_embed": _linear(encoded, encoder.dim, decoder.dim, compute_bytes),
            "decoder": _blocks(decoder, decoded, compute_bytes, attention, recompute_blocks),
            "stages": _stages(schedule, decoder.dim, variant, heads, repeats, compute_bytes),
            "head": _head(predicted, decoder.dim, patch_dim, compute_bytes),
        }
    )


def simmim_cost(
    schedule: Schedule,
    *,
    patch_dim: int,
    encoder: Transformer,
    variant: Variant = "kernel",
    heads: int = 4,
    repeats: int = 3,
    layer_scale: bool = True,
    relative_position: bool = True,
    bookkeeping: Bookkeeping = "prmim",
    attention: Attention = "fused",
    recompute_blocks: bool = False,
    compute_bytes: int = 4,
) -> CostReport:
    """Return the cost of SimMIM, dense or with thrown tokens, per image.

    Parameters
    ----------
    schedule
        The counts and stages. Nothing thrown is the dense SimMIM.
    patch_dim
        Values in a patch, P.
    encoder
        Size of the transformer, with a cls token; it sees visible and decoded tokens.
    variant, heads, repeats
        As in :func:`cost`; the stages work on the encoder's output.
    layer_scale
        Whether the branches of a block are scaled per channel, which keeps their outputs for the backward pass.
    relative_position
        Whether a bias is added to the scores of attention. It is gathered once for all blocks, for each image where
        tokens are thrown.
    bookkeeping
        ``"prmim"``: visible patches are embedded and supervised tokens predicted, as our models do. ``"official"``: all
        patches are embedded and every token of the encoder but cls is predicted, as the official SimMIM does; thrown
        tokens cost nothing then.
    attention, recompute_blocks, compute_bytes
        As in :func:`cost`.

    Returns
    -------
    CostReport
        With the parts patch_embed, encoder, stages and head.

    Raises
    ------
    ValueError
        If a name is not known.

    Examples
    --------
    >>> from prmim_core import Grid, Schedule, count_tokens
    >>> sizes = {"patch_dim": 768, "encoder": Transformer(768, 12, 12)}
    >>> dense = Schedule(Grid((14, 14)), count_tokens(196, 0.6, mask_unit=4))
    >>> prmim = Schedule(Grid((14, 14)), count_tokens(196, 0.6, 0.25, mask_unit=4))
    >>> official, ours = simmim_cost(dense, bookkeeping="official", **sizes).macs, simmim_cost(prmim, **sizes).macs
    >>> round(official / 1e9, 3), round(ours / 1e9, 3), round(1 - ours / official, 3)
    (17.679, 13.096, 0.259)
    """
    _check(variant, bookkeeping, attention)
    counts = schedule.counts
    encoded = counts.visible + counts.decoded
    if bookkeeping == "official":
        embedded, predicted, variant = counts.num_tokens, encoded, "none"
    else:
        embedded = counts.visible
        predicted = counts.decoded if variant == "none" else counts.masked
    length = encoded + 1  # with cls
    scaled_bytes = layer_scale * 2 * length * encoder.dim * compute_bytes
    blocks = _blocks(encoder, length, compute_bytes, attention, recompute_blocks, more_bytes=scaled_bytes)
    # The bias of every head, and one 8-byte place in the table per pair of tokens; where all tokens are there, the
    # images of a batch share one.
    has_bias = relative_position and counts.thrown > 0
    bias_bytes = has_bias * length**2 * (encoder.heads * compute_bytes + 8)
    return CostReport(
        {
            "patch_embed": _linear(embedded, patch_dim, encoder.dim, compute_bytes),
            "encoder": replace(blocks, activation_bytes=blocks.activation_bytes + bias_bytes),
            "stages": _stages(schedule, encoder.dim, variant, heads, repeats, compute_bytes),
            "head": _head(predicted, encoder.dim, patch_dim, compute_bytes),
        }
    )


def maskalign_cost(
    schedule: Schedule,
    *,
    patch_dim: int,
    encoder: Transformer,
    teacher: Transformer,
    teacher_patch_dim: int,
    teacher_tokens: int,
    layers: int = 5,
    variant: Variant = "kernel",
    heads: int = 4,
    repeats: int = 3,
    bookkeeping: Bookkeeping = "prmim",
    attention: Attention = "fused",
    recompute_blocks: bool = False,
    compute_bytes: int = 4,
) -> CostReport:
    """Return the cost of MaskAlign, plain or with thrown tokens aligned too, per image.

    Parameters
    ----------
    schedule
        The counts and stages; MaskAlign throws all masked tokens.
    patch_dim
        Values in a patch of the student, P.
    encoder
        Size of the student, with a cls token; it sees visible tokens only.
    teacher
        Size of the teacher, with a cls token; it sees all tokens. Nothing of it is kept for a backward pass.
    teacher_patch_dim
        Values in a patch of the teacher.
    teacher_tokens
        Patches that the teacher cuts an image into, cls not counted.
    layers
        How many layers of the teacher are aligned, k.
    variant, heads, repeats
        As in :func:`cost`; the stages work on the mixed features of each aligned layer. ``"none"``: only cls and
        visible tokens are aligned, plain MaskAlign.
    bookkeeping
        ``"prmim"``: visible patches are embedded, and there are mixed features and a head for each aligned layer.
        ``"official"``: all patches are embedded and every layer of the teacher has a head, as in the official
        MaskAlign; mixing and thrown tokens cost nothing then.
    attention, recompute_blocks, compute_bytes
        As in :func:`cost`.

    Returns
    -------
    CostReport
        With the parts patch_embed, encoder, fusion, stages, heads and teacher.

    Raises
    ------
    ValueError
        If a name is not known, or there are not that many layers.

    Examples
    --------
    >>> from prmim_core import Grid, Schedule, count_tokens
    >>> sizes = {"patch_dim": 768, "encoder": Transformer(768, 12, 12), "teacher": Transformer(768, 12, 12),
    ...          "teacher_patch_dim": 768, "teacher_tokens": 196}
    >>> schedule = Schedule(Grid((14, 14)), count_tokens(196, 0.7, 1))
    >>> plain, ours = maskalign_cost(schedule, bookkeeping="official", **sizes), maskalign_cost(schedule, **sizes)
    >>> teacher = plain.parts["teacher"].macs
    >>> [round(macs / 1e9, 3) for macs in (teacher, plain.macs - teacher, ours.macs - teacher)]
    [17.563, 5.609, 5.742]
    """
    _check(variant, bookkeeping, attention)
    if not 1 <= layers <= teacher.depth:
        raise ValueError(f"layers: expected 1 to the {teacher.depth} of the teacher, got {layers}")
    counts = schedule.counts
    length = counts.visible + 1  # with cls
    if bookkeeping == "official":
        embedded, fused, predicted, variant = counts.num_tokens, 0, teacher.depth, "none"
    else:
        embedded, fused, predicted = counts.visible, layers, layers
    aligned = length if variant == "none" else length + counts.thrown
    stages = _stages(schedule, encoder.dim, variant, heads, repeats, compute_bytes)
    head = _head(aligned, encoder.dim, teacher.dim, compute_bytes)
    # The outputs of all blocks, stacked in float32.
    stack_bytes = encoder.depth * length * encoder.dim * 4 if fused else 0
    return CostReport(
        {
            "patch_embed": _linear(embedded, patch_dim, encoder.dim, compute_bytes),
            "encoder": _blocks(encoder, length, compute_bytes, attention, recompute_blocks, final_norm=False),
            "fusion": PartCost(fused * encoder.depth * length * encoder.dim, stack_bytes),
            "stages": stages.times(fused),
            "heads": head.times(predicted),
            "teacher": PartCost(
                teacher_tokens * teacher_patch_dim * teacher.dim + teacher.macs(teacher_tokens + 1),
                0,
            ),
        }
    )


def _check(variant: str, bookkeeping: str, attention: str) -> None:
    for name, value, allowed in (
        ("variant", variant, get_args(Variant)),
        ("bookkeeping", bookkeeping, get_args(Bookkeeping)),
        ("attention", attention, get_args(Attention)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _blocks(
    size: Transformer,
    length: int,
    compute_bytes: int,
    attention: Attention,
    recompute_blocks: bool,
    *,
    final_norm: bool = True,
    more_bytes: int = 0,
) -> PartCost:
    """Count blocks and the norm behind them; ``more_bytes``: what a block saves beyond the usual."""
    inside = size.activation_bytes(length, compute_bytes=compute_bytes, attention=attention)
    inside += size.depth * more_bytes
    norm = final_norm * length * (4 * size.dim + 2 * 4)
    if not recompute_blocks:
        return PartCost(size.macs(length), inside + norm)
    # The residual stream in front of each block.
    return PartCost(size.macs(length), size.depth * length * size.dim * 4 + norm, inside // size.depth)


def _linear(length: int, inputs: int, outputs: int, compute_bytes: int) -> PartCost:
    return PartCost(length * inputs * outputs, length * inputs * compute_bytes)


def _head(length: int, inputs: int, outputs: int, compute_bytes: int) -> PartCost:
    """Count a linear layer and its loss, which keeps the float32 error."""
    prediction = _linear(length, inputs, outputs, compute_bytes)
    return PartCost(prediction.macs, prediction.activation_bytes + length * outputs * 4)


def _stages(schedule: Schedule, dim: int, variant: Variant, heads: int, repeats: int, compute_bytes: int) -> PartCost:
    macs = saved = 0
    for stage, size in enumerate(schedule.stage_sizes, start=1):
        if variant == "none" or not size:
            continue
        known = schedule.num_known(stage)
        norm = size * (4 * dim + 2 * 4)
        if variant == "conv":
            grid = schedule.grid
            # A map of the features and, for their number, one of a single channel.
            macs += repeats * 3**grid.axes * grid.num_tokens * (dim + 1)
            saved += repeats * 2 * grid.num_tokens * dim * compute_bytes + norm
        else:
            weights = size * known * (heads if variant == "kernel" else 1)
            macs += size * known * dim
            # And, where the weights are learned, one 8-byte place in the table per pair of tokens.
            places = (variant == "kernel") * size * known * 8
            saved += weights * compute_bytes + places + known * dim * compute_bytes + norm
    return PartCost(macs, saved)

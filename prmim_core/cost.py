"""What a configuration costs, by formula: multiply-accumulates and bytes saved for the backward pass.

One multiply-accumulate (MAC) is one unit, as the papers count "FLOPs"; a forward and backward pass is three times the
forward pass. Biases, norms, softmax and GELU are not counted, as usual.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """

    macs: int
    activation_bytes: int


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
    for name, value, allowed in (
        ("variant", variant, get_args(Variant)),
        ("bookkeeping", bookkeeping, get_args(Bookkeeping)),
        ("attention", attention, get_args(Attention)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    counts = schedule.counts
    encoded, decoded = counts.visible + 1, counts.visible + counts.decoded + 1  # with cls
    if bookkeeping == "official":
        embedded, predicted, variant = counts.num_tokens, decoded, "none"
    else:
        embedded = counts.visible
        predicted = counts.decoded if variant == "none" else counts.masked

    def blocks(size: Transformer, length: int) -> PartCost:
        final_norm = length * (4 * size.dim + 2 * 4)
        saved = size.activation_bytes(length, compute_bytes=compute_bytes, attention=attention)
        return PartCost(size.macs(length), saved + final_norm)

    def linear(length: int, inputs: int, outputs: int) -> PartCost:
        return PartCost(length * inputs * outputs, length * inputs * compute_bytes)

    prediction = linear(predicted, decoder.dim, patch_dim)
    loss_bytes = predicted * patch_dim * 4  # the float32 error
    return CostReport(
        {
            "patch_embed": linear(embedded, patch_dim, encoder.dim),
            "encoder": blocks(encoder, encoded),
            "decoder_embed": linear(encoded, encoder.dim, decoder.dim),
            "decoder": blocks(decoder, decoded),
            "stages": _stages(schedule, decoder.dim, variant, heads, repeats, compute_bytes),
            "head": PartCost(prediction.macs, prediction.activation_bytes + loss_bytes),
        }
    )


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
            saved += weights * compute_bytes + known * dim * compute_bytes + norm
    return PartCost(macs, saved)

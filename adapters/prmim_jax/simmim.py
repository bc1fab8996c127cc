"""SimMIM: mask tokens in the encoder, one linear layer behind it; dense, partial or progressive reconstruction."""

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from prmim_core import CostReport, Plan, block_visible, drop_path_scales, simmim_cost, take_tokens
from prmim_core.options import (
    check_counts,
    check_fraction,
    check_schedule,
    check_thrown_weight,
    check_unit,
    check_variant,
)
from prmim_jax.method import PixelMethod, PixelOutput, initial_rngs
from prmim_jax.plan import make_plan
from prmim_jax.vit import BLOCK, Block, Encoder, Linear, PatchProjection, draw, uniform

LOSS_EPS = 1e-5


class SimMIM(PixelMethod):
    """SimMIM whose encoder sees only part of the masked tokens; the rest is rebuilt progressively.

    The encoder sees the visible patches and a mask token for each decoded one. Features of the thrown tokens come from
    :class:`prmim_jax.ProgressiveReconstruction` on the encoder's output. One linear layer predicts the pixels of all
    masked tokens.

    Parameters
    ----------
    model
        Name of the encoder: ``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_huge``.
    image_size, patch_size
        Pixels along each of one to three axes; the patch divides the image.
    channels
        Channels of the image.
    mask_ratio
        Fraction of the units that is masked, in [0, 1); None: 0.6.
    throw_ratio
        Fraction of **all** tokens (or units, see ``throw_by``) that is thrown, in [0, 1), at most ``mask_ratio``; None:
        0.25. 0 is plain SimMIM.
    throwing
        What is thrown: ``"furthest"``, ``"random"`` or ``"cell"`` (see ``prmim_core.Schedule``), or ``"none"``, which
        sets ``throw_ratio`` to 0.
    seed
        Start of furthest sampling, ``"visible"`` or ``"none"``.
    stages
        Stages of the reconstruction.
    variant
        ``"kernel"``, ``"interpolate"`` or ``"conv"``, see :class:`prmim_jax.ProgressiveReconstruction`; ``"none"``:
        thrown tokens are neither rebuilt nor supervised (plain partial reconstruction).
    thrown_weight
        Weight of a thrown token in the loss, not negative; a decoded one weighs 1.
    mask_unit
        Tokens along each axis of what is masked as a whole; divides the grid. 2 with patches of 16: 32 pixels.
    throw_by
        ``"token"``: single tokens are thrown; ``"unit"``: whole units.
    position
        ``"relative"``: a bias on the attention scores, learned, shared by the blocks; ``"absolute"``: a fixed
        sine-cosine table.
    layer_scale
        First value of the learned factors on what the branches of a block add, above 0.
    drop_path
        Rate at which a branch of the last block is skipped for an image, in training mode, in [0, 1); it rises linearly
        from 0 at the first block. What is skipped is a function of the noise.
    mean, std
        Per-channel normalisation of pixels in [0, 1]; None: ImageNet's for 3 channels, else 0.5.
    embed_dim, depth, num_heads
        Override those of ``model``.
    recompute_blocks
        Whether the backward pass computes what is inside a block anew from the block's input, in place of keeping it
        (activation checkpointing): less memory, and the blocks' forward pass twice.
    init_seed
        Seed of the initial weights, which are a function of it (another one than in PyTorch).
    scan_blocks
        Whether compiled programs hold one block and loop over it: sooner compiled where there are many.
    rngs
        Source of the initial weights, in place of ``init_seed``.

    Raises
    ------
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.

    Notes
    -----
    The loss is the absolute error, divided by the number of supervised pixels + 1e-5 and by the channels. That thrown
    tokens leave the encoder is ours: the published text says nothing of SimMIM.

    References
    ----------
    Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886; Li et al., "PR-MIM: Delving
    Deeper into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import counter_noise
    >>> method = SimMIM(image_size=(32, 32), patch_size=(4, 4), embed_dim=32, depth=1, num_heads=2)
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> output = method(images, counter_noise(0, 0, jnp.arange(2), method.grid.num_tokens))
    >>> method.counts, output.predicted.shape
    (TokenCounts(visible=24, decoded=24, thrown=16), (2, 40, 48))
    """

    norm_pix = False

    def __init__(
        self,
        *,
        model: str = "vit_base",
        image_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (16, 16),
        channels: int = 3,
        mask_ratio: float | None = None,
        throw_ratio: float | None = None,
        throwing: str = "furthest",
        seed: str = "visible",
        stages: int = 2,
        variant: str = "kernel",
        thrown_weight: float = 1.0,
        mask_unit: int = 2,
        throw_by: str = "token",
        position: str = "relative",
        layer_scale: float = 0.1,
        drop_path: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        recompute_blocks: bool = False,
        init_seed: int = 0,
        scan_blocks: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(
            model=model,
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            mean=mean,
            std=std,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            recompute_blocks=recompute_blocks,
            scan_blocks=scan_blocks,
        )
        self.mask_unit = check_unit("mask_unit", mask_unit, self.grid)
        if throw_by not in ("token", "unit"):
            raise ValueError(f"throw_by: expected 'token' or 'unit', got {throw_by!r}")
        throw_unit = self.mask_unit if throw_by == "unit" else None
        counts = check_counts(
            self.grid,
            mask_ratio,
            throw_ratio,
            throwing,
            default=(0.6, 0.25),
            mask_unit=self.mask_unit,
            throw_unit=throw_unit,
        )
        self.schedule = check_schedule(self.grid, counts, stages, throwing, seed, unit=throw_unit)
        self.variant = check_variant(variant, counts)
        self.thrown_weight = check_thrown_weight(thrown_weight, counts, self.variant)
        self.position = position
        self.layer_scale = check_fraction("layer_scale", layer_scale)
        if self.layer_scale == 0:
            raise ValueError("layer_scale: expected a number above 0, got 0")
        self.drop_path = check_fraction("drop_path", drop_path)
        self._build(initial_rngs(init_seed, rngs))

    def _build(self, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(
            self.grid.shape,
            self.patch_size,
            self.channels,
            dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            recompute=self.recompute_blocks,
            position=self.position,  # type: ignore[arg-type]  # the encoder checks it
            layer_scale=self.layer_scale,
            scan=self.scan_blocks,
            rngs=rngs,
        )
        self.encoder.mask_token = nnx.Param(jnp.zeros_like(self.encoder.cls_token))
        self.head = Linear(self.embed_dim, self.patch_dim, rngs=rngs)
        # As convolutions are initialised, which the official head is, and unlike the encoder.
        for parameter in (self.head.weight, self.head.bias):
            parameter.set_value(uniform(rngs, parameter.shape, 1 / sqrt(self.embed_dim)))
        self.reconstruct = self._reconstruction(self.variant, "embed_dim", self.embed_dim)
        _initialize(self.encoder, rngs)

    def __call__(self, images: Array, noise: Array) -> PixelOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        noise
            int (batch, N), for instance from ``prmim_core.counter_noise``.

        Returns
        -------
        PixelOutput

        Raises
        ------
        TypeError
            If ``images`` are not uint8 or ``noise`` does not hold integers.
        ValueError
            If a shape does not fit.
        """
        patches = self._patches(images)
        self._check_noise(noise, images.shape[0])
        num_units = self.counts.visible // prod(self.mask_unit)
        plan = make_plan(self.schedule, noise, visible=block_visible(noise, self.grid, self.mask_unit, num_units))
        features = self._features_of_known(patches, plan, self._scales(noise))
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        num_visible = self.counts.visible
        predicted = self.head(features[:, num_visible:])
        target = self._normalize(take_tokens(patches, plan.order[:, num_visible : features.shape[1]]))
        # The difference with the target is in the target's precision, whatever the prediction was computed in.
        per_token = jnp.abs(predicted.astype(target.dtype) - target).mean(-1)
        pixels = prod(self.patch_size) * images.shape[0]
        return self._output(per_token, predicted, plan, eps=LOSS_EPS / pixels)

    def _features_of_known(self, patches: Array, plan: Plan, scales: Array | None) -> Array:
        """Encode the visible and the decoded tokens: (batch, V + M, dim), in plan order."""
        encoder, num_known = self.encoder, self.schedule.num_known(1)
        visible = encoder.patch_embed(self._normalize(take_tokens(patches, plan.visible)))
        hidden = jnp.broadcast_to(encoder.mask_token[...], (len(visible), self.counts.decoded, self.embed_dim))
        tokens = jnp.concatenate([visible, hidden], axis=1)
        if self.counts.thrown:
            index = plan.order[:, :num_known]
            return encoder.encode(encoder.place(tokens, index), index, scales)[:, 1:]
        # All tokens are there: in raster order all images share one relative bias, which saves a table per image.
        tokens = take_tokens(tokens, plan.restore)
        encoded: Array = take_tokens(encoder.encode(encoder.place(tokens), None, scales)[:, 1:], plan.order)
        return encoded

    def _scales(self, noise: Array) -> Array | None:
        if self.deterministic or self.drop_path == 0:
            return None
        scales: Array = drop_path_scales(noise, self.depth, self.drop_path)
        return scales

    def not_decayed(self) -> frozenset[str]:
        """Name the cls token, which SimMIM spares from weight decay; mask token and bias table are decayed."""
        return frozenset({"encoder.cls_token"})

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`Method.architecture`."""
        return {
            "method": "simmim",
            **super().architecture(),
            "position": self.position,
            "variant": self.variant,
        }

    def cost(self, compute_bytes: int = 4) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        return simmim_cost(
            self.schedule,
            patch_dim=self.patch_dim,
            encoder=self.encoder_size,
            variant=self.variant,  # type: ignore[arg-type]  # checked at construction
            relative_position=self.position == "relative",
            recompute_blocks=self.recompute_blocks,
            compute_bytes=compute_bytes,
        )


def _initialize(encoder: Encoder, rngs: nnx.Rngs) -> None:
    """Draw the weights as SimMIM does; norms, LayerScale and relative bias keep what they have."""
    for _, part in nnx.iter_modules(encoder):
        if isinstance(part, Linear | PatchProjection):
            _truncated_normal(part.weight, rngs)
            part.bias.set_value(jnp.zeros_like(part.bias))
    for token in (encoder.cls_token, encoder.mask_token):
        _truncated_normal(token, rngs)
    for number, block in enumerate(cast(Sequence[Block], encoder.blocks), start=1):
        for part in (block.attn.proj, block.mlp.fc2):
            part.weight.set_value(part.weight[...] / sqrt(2 * number))


def _truncated_normal(parameter: nnx.Param[Array], rngs: nnx.Rngs) -> None:
    parameter.set_value(draw(_truncated_block, rngs, parameter.shape, 0.02))


@jax.jit
def _truncated_block(key: Array) -> Array:
    return jax.random.truncated_normal(key, -1.0, 1.0, (BLOCK,), jnp.float32)

"""Masked autoencoder with partial and progressive reconstruction."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prmim_core import CostReport, Transformer, cost, normalize_patches, take_tokens
from prmim_core.options import (
    check_counts,
    check_schedule,
    check_thrown_weight,
    check_variant,
    positive_integers,
)
from prmim_torch.method import PixelMethod, PixelOutput, initial_weights
from prmim_torch.plan import make_plan
from prmim_torch.vit import Decoder, Encoder


class MAE(PixelMethod):
    """Masked autoencoder whose decoder rebuilds part of the masked tokens; the rest is rebuilt progressively.

    The encoder sees the visible tokens, the decoder the visible and the decoded ones. Features of the thrown tokens
    come from :class:`prmim_torch.ProgressiveReconstruction`. One head predicts the pixels of all masked tokens.

    Parameters
    ----------
    model
        Name of the encoder: ``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_huge``.
    image_size, patch_size
        Pixels along each of one to three axes; the patch divides the image.
    channels
        Channels of the image.
    mask_ratio
        Fraction of the tokens that is masked, in [0, 1); None: 0.75.
    throw_ratio
        Fraction of **all** tokens that is thrown, in [0, 1), at most ``mask_ratio``; None: 0.5. 0 is plain MAE.
    throwing
        What is thrown: ``"furthest"``, ``"random"`` or ``"cell"`` (see ``prmim_core.Schedule``), or ``"none"``, which
        sets ``throw_ratio`` to 0.
    seed
        Start of furthest sampling, ``"visible"`` or ``"none"``.
    stages
        Stages of the reconstruction.
    variant
        ``"kernel"``, ``"interpolate"`` or ``"conv"``, see :class:`prmim_torch.ProgressiveReconstruction`; ``"none"``:
        thrown tokens are neither rebuilt nor supervised (plain partial reconstruction).
    thrown_weight
        Weight of a thrown token in the loss, not negative; a decoded one weighs 1.
    norm_pix
        Whether each target patch is normalised by its own mean and (unbiased) variance.
    mean, std
        Per-channel normalisation of pixels in [0, 1]; None: ImageNet's for 3 channels, else 0.5.
    embed_dim, depth, num_heads
        Override those of ``model``.
    decoder_dim, decoder_depth, decoder_heads
        The decoder's.
    recompute_blocks
        Whether the backward pass computes what is inside a block anew from the block's input, in place of keeping it
        (activation checkpointing): less memory, and the blocks' forward pass twice.
    init_seed
        Seed of the initial weights, which are a function of it; torch's global random state is left as it was.

    Raises
    ------
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.

    Notes
    -----
    Pixels travel as uint8 until they are gathered along the plan, and only visible patches are embedded.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377; Li et al., "PR-MIM: Delving Deeper
    into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = MAE(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1, num_heads=2, decoder_dim=16,
    ...              decoder_depth=1, decoder_heads=2)
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> output = method(images, counter_noise(0, 0, torch.arange(2), method.grid.num_tokens))
    >>> output.loss.shape, output.predicted.shape
    (torch.Size([]), torch.Size([2, 12, 192]))
    """

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
        norm_pix: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        recompute_blocks: bool = False,
        init_seed: int = 0,
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
        )
        counts = check_counts(self.grid, mask_ratio, throw_ratio, throwing)
        self.schedule = check_schedule(self.grid, counts, stages, throwing, seed)
        self.variant = check_variant(variant, counts)
        self.thrown_weight = check_thrown_weight(thrown_weight, counts, self.variant)
        if norm_pix and self.patch_dim < 2:
            raise ValueError("norm_pix: expected patches of at least 2 values to normalise them, got patches of 1")
        self.norm_pix = bool(norm_pix)
        self.decoder_dim, self.decoder_depth, self.decoder_heads = positive_integers(
            "decoder_dim, decoder_depth, decoder_heads", (decoder_dim, decoder_depth, decoder_heads)
        )
        with initial_weights(init_seed):
            self._build()

    def _build(self) -> None:
        self.encoder = Encoder(
            self.grid.shape,
            self.patch_size,
            self.channels,
            dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            recompute=self.recompute_blocks,
        )
        self.decoder = Decoder(
            self.grid.shape,
            self.embed_dim,
            self.patch_dim,
            dim=self.decoder_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_heads,
            recompute=self.recompute_blocks,
        )
        self.reconstruct = self._reconstruction(self.variant, "decoder_dim", self.decoder_dim)

    def forward(self, images: Tensor, noise: Tensor) -> PixelOutput:
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
        plan = make_plan(self.schedule, noise)
        encoded = self.encoder(self._normalize(take_tokens(patches, plan.visible)), plan.visible)
        num_known, num_visible = self.schedule.num_known(1), self.counts.visible
        features = self.decoder(encoded, plan.order[:, :num_known])
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        predicted = self.decoder.pred(features[:, num_visible:])
        supervised = plan.order[:, num_visible : features.shape[1]]
        target = self._normalize(take_tokens(patches, supervised))
        target = normalize_patches(target) if self.norm_pix else target
        # The difference with the target is in the target's precision, whatever autocast made of the prediction.
        return self._output((predicted.to(target.dtype) - target).square().mean(-1), predicted, plan)

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`Method.architecture`."""
        return {
            "method": "mae",
            **super().architecture(),
            "norm_pix": self.norm_pix,
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
            "variant": self.variant,
        }

    def cost(self, compute_bytes: int = 4) -> CostReport:
        """Return what a forward pass costs per image, by formula."""
        return cost(
            self.schedule,
            patch_dim=self.patch_dim,
            encoder=self.encoder_size,
            decoder=Transformer(self.decoder_dim, self.decoder_depth, self.decoder_heads),
            variant=self.variant,  # type: ignore[arg-type]  # checked at construction
            recompute_blocks=self.recompute_blocks,
            compute_bytes=compute_bytes,
        )

"""Masked autoencoder with partial and progressive reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prmim_core import (
    Plan,
    denormalize_patches,
    normalize_patches,
    patch_grid,
    patchify,
    take_tokens,
    vit_size,
)
from prmim_core.options import (
    check_counts,
    check_schedule,
    check_thrown_weight,
    check_variant,
    pixel_statistics,
    positive_integers,
)
from prmim_torch.plan import make_plan
from prmim_torch.reconstruct import ProgressiveReconstruction
from prmim_torch.vit import Decoder, Encoder

RECONSTRUCTION_HEADS = 4

Pool = Literal["mean", "cls"]


@dataclass
class MAEOutput:
    """What a forward pass of :class:`MAE` gives.

    Parameters
    ----------
    loss
        Scalar, float32 or wider: what to minimise.
    loss_decoded, loss_thrown
        Scalars: its means over decoded and over thrown tokens; 0 where there are none (or none that are supervised).
    predicted
        (batch, supervised, prod(patch) * C): predictions for the supervised tokens, in plan order (decoded, then
        thrown; only decoded for variant ``"none"``), in the units of the target.
    plan
        The plan of the batch.
    """

    loss: Tensor
    loss_decoded: Tensor
    loss_thrown: Tensor
    predicted: Tensor
    plan: Plan


class MAE(nn.Module):
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
        Fraction of **all** tokens that is thrown, in [0, 1), at most ``mask_ratio``. 0 is plain MAE.
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

    _pixel_scale: Tensor
    _pixel_shift: Tensor

    def __init__(
        self,
        *,
        model: str = "vit_base",
        image_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (16, 16),
        channels: int = 3,
        mask_ratio: float | None = None,
        throw_ratio: float = 0.5,
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
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = positive_integers("image_size", image_size)
        self.patch_size = positive_integers("patch_size", patch_size)
        (self.channels,) = positive_integers("channels", (channels,))
        self.grid = patch_grid(self.image_size, self.patch_size)
        self.counts = check_counts(self.grid, mask_ratio, throw_ratio, throwing)
        self.schedule = check_schedule(self.grid, self.counts, stages, throwing, seed)
        self.variant = check_variant(variant, self.counts)
        self.thrown_weight = check_thrown_weight(thrown_weight, self.counts, self.variant)
        if norm_pix and self.patch_dim < 2:
            raise ValueError("norm_pix: expected patches of at least 2 values to normalise them, got patches of 1")
        self.norm_pix = bool(norm_pix)
        self.mean, self.std = pixel_statistics(mean, std, self.channels)
        # In float64, as the constants they are; cast on the device when used.
        self._register_constant("_pixel_scale", [1 / (255 * deviation) for deviation in self.std])
        self._register_constant("_pixel_shift", [-m / s for m, s in zip(self.mean, self.std, strict=True)])
        encoder = vit_size(model, embed_dim, depth, num_heads)
        self.embed_dim, self.depth, self.num_heads = positive_integers(
            "embed_dim, depth, num_heads", (encoder.dim, encoder.depth, encoder.heads)
        )
        self.decoder_dim, self.decoder_depth, self.decoder_heads = positive_integers(
            "decoder_dim, decoder_depth, decoder_heads", (decoder_dim, decoder_depth, decoder_heads)
        )
        if self.variant == "kernel" and self.decoder_dim % RECONSTRUCTION_HEADS:
            raise ValueError(
                f"decoder_dim: expected a multiple of {RECONSTRUCTION_HEADS} for variant 'kernel', "
                f"got {self.decoder_dim}"
            )
        if type(init_seed) is not int:
            raise TypeError(f"init_seed: expected an integer, got {init_seed!r}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(init_seed)
            self._build()

    @property
    def patch_dim(self) -> int:
        """Pixel values in a patch."""
        return prod(self.patch_size) * self.channels

    def _register_constant(self, name: str, values: list[float]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def _build(self) -> None:
        self.encoder = Encoder(
            self.grid.shape,
            self.patch_size,
            self.channels,
            dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
        )
        self.decoder = Decoder(
            self.grid.shape,
            self.embed_dim,
            self.patch_dim,
            dim=self.decoder_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_heads,
        )
        self.reconstruct: ProgressiveReconstruction | None = None
        if self.variant != "none":
            self.reconstruct = ProgressiveReconstruction(
                self.decoder_dim,
                self.schedule,
                variant=self.variant,  # type: ignore[arg-type]  # checked at construction
                heads=RECONSTRUCTION_HEADS,
            )

    def forward(self, images: Tensor, noise: Tensor) -> MAEOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        noise
            int (batch, N), for instance from ``prmim_core.counter_noise``.

        Returns
        -------
        MAEOutput

        Raises
        ------
        TypeError
            If ``images`` are not uint8 or ``noise`` does not hold integers.
        ValueError
            If a shape does not fit.
        """
        self._check_images(images)
        if tuple(noise.shape) != (images.shape[0], self.counts.num_tokens):
            expected = (images.shape[0], self.counts.num_tokens)
            raise ValueError(f"noise: expected shape {expected}, got {tuple(noise.shape)}")
        plan = make_plan(self.schedule, noise)
        patches = patchify(images, self.patch_size)
        encoded = self.encoder(self._normalize(take_tokens(patches, plan.visible)), plan.visible)
        num_known, num_visible = self.schedule.num_known(1), self.counts.visible
        features = self.decoder(encoded, plan.order[:, :num_known])
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        predicted = self.decoder.pred(features[:, num_visible:])
        supervised = plan.order[:, num_visible : features.shape[1]]
        return self._output(predicted, self._target(take_tokens(patches, supervised)), plan)

    def encode(self, images: Tensor) -> Tensor:
        """Encode whole images, nothing masked: uint8 (batch, image_size..., channels) to (batch, 1 + N, dim).

        The cls token comes first.
        """
        self._check_images(images)
        encoded: Tensor = self.encoder(self._normalize(patchify(images, self.patch_size)))
        return encoded

    def features(self, images: Tensor, pool: Pool = "mean") -> Tensor:
        """Return one vector (batch, dim) per image: the ``"mean"`` of its encoded tokens, or its ``"cls"`` token."""
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool: expected 'mean' or 'cls', got {pool!r}")
        encoded = self.encode(images)
        return encoded[:, 0] if pool == "cls" else encoded[:, 1:].mean(1)

    def rebuilt_pixels(self, images: Tensor, output: MAEOutput) -> Tensor:
        """Turn predictions into pixels, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), those that ``output`` is for.
        output
            What :meth:`forward` gave for them.

        Returns
        -------
        Tensor
            (batch, N, prod(patch) * C), in raster order, in units of [0, 1]: the input's own pixels where visible; the
            prediction, patch normalisation undone with the statistics of the true patch, where supervised; else NaN.
        """
        self._check_images(images)
        patches = patchify(images, self.patch_size)
        order, num_visible = output.plan.order, self.counts.visible
        visible, supervised = order[:, :num_visible], order[:, num_visible : num_visible + output.predicted.shape[1]]
        truth = self._normalize(take_tokens(patches, supervised))
        predicted = output.predicted.to(truth.dtype)
        predicted = denormalize_patches(predicted, truth) if self.norm_pix else predicted
        pixels = predicted.view(*predicted.shape[:2], -1, self.channels) - self._pixel_shift.to(truth.dtype)
        known = torch.cat(
            [
                take_tokens(patches, visible).to(truth.dtype) / 255,
                (pixels / (255 * self._pixel_scale.to(truth.dtype))).flatten(-2),
            ],
            dim=1,
        )
        places = order[:, : known.shape[1], None].expand_as(known)
        return torch.full(patches.shape, torch.nan, dtype=known.dtype, device=known.device).scatter(1, places, known)

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean, as plain values: weights fit another model only if all of these are equal.

        Ratios and sampling are not among them, since weights may go on to be trained under others.
        """
        return {
            "method": "mae",
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "norm_pix": self.norm_pix,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
            "variant": self.variant,
        }

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected torch.uint8, got {images.dtype}")
        expected = (*self.image_size, self.channels)
        if tuple(images.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images: expected shape (batch, {sizes}), got {tuple(images.shape)}")

    def _normalize(self, patches: Tensor) -> Tensor:
        """Turn uint8 patches (batch, length, prod(patch) * C) into floats, normalised per channel."""
        dtype = self.encoder.cls_token.dtype
        pixels = patches.view(*patches.shape[:2], -1, self.channels).to(dtype)
        return (pixels * self._pixel_scale.to(dtype) + self._pixel_shift.to(dtype)).flatten(-2)

    def _target(self, patches: Tensor) -> Tensor:
        target = self._normalize(patches)
        return normalize_patches(target) if self.norm_pix else target

    def _output(self, predicted: Tensor, target: Tensor, plan: Plan) -> MAEOutput:
        num_decoded = self.counts.decoded
        num_thrown = predicted.shape[1] - num_decoded
        # The difference with the target is in the target's precision, whatever autocast made of the prediction.
        per_token = (predicted.to(target.dtype) - target).square().mean(-1)
        loss_decoded = per_token[:, :num_decoded].sum() / (max(num_decoded, 1) * per_token.shape[0])
        loss_thrown = per_token[:, num_decoded:].sum() / (max(num_thrown, 1) * per_token.shape[0])
        weight_thrown = self.thrown_weight * num_thrown
        loss = (num_decoded * loss_decoded + weight_thrown * loss_thrown) / (num_decoded + weight_thrown)
        return MAEOutput(loss, loss_decoded, loss_thrown, predicted, plan)

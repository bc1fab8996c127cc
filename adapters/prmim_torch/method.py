"""What the methods share: images come in, patches of them are made, features of whole images go out.

A method is one file that adds its parts and its loss: see :class:`Method` for what it has to supply.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prmim_core import (
    CostReport,
    Plan,
    Schedule,
    TokenCounts,
    Transformer,
    denormalize_patches,
    patch_grid,
    patchify,
    take_tokens,
    vit_size,
)
from prmim_core.options import check_flag, pixel_statistics, positive_integers
from prmim_torch.reconstruct import ProgressiveReconstruction
from prmim_torch.vit import Encoder

RECONSTRUCTION_HEADS = 4

Pool = Literal["mean", "cls"]
Predicts = Literal["pixels", "features"]


class Method(nn.Module):
    """A masked image modelling method: maps images and noise to an output with a ``loss``.

    A subclass builds ``encoder``, and supplies :meth:`forward`, :meth:`architecture` and :meth:`cost`.

    Parameters
    ----------
    model, embed_dim, depth, num_heads
        The encoder: a named size, of which parts may be replaced.
    image_size, patch_size
        Pixels along each of one to three axes; the patch divides the image.
    channels
        Channels of the image.
    mean, std
        Per-channel normalisation of pixels in [0, 1]; None: ImageNet's for 3 channels, else 0.5.
    recompute_blocks
        Whether the backward pass computes what is inside a block anew from the block's input, in place of keeping it
        (activation checkpointing): less memory, and the blocks' forward pass twice.

    Raises
    ------
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.
    """

    predicts: ClassVar[Predicts]
    """What is predicted for masked tokens: decides which pictures a run draws."""
    losses: ClassVar[tuple[str, ...]]
    """The scalars of an output that are worth a log, ``"loss"`` first."""

    encoder: Encoder
    schedule: Schedule
    _pixel_scale: Tensor
    _pixel_shift: Tensor

    def __init__(
        self,
        *,
        model: str,
        image_size: Sequence[int],
        patch_size: Sequence[int],
        channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        embed_dim: int | None,
        depth: int | None,
        num_heads: int | None,
        recompute_blocks: bool,
    ) -> None:
        super().__init__()
        self.image_size = positive_integers("image_size", image_size)
        self.patch_size = positive_integers("patch_size", patch_size)
        (self.channels,) = positive_integers("channels", (channels,))
        self.grid = patch_grid(self.image_size, self.patch_size)
        self.mean, self.std = pixel_statistics(mean, std, self.channels)
        # In float64, as the constants they are; cast on the device when used.
        self._register_constant("_pixel_scale", [1 / (255 * deviation) for deviation in self.std])
        self._register_constant("_pixel_shift", [-m / s for m, s in zip(self.mean, self.std, strict=True)])
        encoder = vit_size(model, embed_dim, depth, num_heads)
        self.embed_dim, self.depth, self.num_heads = positive_integers(
            "embed_dim, depth, num_heads", (encoder.dim, encoder.depth, encoder.heads)
        )
        self.recompute_blocks = check_flag("recompute_blocks", recompute_blocks)

    @property
    def patch_dim(self) -> int:
        """Pixel values in a patch."""
        return prod(self.patch_size) * self.channels

    @property
    def counts(self) -> TokenCounts:
        """How many tokens of an image are visible, decoded and thrown."""
        return self.schedule.counts

    @property
    def encoder_size(self) -> Transformer:
        """The size of the encoder."""
        return Transformer(self.embed_dim, self.depth, self.num_heads)

    def cost(self, compute_bytes: int = 4) -> CostReport:
        """Return what a forward pass costs per image, by formula; ``compute_bytes`` per value in matrix products."""
        raise NotImplementedError

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean, as plain values: weights fit another model only if all of these are equal.

        Ratios and sampling are not among them, since weights may go on to be trained under others.
        """
        return {
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }

    def not_decayed(self) -> frozenset[str]:
        """Name the parameters of several axes that the method's recipe spares from weight decay."""
        return frozenset()

    def encode(self, images: Tensor) -> Tensor:
        """Encode whole images, nothing masked: uint8 (batch, image_size..., channels) to (batch, 1 + N, dim).

        The cls token comes first.
        """
        encoded: Tensor = self.encoder(self._normalize(self._patches(images)))
        return encoded

    def features(self, images: Tensor, pool: Pool = "mean") -> Tensor:
        """Return one vector (batch, dim) per image: the ``"mean"`` of its encoded tokens, or its ``"cls"`` token."""
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool: expected 'mean' or 'cls', got {pool!r}")
        encoded = self.encode(images)
        return encoded[:, 0] if pool == "cls" else encoded[:, 1:].mean(1)

    def _register_constant(self, name: str, values: list[float]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def _reconstruction(self, variant: str, dim_name: str, dim: int) -> ProgressiveReconstruction | None:
        """Build the part that rebuilds thrown tokens from features of ``dim`` channels; None for variant ``"none"``."""
        if variant == "none":
            return None
        if variant == "kernel" and dim % RECONSTRUCTION_HEADS:
            raise ValueError(
                f"{dim_name}: expected a multiple of {RECONSTRUCTION_HEADS} for variant 'kernel', got {dim}"
            )
        return ProgressiveReconstruction(
            dim,
            self.schedule,
            variant=variant,  # type: ignore[arg-type]  # checked at construction
            heads=RECONSTRUCTION_HEADS,
        )

    def _patches(self, images: Tensor) -> Tensor:
        """Cut images into uint8 patches (batch, N, prod(patch) * C), after a look at dtype and shape."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected torch.uint8, got {images.dtype}")
        expected = (*self.image_size, self.channels)
        if tuple(images.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images: expected shape (batch, {sizes}), got {tuple(images.shape)}")
        patches: Tensor = patchify(images, self.patch_size)
        return patches

    def _check_noise(self, noise: Tensor, batch: int) -> None:
        if tuple(noise.shape) != (batch, self.grid.num_tokens):
            raise ValueError(f"noise: expected shape {(batch, self.grid.num_tokens)}, got {tuple(noise.shape)}")

    def _normalize(self, patches: Tensor) -> Tensor:
        """Turn uint8 patches (batch, length, prod(patch) * C) into floats, normalised per channel."""
        dtype = self.encoder.cls_token.dtype
        pixels = patches.view(*patches.shape[:2], -1, self.channels).to(dtype)
        return (pixels * self._pixel_scale.to(dtype) + self._pixel_shift.to(dtype)).flatten(-2)


@dataclass
class PixelOutput:
    """What a forward pass of a method that predicts pixels gives.

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


class PixelMethod(Method):
    """A method that predicts the pixels of masked tokens."""

    predicts = "pixels"
    losses = ("loss", "loss_decoded", "loss_thrown")

    norm_pix: bool
    thrown_weight: float

    def rebuilt_pixels(self, images: Tensor, output: PixelOutput) -> Tensor:
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
        patches = self._patches(images)
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

    def _output(self, per_token: Tensor, predicted: Tensor, plan: Plan, eps: float = 0.0) -> PixelOutput:
        """Average the losses of the supervised tokens, (batch, supervised), in plan order.

        A thrown token weighs ``thrown_weight``, a decoded one 1; ``eps`` is added to the sum of an image's weights.
        """
        batch, num_decoded = per_token.shape[0], self.counts.decoded
        num_thrown = per_token.shape[1] - num_decoded
        loss_decoded = per_token[:, :num_decoded].sum() / (max(num_decoded, 1) * batch)
        loss_thrown = per_token[:, num_decoded:].sum() / (max(num_thrown, 1) * batch)
        weight_thrown = self.thrown_weight * num_thrown
        loss = (num_decoded * loss_decoded + weight_thrown * loss_thrown) / (num_decoded + weight_thrown + eps)
        return PixelOutput(loss, loss_decoded, loss_thrown, predicted, plan)


class FeatureMethod(Method):
    """A method that predicts what a teacher makes of the whole image."""

    predicts = "features"

    def compared_features(self, images: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        """Put predictions beside their targets, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), those that ``output`` is for.
        output
            What :meth:`forward` gave for them.

        Returns
        -------
        tuple of Tensor
            Student's and teacher's features (batch, N, teacher_dim) of the last aligned layer, in raster order; the
            student's are NaN where nothing is predicted.
        """
        raise NotImplementedError


@contextmanager
def initial_weights(init_seed: int) -> Iterator[None]:
    """Let weights that are drawn inside be a function of a seed; torch's global random state stays as it was."""
    if type(init_seed) is not int:
        raise TypeError(f"init_seed: expected an integer, got {init_seed!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(init_seed)
        yield

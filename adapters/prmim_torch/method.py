"""Base classes of the methods: from images to patches, and from encoded images to features.

A method is one file that adds its parts and its loss; see :class:`Method`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prmim_core import Plan, denormalize_patches, drop_path_scales, patchify, take_tokens
from prmim_methods import MethodConfig, PixelConfig
from prmim_methods.cost import CONV_REPEATS, RECONSTRUCTION_HEADS
from prmim_torch.reconstruct import ProgressiveReconstruction
from prmim_torch.vit import Encoder

Pool = Literal["mean", "cls"]


class ImageModule(nn.Module):
    """A module on uint8 images: validates them, cuts them into patches and normalises the pixels.

    Parameters
    ----------
    config
        The record of the method whose images and encoder the module has.
    """

    losses: ClassVar[tuple[str, ...]]
    """Names of the scalars that a training step measures, ``"loss"`` first."""

    encoder: Encoder
    _pixel_scale: Tensor
    _pixel_shift: Tensor

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.num_tokens = config.grid.num_tokens
        self._image_shape = (*config.image_size, config.channels)
        self._patch_size = config.patch_size
        mean, std = config.pixel_mean, config.pixel_std
        # Constants are float64 here, and cast on the device when used.
        self._register_constant("_pixel_scale", [1 / (255 * deviation) for deviation in std])
        self._register_constant("_pixel_shift", [-m / s for m, s in zip(mean, std, strict=True)])

    def _register_constant(self, name: str, values: list[float]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def _patches(self, images: Tensor) -> Tensor:
        """Cut images into uint8 patches (batch, N, prod(patch) * C); validate dtype and shape."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected torch.uint8, got {images.dtype}")
        if tuple(images.shape[1:]) != self._image_shape:
            sizes = ", ".join(map(str, self._image_shape))
            raise ValueError(f"images: expected shape (batch, {sizes}), got {tuple(images.shape)}")
        return patchify(images, self._patch_size)

    def _check_noise(self, noise: Tensor, batch: int) -> None:
        if tuple(noise.shape) != (batch, self.num_tokens):
            raise ValueError(f"noise: expected shape {(batch, self.num_tokens)}, got {tuple(noise.shape)}")

    def _normalize(self, patches: Tensor) -> Tensor:
        """Turn uint8 patches (batch, length, prod(patch) * C) into floats, normalised per channel."""
        dtype = self.encoder.cls_token.dtype
        pixels = patches.view(*patches.shape[:2], -1, self._image_shape[-1]).to(dtype)
        return (pixels * self._pixel_scale.to(dtype) + self._pixel_shift.to(dtype)).flatten(-2)

    def _drop_path(self, noise: Tensor, rate: float) -> Tensor | None:
        """Return the factors of the encoder's branches, (batch, depth, 2); None if no branch is dropped."""
        if not self.training or rate == 0:
            return None
        return drop_path_scales(len(self.encoder.blocks), rate, noise)


class Method(ImageModule):
    """A masked image modelling method: maps images and noise to an output with a ``loss``.

    A subclass builds ``encoder`` and implements ``forward(images, noise)``.

    Parameters
    ----------
    config
        The options.
    """

    config: MethodConfig

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.config = config
        self._schedule = config.schedule

    def encode(self, images: Tensor) -> Tensor:
        """Encode whole images, nothing masked: uint8 (batch, image_size..., channels) to (batch, 1 + N, dim).

        The class token comes first.
        """
        return self.encoder(self._normalize(self._patches(images)))

    def features(self, images: Tensor, pool: Pool = "mean") -> Tensor:
        """Return one vector (batch, dim) per image: the ``"mean"`` of the encoded tokens, or the ``"cls"`` token."""
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool: expected 'mean' or 'cls', got {pool!r}")
        encoded = self.encode(images)
        return encoded[:, 0] if pool == "cls" else encoded[:, 1:].mean(1)

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return self.config.architecture()

    def not_decayed(self) -> frozenset[str]:
        """Return the parameters of several axes that the recipe exempts from weight decay."""
        return self.config.not_decayed()

    def _build_reconstruction(self, dim: int) -> ProgressiveReconstruction | None:
        """Return the reconstruction of features of ``dim`` channels; None if no token is reconstructed."""
        if not self.config.is_reconstructed:
            return None
        return ProgressiveReconstruction(
            dim,
            self.config.grid,
            self.config.reconstruction,  # type: ignore[arg-type]  # one of the choices
            heads=RECONSTRUCTION_HEADS,
            repeats=CONV_REPEATS,
        )


@dataclass
class PixelOutput:
    """Output of a method that predicts pixels.

    Parameters
    ----------
    loss
        Scalar to minimise, float32 or wider.
    loss_decoded, loss_thrown
        Scalars: the mean loss of decoded and of thrown tokens; 0 if no such token is supervised.
    predicted
        (batch, supervised, prod(patch) * C): predictions for the supervised tokens (decoded, then reconstructed), in
        plan order, in the units of the target.
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

    losses = ("loss", "loss_decoded", "loss_thrown")

    config: PixelConfig
    reconstruct: ProgressiveReconstruction | None

    def rebuilt_pixels(self, images: Tensor, output: PixelOutput) -> Tensor:
        """Return images with their predicted pixels, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), the input of ``output``.
        output
            The output of :meth:`forward`.

        Returns
        -------
        Tensor
            (batch, N, prod(patch) * C), in raster order, in units of [0, 1]. Visible patches are the input's own.
            Supervised patches are the predictions; patch normalisation is undone with the statistics of the true
            patch. All other patches are NaN.
        """
        patches, plan = self._patches(images), output.plan
        supervised = self._supervised(plan)
        truth = self._normalize(take_tokens(patches, supervised))
        predicted = output.predicted.to(truth.dtype)
        predicted = denormalize_patches(predicted, truth) if self.config.norm_pix else predicted
        pixels = predicted.view(*predicted.shape[:2], -1, self.config.channels) - self._pixel_shift.to(truth.dtype)
        known = torch.cat(
            [
                take_tokens(patches, plan.visible).to(truth.dtype) / 255,
                (pixels / (255 * self._pixel_scale.to(truth.dtype))).flatten(-2),
            ],
            dim=1,
        )
        places = torch.cat([plan.visible, supervised], dim=1)[:, :, None].expand_as(known)
        return torch.full(patches.shape, torch.nan, dtype=known.dtype, device=known.device).scatter(1, places, known)

    def _supervised(self, plan: Plan) -> Tensor:
        """Return the tokens whose pixels are predicted: int (batch, supervised)."""
        return plan.decoded if self.reconstruct is None else plan.masked

    def _output(self, per_token: Tensor, predicted: Tensor, plan: Plan, eps: float = 0.0) -> PixelOutput:
        """Average the losses (batch, supervised) of the supervised tokens, in plan order.

        Thrown tokens have the weight ``thrown_weight``, decoded ones 1; ``eps`` is added to an image's sum of weights.
        """
        batch, num_decoded = per_token.shape[0], plan.schedule.counts.decoded
        num_thrown = per_token.shape[1] - num_decoded
        loss_decoded = per_token[:, :num_decoded].sum() / (max(num_decoded, 1) * batch)
        loss_thrown = per_token[:, num_decoded:].sum() / (max(num_thrown, 1) * batch)
        weight_thrown = self.config.thrown_weight * num_thrown
        loss = (num_decoded * loss_decoded + weight_thrown * loss_thrown) / (num_decoded + weight_thrown + eps)
        return PixelOutput(loss, loss_decoded, loss_thrown, predicted, plan)


class FeatureMethod(Method):
    """A method that predicts a teacher's features of the whole image."""

    def compared_features(self, images: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        """Return predicted and target features, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), the input of ``output``.
        output
            The output of :meth:`forward`.

        Returns
        -------
        tuple of Tensor
            The student's and the teacher's features (batch, N, teacher_dim) of the last aligned layer, in raster order;
            the student's are NaN where nothing is predicted.
        """
        raise NotImplementedError


def build_encoder(
    config: MethodConfig, *, learned_positions: bool = False, mask_token: bool = False, final_norm: bool = True
) -> Encoder:
    """Return the encoder of a method; see :class:`prmim_torch.vit.Encoder` for the keyword arguments."""
    size = config.encoder_size
    return Encoder(
        config.grid.shape,
        config.patch_size,
        config.channels,
        dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        position=config.position,  # type: ignore[arg-type]  # one of the choices
        learned_positions=learned_positions,
        layer_scale=config.layer_scale,
        mask_token=mask_token,
        final_norm=final_norm,
        recompute=config.recompute_blocks,
    )


@contextmanager
def initial_weights(init_seed: int) -> Iterator[None]:
    """Seed the weights that are drawn inside; torch's global random state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(init_seed)
        yield

"""Base classes of the methods: from images to patches, and from encoded images to features.

A method is one file that adds its parts and its loss; see :class:`Method`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_core import Plan, denormalize_patches, drop_path_scales, patchify, take_tokens
from prmim_jax.reconstruct import ProgressiveReconstruction
from prmim_jax.vit import Encoder
from prmim_methods import MethodConfig, PixelConfig
from prmim_methods.cost import CONV_REPEATS, RECONSTRUCTION_HEADS

Pool = Literal["mean", "cls"]


class ImageModule(nnx.Module):
    """A module on uint8 images: validates them, cuts them into patches and normalises the pixels.

    Parameters
    ----------
    config
        The record of the method whose images and encoder the module has.

    Notes
    -----
    A new module is in training mode. ``module.eval()`` and ``module.train()`` set the attribute ``deterministic``,
    which is part of the graph definition that ``nnx.split`` returns.
    """

    losses: ClassVar[tuple[str, ...]]
    """Names of the scalars that a training step measures, ``"loss"`` first."""

    encoder: Encoder

    def __init__(self, config: MethodConfig) -> None:
        self.num_tokens = config.grid.num_tokens
        self.image_shape = (*config.image_size, config.channels)
        self._patch_size = config.patch_size
        self._depth = config.encoder_size.depth
        mean, std = config.pixel_mean, config.pixel_std
        # Plain numbers: they are constants of the compiled program, not state.
        self._pixel_scale = tuple(1 / (255 * deviation) for deviation in std)
        self._pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
        self.deterministic = False

    def _patches(self, images: Array) -> Array:
        """Cut images into uint8 patches (batch, N, prod(patch) * C); validate dtype and shape."""
        check_images(images, self.image_shape)
        return patchify(images, self._patch_size)

    def _check_noise(self, noise: Array, batch: int) -> None:
        if tuple(noise.shape) != (batch, self.num_tokens):
            raise ValueError(f"noise: expected shape {(batch, self.num_tokens)}, got {tuple(noise.shape)}")

    def _normalize(self, patches: Array) -> Array:
        """Turn uint8 patches (batch, length, prod(patch) * C) into floats, normalised per channel."""
        scale, shift = self._scale_and_shift()
        return (self._by_channel(patches).astype(scale.dtype) * scale + shift).reshape(patches.shape)

    def _scale_and_shift(self) -> list[Array]:
        dtype = self.encoder.cls_token.dtype
        return [jnp.asarray(values, dtype) for values in (self._pixel_scale, self._pixel_shift)]

    def _by_channel(self, patches: Array) -> Array:
        return patches.reshape(*patches.shape[:2], -1, self.image_shape[-1])

    def _drop_path(self, noise: Array, rate: float) -> Array | None:
        """Return the factors of the encoder's branches, (batch, depth, 2); None if no branch is dropped."""
        if self.deterministic or rate == 0:
            return None
        return drop_path_scales(self._depth, rate, noise)


class Method(ImageModule):
    """A masked image modelling method: maps images and noise to an output with a ``loss``.

    A subclass builds ``encoder`` and implements ``__call__(images, noise)``.

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

    def __call__(self, images: Array, noise: Array) -> Any:
        """Compute the loss of a batch: uint8 (batch, image_size..., channels) and int (batch, N) noise."""
        raise NotImplementedError

    def encode(self, images: Array) -> Array:
        """Encode whole images, nothing masked: uint8 (batch, image_size..., channels) to (batch, 1 + N, dim).

        The class token comes first.
        """
        return self.encoder(self._normalize(self._patches(images)))

    def features(self, images: Array, pool: Pool = "mean") -> Array:
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

    def _build_reconstruction(self, dim: int, dtype: DTypeLike | None) -> ProgressiveReconstruction | None:
        """Return the reconstruction of features of ``dim`` channels; None if no token is reconstructed."""
        if not self.config.is_reconstructed:
            return None
        return ProgressiveReconstruction(
            dim,
            self.config.grid,
            self.config.reconstruction,  # type: ignore[arg-type]  # one of the choices
            heads=RECONSTRUCTION_HEADS,
            repeats=CONV_REPEATS,
            dtype=dtype,
        )


@jax.tree_util.register_dataclass
@dataclass
class PixelOutput:
    """Output of a method that predicts pixels; a pytree.

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

    loss: Array
    loss_decoded: Array
    loss_thrown: Array
    predicted: Array
    plan: Plan


class PixelMethod(Method):
    """A method that predicts the pixels of masked tokens."""

    losses = ("loss", "loss_decoded", "loss_thrown")

    config: PixelConfig
    reconstruct: ProgressiveReconstruction | None

    def rebuilt_pixels(self, images: Array, output: PixelOutput) -> Array:
        """Return images with their predicted pixels, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), the input of ``output``.
        output
            The output of a call of the method.

        Returns
        -------
        jax.Array
            (batch, N, prod(patch) * C), in raster order, in units of [0, 1]. Visible patches are the input's own.
            Supervised patches are the predictions; patch normalisation is undone with the statistics of the true
            patch. All other patches are NaN.
        """
        patches, plan = self._patches(images), output.plan
        supervised = self._supervised(plan)
        truth = self._normalize(take_tokens(patches, supervised))
        predicted = output.predicted.astype(truth.dtype)
        if self.config.norm_pix:
            predicted = denormalize_patches(predicted, truth)
        scale, shift = self._scale_and_shift()
        pixels = (self._by_channel(predicted) - shift) / (255 * scale)
        known = jnp.concatenate(
            [take_tokens(patches, plan.visible).astype(truth.dtype) / 255, pixels.reshape(predicted.shape)], axis=1
        )
        places = jnp.concatenate([plan.visible, supervised], axis=1)
        rows = jnp.arange(len(places))[:, None]
        return jnp.full(patches.shape, jnp.nan, known.dtype).at[rows, places].set(known)

    def _supervised(self, plan: Plan) -> Array:
        """Return the tokens whose pixels are predicted: int (batch, supervised)."""
        return plan.decoded if self.reconstruct is None else plan.masked

    def _output(self, per_token: Array, predicted: Array, plan: Plan, eps: float = 0.0) -> PixelOutput:
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

    def compared_features(self, images: Array, output: Any) -> tuple[Array, Array]:
        """Return predicted and target features, for pictures.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels), the input of ``output``.
        output
            The output of a call of the method.

        Returns
        -------
        tuple of jax.Array
            The student's and the teacher's features (batch, N, teacher_dim) of the last aligned layer, in raster order;
            the student's are NaN where nothing is predicted.
        """
        raise NotImplementedError


def build_encoder(
    config: MethodConfig,
    *,
    learned_positions: bool = False,
    mask_token: bool = False,
    final_norm: bool = True,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> Encoder:
    """Return the encoder of a method; see :class:`prmim_jax.vit.Encoder` for the keyword arguments."""
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
        scan=config.scan_blocks,
        dtype=dtype,
        rngs=rngs,
    )


def check_images(images: Array | NDArray[np.uint8], shape: Sequence[int]) -> None:
    """Raise TypeError or ValueError unless images are uint8, of shape ``(batch, *shape)``."""
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if tuple(images.shape[1:]) != tuple(shape):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"images: expected shape (batch, {sizes}), got {tuple(images.shape)}")

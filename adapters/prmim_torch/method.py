"""Base classes of the methods.

A method is one file that adds its parts and its loss; see :class:`Method`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import register_dataclass

from prmim_core import (
    Plan,
    attention_weights,
    cell_means,
    denormalize_patches,
    denormalize_values,
    drop_path_scales,
    expand_cells,
    image_statistics,
    low_pass,
    normalize_patches,
    normalize_values,
    patchify,
    take_tokens,
    unpatchify,
    window_statistics,
)
from prmim_methods import MethodConfig, PixelConfig
from prmim_methods.cost import CONV_REPEATS, RECONSTRUCTION_HEADS
from prmim_methods.encoder import EncoderOptions, scale_and_shift
from prmim_torch.plan import make_plan
from prmim_torch.reconstruct import ProgressiveReconstruction, no_weight_decay
from prmim_torch.vit import Encoder, Linear, constant_like, spread

Pool = Literal["mean", "cls"]


class ImageModule(nn.Module):
    """A module on images: validation, patches, and normalization of pixels.

    Images are uint8; with a ``pixel_range``, also uint16 or float32.

    Parameters
    ----------
    config
        The record of the encoder and of the images.
    """

    losses: tuple[str, ...]
    """Names of the scalars that a training step measures, ``"loss"`` first."""

    encoder: Encoder

    def __init__(self, config: EncoderOptions) -> None:
        super().__init__()
        self.num_tokens = config.grid.num_tokens
        self._image_shape = (*config.image_size, config.channels)
        self._patch_size = config.patch_size
        self._pixel_range = config.pixel_range
        self._image_dtypes = tuple(getattr(torch, name) for name in config.image_dtypes)
        self._pixel_scale, self._pixel_shift = scale_and_shift(config.pixel_mean, config.pixel_std)

    def reset_parameters(self) -> None:
        """Reset all weights, parts included, to those of a new module of equal options.

        For modules built on the meta device. Independent of the device and of the random state. With FSDP2, every
        process must call it.
        """
        with torch.device("cpu"):
            weights = self._new().state_dict()
        held = self.state_dict()
        self.load_state_dict({name: spread(tensor, held[name]) for name, tensor in weights.items()})

    def _new(self) -> nn.Module:
        """Return a new module of the same options."""
        raise NotImplementedError

    def _patches(self, images: Tensor) -> Tensor:
        """Validate images and cut them into patches (batch, N, prod(patch) * C).

        Values are in [0, 255].
        """
        return patchify(self._pixels(images), self._patch_size)

    def _pixels(self, images: Tensor) -> Tensor:
        """Validate images and return their values in [0, 255].

        uint8, or float32 with a ``pixel_range``.
        """
        if images.dtype not in self._image_dtypes:
            raise TypeError(f"images: expected {' or '.join(map(str, self._image_dtypes))}, got {images.dtype}")
        self._check_shape(images)
        if self._pixel_range is None:
            return images
        low, high = self._pixel_range
        return ((images.to(torch.float32) - low) * (255 / (high - low))).clamp(0, 255)

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self._image_shape:
            sizes = ", ".join(map(str, self._image_shape))
            raise ValueError(f"images: expected shape (batch, {sizes}), got {tuple(images.shape)}")

    def _check_noise(self, noise: Tensor, images: Tensor) -> None:
        if tuple(noise.shape) != (images.shape[0], self.num_tokens):
            raise ValueError(f"noise: expected shape {(images.shape[0], self.num_tokens)}, got {tuple(noise.shape)}")

    def _normalize(self, patches: Tensor) -> Tensor:
        """Normalize patches (batch, length, prod(patch) * C) per channel.

        The patches hold values in [0, 255].
        """
        pixels = self._by_channel(patches).to(self.encoder.dtype)
        return (pixels * constant_like(self._pixel_scale, pixels) + constant_like(self._pixel_shift, pixels)).flatten(
            -2
        )

    def _by_channel(self, patches: Tensor) -> Tensor:
        """Separate channels: (batch, length, P) to (batch, length, P / C, C).

        The length may be 0.
        """
        channels = self._image_shape[-1]
        return patches.reshape(*patches.shape[:2], patches.shape[2] // channels, channels)

    def _pool(self, encoded: Tensor, pool: str) -> Tensor:
        """Pool encoded tokens (batch, C + N, dim) to (batch, dim)."""
        num_class = self.encoder.class_tokens
        return (encoded[:, :num_class] if pool == "cls" else encoded[:, num_class:]).mean(1)

    def _drop_path(self, noise: Tensor, rate: float) -> Tensor | None:
        """Return the factors of branches (batch, depth, 2); None if none can be dropped."""
        if not self.training or rate == 0:
            return None
        return drop_path_scales(len(self.encoder.blocks), rate, noise)


class Method(ImageModule):
    """A masked image modelling method, from images and noise to a ``loss``.

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
        self.losses = config.losses
        self._schedule = config.schedule

    def _new(self) -> nn.Module:
        return type(self)(self.config)

    def encode(self, images: Tensor) -> Tensor:
        """Encode unmasked images (batch, image_size..., channels).

        Returns (batch, C + N, dim). The C class tokens come first.
        """
        return self.encoder(self._normalize(self._patches(images)))

    def features(self, images: Tensor, pool: Pool = "mean") -> Tensor:
        """Return one vector (batch, dim) per image.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        pool
            ``"mean"``: the mean of the encoded tokens; ``"cls"``: the class token, or the mean of several.

        Raises
        ------
        ValueError
            If the pool is unknown, or there is no class token.
        """
        self.config.check_pool(pool)
        return self._pool(self.encode(images), pool)

    def attention(self, images: Tensor) -> Tensor:
        """Return attention to patches of unmasked images, for ``throwing="weighted"``.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.

        Returns
        -------
        Tensor
            (batch, N), in raster order, in [0, 1]: the class token's attention in the last block; see
            ``prmim_core.attention_weights``.
        """
        encoder = self.encoder
        tokens = encoder.place(encoder.patch_embed(self._normalize(self._patches(images))))
        return attention_weights(encoder.cls_attention(tokens))

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return self.config.architecture()

    def no_weight_decay(self) -> frozenset[str]:
        """Return the multi-axis parameters that are exempt from weight decay.

        The recipe or a reconstruction exempts them.
        """
        return self.config.not_decayed() | no_weight_decay(self)

    def measured(self, output: Any) -> list[Tensor]:
        """Return the measured scalars of an output, in the order of ``losses``."""
        return [getattr(output, name) for name in self.losses]

    def _check_batch(self, images: Tensor, noise: Tensor) -> None:
        """Validate images and noise; an empty batch is an error, since its mean is NaN."""
        check_not_empty(images)
        self._check_noise(noise, images)

    def _check_output(self, output: Any) -> None:
        if output.plan.schedule != self._schedule:
            raise ValueError(f"output: expected one of this method, got one with the plan of {output.plan.schedule}")

    def _build_reconstruction(self, dim: int) -> ProgressiveReconstruction | None:
        """Return the reconstruction for ``dim`` channels; None without reconstruction."""
        config = self.config
        if not config.is_reconstructed:
            return None
        if config.mix_factory is not None:
            mix = config.mix_factory(dim, config.grid)
            if not callable(mix):
                how = config.in_words("reconstruction")
                raise TypeError(f"reconstruction: expected {how} to return a mixing module, got {type(mix).__name__}")
            return ProgressiveReconstruction(dim, config.grid, mix=mix)
        return ProgressiveReconstruction(
            dim,
            config.grid,
            config.reconstruction,  # type: ignore[arg-type]  # one of the choices
            heads=RECONSTRUCTION_HEADS,
            repeats=CONV_REPEATS,
        )


@dataclass
class PixelOutput:
    """Output of a method that predicts pixels; a pytree.

    Parameters
    ----------
    loss
        Scalar to minimize, float32 or wider.
    loss_decoded, loss_thrown
        Scalars: mean loss of decoded and of thrown tokens; 0 if no such token is supervised.
    loss_cells
        Scalar: mean loss of the additional cells of other tokens; 0 if there are none.
    predicted
        (batch, n, prod(patch) * C): predicted patches of ``config.patch_places``, in plan order, in the units of the
        target.
    predicted_cells
        (batch, n, prod(cells) * C): predicted cells of ``config.cell_places``, likewise; None if there are none.
    plan
        The plan of the batch.
    layer_weights
        Scalars: the weight of each fused block of the encoder, by its name in ``config.losses``; empty without fusion.
    """

    loss: Tensor
    loss_decoded: Tensor
    loss_thrown: Tensor
    loss_cells: Tensor
    predicted: Tensor
    predicted_cells: Tensor | None
    plan: Plan
    layer_weights: dict[str, Tensor] = field(default_factory=dict)


register_dataclass(PixelOutput, serialized_type_name="prmim_torch.PixelOutput")


class PixelMethod(Method):
    """A method that predicts pixels of masked tokens, or means of their cells.

    A subclass implements ``_error``.
    """

    config: PixelConfig
    reconstruct: ProgressiveReconstruction | None
    cell_head: Linear | None

    def _plan(self, noise: Tensor, weights: Tensor | None) -> Plan:
        """Choose visible, decoded and thrown tokens; with weights, mask attended ones."""
        config = self.config
        if config.needs_weights and weights is None:
            raise ValueError("weights: expected a tensor with throwing 'weighted', got None")
        if weights is not None and not config.needs_weights:
            raise ValueError("weights: expected None without throwing 'weighted', got a tensor")
        return make_plan(self._schedule, noise, **config.plan_arguments(noise, weights))

    def measured(self, output: PixelOutput) -> list[Tensor]:
        """Return the measured scalars of an output, in the order of ``losses``."""
        found = {**vars(output), **output.layer_weights}
        return [found[name] for name in self.losses]

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
            (batch, N, prod(patch) * C), in raster order, in units of [0, 1]. Visible patches are the input. Supervised
            patches are predictions; pixels of predicted cells have the value of the cell. Normalization is undone with
            the statistics of the true patch, window or image. All other patches are NaN.
        """
        patches, plan, config = self._patches(images), output.plan, self.config
        self._check_output(output)
        predicted_index = _places(plan.order, config.patch_places)
        truth = self._patch_target(patches, predicted_index)
        predicted = output.predicted.to(truth.dtype)
        predicted = self._denormalize_target(predicted, truth) if config.norm_pix else predicted
        known = [take_tokens(patches, plan.visible).to(truth.dtype) / 255, self._to_unit_range(predicted)]
        index = [plan.visible, predicted_index]
        if config.thrown_cells and output.predicted_cells is not None:
            values = output.predicted_cells[:, config.num_extra_cells :].to(truth.dtype)
            statistics = self._cell_statistics(patches, plan.thrown)
            values = values if statistics is None else denormalize_values(values, *statistics)
            known.append(self._to_unit_range(expand_cells(values, self._patch_size, config.cell_shape)))
            index.append(plan.thrown)
        pixels = torch.cat(known, dim=1)
        places = torch.cat(index, dim=1)[:, :, None].expand_as(pixels)
        return torch.full(patches.shape, torch.nan, dtype=pixels.dtype, device=pixels.device).scatter(1, places, pixels)

    def _to_unit_range(self, patches: Tensor) -> Tensor:
        """Undo the data set's normalization: (batch, n, prod(patch) * C) in [0, 1]."""
        pixels = self._by_channel(patches) - constant_like(self._pixel_shift, patches)
        return (pixels / (255 * constant_like(self._pixel_scale, patches))).flatten(-2)

    def _build_cell_head(self, dim: int) -> Linear | None:
        """Return the layer that predicts cells from ``dim`` channels; None without cells."""
        return Linear(dim, self.config.cell_dim) if self.config.cell_places else None

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the error (batch, n) of each token, a mean over its values."""
        raise NotImplementedError

    def _supervise(
        self, features: Tensor, patches: Tensor, plan: Plan, head: nn.Module, eps: float = 0.0
    ) -> PixelOutput:
        """Predict the targets of the supervised tokens and average their errors.

        Parameters
        ----------
        features
            (batch, V + M or N, dim), in plan order, starting at ``config.first_feature``.
        patches
            uint8 (batch, N, prod(patch) * C), in raster order.
        plan
            The plan of the batch.
        head
            The layer that predicts patches from features.
        eps
            Added to an image's sum of weights: 1 for a decoded token, ``thrown_weight`` for a thrown one.
        """
        config, counts, batch = self.config, plan.schedule.counts, patches.shape[0]
        predicted = head(_places(features, config.patch_places, config.first_feature))
        target = self._patch_target(patches, _places(plan.order, config.patch_places))
        errors = self._error(predicted, self._normalize_target(target) if config.norm_pix else target)
        thrown, predicted_cells = errors[:, counts.decoded :], None
        loss_cells = errors.new_zeros(())
        if self.cell_head is not None:
            predicted_cells = self.cell_head(_places(features, config.cell_places, config.first_feature))
            target = self._cell_target(patches, _places(plan.order, config.cell_places))
            cell_errors = self._error(predicted_cells, target)
            loss_cells = cell_errors[:, : config.num_extra_cells].sum() / (max(config.num_extra_cells, 1) * batch)
            thrown = cell_errors[:, config.num_extra_cells :] if config.thrown_cells else thrown
        num_thrown = thrown.shape[1]
        loss_decoded = errors[:, : counts.decoded].sum() / (max(counts.decoded, 1) * batch)
        loss_thrown = thrown.sum() / (max(num_thrown, 1) * batch)
        weight_thrown = config.thrown_weight * num_thrown
        total = counts.decoded * loss_decoded + weight_thrown * loss_thrown
        if config.num_extra_cells:
            total = total + config.extra_cells_weight * config.num_extra_cells * loss_cells
        loss = total / (counts.decoded + weight_thrown + eps)
        return PixelOutput(loss, loss_decoded, loss_thrown, loss_cells, predicted, predicted_cells, plan)

    def _patch_target(self, patches: Tensor, index: Tensor) -> Tensor:
        """Return target pixels (batch, n, prod(patch) * C), normalized per channel."""
        if self.config.low_pass is not None:
            pixels = unpatchify(patches.to(self.encoder.dtype), self._patch_size, self.config.grid)
            patches = patchify(low_pass(pixels, self.config.low_pass), self._patch_size)
        return self._normalize(take_tokens(patches, index))

    def _normalize_target(self, target: Tensor) -> Tensor:
        """Normalize target patches (batch, n, prod(patch) * C) over each patch."""
        return normalize_patches(target)

    def _denormalize_target(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Undo :meth:`_normalize_target` with the statistics of the true patches."""
        return denormalize_patches(predicted, target)

    def _cell_target(self, patches: Tensor, index: Tensor) -> Tensor:
        """Return target cells (batch, n, prod(cells) * C), normalized."""
        pixels = self._normalize(take_tokens(patches, index))
        statistics = self._cell_statistics(patches, index)
        # Normalized before averaging, so that cells of an image of one colour, whose deviation is 0, are exactly 0.
        pixels = pixels if statistics is None else normalize_values(pixels, *statistics)
        return cell_means(pixels, self._patch_size, self.config.cell_shape)

    def _cell_statistics(self, patches: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and deviation for the cells of ``index``; None: no normalization."""
        config = self.config
        if config.cell_norm == "none":
            return None
        if config.cell_norm == "image":
            return image_statistics(self._normalize(patches), config.channels)
        mean, deviation = window_statistics(self._normalize(patches), config.channels, config.grid)
        return take_tokens(mean, index), take_tokens(deviation, index)


def _places(tokens: Tensor, places: range, first: int = 0) -> Tensor:
    """Return the tokens (batch, n, ...) at some places in plan order.

    The batch starts at place ``first``.
    """
    return tokens[:, places.start - first : places.stop - first]


class FeatureMethod(Method):
    """A method that predicts features of each token."""

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
            Prediction and target (batch, N, dim) of each token, in raster order. Predictions are NaN where nothing is
            predicted.
        """
        raise NotImplementedError


def build_encoder(
    config: EncoderOptions,
    *,
    position: str | None = None,
    learned_positions: bool = False,
    mask_token: bool = False,
    final_norm: bool = True,
) -> Encoder:
    """Build a method's encoder, see :class:`prmim_torch.vit.Encoder`.

    Other arguments are those of the encoder. ``position`` defaults to the method's.
    """
    size = config.encoder_size
    return Encoder(
        config.grid.shape,
        config.patch_size,
        config.channels,
        dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        position=position or config.position,  # type: ignore[arg-type]  # one of the choices
        learned_positions=learned_positions,
        layer_scale=config.layer_scale,
        class_tokens=config.class_tokens,
        mask_token=mask_token,
        final_norm=final_norm,
        recompute=config.recompute_blocks,
    )


def check_not_empty(images: Tensor | NDArray[Any]) -> None:
    """Raise ValueError if a batch has no images."""
    if images.shape[0] == 0:
        raise ValueError("images: expected at least one image, got an empty batch")


@contextmanager
def initial_weights(init_seed: int) -> Iterator[None]:
    """Seed torch's global random state inside, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(init_seed)
        yield

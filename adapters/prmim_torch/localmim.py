"""LocalMIM: encoder layers predict the image at several scales."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from prmim_core import (
    Grid,
    Plan,
    cell_means,
    hog_pyramid,
    normalize_over_image,
    patchify,
    pool_units,
    take_tokens,
    unit_index,
    unpatchify,
)
from prmim_methods import LocalMIMConfig
from prmim_torch.method import FeatureMethod, build_encoder, initial_weights
from prmim_torch.plan import make_plan
from prmim_torch.vit import Decoder, LayerNorm, Linear


@dataclass
class LocalOutput:
    """Output of :class:`LocalMIM`; a pytree.

    Parameters
    ----------
    loss
        Scalar to minimize, float32 or wider.
    loss_decoded, loss_thrown
        Scalars: mean loss of decoded and of thrown tokens, summed over the scales; 0 if no such token is supervised.
    predicted
        (batch, supervised, values): predictions of the supervised tokens in plan order. For each scale, they are the
        token's cells in raster order, or the cell that contains the token.
    plan
        The plan of the batch.
    """

    loss: Tensor
    loss_decoded: Tensor
    loss_thrown: Tensor
    predicted: Tensor
    plan: Plan


register_dataclass(LocalOutput, serialized_type_name="prmim_torch.LocalOutput")


class ScaleHead(nn.Module):
    """Head that predicts the cells of each token at one scale.

    Parameters
    ----------
    config
        The record of the method.
    scale
        Cells along each side of a token. Below 1, inputs are features of units, and each unit is one cell.

    Notes
    -----
    The published heads are transposed convolutions on the grid of all tokens, with kernel size equal to the stride.
    They equal linear layers on each token, which work for any subset of tokens.
    """

    def __init__(self, config: LocalMIMConfig, scale: float) -> None:
        super().__init__()
        self._axes = config.grid.axes
        *finer, (_, width, values) = config.head_layers(scale)
        self.up = nn.ModuleList(Linear(inputs, outputs) for _, inputs, outputs in finer)
        self.norms = nn.ModuleList(LayerNorm(inputs) for _, inputs, _ in finer[1:])
        self.pred = Linear(width, values)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (batch, n, dim) to raster-order cells (batch, n, cells * values)."""
        batch, length, _ = features.shape
        x = features.reshape(batch * length, 1, -1)
        for number, up in enumerate(self.up):
            if number:
                x = F.gelu(self.norms[number - 1](x))
            x = up(x)
            # Each cell becomes a patch of 2 x 2 cells, which are sorted in raster order.
            x = unpatchify(x, (2,) * self._axes, Grid((2**number,) * self._axes)).flatten(1, -2)
        return self.pred(x).reshape(batch, length, -1)


class LocalMIM(FeatureMethod):
    """LocalMIM with PR-MIM; see :class:`prmim_methods.LocalMIMConfig`.

    Parameters
    ----------
    config
        The options.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = LocalMIM(LocalMIMConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32,
    ...     depth=2, num_heads=2, decoder_dim=16, decoder_heads=2))
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> noise = counter_noise(0, 0, torch.arange(2), method.config.grid.num_tokens)
    >>> output = method(images, noise)
    >>> output.predicted.shape  # 12 masked tokens, (16 + 4 + 1 + 1) cells of 27 values
    torch.Size([2, 12, 594])
    """

    config: LocalMIMConfig

    def __init__(self, config: LocalMIMConfig) -> None:
        super().__init__(config)
        encoder, size = config.encoder_size, config.decoder_size
        scales = config.scales_in_effect
        with initial_weights(config.init_seed):
            self.encoder = build_encoder(config)
            # The last decoder uses the encoder's final norm.
            self.norms = nn.ModuleList(LayerNorm(encoder.dim) for _ in scales[1:])
            self.decoders = nn.ModuleList(
                Decoder(
                    config.grid.shape,
                    encoder.dim,
                    None,
                    dim=size.dim,
                    depth=size.depth,
                    num_heads=size.heads,
                    recompute=config.recompute_blocks,
                )
                for _ in scales
            )
            self.heads = nn.ModuleList(ScaleHead(config, scale) for scale in scales)
            stages = [self._build_reconstruction(size.dim) for _ in scales]
        self.reconstruct = nn.ModuleList(stage for stage in stages if stage is not None)

    def forward(self, images: Tensor, noise: Tensor) -> LocalOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        noise
            int (batch, N), for example from ``prmim_core.counter_noise``.

        Returns
        -------
        LocalOutput

        Raises
        ------
        TypeError
            If ``images`` are of another dtype or ``noise`` does not hold real numbers.
        ValueError
            If a shape does not fit, or there are no images.
        """
        patches = self._patches(images)
        self._check_batch(images, noise)
        plan = make_plan(self._schedule, noise)
        predicted = self._predict(patches, plan)
        targets = self._targets(images, self._supervised(plan))
        # The error has the precision of the target. Under autocast, the prediction may have a lower one.
        errors = torch.stack(
            [
                (rough.to(target.dtype) - target).square().mean(-1)
                for rough, target in zip(predicted, targets, strict=True)
            ]
        ).sum(0)
        return self._output(errors, torch.cat(predicted, dim=-1), plan)

    def _predict(self, patches: Tensor, plan: Plan) -> list[Tensor]:
        """Return the predictions (batch, supervised, values) of each scale."""
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        states = encoder.hidden_states(tokens, visible)
        config, predicted = self.config, []
        norms = [*self.norms, encoder.norm]
        parts = zip(config.scales_in_effect, config.layers_in_effect, norms, self.decoders, self.heads, strict=True)
        for number, (scale, layer, norm, decoder, head) in enumerate(parts):
            features = decoder(norm(states[layer]), plan.known(1))
            if self.reconstruct:
                features = self.reconstruct[number](features, plan)
            predicted.append(self._predict_scale(scale, head, features, plan))
        return predicted

    def _predict_scale(self, scale: float, head: nn.Module, features: Tensor, plan: Plan) -> Tensor:
        """Predict from features (batch, V + M or N, dim): (batch, supervised, values)."""
        if scale >= 1:
            first = plan.schedule.counts.visible
            return head(features[:, first : first + self.config.num_supervised])
        unit = self.config.unit
        cells = head(pool_units(features, plan, unit))
        return take_tokens(cells, unit_index(plan.schedule.grid, unit, self._supervised(plan)))

    def _supervised(self, plan: Plan) -> Tensor:
        """Return the supervised tokens: int (batch, supervised)."""
        return plan.masked[:, : self.config.num_supervised]

    def _targets(self, images: Tensor, index: Tensor) -> list[Tensor]:
        """Return the targets (batch, n, values) of the tokens ``index`` at each scale."""
        config = self.config
        targets = []
        for scale, cells in zip(config.scales_in_effect, self._cell_maps(images), strict=True):
            if scale >= 1:
                targets.append(take_tokens(patchify(cells, (int(scale),) * config.grid.axes), index))
            else:
                targets.append(take_tokens(cells.flatten(1, -2), unit_index(config.grid, config.unit, index)))
        return targets

    def _cell_maps(self, images: Tensor) -> list[Tensor]:
        """Return the targets of all cells, (batch, cells..., values) for each scale."""
        config, dtype = self.config, self.encoder.cls_token.dtype
        images = self._pixels(images)
        if config.target == "hog":
            # Computed from unnormalized pixels: their gradients are exact, and histograms ignore the scale.
            return hog_pyramid(images.to(dtype), config.cell_sizes, config.bins)  # type: ignore[arg-type]  # two axes
        pixels = self._normalize(images.reshape(images.shape[0], 1, -1))  # the image as one patch
        pixels = normalize_over_image(pixels, pixels, config.channels)
        maps = []
        for shape in config.map_shapes:
            means = cell_means(pixels, config.image_size, shape)
            maps.append(means.reshape(images.shape[0], *shape, config.channels))
        return maps

    def _output(self, errors: Tensor, predicted: Tensor, plan: Plan) -> LocalOutput:
        """Average the errors (batch, supervised) of the tokens."""
        decoded = plan.schedule.counts.decoded
        num_thrown = errors.shape[1] - decoded
        loss_decoded = errors[:, :decoded].sum() / (max(decoded, 1) * len(errors))
        loss_thrown = errors[:, decoded:].sum() / (max(num_thrown, 1) * len(errors))
        weight_thrown = self.config.thrown_weight * num_thrown
        loss = (decoded * loss_decoded + weight_thrown * loss_thrown) / (decoded + weight_thrown)
        return LocalOutput(loss, loss_decoded, loss_thrown, predicted, plan)

    def compared_features(self, images: Tensor, output: LocalOutput) -> tuple[Tensor, Tensor]:
        """Return predictions and targets of all scales.

        See :meth:`FeatureMethod.compared_features`.
        """
        self._check_output(output)
        every = torch.arange(self.num_tokens, device=images.device).expand(images.shape[0], -1)
        target = torch.cat(self._targets(images, every), dim=-1)
        predicted = output.predicted.to(target.dtype)
        places = self._supervised(output.plan)[:, :, None].expand_as(predicted)
        return torch.full_like(target, torch.nan).scatter(1, places, predicted), target

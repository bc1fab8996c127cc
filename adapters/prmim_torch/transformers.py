"""ViTMAE of transformers with PR-MIM. Needs the extra ``hf``."""

from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, initialization
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput
from transformers.utils.generic import can_return_tuple

from prmim_core import (
    Grid,
    Plan,
    Schedule,
    count_tokens,
    denormalize_values,
    expand_cells,
    image_statistics,
    offset_squared_distances,
    patch_grid,
    take_tokens,
)
from prmim_methods.positions import offset_matrix, sincos_table
from prmim_torch.pixel_loss import PixelLoss
from prmim_torch.plan import make_plan
from prmim_torch.reconstruct import ProgressiveReconstruction, no_weight_decay
from prmim_torch.vit import Linear

THROWING = ("furthest", "random")


class PRViTMAEConfig(ViTMAEConfig):
    """Options of :class:`PRViTMAEForPreTraining`, in addition to ``ViTMAEConfig``.

    Parameters
    ----------
    throw_ratio
        Fraction of all tokens that is thrown; 0 is the dense method. It may change during training.
    stages
        Number of stages of the reconstruction.
    throwing
        Choice of decoded tokens, ``"furthest"`` or ``"random"``.
    reconstruction
        ``"kernel"``, ``"interpolate"`` or ``"conv"``, see :class:`prmim_torch.ProgressiveReconstruction`.
    cells
        Cells that a thrown token predicts along each side of its patch; None: 2, or 1 if the side is odd.
    """

    # The type of the parent, so that AutoModel and ViTMAE load the folders too, and ignore the new parts.
    model_type = "vit_mae"

    throw_ratio: float | int = 0.5
    stages: int = 2
    throwing: str = "furthest"
    reconstruction: str = "kernel"
    cells: int | None = None


class PRViTMAEForPreTraining(ViTMAEForPreTraining):
    """Drop-in replacement of ``transformers.ViTMAEForPreTraining`` with PR-MIM.

    Parameters
    ----------
    config
        A :class:`PRViTMAEConfig`, or a ``ViTMAEConfig`` for our defaults.

    Raises
    ------
    ValueError
        If an option is out of range, or images or patches are not square.

    Notes
    -----
    ``from_pretrained`` loads checkpoints of ViTMAE too. It then reports the weights of ``pixel_loss`` as missing; they
    keep their initial values. Names: ``pixel_loss.reconstruct_norm`` is ``reconstruct`` of :class:`prmim_torch.MAE`,
    and ``pixel_loss.cell_head`` its ``cell_head``.

    New models have sine-cosine position tables; those of ViTMAE in transformers 5.23 are zeros.

    Examples
    --------
    >>> import torch
    >>> encoder = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...     intermediate_size=32)
    >>> decoder = {f"decoder_{name}": value for name, value in encoder.items()}
    >>> config = PRViTMAEConfig(image_size=32, patch_size=8, **encoder, **decoder)
    >>> model = PRViTMAEForPreTraining(config)
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 16, 192])
    """

    config: PRViTMAEConfig
    config_class = PRViTMAEConfig

    def __init__(self, config: ViTMAEConfig) -> None:
        if not isinstance(config, PRViTMAEConfig):
            config = PRViTMAEConfig.from_dict(config.to_dict())
        side, patch = _sides(config)
        patch_size = (patch, patch)
        grid = patch_grid((side, side), patch_size)
        super().__init__(config)
        self.grid = grid
        schedule = self._schedule(grid)
        if schedule.throwing not in THROWING:
            raise ValueError(f"throwing: expected one of {', '.join(THROWING)}, got {schedule.throwing!r}")
        self.pixel_loss = PixelLoss(
            ProgressiveReconstruction(config.decoder_hidden_size, grid, config.reconstruction),  # type: ignore[arg-type]
            patch_size,
            config.num_channels,
            norm_pix=config.norm_pix_loss,
            cells=config.cells,
        )
        self.post_init()

    def no_weight_decay(self) -> frozenset[str]:
        """Return multi-axis parameters without weight decay, for timm's optimizers."""
        return no_weight_decay(self)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> ViTMAEForPreTrainingOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        pixel_values
            float (batch, channels, height, width), as from a ``ViTImageProcessor``.
        noise
            (batch, N), any real dtype; the tokens of lowest noise are visible, as in ``ViTMAEForPreTraining``. None:
            ``torch.rand``, so that equal random states mask the same tokens as there.
        interpolate_pos_encoding, attention_mask, **kwargs
            As for ``ViTMAEForPreTraining``. For images of another size, the reconstruction interpolates its table.

        Returns
        -------
        ViTMAEForPreTrainingOutput
            As of ``ViTMAEForPreTraining``. In ``logits`` (batch, N, patch_size ** 2 * channels), in raster order,
            thrown tokens have the value of a cell in all its pixels, in the units of the target. ``mask`` is 1 at all
            masked tokens, decoded or thrown.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        if pixel_values is None or pixel_values.ndim != 4:
            got = "None" if pixel_values is None else f"shape {tuple(pixel_values.shape)}"
            raise ValueError(f"pixel_values: expected shape (batch, channels, height, width), got {got}")
        interpolate = bool(interpolate_pos_encoding)
        grid = patch_grid(tuple(pixel_values.shape[2:]), self.pixel_loss.patch_size) if interpolate else self.grid
        schedule, shape = self._schedule(grid), (pixel_values.shape[0], grid.num_tokens)
        if noise is None:
            noise = torch.rand(shape, device=pixel_values.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
        encoded = self.vit(
            pixel_values,
            noise=noise,
            interpolate_pos_encoding=interpolate,
            attention_mask=attention_mask,
            **kwargs,
        )
        # The order of the encoder, because its sort is not stable.
        visible = encoded.ids_restore.argsort(dim=1)[:, : schedule.counts.visible]
        plan = make_plan(schedule, noise, visible=visible)
        features = self._decode(encoded.last_hidden_state, plan, interpolate)
        patches = self.patchify(pixel_values, interpolate_pos_encoding=interpolate).float()
        self.pixel_loss.norm_pix = self.config.norm_pix_loss  # like all options, it may change between steps
        pixel_loss = self.pixel_loss if grid == self.grid else _resized(self.pixel_loss, grid)
        predicted, cells = pixel_loss.predict(features, plan, self.decoder.decoder_pred)
        return ViTMAEForPreTrainingOutput(
            loss=pixel_loss.errors(predicted, cells, plan, patches).mean(),
            logits=self._logits(features[:, : schedule.counts.visible], predicted, cells, plan, patches),
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _schedule(self, grid: Grid) -> Schedule:
        config = self.config
        counts = count_tokens(grid.num_tokens, config.mask_ratio, config.throw_ratio, rounding="mae_float")
        return Schedule(grid, counts, stages=config.stages, throwing=config.throwing)  # type: ignore[arg-type]

    def _decode(self, encoded: Tensor, plan: Plan, interpolate: bool) -> Tensor:
        """Decode (batch, 1 + V, dim) to (batch, V + M, decoder dim), in plan order."""
        decoder = self.decoder
        x = decoder.decoder_embed(encoded)
        mask_tokens = decoder.mask_token.expand(*plan.decoded.shape, -1).to(x.dtype)
        table: Tensor = decoder.decoder_pos_embed
        if interpolate:  # only the shape of its argument is used
            table = decoder.interpolate_pos_encoding(x.new_empty(1, 1 + plan.schedule.grid.num_tokens, 0))
        places = take_tokens(table[:, 1:], plan.known(1))
        x = torch.cat([x[:, :1] + table[:, :1], torch.cat([x[:, 1:], mask_tokens], dim=1) + places], dim=1)
        for layer in decoder.decoder_layers:
            x = layer(x)
        return decoder.decoder_norm(x)[:, 1:]

    def _logits(self, visible: Tensor, predicted: Tensor, cells: Tensor, plan: Plan, patches: Tensor) -> Tensor:
        """Return all predicted patches (batch, N, prod(patch) * C), in raster order."""
        truth = take_tokens(patches, plan.thrown)
        values = denormalize_values(cells.float(), *image_statistics(patches, self.config.num_channels))
        pixels = expand_cells(values, self.pixel_loss.patch_size, self.pixel_loss.cell_shape)
        if self.pixel_loss.norm_pix:
            centred = truth - truth.mean(-1, keepdim=True)
            variance = centred.square().sum(-1, keepdim=True) / (truth.shape[-1] - 1)
            pixels = (pixels - truth + centred) / (variance + 1e-6).sqrt()
        known = torch.cat([self.decoder.decoder_pred(visible), predicted], dim=1)
        return take_tokens(torch.cat([known, pixels.to(known.dtype)], dim=1), plan.restore)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialize new weights; called by transformers, which marks loaded weights."""
        super().initialize_weights()
        # transformers 5.23 leaves fixed position tables and tokens of new models at 0.
        embeddings, decoder, (side, patch) = self.vit.embeddings, self.decoder, _sides(self.config)
        for table in (embeddings.position_embeddings, decoder.decoder_pos_embed):
            initialization.copy_(table, torch.from_numpy(sincos_table((side // patch,) * 2, table.shape[-1])))
        for token in (embeddings.cls_token, decoder.mask_token):
            initialization.normal_(token, std=self.config.initializer_range)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the new weights of a module."""
        super()._init_weights(module)
        if isinstance(module, ProgressiveReconstruction):
            with torch.device("cpu"):
                new = ProgressiveReconstruction(module.dim, module.grid, self.config.reconstruction)  # type: ignore[arg-type]
            for name, parameter in new.named_parameters():
                initialization.copy_(module.get_parameter(name), parameter)
        elif isinstance(module, Linear):
            initialization.xavier_uniform_(module.weight)


def _sides(config: ViTMAEConfig) -> tuple[int, int]:
    """Return the pixels along the sides of an image, and of a patch."""
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) and len({*size}) == 1:
        size = size[0]
    for name, value in (("image_size", size), ("patch_size", patch)):
        if not isinstance(value, int):
            raise ValueError(f"{name}: expected one number for both sides, as ViTMAE needs it, got {value}")
    return cast("tuple[int, int]", (size, patch))


def _resized(pixel_loss: PixelLoss, grid: Grid) -> PixelLoss:
    """Return a loss on another grid, with shared parameters."""
    resized, reconstruct = copy(pixel_loss), copy(pixel_loss.reconstruct_norm)
    reconstruct.grid = grid
    if reconstruct.reconstruction == "kernel":
        reconstruct._parameters = {}
        reconstruct.table = _resized_table(pixel_loss.reconstruct_norm, grid)  # type: ignore[assignment]  # a view of one
    resized._modules = {**pixel_loss._modules, "reconstruct_norm": reconstruct}
    return resized


def _resized_table(reconstruct: ProgressiveReconstruction, grid: Grid) -> Tensor:
    """Return the table (heads, offsets) for another grid.

    Equals :func:`prmim_methods.positions.fit_positions`.
    """
    table, before = reconstruct.table, reconstruct.grid
    start, new_start = (torch.from_numpy(-offset_squared_distances(each)).to(table) for each in (before, grid))
    rows, columns = (
        torch.from_numpy(offset_matrix(*sizes)).to(table) for sizes in zip(before.shape, grid.shape, strict=True)
    )
    learned = (table - start).unflatten(1, (rows.shape[1], columns.shape[1]))
    return new_start + (rows @ learned @ columns.mT).flatten(1)

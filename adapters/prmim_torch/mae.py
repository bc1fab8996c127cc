"""Masked autoencoder with partial and progressive reconstruction."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from prmim_core import Plan, take_tokens
from prmim_methods import MAEConfig
from prmim_torch.cross_decoder import CrossDecoder
from prmim_torch.fusion import Fusion
from prmim_torch.method import PixelMethod, PixelOutput, build_encoder, initial_weights
from prmim_torch.vit import Decoder


class MAE(PixelMethod):
    """MAE with PR-MIM; see :class:`prmim_methods.MAEConfig`.

    Parameters
    ----------
    config
        The options.

    Notes
    -----
    Pixels stay uint8 until they are gathered along the plan; only visible patches are embedded.

    With ``decoder="cross"``, the encoder's final norm takes no part in the loss. It keeps its initial weights, which
    are part of weight files.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = MAE(MAEConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1,
    ...     num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2))
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> noise = counter_noise(0, 0, torch.arange(2), method.config.grid.num_tokens)
    >>> output = method(images, noise)
    >>> output.predicted.shape, output.predicted_cells.shape
    (torch.Size([2, 4, 192]), torch.Size([2, 8, 12]))
    """

    config: MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        with initial_weights(config.init_seed):
            self.encoder = build_encoder(config)
            self.decoder = _build_decoder(config)
            if config.is_cross:
                self.encoder.norm.requires_grad_(False)
            self.reconstruct = self._build_reconstruction(config.decoder_dim)
            self.cell_head = self._build_cell_head(config.decoder_dim)
            self.fusion = Fusion(config.encoder_size.dim, config.fused_blocks) if config.fused_blocks else None

    def forward(self, images: Tensor, noise: Tensor, weights: Tensor | None = None) -> PixelOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        noise
            int (batch, N), for example from ``prmim_core.counter_noise``. In training mode, it also determines the
            branches that drop path drops.
        weights
            float (batch, N), for ``throwing="weighted"`` only, for example from :meth:`attention`. Attended tokens
            tend to be masked.

        Returns
        -------
        PixelOutput

        Raises
        ------
        TypeError
            If ``images`` are of another dtype or ``noise`` does not hold real numbers.
        ValueError
            If a shape does not fit, there are no images, or weights are missing or not needed.
        """
        patches = self._patches(images)
        self._check_batch(images, noise)
        plan = self._plan(noise, weights)
        features = self._decode(self._normalize(take_tokens(patches, plan.visible)), plan, noise)
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        output = self._supervise(features, patches, plan, self.decoder.pred)
        return output if self.fusion is None else replace(output, layer_weights=self.fusion.named_weights())

    def _decode(self, visible: Tensor, plan: Plan, noise: Tensor) -> Tensor:
        """Encode visible patches and decode: features from ``config.first_feature`` on."""
        encoder, scales = self.encoder, self._drop_path(noise, self.config.drop_path)
        if isinstance(self.decoder, Decoder) and self.fusion is None:
            return self.decoder(encoder(visible, plan.visible, scales), self._decoder_index(plan, noise))
        tokens = encoder.place(encoder.patch_embed(visible), plan.visible)
        layers = encoder.hidden_states(tokens, plan.visible, scales)
        if self.fusion is None:
            return self.decoder(layers, plan.decoded)
        return self.decoder(encoder.norm(self.fusion(layers)), self._decoder_index(plan, noise))

    def _decoder_index(self, plan: Plan, noise: Tensor) -> Tensor:
        """Return the tokens that a self-attention decoder sees, visible ones first."""
        return plan.known(1)

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        # The error has the precision of the target. Under autocast, the prediction may have a lower one.
        return (predicted.to(target.dtype) - target).square().mean(-1)


def _build_decoder(config: MAEConfig) -> Decoder | CrossDecoder:
    size, encoder, grid_shape = config.decoder_size, config.encoder_size, config.grid.shape
    shared: dict[str, Any] = {
        "dim": size.dim,
        "depth": size.depth,
        "num_heads": size.heads,
        "position": config.position,
        "class_tokens": config.class_tokens,
        "recompute": config.recompute_blocks,
    }
    if config.is_cross:
        visible_features = config.has_visible_features
        return CrossDecoder(
            grid_shape, encoder.dim, encoder.depth, config.patch_dim, visible_features=visible_features, **shared
        )
    return Decoder(grid_shape, encoder.dim, config.patch_dim, embed_bias=config.embed_bias, **shared)

"""Masked autoencoder with partial and progressive reconstruction."""

from torch import Tensor

from prmim_core import take_tokens
from prmim_methods import MAEConfig
from prmim_torch.method import PixelMethod, PixelOutput, build_encoder, initial_weights
from prmim_torch.plan import make_plan
from prmim_torch.vit import Decoder


class MAE(PixelMethod):
    """Masked autoencoder with partial and progressive reconstruction; see :class:`prmim_methods.MAEConfig`.

    Parameters
    ----------
    config
        The options.

    Notes
    -----
    Pixels stay uint8 until they are gathered along the plan; only visible patches are embedded.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = MAE(MAEConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1, num_heads=2,
    ...                        decoder_dim=16, decoder_depth=1, decoder_heads=2))
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> output = method(images, counter_noise(0, 0, torch.arange(2), method.config.grid.num_tokens))
    >>> output.predicted.shape, output.predicted_cells.shape
    (torch.Size([2, 4, 192]), torch.Size([2, 8, 12]))
    """

    config: MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        size = config.decoder_size
        with initial_weights(config.init_seed):
            self.encoder = build_encoder(config)
            self.decoder = Decoder(
                config.grid.shape,
                config.encoder_size.dim,
                config.patch_dim,
                dim=size.dim,
                depth=size.depth,
                num_heads=size.heads,
                recompute=config.recompute_blocks,
            )
            self.reconstruct = self._build_reconstruction(size.dim)
            self.cell_head = self._build_cell_head(size.dim)

    def forward(self, images: Tensor, noise: Tensor) -> PixelOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        noise
            int (batch, N), for example from ``prmim_core.counter_noise``.

        Returns
        -------
        PixelOutput

        Raises
        ------
        TypeError
            If ``images`` are not uint8 or ``noise`` does not hold real numbers.
        ValueError
            If a shape does not fit, or there are no images.
        """
        patches = self._patches(images)
        self._check_batch(images, noise)
        plan = make_plan(self._schedule, noise)
        encoded = self.encoder(self._normalize(take_tokens(patches, plan.visible)), plan.visible)
        features = self.decoder(encoded, plan.known(1))
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        return self._supervise(features, patches, plan, self.decoder.pred)

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        # The error has the precision of the target; under autocast, the prediction can have a lower one.
        return (predicted.to(target.dtype) - target).square().mean(-1)

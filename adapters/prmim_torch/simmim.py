"""SimMIM: mask tokens in the encoder, and a linear head."""

from math import prod, sqrt

import torch
from torch import Tensor, nn

from prmim_core import Plan, take_tokens
from prmim_methods import SimMIMConfig
from prmim_torch.method import PixelMethod, PixelOutput, build_encoder, initial_weights
from prmim_torch.vit import Block, Encoder, Linear, PatchProjection

LOSS_EPS = 1e-5


class SimMIM(PixelMethod):
    """SimMIM with PR-MIM; see :class:`prmim_methods.SimMIMConfig`.

    Parameters
    ----------
    config
        The options.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = SimMIM(SimMIMConfig(image_size=(32, 32), patch_size=(4, 4), embed_dim=32, depth=1,
    ...     num_heads=2))
    >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> noise = counter_noise(0, 0, torch.arange(2), method.config.grid.num_tokens)
    >>> output = method(images, noise)
    >>> output.predicted.shape, output.predicted_cells.shape
    (torch.Size([2, 24, 48]), torch.Size([2, 16, 12]))
    """

    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__(config)
        dim = config.encoder_size.dim
        with initial_weights(config.init_seed):
            self.encoder = build_encoder(config, mask_token=True)
            self.head = Linear(dim, config.patch_dim)
            # The official head is a convolution, initialized by PyTorch's default.
            for parameter in (self.head.bias, self.head.weight):
                nn.init.uniform_(parameter, -1 / sqrt(dim), 1 / sqrt(dim))
            self.reconstruct = self._build_reconstruction(dim)
            _initialize(self.encoder)
            self.cell_head = self._build_cell_head(dim)

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
            float (batch, N), for ``throwing="weighted"`` only, for example from :meth:`attention`. Attended units tend
            to be masked.

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
        features = self._encode_known(patches, plan, self._drop_path(noise, self.config.drop_path))
        if self.reconstruct is not None:
            features = self.reconstruct(features, plan)
        eps = LOSS_EPS / (prod(self._patch_size) * images.shape[0])
        return self._supervise(features, patches, plan, self.head, eps)

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        # The error has the precision of the target. Under autocast, the prediction may have a lower one.
        return (predicted.to(target.dtype) - target).abs().mean(-1)

    def _encode_known(self, patches: Tensor, plan: Plan, scales: Tensor | None) -> Tensor:
        """Encode visible and decoded tokens, in plan order: (batch, V + M, dim)."""
        encoder, counts = self.encoder, plan.schedule.counts
        visible = encoder.patch_embed(self._normalize(take_tokens(patches, plan.visible)))
        hidden = encoder.mask_token.expand(visible.shape[0], counts.decoded, -1)
        tokens = torch.cat([visible.to(hidden.dtype), hidden], dim=1)
        if counts.thrown:
            index = plan.known(1)
            return encoder.encode(encoder.place(tokens, index), index, scales)[:, 1:]
        # All tokens are known. In raster order, all images share one relative bias, instead of one table per image.
        tokens = take_tokens(tokens, plan.restore)
        return take_tokens(encoder.encode(encoder.place(tokens), None, scales)[:, 1:], plan.order)


def _initialize(encoder: Encoder) -> None:
    """Draw the encoder's weights as in SimMIM.

    Norms, LayerScale and the relative bias are unchanged.
    """
    for part in encoder.modules():
        if isinstance(part, nn.Linear | PatchProjection):
            _truncated_normal(part.weight)
            nn.init.zeros_(part.bias)
    for token in (encoder.cls_token, encoder.mask_token):
        _truncated_normal(token)
    blocks = (part for part in encoder.modules() if isinstance(part, Block))
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            block.attn.proj.weight /= sqrt(2 * number)
            block.mlp.fc2.weight /= sqrt(2 * number)


def _truncated_normal(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)

"""VideoMAE and VideoMAE V2: masked autoencoders of clips."""

import torch
from torch import Tensor

from prmim_core import Plan, cell_decoded, denormalize_values, normalize_values, patch_statistics
from prmim_methods import VideoMAEConfig
from prmim_torch.mae import MAE
from prmim_torch.vit import constant_like

NORM_EPS = 1e-6
"""Added to the deviation of a channel of a patch, in units of [0, 1]."""


class VideoMAE(MAE):
    """VideoMAE with PR-MIM; see :class:`prmim_methods.VideoMAEConfig`.

    Parameters
    ----------
    config
        The options.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import counter_noise
    >>> method = VideoMAE(VideoMAEConfig(image_size=(4, 16, 32), patch_size=(2, 8, 8),
    ...     mask_ratio=0.75, embed_dim=24, depth=1, num_heads=2,
    ...     decoder_dim=12, decoder_depth=1, decoder_heads=2))
    >>> clips = torch.zeros(2, 4, 16, 32, 3, dtype=torch.uint8)
    >>> noise = counter_noise(0, 0, torch.arange(2), method.config.grid.num_tokens)
    >>> output = method(clips, noise)
    >>> output.predicted.shape, output.predicted_cells.shape
    (torch.Size([2, 4, 384]), torch.Size([2, 8, 24]))
    """

    config: VideoMAEConfig

    def _decode(self, visible: Tensor, plan: Plan, noise: Tensor) -> Tensor:
        """Encode visible patches and decode, without features of repeated tokens."""
        return super()._decode(visible, plan, noise)[:, : plan.schedule.num_known(1)]

    def _decoder_index(self, plan: Plan, noise: Tensor) -> Tensor:
        """Return the tokens that the decoder sees; a dual mask repeats visible tokens."""
        if not self.config.is_dual:
            return plan.known(1)
        repeated = cell_decoded(plan.schedule.grid, self.config.num_repeated, noise, plan.mask)
        return torch.cat([plan.known(1), repeated], dim=1)

    def _normalize_target(self, target: Tensor) -> Tensor:
        """Normalize target patches (batch, n, prod(patch) * C) per channel or per patch."""
        if self.config.norm_over == "patch":
            return super()._normalize_target(target)
        return normalize_values(target, *self._channel_statistics(target), eps=0)

    def _denormalize_target(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Undo :meth:`_normalize_target` with the statistics of the true patches."""
        if self.config.norm_over == "patch":
            return super()._denormalize_target(predicted, target)
        return denormalize_values(predicted, *self._channel_statistics(target), eps=0)

    def _channel_statistics(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation plus eps per channel of patches, in target units."""
        mean, deviation = patch_statistics(target, self.config.channels)
        eps = constant_like([NORM_EPS / std for std in self.config.pixel_std], target)
        return mean, deviation + eps

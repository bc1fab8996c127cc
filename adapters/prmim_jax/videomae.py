"""VideoMAE and VideoMAE V2: masked autoencoders of clips."""

import jax.numpy as jnp
from jax import Array

from prmim_core import Plan, cell_decoded, denormalize_values, normalize_values, patch_statistics
from prmim_jax.mae import MAE
from prmim_methods import VideoMAEConfig

NORM_EPS = 1e-6
"""Added to the deviation of a channel of a patch, in units of [0, 1]."""


class VideoMAE(MAE):
    """VideoMAE with PR-MIM; see :class:`prmim_methods.VideoMAEConfig`.

    Parameters
    ----------
    config
        The options.
    rngs, dtype
        See :class:`prmim_jax.MAE`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from prmim_core import counter_noise
    >>> method = VideoMAE(VideoMAEConfig(image_size=(4, 16, 32), patch_size=(2, 8, 8),
    ...     mask_ratio=0.75, embed_dim=24, depth=1, num_heads=2,
    ...     decoder_dim=12, decoder_depth=1, decoder_heads=2))
    >>> clips = jnp.zeros((2, 4, 16, 32, 3), jnp.uint8)
    >>> noise = counter_noise(0, 0, jnp.arange(2), method.config.grid.num_tokens)
    >>> output = nnx.jit(method)(clips, noise)
    >>> output.predicted.shape, output.predicted_cells.shape
    ((2, 4, 384), (2, 8, 24))
    """

    config: VideoMAEConfig

    def _decode(self, visible: Array, plan: Plan, noise: Array) -> Array:
        """Encode visible patches and decode, without features of repeated tokens."""
        return super()._decode(visible, plan, noise)[:, : plan.schedule.num_known(1)]

    def _decoder_index(self, plan: Plan, noise: Array) -> Array:
        """Return the tokens that the decoder sees; a dual mask repeats visible tokens."""
        if not self.config.is_dual:
            return plan.known(1)
        repeated = cell_decoded(plan.schedule.grid, self.config.num_repeated, noise, plan.mask)
        return jnp.concatenate([plan.known(1), repeated], axis=1)

    def _normalize_target(self, target: Array) -> Array:
        """Normalize target patches (batch, n, prod(patch) * C) per channel or per patch."""
        if self.config.norm_over == "patch":
            return super()._normalize_target(target)
        return normalize_values(target, *self._channel_statistics(target), eps=0)

    def _denormalize_target(self, predicted: Array, target: Array) -> Array:
        """Undo :meth:`_normalize_target` with the statistics of the true patches."""
        if self.config.norm_over == "patch":
            return super()._denormalize_target(predicted, target)
        return denormalize_values(predicted, *self._channel_statistics(target), eps=0)

    def _channel_statistics(self, target: Array) -> tuple[Array, Array]:
        """Return mean and deviation plus eps per channel of patches, in target units."""
        mean, deviation = patch_statistics(target, self.config.channels)
        eps = jnp.asarray([NORM_EPS / std for std in self.config.pixel_std], target.dtype)
        return mean, deviation + eps

"""Masked autoencoder with partial and progressive reconstruction."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from prmim_core import take_tokens
from prmim_jax.method import PixelMethod, PixelOutput, build_encoder
from prmim_jax.plan import make_plan
from prmim_jax.vit import Decoder
from prmim_methods import MAEConfig


class MAE(PixelMethod):
    """Masked autoencoder with partial and progressive reconstruction; see :class:`prmim_methods.MAEConfig`.

    Parameters
    ----------
    config
        The options.
    rngs
        Source of the initial weights; None: seeded with ``config.init_seed``.
    dtype
        Dtype of the matrix products, for example ``jax.numpy.bfloat16``; None: float32.

    Notes
    -----
    Pixels stay uint8 until they are gathered along the plan; only visible patches are embedded. The output is a pure
    function of weights, images and noise, for ``jax.jit``, ``jax.grad``, ``jax.vmap`` and ``jax.checkpoint``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import counter_noise
    >>> method = MAE(MAEConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32, depth=1, num_heads=2,
    ...                        decoder_dim=16, decoder_depth=1, decoder_heads=2))
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> output = method(images, counter_noise(0, 0, jnp.arange(2), method.config.grid.num_tokens))
    >>> output.predicted.shape, output.predicted_cells.shape
    ((2, 4, 192), (2, 8, 12))
    """

    config: MAEConfig

    def __init__(self, config: MAEConfig, rngs: nnx.Rngs | None = None, dtype: DTypeLike | None = None) -> None:
        super().__init__(config)
        rngs = nnx.Rngs(config.init_seed) if rngs is None else rngs
        size = config.decoder_size
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(
            config.grid.shape,
            config.encoder_size.dim,
            config.patch_dim,
            dim=size.dim,
            depth=size.depth,
            num_heads=size.heads,
            recompute=config.recompute_blocks,
            scan=config.scan_blocks,
            dtype=dtype,
            rngs=rngs,
        )
        self.reconstruct = self._build_reconstruction(size.dim, dtype)
        self.cell_head = self._build_cell_head(size.dim, dtype, rngs)

    def __call__(self, images: Array, noise: Array) -> PixelOutput:
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

    def _error(self, predicted: Array, target: Array) -> Array:
        # The error has the precision of the target; the prediction can have a lower one.
        return jnp.square(predicted.astype(target.dtype) - target).mean(-1)

"""SimMIM: mask tokens in the encoder, and a linear head."""

from collections.abc import Sequence
from math import prod, sqrt

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from prmim_core import Plan, take_tokens
from prmim_jax.method import PixelMethod, PixelOutput, build_encoder
from prmim_jax.vit import BLOCK, Encoder, Linear, constant, draw, uniform
from prmim_methods import SimMIMConfig

LOSS_EPS = 1e-5


class SimMIM(PixelMethod):
    """SimMIM with PR-MIM; see :class:`prmim_methods.SimMIMConfig`.

    Parameters
    ----------
    config
        The options.
    rngs
        Source of the initial weights; None: seeded with ``config.init_seed``.
    dtype
        Dtype of the matrix products, for example ``jax.numpy.bfloat16``; None: float32.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from prmim_core import counter_noise
    >>> method = SimMIM(SimMIMConfig(image_size=(32, 32), patch_size=(4, 4), embed_dim=32, depth=1,
    ...     num_heads=2))
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> noise = counter_noise(0, 0, jnp.arange(2), method.config.grid.num_tokens)
    >>> output = nnx.jit(method)(images, noise)
    >>> output.predicted.shape, output.predicted_cells.shape
    ((2, 24, 48), (2, 16, 12))
    """

    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, rngs: nnx.Rngs | None = None, dtype: DTypeLike | None = None) -> None:
        super().__init__(config)
        rngs = nnx.Rngs(config.init_seed) if rngs is None else rngs
        dim = config.encoder_size.dim
        self.encoder = build_encoder(config, mask_token=True, dtype=dtype, rngs=rngs)
        self.head = Linear(dim, config.patch_dim, dtype=dtype, rngs=rngs)
        # The official head is a convolution, initialized by PyTorch's default.
        for parameter in (self.head.weight, self.head.bias):
            parameter.set_value(uniform(rngs, parameter.shape, 1 / sqrt(dim)))
        self.reconstruct = self._build_reconstruction(dim, dtype, rngs)
        _initialize(self.encoder, rngs)
        self.cell_head = self._build_cell_head(dim, dtype, rngs)

    def __call__(self, images: Array, noise: Array, weights: Array | None = None) -> PixelOutput:
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

    def _error(self, predicted: Array, target: Array) -> Array:
        # The error has the precision of the target. The prediction may have a lower one.
        return jnp.abs(predicted.astype(target.dtype) - target).mean(-1)

    def _encode_known(self, patches: Array, plan: Plan, scales: Array | None) -> Array:
        """Encode visible and decoded tokens, in plan order: (batch, V + M, dim)."""
        encoder, counts = self.encoder, plan.schedule.counts
        visible = encoder.patch_embed(self._normalize(take_tokens(patches, plan.visible)))
        hidden = jnp.broadcast_to(encoder.mask_token[...], (visible.shape[0], counts.decoded, visible.shape[-1]))
        tokens = jnp.concatenate([visible, hidden], axis=1)
        if counts.thrown:
            index = plan.known(1)
            return encoder.encode(encoder.place(tokens, index), index, scales)[:, 1:]
        # All tokens are known. In raster order, all images share one relative bias, instead of one table per image.
        tokens = take_tokens(tokens, plan.restore)
        return take_tokens(encoder.encode(encoder.place(tokens), None, scales)[:, 1:], plan.order)


def _initialize(encoder: Encoder, rngs: nnx.Rngs) -> None:
    """Draw the encoder's weights as in SimMIM.

    Norms, LayerScale and the relative bias are unchanged.
    """
    attn, mlp = encoder.blocks.attn, encoder.blocks.mlp
    layers = (attn.proj, attn.qkv, mlp.fc1, mlp.fc2)
    stacks: list[list[Array]] = [[] for _ in layers]
    for number in range(1, len(attn.proj.weight) + 1):
        for layer, stack in zip(layers, stacks, strict=True):
            weight = _truncated_normal(rngs, layer.weight.shape[1:])
            stack.append(weight / sqrt(2 * number) if layer is attn.proj or layer is mlp.fc2 else weight)
    for layer, stack in zip(layers, stacks, strict=True):
        layer.weight.set_value(jnp.stack(stack))
    projection = encoder.patch_embed.proj
    for parameter in (projection.weight, encoder.cls_token, encoder.mask_token):
        parameter.set_value(_truncated_normal(rngs, parameter.shape))
    projection.bias.set_value(constant(0.0, *projection.bias.shape))


def _truncated_normal(rngs: nnx.Rngs, shape: Sequence[int]) -> Array:
    return draw(_truncated_block, rngs, shape, 0.02)


@jax.jit
def _truncated_block(key: Array) -> Array:
    return jax.random.truncated_normal(key, -1.0, 1.0, (BLOCK,), jnp.float32)

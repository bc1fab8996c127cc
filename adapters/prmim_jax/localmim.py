"""LocalMIM: encoder layers predict the image at several scales."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

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
from prmim_jax.method import FeatureMethod, build_encoder
from prmim_jax.plan import make_plan
from prmim_jax.vit import Decoder, LayerNorm, Linear
from prmim_methods import LocalMIMConfig


@jax.tree_util.register_dataclass
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

    loss: Array
    loss_decoded: Array
    loss_thrown: Array
    predicted: Array
    plan: Plan


class ScaleHead(nnx.Module):
    """Head that predicts the cells of each token at one scale.

    Parameters
    ----------
    config
        The record of the method.
    scale
        Cells along each side of a token. Below 1, inputs are features of units, and each unit is one cell.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Notes
    -----
    The published heads are transposed convolutions on the grid of all tokens, with kernel size equal to the stride.
    They equal linear layers on each token, which work for any subset of tokens.
    """

    def __init__(self, config: LocalMIMConfig, scale: float, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs) -> None:
        self._axes = config.grid.axes
        *finer, (_, width, values) = config.head_layers(scale)
        self.up = nnx.List([Linear(inputs, outputs, dtype=dtype, rngs=rngs) for _, inputs, outputs in finer])
        self.norms = nnx.List([LayerNorm(inputs) for _, inputs, _ in finer[1:]])
        self.pred = Linear(width, values, dtype=dtype, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        """Map features (batch, n, dim) to raster-order cells (batch, n, cells * values)."""
        batch, length, _ = features.shape
        x = features.reshape(batch * length, 1, -1)
        for number, up in enumerate(self.up):
            if number:
                x = jax.nn.gelu(self.norms[number - 1](x), approximate=False)
            x = up(x)
            # Each cell becomes a patch of 2 x 2 cells, which are sorted in raster order.
            x = unpatchify(x, (2,) * self._axes, Grid((2**number,) * self._axes))
            x = x.reshape(batch * length, -1, x.shape[-1])
        return self.pred(x).reshape(batch, length, -1)


class LocalMIM(FeatureMethod):
    """LocalMIM with PR-MIM; see :class:`prmim_methods.LocalMIMConfig`.

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
    >>> method = LocalMIM(LocalMIMConfig(image_size=(32, 32), patch_size=(8, 8), embed_dim=32,
    ...     depth=2, num_heads=2, decoder_dim=16, decoder_heads=2))
    >>> images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    >>> noise = counter_noise(0, 0, jnp.arange(2), method.config.grid.num_tokens)
    >>> output = nnx.jit(method)(images, noise)
    >>> output.predicted.shape  # 12 masked tokens, (16 + 4 + 1 + 1) cells of 27 values
    (2, 12, 594)
    """

    config: LocalMIMConfig

    def __init__(self, config: LocalMIMConfig, rngs: nnx.Rngs | None = None, dtype: DTypeLike | None = None) -> None:
        super().__init__(config)
        rngs = nnx.Rngs(config.init_seed) if rngs is None else rngs
        encoder, size = config.encoder_size, config.decoder_size
        scales = config.scales_in_effect
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        # The last decoder uses the encoder's final norm.
        self.norms = nnx.List([LayerNorm(encoder.dim) for _ in scales[1:]])
        self.decoders = nnx.List(
            [
                Decoder(
                    config.grid.shape,
                    encoder.dim,
                    None,
                    dim=size.dim,
                    depth=size.depth,
                    num_heads=size.heads,
                    recompute=config.recompute_blocks,
                    scan=config.scan_blocks,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in scales
            ]
        )
        self.heads = nnx.List([ScaleHead(config, scale, dtype=dtype, rngs=rngs) for scale in scales])
        stages = [self._build_reconstruction(size.dim, dtype, rngs) for _ in scales]
        self.reconstruct = nnx.List([stage for stage in stages if stage is not None])

    def __call__(self, images: Array, noise: Array) -> LocalOutput:
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
        # The error has the precision of the target. The prediction may have a lower one.
        errors = jnp.stack(
            [
                jnp.square(rough.astype(target.dtype) - target).mean(-1)
                for rough, target in zip(predicted, targets, strict=True)
            ]
        ).sum(0)
        return self._output(errors, jnp.concatenate(predicted, axis=-1), plan)

    def _predict(self, patches: Array, plan: Plan) -> list[Array]:
        """Return the predictions (batch, supervised, values) of each scale."""
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        states = encoder.hidden_states(tokens, visible)
        config, predicted = self.config, []
        norms: list[LayerNorm] = [*self.norms, encoder.norm]  # type: ignore[list-item]  # not None
        parts = zip(config.scales_in_effect, config.layers_in_effect, norms, self.decoders, self.heads, strict=True)
        for number, (scale, layer, norm, decoder, head) in enumerate(parts):
            features = decoder(norm(states[layer]), plan.known(1))
            if self.reconstruct:
                features = self.reconstruct[number](features, plan)
            predicted.append(self._predict_scale(scale, head, features, plan))
        return predicted

    def _predict_scale(self, scale: float, head: ScaleHead, features: Array, plan: Plan) -> Array:
        """Predict from features (batch, V + M or N, dim): (batch, supervised, values)."""
        if scale >= 1:
            first = plan.schedule.counts.visible
            return head(features[:, first : first + self.config.num_supervised])
        unit = self.config.unit
        cells = head(pool_units(features, plan, unit))
        return take_tokens(cells, unit_index(plan.schedule.grid, unit, self._supervised(plan)))

    def _supervised(self, plan: Plan) -> Array:
        """Return the supervised tokens: int (batch, supervised)."""
        return plan.masked[:, : self.config.num_supervised]

    def _targets(self, images: Array, index: Array) -> list[Array]:
        """Return the targets (batch, n, values) of the tokens ``index`` at each scale."""
        config = self.config
        targets = []
        for scale, cells in zip(config.scales_in_effect, self._cell_maps(images), strict=True):
            if scale >= 1:
                targets.append(take_tokens(patchify(cells, (int(scale),) * config.grid.axes), index))
            else:
                targets.append(take_tokens(_rows(cells), unit_index(config.grid, config.unit, index)))
        return targets

    def _cell_maps(self, images: Array) -> list[Array]:
        """Return the targets of all cells, (batch, cells..., values) for each scale."""
        config, dtype = self.config, self.encoder.cls_token.dtype
        images = self._pixels(images)
        if config.target == "hog":
            # Computed from unnormalized pixels: their gradients are exact, and histograms ignore the scale.
            return hog_pyramid(images.astype(dtype), config.cell_sizes, config.bins)  # type: ignore[arg-type]  # two axes
        pixels = self._normalize(images.reshape(images.shape[0], 1, -1))  # the image as one patch
        pixels = normalize_over_image(pixels, pixels, config.channels)
        maps = []
        for shape in config.map_shapes:
            means = cell_means(pixels, config.image_size, shape)
            maps.append(means.reshape(images.shape[0], *shape, config.channels))
        return maps

    def _output(self, errors: Array, predicted: Array, plan: Plan) -> LocalOutput:
        """Average the errors (batch, supervised) of the tokens."""
        decoded = plan.schedule.counts.decoded
        num_thrown = errors.shape[1] - decoded
        loss_decoded = errors[:, :decoded].sum() / (max(decoded, 1) * len(errors))
        loss_thrown = errors[:, decoded:].sum() / (max(num_thrown, 1) * len(errors))
        weight_thrown = self.config.thrown_weight * num_thrown
        loss = (decoded * loss_decoded + weight_thrown * loss_thrown) / (decoded + weight_thrown)
        return LocalOutput(loss, loss_decoded, loss_thrown, predicted, plan)

    def compared_features(self, images: Array, output: LocalOutput) -> tuple[Array, Array]:
        """Return predictions and targets of all scales.

        See :meth:`FeatureMethod.compared_features`.
        """
        self._check_output(output)
        every = jnp.broadcast_to(jnp.arange(self.num_tokens), (images.shape[0], self.num_tokens))
        target = jnp.concatenate(self._targets(images, every), axis=-1)
        rows = jnp.arange(len(target))[:, None]
        predicted = output.predicted.astype(target.dtype)
        return jnp.full_like(target, jnp.nan).at[rows, self._supervised(output.plan)].set(predicted), target


def _rows(cells: Array) -> Array:
    """Flatten maps (batch, cells..., values) to (batch, n, values), in raster order."""
    return cells.reshape(len(cells), -1, cells.shape[-1])

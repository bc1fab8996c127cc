"""MaskAlign: a student predicts a teacher's features of the whole image."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from prmim_core import Plan, take_tokens
from prmim_jax.method import FeatureMethod, build_encoder
from prmim_jax.plan import make_plan
from prmim_jax.teacher import Teacher
from prmim_jax.vit import LayerNorm, Linear, freeze, precision
from prmim_methods import MaskAlignConfig
from prmim_methods.teacher import find_teacher

WHITENING_EPS = 1e-5


@jax.tree_util.register_dataclass
@dataclass
class AlignOutput:
    """Output of :class:`MaskAlign`; a pytree.

    Parameters
    ----------
    loss
        Scalar to minimize, float32 or wider.
    loss_visible, loss_thrown
        Scalars: mean loss of the class token and the visible tokens, and of the thrown tokens; the latter is 0 if
        thrown tokens are not supervised.
    predicted
        (batch, 1 + supervised, teacher_dim): predictions for the last aligned layer of the teacher: class token, then
        visible and (if reconstructed) thrown tokens, in plan order.
    plan
        The plan of the batch.
    """

    loss: Array
    loss_visible: Array
    loss_thrown: Array
    predicted: Array
    plan: Plan


class MaskAlign(FeatureMethod):
    """MaskAlign with PR-MIM; see :class:`prmim_methods.MaskAlignConfig`.

    Parameters
    ----------
    config
        The options. A teacher named on the Hugging Face hub is downloaded.
    rngs
        Source of the initial weights; None: seeded with ``config.init_seed``.
    dtype
        Dtype of the matrix products of the student, for example ``jax.numpy.bfloat16``; None: float32. The teacher has
        bfloat16 weights if it is bfloat16.

    Raises
    ------
    ImportError
        If the teacher must be downloaded and ``huggingface_hub`` is not installed.
    ValueError
        If there is no such teacher, or the teacher does not fit the options.

    Notes
    -----
    The encoder's final norm takes no part in the loss. It keeps its initial weights, which are part of weight files.
    """

    config: MaskAlignConfig

    def __init__(self, config: MaskAlignConfig, rngs: nnx.Rngs | None = None, dtype: DTypeLike | None = None) -> None:
        super().__init__(config)
        config.read_teacher(find_teacher(str(config.teacher)))  # raises if the teacher does not fit the options
        self.teacher = Teacher(
            str(config.teacher),
            config.grid.shape,
            config.channels,
            layers=config.teacher_layers,
            dtype="bfloat16" if dtype == jnp.bfloat16 else "float32",
            scan=config.scan_blocks,
        )
        # Weights can be saved even if the teacher's folder no longer exists. JSON, since it must be hashable.
        self._architecture = json.dumps(config.architecture())
        rngs = nnx.Rngs(config.init_seed) if rngs is None else rngs
        size = config.encoder_size
        self.dtype = dtype
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        freeze(self.encoder.norm)  # type: ignore[arg-type]  # not None
        self.fusion = nnx.Param(jnp.asarray(_initial_fusion(config, size.depth)))
        self.heads = nnx.List(
            [Linear(size.dim, self.teacher.dim, dtype=dtype, rngs=rngs) for _ in range(config.teacher_layers)]
        )
        self.reconstruct = self._build_reconstruction(size.dim, dtype, rngs)

    def __call__(self, images: Array, noise: Array) -> AlignOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels); with a ``pixel_range``, also uint16 or float32.
        noise
            int32 (batch, N), for example from ``prmim_core.counter_noise``. In training mode, it also determines the
            branches that drop path drops.

        Returns
        -------
        AlignOutput

        Raises
        ------
        TypeError
            If ``images`` are of another dtype, or ``noise`` is not of an integer dtype (int32 to mask by attention).
        ValueError
            If a shape does not fit, or there are no images.
        """
        patches = self._patches(images)
        self._check_batch(images, noise)
        seen = self.teacher(self._pixels(images))
        plan = make_plan(self._schedule, noise, **self.config.plan_arguments(noise, seen.attention))
        features = self._features(patches, plan, noise)
        rows = self._supervised_rows(plan)
        target = _whiten(jax.vmap(lambda hidden: take_tokens(hidden, rows))(seen.hidden))
        predicted = [head(layer) for head, layer in zip(self.heads, features, strict=True)]
        # The error has the precision of the target, float32 or wider, even if the prediction has a lower one.
        losses = [_smooth_l1(layer - wanted).mean(-1) for layer, wanted in zip(predicted, target, strict=True)]
        return self._output(2 * jnp.stack(losses).mean(0), predicted[-1], plan)

    def _features(self, patches: Array, plan: Plan, noise: Array) -> Array:
        """Encode visible patches, mix all blocks, and reconstruct supervised tokens.

        Returns (k, batch, 1 + supervised, dim), class token first, then in plan order.
        """
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        states = encoder.hidden_states(tokens, visible, self._drop_path(noise, self.config.drop_path))[1:]
        dtype = self.fusion.dtype if self.dtype is None else self.dtype
        fused = jnp.einsum(
            "kl,lbnd->kbnd", self.fusion[...].astype(dtype), states.astype(dtype), precision=precision(dtype)
        )
        if self.reconstruct is None:
            return fused
        reconstruct = self.reconstruct
        features = jax.vmap(lambda layer: reconstruct(layer, plan))(fused[:, :, 1:])
        return jnp.concatenate([fused[:, :, :1], features], axis=2)

    def _supervised(self, plan: Plan) -> Array:
        """Return the supervised tokens, without the class token: int (batch, supervised)."""
        return plan.visible if self.reconstruct is None else plan.order

    def _supervised_rows(self, plan: Plan) -> Array:
        """Return the rows of target features, class token first: int (batch, 1 + n)."""
        return jnp.pad(self._supervised(plan) + 1, ((0, 0), (1, 0)))

    def _output(self, per_token: Array, predicted: Array, plan: Plan) -> AlignOutput:
        """Average the losses (batch, 1 + supervised), class token first."""
        num_visible = 1 + plan.schedule.counts.visible
        num_thrown = per_token.shape[1] - num_visible
        loss_visible = per_token[:, :num_visible].mean()
        loss_thrown = per_token[:, num_visible:].sum() / (max(num_thrown, 1) * per_token.shape[0])
        weight_thrown = self.config.thrown_weight * num_thrown
        loss = (num_visible * loss_visible + weight_thrown * loss_thrown) / (num_visible + weight_thrown)
        return AlignOutput(loss, loss_visible, loss_thrown, predicted, plan)

    def compared_features(self, images: Array, output: AlignOutput) -> tuple[Array, Array]:
        """Return predicted and target features of the last aligned layer.

        See :meth:`FeatureMethod.compared_features`.
        """
        self._check_output(output)
        target = _whiten(self.teacher(self._pixels(images)).hidden[-1][:, 1:])
        student = output.predicted[:, 1:].astype(target.dtype)
        rows = jnp.arange(len(target))[:, None]
        return jnp.full_like(target, jnp.nan).at[rows, self._supervised(output.plan)].set(student), target

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return dict(json.loads(self._architecture))


def _initial_fusion(config: MaskAlignConfig, depth: int) -> NDArray[np.float32]:
    """Return the initial weights of student layers in aligned layers: (k, depth)."""
    if config.fusion == "sum":
        return np.full((config.teacher_layers, depth), 1 / depth, np.float32)
    return (np.eye(depth) + 0.01)[depth - config.teacher_layers :].astype(np.float32)


def _whiten(x: Array) -> Array:
    return LayerNorm(x.shape[-1], elementwise_affine=False, eps=WHITENING_EPS)(x)


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)

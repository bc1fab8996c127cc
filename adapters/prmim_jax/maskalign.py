"""MaskAlign: a student that sees visible tokens alone learns to predict what a teacher makes of the whole image."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from prmim_core import (
    CostReport,
    Plan,
    drop_path_scales,
    maskalign_cost,
    random_visible,
    take_tokens,
    weighted_visible,
)
from prmim_core.options import check_counts, check_fraction, check_schedule, check_thrown_weight, check_variant
from prmim_jax.method import FeatureMethod, initial_rngs
from prmim_jax.plan import make_plan
from prmim_jax.teacher import Teacher, TeacherOutput
from prmim_jax.vit import Buffer, Encoder, LayerNorm, Linear, precision

WHITENING_EPS = 1e-5


@jax.tree_util.register_dataclass
@dataclass
class AlignOutput:
    """What a forward pass of :class:`MaskAlign` gives.

    Parameters
    ----------
    loss
        Scalar, float32 or wider: what to minimise.
    loss_visible, loss_thrown
        Scalars: its means over the cls token and the visible tokens, and over the thrown tokens; the latter is 0 where
        they are not supervised.
    predicted
        (batch, 1 + supervised, teacher_dim): predictions for the last aligned layer of the teacher: of the cls token,
        then of the supervised tokens in plan order, visible and (unless the variant is ``"none"``) thrown.
    plan
        The plan of the batch.

    Notes
    -----
    A pytree.
    """

    loss: Array
    loss_visible: Array
    loss_thrown: Array
    predicted: Array
    plan: Plan


class MaskAlign(FeatureMethod):
    """MaskAlign whose student also predicts the teacher's features of masked tokens, rebuilt progressively.

    The student's encoder sees the visible tokens alone. Mixtures of its layers are aligned with the last layers of a
    frozen teacher, which sees the whole image: of the cls token, of the visible tokens, and of the masked ones, whose
    features come from :class:`prmim_jax.ProgressiveReconstruction`. All masked tokens are thrown: none is decoded.

    Parameters
    ----------
    teacher
        A folder with a model, or a name on the Hugging Face hub: see :class:`prmim_jax.Teacher`.
    model
        Name of the encoder: ``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_huge``.
    image_size, patch_size
        Pixels along both axes; the patch divides the image.
    channels
        Channels of the image: the teacher's, or 1.
    mask_ratio
        Fraction of the tokens that is masked, in [0, 1); None: 0.7.
    throw_ratio
        None, since all masked tokens are thrown.
    throwing
        ``"furthest"``, or ``"none"``, which sets ``variant`` to ``"none"``.
    stages
        Stages of the reconstruction.
    variant
        ``"kernel"``, ``"interpolate"`` or ``"conv"``, see :class:`prmim_jax.ProgressiveReconstruction`; ``"none"``:
        masked tokens are neither rebuilt nor supervised, which is MaskAlign as published.
    thrown_weight
        Weight of a thrown token in the loss, not negative; the cls token and a visible one weigh 1. 0 sets ``variant``
        to ``"none"``.
    masking
        ``"attention"``: tokens stay visible with a probability that rises with what the teacher's cls token looks at;
        ``"random"``: all alike.
    teacher_layers
        How many of the teacher's last layers are aligned; all count alike.
    fusion
        How the mixture of the student's layers for each layer of the teacher starts: ``"linear"``, as the layer of the
        same number and 0.01 of all, for which depths have to be equal; ``"sum"``, as the mean of all.
    drop_path
        Rate at which a branch of the last block is skipped for an image, in training mode, in [0, 1); it rises linearly
        from 0 at the first block. What is skipped is a function of the noise.
    mean, std
        Per-channel normalisation of pixels in [0, 1] for the student; None: ImageNet's for 3 channels, else 0.5.
    embed_dim, depth, num_heads
        Override those of ``model``.
    recompute_blocks
        Whether the backward pass computes what is inside a block anew from the block's input, in place of keeping it
        (activation checkpointing): less memory, and the blocks' forward pass twice.
    init_seed
        Seed of the initial weights, which are a function of it (another one than in PyTorch).
    scan_blocks
        Whether a compiled program holds one block of the student and one of the teacher and loops over them; see
        :func:`prmim_jax.vit.run_blocks`.
    rngs
        Source of the initial weights, in place of ``init_seed``.

    Raises
    ------
    ImportError
        If the teacher is to be downloaded and ``huggingface_hub`` is not installed.
    TypeError
        If an option is of the wrong type.
    ValueError
        If an option is out of range, or the options do not fit together.

    Notes
    -----
    Targets are the outputs of the teacher's blocks, normalised over their channels (a layer norm without weights, eps
    1e-5). The loss is twice the smooth L1 distance (beta 1), mean over channels and layers; over tokens it is a mean
    with the weights 1 and ``thrown_weight``. That masked tokens are supervised is ours: MaskAlign leaves them out, and
    the text published on PR-MIM says nothing of it.

    The encoder's final norm takes no part in the loss, and stays as it is at first.

    References
    ----------
    Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", arXiv 2211.08887; Li et al.,
    "PR-MIM: Delving Deeper into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.
    """

    losses = ("loss", "loss_visible", "loss_thrown")

    def __init__(
        self,
        *,
        teacher: str | Path | None = None,
        model: str = "vit_base",
        image_size: Sequence[int] = (224, 224),
        patch_size: Sequence[int] = (16, 16),
        channels: int = 3,
        mask_ratio: float | None = None,
        throw_ratio: float | None = None,
        throwing: str = "furthest",
        stages: int = 2,
        variant: str = "kernel",
        thrown_weight: float = 1.0,
        masking: str = "attention",
        teacher_layers: int = 5,
        fusion: str = "linear",
        drop_path: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        recompute_blocks: bool = False,
        init_seed: int = 0,
        scan_blocks: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(
            model=model,
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            mean=mean,
            std=std,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            recompute_blocks=recompute_blocks,
            scan_blocks=scan_blocks,
        )
        for name, value, allowed in (
            ("throwing", throwing, ("furthest", "none")),
            ("masking", masking, ("attention", "random")),
            ("fusion", fusion, ("linear", "sum")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
        counts = check_counts(self.grid, mask_ratio, throw_ratio, throwing, default=(0.7, None))
        self.schedule = check_schedule(self.grid, counts, stages, throwing, "visible")
        variant = check_variant(variant, counts)
        self.thrown_weight = check_thrown_weight(thrown_weight, counts, variant, visible_supervised=True)
        self.variant = "none" if throwing == "none" or self.thrown_weight == 0 else variant
        self.masking = masking
        self.drop_path = check_fraction("drop_path", drop_path)
        if teacher is None:
            raise ValueError("teacher: expected a folder or a name on the hub, got None")
        self.teacher = Teacher(teacher, self.grid.shape, self.channels, layers=teacher_layers)
        self.teacher.scan = scan_blocks
        self.compute_dtype: np.dtype | None = None
        self._build(fusion, initial_rngs(init_seed, rngs))

    def _build(self, fusion: str, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(
            self.grid.shape,
            self.patch_size,
            self.channels,
            dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            recompute=self.recompute_blocks,
            scan=self.scan_blocks,
            rngs=rngs,
        )
        # The loss looks at what comes before it.
        for name in ("weight", "bias"):
            setattr(self.encoder.norm, name, Buffer(getattr(self.encoder.norm, name)[...]))
        self.fusion = nnx.Param(jnp.asarray(_initial_fusion(fusion, self.teacher, self.depth)))
        self.heads = nnx.List([Linear(self.embed_dim, self.teacher.dim, rngs=rngs) for _ in range(self.teacher.layers)])
        self.reconstruct = self._reconstruction(self.variant, "embed_dim", self.embed_dim)

    def __call__(self, images: Array, noise: Array) -> AlignOutput:
        """Compute the loss of a batch.

        Parameters
        ----------
        images
            uint8 (batch, image_size..., channels).
        noise
            int32 (batch, N), for instance from ``prmim_core.counter_noise``.

        Returns
        -------
        AlignOutput

        Raises
        ------
        TypeError
            If ``images`` are not uint8 or ``noise`` does not hold integers (of 32 bits, for masking by attention).
        ValueError
            If a shape does not fit.
        """
        patches = self._patches(images)
        self._check_noise(noise, images.shape[0])
        seen: TeacherOutput = self.teacher(images)
        plan = make_plan(self.schedule, noise, visible=self._visible(noise, seen.attention))
        features = self._features(patches, plan, noise)
        target = _whiten(jax.vmap(lambda hidden: take_tokens(hidden, _places(plan, features.shape[2])))(seen.hidden))
        predicted = [head(layer) for head, layer in zip(self.heads, features, strict=True)]
        # The target is in float32 or wider, and so is the difference, whatever the prediction was computed in.
        losses = [_smooth_l1(layer - wanted).mean(-1) for layer, wanted in zip(predicted, target, strict=True)]
        return self._output(2 * jnp.stack(losses).mean(0), predicted[-1], plan)

    def _features(self, patches: Array, plan: Plan, noise: Array) -> Array:
        """Encode the visible patches, mix the outputs of all blocks, and rebuild what is supervised.

        Returns (k, batch, 1 + V, dim), or (k, batch, 1 + N, dim) with the thrown tokens, in plan order after cls.
        """
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        states = jnp.stack(encoder.hidden_states(tokens, visible, self._scales(noise)))
        dtype = self.fusion.dtype if self.compute_dtype is None else self.compute_dtype
        fused = jnp.einsum(
            "kl,lbnd->kbnd", self.fusion[...].astype(dtype), states.astype(dtype), precision=precision(dtype)
        )
        if self.reconstruct is None:
            return fused
        rebuild = self.reconstruct
        rebuilt = jax.vmap(lambda layer: rebuild(layer, plan))(fused[:, :, 1:])
        return jnp.concatenate([fused[:, :, :1], rebuilt], axis=2)

    def _visible(self, noise: Array, attention: Array) -> Array:
        """Choose the visible tokens: int (batch, V)."""
        num_visible = self.counts.visible
        if self.masking == "attention":
            visible: Array = weighted_visible(noise, attention, num_visible)
        else:
            visible = random_visible(noise, num_visible)
        return visible

    def _scales(self, noise: Array) -> Array | None:
        if self.deterministic or self.drop_path == 0:
            return None
        scales: Array = drop_path_scales(noise, self.depth, self.drop_path)
        return scales

    def _output(self, per_token: Array, predicted: Array, plan: Plan) -> AlignOutput:
        """Average the losses of cls and supervised tokens, (batch, 1 + supervised)."""
        num_visible = 1 + self.counts.visible
        num_thrown = per_token.shape[1] - num_visible
        loss_visible = per_token[:, :num_visible].mean()
        loss_thrown = per_token[:, num_visible:].sum() / (max(num_thrown, 1) * per_token.shape[0])
        weight_thrown = self.thrown_weight * num_thrown
        loss = (num_visible * loss_visible + weight_thrown * loss_thrown) / (num_visible + weight_thrown)
        return AlignOutput(loss, loss_visible, loss_thrown, predicted, plan)

    def compared_features(self, images: Array, output: AlignOutput) -> tuple[Array, Array]:
        """Put predictions beside their targets, for pictures; see :meth:`FeatureMethod.compared_features`."""
        target = _whiten(self.teacher(images).hidden[-1][:, 1:])
        student = output.predicted[:, 1:].astype(target.dtype)
        rows = jnp.arange(len(target))[:, None]
        places = output.plan.order[:, : student.shape[1]]
        return jnp.full_like(target, jnp.nan).at[rows, places].set(student), target

    def not_decayed(self) -> frozenset[str]:
        """Name the fusion matrix, which MaskAlign spares from weight decay."""
        return frozenset({"fusion"})

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`Method.architecture`."""
        return {
            "method": "maskalign",
            **super().architecture(),
            "teacher_dim": self.teacher.dim,
            "teacher_layers": self.teacher.layers,
            "variant": self.variant,
        }

    def cost(self, compute_bytes: int = 4) -> CostReport:
        """Return what a forward pass costs per image, by formula, that of the teacher as a part of its own."""
        teacher = self.teacher
        return maskalign_cost(
            self.schedule,
            patch_dim=self.patch_dim,
            encoder=self.encoder_size,
            teacher=teacher.size,
            teacher_patch_dim=prod(teacher.patch_size) * teacher.channels,
            teacher_tokens=self.grid.num_tokens,
            layers=teacher.layers,
            variant=self.variant,  # type: ignore[arg-type]  # checked at construction
            recompute_blocks=self.recompute_blocks,
            compute_bytes=compute_bytes,
        )


def _initial_fusion(fusion: str, teacher: Teacher, depth: int) -> NDArray[np.float32]:
    """Return what each aligned layer of the teacher gets of each of the student's: (k, depth)."""
    if fusion == "sum":
        return np.full((teacher.layers, depth), 1 / depth, np.float32)
    if teacher.depth != depth:
        raise ValueError(
            f"fusion: expected 'sum' where depths differ, got 'linear' for {teacher.depth} blocks of the teacher and "
            f"{depth} of the student"
        )
    return (np.eye(depth) + 0.01)[depth - teacher.layers :].astype(np.float32)


def _places(plan: Plan, length: int) -> Array:
    """Return places behind the cls token, and its own first, of what is supervised: int (batch, length)."""
    return jnp.pad(plan.order + 1, ((0, 0), (1, 0)))[:, :length]


def _whiten(x: Array) -> Array:
    return LayerNorm(x.shape[-1], elementwise_affine=False, eps=WHITENING_EPS)(x)


def _smooth_l1(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)

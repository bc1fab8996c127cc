"""MaskAlign: a student that sees visible tokens alone learns to predict what a teacher makes of the whole image."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from prmim_torch.method import FeatureMethod, initial_weights
from prmim_torch.plan import make_plan
from prmim_torch.teacher import Teacher, TeacherOutput
from prmim_torch.vit import Encoder, Linear

WHITENING_EPS = 1e-5


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
    """

    loss: Tensor
    loss_visible: Tensor
    loss_thrown: Tensor
    predicted: Tensor
    plan: Plan


class MaskAlign(FeatureMethod):
    """MaskAlign whose student also predicts the teacher's features of masked tokens, rebuilt progressively.

    The student's encoder sees the visible tokens alone. Mixtures of its layers are aligned with the last layers of a
    frozen teacher, which sees the whole image: of the cls token, of the visible tokens, and of the masked ones, whose
    features come from :class:`prmim_torch.ProgressiveReconstruction`. All masked tokens are thrown: none is decoded.

    Parameters
    ----------
    teacher
        A folder with a model, or a name on the Hugging Face hub: see :class:`prmim_torch.Teacher`.
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
        ``"kernel"``, ``"interpolate"`` or ``"conv"``, see :class:`prmim_torch.ProgressiveReconstruction`; ``"none"``:
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
        Seed of the initial weights, which are a function of it; torch's global random state is left as it was.

    Raises
    ------
    ImportError
        If ``transformers`` is not installed.
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
        with initial_weights(init_seed):
            self._build(fusion)

    def _build(self, fusion: str) -> None:
        self.encoder = Encoder(
            self.grid.shape,
            self.patch_size,
            self.channels,
            dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            recompute=self.recompute_blocks,
        )
        # The loss looks at what comes before it.
        self.encoder.norm.requires_grad_(False)
        self.fusion = nn.Parameter(_initial_fusion(fusion, self.teacher, self.depth))
        self.heads = nn.ModuleList(Linear(self.embed_dim, self.teacher.dim) for _ in range(self.teacher.layers))
        self.reconstruct = self._reconstruction(self.variant, "embed_dim", self.embed_dim)

    def forward(self, images: Tensor, noise: Tensor) -> AlignOutput:
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
        losses = []
        for head, fused, hidden in zip(self.heads, self._fused(patches, plan, noise), seen.hidden, strict=True):
            if self.reconstruct is not None:
                fused = torch.cat([fused[:, :1], self.reconstruct(fused[:, 1:], plan)], dim=1)
            predicted = head(fused)
            target = _whiten(take_tokens(hidden, _places(plan, fused.shape[1])))
            # In the target's precision, whatever autocast made of the prediction.
            losses.append(F.smooth_l1_loss(predicted.to(target.dtype), target, reduction="none").mean(-1))
        return self._output(2 * torch.stack(losses).mean(0), predicted, plan)

    def _fused(self, patches: Tensor, plan: Plan, noise: Tensor) -> Tensor:
        """Encode the visible patches, and mix the outputs of all blocks: (k, batch, 1 + V, dim)."""
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        states = torch.stack(encoder.hidden_states(tokens, visible, self._scales(noise)))
        return (self.fusion @ states.flatten(1)).view(-1, *states.shape[1:])

    def _visible(self, noise: Tensor, attention: Tensor) -> Tensor:
        """Choose the visible tokens: int (batch, V)."""
        num_visible = self.counts.visible
        if self.masking == "attention":
            visible: Tensor = weighted_visible(noise, attention, num_visible)
        else:
            visible = random_visible(noise, num_visible)
        return visible

    def _scales(self, noise: Tensor) -> Tensor | None:
        if not self.training or self.drop_path == 0:
            return None
        scales: Tensor = drop_path_scales(noise, self.depth, self.drop_path)
        return scales

    def _output(self, per_token: Tensor, predicted: Tensor, plan: Plan) -> AlignOutput:
        """Average the losses of cls and supervised tokens, (batch, 1 + supervised)."""
        num_visible = 1 + self.counts.visible
        num_thrown = per_token.shape[1] - num_visible
        loss_visible = per_token[:, :num_visible].mean()
        loss_thrown = per_token[:, num_visible:].sum() / (max(num_thrown, 1) * per_token.shape[0])
        weight_thrown = self.thrown_weight * num_thrown
        loss = (num_visible * loss_visible + weight_thrown * loss_thrown) / (num_visible + weight_thrown)
        return AlignOutput(loss, loss_visible, loss_thrown, predicted, plan)

    def compared_features(self, images: Tensor, output: AlignOutput) -> tuple[Tensor, Tensor]:
        """Put predictions beside their targets, for pictures; see :meth:`FeatureMethod.compared_features`."""
        target = _whiten(self.teacher(images).hidden[-1][:, 1:])
        student = output.predicted[:, 1:].to(target.dtype)
        places = output.plan.order[:, : student.shape[1], None].expand_as(student)
        return torch.full_like(target, torch.nan).scatter(1, places, student), target

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


def _initial_fusion(fusion: str, teacher: Teacher, depth: int) -> Tensor:
    """Return what each aligned layer of the teacher gets of each of the student's: (k, depth)."""
    if fusion == "sum":
        return torch.full((teacher.layers, depth), 1 / depth)
    if teacher.depth != depth:
        raise ValueError(
            f"fusion: expected 'sum' where depths differ, got 'linear' for {teacher.depth} blocks of the teacher and "
            f"{depth} of the student"
        )
    return (torch.eye(depth) + 0.01)[depth - teacher.layers :].clone()


def _places(plan: Plan, length: int) -> Tensor:
    """Return places behind the cls token, and its own first, of what is supervised: int (batch, length)."""
    return F.pad(plan.order + 1, (1, 0))[:, :length]


def _whiten(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=WHITENING_EPS)

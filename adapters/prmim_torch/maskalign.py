"""MaskAlign: a student predicts a teacher's features of the whole image."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass

from prmim_core import Plan, take_tokens
from prmim_methods import MaskAlignConfig
from prmim_methods.teacher import find_teacher
from prmim_torch.method import FeatureMethod, build_encoder, initial_weights
from prmim_torch.plan import make_plan
from prmim_torch.teacher import Teacher
from prmim_torch.vit import Linear

WHITENING_EPS = 1e-5


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

    loss: Tensor
    loss_visible: Tensor
    loss_thrown: Tensor
    predicted: Tensor
    plan: Plan


register_dataclass(AlignOutput, serialized_type_name="prmim_torch.AlignOutput")


class MaskAlign(FeatureMethod):
    """MaskAlign with PR-MIM; see :class:`prmim_methods.MaskAlignConfig`.

    Parameters
    ----------
    config
        The options. A teacher named on the Hugging Face hub is downloaded.

    Raises
    ------
    ImportError
        If ``transformers`` is not installed.
    ValueError
        If there is no such teacher, or the teacher does not fit the options.

    Notes
    -----
    The encoder's final norm takes no part in the loss. It keeps its initial weights, which are part of weight files.
    """

    config: MaskAlignConfig

    def __init__(self, config: MaskAlignConfig) -> None:
        super().__init__(config)
        config.read_teacher(find_teacher(str(config.teacher)))  # raises if the teacher does not fit the options
        self.teacher = Teacher(str(config.teacher), config.grid.shape, config.channels, layers=config.teacher_layers)
        # Weights can be saved even if the teacher's folder no longer exists.
        self._architecture = config.architecture()
        size = config.encoder_size
        with initial_weights(config.init_seed):
            self.encoder = build_encoder(config)
            self.encoder.norm.requires_grad_(False)
            self.fusion = nn.Parameter(_initial_fusion(config, size.depth))
            self.heads = nn.ModuleList(Linear(size.dim, self.teacher.dim) for _ in range(config.teacher_layers))
            self.reconstruct = self._build_reconstruction(size.dim)

    def forward(self, images: Tensor, noise: Tensor) -> AlignOutput:
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
        losses = []
        for head, fused, hidden in zip(self.heads, self._fused(patches, plan, noise), seen.hidden, strict=True):
            if self.reconstruct is not None:
                fused = torch.cat([fused[:, :1], self.reconstruct(fused[:, 1:], plan)], dim=1)
            predicted = head(fused)
            target = _whiten(take_tokens(hidden, self._supervised_rows(plan)))
            # The error has the precision of the target. Under autocast, the prediction may have a lower one.
            losses.append(F.smooth_l1_loss(predicted.to(target.dtype), target, reduction="none").mean(-1))
        return self._output(2 * torch.stack(losses).mean(0), predicted, plan)

    def _fused(self, patches: Tensor, plan: Plan, noise: Tensor) -> Tensor:
        """Encode visible patches; mix the outputs of all blocks: (k, batch, 1 + V, dim)."""
        encoder, visible = self.encoder, plan.visible
        tokens = encoder.place(encoder.patch_embed(self._normalize(take_tokens(patches, visible))), visible)
        outputs = encoder.hidden_states(tokens, visible, self._drop_path(noise, self.config.drop_path))[1:]
        states = torch.stack(outputs)
        return (self.fusion @ states.flatten(1)).view(-1, *states.shape[1:])

    def _supervised(self, plan: Plan) -> Tensor:
        """Return the supervised tokens, without the class token: int (batch, supervised)."""
        return plan.visible if self.reconstruct is None else plan.order

    def _supervised_rows(self, plan: Plan) -> Tensor:
        """Return the rows of target features, class token first: int (batch, 1 + n)."""
        return F.pad(self._supervised(plan) + 1, (1, 0))

    def _output(self, per_token: Tensor, predicted: Tensor, plan: Plan) -> AlignOutput:
        """Average the losses (batch, 1 + supervised), class token first."""
        num_visible = 1 + plan.schedule.counts.visible
        num_thrown = per_token.shape[1] - num_visible
        loss_visible = per_token[:, :num_visible].mean()
        loss_thrown = per_token[:, num_visible:].sum() / (max(num_thrown, 1) * per_token.shape[0])
        weight_thrown = self.config.thrown_weight * num_thrown
        loss = (num_visible * loss_visible + weight_thrown * loss_thrown) / (num_visible + weight_thrown)
        return AlignOutput(loss, loss_visible, loss_thrown, predicted, plan)

    def compared_features(self, images: Tensor, output: AlignOutput) -> tuple[Tensor, Tensor]:
        """Return predicted and target features of the last aligned layer.

        See :meth:`FeatureMethod.compared_features`.
        """
        self._check_output(output)
        target = _whiten(self.teacher(self._pixels(images)).hidden[-1][:, 1:])
        student = output.predicted[:, 1:].to(target.dtype)
        places = self._supervised(output.plan)[:, :, None].expand_as(student)
        return torch.full_like(target, torch.nan).scatter(1, places, student), target

    def architecture(self) -> dict[str, Any]:
        """Return the architecture; see :meth:`prmim_methods.MethodConfig.architecture`."""
        return self._architecture


def _initial_fusion(config: MaskAlignConfig, depth: int) -> Tensor:
    """Return the initial weights of student layers in aligned layers: (k, depth)."""
    if config.fusion == "sum":
        return torch.full((config.teacher_layers, depth), 1 / depth)
    return (torch.eye(depth) + 0.01)[depth - config.teacher_layers :].clone()


def _whiten(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=WHITENING_EPS)

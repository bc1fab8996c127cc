"""MaskAlign: a student predicts a teacher's features of the whole image."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

from prmim_core import TokenCounts, count_tokens, weighted_visible
from prmim_methods.cost import Accounting, CostReport, Parameters, PartCost, linear_parameters
from prmim_methods.encoder import times
from prmim_methods.method import MethodConfig, Predicts, Rows, drop_path_option
from prmim_methods.record import find_option, option, record
from prmim_methods.teacher import TeacherConfig, check_images, local_teacher, read_teacher

UNKNOWN = "unknown until the teacher is downloaded"


@record
class MaskAlignConfig(MethodConfig):
    """MaskAlign whose student also predicts the teacher's features of masked tokens.

    The student's encoder sees the visible tokens. Learned mixtures of its layers are aligned with the last layers of a
    frozen teacher, which sees the whole image. All masked tokens are thrown, none is decoded; the student's features of
    them are reconstructed.

    Notes
    -----
    Targets are the outputs of the teacher's blocks, normalized over their channels (a layer norm without weights, eps
    1e-5). The loss is twice the smooth L1 distance (beta 1), averaged over channels and layers. Over tokens, it is a
    mean with the weights 1 and ``thrown_weight``. Supervising masked tokens is our extension: MaskAlign leaves them
    out.

    References
    ----------
    Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", arXiv 2211.08887.
    """

    name: ClassVar[str] = "maskalign"
    title: ClassVar[str] = "MaskAlign"
    predicts: ClassVar[Predicts] = "features"
    compared: ClassVar[tuple[str, str]] = ("student", "teacher")
    baseline_name: ClassVar[str] = "plain"

    mask_ratio: float = 0.7
    teacher: str | None = option(
        "Folder of a CLIP, DINO or DINOv2 vision transformer in the format of transformers, or its name on the hub.",
        default=None,
    )
    teacher_layers: int = option("Number of the teacher's last layers to align with.", default=5, at_least=1)
    masking: str = option(
        "Selection of the visible tokens.",
        default="attention",
        choices={"attention": "in proportion to the teacher's attention", "random": "uniformly"},
    )
    fusion: str = option(
        "Initial mixture of the student's layers for each aligned layer.",
        default="linear",
        choices={
            "linear": "the layer of the same depth; teacher and student must be equally deep",
            "sum": "the mean of all layers",
        },
    )
    drop_path: float = drop_path_option()

    def check(self) -> None:
        """Validate combinations of options."""
        if self.teacher is None:
            raise ValueError("teacher: expected the folder of a vision transformer, or its name on the hub, got null")
        super().check()

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures; ``"loss"`` is the first."""
        return "loss", "loss_visible", "loss_thrown"

    @property
    def compared_text(self) -> str:
        """Description of the compared features, for pictures."""
        text = "Features of the last aligned layer, normalized as in the loss. The teacher sees the whole image."
        masked = (
            f" The student's features of {self.counts.masked} masked tokens are reconstructed from their neighbours."
        )
        return text + masked * self.is_reconstructed

    @cached_property
    def counts(self) -> TokenCounts:
        """Number of visible and thrown tokens; none is decoded."""
        return count_tokens(self.grid.num_tokens, self.mask_ratio, 1, self.count_rounding)

    @property
    def follows_teacher(self) -> bool:
        """Whether a teacher's attention determines the masks."""
        return self.masking == "attention"

    def plan_arguments(self, noise: Any, weights: Any = None) -> dict[str, Any]:
        """Return arguments of ``make_plan``; see :meth:`MethodConfig.plan_arguments`.

        ``weights`` is the teacher's attention.
        """
        by_attention = self.follows_teacher and weights is not None
        visible = weighted_visible(self.counts.visible, noise, weights) if by_attention else None
        return {"visible": visible, "weights": None}

    @property
    def teacher_config(self) -> TeacherConfig | None:
        """The teacher; None until it is downloaded."""
        folder = local_teacher(str(self.teacher))
        return None if folder is None else self.read_teacher(folder)

    def read_teacher(self, folder: Path) -> TeacherConfig:
        """Return the teacher in a folder.

        Raises
        ------
        ValueError
            If the folder holds no usable teacher, or the teacher does not fit the options.
        """
        teacher = read_teacher(folder)
        check_images(teacher, self.grid.shape, self.channels)
        depth, teacher_depth = self.encoder_size.depth, teacher.size.depth
        if self.teacher_layers > teacher_depth:
            raise ValueError(
                f"teacher_layers: expected 1 to {teacher_depth}, the teacher's depth, got {self.teacher_layers}"
            )
        if self.fusion == "linear" and depth != teacher_depth:
            raise ValueError(
                f"fusion: expected 'sum' where depths differ, got 'linear' for {teacher_depth} blocks of the teacher "
                f"and {depth} of the student"
            )
        return teacher

    def baseline(self) -> Self:
        """Return the published method, without masked tokens."""
        return replace(self, reconstruction="none")

    def parameters(self) -> Parameters:
        """Return the number of parameters; a teacher that is not downloaded counts 0."""
        size, teacher = self.encoder_size, self.teacher_config
        student = self._encoder_parameters() + self._reconstruction_parameters(size.dim)
        student += Parameters(-2 * size.dim, fixed=2 * size.dim)  # the final norm is not trained
        student += Parameters(self.teacher_layers * size.depth)
        if teacher is None:
            return student
        width, tokens = teacher.size.dim, self.counts.num_tokens + prod(teacher.grid_shape)  # its table is resized
        frozen = linear_parameters(teacher.patch_dim, width) + (tokens + 2) * width + teacher.size.parameters()
        return student + Parameters(self.teacher_layers * linear_parameters(size.dim, width), fixed=frozen)

    def cost(self, accounting: Accounting = Accounting()) -> CostReport | None:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image; None if the teacher is not local."""
        teacher = self.teacher_config
        if teacher is None:
            return None
        encoder, length = self.encoder_size, self.encoder_length
        embedded, fused, predicted = self.counts.visible, self.teacher_layers, self.teacher_layers
        reconstruction = self.reconstruction_in_effect
        if accounting.is_official:
            embedded, fused, predicted, reconstruction = self.counts.num_tokens, 0, teacher.size.depth, "none"
        aligned = length if reconstruction == "none" else length + self.counts.thrown
        tokens = self.counts.num_tokens
        return CostReport(
            {
                "patch_embed": accounting.linear(embedded, self.patch_dim, encoder.dim),
                "encoder": accounting.blocks(encoder, length, recompute=self.recompute_blocks, final_norm=False),
                # The outputs of all blocks, stacked in float32.
                "fusion": PartCost(
                    fused * encoder.depth * length * encoder.dim,
                    encoder.depth * length * encoder.dim * 4 if fused else 0,
                ),
                "stages": accounting.stages(self.schedule, encoder.dim, reconstruction).times(fused),
                "heads": accounting.head(aligned, encoder.dim, teacher.size.dim).times(predicted),
                # The teacher saves nothing for a backward pass.
                "teacher": PartCost(tokens * teacher.patch_dim * teacher.size.dim + teacher.size.macs(tokens + 1), 0),
            }
        )

    def not_decayed(self) -> frozenset[str]:
        """Return the fusion matrix, exempt from weight decay in MaskAlign."""
        return frozenset({"fusion"})

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`.

        Raises
        ------
        ValueError
            If the teacher is not downloaded yet.
        """
        teacher = self.teacher_config
        if teacher is None:
            raise ValueError(f"teacher: expected a local model, got {self.teacher!r}, which is not downloaded")
        return {
            **super().architecture(),
            "teacher_dim": teacher.size.dim,
            "teacher_layers": self.teacher_layers,
            "reconstruction": self.reconstruction_in_effect,
        }

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        found = {name: architecture[name] for name in ("teacher_layers", "reconstruction")}
        # The initial mixture of layers is left out, since weights replace it; this one fits any depth.
        return {**super().options_of(architecture), **found, "fusion": "sum"}

    def describe(self) -> Rows:
        """Return a report on the tokens of an image, for ``prmim inspect``."""
        counts = self.counts
        drawn = find_option(type(self), "masking").rule.choices[self.masking]
        supervised = f"class token and {counts.visible} visible tokens"
        if self.is_reconstructed:
            supervised = f"class token, {counts.visible} visible and {counts.masked} reconstructed tokens"
        return [
            *super().describe(),
            ("visible", f"{counts.visible}, drawn {drawn}"),
            ("masked", f"{counts.masked}, not seen by the student"),
            *self._describe_stages(),
            ("encoder sequence", f"{self.encoder_length}, {self._class_text()}"),
            ("teacher", self._teacher_text()),
            ("aligned layers", self._layer_text()),
            ("supervised", supervised),
        ]

    def _teacher_text(self) -> str:
        teacher = self.teacher_config
        if teacher is None:
            return f"{self.teacher}: size {UNKNOWN}"
        seen = tuple(length * patch for length, patch in zip(self.grid.shape, teacher.patch_size, strict=True))
        tokens = self.counts.num_tokens + 1
        return f"{teacher.title}, {teacher.size.heads} heads; sees the image at {times(seen)} pixels, {tokens} tokens"

    def _layer_text(self) -> str:
        how = {"linear": "a learned mix", "sum": "a learned mix, initially the mean,"}[self.fusion]
        mixed = f"each with {how} of the student's {self.encoder_size.depth}"
        teacher = self.teacher_config
        if teacher is None:
            return f"the teacher's last {self.teacher_layers}, {mixed}"
        depth = teacher.size.depth
        return f"the teacher's {depth - self.teacher_layers + 1} to {depth}, {mixed}"

    def summary(self) -> str:
        """Return a one-line report on the tokens of an image, for the start of a run."""
        counts = self.counts
        masked = f"reconstructed {self._stage_text()}" if self.is_reconstructed else "left out"
        return f"{counts.visible} visible, {counts.masked} masked, {masked}; encoder sequence {self.encoder_length}"

"""Options shared by all methods, and values derived from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Literal, Self

from prmim_core import Schedule, TokenCounts, block_visible, count_tokens, num_offsets, unattended_visible
from prmim_core.counts import Rounding
from prmim_core.throwing import STRATEGIES, WEIGHTED
from prmim_methods.cost import (
    CUSTOM,
    RECONSTRUCTION_HEADS,
    Accounting,
    CostReport,
    Parameters,
    PartCost,
    linear_parameters,
    stages,
)
from prmim_methods.encoder import EncoderOptions, recompute_option, scan_option, times
from prmim_methods.record import Function, find_option, option, record

Predicts = Literal["pixels", "features"]
Rows = list[tuple[str, str]]
"""Lines of a report, as label and text."""


def drop_path_option(default: float = 0.1) -> Any:
    """Declare the option ``drop_path``, for records whose recipe has it."""
    return option(
        "Drop-path rate of the encoder's last block; rates rise linearly from 0 at the first block.",
        default=default,
        at_least=0,
        below=1,
    )


def mask_unit_option(default: int) -> Any:
    """Declare the option ``mask_unit``, for masking of squares of tokens."""
    return option(
        "Tokens along each side of a mask unit. With patches of 16 pixels, 2 masks squares of 32 pixels.",
        default=default,
        at_least=1,
    )


def throwing_option(**more: str) -> Any:
    """Declare the option ``throwing``: strategies without weights, and more choices."""
    strategies: dict[str, str] = {name: how for name, how in STRATEGIES.items() if name not in WEIGHTED}
    return option(
        "How the decoded tokens are chosen (the other masked tokens are thrown).",
        default="furthest",
        choices={**strategies, **more},
        function="grid, counts, noise, is_visible -> decoded",
    )


MOST_LISTED = 10
"""Maximal number of stages listed in a line."""
NO_SUPERVISION = "neither reconstructed nor supervised"


@record
class MethodConfig(EncoderOptions, ABC):
    """Options of every method.

    A subclass is the complete framework-neutral definition of a method: its options and the values derived from them.
    """

    name: ClassVar[str]
    """Name of the method on the command line."""
    title: ClassVar[str]
    """Name of the method in text."""
    predicts: ClassVar[Predicts]
    """What masked tokens predict; determines the pictures of a run."""
    compared: ClassVar[tuple[str, str]] = ("prediction", "target")
    """Names of predicted and target features in pictures."""
    baseline_name: ClassVar[str] = "dense"
    """Name of :meth:`baseline`."""
    float_rounding: ClassVar[Rounding] = "mae_float"
    """The rule of ``prmim_core.count_tokens`` for ``rounding="float"``."""

    mask_ratio: float = option("Fraction of all tokens that is masked.", default=0.75, above=0, below=1)
    rounding: str = option(
        "Arithmetic that converts ratios to numbers of tokens.",
        default="exact",
        choices={
            "exact": "decimal fractions, so 100 tokens at 0.9 keep 10",
            "float": "floating point, as in the original code, so MAE keeps 9 of them",
        },
    )
    stages: int = option(
        "Number of stages of progressive reconstruction, nearest tokens first.", default=2, at_least=1, at_most=1000
    )
    reconstruction: str | Function = option(
        "Reconstruction of a thrown token from its neighbours.",
        default="kernel",
        choices={
            "kernel": "learned weights over offsets",
            "interpolate": "inverse squared distance",
            "conv": "depthwise 3x3 convolutions",
            "none": NO_SUPERVISION,
        },
        function="dim, grid -> mixing module",
    )
    thrown_weight: float = option(
        "Weight of a thrown token in the loss; other supervised tokens have weight 1.", default=1.0, at_least=0
    )
    recompute_blocks: bool = recompute_option()
    scan_blocks: bool = scan_option()
    init_seed: int = option("Seed of the initial weights.", default=0, at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        counts = self.counts
        if counts.visible == 0:
            raise ValueError(
                f"mask_ratio: expected a ratio that leaves a visible token of {counts.num_tokens}, "
                f"got {self.mask_ratio}"
            )
        _ = self.schedule, self.mix_factory
        if self.is_reconstructed and self.reconstruction == "kernel":
            name, width = self._reconstructed_width
            if width % RECONSTRUCTION_HEADS:
                raise ValueError(
                    f"{name}: expected a multiple of {RECONSTRUCTION_HEADS} for reconstruction 'kernel', got {width}"
                )

    @property
    def compared_text(self) -> str:
        """Description of the compared features, for pictures."""
        return ""

    @property
    @abstractmethod
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures; ``"loss"`` is the first."""

    @cached_property
    @abstractmethod
    def counts(self) -> TokenCounts:
        """Number of visible, decoded and thrown tokens."""

    @property
    def count_rounding(self) -> Rounding:
        """The rounding rule of ``prmim_core.count_tokens`` in effect."""
        return "mae" if self.rounding == "exact" else self.float_rounding

    @property
    def num_supervised(self) -> int | None:
        """Number of supervised masked tokens; None if the loss is on visible tokens only."""
        return None

    @cached_property
    def schedule(self) -> Schedule:
        """The static part of the plans."""
        return Schedule(self.grid, self.counts, stages=self.stages, throwing="random")

    @property
    def needs_weights(self) -> bool:
        """Whether a forward pass needs token weights from the encoder's attention."""
        return False

    @property
    def follows_teacher(self) -> bool:
        """Whether a teacher's attention determines the masks."""
        return False

    def plan_arguments(self, noise: Any, weights: Any = None) -> dict[str, Any]:
        """Return the arguments of ``make_plan`` that choose the tokens of a batch.

        Parameters
        ----------
        noise
            int (batch, N), an array of any library, from ``prmim_core.counter_noise``.
        weights
            float (batch, N): the attention that determines the masks; None: unused or unknown.

        Returns
        -------
        dict
            ``visible``, int (batch, V) or None for the tokens of lowest noise, and ``weights``.
        """
        return {"visible": None, "weights": None}

    @property
    def is_reconstructed(self) -> bool:
        """Whether thrown tokens are reconstructed and supervised."""
        return self.counts.thrown > 0 and self.reconstruction != "none" and self.thrown_weight > 0

    @property
    def _reconstructed_width(self) -> tuple[str, int]:
        """Name and value of the option for the width of the reconstructed features."""
        return "embed_dim", self.encoder_size.dim

    @property
    def reconstruction_in_effect(self) -> str:
        """The reconstruction in effect.

        ``"custom"`` for a function, ``"none"`` without reconstruction.
        """
        if not self.is_reconstructed:
            return "none"
        return CUSTOM if self.mix_factory else str(self.reconstruction)

    @cached_property
    def mix_factory(self) -> Function | None:
        """Factory of a custom mixing module, (dim, grid) -> mix; None for a named one."""
        loaded = self.loaded("reconstruction")
        return loaded if callable(loaded) else None

    @property
    def encoder_length(self) -> int:
        """Length of the encoder's sequence, class tokens included."""
        return self.counts.visible + self.class_tokens

    @abstractmethod
    def parameters(self) -> Parameters:
        """Return the number of parameters, without building the model."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that all images of a batch share in a forward pass."""
        return 0

    def _reconstruction_parameters(self, dim: int) -> Parameters:
        """Return the number of parameters of reconstruction; a custom mix is not counted."""
        return {
            "none": Parameters(),
            "kernel": Parameters(2 * dim + RECONSTRUCTION_HEADS * num_offsets(self.grid)),
            "interpolate": Parameters(),
            "conv": Parameters(2 * dim + dim * 3**self.grid.axes),
            CUSTOM: Parameters(2 * dim),
        }[self.reconstruction_in_effect]

    @abstractmethod
    def baseline(self) -> Self:
        """Return the published method, without throwing and reconstruction."""

    @abstractmethod
    def cost(self, accounting: Accounting = Accounting()) -> CostReport | None:  # noqa: B008  # frozen
        """Return the cost of a forward pass per image; None if a teacher is not local."""

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights, as plain values.

        Weights fit another model only if all values are equal. Ratios and sampling are left out: training may continue
        with other ones.
        """
        return {"method": self.name, **self.encoder_architecture()}

    def not_decayed(self) -> frozenset[str]:
        """Return the multi-axis parameters that the recipe exempts from weight decay."""
        return frozenset()

    def describe(self) -> Rows:
        """Return a report on the tokens of an image, for ``prmim inspect``."""
        return [
            ("grid", f"{times(self.grid.shape)} = {self.counts.num_tokens} patches of {times(self.patch_size)} pixels")
        ]

    def _class_text(self) -> str:
        number = self.class_tokens
        return "with the class token" if number == 1 else f"with {number} class tokens" if number else "no class token"

    def _describe_stages(self) -> Rows:
        if not self.is_reconstructed:
            return []
        how = self.in_words("reconstruction") if self.mix_factory else self.reconstruction
        return [
            (f"  stage {stage}", f"{size} from {known} known, {how}")
            for stage, (size, known) in enumerate(stages(self.schedule), start=1)
            if size
        ]

    @abstractmethod
    def summary(self) -> str:
        """Return a one-line report on the tokens of an image, for the start of a run."""

    def _stage_text(self) -> str:
        sizes = self.schedule.stage_sizes
        listed = " + ".join(map(str, sizes[:MOST_LISTED])) + " + ..." * (len(sizes) > MOST_LISTED)
        return f"in {f'{len(sizes)} ' * (len(sizes) > MOST_LISTED)}stages of {listed}"


@record
class DecodingConfig(MethodConfig):
    """Options of methods that decode masked tokens, and can throw some of them."""

    throw_ratio: float = option(
        "Fraction of all tokens (not of the masked ones) that is thrown; 0 is the dense method.",
        default=0.5,
        at_least=0,
        below=1,
    )
    throwing: str | Function = throwing_option()
    furthest_from: str = option(
        "Tokens that are known when furthest sampling starts.",
        default="visible",
        choices={"visible": "the visible tokens", "none": "no token: the first decoded token is random"},
    )

    def check(self) -> None:
        """Validate combinations of options."""
        _ = self.plan_throwing
        if self.throw_ratio > self.mask_ratio:
            raise ValueError(f"throw_ratio: expected at most mask_ratio {self.mask_ratio}, got {self.throw_ratio}")
        super().check()
        if self.counts.masked == 0:
            tokens = self.counts.num_tokens
            raise ValueError(f"mask_ratio: expected at least one masked token of {tokens}, got {self.mask_ratio:g}")
        if self.num_supervised == 0:
            raise ValueError(
                f"throw_ratio: expected at least one supervised token, got none ({self.counts}, "
                f"reconstruction {self.reconstruction!r}, thrown_weight {self.thrown_weight:g})"
            )

    def _check_grid(self) -> None:
        super()._check_grid()
        shape = self.grid.shape
        if any(length % size for length, size in zip(shape, self.mask_shape, strict=True)):
            raise ValueError(f"mask_unit: expected a divisor of the grid {times(shape)}, got {self.mask_unit}")

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures; ``"loss"`` is the first."""
        return "loss", "loss_decoded", "loss_thrown"

    @property
    def norm_text(self) -> str:
        """Description of the normalization of target patches."""
        return "the patch"

    @property
    def mask_unit(self) -> int:
        """Tokens along each side that are masked together."""
        return 1

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Tokens along each axis that are masked together."""
        return (self.mask_unit,) * self.grid.axes

    @property
    def throw_shape(self) -> tuple[int, ...] | None:
        """Tokens along each axis that are thrown together; None for single tokens."""
        return None

    @cached_property
    def counts(self) -> TokenCounts:
        """Number of visible, decoded and thrown tokens."""
        return count_tokens(
            self.grid.num_tokens,
            self.mask_ratio,
            self.throw_ratio,
            self.count_rounding,
            mask_unit=prod(self.mask_shape),
            throw_unit=prod(self.throw_shape or ()),
        )

    @property
    def plan_throwing(self) -> Any:
        """The throwing strategy of the schedule, a name or a function."""
        return self.loaded("throwing")

    @cached_property
    def schedule(self) -> Schedule:
        """The static part of the plans."""
        if self.counts.thrown == 0 or self.counts.decoded == 0:
            return super().schedule  # without a choice, the cheapest strategy
        return Schedule(
            self.grid,
            self.counts,
            stages=self.stages,
            throwing=self.plan_throwing,
            furthest_from=self.furthest_from,  # type: ignore[arg-type]
            unit=self.throw_shape,
        )

    def plan_arguments(self, noise: Any, weights: Any = None) -> dict[str, Any]:
        """Return arguments of ``make_plan``; see :meth:`MethodConfig.plan_arguments`.

        Examples
        --------
        >>> import numpy as np
        >>> from prmim_core import counter_noise
        >>> from prmim_methods import SimMIMConfig
        >>> SimMIMConfig().plan_arguments(counter_noise(0, 0, np.arange(2), 196))["visible"].shape
        (2, 76)
        """
        schedule, unit = self.schedule, self.mask_shape
        visible, num_units = None, schedule.counts.visible // prod(unit)
        if weights is not None:
            visible = unattended_visible(schedule.grid, unit, num_units, noise, weights)
        elif prod(unit) > 1:
            visible = block_visible(schedule.grid, unit, num_units, noise)
        return {"visible": visible, "weights": weights if schedule.throwing in WEIGHTED else None}

    @property
    def num_supervised(self) -> int:
        """Number of supervised masked tokens."""
        return self.counts.masked if self.is_reconstructed else self.counts.decoded

    def baseline(self) -> Self:
        """Return the published method, without throwing."""
        return replace(self, throw_ratio=0.0)

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        return {**super().architecture(), "reconstruction": self.reconstruction_in_effect}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        return {**super().options_of(architecture), "reconstruction": architecture["reconstruction"]}

    def describe(self) -> Rows:
        """Return a report on the tokens of an image, for ``prmim inspect``."""
        counts = self.counts
        return [
            *super().describe(),
            *self._describe_masking(),
            ("visible", f"{counts.visible}" + ", drawn by attention" * self.needs_weights),
            ("decoded", f"{counts.decoded}, {self._choice_text()}"),
            ("thrown", f"{counts.thrown} ({100 * counts.thrown / counts.num_tokens:.1f} % of all)"),
            *self._describe_stages(),
            *self._describe_sequences(f"dense: {counts.num_tokens + self.class_tokens}"),
            ("supervised", f"{self.num_supervised} of {counts.masked} masked"),
            *self._describe_targets(),
        ]

    @abstractmethod
    def _describe_targets(self) -> Rows:
        """Return a report on the targets, for ``prmim inspect``."""

    def _describe_masking(self) -> Rows:
        unit = self.mask_shape
        if prod(unit) == 1:
            return []
        units = self.grid.units(unit).shape
        pixels = tuple(size * patch for size, patch in zip(unit, self.patch_size, strict=True))
        masked = self.counts.masked // prod(unit)
        text = f"{masked} of {times(units)} = {prod(units)} units of {times(unit)} tokens, {times(pixels)} pixels"
        return [("masked", text)]

    @abstractmethod
    def _describe_sequences(self, dense: str) -> Rows:
        """Return a report on the sequences, for ``prmim inspect``."""

    def _choice_text(self) -> str:
        if not self.counts.thrown:
            return "all masked tokens: nothing is thrown"
        how = self.in_words("throwing")
        if self.throwing == "furthest" and self.furthest_from == "visible":
            how += ", away from the visible ones"
        return f"whole units chosen by {how}" if self.throw_shape else f"chosen by {how}"

    def summary(self) -> str:
        """Return a one-line report on the tokens of an image, for the start of a run."""
        counts = self.counts
        thrown = f"{counts.thrown} thrown" + (f", reconstructed {self._stage_text()}" if self.is_reconstructed else "")
        return f"{counts.visible} visible, {counts.decoded} decoded, {thrown}; {self._sequence_text()}"

    @abstractmethod
    def _sequence_text(self) -> str:
        """Return the length of the longest sequence in words."""


@record
class PixelConfig(DecodingConfig):
    """Options of methods that predict pixels."""

    predicts: ClassVar[Predicts] = "pixels"

    throwing: str | Function = throwing_option(
        weighted="the encoder's attention: attended tokens tend to be masked (AMT)"
    )
    low_pass: float | None = option(
        "Radius, in periods per image, of the low-pass filter on target patches (PixMIM: 40 at 224 pixels). Null: "
        "no filter.",
        default=None,
        above=0,
    )
    thrown_target: str = option(
        "Target of a thrown token.",
        default="cells",
        choices={
            "cells": "the means of the cells of its patch, which its neighbours can predict",
            "patch": "all pixels of its patch, like a decoded token",
        },
    )
    cells: int | None = option(
        "Cells of a patch along each side. Null: 2, or 1 along a side of odd length.", default=None, at_least=1
    )
    cell_norm: str = option(
        "Region over which cells are normalized, per channel.",
        default="image",
        choices={
            "image": "the image",
            "window": "the patch and its neighbours",
            "none": "the data set only",
        },
    )
    extra_cells: str = option(
        "Tokens that predict cells in addition to their own target.",
        default="none",
        choices={"none": "no others", "decoded": "the decoded tokens", "known": "the visible and the decoded tokens"},
    )
    extra_cells_weight: float = option(
        "Weight of the cells of extra_cells in the loss; the token's own target has weight 1.", default=1.0, above=0
    )

    def check(self) -> None:
        """Validate combinations of options."""
        super().check()
        cell_shape(self.patch_size, self.cells)
        if self.needs_weights and not self.class_tokens:
            raise ValueError("class_tokens: expected at least 1 for throwing 'weighted', got 0")

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures; ``"loss"`` is the first."""
        return super().losses + (("loss_cells",) if self.num_extra_cells else ())

    @property
    def needs_weights(self) -> bool:
        """Whether a forward pass needs token weights from the encoder's attention."""
        return self.throwing in WEIGHTED

    @property
    def norm_pix(self) -> bool:
        """Whether target patches are normalized."""
        return False

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """Cells of a patch along each axis."""
        return cell_shape(self.patch_size, self.cells)

    @property
    def cell_dim(self) -> int:
        """Values in the cells of a patch."""
        return prod(self.cell_shape) * self.channels

    @property
    def thrown_cells(self) -> bool:
        """Whether thrown tokens predict cells."""
        return self.is_reconstructed and self.thrown_target == "cells"

    @property
    def num_extra_cells(self) -> int:
        """Number of tokens that predict cells in addition to their own target."""
        counts = self.counts
        return {"none": 0, "decoded": counts.decoded, "known": counts.visible + counts.decoded}[self.extra_cells]

    def _cell_parameters(self, dim: int) -> Parameters:
        """Return the number of parameters of the cell head for features of width ``dim``."""
        return Parameters(linear_parameters(dim, self.cell_dim) if self.cell_places else 0)

    @property
    def first_feature(self) -> int:
        """Place in plan order of the first token with features.

        0, or the place of the first decoded token.
        """
        return 0

    @property
    def patch_places(self) -> range:
        """Places in plan order of the tokens that predict all pixels of their patch."""
        counts = self.counts
        num_known = counts.visible + counts.decoded
        return range(counts.visible, num_known if self.thrown_cells or not self.is_reconstructed else counts.num_tokens)

    @property
    def cell_places(self) -> range:
        """Places in plan order of the tokens that predict cells; empty if none does."""
        num_known = self.counts.visible + self.counts.decoded
        return range(num_known - self.num_extra_cells, self.counts.num_tokens if self.thrown_cells else num_known)

    def baseline(self) -> Self:
        """Return the published method: random masking, no throwing, cells, or filter."""
        return replace(super().baseline(), throwing="furthest", extra_cells="none", low_pass=None)

    def attention_cost(self, accounting: Accounting = Accounting()) -> PartCost:  # noqa: B008  # frozen
        """Return the cost of token weights for ``throwing="weighted"``, forward only.

        Examples
        --------
        >>> from prmim_methods import MAEConfig
        >>> round(MAEConfig().attention_cost().macs / 1e9, 3)
        16.458
        """
        size, length = self.encoder_size, self.grid.num_tokens + self.class_tokens
        embedding = accounting.linear(self.grid.num_tokens, self.patch_dim, size.dim).macs
        # The last block computes queries, keys and values, and the scores of the class token's query only.
        last = 3 * length * size.dim**2 + length * size.dim
        return PartCost(embedding + replace(size, depth=size.depth - 1).macs(length) + last, 0)

    def architecture(self) -> dict[str, Any]:
        """Return the architecture of the weights; see :meth:`MethodConfig.architecture`."""
        cells = {"cells": list(self.cell_shape), "cell_norm": self.cell_norm} if self.cell_places else {}
        filtered = {} if self.low_pass is None else {"low_pass": self.low_pass}
        return {**super().architecture(), **cells, **filtered}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of an architecture; see :meth:`EncoderOptions.options_of`."""
        found = super().options_of(architecture)
        found["low_pass"] = architecture.get("low_pass")
        if "cells" not in architecture:
            return {**found, "thrown_target": "patch"}
        sides = set(architecture["cells"])
        cells = {"cells": sides.pop() if len(sides) == 1 else None, "cell_norm": architecture["cell_norm"]}
        # Without reconstruction, thrown tokens predict no cells, so other tokens must.
        return {**found, **cells, "extra_cells": "decoded" if found["reconstruction"] == "none" else "none"}

    def _describe_targets(self) -> Rows:
        rows = []
        if self.patch_places:
            patches = f"{len(self.patch_places)} tokens predict all {times(self.patch_size)} pixels"
            filtered = "" if self.low_pass is None else f", up to {self.low_pass:g} periods per image"
            rows.append(("  patches", patches + filtered + f", normalized over {self.norm_text}" * self.norm_pix))
        if self.cell_places:
            cells = f"{len(self.cell_places)} tokens predict the means of {times(self.cell_shape)} cells"
            over = find_option(type(self), "cell_norm").rule.choices[self.cell_norm]
            rows.append(("  cells", f"{cells}, normalized over {over}"))
        return rows


def cell_shape(patch_size: tuple[int, ...], cells: int | None) -> tuple[int, ...]:
    """Return the cells of a patch along each axis; None: 2, or 1 along an odd side.

    Raises
    ------
    ValueError
        If ``cells`` does not divide the sides.

    Examples
    --------
    >>> cell_shape((16, 15), None)
    (2, 1)
    """
    if cells is None:
        return tuple(2 - size % 2 for size in patch_size)
    if cells < 1 or any(size % cells for size in patch_size):
        raise ValueError(f"cells: expected a divisor of the patch {times(patch_size)}, or null, got {cells}")
    return (cells,) * len(patch_size)

"""Options that all methods share, and what follows from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Literal, Self

from prmim_core import Schedule, TokenCounts, count_tokens, num_offsets
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
"""Lines of a report: label and text."""


def drop_path_option(default: float = 0.1) -> Any:
    """Declare the option ``drop_path`` of a record whose recipe has it."""
    return option(
        "Rate at which branches of the encoder's last block are dropped; it rises linearly from 0 at the first.",
        default=default,
        at_least=0,
        below=1,
    )


def mask_unit_option(default: int) -> Any:
    """Declare the option ``mask_unit`` of a record whose masking draws squares of tokens."""
    return option(
        "Tokens along each side that are masked together: 2 with patches of 16 masks squares of 32.",
        default=default,
        at_least=1,
    )


def throwing_option(**more: str) -> Any:
    """Declare the option ``throwing``: the strategies of the core that need no weights, and more choices."""
    strategies: dict[str, str] = {name: how for name, how in STRATEGIES.items() if name not in WEIGHTED}
    return option(
        "How the decoded tokens are chosen (the other masked tokens are thrown).",
        default="furthest",
        choices={**strategies, **more},
        function="grid, counts, noise, is_visible -> decoded",
    )


MOST_LISTED = 10
"""Most stages whose sizes are listed in a line."""
NO_SUPERVISION = "neither reconstructed nor supervised"


@record
class MethodConfig(EncoderOptions, ABC):
    """Options of every method.

    A subclass is the whole framework-neutral definition of a method: its options, and what follows from them.
    """

    name: ClassVar[str]
    """Name of the method on the command line."""
    title: ClassVar[str]
    """Name of the method in text."""
    predicts: ClassVar[Predicts]
    """What masked tokens predict; decides which pictures a run draws."""
    compared: ClassVar[tuple[str, str]] = ("prediction", "target")
    """What predicted and target features are called in pictures."""
    baseline_name: ClassVar[str] = "dense"
    """What :meth:`baseline` is called."""
    float_rounding: ClassVar[Rounding] = "mae_float"
    """The rule of ``prmim_core.count_tokens`` for ``rounding="float"``."""

    mask_ratio: float = option("Fraction of all tokens that is masked.", default=0.75, above=0, below=1)
    rounding: str = option(
        "Arithmetic that turns ratios into numbers of tokens.",
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
        "How a thrown token is reconstructed from its neighbours.",
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
        "Weight of a thrown token in the loss; any other supervised token weighs 1.", default=1.0, at_least=0
    )
    recompute_blocks: bool = recompute_option()
    scan_blocks: bool = scan_option()
    init_seed: int = option("Seed of the initial weights.", default=0, at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Validate options that depend on one another."""
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
    def drop_rate(self) -> float:
        """The rate at which branches of the last block are dropped in training."""
        return 0.0

    @property
    def compared_text(self) -> str:
        """What the compared features are, for pictures."""
        return ""

    @property
    @abstractmethod
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures, ``"loss"`` first."""

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
        """Number of masked tokens that the loss supervises; None if the published loss is over visible tokens."""
        return None

    @cached_property
    def schedule(self) -> Schedule:
        """The static part of the plans."""
        return Schedule(self.grid, self.counts, stages=self.stages, throwing="random")

    @property
    def needs_weights(self) -> bool:
        """Whether a forward pass needs weights of the tokens, from the encoder's attention to whole images."""
        return False

    @property
    def is_reconstructed(self) -> bool:
        """Whether thrown tokens are reconstructed and supervised."""
        return self.counts.thrown > 0 and self.reconstruction != "none" and self.thrown_weight > 0

    @property
    def _reconstructed_width(self) -> tuple[str, int]:
        """Name and value of the option that sets the width of the reconstructed features."""
        return "embed_dim", self.encoder_size.dim

    @property
    def reconstruction_in_effect(self) -> str:
        """The option ``reconstruction``, ``"custom"`` for a function, or ``"none"`` if no token is reconstructed."""
        if not self.is_reconstructed:
            return "none"
        return CUSTOM if self.mix_factory else str(self.reconstruction)

    @cached_property
    def mix_factory(self) -> Function | None:
        """What makes the mixing module of a reconstruction of one's own, (dim, grid) -> mix; None for a named one."""
        loaded = self.loaded("reconstruction")
        return loaded if callable(loaded) else None

    @property
    def encoder_length(self) -> int:
        """Tokens of the encoder's sequence, with the class tokens."""
        return self.counts.visible + self.class_tokens

    @abstractmethod
    def parameters(self) -> Parameters:
        """Return the number of parameters, from the options alone: nothing is built."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that a forward pass holds once for all images of a batch, in addition to their activations."""
        return 0

    def _reconstruction_parameters(self, dim: int) -> Parameters:
        """Return those of progressive reconstruction of features of width ``dim``; of a custom one, the norm's only."""
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
        """Return the cost of a forward pass per image; None if it depends on a model that is not here yet."""

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean, as plain values: weights fit another model only if all of these are equal.

        Ratios and sampling are not part of it: training may continue with other ones.
        """
        return {"method": self.name, **self.encoder_architecture()}

    def not_decayed(self) -> frozenset[str]:
        """Return the parameters of several axes that the recipe exempts from weight decay."""
        return frozenset()

    def describe(self) -> Rows:
        """Return the tokens of an image, for ``prmim inspect``."""
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
        """Return the tokens of an image in one line, for the start of a run."""

    def _stage_text(self) -> str:
        sizes = self.schedule.stage_sizes
        listed = " + ".join(map(str, sizes[:MOST_LISTED])) + " + ..." * (len(sizes) > MOST_LISTED)
        return f"in {f'{len(sizes)} ' * (len(sizes) > MOST_LISTED)}stages of {listed}"


@record
class DecodingConfig(MethodConfig):
    """Options of the methods that decode masked tokens, and may throw some of them."""

    throw_ratio: float = option(
        "Fraction of all tokens (not of the masked ones) that is thrown; 0 is the dense method.",
        default=0.5,
        at_least=0,
        below=1,
    )
    throwing: str | Function = throwing_option()
    furthest_from: str = option(
        "What furthest sampling keeps its distance from at the start.",
        default="visible",
        choices={"visible": "the visible tokens", "none": "nothing: the first decoded token is random"},
    )

    def check(self) -> None:
        """Validate options that depend on one another."""
        _ = self.plan_throwing
        if self.throw_ratio > self.mask_ratio:
            raise ValueError(f"throw_ratio: expected at most mask_ratio {self.mask_ratio}, got {self.throw_ratio}")
        super().check()
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
        """Names of the scalars that a training step measures, ``"loss"`` first."""
        return "loss", "loss_decoded", "loss_thrown"

    @property
    def norm_text(self) -> str:
        """What target patches are normalised over, in words."""
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
        """Tokens along each axis that are thrown together; None: single tokens."""
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
        """The strategy of ``prmim_core.Schedule`` that chooses the decoded tokens: its name, or a function."""
        return self.loaded("throwing")

    @cached_property
    def schedule(self) -> Schedule:
        """The static part of the plans."""
        if self.counts.thrown == 0 or self.counts.decoded == 0:
            return super().schedule  # nothing is chosen, and this is the cheapest way to do so
        return Schedule(
            self.grid,
            self.counts,
            stages=self.stages,
            throwing=self.plan_throwing,
            furthest_from=self.furthest_from,  # type: ignore[arg-type]
            unit=self.throw_shape,
        )

    @property
    def num_supervised(self) -> int:
        """Number of masked tokens that the loss supervises."""
        return self.counts.masked if self.is_reconstructed else self.counts.decoded

    def baseline(self) -> Self:
        """Return the published method: nothing is thrown."""
        return replace(self, throw_ratio=0.0)

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`MethodConfig.architecture`."""
        return {**super().architecture(), "reconstruction": self.reconstruction_in_effect}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that :meth:`architecture` tells; see :meth:`EncoderOptions.options_of`."""
        return {**super().options_of(architecture), "reconstruction": architecture["reconstruction"]}

    def describe(self) -> Rows:
        """Return the tokens of an image, for ``prmim inspect``."""
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
        """Return what tokens predict, for ``prmim inspect``."""

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
        """Return the lengths of the sequences, for ``prmim inspect``."""

    def _choice_text(self) -> str:
        if not self.counts.thrown:
            return "all masked tokens: nothing is thrown"
        how = self.in_words("throwing")
        if self.throwing == "furthest" and self.furthest_from == "visible":
            how += ", away from the visible ones"
        return f"whole units chosen by {how}" if self.throw_shape else f"chosen by {how}"

    def summary(self) -> str:
        """Return the tokens of an image in one line, for the start of a run."""
        counts = self.counts
        thrown = f"{counts.thrown} thrown" + (f", reconstructed {self._stage_text()}" if self.is_reconstructed else "")
        return f"{counts.visible} visible, {counts.decoded} decoded, {thrown}; {self._sequence_text()}"

    @abstractmethod
    def _sequence_text(self) -> str:
        """Return the length of the longest sequence in words."""


@record
class PixelConfig(DecodingConfig):
    """Options of the methods that predict pixels: of decoded and of thrown tokens."""

    predicts: ClassVar[Predicts] = "pixels"

    throwing: str | Function = throwing_option(
        weighted="the encoder's attention: attended tokens tend to be masked (AMT)"
    )
    low_pass: float | None = option(
        "Radius, in periods per image, of the low-pass filter on predicted patches (PixMIM: 40 at 224 pixels). Null: "
        "no filter.",
        default=None,
        above=0,
    )
    thrown_target: str = option(
        "What a thrown token predicts.",
        default="cells",
        choices={
            "cells": "the means of the cells of its patch, which its neighbours can predict",
            "patch": "all pixels of its patch, as a decoded token",
        },
    )
    cells: int | None = option(
        "Cells of a patch along each side. Null: 2, or 1 along a side of odd length.", default=None, at_least=1
    )
    cell_norm: str = option(
        "What the cells are normalised over, per channel.",
        default="image",
        choices={
            "image": "the image",
            "window": "the patch and those next to it",
            "none": "the data set only",
        },
    )
    extra_cells: str = option(
        "Which other tokens also predict cells, in addition to their own target.",
        default="none",
        choices={"none": "no others", "decoded": "the decoded tokens", "known": "the visible and the decoded tokens"},
    )
    extra_cells_weight: float = option(
        "Weight of the cells of such a token in the loss; its own target weighs 1.", default=1.0, above=0
    )

    def check(self) -> None:
        """Validate options that depend on one another."""
        super().check()
        cell_shape(self.patch_size, self.cells)
        if self.needs_weights and not self.class_tokens:
            raise ValueError("class_tokens: expected at least 1 for throwing 'weighted', got 0")

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the scalars that a training step measures, ``"loss"`` first."""
        return super().losses + (("loss_cells",) if self.num_extra_cells else ())

    @property
    def needs_weights(self) -> bool:
        """Whether a forward pass needs weights of the tokens, from the encoder's attention to whole images."""
        return self.throwing in WEIGHTED

    @property
    def norm_pix(self) -> bool:
        """Whether target patches are normalised."""
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
        """Return those of the layer that predicts cells from features of width ``dim``."""
        return Parameters(linear_parameters(dim, self.cell_dim) if self.cell_places else 0)

    @property
    def first_feature(self) -> int:
        """Place in plan order of the first token that has features for the heads: 0, or the first decoded token."""
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
        """Return the published method: random masking, nothing thrown, no cells, and no target filtered."""
        return replace(super().baseline(), throwing="furthest", extra_cells="none", low_pass=None)

    def attention_cost(self, accounting: Accounting = Accounting()) -> PartCost:  # noqa: B008  # frozen
        """Return the cost of the weights of a whole image, for ``throwing="weighted"``; there is no backward pass.

        Examples
        --------
        >>> from prmim_methods import MAEConfig
        >>> round(MAEConfig().attention_cost().macs / 1e9, 3)
        16.458
        """
        size, length = self.encoder_size, self.grid.num_tokens + self.class_tokens
        embedding = accounting.linear(self.grid.num_tokens, self.patch_dim, size.dim).macs
        # Of the last block, queries, keys and values, and the scores of the class token's query.
        last = 3 * length * size.dim**2 + length * size.dim
        return PartCost(embedding + replace(size, depth=size.depth - 1).macs(length) + last, 0)

    def architecture(self) -> dict[str, Any]:
        """Return what the weights mean; see :meth:`MethodConfig.architecture`."""
        cells = {"cells": list(self.cell_shape), "cell_norm": self.cell_norm} if self.cell_places else {}
        filtered = {} if self.low_pass is None else {"low_pass": self.low_pass}
        return {**super().architecture(), **cells, **filtered}

    @classmethod
    def options_of(cls, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that :meth:`architecture` tells; see :meth:`EncoderOptions.options_of`."""
        found = super().options_of(architecture)
        found["low_pass"] = architecture.get("low_pass")
        if "cells" not in architecture:
            return {**found, "thrown_target": "patch"}
        sides = set(architecture["cells"])
        cells = {"cells": sides.pop() if len(sides) == 1 else None, "cell_norm": architecture["cell_norm"]}
        # Tokens that are not reconstructed predict no cells, so others do.
        return {**found, **cells, "extra_cells": "decoded" if found["reconstruction"] == "none" else "none"}

    def _describe_targets(self) -> Rows:
        rows = []
        if self.patch_places:
            patches = f"{len(self.patch_places)} tokens predict all {times(self.patch_size)} pixels"
            filtered = "" if self.low_pass is None else f", up to {self.low_pass:g} periods per image"
            rows.append(("  patches", patches + filtered + f", normalised over {self.norm_text}" * self.norm_pix))
        if self.cell_places:
            cells = f"{len(self.cell_places)} tokens predict the means of {times(self.cell_shape)} cells"
            over = find_option(type(self), "cell_norm").rule.choices[self.cell_norm]
            rows.append(("  cells", f"{cells}, normalised over {over}"))
        return rows


def cell_shape(patch_size: tuple[int, ...], cells: int | None) -> tuple[int, ...]:
    """Return the cells of a patch along each axis; None: 2, or 1 along a side of odd length.

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

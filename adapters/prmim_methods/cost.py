"""Cost formulas per image: multiply-accumulates (MACs) and activation memory.

The papers call one MAC a FLOP. A training step takes about three times the forward MACs. Biases, norms, softmax and
GELU are not counted. The records of the methods combine these formulas.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from prmim_core import Schedule
from prmim_methods.record import Record, option, record
from prmim_methods.sizes import CrossTransformer, Transformer, norm_bytes

RECONSTRUCTION_HEADS = 4
"""Groups of channels with their own weights, for reconstruction ``"kernel"``."""
CONV_REPEATS = 3
"""Convolutions per stage, for reconstruction ``"conv"``."""
CUSTOM = "custom"
"""The name of a custom mixing module, in costs and in weight files."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Parameters
    ----------
    learned
        Trained values.
    fixed
        Values that are stored but not trained, such as position tables and a teacher's weights, counted as float32.
    """

    learned: int = 0
    fixed: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        """Add both numbers."""
        return Parameters(self.learned + other.learned, self.fixed + other.fixed)


def linear_parameters(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a linear layer, with its bias."""
    return (inputs + 1) * outputs


def stages(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """Iterate over the stages: numbers of their tokens and of tokens known before.

    Examples
    --------
    >>> from prmim_core import Grid, count_tokens
    >>> list(stages(Schedule(Grid((4, 4)), count_tokens(16, 0.75, 0.5))))
    [(4, 8), (4, 12)]
    """
    return ((size, schedule.num_known(stage)) for stage, size in enumerate(schedule.stage_sizes, start=1))


@dataclass(frozen=True)
class PartCost:
    """The cost of one part of a model, per image.

    Parameters
    ----------
    macs
        Forward multiply-accumulates.
    activation_bytes
        Bytes saved for the backward pass.
    recomputed_bytes
        Bytes that the backward pass recomputes at a time: those of one block, if blocks are recomputed.
    is_known
        Whether the numbers are complete. The cost of a custom module is unknown.
    """

    macs: int
    activation_bytes: int
    recomputed_bytes: int = 0
    is_known: bool = True

    def __add__(self, other: "PartCost") -> "PartCost":
        """Add two parts; one at a time is recomputed."""
        return PartCost(
            self.macs + other.macs,
            self.activation_bytes + other.activation_bytes,
            max(self.recomputed_bytes, other.recomputed_bytes),
            self.is_known and other.is_known,
        )

    def times(self, number: int) -> "PartCost":
        """Multiply the cost by a number of such parts, recomputed one at a time."""
        return replace(self, macs=number * self.macs, activation_bytes=number * self.activation_bytes)


@dataclass(frozen=True)
class CostReport:
    """The cost of a model, per image and part.

    Parameters
    ----------
    parts
        Costs by the name of the part, in the order of the forward pass.
    """

    parts: Mapping[str, PartCost]

    @property
    def is_known(self) -> bool:
        """Whether the cost of all parts is known; sums omit unknown costs."""
        return all(part.is_known for part in self.parts.values())

    @property
    def macs(self) -> int:
        """Forward multiply-accumulates of all parts."""
        return sum(part.macs for part in self.parts.values())

    @property
    def activation_bytes(self) -> int:
        """Bytes that all parts save for the backward pass."""
        return sum(part.activation_bytes for part in self.parts.values())

    @property
    def peak_activation_bytes(self) -> int:
        """Peak bytes of activations, saved ones, and those that one part recomputes.

        The backward pass runs from the last part to the first and frees what each part saved.
        """
        saved = accumulate(part.activation_bytes for part in self.parts.values())
        return max(kept + part.recomputed_bytes for kept, part in zip(saved, self.parts.values(), strict=True))


@record
class Accounting(Record):
    """Conventions for counting costs."""

    compute_bytes: int = option(
        "Bytes per value in matrix products: 4 for float32, 2 for bfloat16 autocast.", default=4, at_least=1
    )
    attention: str = option(
        "Activations that attention saves for the backward pass.",
        default="fused",
        choices={"fused": "one number per head and token", "explicit": "its n * n matrix"},
    )
    bookkeeping: str = option(
        "Code whose cost is counted.",
        default="prmim",
        choices={
            "prmim": "ours",
            "official": "the original code, which also embeds masked patches and predicts unsupervised tokens; thrown "
            "tokens cost nothing",
        },
    )

    @property
    def is_official(self) -> bool:
        """Whether the original code is counted."""
        return self.bookkeeping == "official"

    def linear(self, length: int, inputs: int, outputs: int) -> PartCost:
        """Return the cost of a linear layer on ``length`` tokens."""
        return PartCost(length * inputs * outputs, length * inputs * self.compute_bytes)

    def head(self, length: int, inputs: int, outputs: int) -> PartCost:
        """Return the cost of a linear layer and its loss, which saves the float32 error."""
        prediction = self.linear(length, inputs, outputs)
        return PartCost(prediction.macs, prediction.activation_bytes + length * outputs * 4)

    def blocks(
        self,
        size: Transformer,
        length: int,
        *,
        recompute: bool,
        final_norm: bool = True,
        more_bytes: int = 0,
    ) -> PartCost:
        """Return the cost of transformer blocks and the norm after them.

        Parameters
        ----------
        size
            The blocks.
        length
            Tokens of the sequence.
        recompute
            Whether a block saves its input only.
        final_norm
            Whether a norm follows.
        more_bytes
            Additional bytes that a block saves.
        """
        inside = size.activation_bytes(length, compute_bytes=self.compute_bytes, attention=self.attention)
        inside += size.depth * more_bytes
        norm = final_norm * norm_bytes(length, size.dim)
        if not recompute:
            return PartCost(size.macs(length), inside + norm)
        # The residual stream before each block.
        return PartCost(size.macs(length), size.depth * length * size.dim * 4 + norm, inside // size.depth)

    def cross_blocks(self, size: CrossTransformer, queries: int, keys: int, *, recompute: bool) -> PartCost:
        """Return the cost of cross-attention blocks and their norm; see :meth:`blocks`."""
        inside = size.activation_bytes(queries, keys, compute_bytes=self.compute_bytes, attention=self.attention)
        norm = norm_bytes(queries, size.dim)
        if not recompute:
            return PartCost(size.macs(queries, keys), inside + norm)
        inputs = queries * size.dim * 4 + keys * size.context_dim * self.compute_bytes
        return PartCost(size.macs(queries, keys), size.depth * inputs + norm, inside // size.depth)

    def layer_mixes(self, number: int, layers: int, length: int, dim: int) -> PartCost:
        """Return the cost of weighted sums of ``layers`` feature maps (length, dim)."""
        values = length * dim
        return PartCost(number * layers * values, layers * values * self.compute_bytes)

    def stages(self, schedule: Schedule, dim: int, reconstruction: str) -> PartCost:
        """Return the cost of progressive reconstruction; unknown for ``"custom"``."""
        if reconstruction == CUSTOM:
            return PartCost(0, 0, is_known=False)
        macs = saved = 0
        for size, known in stages(schedule):
            if reconstruction == "none" or not size:
                continue
            norm = norm_bytes(size, dim)
            if reconstruction == "conv":
                grid = schedule.grid
                # A map of the features, and one of a single channel for their number.
                macs += CONV_REPEATS * 3**grid.axes * grid.num_tokens * (dim + 1)
                saved += CONV_REPEATS * 2 * grid.num_tokens * dim * self.compute_bytes + norm
            else:
                is_learned = reconstruction == "kernel"
                weights = size * known * (RECONSTRUCTION_HEADS if is_learned else 1)
                macs += size * known * dim
                # Learned weights also save one 8-byte table index per pair of tokens.
                saved += (weights + known * dim) * self.compute_bytes + is_learned * size * known * 8 + norm
        return PartCost(macs, saved)

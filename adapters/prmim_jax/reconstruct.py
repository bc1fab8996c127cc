"""Progressive reconstruction: features of thrown tokens, stage by stage, from the features of known ones."""

from itertools import product
from math import prod
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from prmim_core import Plan, Schedule, offset_index, offset_squared_distances, take_tokens
from prmim_jax.vit import LayerNorm, constant, precision, wide

Variant = Literal["kernel", "interpolate", "conv"]
VARIANTS: tuple[str, ...] = get_args(Variant)


class ProgressiveReconstruction(nnx.Module):
    """Rebuild the features of thrown tokens from those of their neighbours, for almost nothing.

    In stage s every thrown token of that stage becomes a weighted mean of the features of all tokens known before it
    (visible, decoded, and thrown ones of earlier stages), then a layer norm (shared by the stages, eps 1e-6).

    Parameters
    ----------
    dim
        Channels of the features.
    schedule
        The static part of the plans that will come.
    variant
        How the weights come about:

        ``"kernel"``
            a softmax, over the known tokens, of a learned function of the offset between the two tokens alone: a table
            with one entry per offset and group of channels, starting at minus the squared distance.
        ``"interpolate"``
            inverse squared distances, normalised. No parameters; the norm has none either.
        ``"conv"``
            a learned depthwise 3x3 (3, 3x3x3) kernel over the grid, starting at ones, divided by the number of known
            tokens that it sees. Repeated, so that each turn fills the unknown tokens next to filled ones; what it
            fills of later stages is dropped at the end of the stage. A token that no turn reaches is 0 before the norm.
    heads
        Groups of channels with weights of their own (``"kernel"`` only); divides ``dim``.
    repeats
        Turns per stage (``"conv"`` only).

    Raises
    ------
    ValueError
        If the variant is not known, ``heads`` does not divide ``dim``, or no token is known at the start.

    Notes
    -----
    Multiply-accumulates per image: ``kernel`` and ``interpolate`` dim x (tokens of a stage) x (tokens known before it),
    summed over stages; ``conv`` dim x N x 3^axes per turn.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> from prmim_jax import ProgressiveReconstruction, make_plan
    >>> schedule = Schedule(Grid((4, 4)), TokenCounts(visible=4, decoded=4, thrown=8))
    >>> plan = make_plan(schedule, jnp.arange(32).reshape(2, 16))
    >>> rebuild = ProgressiveReconstruction(8, schedule)
    >>> rebuild(jnp.ones((2, 8, 8)), plan).shape
    (2, 16, 8)
    """

    def __init__(
        self, dim: int, schedule: Schedule, variant: Variant = "kernel", heads: int = 4, repeats: int = 3
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if variant == "kernel" and (heads < 1 or dim % heads):
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        if variant == "conv" and repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        if schedule.counts.visible + schedule.counts.decoded == 0:
            raise ValueError("schedule: expected at least one visible or decoded token, got none")
        self.dim = dim
        self.schedule = schedule
        self.variant = variant
        self.heads = heads
        self.repeats = repeats
        self.compute_dtype: np.dtype | None = None
        self.norm = LayerNorm(dim, elementwise_affine=variant != "interpolate")
        if variant == "kernel":
            start = -offset_squared_distances(schedule.grid)
            self.table = nnx.Param(jnp.asarray(np.tile(start.astype(np.float32), (heads, 1))))
        elif variant == "conv":
            self.kernel = nnx.Param(constant(1.0, dim, *(3,) * schedule.grid.axes))

    def __call__(self, features: Array, plan: Plan) -> Array:
        """Rebuild the thrown tokens.

        Parameters
        ----------
        features
            (batch, V + M, dim): features of the visible, then of the decoded tokens, in plan order.
        plan
            The plan of the batch, of this module's schedule.

        Returns
        -------
        jax.Array
            (batch, N, dim): the features of all tokens, in plan order; the given ones are passed on.

        Raises
        ------
        ValueError
            If the shapes do not fit the schedule.
        """
        num_known = self.schedule.num_known(1)
        if features.ndim != 3 or tuple(features.shape[1:]) != (num_known, self.dim):
            raise ValueError(f"features: expected shape (batch, {num_known}, {self.dim}), got {tuple(features.shape)}")
        expected = (features.shape[0], self.schedule.counts.num_tokens)
        if tuple(plan.order.shape) != expected:
            raise ValueError(f"plan: expected an order of shape {expected}, got {tuple(plan.order.shape)}")
        # Mixed in the precision of the parameters; where there are none, in float32 at least.
        dtype = wide(features.dtype) if self.norm.weight is None else self.norm.weight.dtype
        for size in self.schedule.stage_sizes:
            if size:
                mixed = self._mix(features.astype(dtype), plan.order, size)
                rebuilt = self.norm(mixed.astype(dtype)).astype(features.dtype)
                features = jnp.concatenate([features, rebuilt], axis=1)
        return features

    def _mix(self, known: Array, order: Array, size: int) -> Array:
        """Weighted means (batch, size, dim) of the known features, for the next ``size`` tokens of the order."""
        if self.variant == "kernel":
            return self._mix_by_kernel(known, order, size)
        if self.variant == "interpolate":
            return self._mix_by_distance(known, order, size)
        return self._mix_by_conv(known, order, size)

    def _mix_by_kernel(self, known: Array, order: Array, size: int) -> Array:
        logits = self.table[...].T[self._column(known, order, size)]  # batch, size, num_known, heads
        weights = jax.nn.softmax(logits, axis=2)
        batch, num_known, dim = known.shape
        groups = known.reshape(batch, num_known, self.heads, dim // self.heads)
        return self._product("bskh,bkhd->bshd", weights, groups).reshape(batch, size, dim)

    def _mix_by_distance(self, known: Array, order: Array, size: int) -> Array:
        # The distance of a token to itself is 0, and never looked up.
        inverse = 1 / np.maximum(offset_squared_distances(self.schedule.grid), 1)
        weights = jnp.asarray(inverse, known.dtype)[self._column(known, order, size)]  # batch, size, num_known
        return self._product("bsk,bkd->bsd", weights / weights.sum(-1, keepdims=True), known)

    def _product(self, subscripts: str, weights: Array, known: Array) -> Array:
        dtype = known.dtype if self.compute_dtype is None else self.compute_dtype
        return jnp.einsum(subscripts, weights.astype(dtype), known.astype(dtype), precision=precision(dtype))

    def _column(self, known: Array, order: Array, size: int) -> Array:
        """Look up the columns of the offsets from known tokens to the next ones: int (batch, size, num_known)."""
        num_known = known.shape[1]
        columns: Array = offset_index(self.schedule.grid, order[:, num_known : num_known + size], order[:, :num_known])
        return columns

    def _mix_by_conv(self, known: Array, order: Array, size: int) -> Array:
        batch, num_known, dim = known.shape
        shape = self.schedule.grid.shape
        rows = jnp.arange(batch)[:, None]
        place = order[:, :num_known]
        values = jnp.zeros((batch, prod(shape), dim), known.dtype).at[rows, place].set(known, unique_indices=True)
        is_filled = jnp.zeros((batch, prod(shape), 1), bool).at[rows, place].set(True, unique_indices=True)
        values = values.reshape(batch, *shape, dim)
        is_filled = is_filled.reshape(batch, *shape, 1)
        # Looped over, since each turn is many small operations to compile.
        (values, _), _ = lax.scan(lambda turn, _: (self._fill(*turn), None), (values, is_filled), length=self.repeats)
        rebuilt: Array = take_tokens(values.reshape(batch, prod(shape), dim), order[:, num_known : num_known + size])
        return rebuilt

    def _fill(self, values: Array, is_filled: Array) -> tuple[Array, Array]:
        """Fill the unknown tokens next to filled ones; unknown values are 0."""
        seen = jnp.sum(jnp.stack(_shifts(is_filled)), axis=0)
        kernel = jnp.moveaxis(self.kernel[...].reshape(self.dim, -1), 0, 1).astype(values.dtype)
        # Nine products and sums, which XLA fuses: a depthwise convolution of so small a map is slow on most devices.
        total = sum(weight * shifted for weight, shifted in zip(kernel, _shifts(values), strict=True))
        # Where nothing is seen the sum is 0, as it must be.
        return jnp.where(is_filled, values, (total / jnp.maximum(seen, 1)).astype(values.dtype)), seen > 0


def _shifts(x: Array) -> list[Array]:
    """Return what each place of a window of 3 along every axis sees: x (batch, *axes, channels), zeros around it."""
    axes = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *((1, 1) for _ in axes), (0, 0)))
    starts = product(range(3), repeat=len(axes))
    return [
        padded[:, *(slice(start, start + size) for start, size in zip(corner, axes, strict=True))] for corner in starts
    ]

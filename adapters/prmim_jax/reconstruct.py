"""Progressive reconstruction of features of thrown tokens, stage by stage."""

from itertools import product
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from prmim_core import Grid, Plan, offset_index, offset_squared_distances, reconstruct_stages, take_tokens
from prmim_core.reconstruct import Mix, check_reconstructed
from prmim_jax.vit import LayerNorm, constant, precision, wide

ReconstructionKind = Literal["kernel", "interpolate", "conv"]
RECONSTRUCTIONS: tuple[str, ...] = get_args(ReconstructionKind)


class ProgressiveReconstruction(nnx.Module):
    """Reconstruct features of thrown tokens from those of known tokens.

    In stage s, each thrown token of that stage becomes a weighted mean of the features of all tokens known before the
    stage (visible, decoded, and thrown tokens of earlier stages). A layer norm follows, shared by the stages, eps 1e-6.

    The module has a fixed grid and width. Counts and stages come from the plan, so the throw ratio may change during
    training.

    Parameters
    ----------
    dim
        Channels of the features.
    grid
        The grid of the tokens.
    reconstruction
        How the weights are computed:

        ``"kernel"``
            a softmax over the known tokens, of a learned function of the offset between the two tokens: a table with
            one entry per offset and group of channels, initially minus the squared distance.
        ``"interpolate"``
            normalized inverse squared distances. No parameters; the norm has none either.
        ``"conv"``
            a learned depthwise 3x3 (3, 3x3x3) convolution over the grid, initially ones, divided by the number of known
            tokens that it sees. It is repeated: each repeat fills the unknown tokens next to filled ones. Values of
            tokens of later stages are discarded at the end of the stage. A token out of reach is 0 before the norm.
    heads
        Groups of channels with their own weights (``"kernel"`` only); divides ``dim``.
    repeats
        Convolutions per stage (``"conv"`` only).
    mix
        A custom module in place of these: ``mix(features, known, thrown) -> (batch, n, dim)``, from features (batch, K,
        dim) of known tokens (batch, K) to those of thrown tokens (batch, n). The norm follows. Its parameters become
        part of this module. It may be a function without parameters.
    dtype
        Dtype of the matrix products; None: that of the parameters.

    Raises
    ------
    ValueError
        If the reconstruction is unknown, ``heads`` does not divide ``dim``, or both a reconstruction and a mix are
        given.
    TypeError
        If ``mix`` cannot be called.

    Notes
    -----
    Multiply-accumulates per image: ``kernel`` and ``interpolate`` dim x (tokens of a stage) x (tokens known before it),
    summed over stages; ``conv`` dim x N x 3^axes per repeat.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> from prmim_jax import ProgressiveReconstruction, make_plan
    >>> schedule = Schedule(Grid((4, 4)), TokenCounts(visible=4, decoded=4, thrown=8))
    >>> plan = make_plan(schedule, jnp.arange(32).reshape(2, 16))
    >>> reconstruct = ProgressiveReconstruction(8, schedule.grid)
    >>> reconstruct(jnp.ones((2, 8, 8)), plan).shape
    (2, 16, 8)
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        reconstruction: ReconstructionKind = "kernel",
        heads: int = 4,
        repeats: int = 3,
        mix: Mix | None = None,
        *,
        dtype: DTypeLike | None = None,
    ) -> None:
        if reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction: expected one of {', '.join(RECONSTRUCTIONS)}, got {reconstruction!r}")
        if mix is not None and not callable(mix):
            raise TypeError(f"mix: expected a module or a function, got {type(mix).__name__}")
        if mix is not None and reconstruction != "kernel":
            raise ValueError(f"mix: expected None with reconstruction {reconstruction!r}, got {type(mix).__name__}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if mix is None and reconstruction == "kernel" and (heads < 1 or dim % heads):
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        if reconstruction == "conv" and repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        self.dim = dim
        self.grid = grid
        self.reconstruction = reconstruction if mix is None else "custom"
        self.heads = heads
        self.repeats = repeats
        self.mix = mix
        self.dtype = dtype
        self.norm = LayerNorm(dim, elementwise_affine=reconstruction != "interpolate")
        if self.reconstruction == "kernel":
            start = -offset_squared_distances(grid)
            self.table = nnx.Param(jnp.asarray(np.tile(start.astype(np.float32), (heads, 1))))
        elif self.reconstruction == "conv":
            self.kernel = nnx.Param(constant(1.0, dim, *(3,) * grid.axes))

    def no_weight_decay(self) -> frozenset[str]:
        """Return the names of all parameters but those of ``mix``.

        Decay towards 0 would make the weights of near and far tokens equal.
        """
        found = (path for path, value in nnx.iter_graph(self) if isinstance(value, nnx.Param))
        return frozenset(".".join(map(str, path)) for path in found if path[0] != "mix")

    def __call__(self, features: Array, plan: Plan, *, visible_features: bool = True) -> Array:
        """Reconstruct the thrown tokens.

        Parameters
        ----------
        features
            (batch, V + M, dim): features of the visible, then of the decoded tokens, in plan order; (batch, M, dim)
            without ``visible_features``.
        plan
            The plan of the batch, on the grid of this module.
        visible_features
            Whether visible tokens have features. False for a decoder that returns features of decoded tokens only (such
            as CrossMAE's): thrown tokens are reconstructed from decoded tokens and those of earlier stages.

        Returns
        -------
        jax.Array
            (batch, N, dim): the features of all tokens, in plan order; the given ones are unchanged. Without
            ``visible_features``, (batch, M + T, dim): those of the masked tokens.

        Raises
        ------
        ValueError
            If ``features`` do not fit the plan, the plan is on another grid, no token is known, or ``mix`` returns
            another shape.
        """
        if plan.schedule.grid != self.grid:
            raise ValueError(f"plan: expected one on {self.grid}, got {plan.schedule.grid}")
        if features.shape[-1] != self.dim:
            raise ValueError(f"features: expected {self.dim} channels, got shape {tuple(features.shape)}")
        # In the precision of the parameters; without parameters, in float32 or wider.
        dtype = wide(features.dtype) if self.norm.weight is None else self.norm.weight.dtype

        def mix(features: Array, known: Array, thrown: Array) -> Array:
            mixed = self._mix(features.astype(dtype), known, thrown)
            return self.norm(mixed.astype(dtype)).astype(features.dtype)

        return reconstruct_stages(features, plan, mix, visible_features=visible_features)

    def _mix(self, features: Array, known: Array, thrown: Array) -> Array:
        """Return weighted means (batch, n, dim) of known features for thrown tokens."""
        if self.mix is not None:
            mixed: Array = self.mix(features, known, thrown)
            check_reconstructed(mixed, features, thrown)
            return mixed
        if self.reconstruction == "kernel":
            return self._mix_by_kernel(features, known, thrown)
        if self.reconstruction == "interpolate":
            return self._mix_by_distance(features, known, thrown)
        return self._mix_by_conv(features, known, thrown)

    def _mix_by_kernel(self, features: Array, known: Array, thrown: Array) -> Array:
        logits = self.table[...].T[offset_index(self.grid, thrown, known)]  # batch, n, num_known, heads
        weights = jax.nn.softmax(logits, axis=2)
        groups = features.reshape(*features.shape[:2], self.heads, self.dim // self.heads)
        return self._product("bskh,bkhd->bshd", weights, groups).reshape(*thrown.shape, self.dim)

    def _mix_by_distance(self, features: Array, known: Array, thrown: Array) -> Array:
        # The clamp avoids a division by zero for the offset of a token to itself, which is never looked up.
        inverse = 1 / np.maximum(offset_squared_distances(self.grid), 1)
        weights = jnp.asarray(inverse, features.dtype)[offset_index(self.grid, thrown, known)]  # batch, n, num_known
        return self._product("bsk,bkd->bsd", weights / weights.sum(-1, keepdims=True), features)

    def _product(self, subscripts: str, weights: Array, features: Array) -> Array:
        dtype = features.dtype if self.dtype is None else self.dtype
        return jnp.einsum(subscripts, weights.astype(dtype), features.astype(dtype), precision=precision(dtype))

    def _mix_by_conv(self, features: Array, known: Array, thrown: Array) -> Array:
        batch, _, dim = features.shape
        shape, rows = self.grid.shape, jnp.arange(batch)[:, None]
        num_tokens = self.grid.num_tokens
        values = jnp.zeros((batch, num_tokens, dim), features.dtype).at[rows, known].set(features, unique_indices=True)
        is_filled = jnp.zeros((batch, num_tokens, 1), bool).at[rows, known].set(True, unique_indices=True)
        values, is_filled = values.reshape(batch, *shape, dim), is_filled.reshape(batch, *shape, 1)
        # A loop, since each repeat is many small operations to compile.
        (values, _), _ = lax.scan(lambda turn, _: (self._fill(*turn), None), (values, is_filled), length=self.repeats)
        return take_tokens(values.reshape(batch, num_tokens, dim), thrown)

    def _fill(self, values: Array, is_filled: Array) -> tuple[Array, Array]:
        """Fill the unknown tokens next to filled ones; unknown values are 0."""
        seen = jnp.sum(jnp.stack(_shifts(is_filled)), axis=0)
        kernel = jnp.moveaxis(self.kernel[...].reshape(self.dim, -1), 0, 1).astype(values.dtype)
        # Nine products and sums, which XLA fuses: depthwise convolutions of such small maps are slow on most devices.
        total = sum(weight * shifted for weight, shifted in zip(kernel, _shifts(values), strict=True))
        # Without filled neighbours, the sum is 0, as wanted.
        return jnp.where(is_filled, values, (total / jnp.maximum(seen, 1)).astype(values.dtype)), seen > 0


def _shifts(x: Array) -> list[Array]:
    """Return the shifts of x by -1, 0 and 1 along each axis, zero-padded.

    ``x`` has the shape (batch, *axes, channels).
    """
    axes = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *((1, 1) for _ in axes), (0, 0)))
    starts = product(range(3), repeat=len(axes))
    return [
        padded[:, *(slice(start, start + size) for start, size in zip(corner, axes, strict=True))] for corner in starts
    ]


def no_weight_decay(module: nnx.Module) -> frozenset[str]:
    """Return the reconstruction parameters of a module that have no weight decay.

    Examples
    --------
    >>> from prmim_core import Grid
    >>> model = nnx.Dict({"stages": ProgressiveReconstruction(8, Grid((4, 4)))})
    >>> sorted(no_weight_decay(model))
    ['stages.norm.bias', 'stages.norm.weight', 'stages.table']
    """
    return frozenset(
        ".".join(map(str, (*path, name)))
        for path, part in nnx.iter_modules(module)
        if isinstance(part, ProgressiveReconstruction)
        for name in part.no_weight_decay()
    )

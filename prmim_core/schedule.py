"""The plan of an image: one permutation of its tokens, and static boundaries in it."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import get_args

from prmim_core._arrays import Array, argsort, array_namespace, device_of, register_pytree, scatter
from prmim_core.counts import TokenCounts
from prmim_core.coverage import nearest_known_distance
from prmim_core.grid import Grid
from prmim_core.masking import block_visible, check_weights, random_visible, take_units, unit_tokens
from prmim_core.noise import inverse_permutation
from prmim_core.sampling import Sampler, furthest_point_sampling
from prmim_core.throwing import Seed, Throwing, choose_decoded


@dataclass(frozen=True)
class Schedule:
    """All that is static about plans: sizes and rules. Hashable, so ``jax.jit`` takes it as a static argument.

    Parameters
    ----------
    grid
        The grid of the tokens.
    counts
        How many are visible, decoded and thrown; they must add up to the grid.
    stages
        S, in how many stages the thrown tokens are rebuilt, at least 1.
    throwing
        ``"furthest"``, ``"random"``, ``"weighted"`` or ``"cell"``: see :mod:`prmim_core.throwing`.
    seed
        ``"visible"`` or ``"none"``: where furthest sampling starts; the other strategies ignore it.
    unit
        Tokens along each axis of what is decoded or thrown as a whole; None: single tokens (which a unit of ones
        becomes too). Must divide the grid, and its number of tokens the counts.

    Raises
    ------
    TypeError
        If ``stages`` or a size of the unit is not an integer.
    ValueError
        If the counts do not add up or do not fit the unit, ``stages`` is not positive, the unit does not divide the
        grid or a rule is not known.

    Examples
    --------
    >>> from prmim_core import count_tokens
    >>> schedule = Schedule(Grid((14, 14)), count_tokens(196, 0.75, 0.5), stages=2)
    >>> schedule.stage_sizes, schedule.num_known(1), schedule.num_known(2)
    ((49, 49), 98, 147)
    >>> simmim = count_tokens(196, 0.6, 0.25, mask_unit=4, throw_unit=4)
    >>> Schedule(Grid((14, 14)), simmim, unit=(2, 2)).stage_sizes
    (24, 24)
    """

    grid: Grid
    counts: TokenCounts
    stages: int = 2
    throwing: Throwing = "furthest"
    seed: Seed = "visible"
    unit: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.counts.num_tokens != self.grid.num_tokens:
            raise ValueError(
                f"counts: expected {self.grid.num_tokens} tokens in all, as in the grid, got {self.counts.num_tokens}"
            )
        if not isinstance(self.stages, int) or isinstance(self.stages, bool):
            raise TypeError(f"stages: expected an integer, got {self.stages!r}")
        if self.stages < 1:
            raise ValueError(f"stages: expected at least 1, got {self.stages}")
        for name, allowed in (("throwing", get_args(Throwing)), ("seed", get_args(Seed))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.unit is not None:
            self._check_unit(self.unit)

    def _check_unit(self, unit: tuple[int, ...]) -> None:
        self.grid.units(unit)
        size = prod(unit)
        if self.counts.decoded % size or self.counts.thrown % size:
            raise ValueError(
                f"counts: expected decoded and thrown tokens in units of {size}, got {self.counts.decoded} and "
                f"{self.counts.thrown}"
            )
        # Equal schedules are equal keys, however their unit was written.
        object.__setattr__(self, "unit", None if size == 1 else tuple(int(n) for n in unit))

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Thrown tokens per stage: they differ by at most one, larger ones first, and can be 0."""
        size, larger = divmod(self.counts.thrown, self.stages)
        return tuple(size + (stage < larger) for stage in range(self.stages))

    def num_known(self, stage: int) -> int:
        """Count the tokens known before a stage: visible, decoded and those of earlier stages.

        Parameters
        ----------
        stage
            1 to S.
        """
        if not 1 <= stage <= self.stages:
            raise ValueError(f"stage: expected 1 to {self.stages}, got {stage}")
        return self.counts.visible + self.counts.decoded + sum(self.stage_sizes[: stage - 1])


@dataclass(frozen=True, eq=False)
class Plan:
    """Which token of each image does what: visible, decoded, or thrown and rebuilt in which stage.

    Parameters
    ----------
    order
        int (batch, N): a permutation of every image's tokens: visible, decoded, stage 1, ..., stage S. Features that
        are gathered along it stay in this order; :attr:`restore` brings them back to raster order.
    schedule
        The static part.

    Notes
    -----
    A pytree under JAX, whose only leaf is ``order``.
    """

    order: Array
    schedule: Schedule

    def __post_init__(self) -> None:
        register_pytree(Plan, self.order, "order", "schedule")

    @property
    def visible(self) -> Array:
        """Tokens that the encoder sees: int (batch, V)."""
        return self.order[:, : self.schedule.counts.visible]

    @property
    def decoded(self) -> Array:
        """Masked tokens that the decoder rebuilds: int (batch, M)."""
        counts = self.schedule.counts
        return self.order[:, counts.visible : counts.visible + counts.decoded]

    @property
    def thrown(self) -> Array:
        """Masked tokens that the decoder never sees, stage after stage: int (batch, T)."""
        counts = self.schedule.counts
        return self.order[:, counts.visible + counts.decoded :]

    @property
    def masked(self) -> Array:
        """Decoded and thrown tokens: int (batch, M + T)."""
        return self.order[:, self.schedule.counts.visible :]

    def known(self, stage: int) -> Array:
        """Return the tokens known before a stage, 1 to S: int (batch, num_known(stage))."""
        return self.order[:, : self.schedule.num_known(stage)]

    def stage(self, stage: int) -> Array:
        """Return the tokens of a stage, 1 to S: int (batch, stage_sizes[stage - 1])."""
        start = self.schedule.num_known(stage)
        return self.order[:, start : start + self.schedule.stage_sizes[stage - 1]]

    @property
    def restore(self) -> Array:
        """The inverse of ``order``, int (batch, N): the place of each token in plan order."""
        return inverse_permutation(self.order)


def make_plan(
    schedule: Schedule,
    noise: Array,
    visible: Array | None = None,
    weights: Array | None = None,
    *,
    sampler: Sampler = furthest_point_sampling,
) -> Plan:
    """Lay out the tokens of every image.

    Parameters
    ----------
    schedule
        Sizes and rules.
    noise
        int32 (batch, N), for instance from :func:`prmim_core.counter_noise`; the plan is a pure function of it.
    visible
        int (batch, V), distinct tokens, from a masking strategy; None: :func:`prmim_core.random_visible`, or
        :func:`prmim_core.block_visible` where the schedule has a unit. There they must be whole units, which is not
        checked, since it is a matter of values.
    weights
        float (batch, N), with ``throwing="weighted"`` only.
    sampler
        Does furthest sampling, called with (grid, number, noise, known, candidates). A framework may have a kernel for
        it, as :mod:`prmim_torch.furthest` is; it must pick the same tokens.

    Returns
    -------
    Plan
        Thrown tokens are sorted by the distance to the nearest visible or decoded token, then by noise, and cut into
        stages of equal size: those next to known tokens are rebuilt first and help to rebuild the others.

    Raises
    ------
    ValueError
        If a shape does not fit the schedule, or weights are missing or not wanted.

    Notes
    -----
    With a unit, the decoded units are chosen as tokens are, on the grid of units (``grid.units(unit)``): the noise of a
    unit is that of its first token, its weight the sum of their weights. They are laid out unit by unit in the order of
    choice, in raster order inside. Stages are made of single tokens all the same.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import count_tokens, counter_noise
    >>> schedule = Schedule(Grid((4, 4)), count_tokens(16, 0.75, 0.5))
    >>> plan = make_plan(schedule, counter_noise(0, 0, np.arange(1), 16))
    >>> plan.visible.shape, plan.decoded.shape, plan.stage(1).shape, plan.stage(2).shape
    ((1, 4), (1, 4), (1, 4), (1, 4))
    >>> sorted(plan.order[0].tolist()) == list(range(16))
    True
    """
    xp = array_namespace(*[array for array in (noise, visible, weights) if array is not None])
    grid, counts = schedule.grid, schedule.counts
    if noise.ndim != 2 or noise.shape[1] != grid.num_tokens:
        raise ValueError(f"noise: expected shape (batch, {grid.num_tokens}), got {tuple(noise.shape)}")
    if visible is None:
        if schedule.unit is None:
            visible = random_visible(noise, counts.visible)
        else:
            visible = block_visible(noise, grid, schedule.unit, counts.visible // prod(schedule.unit))
    elif tuple(visible.shape) != (noise.shape[0], counts.visible):
        expected = (noise.shape[0], counts.visible)
        raise ValueError(f"visible: expected shape {expected}, got {tuple(visible.shape)}")
    elif not xp.isdtype(visible.dtype, "integral"):
        raise TypeError(f"visible: expected integers, got {visible.dtype}")
    is_visible = is_member(visible, grid.num_tokens)
    decoded = _decoded(schedule, noise, is_visible, weights, sampler)
    is_known = is_visible | is_member(decoded, grid.num_tokens)
    by_noise = argsort(noise)
    distance = xp.take_along_axis(nearest_known_distance(grid, is_known), by_noise, axis=1)
    by_distance = xp.take_along_axis(by_noise, argsort(distance), axis=1)
    thrown = by_distance[:, counts.visible + counts.decoded :]  # known tokens lie at distance 0, so they come first
    parts = [xp.astype(part, thrown.dtype) for part in (visible, decoded, thrown)]
    return Plan(xp.concat(parts, axis=1), schedule)


def _decoded(schedule: Schedule, noise: Array, is_visible: Array, weights: Array | None, sampler: Sampler) -> Array:
    grid, unit, number = schedule.grid, schedule.unit, schedule.counts.decoded
    choose = partial(choose_decoded, schedule.throwing, seed=schedule.seed, sampler=sampler)
    if unit is None:
        return choose(grid, noise, is_visible, number, weights=weights)
    xp = array_namespace(noise)
    tokens = unit_tokens(grid, unit, noise)
    first = tokens[:, 0]
    unit_weights = None
    if weights is not None:
        check_weights(weights, noise)
        by_unit = xp.take(weights, xp.reshape(tokens, (-1,)), axis=1)
        unit_weights = xp.sum(xp.reshape(by_unit, (noise.shape[0], *tokens.shape)), axis=2)
    units = choose(
        grid.units(unit),
        xp.take(noise, first, axis=1),
        xp.take(is_visible, first, axis=1),
        number // prod(unit),
        weights=unit_weights,
    )
    return take_units(tokens, units)


def is_member(index: Array, num_tokens: int) -> Array:
    """Turn the indices of some tokens into a mask.

    Parameters
    ----------
    index
        int (batch, n), in [0, N).
    num_tokens
        N.

    Returns
    -------
    array
        bool (batch, N), True where a row of ``index`` has the token.

    Examples
    --------
    >>> import numpy as np
    >>> is_member(np.asarray([[2, 0]]), 4).tolist()
    [[True, False, True, False]]
    """
    xp = array_namespace(index)
    return scatter(index, xp.ones(index.shape[1], dtype=xp.bool, device=device_of(index)), num_tokens)


def take_tokens(x: Array, index: Array) -> Array:
    """Gather tokens.

    Parameters
    ----------
    x
        (batch, N, ...).
    index
        int (batch, n).

    Returns
    -------
    array
        (batch, n, ...), ``x[b, index[b, i]]``.

    Raises
    ------
    ValueError
        If the batch sizes differ or a shape has too few axes.

    Examples
    --------
    >>> import numpy as np
    >>> take_tokens(np.asarray([[[1.0], [2.0], [3.0]]]), np.asarray([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    xp = array_namespace(x, index)
    if index.ndim != 2 or x.ndim < 2 or x.shape[0] != index.shape[0]:
        expected = "x (batch, N, ...) and index (batch, n)"
        raise ValueError(f"index: expected {expected}, got {tuple(x.shape)} and {tuple(index.shape)}")
    # Whole rows of one long list: a gather value by value costs frameworks many times as much.
    batch, length = x.shape[:2]
    starts = xp.arange(batch, dtype=index.dtype, device=device_of(index))[:, None] * length
    rows = xp.reshape(index + starts, (-1,))
    taken = xp.take(xp.reshape(x, (batch * length, *x.shape[2:])), rows, axis=0)
    return xp.reshape(taken, (*index.shape, *x.shape[2:]))

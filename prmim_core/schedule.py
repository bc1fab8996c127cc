"""Schedules and plans: permutations of each image's tokens with static bounds."""

from dataclasses import dataclass
from math import prod

from prmim_core._arrays import (
    Array,
    Namespace,
    argsort,
    array_namespace,
    as_index,
    device_of,
    on_host,
    register_pytree,
    scatter,
    take_along_rows,
)
from prmim_core._checks import (
    check_arrays,
    check_choice,
    check_index,
    check_integer,
    check_integers,
    check_noise,
    check_tokens,
    check_type,
    check_weights,
)
from prmim_core.counts import TokenCounts
from prmim_core.coverage import _nearest_known_distance
from prmim_core.grid import Grid
from prmim_core.masking import _block_visible, _take_units, _unit_tokens, _unit_weights
from prmim_core.sampling import Sampler
from prmim_core.throwing import FurthestFrom, Throwing, ThrowingFunction, _choose_decoded


@dataclass(frozen=True)
class Schedule:
    """The static part of a plan: sizes and rules.

    Hashable, so it can be a static argument of ``jax.jit``.

    Parameters
    ----------
    grid
        The grid of the tokens.
    counts
        Numbers of visible, decoded and thrown tokens; their sum is the number of tokens of the grid.
    stages
        S, number of reconstruction stages of the thrown tokens, at least 1. Stages beyond the number of thrown tokens
        are empty.
    throwing
        ``"furthest"``, ``"random"``, ``"weighted"`` or ``"cell"``: a strategy of :mod:`prmim_core.throwing`. Or a
        function ``(grid, counts, noise, is_visible) -> decoded``, from noise and mask (batch, N) to distinct masked
        tokens, int (batch, M). Two schedules with functions are equal only if the function is the same object. With a
        unit, the function receives the grid of units, and counts and arrays of units.
    furthest_from
        ``"visible"`` or ``"none"``: see :func:`prmim_core.furthest_decoded`. Other strategies ignore it.
    unit
        Tokens along each axis of the blocks that are decoded or thrown together; None (or all ones): single tokens.
        Must divide the grid; its number of tokens must divide the decoded and the thrown count.

    Raises
    ------
    TypeError
        If ``grid`` or ``counts`` is of another class, or ``stages`` or a size of the unit is not an integer.
    ValueError
        If the counts do not fit the grid or the unit, ``stages`` is not positive, the unit does not divide the grid or
        a rule is unknown.

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
    throwing: Throwing | ThrowingFunction = "furthest"
    furthest_from: FurthestFrom = "visible"
    unit: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_type("grid", self.grid, Grid)
        check_type("counts", self.counts, TokenCounts)
        if self.counts.num_tokens != self.grid.num_tokens:
            raise ValueError(
                f"counts: expected {self.grid.num_tokens} tokens in all, as in the grid, got {self.counts.num_tokens}"
            )
        object.__setattr__(self, "stages", check_integer("stages", self.stages, 1))
        if not callable(self.throwing):
            check_choice("throwing", self.throwing, Throwing, ", or a function")
        check_choice("furthest_from", self.furthest_from, FurthestFrom)
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
        # Normalized, so that equal schedules compare and hash equal.
        object.__setattr__(self, "unit", None if size == 1 else tuple(int(n) for n in unit))

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Thrown tokens per stage. Sizes differ by at most one, larger first; may be 0."""
        size, larger = divmod(self.counts.thrown, self.stages)
        return tuple(size + (stage < larger) for stage in range(self.stages))

    def num_known(self, stage: int) -> int:
        """Return the number of known tokens before a stage.

        These are visible and decoded tokens, and those of all earlier stages.

        Parameters
        ----------
        stage
            1 to S.
        """
        if not 1 <= stage <= self.stages:
            raise ValueError(f"stage: expected 1 to {self.stages}, got {stage}")
        size, larger = divmod(self.counts.thrown, self.stages)
        return self.counts.visible + self.counts.decoded + (stage - 1) * size + min(stage - 1, larger)


@dataclass(frozen=True, eq=False)
class Plan:
    """The role of each token: visible, decoded, or thrown and assigned to a stage.

    Features stay in plan order during a forward pass; :attr:`restore` brings them back to raster order. Under JAX a
    plan is a pytree with the leaf ``order``.

    Parameters
    ----------
    order
        int (batch, N), a permutation of each image's tokens: visible, decoded, stage 1, ..., stage S. Not validated
        here: call :meth:`check` for plans from other sources.
    schedule
        The static part.

    Examples
    --------
    >>> import numpy as np
    >>> plan = Plan(np.asarray([[3, 0, 2, 1]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    >>> plan.visible.tolist(), plan.decoded.tolist(), plan.thrown.tolist(), plan.stage(2).tolist()
    ([[3]], [[0]], [[2, 1]], [[1]])
    >>> plan.mask.tolist()
    [[True, True, True, False]]
    """

    order: Array
    schedule: Schedule

    def __post_init__(self) -> None:
        register_pytree(Plan, self.order, "order", "schedule")

    @property
    def visible(self) -> Array:
        """Tokens that the encoder sees, int (batch, V)."""
        return self.order[:, : self.schedule.counts.visible]

    @property
    def decoded(self) -> Array:
        """Masked tokens that pass through the decoder, int (batch, M)."""
        return self.order[:, self.schedule.counts.visible : self.schedule.num_known(1)]

    @property
    def thrown(self) -> Array:
        """Masked tokens that skip the decoder, stage by stage, int (batch, T)."""
        return self.order[:, self.schedule.num_known(1) :]

    @property
    def masked(self) -> Array:
        """Decoded and thrown tokens, int (batch, M + T)."""
        return self.order[:, self.schedule.counts.visible :]

    def known(self, stage: int) -> Array:
        """Return the tokens known before a stage, 1 to S: int (batch, num_known(stage))."""
        return self.order[:, : self.schedule.num_known(stage)]

    def stage(self, stage: int) -> Array:
        """Return the tokens of a stage, 1 to S: int (batch, stage_sizes[stage - 1])."""
        start = self.schedule.num_known(stage)
        return self.order[:, start : start + self.schedule.stage_sizes[stage - 1]]

    def represented(self, *, reconstructed: bool) -> Array:
        """Return the tokens that have features after a forward pass, in plan order.

        Parameters
        ----------
        reconstructed
            Whether thrown tokens are reconstructed; a property of the method, not of the plan.

        Returns
        -------
        array
            All tokens, int (batch, N); without reconstruction, visible and decoded tokens, int (batch, V + M).
        """
        return self.order if reconstructed else self.known(1)

    def supervised(self, *, reconstructed: bool) -> Array:
        """Return the masked tokens that can have a loss, in plan order.

        Parameters
        ----------
        reconstructed
            As in :meth:`represented`.

        Returns
        -------
        array
            All masked tokens, int (batch, M + T); without reconstruction, decoded tokens, int (batch, M).
        """
        return self.masked if reconstructed else self.decoded

    @property
    def restore(self) -> Array:
        """Position of each token in plan order, the inverse of ``order``, int (batch, N)."""
        xp, length = array_namespace(self.order), self.schedule.counts.num_tokens
        check_tokens(xp, "order", self.order, length)
        return scatter(xp, self.order, xp.arange(length, device=device_of(self.order)), length)

    @property
    def mask(self) -> Array:
        """The mask in raster order, bool (batch, N), True where masked."""
        xp, length = array_namespace(self.order), self.schedule.counts.num_tokens
        check_tokens(xp, "order", self.visible, length)
        return ~_is_member(xp, self.visible, length)

    def check(self) -> None:
        """Validate the values of ``order``: permutations, with whole units.

        For tests and for plans from other sources. Reads values: it waits for the device, and does not work under
        ``jax.jit`` or ``torch.compile``.

        Raises
        ------
        TypeError
            If ``order`` does not hold integers.
        ValueError
            If ``order`` is not (batch, N), a row is not a permutation, or a boundary cuts a unit of the schedule.
        """
        xp, length, unit = array_namespace(self.order), self.schedule.counts.num_tokens, self.schedule.unit
        check_integers(xp, "order", self.order)
        if self.order.ndim != 2 or self.order.shape[1] != length:
            raise ValueError(f"order: expected shape (batch, {length}), got {tuple(self.order.shape)}")
        order, device = as_index(xp, self.order), device_of(self.order)
        place = xp.arange(length, device=device)
        is_permutation = xp.all(xp.sort(order, axis=1) == place[None, :], axis=1)
        _check_rows(xp, "order", is_permutation, f"a permutation of 0 to {length - 1}")
        if unit is None:
            return
        is_masked, is_thrown = place >= self.schedule.counts.visible, place >= self.schedule.num_known(1)
        kind = scatter(xp, order, xp.astype(is_masked, xp.int32) + xp.astype(is_thrown, xp.int32), length)
        is_whole = _is_whole(xp, self.schedule.grid, unit, kind)
        _check_rows(xp, "order", is_whole, f"visible, decoded and thrown tokens in whole units {unit}")


def _is_whole(xp: Namespace, grid: Grid, unit: tuple[int, ...], kind: Array) -> Array:
    """Return whether each unit holds one kind of token: bool (batch,)."""
    units = _unit_tokens(xp, grid, unit, device_of(kind))
    kind = xp.reshape(xp.take(kind, xp.reshape(units, (-1,)), axis=1), (-1, *units.shape))
    return xp.all(xp.min(kind, axis=2) == xp.max(kind, axis=2), axis=1)


def _check_rows(xp: Namespace, name: str, is_valid: Array, expected: str) -> None:
    """Raise ValueError unless all rows are valid. Reads values."""
    if not bool(xp.all(is_valid)):
        first = int(xp.argmin(xp.astype(is_valid, xp.int32)))
        raise ValueError(f"{name}: expected {expected} in every row, got an invalid row {first}")


def make_plan(
    schedule: Schedule,
    noise: Array,
    visible: Array | None = None,
    decoded: Array | None = None,
    weights: Array | None = None,
    *,
    sampler: Sampler | None = None,
) -> Plan:
    """Choose visible, decoded and thrown tokens, and sort thrown ones into stages.

    Parameters
    ----------
    schedule
        Sizes and rules.
    noise
        (batch, N), any real dtype, for instance from :func:`prmim_core.counter_noise` or ``torch.rand``. The plan is a
        pure function of it. Ties are broken in raster order. Throwing by ``"weighted"`` needs int32, ``"cell"``
        integers.
    visible
        int (batch, V), distinct tokens from a masking strategy; None: :func:`prmim_core.random_visible`, or
        :func:`prmim_core.block_visible` if the schedule has a unit. Must be whole units then.
    decoded
        int (batch, M), distinct masked tokens from a throwing strategy; None: the strategy of the schedule. In whole
        units if the schedule has a unit.
    weights
        float (batch, N), for ``throwing="weighted"`` only.
    sampler
        Replaces the core's loop for furthest sampling, for instance by a GPU kernel. Must pick the same tokens.

    Returns
    -------
    Plan
        Thrown tokens are sorted by distance to the nearest visible or decoded token, then by noise, and cut into
        stages. Tokens next to known ones come first; later stages use them.

    Raises
    ------
    TypeError
        If an argument is not an array, or a dtype does not fit.
    ValueError
        If a shape does not fit the schedule, weights are missing or not needed, noise or weights have NaN, or
        ``visible`` or ``decoded`` repeats a token, cuts a unit or has tokens in common.
    IndexError
        If ``visible`` or ``decoded`` has a value outside of [0, N).

    Notes
    -----
    The result of a function in ``schedule.throwing`` is checked like ``decoded``; messages name the function.

    Values are checked on the host only: for NumPy, and for PyTorch on a CPU when not compiled. Elsewhere, wrong values
    give a plan that :meth:`Plan.check` rejects, or a device error.

    With a unit, decoded units are chosen like tokens, on the grid of units. A unit takes the noise of its first token
    and the sum of its weights. Decoded tokens come unit by unit, in raster order within a unit. Stages consist of
    single tokens.

    O(M N) integer operations per image for furthest sampling, O(N (log N + sum of the grid's sides)) for the rest.

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
    xp = check_plan_arguments(schedule, noise, visible, decoded, weights)
    grid = schedule.grid
    by_noise = argsort(xp, noise)
    visible = _visible(xp, schedule, noise, by_noise) if visible is None else _given(xp, schedule, visible)
    is_visible = _is_member(xp, visible, grid.num_tokens)
    if decoded is None:
        decoded = _decoded(xp, schedule, noise, is_visible, weights, sampler)
    else:
        decoded = as_index(xp, decoded)
        _check_known(xp, schedule, "decoded", xp.concat([visible, decoded], axis=1), "distinct masked tokens")
    is_known = is_visible | _is_member(xp, decoded, grid.num_tokens)
    distance = take_along_rows(xp, _nearest_known_distance(xp, grid, is_known), by_noise)
    by_distance = take_along_rows(xp, by_noise, argsort(xp, distance))
    thrown = by_distance[:, schedule.num_known(1) :]  # known tokens have distance 0, so they come first
    parts = [xp.astype(part, thrown.dtype) for part in (visible, decoded, thrown)]
    return Plan(xp.concat(parts, axis=1), schedule)


def check_plan_arguments(
    schedule: Schedule, noise: Array, visible: Array | None, decoded: Array | None, weights: Array | None
) -> Namespace:
    """Validate the arguments of :func:`make_plan` one by one; return their namespace."""
    check_type("schedule", schedule, Schedule)
    optional = {"visible": visible, "decoded": decoded, "weights": weights}
    xp = check_arrays(noise=noise, **{name: array for name, array in optional.items() if array is not None})
    counts = schedule.counts
    check_noise(noise, counts.num_tokens)
    if decoded is None:
        _check_throwing(xp, schedule, noise, weights)
    elif weights is not None:
        raise ValueError("weights: expected None where decoded tokens are given, got an array")
    for name, index, count in (("visible", visible, counts.visible), ("decoded", decoded, counts.decoded)):
        if index is None:
            continue
        check_index(xp, name, index)
        if tuple(index.shape) != (noise.shape[0], count):
            raise ValueError(f"{name}: expected shape {(noise.shape[0], count)}, got {tuple(index.shape)}")
        check_tokens(xp, name, index, counts.num_tokens)
    return xp


def choose_by_function(schedule: Schedule, noise: Array, visible: Array | None) -> tuple[Array, Array]:
    """Return visible tokens, and decoded tokens chosen by the schedule's function.

    For adapters that compute plans in an opaque operator.

    The arguments must have passed :func:`check_plan_arguments`.
    """
    xp = array_namespace(noise)
    if visible is None:
        visible = _visible(xp, schedule, noise, argsort(xp, noise))
    visible = _given(xp, schedule, visible)
    is_visible = _is_member(xp, visible, schedule.grid.num_tokens)
    return visible, _decoded(xp, schedule, noise, is_visible, None, None)


def _visible(xp: Namespace, schedule: Schedule, noise: Array, by_noise: Array) -> Array:
    """Choose visible tokens or units of lowest noise: int (batch, V), lowest first."""
    grid, unit, number = schedule.grid, schedule.unit, schedule.counts.visible
    return by_noise[:, :number] if unit is None else _block_visible(xp, grid, unit, number // prod(unit), noise)


def _given(xp: Namespace, schedule: Schedule, visible: Array) -> Array:
    """Validate visible tokens given by the caller; return them as indices."""
    visible = as_index(xp, visible)
    _check_known(xp, schedule, "visible", visible, "distinct tokens")
    return visible


def _check_known(xp: Namespace, schedule: Schedule, name: str, known: Array, distinct: str) -> None:
    """Raise ValueError unless tokens are distinct and in whole units.

    No-op where values cannot be read.
    """
    if on_host(known) is None:
        return
    ranked = xp.sort(known, axis=1)
    _check_rows(xp, name, xp.all(ranked[:, 1:] != ranked[:, :-1], axis=1), distinct)
    if schedule.unit is not None:
        is_known = xp.astype(_is_member(xp, known, schedule.grid.num_tokens), xp.int32)
        _check_rows(xp, name, _is_whole(xp, schedule.grid, schedule.unit, is_known), f"whole units {schedule.unit}")


def _check_throwing(xp: Namespace, schedule: Schedule, noise: Array, weights: Array | None) -> None:
    throwing = schedule.throwing
    if (weights is not None) != (throwing == "weighted"):
        came = "None" if weights is None else "an array"
        raise ValueError(f"weights: expected an array with throwing='weighted' only, got {came} with {throwing!r}")
    if weights is not None:
        check_weights(xp, noise, weights)
    if throwing == "cell":
        check_integers(xp, "noise", noise)


def _decoded(
    xp: Namespace,
    schedule: Schedule,
    noise: Array,
    is_visible: Array,
    weights: Array | None,
    sampler: Sampler | None,
) -> Array:
    """Choose the decoded tokens, or whole units of them: int (batch, M)."""
    grid, unit, counts = schedule.grid, schedule.unit, schedule.counts
    if unit is None:
        return _choose(xp, schedule, grid, counts, noise, is_visible, weights, sampler)
    tokens, size = _unit_tokens(xp, grid, unit, device_of(noise)), prod(unit)
    first = tokens[:, 0]
    units = _choose(
        xp,
        schedule,
        grid.units(unit),
        TokenCounts(counts.visible // size, counts.decoded // size, counts.thrown // size),
        xp.take(noise, first, axis=1),
        xp.take(is_visible, first, axis=1),
        None if weights is None else _unit_weights(xp, tokens, weights),
        sampler,
    )
    return _take_units(xp, tokens, units)


def _choose(
    xp: Namespace,
    schedule: Schedule,
    grid: Grid,
    counts: TokenCounts,
    noise: Array,
    is_visible: Array,
    weights: Array | None,
    sampler: Sampler | None,
) -> Array:
    """Choose decoded tokens or units by the schedule's strategy: int (batch, n)."""
    throwing = schedule.throwing
    if callable(throwing):
        return _call(xp, throwing, grid, counts, noise, is_visible)
    return _choose_decoded(
        xp,
        throwing,
        grid,
        counts.decoded,
        noise,
        is_visible,
        furthest_from=schedule.furthest_from,
        weights=weights,
        sampler=sampler,
    )


def _call(
    xp: Namespace, throwing: ThrowingFunction, grid: Grid, counts: TokenCounts, noise: Array, is_visible: Array
) -> Array:
    """Call a throwing function and validate its result: int (batch, decoded)."""
    name = f"throwing {getattr(throwing, '__name__', type(throwing).__name__)}"
    decoded = throwing(grid, counts, noise, is_visible)
    if check_arrays(**{name: decoded}) is not xp:
        raise TypeError(f"{name}: expected an array of the library of its arguments, got a {type(decoded).__name__}")
    check_index(xp, name, decoded)
    expected = (noise.shape[0], counts.decoded)
    if tuple(decoded.shape) != expected:
        raise ValueError(f"{name}: expected decoded tokens of shape {expected}, got {tuple(decoded.shape)}")
    check_tokens(xp, name, decoded, grid.num_tokens)
    decoded = as_index(xp, decoded)
    if on_host(decoded) is not None:
        ranked = xp.sort(decoded, axis=1)
        is_distinct = xp.all(ranked[:, 1:] != ranked[:, :-1], axis=1)
        is_masked = xp.all(~take_along_rows(xp, is_visible, decoded), axis=1)
        _check_rows(xp, name, is_distinct & is_masked, "distinct masked tokens")
    return decoded


def is_member(index: Array, num_tokens: int) -> Array:
    """Convert token indices to a mask.

    Parameters
    ----------
    index
        int (batch, n), in [0, N). Repeated tokens count once.
    num_tokens
        Number of tokens N.

    Returns
    -------
    array
        bool (batch, N), True for tokens in ``index``.

    Raises
    ------
    TypeError
        If ``index`` does not hold integers.
    ValueError
        If ``index`` is not (batch, n).
    IndexError
        If a value is outside of [0, N). Where values are not on the host, PyTorch raises its own error; JAX ignores
        such values.

    Examples
    --------
    >>> import numpy as np
    >>> is_member(np.asarray([[2, 0]]), 4).tolist()
    [[True, False, True, False]]
    """
    xp = check_arrays(index=index)
    if index.ndim != 2:
        raise ValueError(f"index: expected shape (batch, n), got {tuple(index.shape)}")
    check_tokens(xp, "index", index, num_tokens)
    return _is_member(xp, index, num_tokens)


def _is_member(xp: Namespace, index: Array, num_tokens: int) -> Array:
    return scatter(xp, index, xp.ones(index.shape[1], dtype=xp.bool, device=device_of(index)), num_tokens)


def take_tokens(x: Array, index: Array) -> Array:
    """Gather the tokens ``index`` of every image.

    Parameters
    ----------
    x
        (batch, N, ...); or (1, N, ...), shared by all images, such as a position table.
    index
        int (batch, n), in [0, N). Negative values do not count from the end.

    Returns
    -------
    array
        (batch, n, ...), ``x[b, index[b, i]]``; ``x[0, index[b, i]]`` if ``x`` is shared.

    Raises
    ------
    TypeError
        If ``index`` does not hold integers.
    ValueError
        If the batch sizes differ or a shape has too few axes.
    IndexError
        If a value is outside of [0, N), for NumPy, and for PyTorch on a CPU when not compiled.

    Notes
    -----
    An index never reads a token of another image. Where values cannot be read without waiting, the library's own bounds
    check applies. PyTorch raises an error; on CUDA, it is a device assertion that a later call reports. JAX returns NaN
    for floats, True for bool, the lowest value for signed and the highest for unsigned integers, with gradient zero
    (``jax.numpy.take``, ``mode="fill"``).

    Examples
    --------
    >>> import numpy as np
    >>> take_tokens(np.asarray([[[1.0], [2.0], [3.0]]]), np.asarray([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    xp = check_arrays(x=x, index=index)
    if index.ndim != 2 or x.ndim < 2 or (x.shape[0] != index.shape[0] and x.shape[0] != 1):
        expected = "x (batch, N, ...) and index (batch, n)"
        raise ValueError(f"index: expected {expected}, got {tuple(x.shape)} and {tuple(index.shape)}")
    batch, length = x.shape[:2]
    check_tokens(xp, "index", index, length)
    # In frameworks, gathering rows of a flat list is many times as fast as take_along_axis.
    index = as_index(xp, index)
    starts = xp.arange(batch, dtype=index.dtype, device=device_of(index))[:, None] * length
    # An index beyond its image is moved beyond the list, where the library's bounds check finds it.
    rows = xp.where((index >= 0) & (index < length), index + starts, batch * length)
    taken = xp.take(xp.reshape(x, (batch * length, *x.shape[2:])), xp.reshape(rows, (-1,)), axis=0)
    return xp.reshape(taken, (*index.shape, *x.shape[2:]))

"""Property tests for samplers and plans: hypothesis strategies and invariants.

Strategies draw small grids and few noise values, so that ties are common and counterexamples are short. They need the
extra ``testing``, and import hypothesis when called. The ``assert_`` functions need NumPy only, and raise
AssertionError if an invariant does not hold. :func:`check_throwing` and :func:`check_furthest` search for a
counterexample to the contract of a sampler.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb, prod
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, array_namespace, compat_namespace, to_numpy
from prmim_core.counts import TokenCounts
from prmim_core.coverage import nearest_known_distance
from prmim_core.grid import Grid
from prmim_core.schedule import Plan, Schedule, is_member, make_plan, take_tokens
from prmim_core.throwing import WEIGHTED, FurthestFrom, Throwing, ThrowingFunction

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = [
    "assert_counts",
    "assert_covering_radius",
    "assert_decoded",
    "assert_distances_decrease",
    "assert_independent_images",
    "assert_permutation",
    "assert_plan",
    "assert_prefix",
    "assert_stages_sorted",
    "assert_whole_units",
    "check_furthest",
    "check_throwing",
    "grids",
    "noise",
    "plan_arguments",
    "plans",
    "schedules",
    "throwing_arguments",
    "token_counts",
    "visible_masks",
]

_MOST_CHOICES = 20_000

T = TypeVar("T")


# --- strategies ----------------------------------------------------------------------------------------------------


def _hypothesis() -> Any:
    try:
        import hypothesis.extra.numpy
        import hypothesis.strategies
    except ImportError:
        raise ImportError("hypothesis: not installed, but strategies need it; pip install 'prmim[testing]'") from None
    return hypothesis


def _drawn(build: "Callable[[DrawFn], T]") -> "SearchStrategy[T]":
    strategy: SearchStrategy[T] = _hypothesis().strategies.composite(build)()
    return strategy


def grids(*, max_tokens: int = 49) -> "SearchStrategy[Grid]":
    """Draw grids of one to three axes, with spacings of 1 to 5.

    Parameters
    ----------
    max_tokens
        Largest number of tokens.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(grids(max_tokens=9))
    ... def is_small(grid):
    ...     assert grid.num_tokens <= 9
    >>> is_small()
    """
    st = _hypothesis().strategies

    def build(draw: "DrawFn") -> Grid:
        axes = draw(st.integers(1, 3))
        side = max(n for n in range(1, max_tokens + 1) if n**axes <= max_tokens)
        shape, spacing = (draw(st.lists(st.integers(1, most), min_size=axes, max_size=axes)) for most in (side, 5))
        return Grid(tuple(shape), tuple(spacing))

    return _drawn(build)


def token_counts(num_tokens: int, *, unit: int = 1) -> "SearchStrategy[TokenCounts]":
    """Draw numbers of visible, decoded and thrown tokens; any of them may be 0.

    Parameters
    ----------
    num_tokens
        N, their sum.
    unit
        A divisor of ``num_tokens`` and of every drawn number.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(token_counts(12, unit=4))
    ... def are_whole_units(counts):
    ...     assert counts.num_tokens == 12 and counts.decoded % 4 == 0
    >>> are_whole_units()
    """
    st = _hypothesis().strategies
    cuts = st.lists(st.integers(0, num_tokens // unit), min_size=2, max_size=2).map(sorted)
    counts: SearchStrategy[TokenCounts] = cuts.map(
        lambda cut: TokenCounts(cut[0] * unit, (cut[1] - cut[0]) * unit, num_tokens - cut[1] * unit)
    )
    return counts


def noise(num_tokens: int, *, batch: int = 2, xp: Namespace | None = None) -> "SearchStrategy[Array]":
    """Draw noise with many ties: int32 (batch, N) in [-9, 9].

    Parameters
    ----------
    num_tokens
        Number of tokens N.
    batch
        Number of images.
    xp
        Array library, for instance ``torch`` or ``jax.numpy``; None: NumPy.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(noise(4, batch=3))
    ... def has_a_shape(values):
    ...     assert values.shape == (3, 4)
    >>> has_a_shape()
    """
    hypothesis = _hypothesis()
    elements = hypothesis.strategies.integers(-9, 9)
    return _in_library(xp, hypothesis.extra.numpy.arrays(np.int32, (batch, num_tokens), elements=elements))


def visible_masks(
    num_tokens: int, num_visible: int | None = None, *, batch: int = 2, xp: Namespace | None = None
) -> "SearchStrategy[Array]":
    """Draw masks of visible tokens: bool (batch, N).

    Parameters
    ----------
    num_tokens
        Number of tokens N.
    num_visible
        V, the number of visible tokens of every image; None: any number, which may differ between images.
    batch
        Number of images.
    xp
        As for :func:`noise`.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(visible_masks(6, 2))
    ... def two_are_visible(is_visible):
    ...     assert (is_visible.sum(axis=1) == 2).all()
    >>> two_are_visible()
    """
    if num_visible is None:
        return _in_library(xp, _hypothesis().extra.numpy.arrays(bool, (batch, num_tokens)))
    numbers = noise(num_tokens, batch=batch)

    def build(draw: "DrawFn") -> NDArray[Any]:
        # Ranks of drawn numbers, because hypothesis draws arrays many times as fast as permutations.
        is_visible: NDArray[Any] = _rank(draw(numbers)) < num_visible
        return is_visible

    return _in_library(xp, _drawn(build))


def schedules(*, max_tokens: int = 49) -> "SearchStrategy[Schedule]":
    """Draw schedules with one to five stages, all strategies, and some units.

    Parameters
    ----------
    max_tokens
        Largest number of tokens.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(schedules(max_tokens=9))
    ... def stages_throw_all(schedule):
    ...     assert sum(schedule.stage_sizes) == schedule.counts.thrown
    >>> stages_throw_all()
    """
    st, drawn_grids = _hypothesis().strategies, grids(max_tokens=max_tokens)

    def build(draw: "DrawFn") -> Schedule:
        grid = draw(drawn_grids)
        divisors = [[n for n in range(1, side + 1) if side % n == 0] for side in grid.shape]
        unit = draw(st.none() | st.tuples(*(st.sampled_from(of_side) for of_side in divisors)))
        return Schedule(
            grid,
            draw(token_counts(grid.num_tokens, unit=1 if unit is None else prod(unit))),
            stages=draw(st.integers(1, 5)),
            throwing=draw(st.sampled_from(get_args(Throwing))),
            furthest_from=draw(st.sampled_from(get_args(FurthestFrom))),
            unit=unit,
        )

    return _drawn(build)


def plan_arguments(
    *, max_tokens: int = 49, batch: int = 2, xp: Namespace | None = None
) -> "SearchStrategy[dict[str, Any]]":
    """Draw keyword arguments of :func:`prmim_core.make_plan`.

    They are ``schedule``, ``noise`` and ``weights``.

    Parameters
    ----------
    max_tokens
        Largest number of tokens.
    batch, xp
        As for :func:`noise`.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(plan_arguments(max_tokens=9))
    ... def lowest_noise_is_visible(arguments):
    ...     schedule = arguments["schedule"]
    ...     if schedule.unit is None and schedule.counts.visible:
    ...         plan = make_plan(**arguments)
    ...         assert (plan.visible[:, 0] == arguments["noise"].argmin(axis=1)).all()
    >>> lowest_noise_is_visible()
    """
    hypothesis, drawn_schedules = _hypothesis(), schedules(max_tokens=max_tokens)

    def build(draw: "DrawFn") -> dict[str, Any]:
        schedule, weights = draw(drawn_schedules), None
        shape = (batch, schedule.grid.num_tokens)
        if schedule.throwing in WEIGHTED:
            elements = hypothesis.strategies.floats(0, 1, width=32)
            weights = draw(_in_library(xp, hypothesis.extra.numpy.arrays(np.float32, shape, elements=elements)))
        return {"schedule": schedule, "noise": draw(noise(shape[1], batch=batch, xp=xp)), "weights": weights}

    return _drawn(build)


def plans(*, max_tokens: int = 49, batch: int = 2, xp: Namespace | None = None) -> "SearchStrategy[Plan]":
    """Draw plans, made by :func:`prmim_core.make_plan`.

    Parameters
    ----------
    max_tokens
        Largest number of tokens.
    batch, xp
        As for :func:`noise`.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(plans(max_tokens=9))
    ... def restore_inverts_the_order(plan):
    ...     assert (take_tokens(plan.order, plan.restore) == np.arange(plan.order.shape[1])).all()
    >>> restore_inverts_the_order()
    """
    return plan_arguments(max_tokens=max_tokens, batch=batch, xp=xp).map(lambda arguments: make_plan(**arguments))


def throwing_arguments(
    *, max_tokens: int = 49, batch: int = 2, xp: Namespace | None = None
) -> "SearchStrategy[tuple[Grid, TokenCounts, Array, Array]]":
    """Draw arguments of a throwing function: grid, counts, noise, is_visible.

    Parameters
    ----------
    max_tokens
        Largest number of tokens.
    batch, xp
        As for :func:`noise`.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(throwing_arguments(max_tokens=9))
    ... def every_image_has_the_same_count(arguments):
    ...     grid, counts, noise, is_visible = arguments
    ...     assert (is_visible.sum(axis=1) == counts.visible).all()
    >>> every_image_has_the_same_count()
    """
    drawn_grids = grids(max_tokens=max_tokens)

    def build(draw: "DrawFn") -> tuple[Grid, TokenCounts, Array, Array]:
        grid = draw(drawn_grids)
        counts = draw(token_counts(grid.num_tokens))
        mask = draw(visible_masks(grid.num_tokens, counts.visible, batch=batch, xp=xp))
        return grid, counts, draw(noise(grid.num_tokens, batch=batch, xp=xp)), mask

    return _drawn(build)


def _rank(values: NDArray[Any]) -> NDArray[np.intp]:
    """Rank every row, lowest first, ties in order of position."""
    return np.argsort(np.argsort(values, axis=1, stable=True), axis=1)


def _in_library(xp: Namespace | None, arrays: "SearchStrategy[NDArray[Any]]") -> "SearchStrategy[Array]":
    return arrays if xp is None else arrays.map(compat_namespace(xp).asarray)


# --- invariants of plans -------------------------------------------------------------------------------------------


def assert_plan(plan: Plan, noise: Array | None = None) -> None:
    """Assert every invariant of plans in this module.

    Parameters
    ----------
    plan
        A plan of any library.
    noise
        As for :func:`assert_stages_sorted`.

    Examples
    --------
    >>> from prmim_core import count_tokens, counter_noise
    >>> noise = counter_noise(0, 0, np.arange(2), 24)
    >>> assert_plan(make_plan(Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5)), noise), noise)
    """
    assert_counts(plan)
    assert_permutation(plan)
    schedule = plan.schedule
    visible, decoded = to_numpy(plan.visible), to_numpy(plan.decoded)
    assert_decoded(decoded, is_member(visible, schedule.grid.num_tokens))
    if schedule.unit is not None:
        assert_whole_units(schedule.grid, schedule.unit, visible)
        assert_whole_units(schedule.grid, schedule.unit, decoded)
    assert_stages_sorted(plan, noise)


def assert_counts(plan: Plan) -> None:
    """Assert that the parts of a plan have the sizes of its schedule.

    Parameters
    ----------
    plan
        A plan of any library.

    Examples
    --------
    >>> assert_counts(Plan(np.asarray([[0, 1, 2]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2))))
    Traceback (most recent call last):
        ...
    AssertionError: thrown: expected 2 tokens per image, got shape (1, 1)
    """
    counts = plan.schedule.counts
    parts = {
        "visible": (plan.visible, counts.visible),
        "decoded": (plan.decoded, counts.decoded),
        "thrown": (plan.thrown, counts.thrown),
    }
    for stage, size in enumerate(plan.schedule.stage_sizes, start=1):
        parts[f"stage {stage}"] = plan.stage(stage), size
    for name, (part, size) in parts.items():
        _require(
            tuple(part.shape[1:]) == (size,), f"{name}: expected {size} tokens per image, got shape {tuple(part.shape)}"
        )


def assert_permutation(plan: Plan) -> None:
    """Assert that every row of a plan is a permutation of the tokens.

    Parameters
    ----------
    plan
        A plan of any library.

    Examples
    --------
    >>> schedule = Schedule(Grid((4,)), TokenCounts(1, 1, 2))
    >>> assert_permutation(Plan(np.asarray([[0, 1, 1, 3]]), schedule))
    Traceback (most recent call last):
        ...
    AssertionError: order: expected a permutation of 0 to 3, got [0, 1, 1, 3] in image 0
    """
    order, length = to_numpy(plan.order), plan.schedule.grid.num_tokens
    for image, row in enumerate(order.tolist()):
        _require(
            sorted(row) == list(range(length)),
            f"order: expected a permutation of 0 to {length - 1}, got {row} in image {image}",
        )


def assert_whole_units(grid: Grid, unit: tuple[int, ...], tokens: Array) -> None:
    """Assert that tokens form whole units.

    Parameters
    ----------
    grid
        The grid of the tokens.
    unit
        Tokens along each axis of a unit.
    tokens
        int (batch, n).

    Examples
    --------
    >>> assert_whole_units(Grid((4,)), (2,), np.asarray([[0, 1], [1, 2]]))
    Traceback (most recent call last):
        ...
    AssertionError: tokens: expected whole units (2,), got [1, 2] in image 1
    """
    tokens = to_numpy(tokens)
    blocks = is_member(tokens, grid.num_tokens).reshape(
        len(tokens), *(n for side, size in zip(grid.shape, unit, strict=True) for n in (side // size, size))
    )
    inside = tuple(range(2, blocks.ndim, 2))
    is_whole = (blocks.all(axis=inside) == blocks.any(axis=inside)).reshape(len(tokens), -1).all(axis=1)
    for image, row in enumerate(tokens.tolist()):
        _require(bool(is_whole[image]), f"tokens: expected whole units {unit}, got {row} in image {image}")


def assert_stages_sorted(plan: Plan, noise: Array | None = None) -> None:
    """Assert that thrown tokens are sorted by distance to visible and decoded tokens.

    Parameters
    ----------
    plan
        A plan of any library.
    noise
        (batch, N), the noise of the plan, which must break ties of distance. None: ties may have any order.

    Examples
    --------
    >>> schedule = Schedule(Grid((4,)), TokenCounts(1, 0, 3))
    >>> assert_stages_sorted(Plan(np.asarray([[0, 2, 1, 3]]), schedule))
    Traceback (most recent call last):
        ...
    AssertionError: thrown: expected tokens sorted by squared distance, got distances [4, 1, 9] in image 0
    """
    length, thrown = plan.schedule.grid.num_tokens, to_numpy(plan.thrown)
    is_known = is_member(to_numpy(plan.known(1)), length)
    distance = take_tokens(nearest_known_distance(plan.schedule.grid, is_known), thrown)
    rank = np.zeros_like(distance) if noise is None else take_tokens(_rank(to_numpy(noise)), thrown)
    by, also = ("squared distance", "") if noise is None else ("squared distance, then noise", " and ranks {}")
    for image, keys in enumerate(zip(distance.tolist(), rank.tolist(), strict=True)):
        pairs = list(zip(*keys, strict=True))
        _require(
            pairs == sorted(pairs),
            f"thrown: expected tokens sorted by {by}, got distances {keys[0]}{also.format(keys[1])} in image {image}",
        )


def assert_independent_images(function: Callable[..., Array], *arrays: Array) -> None:
    """Assert that a single image has the same result as in a batch.

    Parameters
    ----------
    function
        A function of ``arrays`` that returns one array, (batch, ...).
    arrays
        Arrays (batch, ...).

    Examples
    --------
    >>> assert_independent_images(lambda noise: noise - noise.min(), np.asarray([[1, 2], [3, 4]]))
    Traceback (most recent call last):
        ...
    AssertionError: image 1: expected [[2, 3]] as in the batch, got [[0, 1]] alone
    """
    together = to_numpy(function(*arrays))
    for image, expected in enumerate(together):
        alone = to_numpy(function(*(array[image : image + 1, ...] for array in arrays)))
        _require(
            np.array_equal(alone, expected[None]),
            f"image {image}: expected {expected[None].tolist()} as in the batch, got {alone.tolist()} alone",
        )


# --- invariants of samplers ----------------------------------------------------------------------------------------


def assert_decoded(decoded: Array, is_visible: Array) -> None:
    """Assert that decoded tokens are distinct masked tokens.

    Parameters
    ----------
    decoded
        int (batch, M).
    is_visible
        bool (batch, N).

    Examples
    --------
    >>> assert_decoded(np.asarray([[2, 0]]), np.asarray([[True, False, False]]))
    Traceback (most recent call last):
        ...
    AssertionError: decoded: expected masked tokens, got [2, 0] in image 0, where [0] are visible
    """
    tokens, mask = to_numpy(decoded), to_numpy(is_visible)
    _require(tokens.dtype.kind in "iu", f"decoded: expected integers, got {tokens.dtype}")
    _require(
        tokens.ndim == 2 and len(tokens) == len(mask),
        f"decoded: expected shape (batch, M) for {len(mask)} images, got {tokens.shape}",
    )
    length = mask.shape[1]
    for image, row in enumerate(tokens.tolist()):
        where = f"got {row} in image {image}"
        _require(all(0 <= token < length for token in row), f"decoded: expected tokens in [0, {length}), {where}")
        _require(len(set(row)) == len(row), f"decoded: expected distinct tokens, {where}")
        visible = [token for token in sorted(row) if mask[image, token]]
        _require(not visible, f"decoded: expected masked tokens, {where}, where {visible} are visible")


def assert_distances_decrease(grid: Grid, picks: Array, is_known: Array) -> None:
    """Assert that distances from picks to known and earlier picks do not increase.

    Parameters
    ----------
    grid
        The grid of the tokens.
    picks
        int (batch, n), in order of picking.
    is_known
        bool (batch, N), tokens known from the start. Without known tokens, the first pick has no distance.

    Examples
    --------
    >>> is_visible = np.asarray([[True, False, False, False]])
    >>> assert_distances_decrease(Grid((4,)), np.asarray([[1, 3]]), is_visible)
    Traceback (most recent call last):
        ...
    AssertionError: picks: expected squared distances that do not increase, got [1, 4] in image 0
    """
    known = to_numpy(is_known).copy()
    distances = []
    for picked in to_numpy(picks).T[..., None]:
        distances.append(np.take_along_axis(nearest_known_distance(grid, known), picked, axis=1)[:, 0].tolist())
        np.put_along_axis(known, picked, True, axis=1)
    for image, row in enumerate(zip(*distances, strict=True)):
        _require(
            list(row) == sorted(row, reverse=True),
            f"picks: expected squared distances that do not increase, got {list(row)} in image {image}",
        )


def assert_prefix(fewer: Array, more: Array) -> None:
    """Assert that fewer picks are a prefix of more picks.

    Parameters
    ----------
    fewer, more
        int (batch, n) and (batch, m), n <= m, in order of picking.

    Examples
    --------
    >>> assert_prefix(np.asarray([[3]]), np.asarray([[0, 3]]))
    Traceback (most recent call last):
        ...
    AssertionError: picks: expected the first 1 of [0, 3], got [3] in image 0
    """
    for image, (few, many) in enumerate(zip(to_numpy(fewer).tolist(), to_numpy(more).tolist(), strict=True)):
        _require(few == many[: len(few)], f"picks: expected the first {len(few)} of {many}, got {few} in image {image}")


def assert_covering_radius(grid: Grid, picks: Array, is_known: Array) -> None:
    """Assert a covering radius of at most twice the best (Gonzalez, 1985).

    Parameters
    ----------
    grid
        The grid of the tokens.
    picks
        int (batch, n), any of the tokens that are not known.
    is_known
        bool (batch, N), tokens known from the start.

    Raises
    ------
    AssertionError
        If another choice of n tokens has less than half the radius.
    ValueError
        If there are too many choices of n tokens to try all of them.

    Examples
    --------
    >>> assert_covering_radius(Grid((9,)), np.asarray([[0, 1]]), np.zeros((1, 9), dtype=bool))
    Traceback (most recent call last):
        ...
    AssertionError: picks: expected a squared radius of at most 4 x 4, got 49 of [0, 1] in image 0
    """
    points = grid.positions.astype(np.int64)
    between = ((points[:, None] - points[None]) ** 2).sum(axis=2)

    def squared_radius(centres: Sequence[int]) -> int:
        return int(between[list(centres)].min(axis=0).max())

    for image, (row, mask) in enumerate(zip(to_numpy(picks).tolist(), to_numpy(is_known), strict=True)):
        known, free = np.flatnonzero(mask).tolist(), np.flatnonzero(~mask).tolist()
        if comb(len(free), len(row)) > _MOST_CHOICES:
            raise ValueError(
                f"picks: expected at most {_MOST_CHOICES:,} choices to compare with, got {len(row)} of {len(free)}"
            )
        if not known and not row:
            continue
        best = min(squared_radius([*known, *others]) for others in combinations(free, len(row)))
        found = squared_radius([*known, *row])
        _require(
            found <= 4 * best,
            f"picks: expected a squared radius of at most 4 x {best}, got {found} of {row} in image {image}",
        )


# --- searches for counterexamples ----------------------------------------------------------------------------------


def check_throwing(function: ThrowingFunction, *, xp: Namespace | None = None, max_examples: int = 50) -> None:
    """Search for arguments for which a throwing function breaks its contract.

    The contract: decoded tokens are int (batch, M), in the library of the noise, distinct and masked. The function is
    pure: equal arguments give equal tokens, and the arguments are not modified. Images do not affect each other.

    Parameters
    ----------
    function
        ``function(grid, counts, noise, is_visible)`` with a :class:`prmim_core.Grid`,
        :class:`prmim_core.TokenCounts`, int32 (batch, N) and bool (batch, N) with V visible tokens per image. Returns
        int (batch, M).
    xp
        Array library of the arguments, for instance ``torch`` or ``jax.numpy``; None: NumPy.
    max_examples
        Number of examples. The search is deterministic.

    Raises
    ------
    AssertionError
        If the contract is broken. A note shows the smallest arguments that were found.

    Examples
    --------
    >>> from prmim_core import furthest_decoded
    >>> def furthest(grid, counts, noise, is_visible):
    ...     return furthest_decoded(grid, counts.decoded, noise, is_visible)
    >>> check_throwing(furthest, max_examples=20)
    >>> def wrong(grid, counts, noise, is_visible):
    ...     return noise.argsort(axis=1)[:, : counts.decoded]
    >>> check_throwing(wrong, max_examples=20)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: decoded: expected masked tokens, got [0] in image 0, where [0] are visible...
    """

    def check(arguments: tuple[Grid, TokenCounts, Array, Array]) -> None:
        grid, counts, *arrays = arguments
        before = [to_numpy(array).copy() for array in arrays]
        decoded = _decoded_by(function, *arguments)
        for name, array, values in zip(("noise", "is_visible"), arrays, before, strict=True):
            _require(
                np.array_equal(to_numpy(array), values), f"{name}: expected an unmodified argument, got new values"
            )
        assert_decoded(decoded, before[1])
        again = _decoded_by(function, *arguments)
        _require(
            np.array_equal(to_numpy(again), to_numpy(decoded)),
            f"decoded: expected the same for the same arguments, got {to_numpy(decoded).tolist()} and "
            f"{to_numpy(again).tolist()}",
        )
        assert_independent_images(lambda *images: function(grid, counts, *images), *arrays)

    _search(throwing_arguments(xp=xp), check, max_examples)


def check_furthest(function: ThrowingFunction, *, xp: Namespace | None = None, max_examples: int = 50) -> None:
    """Search for arguments that violate the properties of furthest sampling.

    Beyond the contract of :func:`check_throwing`: distances of picks to known tokens do not increase, fewer picks are a
    prefix of more picks, and the covering radius is at most twice the best one.

    Parameters
    ----------
    function, xp, max_examples
        As for :func:`check_throwing`.

    Raises
    ------
    AssertionError
        If one of these properties does not hold. A note shows the smallest arguments that were found.

    Examples
    --------
    >>> from prmim_core import random_decoded
    >>> def random(grid, counts, noise, is_visible):
    ...     return random_decoded(counts.decoded, noise, is_visible)
    >>> check_furthest(random, max_examples=20)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: picks: expected a squared radius of at most 4 x 1, got 9 of [0, 1] in image 0...
    """
    check_throwing(function, xp=xp, max_examples=max_examples)

    def check(arguments: tuple[Grid, TokenCounts, Array, Array]) -> None:
        grid, counts, *arrays = arguments
        picks = to_numpy(_decoded_by(function, *arguments))
        is_visible = to_numpy(arrays[1])
        assert_distances_decrease(grid, picks, is_visible)
        for number in range(counts.decoded):
            fewer = TokenCounts(counts.visible, number, counts.num_tokens - counts.visible - number)
            first = to_numpy(_decoded_by(function, grid, fewer, *arrays))
            assert_prefix(first, picks)
            if comb(counts.masked, number) <= 100:
                assert_covering_radius(grid, first, is_visible)

    _search(throwing_arguments(max_tokens=12, xp=xp), check, max_examples)


def _decoded_by(function: ThrowingFunction, grid: Grid, counts: TokenCounts, noise: Array, is_visible: Array) -> Array:
    """Call the function; assert an array (batch, M) of the library of noise."""
    decoded = function(grid, counts, noise, is_visible)
    try:
        array_namespace(noise, decoded)
    except TypeError:
        _require(False, f"decoded: expected an array of the library of noise, got {type(decoded).__name__}")
    shape = (noise.shape[0], counts.decoded)
    _require(tuple(decoded.shape) == shape, f"decoded: expected shape {shape}, got {tuple(decoded.shape)}")
    return decoded


def _search(arguments: "SearchStrategy[T]", check: Callable[[T], None], max_examples: int) -> None:
    """Run a check on drawn arguments; raise its error for the smallest failing ones."""
    hypothesis = _hypothesis()
    phases = [hypothesis.Phase.generate, hypothesis.Phase.shrink]
    settings = hypothesis.settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None, phases=phases
    )
    try:
        settings(hypothesis.given(arguments=arguments)(check))()
    except hypothesis.errors.Flaky as error:
        raise AssertionError("decoded: expected the same for the same arguments, got another result later") from error


def _require(condition: bool, message: str) -> None:
    # Not `assert`, which python -O removes.
    if not condition:
        raise AssertionError(message)

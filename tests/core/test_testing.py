"""The public strategies cover their ranges, and every invariant finds violations."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmim_core import (
    Grid,
    Plan,
    Schedule,
    TokenCounts,
    cell_decoded,
    furthest_decoded,
    random_decoded,
    testing,
)
from prmim_core.throwing import STRATEGIES


def plan_of(*rows, counts=None, unit=None):
    return Plan(np.asarray(rows), Schedule(Grid((4,)), counts or TokenCounts(1, 1, 2), unit=unit))


# --- strategies ----------------------------------------------------------------------------------------------------


def drawn(strategy, number=100):
    values = []

    @settings(max_examples=number)
    @given(strategy)
    def collect(value):
        values.append(value)

    collect()
    return values


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        (
            testing.grids(max_tokens=27),
            [
                lambda grid: grid.axes == 3 and min(grid.shape) > 1 and len(set(grid.spacing)) == 3,
                lambda grid: grid.num_tokens == 1,
                lambda grid: grid.num_tokens > 20,
            ],
        ),
        (
            testing.token_counts(4),
            [
                lambda counts: counts.visible and counts.decoded and counts.thrown,
                lambda counts: counts.visible == 4,
                lambda counts: counts.decoded == 4,
                lambda counts: counts.thrown == 4,
            ],
        ),
        (testing.noise(4), [lambda noise: len(np.unique(noise)) > 6, lambda noise: len(np.unique(noise)) == 1]),
        (testing.visible_masks(4), [lambda mask: mask.all(), lambda mask: mask[0].sum() != mask[1].sum()]),
        (testing.visible_masks(4, 1), [lambda mask, token=token: mask[0, token] for token in range(4)]),
        (
            testing.schedules(max_tokens=16),
            [
                *(lambda schedule, name=name: schedule.throwing == name for name in STRATEGIES),
                lambda schedule: schedule.unit is not None and schedule.counts.decoded and schedule.counts.thrown,
                lambda schedule: schedule.furthest_from == "none",
                lambda schedule: schedule.stage_sizes[-1],
                lambda schedule: not schedule.stage_sizes[-1],
            ],
        ),
        (
            testing.throwing_arguments(max_tokens=16),
            [lambda case: case[1].decoded > 1 and (case[3][0] != case[3][1]).any()],
        ),
    ],
    ids=["grids", "counts", "noise", "masks", "masks of one", "schedules", "throwing"],
)
def test_strategies_reach_every_kind(strategy, kinds):
    values = drawn(strategy)
    assert [any(map(is_kind, values)) for is_kind in kinds] == [True] * len(kinds)


@given(st.data(), st.integers(1, 20))
def test_strategies_stay_within_their_sizes(data, max_tokens):
    grid = data.draw(testing.grids(max_tokens=max_tokens))
    assert grid.num_tokens <= max_tokens
    number = data.draw(st.integers(0, grid.num_tokens))
    mask = data.draw(testing.visible_masks(grid.num_tokens, number, batch=3))
    assert mask.sum(axis=1).tolist() == [number] * 3
    assert mask.dtype == bool


@pytest.mark.parametrize("xp", ["numpy", "torch", "strict"], indirect=True)
def test_arrays_come_from_the_library_that_is_named(xp):
    with xp.context():
        arguments = drawn(testing.throwing_arguments(max_tokens=4, xp=xp.module), 2)
        plans = drawn(testing.plans(max_tokens=1, xp=xp.module), 1)
    for grid, _, noise, is_visible in arguments:
        assert xp.device_of(noise) == xp.device_of(is_visible) == xp.device
        assert noise.shape == is_visible.shape == (2, grid.num_tokens)
        xp.assert_equal(noise, xp.to_numpy(noise), dtype="int32")
        xp.assert_equal(is_visible, xp.to_numpy(is_visible), dtype="bool")
    xp.assert_equal(plans[0].order, [[0], [0]])


def test_without_hypothesis_strategies_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(ImportError, match=r"^hypothesis: not installed, .*; pip install 'prmim\[testing\]'$"):
        testing.grids()


# --- invariants ----------------------------------------------------------------------------------------------------

WHOLE, CUT = TokenCounts(2, 2, 0), TokenCounts(0, 2, 2)
KNOWN = np.asarray([[True, False, False, False]] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: testing.assert_plan(plan_of([0, 1, 2, 2])), r"order: .* got \[0, 1, 2, 2\] in image 0"),
        (lambda: testing.assert_plan(plan_of([0, 1, 2])), r"thrown: expected 2 tokens per image, got shape \(1, 1\)"),
        (lambda: testing.assert_plan(plan_of([0, 1, 3, 2])), r"thrown: .* got distances \[4, 1\] in image 0"),
        (
            lambda: testing.assert_plan(plan_of([0, 3, 2, 1]), np.asarray([[0, 1, 2, 3]])),
            r"thrown: .* then noise, got distances \[1, 1\] and ranks \[2, 1\] in image 0",
        ),
        (
            lambda: testing.assert_plan(plan_of([0, 1, 2, 3], [0, 2, 1, 3], counts=WHOLE, unit=(2,))),
            r"tokens: expected whole units \(2,\), got \[0, 2\] in image 1",
        ),
        (
            lambda: testing.assert_plan(plan_of([1, 2, 0, 3], counts=CUT, unit=(2,))),
            r"tokens: expected whole units \(2,\), got \[1, 2\] in image 0",
        ),
        (
            lambda: testing.assert_whole_units(Grid((2, 4)), (2, 2), np.asarray([[0, 1, 4, 6]])),
            r"tokens: expected whole units \(2, 2\), got \[0, 1, 4, 6\] in image 0",
        ),
        (lambda: testing.assert_decoded(np.asarray([[1.0]] * 2), KNOWN), "decoded: expected integers, got float64"),
        (lambda: testing.assert_decoded(np.asarray([[1]]), KNOWN), r"decoded: .* for 2 images, got \(1, 1\)"),
        (
            lambda: testing.assert_decoded(np.asarray([[1], [4]]), KNOWN),
            r"decoded: .* in \[0, 4\), got \[4\] in image 1",
        ),
        (lambda: testing.assert_decoded(np.asarray([[1, 2], [3, 3]]), KNOWN), r"decoded: expected distinct .* image 1"),
        (lambda: testing.assert_decoded(np.asarray([[1, 0], [3, 2]]), KNOWN), r"\[1, 0\] .* where \[0\] are visible"),
        (
            lambda: testing.assert_distances_decrease(Grid((4,)), np.asarray([[3, 1], [1, 3]]), KNOWN),
            r"picks: expected squared distances that do not increase, got \[1, 4\] in image 1",
        ),
        (
            lambda: testing.assert_prefix(np.asarray([[1], [2]]), np.asarray([[1, 2], [1, 2]])),
            r"picks: .* got \[2\] in image 1",
        ),
        (
            lambda: testing.assert_covering_radius(Grid((9,)), np.asarray([[2]]), np.arange(9)[None] < 2),
            r"picks: expected a squared radius of at most 4 x 4, got 36 of \[2\] in image 0",
        ),
        (
            lambda: testing.assert_independent_images(lambda x: x[::-1], np.asarray([[0], [1]])),
            r"image 0: expected \[\[1\]\] as in the batch, got \[\[0\]\] alone",
        ),
    ],
)
def test_invariants_say_what_broke_them(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


def test_what_keeps_the_invariants_passes():
    testing.assert_decoded(np.asarray([[3, 1], [1, 2]]), KNOWN)
    testing.assert_distances_decrease(Grid((4,)), np.asarray([[3, 1], [3, 2]]), KNOWN)
    testing.assert_prefix(np.asarray([[2], [1]]), np.asarray([[2, 0], [1, 2]]))
    testing.assert_covering_radius(Grid((9,)), np.asarray([[8, 4]]), np.zeros((1, 9), dtype=bool))
    testing.assert_whole_units(Grid((2, 4)), (2, 2), np.asarray([[0, 1, 4, 5]]))


def test_a_brute_force_that_would_take_hours_is_refused():
    with pytest.raises(ValueError, match=r"^picks: expected at most 20,000 choices .*, got 10 of 49$"):
        testing.assert_covering_radius(Grid((49,)), np.arange(10)[None], np.zeros((1, 49), dtype=bool))


# --- searches ------------------------------------------------------------------------------------------------------


def furthest(grid, counts, noise, is_visible):
    return furthest_decoded(grid, counts.decoded, noise, is_visible)


@pytest.mark.parametrize("xp", ["numpy", "torch"], indirect=True)
def test_strategies_of_the_core_keep_the_contract(xp):
    testing.check_throwing(lambda grid, counts, *a: random_decoded(counts.decoded, *a), xp=xp.module, max_examples=9)
    testing.check_throwing(lambda grid, counts, *a: cell_decoded(grid, counts.decoded, *a), max_examples=9)
    testing.check_furthest(furthest, xp=xp.module, max_examples=9)


def of_images_together(grid, counts, noise, is_visible):
    return furthest(grid, counts, noise - noise.max(axis=0), is_visible)


GENERATOR = np.random.default_rng(0)


def nondeterministic(grid, counts, noise, is_visible):
    return furthest(grid, counts, GENERATOR.permuted(noise, axis=1), is_visible)


def writing(grid, counts, noise, is_visible):
    noise += 1
    return furthest(grid, counts, noise, is_visible)


def nearest(grid, counts, noise, is_visible):
    return furthest(grid, counts, noise, is_visible)[:, ::-1]


BROKEN = {
    "list": (lambda *a: furthest(*a).tolist(), "decoded: expected an array of the library of noise, got list"),
    "too few": (lambda *a: furthest(*a)[:, 1:], r"decoded: expected shape \(2, 1\), got \(2, 0\)"),
    "floats": (lambda *a: furthest(*a) + 0.0, "decoded: expected integers, got float64"),
    "repeated": (lambda *a: furthest(*a) * 0, r"decoded: expected (distinct|masked) tokens"),
    "visible": (lambda grid, counts, noise, _: noise.argsort(axis=1)[:, : counts.decoded], "expected masked tokens"),
    "writing": (writing, "noise: expected an unmodified argument"),
    "nondeterministic": (nondeterministic, "expected the same for the same arguments|as in the batch"),
    "of the batch": (of_images_together, r"image \d: expected .* as in the batch"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_throwing_functions_are_found(name):
    function, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        testing.check_throwing(function, max_examples=30)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nearest, "picks: expected"),
        (lambda grid, counts, *a: random_decoded(counts.decoded, *a), "picks: expected"),
    ],
)
def test_what_is_not_furthest_is_found(function, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_furthest(function, max_examples=30)

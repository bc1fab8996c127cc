from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import (
    Grid,
    Plan,
    Schedule,
    TokenCounts,
    block_visible,
    cell_decoded,
    count_tokens,
    counter_noise,
    furthest_decoded,
    is_member,
    make_plan,
    nearest_known_distance,
    random_decoded,
    take_tokens,
    testing,
    weighted_decoded,
)
from prmim_core.throwing import STRATEGIES, WEIGHTED

# Many shapes, each a program of JAX; test_every_function.py has every function under the full compiler.
pytestmark = pytest.mark.usefixtures("quick_compiler")

GRIDS = [Grid((11,)), Grid((4, 6)), Grid((5, 4), (3, 1)), Grid((3, 4, 2), (4, 1, 1))]
CHOICES = [("furthest", "none"), *((name, "visible") for name in STRATEGIES if name not in WEIGHTED)]


def expected_order(schedule, noise, visible=None, weights=None):
    return [
        reference.schedule.make_order(
            schedule.grid.shape,
            schedule.counts,
            row,
            spacing=schedule.grid.spacing,
            throwing=schedule.throwing,
            furthest_from=schedule.furthest_from,
            visible=None if visible is None else visible[image].tolist(),
            weights=None if weights is None else weights[image].tolist(),
            unit=schedule.unit,
        )
        for image, row in enumerate(noise.tolist())
    ]


@pytest.mark.parametrize(("throwing", "furthest_from"), CHOICES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_plans_match_the_reference(library, grid, throwing, furthest_from):
    schedule = Schedule(grid, count_tokens(grid.num_tokens, 0.75, 0.4), throwing=throwing, furthest_from=furthest_from)
    noise = counter_noise(0, 0, np.arange(3), grid.num_tokens)
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    assert isinstance(plan, Plan)
    assert plan.schedule == schedule
    library.assert_equal(plan.order, expected_order(schedule, noise), dtype="index")


@pytest.mark.parametrize(("throwing", "furthest_from"), CHOICES[::3])
def test_plans_take_the_visible_tokens_they_are_given(library, throwing, furthest_from):
    grid = GRIDS[1]
    schedule = Schedule(grid, TokenCounts(8, 6, 10), throwing=throwing, furthest_from=furthest_from)
    noise = counter_noise(0, 0, np.arange(3), 24)
    visible = block_visible(grid, (2, 2), 2, noise[:, ::-1])
    plan = library.run(lambda noise, visible: make_plan(schedule, noise, visible), noise, visible)
    library.assert_equal(plan.order, expected_order(schedule, noise, visible), dtype="index")


@pytest.mark.parametrize("throwing", ["furthest", "random", "cell", "weighted"])
def test_plans_take_the_decoded_tokens_they_are_given(library, throwing):
    counts, noise = TokenCounts(6, 8, 10), counter_noise(0, 0, np.arange(3), 24)
    weights = np.random.default_rng(0).integers(1, 99, noise.shape).astype(np.float32)
    schedule = Schedule(GRIDS[1], counts, throwing=throwing)
    expected = make_plan(schedule, noise, weights=weights if throwing == "weighted" else None).order
    is_visible = is_member(expected[:, :6], 24)
    decoded = {
        "furthest": lambda: furthest_decoded(GRIDS[1], 8, noise, is_visible),
        "random": lambda: random_decoded(8, noise, is_visible),
        "cell": lambda: cell_decoded(GRIDS[1], 8, noise, is_visible),
        "weighted": lambda: weighted_decoded(8, noise, is_visible, weights),
    }[throwing]()
    plan = library.run(lambda noise, decoded: make_plan(schedule, noise, decoded=decoded), noise, decoded)
    library.assert_equal(plan.order, expected, dtype="index")


def lattice(grid, counts, noise, is_visible):
    """Decode masked tokens in checkerboard order; within a colour, by noise."""
    colour = (sum(grid.coordinates(noise)) + noise[:, :1]) & 1
    return random_decoded(counts.decoded, (colour << 30) + (noise >> 2), is_visible)


def expected_lattice(grid, decoded, noise, visible):
    colour = [(sum(position) + noise[0]) % 2 for position in grid.positions.tolist()]
    masked = [token for token in range(len(noise)) if token not in visible]
    return sorted(masked, key=lambda token: (colour[token], noise[token] >> 2, token))[:decoded]


@pytest.mark.parametrize("grid", [GRIDS[1], GRIDS[3]], ids=str)
def test_plans_of_a_function_match_the_reference(library, grid):
    schedule = Schedule(grid, TokenCounts(6, 8, 10), throwing=lattice)
    noise = counter_noise(0, 0, np.arange(3), 24)
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    assert plan.schedule == schedule
    expected = []
    for row in noise.tolist():
        decoded = expected_lattice(grid, 8, row, reference.masking.random_visible(6, row))
        expected.append(
            reference.schedule.make_order(grid.shape, schedule.counts, row, spacing=grid.spacing, decoded=decoded)
        )
    library.assert_equal(plan.order, expected, dtype="index")


def test_a_function_chooses_whole_units(library):
    grid, unit, seen = GRIDS[1], (2, 2), []
    schedule = Schedule(grid, TokenCounts(8, 8, 8), unit=unit, throwing=lambda *a: seen.append(a[:2]) or lattice(*a))
    noise = counter_noise(0, 0, np.arange(3), 24)
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    assert seen[0] == (grid.units(unit), TokenCounts(2, 2, 2))
    tokens = reference.masking.unit_tokens(grid.shape, unit)
    expected = []
    for row in noise.tolist():
        of_units = [row[unit[0]] for unit in tokens]
        units = expected_lattice(grid.units(unit), 2, of_units, reference.masking.random_visible(2, of_units))
        decoded = [token for number in units for token in tokens[number]]
        expected.append(reference.schedule.make_order(grid.shape, schedule.counts, row, decoded=decoded, unit=unit))
    library.assert_equal(plan.order, expected, dtype="index")


def test_schedules_are_equal_if_their_functions_are():
    schedule = Schedule(GRIDS[1], TokenCounts(6, 8, 10), throwing=lattice)
    assert schedule == Schedule(GRIDS[1], TokenCounts(6, 8, 10), throwing=lattice)
    assert hash(schedule) == hash(Schedule(GRIDS[1], TokenCounts(6, 8, 10), throwing=lattice))
    assert schedule != Schedule(GRIDS[1], TokenCounts(6, 8, 10), throwing=lambda *a: lattice(*a))


FLOATS = np.random.default_rng(0).random((3, 24), dtype=np.float32)
FLOATS[:, ::5] = FLOATS[:, :1]  # ties


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("throwing", "unit"), [("furthest", None), ("random", None), ("furthest", (2, 2))])
def test_noise_may_be_floats(library, dtype, throwing, unit):
    schedule, noise = Schedule(GRIDS[1], TokenCounts(8, 8, 8), throwing=throwing, unit=unit), FLOATS.astype(dtype)
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    library.assert_equal(plan.order, expected_order(schedule, noise), dtype="index")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_visible_may_be_of_any_integer_type(library, dtype):
    # A large batch: the numbers of all its tokens do not fit into the narrow types.
    schedule = Schedule(GRIDS[1], TokenCounts(6, 8, 10))
    noise = counter_noise(0, 0, np.arange(2000), 24)
    expected = make_plan(schedule, noise).order
    plan = library.run(lambda noise, visible: make_plan(schedule, noise, visible), noise, expected[:, :6].astype(dtype))
    library.assert_equal(plan.order, expected, dtype="index")


@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
def test_weighted_plans_match_the_reference(library, grid):
    schedule = Schedule(grid, count_tokens(grid.num_tokens, 0.75, 0.4), throwing="weighted")
    noise = counter_noise(0, 0, np.arange(3), grid.num_tokens)
    weights = np.random.default_rng(0).random(noise.shape, dtype=np.float32)
    weights[:, ::5] = 0
    plan = library.run(lambda noise, weights: make_plan(schedule, noise, weights=weights), noise, weights)
    order = library.to_numpy(plan.order)
    library.assert_equal(plan.order, order, dtype="index")
    expected = np.asarray(expected_order(schedule, noise, weights=weights))
    known = schedule.num_known(1)
    np.testing.assert_array_equal(order[:, : schedule.counts.visible], expected[:, : schedule.counts.visible])
    # Logarithms differ in the last bit, so near-ties may be drawn in another order: times are compared, and the rest
    # of the plan is judged given what was drawn.
    uniforms = np.asarray([[reference.noise.uniform(value) for value in row] for row in noise.tolist()])
    with np.errstate(divide="ignore"):
        times = -np.log(uniforms) / weights
    drawn, meant = (
        np.take_along_axis(times, which[:, schedule.counts.visible : known], axis=1) for which in (order, expected)
    )
    np.testing.assert_allclose(drawn, meant, rtol=1e-5)
    for row, image in zip(order.tolist(), noise.tolist(), strict=True):
        rest = reference.schedule.thrown_order(grid.shape, image, row[:known], spacing=grid.spacing)
        assert row[known:] == rest


# --- whole units ---------------------------------------------------------------------------------------------------

UNITS = [  # grid, unit that is masked, unit that is decoded or thrown, visible and decoded tokens
    (Grid((4, 6)), (2, 2), (2, 2), 8, 8),
    (Grid((4, 6)), (2, 3), (2, 1), 6, 10),
    (Grid((8, 4), (3, 1)), (4, 2), (2, 2), 8, 12),
    (Grid((12,)), (4,), (2,), 4, 4),
    (Grid((2, 4, 4), (4, 1, 1)), (2, 2, 2), (1, 2, 2), 8, 12),
    (Grid((4, 6)), (2, 2), (2, 2), 0, 12),
    (Grid((4, 6)), (2, 2), (2, 2), 8, 0),
    (Grid((4, 6)), (2, 2), (2, 2), 8, 16),
]


def unit_case(grid, mask_unit, unit, visible, decoded, throwing="furthest", furthest_from="visible"):
    counts = TokenCounts(visible, decoded, grid.num_tokens - visible - decoded)
    schedule = Schedule(grid, counts, stages=3, throwing=throwing, furthest_from=furthest_from, unit=unit)
    noise = counter_noise(5, 0, np.arange(3), grid.num_tokens)
    return schedule, noise, block_visible(grid, mask_unit, visible // int(np.prod(mask_unit)), noise)


@pytest.mark.parametrize(("throwing", "furthest_from"), CHOICES)
@pytest.mark.parametrize("case", UNITS, ids=str)
def test_plans_of_units_match_the_reference(case, throwing, furthest_from):
    schedule, noise, visible = unit_case(*case, throwing=throwing, furthest_from=furthest_from)
    assert make_plan(schedule, noise, visible).order.tolist() == expected_order(schedule, noise, visible)


@pytest.mark.parametrize("case", UNITS[::2], ids=str)
def test_plans_of_units_are_equal_on_every_library(library, case):
    schedule, noise, visible = unit_case(*case)
    plan = library.run(lambda noise, visible: make_plan(schedule, noise, visible), noise, visible)
    library.assert_equal(plan.order, expected_order(schedule, noise, visible), dtype="index")


@pytest.mark.parametrize("case", UNITS[1:3], ids=str)
def test_weighted_plans_of_units_match_the_reference(library, case):
    schedule, noise, visible = unit_case(*case, throwing="weighted")
    # Integers: sums of them are exact in any order, and no two times of arrival are close.
    weights = np.random.default_rng(0).integers(1, 99, noise.shape).astype(np.float32)
    plan = library.run(lambda *a: make_plan(schedule, *a[:2], weights=a[2]), noise, visible, weights)
    library.assert_equal(plan.order, expected_order(schedule, noise, visible, weights), dtype="index")


@pytest.mark.parametrize("case", UNITS, ids=str)
def test_units_stay_whole(case):
    schedule, noise, visible = unit_case(*case)
    plan = make_plan(schedule, noise, visible)
    grid, unit = schedule.grid, schedule.unit
    number = np.arange(grid.units(unit).num_tokens).reshape(grid.units(unit).shape)
    for axis, size in enumerate(unit):
        number = number.repeat(size, axis=axis)
    units = number.ravel()[plan.decoded].reshape(3, -1, int(np.prod(unit)))
    assert (units == units[:, :, :1]).all()  # unit by unit
    tokens = plan.decoded.reshape(units.shape)
    assert (np.diff(tokens, axis=2) > 0).all()  # in raster order
    for image in range(3):
        assert not np.isin(number.ravel()[plan.thrown[image]], units[image]).any()
    np.testing.assert_array_equal(np.sort(plan.order, axis=1), [np.arange(grid.num_tokens)] * 3)


def test_without_given_tokens_whole_units_are_visible(library):
    schedule, noise, _ = unit_case(*UNITS[0])
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    visible = block_visible(schedule.grid, (2, 2), 2, noise)
    library.assert_equal(plan.order, expected_order(schedule, noise, visible), dtype="index")
    library.assert_equal(plan.order, expected_order(schedule, noise), dtype="index")


def test_thrown_tokens_of_units_are_sorted_one_by_one():
    # A unit of 4 in a row next to a known one: its tokens lie 1 to 4 away, and so do those of the unit after the gap.
    schedule = Schedule(Grid((1, 12)), TokenCounts(4, 0, 8), unit=(1, 4))
    noise = np.zeros((1, 12), dtype=np.int32)
    plan = make_plan(schedule, noise, np.asarray([[4, 5, 6, 7]]))
    assert plan.stage(1).tolist() == [[3, 8, 2, 9]]
    assert plan.stage(2).tolist() == [[1, 10, 0, 11]]


def test_a_unit_of_ones_is_a_single_token():
    plain = Schedule(Grid((4, 6)), TokenCounts(6, 8, 10))
    ones = Schedule(Grid((4, 6)), TokenCounts(6, 8, 10), unit=(1, 1))
    assert ones == plain
    assert hash(ones) == hash(plain)
    assert ones.unit is None


def test_units_of_equal_content_are_one_key():
    units = [(2, 2), [2, 2], (np.int64(2), np.int32(2))]
    schedules = {Schedule(Grid((4, 6)), TokenCounts(8, 8, 8), unit=unit) for unit in units}
    assert len(schedules) == 1
    assert schedules != {Schedule(Grid((4, 6)), TokenCounts(8, 8, 8))}


EMPTY = [
    TokenCounts(0, 10, 14),  # nothing visible
    TokenCounts(10, 0, 14),  # nothing decoded
    TokenCounts(10, 14, 0),  # nothing thrown
    TokenCounts(24, 0, 0),  # nothing masked
    TokenCounts(0, 24, 0),  # all decoded
    TokenCounts(0, 0, 24),  # nothing known
]


@pytest.mark.parametrize("counts", EMPTY, ids=str)
def test_empty_parts_are_defined(library, counts):
    schedule = Schedule(GRIDS[1], counts, stages=3)
    noise = counter_noise(0, 0, np.arange(2), 24)
    plan = library.run(lambda noise: make_plan(schedule, noise), noise)
    library.assert_equal(plan.order, expected_order(schedule, noise), dtype="index")
    library.assert_equal(plan.visible, library.to_numpy(plan.order)[:, : counts.visible])
    library.assert_equal(plan.thrown, library.to_numpy(plan.order)[:, counts.visible + counts.decoded :])


def test_without_known_tokens_noise_alone_orders_the_thrown():
    noise = counter_noise(0, 0, np.arange(2), 24)
    plan = make_plan(Schedule(GRIDS[1], TokenCounts(0, 0, 24)), noise)
    np.testing.assert_array_equal(plan.order, np.argsort(noise, axis=1))


# --- properties ----------------------------------------------------------------------------------------------------


@given(testing.plan_arguments())
def test_plans_have_their_invariants_and_pass_their_own_check(arguments):
    plan = make_plan(**arguments)
    testing.assert_plan(plan, arguments["noise"])
    plan.check()
    np.testing.assert_array_equal(np.concatenate([plan.decoded, plan.thrown], axis=1), plan.masked)
    np.testing.assert_array_equal(np.concatenate([plan.visible, plan.masked], axis=1), plan.order)


@given(testing.plan_arguments())
def test_plans_of_images_are_independent(arguments):
    schedule, noise, weights = arguments.values()
    arrays = [noise] if weights is None else [noise, weights]

    def order(noise, weights=None):
        return make_plan(schedule, noise, weights=weights).order

    testing.assert_independent_images(order, *arrays)


@given(testing.plans())
def test_restore_inverts_the_order(plan):
    np.testing.assert_array_equal(take_tokens(plan.order, plan.restore), [np.arange(plan.order.shape[1])] * 2)
    np.testing.assert_array_equal(take_tokens(plan.restore, plan.order), [np.arange(plan.order.shape[1])] * 2)


@given(testing.plans())
def test_stages_have_their_sizes_and_known_tokens(plan):
    schedule = plan.schedule
    sizes = schedule.stage_sizes
    assert sizes == reference.schedule.stage_sizes(schedule.counts.thrown, schedule.stages)
    assert sum(sizes) == schedule.counts.thrown
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)
    for stage, size in enumerate(sizes, start=1):
        assert plan.stage(stage).shape == (2, size)
        assert plan.known(stage).shape == (2, schedule.num_known(stage))
        assert schedule.num_known(stage) == reference.schedule.num_known(schedule.counts, schedule.stages, stage)
        together = np.concatenate([plan.known(stage), plan.stage(stage)], axis=1)
        np.testing.assert_array_equal(together, plan.order[:, : together.shape[1]])


@given(testing.plan_arguments())
def test_plans_match_the_reference_everywhere(arguments):
    if arguments["weights"] is None:
        plan = make_plan(**arguments)
        assert plan.order.tolist() == expected_order(plan.schedule, arguments["noise"])


def mean_distances(counts, throwing, images):
    """Distance to the nearest known token on 14 x 14: mean over thrown tokens."""
    plan = make_plan(Schedule(Grid((14, 14)), counts, throwing=throwing), counter_noise(0, 0, np.arange(images), 196))
    squared = nearest_known_distance(Grid((14, 14)), is_member(plan.known(1), 196))
    return np.sqrt(squared).sum(axis=1) / counts.thrown


@pytest.mark.parametrize("throw_ratio", [0.5, 0.6, 0.7])
def test_furthest_sampling_leaves_thrown_tokens_nearer_to_known_ones_than_rivals_do(throw_ratio):
    counts = count_tokens(196, 0.75, throw_ratio)
    # Less the 1 that no token can pass.
    beyond = {name: mean_distances(counts, name, 200) - 1 for name in ("furthest", "random", "cell")}
    assert (beyond["furthest"] < beyond["random"]).mean() > 0.99
    assert beyond["furthest"].mean() < 0.7 * beyond["random"].mean()
    assert beyond["furthest"].mean() < 0.7 * beyond["cell"].mean()


# The first pick is random: at least two tokens are known.
@pytest.mark.parametrize(
    ("visible", "decoded"), [known for known in product((0, 1, 2, 4, 16), (1, 2, 3, 4, 8, 32)) if sum(known) > 1]
)
def test_furthest_beats_random_with_two_visible_or_five_known_tokens(visible, decoded):
    counts = TokenCounts(visible, decoded, 196 - visible - decoded)
    furthest, rand = (mean_distances(counts, throwing, 1024).mean() for throwing in ("furthest", "random"))
    assert (furthest < rand) == (visible >= 2 or visible + decoded >= 5)


# --- parts of a plan -----------------------------------------------------------------------------------------------


def test_members_of_a_plan_are_equal_on_every_library(xp):
    schedule = Schedule(GRIDS[1], TokenCounts(6, 8, 10))
    order = make_plan(schedule, counter_noise(0, 0, np.arange(3), 24)).order

    def members(order):
        plan = Plan(order, schedule)
        return plan.restore, plan.mask, plan.supervised(reconstructed=True), plan.represented(reconstructed=False)

    restore, mask, supervised, represented = xp.run(members, order)
    xp.assert_equal(restore, np.argsort(order, axis=1), dtype="index")
    xp.assert_equal(mask, np.argsort(order, axis=1) >= 6, dtype="bool")
    xp.assert_equal(supervised, order[:, 6:], dtype="index")
    xp.assert_equal(represented, order[:, :14], dtype="index")


@given(testing.plans())
def test_the_mask_hides_the_masked_tokens(plan):
    assert plan.mask.sum() == plan.masked.size
    assert take_tokens(plan.mask, plan.masked).all()
    assert not take_tokens(plan.mask, plan.visible).any()


@given(testing.plans(), st.booleans())
def test_supervised_tokens_are_masked_tokens_with_a_feature(plan, reconstructed):
    supervised = plan.supervised(reconstructed=reconstructed)
    represented = plan.represented(reconstructed=reconstructed)
    np.testing.assert_array_equal(np.concatenate([plan.visible, supervised], axis=1), represented)
    missing = plan.schedule.counts.thrown * (not reconstructed)
    assert represented.shape[1] == plan.schedule.counts.num_tokens - missing


def test_check_accepts_plans(library):
    noise = counter_noise(0, 0, np.arange(3), 24)
    for unit in (None, (2, 2)):
        schedule = Schedule(GRIDS[1], TokenCounts(8, 8, 8), unit=unit)
        Plan(library.from_numpy(make_plan(schedule, noise).order), schedule).check()
        Plan(library.from_numpy(np.zeros((0, 24), dtype=int)), schedule).check()


@pytest.mark.parametrize(
    ("order", "unit", "error", "message"),
    [
        ([[0, 1, 2, 3], [0, 2, 2, 3]], None, ValueError, "order: expected a permutation of 0 to 3 .* invalid row 1"),
        ([[0, 1, 2, 4]], None, ValueError, "order: expected a permutation .*, got an invalid row 0"),
        ([[-1, 1, 2, 3]], None, ValueError, "order: expected a permutation .* row 0"),
        ([[0, 1, 2]], None, ValueError, r"order: expected shape \(batch, 4\), got \(1, 3\)"),
        ([0, 1, 2, 3], None, ValueError, r"order: expected shape \(batch, 4\), got \(4,\)"),
        ([[0.0, 1.0, 2.0, 3.0]], None, TypeError, "order: expected integers, got .*float"),
        ([[1, 0, 2, 3], [1, 2, 0, 3]], (2,), ValueError, r"order: .* in whole units \(2,\) in every row, .* row 1"),
    ],
)
def test_check_refuses_other_orders(library, order, unit, error, message):
    schedule = Schedule(Grid((4,)), TokenCounts(0, 2, 2), unit=unit)
    plan = Plan(library.from_numpy(np.asarray(order)), schedule)
    with pytest.raises(error, match=message):
        plan.check()


# --- membership and gathering --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 5, 9])
def test_is_member_marks_the_tokens(library, number):
    index = np.stack([np.random.default_rng(seed).permutation(9)[:number] for seed in range(3)]).astype(np.int64)
    expected = np.zeros((3, 9), dtype=bool)
    np.put_along_axis(expected, index, True, axis=1)
    library.assert_equal(library.run(lambda index: is_member(index, 9), index), expected, dtype="bool")


def test_is_member_checks_the_shape():
    with pytest.raises(ValueError, match=r"index: expected shape \(batch, n\), got \(3,\)"):
        is_member(np.arange(3), 4)


def test_is_member_takes_repeated_tokens(xp):
    expected = [[False, True, False], [True, False, True]]
    xp.assert_equal(xp.run(lambda index: is_member(index, 3), np.asarray([[1, 1], [2, 0]])), expected)


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
@pytest.mark.parametrize("number", [0, 5, 12])
def test_take_tokens_gathers(library, trailing, number):
    generator = np.random.default_rng(0)
    x = generator.random((3, 7, *trailing), dtype=np.float32)
    index = generator.integers(0, 7, (3, number))
    expected = np.stack([row[picked] for row, picked in zip(x, index, strict=True)])
    library.assert_equal(library.run(take_tokens, x, index), expected, dtype="float32")


@pytest.mark.parametrize("trailing", [(), (4,)])
def test_take_tokens_shares_what_has_a_batch_of_one(library, trailing):
    table = np.random.default_rng(0).random((1, 7, *trailing), dtype=np.float32)
    index = np.random.default_rng(1).integers(0, 7, (3, 5))
    library.assert_equal(library.run(take_tokens, table, index), table[0][index], dtype="float32")


OUTSIDE = [[[4], [0]], [[-1], [0]], [[0], [4]], [[0], [-4]], [[100], [-100]]]


@pytest.mark.parametrize("xp", ["numpy", "numpy:readonly", "strict", "torch"], indirect=True)
@pytest.mark.parametrize("index", OUTSIDE)
def test_take_tokens_refuses_tokens_of_other_images(xp, index):
    message = rf"^index: expected tokens in \[0, 4\), got values from {np.min(index)} to {np.max(index)}$"
    with pytest.raises(IndexError, match=message):
        xp.run(take_tokens, np.zeros((2, 4, 1)), np.asarray(index))


@pytest.mark.parametrize("xp", ["torch:compiled"], indirect=True)
@pytest.mark.parametrize("index", OUTSIDE[1:3])
def test_compiled_take_tokens_fails_by_the_bounds_of_the_framework(xp, index):
    with pytest.raises(IndexError, match="index out of range"):
        xp.run(take_tokens, np.zeros((2, 4, 1)), np.asarray(index))


def test_exported_take_tokens_has_a_dynamic_batch_and_keeps_its_bounds():
    torch = pytest.importorskip("torch")

    class Take(torch.nn.Module):
        def forward(self, x, index):
            return take_tokens(x, index)

    batch = torch.export.Dim("batch", min=1, max=64)
    arguments = (torch.zeros(4, 4, 1), torch.zeros(4, 1, dtype=torch.int64))
    program = torch.export.export(Take(), arguments, dynamic_shapes=({0: batch}, {0: batch})).module()
    x = torch.arange(12.0).reshape(3, 4, 1)
    assert program(x, torch.tensor([[3], [0], [1]])).flatten().tolist() == [3, 4, 9]
    with pytest.raises(IndexError, match="index out of range"):
        program(x, torch.tensor([[4], [0], [1]]))


@pytest.mark.parametrize("xp", ["jax", "jax:jit", "jax:x64"], indirect=True)
@pytest.mark.parametrize("index", OUTSIDE)
def test_jax_fills_what_lies_outside_of_an_image(xp, index):
    x, index = np.arange(8).reshape(2, 4), np.asarray(index)
    is_inside = (index >= 0) & (index < 4)
    clipped = np.take_along_axis(x, index.clip(0, 3), axis=1)
    for dtype, fill in ((np.float32, np.nan), (np.int16, -(2**15)), (np.uint8, 255)):
        xp.assert_equal(xp.run(take_tokens, x.astype(dtype), index), np.where(is_inside, clipped, fill).astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
def test_take_tokens_takes_any_integer_type(library, dtype):
    # 600 images of 100 tokens are more than 16 bits can count.
    x = np.arange(60_000, dtype=np.int32).reshape(600, 100)
    index = np.random.default_rng(0).integers(0, 100, (600, 3))
    library.assert_equal(library.run(take_tokens, x, index.astype(dtype)), np.take_along_axis(x, index, axis=1))


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_indices_are_integers(library, dtype):
    for function in (lambda index: take_tokens(index, index), lambda index: is_member(index, 4)):
        with pytest.raises(TypeError, match=r"index: expected (integers|token indices), got .*(bool|float32)"):
            library.run(function, np.zeros((2, 3), dtype))


@pytest.mark.parametrize("xp", ["numpy", "strict", "torch"], indirect=True)
@pytest.mark.parametrize("index", OUTSIDE)
def test_is_member_refuses_other_tokens(xp, index):
    with pytest.raises(IndexError, match=r"^index: expected tokens in \[0, 4\), got values from -?\d+ to \d+$"):
        xp.run(lambda index: is_member(index, 4), np.asarray(index))


@pytest.mark.parametrize("xp", ["numpy", "strict", "torch"], indirect=True)
@pytest.mark.parametrize("name", ["restore", "mask"])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_parts_of_a_plan_refuse_other_tokens(xp, name, wrong):
    schedule = Schedule(GRID, COUNTS)
    with pytest.raises(IndexError, match=r"^order: expected tokens in \[0, 4\), got values from -?\d+ to -?\d+$"):
        xp.run(lambda order: getattr(Plan(order, schedule), name), np.asarray([[wrong, 1, 2, 3]]))


@pytest.mark.parametrize(
    ("x", "index"),
    [((2, 3), (2,)), ((2,), (2, 3)), ((2, 3, 1), (1, 2)), ((2, 3), (2, 1, 1))],
)
def test_take_tokens_checks_shapes(x, index):
    with pytest.raises(ValueError, match=r"index: expected x \(batch, N, \.\.\.\) and index \(batch, n\), got"):
        take_tokens(np.zeros(x), np.zeros(index, dtype=int))


# --- schedules as keys, plans as pytrees ---------------------------------------------------------------------------


def test_schedules_of_equal_content_are_one_key():
    schedules = [Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5)) for _ in range(2)]
    assert schedules[0] == schedules[1]
    assert len(set(schedules)) == 1
    assert schedules[0] != Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5), stages=1)


def test_a_schedule_is_a_static_argument_and_noise_needs_no_new_trace(get_backend):
    jax = pytest.importorskip("jax")
    xp, traces = get_backend("jax"), []

    def plan(schedule, noise):
        traces.append(schedule)
        return make_plan(schedule, noise)

    jitted = jax.jit(plan, static_argnums=0)
    for step in range(3):
        schedule = Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5))  # made anew: equality counts, not identity
        noise = counter_noise(0, step, np.arange(2), 24)
        xp.assert_equal(jitted(schedule, xp.from_numpy(noise)).order, expected_order(schedule, noise), dtype="index")
    assert len(traces) == 1
    jitted(Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5), throwing="random"), xp.from_numpy(noise))
    assert len(traces) == 2


@pytest.fixture
def jax_plan(get_backend):
    xp = get_backend("jax")
    schedule = Schedule(Grid((4, 6)), TokenCounts(6, 8, 10))
    return Plan(xp.from_numpy(make_plan(schedule, counter_noise(0, 0, np.arange(3), 24)).order), schedule)


def test_a_plan_is_a_pytree_of_one_leaf(jax_plan):
    jax = pytest.importorskip("jax")
    leaves, structure = jax.tree_util.tree_flatten(jax_plan)
    assert len(leaves) == 1
    assert leaves[0] is jax_plan.order
    again = jax.tree_util.tree_unflatten(structure, leaves)
    assert isinstance(again, Plan)
    assert again.schedule == jax_plan.schedule
    shapes = jax.tree_util.tree_map(lambda leaf: leaf.shape, jax_plan)
    assert isinstance(shapes, Plan)
    assert shapes.order == (3, 24)
    assert isinstance(jax.eval_shape(lambda plan: plan, jax_plan), Plan)


def test_jit_takes_and_returns_plans(jax_plan):
    jax = pytest.importorskip("jax")

    @jax.jit
    def swap(plan):
        return Plan(plan.order[::-1], plan.schedule), plan.restore, plan.visible

    swapped, restore, visible = swap(jax_plan)
    assert isinstance(swapped, Plan)
    np.testing.assert_array_equal(swapped.order, np.asarray(jax_plan.order)[::-1])
    np.testing.assert_array_equal(restore, jax_plan.restore)
    np.testing.assert_array_equal(visible, jax_plan.visible)


def test_vmap_takes_plans(jax_plan):
    jax = pytest.importorskip("jax")
    firsts = jax.vmap(lambda plan: plan.order[0])(jax_plan)
    np.testing.assert_array_equal(firsts, jax_plan.order[:, 0])


def test_plans_compare_by_identity():
    plan = Plan(np.zeros((1, 4), dtype=int), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    assert plan == plan
    assert plan != Plan(plan.order, plan.schedule)
    assert hash(plan) is not None


# --- errors --------------------------------------------------------------------------------------------------------

GRID, COUNTS = Grid((4,)), TokenCounts(1, 1, 2)
NOISE = counter_noise(0, 0, np.arange(2), 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grid": (4,)}, TypeError, "grid: expected a Grid, got tuple"),
        ({"grid": None}, TypeError, "grid: expected a Grid, got NoneType"),
        ({"counts": (1, 1, 2)}, TypeError, "counts: expected a TokenCounts, got tuple"),
        ({"counts": TokenCounts(1, 1, 1)}, ValueError, "counts: expected 4 tokens in all, as in the grid, got 3"),
        ({"stages": 0}, ValueError, "stages: expected at least 1, got 0"),
        ({"stages": 1.0}, TypeError, "stages: expected an integer, got 1.0"),
        ({"stages": True}, TypeError, "stages: expected an integer, got True"),
        (
            {"throwing": "near"},
            ValueError,
            "throwing: expected one of furthest, random, weighted, cell, or a function, got 'near'",
        ),
        ({"furthest_from": "random"}, ValueError, "furthest_from: expected one of visible, none, got 'random'"),
        ({"unit": (3,)}, ValueError, r"unit: expected sizes that divide the grid \(4,\), got \(3,\)"),
        ({"unit": (2, 2)}, ValueError, r"unit: expected sizes that divide the grid \(4,\), got \(2, 2\)"),
        ({"unit": (0,)}, ValueError, r"unit: expected positive integers, got \(0,\)"),
        ({"unit": 2}, TypeError, "unit: expected a tuple of integers, got 2"),
        ({"unit": (2.0,)}, TypeError, r"unit: expected integers, got \(2.0,\)"),
        ({"unit": (2,)}, ValueError, "counts: expected decoded and thrown tokens in units of 2, got 1 and 2"),
        (
            {"counts": TokenCounts(1, 2, 1), "unit": (2,)},
            ValueError,
            "counts: expected decoded and thrown tokens in units of 2, got 2 and 1",
        ),
    ],
)
def test_schedules_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Schedule(**{"grid": GRID, "counts": COUNTS, **arguments})


def test_stages_may_be_a_numpy_integer():
    assert repr(Schedule(GRID, COUNTS, stages=np.int64(2))) == repr(Schedule(GRID, COUNTS, stages=2))


def test_stages_beyond_the_thrown_tokens_are_empty(library):
    schedule = Schedule(GRID, COUNTS, stages=10**7)  # known tokens are counted, not listed
    assert [schedule.num_known(stage) for stage in (1, 2, 3, 4, 10**7)] == [2, 3, 4, 4, 4]
    few = Schedule(GRID, COUNTS, stages=5)
    assert few.stage_sizes == (1, 1, 0, 0, 0)
    plan = library.run(lambda noise: make_plan(few, noise), NOISE)
    library.assert_equal(plan.stage(5), np.zeros((2, 0), dtype=int))
    library.assert_equal(plan.known(5), library.to_numpy(plan.order))


@pytest.mark.parametrize("stage", [0, 3])
def test_stages_count_from_one(stage):
    schedule = Schedule(GRID, COUNTS)
    plan = make_plan(schedule, NOISE)
    for method in (schedule.num_known, plan.stage, plan.known):
        with pytest.raises(ValueError, match=f"stage: expected 1 to 2, got {stage}"):
            method(stage)


@pytest.mark.parametrize(
    ("throwing", "arguments", "error", "message"),
    [
        ("furthest", {"noise": NOISE[:, :3]}, ValueError, r"noise: expected shape \(batch, 4\), got \(2, 3\)"),
        ("furthest", {"noise": NOISE[0]}, ValueError, r"noise: .* got \(4,\)"),
        ("furthest", {"visible": NOISE[:, :2]}, ValueError, r"visible: expected shape \(2, 1\), got \(2, 2\)"),
        ("furthest", {"visible": np.zeros((2, 1))}, TypeError, "visible: expected integers, got float64"),
        ("furthest", {"decoded": NOISE[:, :2]}, ValueError, r"decoded: expected shape \(2, 1\), got \(2, 2\)"),
        ("furthest", {"decoded": np.zeros((2, 1))}, TypeError, "decoded: expected integers, got float64"),
        (
            "weighted",
            {"decoded": NOISE[:, :1], "weights": np.ones((2, 4))},
            ValueError,
            "weights: expected None where decoded tokens are given, got an array",
        ),
        ("furthest", {"weights": np.ones((2, 4))}, ValueError, "weights: .* with throwing='weighted' only"),
        ("weighted", {}, ValueError, "weights: .* got None"),
        ("weighted", {"weights": np.ones((2, 1))}, ValueError, r"weights: .* \(2, 4\), got \(2, 1\)"),
        ("weighted", {"weights": np.ones(4)}, ValueError, r"weights: .* \(2, 4\), got \(4,\)"),
        (
            "weighted",
            {"weights": np.ones((2, 4)), "noise": NOISE / 2.0},
            TypeError,
            "noise: expected int32, got float64",
        ),
        ("cell", {"noise": NOISE / 2.0}, TypeError, "noise: expected int"),
        ("furthest", {"schedule": (4,)}, TypeError, "schedule: expected a Schedule, got tuple"),
        ("furthest", {"noise": NOISE.tolist()}, TypeError, "noise: expected an array, got list"),
        ("furthest", {"noise": None}, TypeError, "noise: expected an array, got NoneType"),
        ("furthest", {"visible": [[0], [1]]}, TypeError, "visible: expected an array, got list"),
        ("furthest", {"noise": NOISE > 0}, TypeError, "noise: expected integers or real numbers, got bool"),
        ("furthest", {"noise": NOISE * 1j}, TypeError, "noise: .* got complex128"),
    ],
)
def test_plans_are_checked(throwing, arguments, error, message):
    schedule = Schedule(GRID, COUNTS, throwing=throwing)
    with pytest.raises(error, match=message):
        make_plan(**{"schedule": schedule, "noise": NOISE, **arguments})


MASK = r"got a boolean mask; \(~mask\).argsort\(1\)\[:, :n\] are the n tokens where it is True"


@pytest.mark.parametrize("name", ["visible", "decoded"])
def test_a_mask_is_no_index(library, name):
    mask = NOISE.max(axis=1, keepdims=True) == NOISE
    with pytest.raises(TypeError, match=f"^{name}: expected token indices, {MASK}"):
        library.run(lambda noise, mask: make_plan(Schedule(GRID, COUNTS), noise, **{name: mask}), NOISE, mask)
    index = library.run(lambda mask: (~mask).argsort(1)[:, :1], mask) if library.name != "strict" else None
    assert index is None or (library.to_numpy(index)[:, 0] == NOISE.argmax(axis=1)).all()


def returning(result):
    def mine(grid, counts, noise, is_visible):
        return result

    return mine


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "expected an array, got NoneType"),
        ([[0], [1]], TypeError, "expected an array, got list"),
        ("torch", TypeError, "expected an array of the library of its arguments, got a Tensor"),
        (np.zeros((2, 1)), TypeError, "expected integers, got float64"),
        (np.zeros((2, 4), bool), TypeError, f"expected token indices, {MASK}"),
        (np.zeros((2, 2), int), ValueError, r"expected decoded tokens of shape \(2, 1\), got \(2, 2\)"),
    ],
)
def test_what_a_function_returns_is_checked(result, error, message):
    if isinstance(result, str):
        result = pytest.importorskip(result).zeros(2, 1, dtype=int)
    with pytest.raises(error, match=f"^throwing mine: {message}"):
        make_plan(Schedule(GRID, COUNTS, throwing=returning(result)), NOISE)


UNITS_OF_TWO = Schedule(GRID, TokenCounts(2, 2, 0), unit=(2,))
ON_HOST = pytest.mark.parametrize("xp", ["numpy", "numpy:readonly", "strict", "torch"], indirect=True)


@ON_HOST
@pytest.mark.parametrize(
    ("schedule", "given", "error", "message"),
    [
        (None, {"visible": [[0, 1], [2, 2]]}, ValueError, "visible: expected distinct tokens .* invalid row 1"),
        (None, {"visible": [[0, 4], [0, 1]]}, IndexError, r"visible: expected tokens in \[0, 4\), .* 0 to 4"),
        (None, {"visible": [[0, -1], [0, 1]]}, IndexError, r"visible: .* got values from -1 to 1"),
        (None, {"visible": [[0, 1]] * 2, "decoded": [[1], [2]]}, ValueError, "decoded: .* masked tokens .* row 0"),
        (None, {"decoded": [[5], [2]]}, IndexError, r"decoded: expected tokens in \[0, 4\), got .* 2 to 5"),
        (UNITS_OF_TWO, {"visible": [[0, 1], [1, 2]]}, ValueError, r"visible: .* whole units \(2,\) .* row 1"),
    ],
)
def test_given_tokens_are_checked(xp, schedule, given, error, message):
    schedule = schedule or Schedule(GRID, TokenCounts(2, 1, 1))
    arrays = {name: xp.from_numpy(np.asarray(tokens)) for name, tokens in given.items()}
    with pytest.raises(error, match=f"^{message}"):
        make_plan(schedule, xp.from_numpy(NOISE), **arrays)


@ON_HOST
@pytest.mark.parametrize(
    ("decoded", "error", "message"),
    [
        ([[1, 1], [1, 2]], ValueError, "expected distinct masked tokens in every row, got an invalid row 0"),
        ([[1, 2], [3, 0]], ValueError, "expected distinct masked tokens in every row, got an invalid row 1"),
        ([[1, 4], [1, 2]], IndexError, r"expected tokens in \[0, 4\), got values from 1 to 4"),
    ],
)
def test_tokens_of_a_function_are_checked(xp, decoded, error, message):
    schedule = Schedule(GRID, TokenCounts(1, 2, 1), throwing=returning(xp.from_numpy(np.asarray(decoded))))
    visible = xp.from_numpy(np.asarray([[0], [0]]))
    with pytest.raises(error, match=f"^throwing mine: {message}$"):
        make_plan(schedule, xp.from_numpy(NOISE), visible)


@pytest.mark.parametrize("xp", ["torch:compiled", "jax", "jax:jit"], indirect=True)
def test_check_finds_what_could_not_be_seen(xp):
    schedule = Schedule(GRID, TokenCounts(2, 1, 1))
    order = xp.run(lambda *arrays: make_plan(schedule, *arrays).order, NOISE, np.asarray([[0, 1], [2, 2]]))
    with pytest.raises(ValueError, match="order: expected a permutation of 0 to 3 in every row, got an invalid row 1"):
        Plan(order, schedule).check()


@ON_HOST
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_without_an_order_is_refused(xp, dtype):
    noise = NOISE / dtype(2**16)
    noise[1, 2] = np.nan
    noise, is_visible = xp.from_numpy(noise.astype(dtype)), xp.from_numpy(NOISE > 2**31)
    for function in (
        lambda: make_plan(Schedule(GRID, COUNTS), noise),
        lambda: random_decoded(1, noise, is_visible),
        lambda: furthest_decoded(GRID, 1, noise, is_visible),
        lambda: block_visible(GRID, (2,), 1, noise),
    ):
        with pytest.raises(ValueError, match=r"^noise: expected numbers, got NaN$"):
            function()


@ON_HOST
def test_weights_without_an_order_are_refused(xp):
    weights = xp.from_numpy(np.full((2, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"^weights: expected numbers, got NaN$"):
        make_plan(Schedule(GRID, COUNTS, throwing="weighted"), xp.from_numpy(NOISE), weights=weights)


def test_weights_of_units_are_checked():
    schedule = Schedule(GRID, TokenCounts(0, 2, 2), throwing="weighted", unit=(2,))
    with pytest.raises(ValueError, match=r"weights: .* \(2, 4\), got \(2, 2\)"):
        make_plan(schedule, NOISE, weights=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"weights: .* got None"):
        make_plan(schedule, NOISE)


@pytest.mark.parametrize("xp", ["torch", "jax", "strict"], indirect=True)
def test_libraries_are_not_mixed(xp):
    visible = np.zeros((2, 1), dtype=int)
    with pytest.raises(TypeError, match=r"arrays: expected arrays of one library, got .*numpy\.ndarray"):
        make_plan(Schedule(GRID, COUNTS), xp.from_numpy(NOISE), visible)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import Grid, counter_noise, furthest_point_sampling, sampling, testing
from prmim_core._arrays import array_namespace
from prmim_core.coverage import _squared_distances
from prmim_core.grid import INT32_MAX
from prmim_core.noise import _noise_rank

# Many shapes, each a program of JAX; test_every_function.py has every function under the full compiler.
pytestmark = pytest.mark.usefixtures("quick_compiler")

GRIDS = [Grid((7,), (3,)), Grid((4, 6)), Grid((5, 4), (3, 1)), Grid((3, 4, 2), (4, 1, 1))]


def some(length, share, seed):
    return np.random.default_rng(seed).random((3, length)) < share


def tokens(mask):
    return np.flatnonzero(mask).tolist()


def expected_picks(grid, num_samples, noise, is_known=None, is_candidate=None):
    positions = reference.grid.positions(grid.shape, grid.spacing)
    picks = [
        reference.sampling.furthest_point_sampling(
            positions,
            num_samples,
            row,
            known=() if is_known is None else tokens(is_known[image]),
            candidates=None if is_candidate is None else tokens(is_candidate[image]),
        )
        for image, row in enumerate(noise.tolist())
    ]
    return np.reshape(np.asarray(picks, dtype=int), (len(noise), num_samples))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masks", ["none", "known", "candidates", "both"])
def test_picks_match_the_reference(library, grid, masks):
    noise = counter_noise(0, 0, np.arange(3), grid.num_tokens)
    is_known = some(grid.num_tokens, 0.2, 0) if masks in ("known", "both") else None
    is_candidate = some(grid.num_tokens, 0.8, 1) if masks in ("candidates", "both") else None
    arrays = [mask for mask in (is_known, is_candidate) if mask is not None]

    def pick(noise, *arrays):
        given = iter(arrays)
        return furthest_point_sampling(
            grid,
            3,
            noise,
            is_known=None if is_known is None else next(given),
            is_candidate=None if is_candidate is None else next(given),
        )

    library.assert_equal(
        library.run(pick, noise, *arrays), expected_picks(grid, 3, noise, is_known, is_candidate), dtype="index"
    )


@pytest.mark.parametrize("number", [0, 1, 24])
def test_any_number_of_tokens_is_picked(library, number):
    noise = counter_noise(1, 0, np.arange(3), 24)
    picks = library.run(lambda noise: furthest_point_sampling(GRIDS[1], number, noise), noise)
    library.assert_equal(picks, expected_picks(GRIDS[1], number, noise), dtype="index")


@pytest.mark.parametrize("noise", [np.zeros((3, 24), dtype=np.int32), some(24, 0.5, 0).astype(np.float32)])
def test_equal_noise_ranks_by_token(library, noise):
    picks = library.run(lambda noise: furthest_point_sampling(GRIDS[1], 9, noise), noise)
    library.assert_equal(picks, expected_picks(GRIDS[1], 9, noise), dtype="index")


@pytest.mark.parametrize(("masked", "dtype"), [(True, np.int32), (False, np.uint8)])
def test_grids_and_arrays_of_positions_give_the_same_picks(xp, masked, dtype):
    grid = GRIDS[3]
    noise = counter_noise(0, 0, np.arange(3), grid.num_tokens)
    is_known = some(grid.num_tokens, 0.2 * masked, 0)
    positions = grid.positions.astype(dtype)
    expected = expected_picks(grid, 8, noise, is_known)
    # Of NumPy: its values bound the key. Of the library: nothing is read off it, and keys are not packed.
    of_numpy = xp.run(lambda *a: furthest_point_sampling(positions, 8, *a), noise, is_known)
    xp.assert_equal(of_numpy, expected, dtype="index")
    own = xp.run(lambda *a: furthest_point_sampling(a[0], 8, *a[1:]), positions, noise, is_known)
    xp.assert_equal(own, expected, dtype="index")


def test_positions_may_be_read_only(xp):
    positions = GRIDS[1].positions
    positions.flags.writeable = False
    noise = counter_noise(0, 0, np.arange(3), 24)
    picks = xp.run(lambda noise: furthest_point_sampling(positions, 3, noise), noise)
    xp.assert_equal(picks, expected_picks(GRIDS[1], 3, noise), dtype="index")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_positions_of_narrow_types_do_not_wrap(dtype):
    positions = np.asarray([[-100], [-3], [0], [2], [100]], dtype=dtype)
    assert furthest_point_sampling(positions, 4, np.asarray([[0, 1, 2, 3, 4]])).tolist() == [[4, 0, 2, 1]]


# --- both ways to compare ------------------------------------------------------------------------------------------


def both_ways(grid, num_samples, noise, is_known, may_pick):
    """Pick by the packed key, and by distance then rank, whatever the dispatch."""
    xp, length = array_namespace(noise), grid.num_tokens
    distance, rank = sampling.starting_distance(xp, grid, noise, is_known, may_pick)
    rows, scaled_rows = (sampling._distance_rows(xp, grid, scale, noise) for scale in (1, length))
    packed = sampling._pick_by_packed_key(xp, scaled_rows, distance * length + rank, rank, num_samples)
    return packed, sampling._pick_by_distance_then_rank(xp, rows, distance, rank, num_samples)


@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_both_ways_are_equal_on_every_library(library, grid, share):
    noise = counter_noise(2, 0, np.arange(3), grid.num_tokens)
    is_known = some(grid.num_tokens, share, 0)
    packed, compared = library.run(lambda *a: both_ways(grid, 3, *a), noise, is_known, ~is_known)
    expected = expected_picks(grid, 3, noise, is_known)
    library.assert_equal(packed, expected, dtype="index")
    library.assert_equal(compared, expected, dtype="index")


@st.composite
def cases(draw, max_tokens=49):
    grid = draw(testing.grids(max_tokens=max_tokens))
    masks = testing.visible_masks(grid.num_tokens, batch=1)
    is_known = draw(masks)
    may_pick = ~is_known & draw(masks)
    return grid, draw(testing.noise(grid.num_tokens, batch=1)), is_known, may_pick, draw(st.integers(0, may_pick.sum()))


@given(cases())
def test_both_ways_are_equal(case):
    grid, noise, is_known, may_pick, number = case
    if number:
        packed, compared = both_ways(grid, number, noise, is_known, may_pick)
        np.testing.assert_array_equal(packed, compared)
        np.testing.assert_array_equal(packed, expected_picks(grid, number, noise, is_known, may_pick))


@pytest.fixture
def way_taken(monkeypatch):
    """Return a list that fills with the names of the loops that are called."""
    taken = []

    def spy_on(name):
        original = getattr(sampling, name)

        def spy(*arguments):
            taken.append(name)
            return original(*arguments)

        monkeypatch.setattr(sampling, name, spy)

    spy_on("_pick_by_packed_key")
    spy_on("_pick_in_place")
    spy_on("_pick_by_distance_then_rank")
    return taken


def picks_in_int64(grid, num_samples, noise, is_known):
    """Pick with masks, branches and 64-bit integers: slow, large and plain."""
    positions = grid.positions.astype(np.int64)
    picks = []
    for row, known in zip(noise, is_known, strict=True):
        rank = np.empty(row.size, dtype=np.int64)
        rank[np.argsort(row, kind="stable")] = np.arange(row.size)
        distance = np.full(row.size, 2**62)
        may_pick = ~known
        for token in np.flatnonzero(known):
            distance = np.minimum(distance, ((positions - positions[token]) ** 2).sum(axis=1))
        of_image = []
        for _ in range(num_samples):
            furthest = np.flatnonzero(may_pick & (distance == distance[may_pick].max()))
            pick = furthest[rank[furthest].argmax()]
            of_image.append(int(pick))
            may_pick[pick] = False
            distance = np.minimum(distance, ((positions - positions[pick]) ** 2).sum(axis=1))
        picks.append(of_image)
    return picks


LARGE = [
    (Grid((64, 64)), "_pick_by_packed_key"),
    (Grid((128, 128)), "_pick_by_packed_key"),
    (Grid((16, 64, 64)), "_pick_by_packed_key"),
    (Grid((16, 64, 64), (9, 1, 1)), "_pick_by_packed_key"),
    (Grid((16, 64, 64), (11, 1, 1)), "_pick_by_distance_then_rank"),
    (Grid((192, 192)), "_pick_by_distance_then_rank"),
    (Grid((14, 14), (254, 17)), "_pick_by_packed_key"),  # the key reaches 0.9996 of int32 here
    (Grid((14, 14), (254, 18)), "_pick_by_distance_then_rank"),  # and would pass it here
    (Grid((14, 14), (2000, 1500)), "_pick_by_distance_then_rank"),
]


@pytest.mark.parametrize(("grid", "way"), LARGE, ids=str)
@pytest.mark.parametrize("num_known", [0, 3])
def test_large_grids_match_64_bit_arithmetic(library, grid, way, num_known, way_taken):
    noise = counter_noise(0, 0, np.arange(2), grid.num_tokens)
    is_known = _noise_rank(np, noise[:, ::-1]) < num_known
    picks = library.run(lambda *a: furthest_point_sampling(grid, 5, *a), noise, is_known)
    library.assert_equal(picks, picks_in_int64(grid, 5, noise, is_known), dtype="index")
    if library.library == "numpy" and way == "_pick_by_packed_key" and grid.num_tokens < 2048:
        way = "_pick_in_place"
    assert way_taken == [way]


def test_the_key_is_packed_up_to_the_limit_of_int32():
    for (grid, way), inside in zip(LARGE[6:8], (True, False), strict=True):
        largest_key = (grid.max_squared_distance + 2) * grid.num_tokens
        assert (largest_key <= INT32_MAX) == inside == (way == "_pick_by_packed_key")
        assert sampling.key_fits_int32(grid) == inside
        assert 0.99 < largest_key / INT32_MAX < 1.01


@pytest.mark.parametrize("grid", [*GRIDS, Grid((6, 5, 4), (1, 2, 3))], ids=str)
def test_rows_of_large_grids_are_those_of_the_table(library, grid, monkeypatch):
    picks = np.asarray([0, grid.num_tokens // 2, grid.num_tokens - 1])
    noise = np.zeros((3, grid.num_tokens), dtype=np.int32)

    def rows(picks, noise):
        return sampling._distance_rows(array_namespace(noise), grid, 5, noise)(picks)

    expected = 5 * _squared_distances(np, grid.positions, grid.positions)[picks]
    library.assert_equal(library.run(rows, picks, noise), expected, dtype="int32")
    monkeypatch.setattr(sampling, "_TABLE_TOKENS", 0)
    library.assert_equal(library.run(rows, picks, noise), expected, dtype="int32")


def test_the_table_of_a_grid_is_made_once_and_cannot_be_written():
    table = sampling._key_table(GRIDS[1])
    assert table is sampling._key_table(Grid((4, 6)))
    assert table is not sampling._key_table(Grid((4, 6), (1, 2)))
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


# --- properties ----------------------------------------------------------------------------------------------------


@given(cases())
def test_picks_are_distinct_candidates(case):
    grid, noise, is_known, may_pick, number = case
    picks = furthest_point_sampling(grid, number, noise, is_known=is_known, is_candidate=may_pick)[0]
    assert picks.shape == (number,)
    assert np.unique(picks).size == number
    assert may_pick[0, picks].all()


@given(cases())
def test_known_tokens_are_never_picked_even_as_candidates(case):
    grid, noise, is_known, may_pick, number = case
    expected = furthest_point_sampling(grid, number, noise, is_known=is_known, is_candidate=may_pick)
    np.testing.assert_array_equal(
        furthest_point_sampling(grid, number, noise, is_known=is_known, is_candidate=may_pick | is_known), expected
    )


@given(cases())
def test_distances_of_picks_do_not_increase(case):
    grid, noise, is_known, may_pick, number = case
    picks = furthest_point_sampling(grid, number, noise, is_known=is_known, is_candidate=may_pick)
    testing.assert_distances_decrease(grid, picks, is_known)


@given(cases(), st.integers(0, 9))
def test_fewer_picks_are_the_first_of_more(case, less):
    grid, noise, is_known, may_pick, number = case
    more = furthest_point_sampling(grid, number, noise, is_known=is_known, is_candidate=may_pick)
    fewer = furthest_point_sampling(grid, max(0, number - less), noise, is_known=is_known, is_candidate=may_pick)
    testing.assert_prefix(fewer, more)


@given(cases(max_tokens=16), st.integers(1, 3))
def test_covering_radius_is_at_most_twice_the_best(case, number):
    grid, noise, is_known, _, _ = case
    is_known = is_known & (np.arange(grid.num_tokens) < 2)
    number = min(number, int((~is_known).sum()))
    testing.assert_covering_radius(grid, furthest_point_sampling(grid, number, noise, is_known=is_known), is_known)


# --- errors --------------------------------------------------------------------------------------------------------

NOISE = np.zeros((2, 4), dtype=np.int32)
NOBODY = np.zeros((2, 4), dtype=bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Grid((4,)), 5, NOISE), ValueError, "num_samples: expected 0 to 4, got 5"),
        ((Grid((4,)), -1, NOISE), ValueError, "num_samples: expected 0 to 4, got -1"),
        ((Grid((5,)), 1, NOISE), ValueError, r"noise: expected shape \(batch, 5\), got \(2, 4\)"),
        ((Grid((4,)), 1, NOISE[0]), ValueError, r"noise: .* got \(4,\)"),
        ((np.arange(4), 1, NOISE), ValueError, r"positions: expected a Grid or shape \(N, axes\), got shape \(4,\)"),
        ((np.zeros((4, 2)), 1, NOISE), TypeError, "positions: expected integers, got float64"),
        ((2**15 * np.eye(4, 2, dtype=int), 1, NOISE), ValueError, r"positions: .* below 2\*\*30 .* got 2147483648"),
        ((Grid((4,)), 1, NOISE, NOISE), TypeError, "is_known: expected bool, got int32"),
        ((Grid((4,)), 1, NOISE, None, NOISE), TypeError, "is_candidate: expected bool, got int32"),
        ((Grid((4,)), 1, NOISE, NOBODY[:1]), ValueError, r"is_known: .* shape of noise, \(2, 4\), got \(1, 4\)"),
        ((Grid((4,)), 1, NOISE, NOBODY, NOBODY[:, :2]), ValueError, r"is_candidate: .* got \(2, 2\)"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        furthest_point_sampling(*arguments)

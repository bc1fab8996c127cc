import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from prmim_reference.counts import TokenCounts, count_tokens
from prmim_reference.masking import block_visible, tube_visible
from prmim_reference.noise import counter_noise
from prmim_reference.schedule import make_order, num_known, stage_sizes, thrown_order

STRATEGIES = ["furthest", "random", "weighted", "cell"]
GRIDS = [((12,), None), ((6, 5), None), ((6, 5), (2, 1)), ((2, 4, 4), (4, 1, 1))]


@pytest.mark.parametrize(
    ("num_thrown", "stages", "expected"),
    [(98, 2, (49, 49)), (7, 3, (3, 2, 2)), (8, 3, (3, 3, 2)), (2, 4, (1, 1, 0, 0)), (0, 2, (0, 0)), (5, 1, (5,))],
)
def test_stage_sizes_by_hand(num_thrown, stages, expected):
    assert stage_sizes(num_thrown, stages) == expected
    counts = TokenCounts(3, 4, num_thrown)
    starts = [num_known(counts, stages, stage) for stage in range(1, stages + 2)]
    assert starts == [7 + sum(expected[:stage]) for stage in range(stages + 1)]


def test_stages_are_at_least_one():
    with pytest.raises(ValueError, match="stages: expected at least 1"):
        stage_sizes(4, 0)


@pytest.mark.parametrize("throwing", STRATEGIES)
@pytest.mark.parametrize("furthest_from", ["visible", "none"])
@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("ratios", [(0.75, 0.5), (0.5, 0.0), (0.75, 1.0), (0.0, 0.5), (1.0, 0.4)])
def test_the_plan_is_a_permutation_with_thrown_tokens_by_distance(throwing, furthest_from, shape, spacing, ratios):
    num_tokens = int(np.prod(shape))
    counts = count_tokens(num_tokens, *ratios)
    noise = counter_noise(0, 0, 0, num_tokens)
    weights = np.random.default_rng(0).uniform(size=num_tokens).tolist()
    order = make_order(
        shape, counts, noise, spacing=spacing, throwing=throwing, furthest_from=furthest_from, weights=weights
    )
    assert sorted(order) == list(range(num_tokens))
    assert order[: counts.visible] == np.argsort(noise)[: counts.visible].tolist()
    known, thrown = order[: num_tokens - counts.thrown], order[num_tokens - counts.thrown :]
    is_unknown = np.ones(num_tokens, bool)
    is_unknown[known] = False
    distance = (
        distance_transform_edt(is_unknown.reshape(shape), sampling=spacing).ravel() if known else is_unknown * 1.0
    )
    expected = np.lexsort((noise, np.round(distance**2)))
    assert thrown == [token for token in expected if is_unknown[token]]


def test_nothing_known_leaves_the_order_to_noise():
    noise = counter_noise(0, 0, 0, 16)
    order = make_order((4, 4), TokenCounts(0, 0, 16), noise)
    assert order == np.argsort(noise).tolist()
    assert thrown_order((4, 4), noise, []) == order


def test_visible_tokens_may_be_given():
    noise = counter_noise(0, 0, 0, 32)
    visible = tube_visible((2, 4, 4), 8, noise)
    order = make_order((2, 4, 4), TokenCounts(8, 8, 16), noise, visible=visible)
    assert order[:8] == visible
    assert sorted(order) == list(range(32))


def test_decoded_tokens_may_be_given():
    noise = counter_noise(0, 0, 0, 16)
    order = make_order((4, 4), TokenCounts(2, 3, 11), noise, visible=[3, 7], decoded=[15, 0, 5])
    assert order[:5] == [3, 7, 15, 0, 5]
    assert order[5:] == thrown_order((4, 4), noise, order[:5])
    for wrong in ([15, 0, 3], [15, 0, 0], [15, 0]):
        with pytest.raises(ValueError, match="decoded: expected 3 distinct masked tokens"):
            make_order((4, 4), TokenCounts(2, 3, 11), noise, visible=[3, 7], decoded=wrong)


def test_noise_may_be_floats():
    noise = np.random.default_rng(0).random(24).tolist()
    ranks = np.argsort(np.argsort(noise)).tolist()
    counts = TokenCounts(6, 8, 10)
    for throwing in ("furthest", "random"):
        assert make_order((4, 6), counts, noise, throwing=throwing) == make_order(
            (4, 6), counts, ranks, throwing=throwing
        )
    for throwing in ("cell", "weighted"):
        with pytest.raises(TypeError, match="noise: expected integers"):
            make_order((4, 6), counts, noise, throwing=throwing, weights=[1.0] * 24)


@pytest.mark.parametrize("throwing", STRATEGIES)
def test_units_are_decoded_or_thrown_as_a_whole(throwing):
    counts = count_tokens(96, 0.6, 0.25, mask_unit=4, throw_unit=4)
    noise = counter_noise(0, 0, 0, 96)
    weights = np.random.default_rng(0).uniform(size=96).tolist()
    order = make_order((8, 12), counts, noise, throwing=throwing, weights=weights, unit=(2, 2))
    assert sorted(order) == list(range(96))
    assert order[: counts.visible] == block_visible((8, 12), (2, 2), counts.visible // 4, noise)
    number = np.kron(np.arange(24).reshape(4, 6), np.ones((2, 2), int)).ravel()
    known = number[order[: 96 - counts.thrown]].reshape(-1, 4)
    assert (known == known[:, :1]).all()
    assert len(set(known[:, 0])) == len(known)
    assert order[96 - counts.thrown :] == thrown_order((8, 12), noise, order[: 96 - counts.thrown])


def test_furthest_throwing_leaves_thrown_tokens_nearer_to_known_ones():
    counts = count_tokens(196, 0.75, 0.5)
    totals = {}
    for throwing in ("furthest", "random"):
        totals[throwing] = 0.0
        for sample in range(3):
            order = make_order((14, 14), counts, counter_noise(0, 0, sample, 196), throwing=throwing)
            is_unknown = np.ones(196, bool)
            is_unknown[order[:98]] = False
            totals[throwing] += distance_transform_edt(is_unknown.reshape(14, 14)).sum()
    assert totals["furthest"] < totals["random"]


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="noise: expected one value for each of 4 tokens"):
        make_order((2, 2), TokenCounts(1, 1, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="noise: expected"):
        make_order((2, 2), TokenCounts(1, 1, 1), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="visible: expected 1 tokens, got 2"):
        make_order((2, 2), TokenCounts(1, 1, 2), [0, 1, 2, 3], visible=[0, 1])


def test_visible_tokens_that_are_no_set_of_the_grid_are_refused():
    with pytest.raises(IndexError, match=r"visible: expected tokens in \[0, 4\), got 4"):
        make_order((2, 2), TokenCounts(2, 1, 1), [0, 1, 2, 3], visible=[0, 4])
    with pytest.raises(ValueError, match=r"visible: expected distinct tokens, got \[1, 1\]"):
        make_order((2, 2), TokenCounts(2, 1, 1), [0, 1, 2, 3], visible=[1, 1])

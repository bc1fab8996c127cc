import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from prmim_reference.coverage import covering_radius
from prmim_reference.grid import positions
from prmim_reference.noise import counter_noise
from prmim_reference.sampling import furthest_point_sampling


def greedy_by_cdist(points, num_samples, noise, known, candidates):
    """Furthest sampling on a full distance matrix; ties by the largest noise."""
    distance = cdist(points, points, "sqeuclidean")
    covered, picks = list(known), []
    for _ in range(num_samples):
        nearest = distance[:, covered].min(axis=1) if covered else np.zeros(len(points))
        open_tokens = [token for token in candidates if token not in covered]
        best = max(nearest[open_tokens])
        pick = max((token for token in open_tokens if nearest[token] == best), key=lambda token: noise[token])
        covered.append(pick)
        picks.append(pick)
    return picks


@pytest.mark.parametrize(
    ("shape", "spacing"), [((20,), None), ((6, 7), None), ((6, 7), (1, 3)), ((2, 4, 4), (4, 1, 1))]
)
@pytest.mark.parametrize("num_known", [0, 1, 6])
@pytest.mark.parametrize("sample", range(3))
def test_agrees_with_a_greedy_search_on_the_distance_matrix(shape, spacing, num_known, sample):
    points = np.array(positions(shape, spacing))
    noise = counter_noise(0, 0, sample, len(points))
    order = np.random.default_rng(sample).permutation(len(points)).tolist()
    known, candidates = order[:num_known], order[num_known : num_known + 12]
    found = furthest_point_sampling(points.tolist(), 10, noise, known, candidates)
    assert found == greedy_by_cdist(points, 10, noise, known, candidates)
    found = furthest_point_sampling(points.tolist(), 10, noise, known)
    assert found == greedy_by_cdist(points, 10, noise, known, order[num_known:])


def test_by_hand_on_a_line():
    points = positions((7,))
    # The ends are equally far from the middle: higher noise first. Then 1, 2, 4, 5 are all one step from a known one.
    assert furthest_point_sampling(points, 6, [9, 1, 2, 0, 4, 3, 8], known=[3]) == [0, 6, 4, 5, 2, 1]
    # Nothing known: the highest noise starts.
    assert furthest_point_sampling(points, 3, [9, 1, 2, 0, 4, 3, 8]) == [0, 6, 3]


def test_ties_in_noise_go_to_the_later_token():
    assert furthest_point_sampling(positions((2, 2)), 4, [5, 5, 5, 5]) == [3, 0, 2, 1]


def test_a_known_candidate_is_never_picked():
    assert furthest_point_sampling(positions((4,)), 2, [0, 1, 2, 3], known=[0, 3], candidates=[3, 1, 2]) == [2, 1]


@pytest.mark.parametrize("known", [[], [17, 3]])
def test_fewer_picks_are_the_first_of_more_and_their_distance_never_grows(known):
    points = positions((5, 6))
    noise = counter_noise(0, 0, 0, 30)
    longest = furthest_point_sampling(points, 20, noise, known)
    assert len({*longest, *known}) == 20 + len(known)
    gaps = []
    for count in range(20):
        assert furthest_point_sampling(points, count, noise, known) == longest[:count]
        covered = known + longest[:count]
        if covered:
            gaps.append(cdist([points[longest[count]]], [points[token] for token in covered]).min())
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (12,), (3, 4)])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize("num_known", [0, 2])
def test_radius_is_at_most_twice_the_best_of_all_subsets(shape, num_samples, num_known):
    points = positions(shape)
    noise = counter_noise(0, 0, num_samples, len(points))
    known = np.argsort(noise)[:num_known].tolist()
    picks = furthest_point_sampling(points, num_samples, noise, known)
    rest = [token for token in range(len(points)) if token not in known]
    best = min(covering_radius(points, [*known, *subset]) for subset in itertools.combinations(rest, num_samples))
    assert covering_radius(points, known + picks) <= 2 * best


@pytest.mark.parametrize("num_samples", [-1, 4])
def test_impossible_counts_are_refused(num_samples):
    with pytest.raises(ValueError, match="num_samples: expected 0 to 3"):
        furthest_point_sampling(positions((2, 2)), num_samples, [0, 1, 2, 3], known=[0])

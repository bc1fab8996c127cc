"""The two classifiers on arrays of features."""

import numpy as np
import pytest

from prmim_train.evaluate.frozen import PROTOCOLS, accuracy, classify, logistic_regression, nearest_neighbours


def clusters(number=60, dim=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % classes
    centres = rng.normal(size=(classes, dim)) * 3
    return (centres[labels] + rng.normal(size=(number, dim))).astype(np.float32), labels


def vote(features, labels, test, neighbours, temperature):
    """Count votes one by one."""
    found = []
    for row in test:
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in features]
        nearest = sorted(range(len(features)), key=lambda k: -cosines[k])[:neighbours]
        votes = {}
        for k in nearest:
            votes[labels[k]] = votes.get(labels[k], 0) + np.exp(cosines[k] / temperature)
        found.append(max(votes, key=votes.get))
    return found


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (200, 0.2)])
def test_neighbours_vote_as_they_do_one_by_one(neighbours, temperature):
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(80, 4)).astype(np.float32), rng.integers(3, size=80)
    test = rng.normal(size=(50, 4)).astype(np.float32)
    found = nearest_neighbours(features, labels, test, neighbours=neighbours, temperature=temperature)
    assert found.tolist() == vote(features, labels, test, neighbours, temperature)


def test_twenty_vote_unless_said_otherwise():
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(4, size=200)
    test = rng.normal(size=(100, 3)).astype(np.float32)
    assert nearest_neighbours(features, labels, test).tolist() == vote(features, labels, test, 20, 0.07)


def test_neighbours_vote_by_their_nearness():
    """One vote at cosine 0.9 outweighs two at 0.8, but not two at 0.88."""
    similarities = np.array([0.9, 0.8, 0.8])
    x = np.stack([similarities, np.sqrt(1 - similarities**2)], axis=1).astype(np.float32)
    test = np.float32([[1, 0]])
    votes = np.exp(similarities / 0.07)
    assert votes[0] > votes[1] + votes[2]
    assert classify("knn", x, np.array([0, 1, 1]), test).tolist() == [0]
    similarities[1:] = 0.88
    assert np.exp(0.9 / 0.07) < 2 * np.exp(0.88 / 0.07)
    x = np.stack([similarities, np.sqrt(1 - similarities**2)], axis=1).astype(np.float32)
    assert classify("knn", x, np.array([0, 1, 1]), test).tolist() == [1]


def test_fewer_images_than_neighbours():
    x, y = np.eye(3, dtype=np.float32), np.array([0, 0, 1])
    assert accuracy("knn", x, y, x, y) == 1.0  # the nearest one outweighs all others


def test_a_linear_classifier_separates_clusters_of_any_scale():
    features, labels = clusters()
    test, truth = clusters(30, seed=0)
    for scale in (1e-3, 1.0, 1e4):
        assert np.mean(logistic_regression(features * scale, labels, test * scale) == truth) > 0.9


def test_few_iterations_are_no_error():
    features, labels = clusters()
    assert len(logistic_regression(features, labels, features, max_iterations=1)) == 60


def test_accuracy_of_chance_is_chance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400, 8)).astype(np.float32), rng.integers(0, 4, (2, 400))
    for protocol in ("knn", "linear"):
        assert accuracy(protocol, x[0], y[0], x[1], y[1]) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_come_back_as_they_are(protocol):
    features, labels = clusters()
    found = classify(protocol, features, 10 * labels + 5, features)
    assert set(found.tolist()) <= {5, 15, 25}


def test_an_unknown_protocol_is_refused():
    x = np.eye(3)
    with pytest.raises(ValueError, match="protocol: expected knn or linear, got 'svm'"):
        classify("svm", x, np.arange(3), x)

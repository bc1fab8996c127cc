"""Classifiers on fixed features: nearest neighbours and logistic regression.

The functions take arrays. They need neither a run nor a framework, and take seconds.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NEIGHBOURS",
    "PROTOCOLS",
    "TEMPERATURE",
    "accuracy",
    "classify",
    "logistic_regression",
    "nearest_neighbours",
]

PROTOCOLS = ("knn", "linear")
NEIGHBOURS = 20
TEMPERATURE = 0.07


def nearest_neighbours(
    train_features: NDArray[np.floating[Any]],
    train_labels: NDArray[Any],
    test_features: NDArray[np.floating[Any]],
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> NDArray[Any]:
    """Classify by weighted k-nearest neighbours, with cosine similarity.

    A neighbour's vote has the weight exp(cosine / temperature).

    Parameters
    ----------
    train_features, test_features
        float (images, dim).
    train_labels
        int (images,).
    neighbours
        Number of neighbours, at most the number of training images.
    temperature
        Positive. A smaller temperature gives the nearest neighbours more weight.

    Returns
    -------
    array
        Predicted class, int (images,).

    References
    ----------
    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978.

    Examples
    --------
    >>> x = np.float32([[1, 0], [1, 0.1], [0, 1]])
    >>> test = np.float32([[0.1, 1]])
    >>> nearest_neighbours(x, np.array([0, 0, 1]), test).tolist()  # one near, two far votes
    [1]
    """
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        # distance = 1 - cosine: the extra factor exp(-1 / temperature) is common to all votes
        votes: NDArray[np.floating[Any]] = np.exp(-distances / temperature)
        return votes

    classifier = KNeighborsClassifier(min(neighbours, len(train_features)), metric="cosine", weights=weights)
    predicted: NDArray[Any] = classifier.fit(train_features, train_labels).predict(test_features)
    return predicted


def logistic_regression(
    train_features: NDArray[np.floating[Any]],
    train_labels: NDArray[Any],
    test_features: NDArray[np.floating[Any]],
    *,
    max_iterations: int = 300,
) -> NDArray[Any]:
    """Classify by logistic regression, fitted with L-BFGS.

    Features are standardized over the training images. The classifier is scikit-learn's `LogisticRegression` with
    default options (L2 penalty, C = 1).

    Parameters
    ----------
    train_features, test_features
        float (images, dim).
    train_labels
        int (images,), of at least two classes.
    max_iterations
        Maximum number of iterations. Full convergence is slow for wide features, and hardly changes the predictions.

    Returns
    -------
    array
        Predicted class, int (images,).

    Examples
    --------
    >>> x, y = np.float32([[0, 1], [1, 0], [0, 2], [3, 0]]), np.array([0, 1, 0, 1])
    >>> logistic_regression(x, y, np.float32([[0, 3], [2, 0]])).tolist()
    [0, 1]
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_features, train_labels)
    predicted: NDArray[Any] = classifier.predict(test_features)
    return predicted


def classify(
    protocol: str,
    train_features: NDArray[np.floating[Any]],
    train_labels: NDArray[Any],
    test_features: NDArray[np.floating[Any]],
) -> NDArray[Any]:
    """Train a classifier on fixed features, and predict the test classes.

    Parameters
    ----------
    protocol
        `knn` (`nearest_neighbours`) or `linear` (`logistic_regression`).
    train_features, test_features
        float (images, dim).
    train_labels
        int (images,).

    Returns
    -------
    array
        Predicted class, int (images,).

    Raises
    ------
    ValueError
        If the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
    classifier = nearest_neighbours if protocol == "knn" else logistic_regression
    return classifier(train_features, train_labels, test_features)


def accuracy(
    protocol: str,
    train_features: NDArray[np.floating[Any]],
    train_labels: NDArray[Any],
    test_features: NDArray[np.floating[Any]],
    test_labels: NDArray[Any],
) -> float:
    """Accuracy of a classifier on fixed features.

    Parameters
    ----------
    protocol, train_features, train_labels, test_features
        As for `classify`.
    test_labels
        int (images,).

    Returns
    -------
    float
        Accuracy in [0, 1].

    Examples
    --------
    >>> x = np.float32([[0, 1], [1, 0], [0, 2], [3, 0], [0, 1], [1, 0]])
    >>> y = np.array([0, 1, 0, 1, 0, 1])
    >>> accuracy("linear", x, y, x, y)
    1.0
    """
    return float(np.mean(classify(protocol, train_features, train_labels, test_features) == test_labels))

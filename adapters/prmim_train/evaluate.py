"""How good are the frozen features?  Nearest neighbours and a linear classifier, on images never trained on."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_train.config import PretrainConfig
from prmim_train.data import evaluation_batches
from prmim_train.engine import Engine, create_engine
from prmim_train.prepare import RunData, open_data, read_run_config, restore_engine
from prmim_train.processes import is_main, on_main
from prmim_train.run_directory import RunDirectory, write_atomically

PROTOCOLS = ("knn", "linear")
NEIGHBOURS = 5
LARGEST_PIXEL_SIDE = 32
PROTOCOL_TITLES = {"knn": f"{NEIGHBOURS} nearest neighbours", "linear": "linear"}
FEATURE_TITLES = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
T = TypeVar("T")
Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Sides = tuple[dict[str, NDArray[np.float32]], NDArray[Any]]


def evaluate_run(
    config: PretrainConfig, data: RunData, engine: Engine, protocols: Sequence[str] = PROTOCOLS
) -> dict[str, Any]:
    """Classify held-out images by frozen features: the trained encoder's, an untrained one's, and raw pixels.

    Parameters
    ----------
    config
        The options of the run; at most `config.eval_limit` images are used on either side.
    data
        Its images: the classifier learns from those trained on, and is judged on those held out.
    engine
        The trained engine.
    protocols
        Some of `PROTOCOLS`.

    Returns
    -------
    dict
        Accuracies in [0, 1] by features and protocol, and on what they were measured; or `{"skipped": reason}` where
        that cannot be done: no labels, nothing held out, too many unreadable images. Of several processes the main one
        alone classifies; in the others the dictionary is empty.

    Notes
    -----
    `knn` is a vote of 5 nearest neighbours by cosine; `linear` is logistic regression with scikit-learn's defaults on
    features standardised over the training images.  Raw pixels are shrunk to at most 32 x 32.  The untrained encoder
    begins from the same seed, random even where the run began with given weights.
    """
    reason = _why_not(data)
    if reason:
        return {"skipped": reason}
    with closing(create_engine(config, data.budget)) as untrained:
        extractors = {"trained": engine.features, "untrained": untrained.features, "pixels": shrunken_pixels}
        try:
            train = _extract(config, data, _spread(data.train, config.eval_limit), extractors)
            test = _extract(config, data, _spread(data.held_out, config.eval_limit), extractors)
        except ValueError as error:  # unreadable images: hours of training must not end without a summary for that
            return {"skipped": str(error)}
    return on_main(engine, lambda: _classify(train, test, protocols)) or {}


def _classify(train: Sides, test: Sides, protocols: Sequence[str]) -> dict[str, Any]:
    """Learn from some features, judge on others; both are by the name of the extractor, with labels."""
    train_features, train_labels = train
    test_features, test_labels = test
    if len(np.unique(train_labels)) < 2:
        return {"skipped": "the training images are all of one class"}
    result: dict[str, Any] = {
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "classes": len(np.unique(train_labels)),
        "most_frequent_class": _most_frequent_share(train_labels, test_labels),
    }
    for name in _progress(train_features, len(train_features), "classifiers"):
        sides = (train_features[name], train_labels, test_features[name], test_labels)
        result[name] = {protocol: accuracy(protocol, *sides) for protocol in protocols}
    return result


def evaluate_command(
    run: str,
    *,
    data: str | None = None,
    holdout: float | None = None,
    device: str | None = None,
    protocol: str | None = None,
    eval_limit: int | None = None,
) -> None:
    """Evaluate the last checkpoint of a run, print a table, and write `evaluation.json` into its folder.

    Parameters
    ----------
    run
        The run's folder.
    data, holdout, device, eval_limit
        In place of the run's own options.
    protocol
        One of `PROTOCOLS`; None is all of them.

    Raises
    ------
    ValueError
        If the protocol is unknown, or the images have no labels.
    FileNotFoundError
        If there is no run, or no checkpoint yet.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
    directory = RunDirectory.open(Path(run))
    config = read_run_config(directory, data=data, holdout=holdout, device=device, eval_limit=eval_limit)
    if config.eval_limit == 0:
        raise ValueError("eval_limit: expected at least 1 image to evaluate on, got 0")
    images = open_data(config)
    reason = _why_not(images)
    if reason:
        raise ValueError(f"data: expected labelled images, some of them held out, but {reason}")
    with closing(restore_engine(directory, config, images.budget)) as engine:
        result = evaluate_run(config, images, engine, PROTOCOLS if protocol is None else (protocol,))
        step = engine.step
    if "skipped" in result:
        raise ValueError(result["skipped"])
    print(f"{images.source.description}; checkpoint of step {step}")
    print(format_evaluation(result))
    place = directory.path / "evaluation.json"
    record = {"data": images.source.description, "step": step, **result}
    write_atomically(place, (json.dumps(record, indent=2) + "\n").encode())
    print(f"Written: {place}")


def accuracy(
    protocol: str,
    train_features: NDArray[np.float32],
    train_labels: NDArray[Any],
    test_features: NDArray[np.float32],
    test_labels: NDArray[Any],
) -> float:
    """Return the share of test images that a simple classifier on fixed features gets right.

    Parameters
    ----------
    protocol
        `knn` or `linear`.
    train_features, test_features
        float (images, dim).
    train_labels, test_labels
        int (images,).

    Returns
    -------
    float
        Accuracy in [0, 1].

    Raises
    ------
    ValueError
        If the protocol is unknown.

    Examples
    --------
    >>> x, y = np.float32([[0, 1], [1, 0], [0, 2], [3, 0], [0, 1], [1, 0]]), np.array([0, 1, 0, 1, 0, 1])
    >>> accuracy("linear", x, y, x, y)
    1.0
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if protocol == "knn":
        classifier = KNeighborsClassifier(min(NEIGHBOURS, len(train_features)), metric="cosine")
    elif protocol == "linear":
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    else:
        raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
    with warnings.catch_warnings():
        # The last digits of the weights do not matter here, and wide features take long to settle them.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_features, train_labels)
    return float(np.mean(classifier.predict(test_features) == test_labels))


def shrunken_pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the pixels of images as features, shrunk by whole factors to at most 32 along each axis.

    Parameters
    ----------
    images
        uint8 (batch, height, width, channels).

    Returns
    -------
    array
        float32 (batch, values) in [0, 1].

    Examples
    --------
    >>> shrunken_pixels(np.zeros((2, 64, 48, 3), dtype=np.uint8)).shape  # blocks of 2 x 2
    (2, 2304)
    """
    batch, height, width, channels = images.shape
    rows, columns = -(-height // LARGEST_PIXEL_SIDE), -(-width // LARGEST_PIXEL_SIDE)
    cut = images[:, : height // rows * rows, : width // columns * columns].astype(np.float32) / 255
    blocks = cut.reshape(batch, height // rows, rows, width // columns, columns, channels)
    means: NDArray[np.float32] = blocks.mean(axis=(2, 4)).reshape(batch, -1)
    return means


def format_evaluation(result: Mapping[str, Any]) -> str:
    """Write an evaluation as a small table.

    Examples
    --------
    >>> numbers = {"train_images": 90, "test_images": 10, "classes": 2, "most_frequent_class": 0.5}
    >>> print(format_evaluation({**numbers, "trained": {"knn": 0.9}, "pixels": {"knn": 0.75}}))
    Accuracy on 10 held-out images of 2 classes, frozen features, classifier from 90 images:
                             5 nearest neighbours
      trained encoder                      90.0 %
      raw pixels                           75.0 %
      most frequent class                  50.0 %
    """
    if "skipped" in result:
        return f"No evaluation: {result['skipped']}."
    rows = {FEATURE_TITLES[name]: result[name] for name in FEATURE_TITLES if name in result}
    protocols = list(next(iter(rows.values())))
    titles = [PROTOCOL_TITLES[protocol] for protocol in protocols]
    rows["most frequent class"] = dict.fromkeys(protocols, result["most_frequent_class"])
    lines = [
        f"Accuracy on {result['test_images']} held-out images of {result['classes']} classes, frozen features, "
        f"classifier from {result['train_images']} images:",
        " " * 23 + "".join(f"{title:>{len(title) + 2}}" for title in titles),
    ]
    for name, values in rows.items():
        cells = (f"{100 * values[p]:.1f} %".rjust(len(title) + 2) for p, title in zip(protocols, titles, strict=True))
        lines.append(f"  {name:<21}" + "".join(cells))
    return "\n".join(lines)


def _why_not(data: RunData) -> str:
    """Say why there is nothing to evaluate on; empty if there is."""
    if data.source.labels is None:
        return "the images have no labels"
    return "" if len(data.held_out) else "no images are held out (holdout is 0)"


def _extract(
    config: PretrainConfig, data: RunData, indices: NDArray[np.int64], extractors: Mapping[str, Extractor]
) -> Sides:
    """Return the features of some images, by the name of the extractor, and their labels."""
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in extractors}
    labels = []
    size = min(256, config.micro_batch)
    with evaluation_batches(data.source, indices, batch_size=size, image_size=config.image_plane) as batches:
        for batch in _progress(batches, -(-len(indices) // size), "features"):
            labels.append(np.asarray(batch.labels))
            for name, extract in extractors.items():
                features[name].append(extract(batch.images))
    return {name: np.concatenate(parts) for name, parts in features.items()}, np.concatenate(labels)


def _progress(things: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show how far a loop is, where the output is a terminal."""
    disable = None if is_main() else True
    bar: Iterable[T] = tqdm(things, total=total, desc=f"evaluation, {what}", disable=disable, leave=False)
    return bar


def _spread(indices: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Take at most `limit` of some numbers, spread evenly: a source may be sorted by class."""
    count = min(limit, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]


def _most_frequent_share(train_labels: NDArray[Any], test_labels: NDArray[Any]) -> float:
    values, counts = np.unique(train_labels, return_counts=True)
    return float(np.mean(test_labels == values[np.argmax(counts)]))

"""How good are the frozen features?  Nearest neighbours and a linear classifier, on images never trained on.

The classifiers that are trained by steps, as the published recipes do, are in `prmim_train.classify`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_train.config import PretrainConfig
from prmim_train.data import evaluation_batches
from prmim_train.engine import Engine, check_launcher, create_engine
from prmim_train.frozen import NEIGHBOURS, PROTOCOLS, TEMPERATURE, accuracy, classify
from prmim_train.prepare import (
    LabelledImages,
    RunData,
    labelled_sides,
    open_data,
    read_run_config,
    restore_engine,
    why_not,
)
from prmim_train.processes import is_main, on_main
from prmim_train.run_directory import RunDirectory, write_atomically
from prmim_train.score_pictures import draw_confusion
from prmim_train.scores import format_score, score

__all__ = [
    "accuracy",
    "classify",
    "evaluate_command",
    "evaluate_run",
    "format_evaluation",
    "probe_run",
    "shrunken_pixels",
]

LARGEST_PIXEL_SIDE = 32
PROTOCOL_TITLES = {"knn": f"{NEIGHBOURS} nearest neighbours", "linear": "linear"}
FEATURE_TITLES = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
T = TypeVar("T")
Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Sides = tuple[dict[str, NDArray[np.float32]], NDArray[Any]]


class Judged(NamedTuple):
    """What classifiers made of frozen features.

    Parameters
    ----------
    result
        What `evaluate_run` returns.
    truth
        Class of each test image, int64.
    predicted
        What the classifiers on the trained encoder took them for, by protocol.
    """

    result: dict[str, Any]
    truth: NDArray[Any]
    predicted: dict[str, NDArray[Any]]


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
    `knn` and `linear` are those of `prmim_train.frozen`.  Raw pixels are shrunk to at most 32 x 32.  The untrained
    encoder begins from the same seed, random even where the run began with given weights.
    """
    reason = why_not(data)
    if reason:
        return {"skipped": reason}
    judged = _judge(config, data, engine, labelled_sides(data), protocols, baselines=True)
    return {} if judged is None else judged.result


def probe_run(config: PretrainConfig, data: RunData, engine: Engine) -> dict[str, float]:
    """Judge the frozen features of a run that goes on, as `evaluate_run` does in the end; nothing of it changes.

    Parameters
    ----------
    config, data, engine
        As for `evaluate_run`.

    Returns
    -------
    dict
        The accuracies `probe_knn` and `probe_linear`, in [0, 1]; of several processes, in the main one alone.
    """
    extractors = {"trained": engine.features}
    train, test = (_extract(config, images, extractors) for images in labelled_sides(data))
    judged = on_main(engine, lambda: _classify(train, test, PROTOCOLS))
    found = {} if judged is None else judged.result.get("trained", {})
    return {f"probe_{protocol}": value for protocol, value in found.items()}


def _judge(
    config: PretrainConfig,
    data: RunData,
    engine: Engine,
    sides: tuple[LabelledImages, LabelledImages],
    protocols: Sequence[str],
    baselines: bool,
) -> Judged | None:
    """Extract all features and classify; None in other processes than the main one."""
    extractors: dict[str, Extractor] = {"trained": engine.features}
    with ExitStack() as stack:
        if baselines:
            untrained = stack.enter_context(closing(create_engine(config, data.budget)))
            extractors |= {"untrained": untrained.features, "pixels": shrunken_pixels}
        try:
            train, test = (_extract(config, images, extractors) for images in sides)
        except ValueError as error:  # unreadable images: hours of training must not end without a summary for that
            return Judged({"skipped": str(error)}, np.empty(0, np.int64), {})
    return on_main(engine, lambda: _classify(train, test, protocols))


def _classify(train: Sides, test: Sides, protocols: Sequence[str]) -> Judged:
    """Learn from some features, judge on others; both are by the name of the extractor, with labels."""
    train_features, train_labels = train
    test_features, test_labels = test
    if len(np.unique(train_labels)) < 2:
        return Judged({"skipped": "the training images are all of one class"}, test_labels, {})
    result: dict[str, Any] = {
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "classes": len(np.unique(train_labels)),
        "most_frequent_class": _most_frequent_share(train_labels, test_labels),
    }
    predicted: dict[str, NDArray[Any]] = {}
    for name in _progress(train_features, len(train_features), "classifiers"):
        sides = (train_features[name], train_labels, test_features[name])
        found = {protocol: classify(protocol, *sides) for protocol in protocols}
        result[name] = {protocol: float(np.mean(found[protocol] == test_labels)) for protocol in protocols}
        if name == "trained":
            predicted = found
    return Judged(result, test_labels, predicted)


def evaluate_command(
    run: str,
    *,
    data: str | None = None,
    holdout: float | None = None,
    test_data: str | None = None,
    device: str | None = None,
    checkpoint: int | None = None,
    protocol: str | None = None,
    eval_limit: int | None = None,
    baselines: bool = True,
) -> None:
    """Evaluate the frozen features of a checkpoint of a run.

    Prints a table, and writes `evaluation.json` and pictures of who is taken for whom into the run's folder.

    Parameters
    ----------
    run
        The run's folder.
    data, holdout, device, eval_limit
        In place of the run's own options.
    test_data
        Other images to test on than the held-out ones: all of this source.
    checkpoint
        Step of the checkpoint; None: the last one that is whole.
    protocol
        One of `PROTOCOLS`; None is all of them.
    baselines
        Whether to judge an untrained encoder and raw pixels too, for comparison.

    Raises
    ------
    ValueError
        If the protocol is unknown, or the images have no labels, or other classes in the test data.
    FileNotFoundError
        If there is no run, or no checkpoint yet.
    """
    directory = RunDirectory.open(Path(run))
    config = read_run_config(directory, data=data, holdout=holdout, device=device, eval_limit=eval_limit)
    if config.eval_limit == 0:
        raise ValueError("eval_limit: expected at least 1 image to evaluate on, got 0")
    images = open_data(config)
    sides = labelled_sides(images, test_data)
    with closing(restore_engine(directory, config, images.budget, checkpoint)) as engine:
        check_launcher(config.backend, engine)
        protocols = PROTOCOLS if protocol is None else (protocol,)
        judged = _judge(config, images, engine, sides, protocols, baselines)
        if judged is not None and "skipped" in judged.result:
            raise ValueError("data: " + judged.result["skipped"].removeprefix("data: "))
        tested = sides[1].source.description
        on_main(engine, lambda: _report(directory, images.source.description, tested, engine.step, judged, sides[1]))


def _report(
    run: RunDirectory, data: str, test_data: str, step: int, judged: Judged | None, test: LabelledImages
) -> None:
    """Print and write what classifiers made of frozen features."""
    assert judged is not None
    print(f"{data}; checkpoint of step {step}")
    if test_data != data:
        print(f"tested on {test_data}")
    print(format_evaluation(judged.result))
    names = test.class_names
    scores = {name: score(judged.truth, predicted, names) for name, predicted in judged.predicted.items()}
    for name, found in scores.items():
        print(f"Trained encoder, {PROTOCOL_TITLES[name]}: {format_score(found)}")
        picture = run.path / "evaluation" / f"confusion_{name}.png"
        picture.parent.mkdir(exist_ok=True)
        title = f"{PROTOCOL_TITLES[name]}, frozen features"
        if draw_confusion(picture, judged.truth, judged.predicted[name], names, title):
            print(f"Picture: {picture}")
    options: dict[str, dict[str, Any]] = {
        "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
        "linear": {"solver": "lbfgs"},
    }
    protocols = {name: {**options[name], **found} for name, found in scores.items()}
    record = {"data": data, "test_data": test_data, "step": step, **judged.result, "protocols": protocols}
    place = run.path / "evaluation.json"
    write_atomically(place, (json.dumps(record, indent=2) + "\n").encode())
    print(f"Written: {place}")


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
                             20 nearest neighbours
      trained encoder                       90.0 %
      raw pixels                            75.0 %
      most frequent class                   50.0 %
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


def _extract(config: PretrainConfig, images: LabelledImages, extractors: Mapping[str, Extractor]) -> Sides:
    """Return the features of some images, by the name of the extractor, and their labels."""
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in extractors}
    labels = []
    size = min(256, config.micro_batch)
    indices = _spread(images.indices, config.eval_limit)
    with evaluation_batches(images.source, indices, batch_size=size, image_size=config.image_plane) as batches:
        for batch in _progress(batches, -(-len(indices) // size), "features"):
            labels.append(images.labels[batch.index])
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

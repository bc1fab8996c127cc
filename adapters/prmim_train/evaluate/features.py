"""Evaluation of frozen features: nearest neighbours and a linear classifier.

Fine-tuning and linear probing with LARS, as in the published recipes, are in `prmim_train.evaluate.classifier`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_methods.encoder import times
from prmim_methods.files import expanded
from prmim_methods.weight_files import WEIGHTS_FILE
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.batches import evaluation_batches
from prmim_train.data.depth import in_8_bit_range
from prmim_train.evaluate.frozen import NEIGHBOURS, PROTOCOLS, TEMPERATURE, classify
from prmim_train.evaluate.score_pictures import draw_confusion
from prmim_train.evaluate.scores import format_score, score, write_predictions
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import EncoderEngine, Engine, check_launcher, create_encoder_engine
from prmim_train.run.files import write_json
from prmim_train.run.manifest import step_of
from prmim_train.run.origin import read_trained
from prmim_train.run.prepare import (
    LabelledImages,
    RunData,
    check_frames,
    find_checkpoint,
    labelled_sides,
    open_run_data,
    read_run_config,
    why_not,
)
from prmim_train.run.processes import is_main, on_main, say

__all__ = ["evaluate_command", "evaluate_run", "format_evaluation", "probe_run", "shrunken_pixels"]

LARGEST_PIXEL_SIDE = 32
PROTOCOL_TITLES = {"knn": f"{NEIGHBOURS} nearest neighbours", "linear": "linear"}
FEATURE_TITLES = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
T = TypeVar("T")
Extractor = Callable[[NDArray[Any]], NDArray[np.float32]]
Features = tuple[dict[str, NDArray[np.float32]], NDArray[Any]]


class Evaluation(NamedTuple):
    """Accuracies of frozen features, and the predictions behind them.

    Parameters
    ----------
    result
        Return value of `evaluate_run`.
    truth
        True class of each test image, int64.
    predicted
        Classes predicted from features of the trained encoder, by protocol.
    """

    result: dict[str, Any]
    truth: NDArray[Any]
    predicted: dict[str, NDArray[Any]]


def evaluate_run(
    config: PretrainConfig, data: RunData, engine: Engine, protocols: Sequence[str] = PROTOCOLS
) -> dict[str, Any]:
    """Classify held-out images by frozen features.

    The features are those of the trained encoder, an untrained encoder, and raw pixels.

    Parameters
    ----------
    config
        Options of the run. Uses at most `config.eval_limit` images for training and for testing.
    data
        Images of the run. Classifiers train on the training images and are tested on the held-out images.
    engine
        The trained engine.
    protocols
        Subset of `PROTOCOLS`.

    Returns
    -------
    dict
        Accuracies in [0, 1] by features and protocol, with numbers of images and classes. `{"skipped": reason}` if
        there are no labels, no held-out images, or too many unreadable images. Empty in all but the main process.

    Notes
    -----
    `prmim_train.evaluate.frozen` defines `knn` and `linear`. Raw pixels are shrunk to at most 32 x 32. The untrained
    encoder has random weights of the same seed, even if the run started from given weights.
    """
    reason = why_not(data)
    if reason:
        return {"skipped": reason}
    evaluation = _evaluate(config, data, engine, labelled_sides(data), protocols, baselines=True)
    return {} if evaluation is None else evaluation.result


def probe_run(config: PretrainConfig, data: RunData, engine: Engine) -> dict[str, float]:
    """Evaluate frozen features during training. Does not modify the run.

    Parameters
    ----------
    config, data, engine
        As for `evaluate_run`.

    Returns
    -------
    dict
        Accuracies `probe_knn` and `probe_linear`, in [0, 1]. Empty in all but the main process.
    """
    extractors = {"trained": engine.features}
    train, test = (_extract(config, images, extractors) for images in labelled_sides(data))
    evaluation = on_main(engine, lambda: _classify(train, test, PROTOCOLS))
    accuracies = {} if evaluation is None else evaluation.result.get("trained", {})
    return {f"probe_{protocol}": accuracy for protocol, accuracy in accuracies.items()}


def _evaluate(
    config: PretrainConfig,
    data: RunData,
    engine: Engine | EncoderEngine,
    sides: tuple[LabelledImages, LabelledImages],
    protocols: Sequence[str],
    baselines: bool,
    image_size: tuple[int, ...] | None = None,
) -> Evaluation | None:
    """Extract features and classify them. Returns None in all but the main process."""
    extractors: dict[str, Extractor] = {"trained": engine.features}
    with ExitStack() as stack:
        if baselines:
            untrained = stack.enter_context(closing(_create_engine(config, None, image_size)))
            extractors |= {
                "untrained": untrained.features,
                "pixels": lambda images: shrunken_pixels(in_8_bit_range(images, config.method.pixel_range)),
            }
        try:
            train, test = (_extract(config, images, extractors, image_size) for images in sides)
        except ValueError as error:  # unreadable images must not cost the user the summary of a long training
            return Evaluation({"skipped": str(error)}, np.empty(0, np.int64), {})
    return on_main(engine, lambda: _classify(train, test, protocols))


def _create_engine(config: PretrainConfig, weights: Path | None, image_size: tuple[int, ...] | None) -> EncoderEngine:
    return create_encoder_engine(
        config.method,
        backend=config.backend,
        device=config.device,
        precision=config.precision,
        weights=weights,
        image_size=image_size,
    )


def _classify(train: Features, test: Features, protocols: Sequence[str]) -> Evaluation:
    """Train and test the classifiers on each kind of features."""
    train_features, train_labels = train
    test_features, test_labels = test
    if len(np.unique(train_labels)) < 2:
        return Evaluation({"skipped": "the training images are all of one class"}, test_labels, {})
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
    return Evaluation(result, test_labels, predicted)


def evaluate_command(
    run: str,
    *,
    test_data: str | None = None,
    checkpoint: int | None = None,
    protocol: str | None = None,
    baselines: bool = True,
    allow_changes: bool = False,
    image_size: tuple[int, ...] | None = None,
    **options: Any,
) -> None:
    """Evaluate the frozen features of a checkpoint.

    Prints a table, and writes `evaluation.json` and confusion matrices into the run directory.

    Parameters
    ----------
    run
        Folder of the run.
    test_data
        Source of the test images. None: the held-out images.
    checkpoint
        Step of the checkpoint. None: the newest good checkpoint.
    protocol
        One of `PROTOCOLS`. None: all of them.
    baselines
        Whether to evaluate an untrained encoder and raw pixels for comparison.
    allow_changes
        See `prmim_train.run.prepare.open_run_data`.
    image_size
        Size of the images in pixels, in place of that of the run.
    **options
        Options that replace those of the run.

    Raises
    ------
    ValueError
        If the protocol is unknown, the patches do not divide the images, there are no labels, or the classes of the
        test data differ.
    FileNotFoundError
        If there is no run or no checkpoint.
    """
    directory = RunDirectory.open(expanded(run))
    config = read_run_config(directory, **options)
    if config.eval_limit == 0:
        raise ValueError("eval_limit: expected at least 1 image to evaluate on, got 0")
    check_frames(config.method, image_size)
    size = config.method.encoder_config(image_size).image_size
    images = open_run_data(directory, config, allow_changes=allow_changes)
    sides = labelled_sides(images, test_data, read_trained(directory))
    found = find_checkpoint(directory, checkpoint)
    with closing(_create_engine(config, found / WEIGHTS_FILE, size)) as engine:
        check_launcher(config.backend, engine)
        protocols = PROTOCOLS if protocol is None else (protocol,)
        evaluation = _evaluate(config, images, engine, sides, protocols, baselines, size)
        report = partial(_report, directory, images.source.description, step_of(found), size)
        on_main(engine, lambda: report(evaluation, sides[1]))


def _report(
    run: RunDirectory,
    data: str,
    step: int,
    size: tuple[int, ...],
    evaluation: Evaluation | None,
    test: LabelledImages,
) -> None:
    """Print and write the evaluation; raise ValueError if there is none."""
    assert evaluation is not None
    if "skipped" in evaluation.result:
        raise ValueError("data: " + evaluation.result["skipped"].removeprefix("data: "))
    result, truth, predicted = evaluation
    names, test_data = test.class_names, test.source.description
    print(f"{data}; checkpoint of step {step}")
    print(f"image size: {times(size)} pixels")
    if test_data != data:
        print(f"tested on {test_data}")
    print(format_evaluation(result))
    scores = {name: score(truth, predicted[name], names) for name in predicted}
    for name, found in scores.items():
        print(f"Trained encoder, {PROTOCOL_TITLES[name]}: {format_score(found)}")
        picture = run.path / "evaluation" / f"confusion_{name}.png"
        picture.parent.mkdir(exist_ok=True)
        title = f"{PROTOCOL_TITLES[name]}, frozen features"
        if draw_confusion(picture, truth, predicted[name], names, title):
            print(f"Picture: {picture}")
    options: dict[str, dict[str, Any]] = {
        "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
        "linear": {"solver": "lbfgs"},
    }
    protocols = {name: {**options[name], **found} for name, found in scores.items()}
    record = {"data": data, "test_data": test_data, "step": step, "image_size": size, **result, "protocols": protocols}
    write_predictions(run.path / "evaluation" / "predictions.npz", truth, predicted)
    write_json(run.path / "evaluation.json", record)
    print(f"Written: {run.path / 'evaluation.json'}")


def shrunken_pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels as features, shrunk by integer factors to at most 32 along each axis.

    Parameters
    ----------
    images
        (batch, [frames,] height, width, channels), values from 0 to 255.

    Returns
    -------
    array
        float32 (batch, values) in [0, 1].

    Examples
    --------
    >>> shrunken_pixels(np.zeros((2, 64, 48, 3), dtype=np.uint8)).shape  # blocks of 2 x 2
    (2, 2304)
    >>> shrunken_pixels(np.zeros((2, 16, 64, 64, 1), dtype=np.uint8)).shape
    (2, 16384)
    """
    batch, *lengths, channels = images.shape
    factors = [-(-length // LARGEST_PIXEL_SIDE) for length in lengths]
    counts = [length // factor for length, factor in zip(lengths, factors, strict=True)]
    kept = tuple(slice(count * factor) for count, factor in zip(counts, factors, strict=True))
    split = [size for pair in zip(counts, factors, strict=True) for size in pair]
    blocks = (images[:, *kept].astype(np.float32) / 255).reshape(batch, *split, channels)
    means: NDArray[np.float32] = blocks.mean(axis=tuple(range(2, 2 * len(lengths) + 1, 2))).reshape(batch, -1)
    return means


def format_evaluation(result: Mapping[str, Any]) -> str:
    """Format an evaluation as a table.

    Examples
    --------
    >>> numbers = {"train_images": 90, "test_images": 10, "classes": 2, "most_frequent_class": 0.5}
    >>> print(format_evaluation({**numbers, "trained": {"knn": 0.9}, "pixels": {"knn": 0.75}}))
    Accuracy on 10 held-out images of 2 classes, frozen features, classifier from 90 images:
                             20 nearest neighbours
      trained encoder                       90.0 %
      raw pixels                            75.0 %
      most frequent class                   50.0 %
    >>> ahead = {**numbers, "trained": {"knn": 0.9}, "pixels": {"knn": 0.95}}
    >>> print(format_evaluation(ahead).splitlines()[-1])
    Raw pixels lead by 20 nearest neighbours: images that are small, centred and similar are easy to compare by pixels.
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
    pixels, trained = result.get("pixels", {}), result.get("trained", {})
    led = [PROTOCOL_TITLES[protocol] for protocol in protocols if pixels.get(protocol, 0) > trained.get(protocol, 1)]
    if led:
        reason = "images that are small, centred and similar are easy to compare by pixels"
        lines.append(f"Raw pixels lead by {' and '.join(led)}: {reason}.")
    return "\n".join(lines)


def _extract(
    config: PretrainConfig,
    images: LabelledImages,
    extractors: Mapping[str, Extractor],
    image_size: tuple[int, ...] | None = None,
) -> Features:
    """Extract the features of each extractor by name, and the labels."""
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in extractors}
    labels = []
    size = config.evaluation_batch
    indices = _spread(images.indices, config.eval_limit)
    shape = image_size or config.method.image_size
    with evaluation_batches(images.source, indices, batch_size=size, image_size=shape) as batches:
        for batch in _progress(batches, -(-len(indices) // size), "features"):
            labels.append(images.labels[batch.index])
            for name, extract in extractors.items():
                features[name].append(extract(batch.images))
        if len(batches.unreadable):
            say(batches.unreadable.report())
    return {name: np.concatenate(parts) for name, parts in features.items()}, np.concatenate(labels)


def _progress(things: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show a progress bar, if the output is a terminal."""
    disable = None if is_main() else True
    bar: Iterable[T] = tqdm(things, total=total, desc=f"evaluation, {what}", disable=disable, leave=False)
    return bar


def _spread(indices: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Select at most `limit` indices, evenly spaced: a source may be sorted by class."""
    count = min(limit, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]


def _most_frequent_share(train_labels: NDArray[Any], test_labels: NDArray[Any]) -> float:
    values, counts = np.unique(train_labels, return_counts=True)
    return float(np.mean(test_labels == values[np.argmax(counts)]))

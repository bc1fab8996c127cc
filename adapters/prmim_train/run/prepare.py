"""Inputs of the commands: images, stored options and restored engines of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from prmim_methods.encoder import EncoderOptions, times
from prmim_methods.files import open_regular
from prmim_methods.messages import one_line
from prmim_methods.weight_files import WEIGHTS_FILE, read_architecture
from prmim_train.config.pretrain import PretrainConfig, pretrain_config, pretrain_option_names
from prmim_train.config.training import DIGITS, OF_DATA, SourceOptions, is_same_data
from prmim_train.data.batches import Batch, BatchIterator, split_indices, train_batches
from prmim_train.data.identity import Identities
from prmim_train.data.names import UNLABELLED
from prmim_train.data.sources import ImageSource, open_source
from prmim_train.data.statistics import measure_images
from prmim_train.run.budget import Budget, training_budget
from prmim_train.run.directory import CHECKPOINTS, CONFIG, RunDirectory
from prmim_train.run.engine import Engine, create_engine
from prmim_train.run.manifest import step_of
from prmim_train.run.origin import check_origin, is_trained_on, read_trained, run_origin
from prmim_train.run.processes import say

_NUM_NAMED = 8
_NUM_MEASURED = 256


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Parameters
    ----------
    source
        Source of the images.
    train, held_out
        Indices of the training images and of the held-out images, int64, sorted.
    budget
        Length of the run.
    options
        Options that select the images of the source.
    """

    source: ImageSource
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    budget: Budget
    options: SourceOptions


class LabelledImages(NamedTuple):
    """A labelled subset of a source.

    Parameters
    ----------
    source
        Source of the images.
    indices
        Indices of the subset, int64.
    labels
        Class of every image of the source, int64.
    class_names
        Name of every class.
    """

    source: ImageSource
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def open_data(config: PretrainConfig) -> RunData:
    """Open the images of a run, and split them into training and held-out images.

    Parameters
    ----------
    config
        Options of the run.

    Returns
    -------
    RunData

    Raises
    ------
    ValueError, OSError
        If there are no images, or no training images.
    """
    source = _open_source(config, keep_depth=config.method.pixel_range is not None)
    split_by = len(source) if source.labels is None else source.labels
    train, held_out = split_indices(split_by, holdout=config.holdout, seed=config.seed)
    return RunData(source, train, held_out, training_budget(config, len(train)), config)


def training_batches(config: PretrainConfig, data: RunData, **stream: Any) -> BatchIterator[Batch]:
    """Iterate over random crops of the training images of a run.

    Parameters
    ----------
    config
        Options of the run: seed, size, crops and flips.
    data
        Its images.
    **stream
        Arguments of `train_batches` on the part of the stream: `batch_size`, `start_step`, `total_steps`, `workers`,
        `rank` and `world_size`. The images and their order do not depend on them.
    """
    return train_batches(
        data.source,
        indices=data.train,
        image_size=config.method.image_size,
        seed=config.seed,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        crop_draw=config.crop_draw,
        crop_padding=config.crop_padding,
        flip=config.flip,
        **stream,
    )


def measured_range(config: PretrainConfig) -> tuple[float, float]:
    """Measure the range of the pixel values on a sample of the images of a run.

    Raises
    ------
    ValueError, OSError
        As `open_data`, or if all pixels have one value.
    """
    return measure_images(_open_source(config, keep_depth=True), _NUM_MEASURED).pixel_range()


def _open_source(config: PretrainConfig, *, keep_depth: bool) -> ImageSource:
    return open_source(
        config.data,
        channels=config.method.channels,
        max_pixels=config.max_pixels,
        three_axes=config.three_axes,
        keep_depth=keep_depth,
        options=config,
    )


def open_run_data(run: RunDirectory, config: PretrainConfig, *, allow_changes: bool = False) -> RunData:
    """Open the images of a run, or other images to evaluate it on.

    Images of its training are never held out.

    Parameters
    ----------
    run
        The run.
    config
        Its options, possibly with other `data`, `holdout` and `OF_DATA`.
    allow_changes
        Whether the images may differ from the recorded ones although the options are equal.

    Raises
    ------
    ValueError, OSError
        As `open_data`, or if the images are not those of the run.
    """
    data = open_data(config)
    stored = read_run_config(run)
    ours, theirs = ([getattr(options, name) for name in (*OF_DATA, "holdout")] for options in (config, stored))
    if is_same_data(config.data, stored.data) and ours == theirs:
        check_origin(run, run_origin(config, data.source, data.train), allow_changes)
    return leave_out_trained(data, run)


def leave_out_trained(data: RunData, run: RunDirectory) -> RunData:
    """Remove a run's training images from the held-out images.

    Prints their number. A held-out image that equals one of today's training images stays: the split was drawn with
    both.
    """
    trained = read_trained(run)
    if trained is None:
        return data
    found = data.source.identities()
    ours = is_trained_on(found.take(data.held_out), trained)
    ours &= ~is_trained_on(found.take(data.held_out), found.take(data.train))
    if ours.any():
        say(f"{ours.sum():,} of {len(ours):,} held-out images were trained on, and are left out.")
    return replace(data, held_out=data.held_out[~ours])


def why_not(data: RunData, *, needs_held_out: bool = True) -> str:
    """Explain why no classifier can be trained on the images; empty if it can."""
    if data.source.labels is None:
        return "the images have no labels"
    if needs_held_out and not len(data.held_out):
        return "no images are held out (holdout is 0, or all were trained on); set --test_data of prmim evaluate"
    names = data.source.class_names or ()
    if len(set(names)) < len(names):
        return "two classes have the same name"
    labels = data.source.labels[data.train]
    classes = np.unique(labels[labels != UNLABELLED])
    return "" if len(classes) > 1 else "the training images are all of one class"


def labelled_sides(
    data: RunData, test_data: str | None = None, trained: Identities | None = None
) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images of a classifier.

    Parameters
    ----------
    data
        Images of the pre-training run. The classifier trains on the training images.
    test_data
        Source of the test images. None: the held-out images of the run.
    trained
        Images that the encoder was trained on. Those in `test_data` are left out.

    Returns
    -------
    train, test : LabelledImages
        Both have the same classes in the same order. Images without a class are left out.

    Raises
    ------
    ValueError
        If there are no labels, no test images or fewer than two classes, or if `test_data` has other class names or
        only images of the training.
    """
    reason = why_not(data, needs_held_out=test_data is None)
    if reason:
        wanted = "labelled images" if test_data is not None else "labelled images, some of them held out"
        raise ValueError(f"data: expected {wanted}, but {reason}")
    source = data.source
    assert source.labels is not None
    assert source.class_names is not None
    names = tuple(source.class_names)
    train = _labelled(source, data.train, source.labels, names)
    if test_data is None:
        return train, _labelled(source, data.held_out, source.labels, names)
    try:
        test = open_source(
            test_data,
            channels=source.channels,
            max_pixels=source.max_pixels,
            three_axes=source.three_axes,
            keep_depth=source.depth is not None,
            options=replace(data.options, split=None),  # that of the training images
            for_test=True,
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"test_data: {str(error).removeprefix('data: ')}") from error
    if test.labels is None or test.class_names is None:
        raise ValueError(f"test_data: expected labelled images, got {test.description}")
    if sorted(test.class_names) != sorted(names):
        ours, theirs = set(names), set(test.class_names)
        lists = (("missing", sorted(ours - theirs)), ("unknown", sorted(theirs - ours)))
        differences = [f"{word}: {_listed(found)}" for word, found in lists if found]
        raise ValueError(
            f"test_data: expected the {len(names)} classes of the training images, got others in {test_data}: "
            + ("; ".join(differences) or "two classes have the same name")
        )
    number = {name: place for place, name in enumerate(names)}
    table = np.array([*(number[name] for name in test.class_names), UNLABELLED], np.int64)
    return train, _labelled(test, _untrained(test, trained), table[test.labels], names)


def _labelled(
    source: ImageSource, indices: NDArray[np.int64], labels: NDArray[np.int64], names: tuple[str, ...]
) -> LabelledImages:
    return LabelledImages(source, indices[labels[indices] != UNLABELLED], labels, names)


def _untrained(test: ImageSource, trained: Identities | None) -> NDArray[np.int64]:
    """Return the indices of the test images that were not trained on."""
    index = np.arange(len(test), dtype=np.int64)
    if trained is None:
        return index
    ours = is_trained_on(test.identities(), trained, elsewhere=True)
    if ours.all():
        raise ValueError("test_data: expected images that the run was not trained on, got none")
    if ours.any():
        say(f"{ours.sum():,} of {len(ours):,} test images were trained on, and are left out.")
    return index[~ours]


def _listed(names: Sequence[str]) -> str:
    """Join the first names."""
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")


def check_frames(method: EncoderOptions, image_size: tuple[int, ...] | None) -> None:
    """Raise ValueError if clips have another number of frames than in the run."""
    frames = method.image_size[:-2]
    if image_size is not None and len(frames) and image_size[: len(frames)] != frames:
        raise ValueError(f"image_size: expected {frames[0]} frames, as in the run, got {times(image_size)}")


def read_run_config(run: RunDirectory, **changes: Any) -> PretrainConfig:
    """Read the options of a run.

    Parameters
    ----------
    run
        The run.
    **changes
        Options to replace. If `data` is other data, `OF_DATA` are not those of the run.
    """
    options = run.read_config()
    if "protocol" in options:
        raise ValueError(f"run: expected the folder of a pre-training run, got the classifier in {run.path}")
    unknown = set(options) - pretrain_option_names()
    if unknown:
        raise ValueError(f"run: expected options of prmim pretrain in {run.path / CONFIG}, got {min(unknown)}")
    stored = options.get("data", DIGITS)
    if not is_same_data(changes.get("data", stored), stored):
        options = {name: value for name, value in options.items() if name not in OF_DATA}
    return pretrain_config(**{**options, "out": str(run.path), **changes})


def find_checkpoint(run: RunDirectory, step: int | None = None) -> Path:
    """Find the folder of a checkpoint, and check that its weights are finite.

    Parameters
    ----------
    run
        The run.
    step
        Step of the checkpoint. None: the newest good checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    OSError
        If the checkpoint is damaged, or all checkpoints are.
    ValueError
        If a weight is not finite.
    """
    checkpoint = _find_checkpoint(run, step)
    _check_finite("checkpoint", checkpoint / WEIGHTS_FILE)
    return checkpoint


def _check_finite(option: str, path: Path) -> None:
    """Raise ValueError, which names option and tensor, unless weights are finite."""
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            is_known = file.get_slice(name).get_dtype() != "BF16"  # NumPy has no bfloat16
            if is_known and not np.isfinite(file.get_tensor(name)).all():
                raise ValueError(f"{option}: expected finite weights, got NaN or infinity in {name} of {path}")


def _find_checkpoint(run: RunDirectory, step: int | None) -> Path:
    if step is None:
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(f"run: expected a checkpoint in {run.path / CHECKPOINTS}, got none")
        return checkpoint
    found = {step_of(path): path for path in run.checkpoints()}
    if step not in found:
        known = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(f"checkpoint: expected one of the steps {known} in {run.path}, got {step}")
    if reason := run.damage(found[step]):
        raise OSError(f"checkpoint: expected a good one, but {found[step]} is damaged: {reason}")
    return found[step]


def file_architecture(path: Path, checkpoint: int | None) -> dict[str, Any]:
    """Read the architecture from a file of weights, given in place of a run.

    Also checks that the weights are finite.

    Raises
    ------
    ValueError
        If prmim did not write the file, a weight is not finite, or there is a `checkpoint`, which only runs have.
    """
    if checkpoint is not None:
        raise ValueError(f"checkpoint: expected none with a file of weights, got {checkpoint}")
    try:
        open_regular(path).close()  # safe_open would wait at a pipe
        with safe_open(path, framework="numpy") as file:
            architecture = read_architecture(file.metadata(), path)
    except SafetensorError as error:
        raise ValueError(f"run: expected a run or a safetensors file, got {path} ({one_line(error)})") from None
    _check_finite("run", path)
    return architecture


def restore_engine(run: RunDirectory, config: PretrainConfig, budget: Budget, step: int | None = None) -> Engine:
    """Build the engine of a run and restore a checkpoint.

    Parameters
    ----------
    run
        The run.
    config
        Options of the run.
    budget
        Length of the run.
    step
        Step of the checkpoint; see `find_checkpoint`.

    Raises
    ------
    FileNotFoundError, OSError, ValueError
        See `find_checkpoint`.
    """
    checkpoint = find_checkpoint(run, step)
    engine = create_engine(config, budget)
    engine.restore(checkpoint)
    return engine

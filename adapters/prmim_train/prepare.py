"""What every command needs first: the images of a run, and, of a finished run, its engine."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_train.budget import Budget, training_budget
from prmim_train.config import PretrainConfig
from prmim_train.data import split_indices
from prmim_train.engine import Engine, create_engine
from prmim_train.layers import parse_options
from prmim_train.run_directory import RunDirectory, damage
from prmim_train.sources import ImageSource, open_source

_NUM_NAMED = 8


@dataclass(frozen=True)
class RunData:
    """The images of a run.

    Parameters
    ----------
    source
        All of them.
    train, held_out
        Numbers of the images to train on and of those held out, int64, sorted.
    budget
        The length of the run that follows from them.
    """

    source: ImageSource
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    budget: Budget


class LabelledImages(NamedTuple):
    """Some images of a source, with the classes of all.

    Parameters
    ----------
    source
        The source.
    indices
        Numbers of the images in use, int64.
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
    """Open the images of a run and split them.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    RunData

    Raises
    ------
    ValueError, OSError
        If there are no images, or none is left to train on.
    """
    source = open_source(config.data, channels=config.channels)
    split_by = len(source) if source.labels is None else source.labels
    train, held_out = split_indices(split_by, holdout=config.holdout, seed=config.seed)
    return RunData(source, train, held_out, training_budget(config, len(train)))


def why_not(data: RunData, *, needs_held_out: bool = True) -> str:
    """Say why no classifier can be learned and judged on some images; empty if one can."""
    if data.source.labels is None:
        return "the images have no labels"
    if needs_held_out and not len(data.held_out):
        return "no images are held out (holdout is 0)"
    names = data.source.class_names or ()
    if len(set(names)) < len(names):
        return "two classes have the same name"
    return "" if len(np.unique(data.source.labels[data.train])) > 1 else "the training images are all of one class"


def labelled_sides(data: RunData, test_data: str | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Return the images that a classifier learns from, and those that it is judged on.

    Parameters
    ----------
    data
        The images of a run: it learns from those trained on.
    test_data
        A source of which all images are tested on; None: the held-out images of the run.

    Returns
    -------
    train, test : LabelledImages
        With the same classes in the same order.

    Raises
    ------
    ValueError
        If there are no labels, nothing to test on, less than two classes, or other classes in `test_data`: classes are
        the same if their names are.
    """
    reason = why_not(data, needs_held_out=test_data is None)
    if reason:
        wanted = "labelled images" if test_data is not None else "labelled images, some of them held out"
        raise ValueError(f"data: expected {wanted}, but {reason}")
    source = data.source
    assert source.labels is not None
    assert source.class_names is not None
    names = tuple(source.class_names)
    train = LabelledImages(source, data.train, source.labels, names)
    if test_data is None:
        return train, LabelledImages(source, data.held_out, source.labels, names)
    try:
        test = open_source(test_data, channels=source.channels)
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
    table = np.array([number[name] for name in test.class_names], np.int64)
    return train, LabelledImages(test, np.arange(len(test), dtype=np.int64), table[test.labels], names)


def _listed(names: Sequence[str]) -> str:
    """Name the first few."""
    return ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")


def read_run_config(run: RunDirectory, **changes: Any) -> PretrainConfig:
    """Return the options of a run, some of them changed.

    Parameters
    ----------
    run
        The run.
    **changes
        Options in place of the run's own; those that are None are left.
    """
    options = parse_options(run.read_config(), str(run.path))
    if "protocol" in options:
        raise ValueError(f"run: expected the folder of a pre-training, got that of a classifier, {run.path}")
    unknown = set(options) - {field.name for field in fields(PretrainConfig)}
    if unknown:
        raise ValueError(f"run: expected options of prmim pretrain in {run.path / 'config.yaml'}, got {min(unknown)}")
    config = PretrainConfig(**{**options, "out": str(run.path)})
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def find_checkpoint(run: RunDirectory, step: int | None = None) -> Path:
    """Return the folder of a checkpoint of a run.

    Parameters
    ----------
    run
        The run.
    step
        Its step; None: the last one that is whole.

    Raises
    ------
    FileNotFoundError
        If there is none.
    OSError
        If it is damaged, or all are.
    """
    if step is None:
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(f"run: expected a checkpoint in {run.path / 'checkpoints'}, there is none yet")
        return checkpoint
    found = {int(path.name.removeprefix("step_")): path for path in run.checkpoints()}
    if step not in found:
        known = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(f"checkpoint: expected the step of one in {run.path}, got {step}; there are {known}")
    if reason := damage(found[step]):
        raise OSError(f"checkpoint: expected one that is whole, but {found[step]} is not: {reason}")
    return found[step]


def restore_engine(run: RunDirectory, config: PretrainConfig, budget: Budget, step: int | None = None) -> Engine:
    """Return the engine of a checkpoint of a run.

    Parameters
    ----------
    run
        The run.
    config
        Its options.
    budget
        Its length.
    step
        See `find_checkpoint`.

    Raises
    ------
    FileNotFoundError, OSError
        See `find_checkpoint`.
    """
    checkpoint = find_checkpoint(run, step)
    engine = create_engine(config, budget)
    engine.restore(checkpoint)
    return engine

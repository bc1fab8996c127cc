"""What every command needs first: the images of a run, and, of a finished run, its engine."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_train.budget import Budget, training_budget
from prmim_train.config import PretrainConfig
from prmim_train.data import split_indices
from prmim_train.engine import Engine, create_engine
from prmim_train.layers import parse_options
from prmim_train.run_directory import RunDirectory
from prmim_train.sources import ImageSource, open_source


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


def read_run_config(run: RunDirectory, **changes: Any) -> PretrainConfig:
    """Return the options of a run, some of them changed.

    Parameters
    ----------
    run
        The run.
    **changes
        Options in place of the run's own; those that are None are left.
    """
    config = PretrainConfig(**parse_options(run.read_config(), str(run.path)), out=str(run.path))
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def restore_engine(run: RunDirectory, config: PretrainConfig, budget: Budget) -> Engine:
    """Return the engine of a run's last checkpoint that is whole.

    Parameters
    ----------
    run
        The run.
    config
        Its options.
    budget
        Its length.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint yet.
    OSError
        If all of them are damaged.
    """
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise FileNotFoundError(f"run: expected a checkpoint in {run.path / 'checkpoints'}, there is none yet")
    engine = create_engine(config, budget)
    engine.restore(checkpoint)
    return engine

"""Configurations of trainings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmim_train.config.pretrain import PretrainConfig, pretrain_config
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import read_run_config

Options = Mapping[str, Any]
"""Command-line options by name."""


def config_of(options: Options) -> PretrainConfig:
    """Return the configuration of a training; options not given have their defaults."""
    return pretrain_config(**options)


def stored_config(folder: Path) -> PretrainConfig:
    """Return the configuration of the run in a folder."""
    return read_run_config(RunDirectory(folder))

"""Experiment trackers: TensorBoard, Weights & Biases and MLflow.

Trackers are optional packages, imported on demand. A resumed run continues its tracked run: TensorBoard adds a file to
the run directory; the others use the ID stored in `tracker.json`.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from prmim_train.config.packages import check_installed
from prmim_train.run.directory import RunDirectory

PROJECT = "prmim"
"""Default project or experiment of the tracked runs."""


class Tracker(Protocol):
    """Destination of metrics."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def close(self) -> None:
        """Flush pending metrics and end the session."""


def check_tracker(name: str) -> None:
    """Check that a tracker is installed, without importing it.

    Raises
    ------
    ImportError
        If its package is not installed. The message says how to install it.
    """
    if name != "none":
        check_installed("tracker", name)


def open_tracker(name: str, run: RunDirectory, options: Mapping[str, Any], step: int) -> Tracker:
    """Start or resume tracking of a run.

    Parameters
    ----------
    name
        `none`, or the package of the tracker.
    run
        The run.
    options
        Options of the run, logged as its configuration (not in TensorBoard).
    step
        Steps completed.

    Returns
    -------
    Tracker
    """
    if name == "none":
        return NoTracker()
    if name == "tensorboard":
        return TensorBoard(run.path / "tensorboard", step)
    return WeightsAndBiases(run, options) if name == "wandb" else MLflow(run, options)


class NoTracker:
    """Tracker that discards everything."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """TensorBoard event files, written by TensorBoard, without PyTorch or TensorFlow.

    Parameters
    ----------
    folder
        Folder of the event files. A resumed run adds a file.
    step
        Steps completed. TensorBoard hides later steps of earlier files.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._event = import_module("tensorboard.compat.proto.event_pb2")
        self._summary = import_module("tensorboard.compat.proto.summary_pb2")
        self._writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))
        if step:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(step + 1, session_log=start)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write an event."""
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step, summary=self._summary.Summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))


class WeightsAndBiases:
    """Tracker for Weights & Biases.

    Respects its environment variables (`WANDB_PROJECT`, `WANDB_MODE`, ...).

    Parameters
    ----------
    run
        The run. wandb keeps its files in the run directory.
    options
        Logged as the configuration.
    """

    def __init__(self, run: RunDirectory, options: Mapping[str, Any]) -> None:
        self._run = import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.name,
            dir=str(run.path),
            id=run.read_tracker("wandb"),
            resume="allow",
            config={**options},
        )
        run.write_tracker("wandb", self._run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log metrics. wandb ignores a step that it has already logged."""
        self._run.log({**numbers}, step=step)

    def close(self) -> None:
        """Upload pending metrics."""
        self._run.finish()


class MLflow:
    """Tracker for MLflow.

    Respects its environment variables (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, ...).

    Parameters
    ----------
    run
        The run.
    options
        Logged as parameters when the run starts.
    """

    def __init__(self, run: RunDirectory, options: Mapping[str, Any]) -> None:
        self._mlflow = import_module("mlflow")
        known = run.read_tracker("mlflow")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            self._mlflow.set_experiment(PROJECT)
        self._run = self._mlflow.start_run(run_id=known, run_name=run.path.name)
        if known is None:  # MLflow parameters cannot be changed later
            self._mlflow.log_params({**options})
            run.write_tracker("mlflow", self._run.info.run_id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log metrics."""
        self._mlflow.log_metrics({**numbers}, step=step)

    def close(self) -> None:
        """End the MLflow run."""
        self._mlflow.end_run()

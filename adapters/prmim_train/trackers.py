"""Where the numbers of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases or MLflow.

Each is an optional package, imported when a run asks for it.  A resumed run goes on in the same place: in the run's
folder for TensorBoard, by a name kept in `tracker.json` for the others.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from prmim_train.run_directory import RunDirectory

# By the name of a tracker: the package that it needs.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "prmim"
"""What runs are filed under, unless the environment says otherwise."""


class Tracker(Protocol):
    """Something that keeps numbers by step, and shows them."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of a step."""

    def close(self) -> None:
        """Hand over what is still on its way."""


def check_tracker(name: str) -> None:
    """Raise unless a tracker can be had, without importing it.

    Raises
    ------
    ImportError
        If its package is not installed; the message says what to install.
    """
    if name != "none" and find_spec(PACKAGES[name]) is None:
        raise ImportError(f"tracker: {name} is not installed; pip install 'prmim[{name}]'")


def open_tracker(name: str, run: RunDirectory, options: Mapping[str, Any], step: int) -> Tracker:
    """Begin to track a run, or go on with it.

    Parameters
    ----------
    name
        `none` or one of `PACKAGES`.
    run
        The run.
    options
        Its options, shown beside its numbers where the tracker can do that.
    step
        Steps done so far.

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
    """Keeps nothing."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in a folder, by TensorBoard's own writer, which needs neither PyTorch nor TensorFlow.

    Parameters
    ----------
    folder
        Where the files are; a resumed run adds one.
    step
        Steps done so far. What earlier files say of later steps is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._event = import_module("tensorboard.compat.proto.event_pb2")
        self._summary = import_module("tensorboard.compat.proto.summary_pb2")
        self._writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))
        if step:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(step + 1, session_log=start)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one event."""
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step, summary=self._summary.Summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))


class WeightsAndBiases:
    """A run of Weights & Biases; its environment variables (`WANDB_PROJECT`, `WANDB_MODE`, ...) hold.

    Parameters
    ----------
    run
        The run's folder, in which the package keeps its own.
    options
        Shown as the run's configuration.
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
        """Hand over the numbers; those of a step that was logged before are not taken a second time."""
        self._run.log({**numbers}, step=step)

    def close(self) -> None:
        """Wait until all is handed over."""
        self._run.finish()


class MLflow:
    """A run of MLflow; its environment variables (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, ...) hold.

    Parameters
    ----------
    run
        The run's folder.
    options
        Kept as parameters when the run begins.
    """

    def __init__(self, run: RunDirectory, options: Mapping[str, Any]) -> None:
        self._mlflow = import_module("mlflow")
        known = run.read_tracker("mlflow")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            self._mlflow.set_experiment(PROJECT)
        self._run = self._mlflow.start_run(run_id=known, run_name=run.path.name)
        if known is None:  # a parameter cannot be changed later
            self._mlflow.log_params({**options})
            run.write_tracker("mlflow", self._run.info.run_id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand over the numbers."""
        self._mlflow.log_metrics({**numbers}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()

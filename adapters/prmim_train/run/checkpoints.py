"""Checkpoint schedule: when to write a checkpoint, agreed by all processes."""

import time
from pathlib import Path

from prmim_train.config.training import TrainingOptions
from prmim_train.run.directory import RunDirectory, Writing
from prmim_train.run.engine import Trainer


def agreed(engine: Trainer, wish: bool, is_logged: bool) -> bool:
    """Whether any process requests an action.

    Distributed runs check only at logged steps, since it is a barrier.
    """
    return wish if engine.world_size == 1 else is_logged and engine.any(wish)


class Checkpoints:
    """Background checkpoint writer, one checkpoint at a time."""

    def __init__(self, run: RunDirectory, config: TrainingOptions, engine: Trainer) -> None:
        self.run, self.engine, self.keep = run, engine, config.keep_checkpoints
        self.minutes = config.checkpoint_minutes
        self.started = time.monotonic()
        self.writing: Writing | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writing is not None:  # after another error: wait, but report that error
            self.writing.wait()

    def are_due(self, is_logged: bool) -> bool:
        """Whether `checkpoint_minutes` have passed since the last checkpoint.

        The clock of the main process counts.
        """
        if self.minutes is None:
            return False
        is_late = self.engine.rank == 0 and time.monotonic() - self.started >= 60 * self.minutes
        return agreed(self.engine, is_late, is_logged)

    def start(self, step: int, prefix: str = "") -> None:
        """Start a checkpoint write, after finishing the pending one."""
        self.finish()
        self.writing = self.run.start_checkpoint(self.engine, step, keep=self.keep, prefix=prefix)
        self.started = time.monotonic()

    def finish(self) -> Path | None:
        """Wait for the pending checkpoint, if any, and re-raise its error."""
        writing, self.writing = self.writing, None
        return None if writing is None else writing.finish()

    def finish_if_done(self, is_logged: bool) -> None:
        """Finalize the pending checkpoint if it is done (non-blocking)."""
        if self.writing is None or (self.engine.world_size > 1 and not is_logged):
            return
        if not self.engine.any(not self.writing.is_done()):
            self.finish()

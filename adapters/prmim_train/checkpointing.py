"""When checkpoints are written, and what all processes do about the wish of one."""

import time
from pathlib import Path

from prmim_train.engine import Trainer
from prmim_train.run_directory import RunDirectory, Writing
from prmim_train.training_options import TrainingOptions


def agreed(engine: Trainer, wish: bool, is_logged: bool) -> bool:
    """Return what all processes do about the wish of one: at once if it is alone, else at the next line of the log."""
    return wish if engine.world_size == 1 else is_logged and engine.any(wish)


class Checkpoints:
    """Writes checkpoints behind the training, one at a time."""

    def __init__(self, run: RunDirectory, config: TrainingOptions, engine: Trainer) -> None:
        self.run, self.engine, self.keep = run, engine, config.keep_checkpoints
        self.minutes = config.checkpoint_minutes
        self.started = time.monotonic()
        self.writing: Writing | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writing is not None:  # after an error of something else, which is the one to report
            self.writing.wait()

    def are_due(self, is_logged: bool) -> bool:
        """Say whether the minutes between two of them are over, in the main process."""
        if self.minutes is None:
            return False
        is_late = self.engine.rank == 0 and time.monotonic() - self.started >= 60 * self.minutes
        return agreed(self.engine, is_late, is_logged)

    def start(self, step: int, prefix: str = "") -> None:
        """Begin to write one, when the one before is finished."""
        self.finish()
        self.writing = self.run.start_checkpoint(self.engine, step, keep=self.keep, prefix=prefix)
        self.started = time.monotonic()

    def finish(self) -> Path | None:
        """Wait for the one that is being written, if any, and raise what went wrong with it."""
        writing, self.writing = self.writing, None
        return None if writing is None else writing.finish()

    def look_after(self, is_logged: bool) -> None:
        """Finish the one that is being written if that takes no waiting."""
        if self.writing is None or (self.engine.world_size > 1 and not is_logged):
            return
        if not self.engine.any(not self.writing.is_done()):
            self.finish()

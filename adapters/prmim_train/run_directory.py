"""The folder of a run, and the only place that writes into it.

```
config.yaml                  every option of the run
metrics.jsonl                one JSON object a line
checkpoints/step_00000120/   weights.safetensors and the training state
summary.json                 final numbers
```

Nothing is ever half written.  A file is written beside its place, flushed to the disk and renamed over it; a checkpoint
is a folder made in the same way.  The one exception, `metrics.jsonl`, grows by whole lines, and a line that a crash cut
short is dropped on resume.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_(\d{8,})")


class Saves(Protocol):
    """Anything that can write itself into a folder; an engine."""

    def save(self, directory: Path) -> None:
        """Write into an existing, empty folder."""


class RunDirectory:
    r"""A run's folder.

    Parameters
    ----------
    path
        The folder; it is made when the options are written.

    Examples
    --------
    >>> import tempfile
    >>> run = RunDirectory(Path(tempfile.mkdtemp()) / "run")
    >>> run.write_config("epochs: 1\n")
    >>> run.append_metrics({"step": 1, "loss": 0.5})
    >>> run.read_metrics()
    [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_is_free(self) -> None:
        """Raise unless a new run may begin in the folder.

        Raises
        ------
        FileExistsError
            If there is a run already that has taken a step.
        NotADirectoryError
            If the path is that of a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got the file {self.path}")
        taken = [self.path / name for name in (METRICS, SUMMARY) if (self.path / name).exists()]
        folder = self.path / CHECKPOINTS
        if taken or (folder.is_dir() and any(folder.iterdir())):
            raise FileExistsError(
                f"out: {self.path} already holds a run; continue it with --resume, or name another folder with --out"
            )

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Return the run that a folder holds.

        Parameters
        ----------
        path
            The folder.

        Raises
        ------
        FileNotFoundError
            If the folder holds none.
        """
        if not cls.holds_run(path):
            raise FileNotFoundError(f"run: expected the folder of a run, but there is no {CONFIG} in {path}")
        return cls(path)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Say whether a folder holds a run."""
        return (path / CONFIG).is_file()

    def write_config(self, config: str) -> None:
        """Write `config.yaml`, and make the folder if there is none."""
        (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / CONFIG, config.encode())

    def read_config(self) -> str:
        """Return the text of `config.yaml`."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_atomically(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def read_summary(self) -> dict[str, Any] | None:
        """Return what `summary.json` holds, None where there is none yet."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        line = json.dumps(record) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the whole lines of `metrics.jsonl`, in order."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a run that was killed while writing it
                break
        return records

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` beyond a step: the run goes on from there."""
        path = self.path / METRICS
        if path.is_file():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def checkpoints(self) -> list[Path]:
        """Return the folders of the whole checkpoints, oldest first; rescue checkpoints are not among them."""
        folder = self.path / CHECKPOINTS
        found = [entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name)] if folder.is_dir() else []
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))

    def latest_checkpoint(self) -> Path | None:
        """Return the folder of the newest checkpoint, None where there is none."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def save_checkpoint(self, engine: Saves, step: int, *, keep: int, prefix: str = "") -> Path:
        """Write a checkpoint, whole or not at all, then delete the oldest ones.

        Parameters
        ----------
        engine
            What to save.
        step
            Its step, which names the folder.
        keep
            How many checkpoints to keep.
        prefix
            Put before the folder's name; a checkpoint with a prefix is never resumed from nor deleted.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        OSError
            If it could not be written; what was written of it is gone then, and older checkpoints are untouched.
        """
        place = self.path / CHECKPOINTS / f"{prefix}step_{step:08d}"
        if place.is_dir():  # whole, since it bears its name
            return place
        try:
            with _temporary_directory(place) as directory:
                engine.save(directory)
                _flush_tree(directory)
                directory.rename(place)
                _flush(place.parent)
        except Exception as error:
            latest = self.latest_checkpoint()
            kept = f"the last good one is {latest}" if latest is not None else "there is no earlier one"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"checkpoint: could not write {place}: {reason}; {kept}") from error
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return place

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written."""
        for folder in (self.path, self.path / CHECKPOINTS):
            for entry in folder.glob(".*.partial-*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    path
        The file, replaced if it exists.
    content
        Its bytes.

    Raises
    ------
    OSError
        If it could not be written; the old file is untouched then.
    """
    with temporary_sibling(path) as sibling:
        sibling.write_bytes(content)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; at the end what was written there replaces `path`, or is gone on error.

    The name ends as `path` does, for writers that go by the ending.
    """
    sibling = path.with_name(f".{path.stem}.partial-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield sibling
        _flush(sibling)
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


@contextmanager
def _temporary_directory(place: Path) -> Iterator[Path]:
    """Make a folder beside `place`, and delete it in the end unless it was renamed."""
    directory = place.with_name(f".{place.name}.partial-{uuid.uuid4().hex[:8]}")
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _flush_tree(directory: Path) -> None:
    for entry in sorted(directory.rglob("*")):
        _flush(entry)
    _flush(directory)


def _flush(path: Path) -> None:
    """Ask for a file or folder to be on the disk before going on."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and needs no flush of them
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

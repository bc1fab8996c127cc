"""Run directory: options, metrics, checkpoints and summary of a run.

```
config.yaml                  every option of the run
metrics.jsonl                one JSON object per line
checkpoints/step_00000120/   weights.safetensors, the training state, and manifest.json
summary.json                 final numbers
tracker.json                 ID of the run in its tracker, if it has one
```

All writes are atomic. A file is written under a temporary name, flushed to disk and renamed; a checkpoint is a folder
written in the same way. The exception is `metrics.jsonl`, which grows line by line: resuming drops an incomplete last
line.

`manifest.json`, the last file of a checkpoint, lists size and SHA-256 of every other file. A checkpoint that does not
match its manifest is corrupt and never read. Resuming uses the previous checkpoint, and renames the corrupt one to
`damaged_step_00000120`.

In a distributed run, only the main process writes here, except that all processes write the files of a checkpoint. They
need a shared file system.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prmim_methods.weight_files import one_line, write_atomically
from prmim_train.run.processes import Agrees, FailedElsewhereError, on_main

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
TRACKER = "tracker.json"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
RESCUE = "rescue_"
DAMAGED = "damaged_"
_STEP = re.compile(r"step_(\d{8,})")
DONE: Future[None] = Future()
"""A completed future, for work that this process does not have."""
DONE.set_result(None)


class Saves(Agrees, Protocol):
    """Something that saves itself into a folder, such as an engine."""

    def async_save(self, directory: Path) -> Future[None]:
        """Start writing into an existing, empty folder. Collective: every process calls it."""


class RunDirectory:
    r"""The folder of a run.

    Parameters
    ----------
    path
        The folder. `write_config` creates it.

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
        """Check that a new run can use the folder.

        Raises
        ------
        FileExistsError
            If the folder holds a run that has taken a step.
        NotADirectoryError
            If the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got the file {self.path}")
        has_stepped = any((self.path / name).exists() for name in (METRICS, SUMMARY))
        folder = self.path / CHECKPOINTS
        if has_stepped or (folder.is_dir() and any(folder.iterdir())):
            raise FileExistsError(
                f"out: {self.path} already holds a run; continue it with --resume, or name another folder with --out"
            )

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the run in an existing folder.

        Parameters
        ----------
        path
            The folder.

        Raises
        ------
        FileNotFoundError
            If the folder holds no run.
        """
        if not cls.holds_run(path):
            raise FileNotFoundError(f"run: expected the folder of a run, but there is no {CONFIG} in {path}")
        return cls(path)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a folder holds a run."""
        return (path / CONFIG).is_file()

    def write_config(self, config: str) -> None:
        """Write `config.yaml`. Creates the folder if needed."""
        (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        _write_text(self.path / CONFIG, config)

    def read_config(self) -> str:
        """Return the text of `config.yaml`."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.path / SUMMARY, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """Read `summary.json`. Returns None if the run is not finished."""
        return _read_json(self.path / SUMMARY)

    def read_tracker(self, name: str) -> str | None:
        """ID of the run in a tracker; None if the tracker has not assigned one."""
        return (_read_json(self.path / TRACKER) or {}).get(name)

    def write_tracker(self, name: str, run: str) -> None:
        """Store the ID of the run in a tracker."""
        write_json(self.path / TRACKER, {**(_read_json(self.path / TRACKER) or {}), name: run})

    def leave_note(self, rank: int, note: dict[str, str]) -> None:
        """Leave a note for the main process; see `collect_notes`."""
        write_json(self.path / f".note.partial-{rank}.json", note)

    def collect_notes(self) -> dict[str, str]:
        """Merge and delete the notes of the other processes."""
        collected: dict[str, str] = {}
        for path in sorted(self.path.glob(".note.partial-*.json")):
            collected |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        return collected

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        line = json.dumps(record) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the complete lines of `metrics.jsonl`."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # last line of a run killed while writing it
                break
        return records

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` after a step."""
        path = self.path / METRICS
        if path.is_file():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            _write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first, without rescue checkpoints and damaged ones set aside."""
        folder = self.path / CHECKPOINTS
        found = [entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name)] if folder.is_dir() else []
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))

    def latest_checkpoint(self, *, set_aside: bool = False) -> Path | None:
        """Find the newest good checkpoint. Warns on stderr about newer, damaged ones.

        Parameters
        ----------
        set_aside
            Rename damaged checkpoints, so that the resumed run can write them again.

        Returns
        -------
        Path or None
            Folder of the checkpoint; None if the run has no checkpoints.

        Raises
        ------
        OSError
            If all checkpoints are damaged. Nothing is renamed.
        """
        damaged: list[tuple[Path, str]] = []
        for checkpoint in reversed(self.checkpoints()):
            reason = damage(checkpoint)
            if reason is None:
                for place, text in damaged:
                    kept = f", kept as {_set_aside(place).name}" if set_aside else ""
                    line = f"prmim: warning: checkpoint {place} is damaged{kept}: {text}; {checkpoint.name} is used"
                    print(line, file=sys.stderr, flush=True)
                return checkpoint
            damaged.append((checkpoint, reason))
        if damaged:
            place, text = damaged[0]
            raise OSError(
                f"checkpoint: expected a good one in {place.parent}, but all {len(damaged)} are damaged; "
                f"{place.name}: {text}"
            )
        return None

    def rescued_steps(self) -> set[int]:
        """Return the steps of the rescue checkpoints."""
        found = (self.path / CHECKPOINTS).glob(f"{RESCUE}step_*")
        return {int(entry.name.removeprefix(f"{RESCUE}step_")) for entry in found}

    def start_checkpoint(self, engine: Saves, step: int, *, keep: int, prefix: str = "") -> "Writing":
        """Start an atomic checkpoint write, then prune old checkpoints.

        Collective: every process calls it, and finishes the returned write before starting the next one.

        Parameters
        ----------
        engine
            The engine to save.
        step
            Step of the checkpoint, for the name of the folder.
        keep
            Number of checkpoints to keep.
        prefix
            Prefix of the folder's name. Checkpoints with a prefix are never resumed from nor pruned.

        Returns
        -------
        Writing
            The pending write.

        Raises
        ------
        OSError
            If the write could not be started; see :meth:`Writing.finish`.
        FailedElsewhereError
            If the main process could not start the write, in the other processes.
        """
        place = self.path / CHECKPOINTS / f"{prefix}step_{step:08d}"
        if engine.any(engine.rank == 0 and place.is_dir()):  # complete: only complete checkpoints have their final name
            return Writing(self, engine, place)
        directory = place.with_name(f".{place.name}.partial")  # the same name in all processes
        with self.explained(place):
            on_main(engine, partial(_make_empty, directory))
            saved = engine.async_save(directory)
        if engine.rank > 0:
            return Writing(self, engine, place, saved)
        background = ThreadPoolExecutor(1, "checkpoint")
        placed = background.submit(self._finish_checkpoint, saved, directory, place, keep)
        background.shutdown(wait=False)
        return Writing(self, engine, place, saved, placed)

    def _finish_checkpoint(self, saved: Future[None], directory: Path, place: Path, keep: int) -> None:
        try:
            with self.explained(place):
                saved.result()
                _write_manifest(directory)
                _flush_tree(directory)
                if (self.path / METRICS).exists():  # a crash must not lose lines from before the checkpoint
                    _flush(self.path / METRICS)
                directory.rename(place)
                _flush(place.parent)
        except Exception:
            _delete_for_good(directory)
            raise
        self._delete_old(keep)

    @contextmanager
    def explained(self, place: Path) -> Iterator[None]:
        """Turn an error inside into an OSError that names the failed and the last good checkpoint."""
        try:
            yield
        except FailedElsewhereError:
            raise
        except Exception as error:
            latest = self.checkpoints()[-1:]
            kept = f"the last good one is {latest[0]}" if latest else "there is no earlier one"
            raise OSError(f"checkpoint: could not write {place}: {one_line(error)}; {kept}") from error

    def _delete_old(self, keep: int) -> None:
        for old in self.checkpoints()[:-keep]:
            doomed = old.with_name(f".{old.name}.partial")  # a half-deleted checkpoint must not look complete
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(old.rename(doomed))

    def remove_leftovers(self) -> None:
        """Delete incomplete files and folders of a killed run."""
        for folder in (self.path, self.path / CHECKPOINTS):
            for entry in folder.glob(".*.partial*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class Writing:
    """A pending checkpoint write; see :meth:`RunDirectory.start_checkpoint`.

    Parameters
    ----------
    run
        The run.
    engine
        The engine being saved.
    place
        Final folder of the checkpoint.
    saved
        Done when the engine has written its files.
    placed
        Done when the checkpoint has its final name. Used in the main process only.
    """

    def __init__(
        self, run: RunDirectory, engine: Saves, place: Path, saved: Future[None] = DONE, placed: Future[None] = DONE
    ) -> None:
        self.place = place
        self._run, self._engine = run, engine
        self._saved, self._placed = saved, placed

    def is_done(self) -> bool:
        """Whether this process has finished its part."""
        return self._saved.done() and self._placed.done()

    def wait(self) -> None:
        """Wait until this process has finished or failed."""
        wait([self._saved, self._placed])

    def finish(self) -> Path:
        """Wait until all processes have finished.

        Returns
        -------
        Path
            Folder of the checkpoint.

        Raises
        ------
        OSError
            If the checkpoint could not be written. Its files are deleted; older checkpoints are untouched.
        FailedElsewhereError
            If the main process could not write the checkpoint, in the other processes.
        """
        self.wait()
        with self._run.explained(self.place):
            self._saved.result()  # fails in all processes or in none
        on_main(self._engine, self._placed.result)
        return self.place


def damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest. Reads all of its files.

    Parameters
    ----------
    checkpoint
        Folder of the checkpoint.

    Returns
    -------
    str or None
        Description of the first damage found; None if the checkpoint is good.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    found = _files(checkpoint)  # names in the manifest are only looked up: they could point outside of the folder
    for name, (size, checksum) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].stat().st_size != size:
            return f"{name}: expected {size} bytes, got {found[name].stat().st_size}"
        try:
            if _checksum(found[name]) != checksum:
                return f"{name}: its content has changed"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _write_manifest(directory: Path) -> None:
    """Write the manifest: size and checksum of every file of a checkpoint."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _checksum(path)} for name, path in _files(directory).items()
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _files(directory: Path) -> dict[str, Path]:
    """Files below a folder by relative name, without the manifest."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    found.pop(MANIFEST, None)
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept but never read."""
    place = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    while place.exists():
        place = place.with_name(f"{place.name}_again")
    return checkpoint.rename(place)


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()  # without parents: do not recreate the folder of a deleted run


def _delete_for_good(directory: Path) -> None:
    """Delete a failed checkpoint until it has been gone for two seconds.

    Orbax stops a save at the first file that fails, but other writes continue and cannot be waited for. They add files
    while the folder is being deleted, or recreate it: with 1,500 arrays, up to 0.6 s later.
    """
    times_gone = 0
    for _ in range(60):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
        times_gone = 0 if directory.exists() else times_gone + 1
        if times_gone == 20:
            return


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file atomically."""
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if it does not exist."""
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _flush_tree(directory: Path) -> None:
    for entry in sorted(directory.rglob("*")):
        _flush(entry)
    _flush(directory)


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and does not need to flush them
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Run directory: options, metrics, checkpoints and summary of a run.

```
config.yaml                  every option of the run
run.json, trained.npz        ID of the run, and what it was trained on
attention_00001234.npz       attention maps after a step, with `throwing: weighted`
metrics.jsonl                one JSON object per line
checkpoints/step_00000120/   weights.safetensors, the training state, and manifest.json
summary.json                 final numbers
tracker.json                 ID of the run in its tracker, if it has one
```

All writes are atomic. A file is written under a temporary name, flushed to disk and renamed; a checkpoint is a folder
written in the same way. The exception is `metrics.jsonl`, which grows line by line: resuming drops an incomplete last
line. Any other corrupt line, and any other corrupt file, is an error that names it: nothing is dropped or repaired.
Pipes, sockets and devices in place of files are errors too: opening them could block.

`manifest.json`, the last file of a checkpoint, holds the ID of the run, the step, and the size and SHA-256 of every
other file. A checkpoint that does not match its manifest, or belongs to another run or step, is never read. Resuming
then uses the previous checkpoint, and renames the damaged one to `damaged_step_00000120`.

A run belongs to one process at a time, or to the processes of one distributed run: `RunDirectory.locked`. It locks
`.lock` through the operating system (`flock`), which releases the lock when the process ends for any reason. A network
file system must support such locks: NFS does since version 4, unless it is mounted with `nolock` or `local_lock`;
Lustre does with the mount option `flock`.

In a distributed run, all processes write the files of a checkpoint, so they need a shared file system. All other files
are written by the main process.
"""

import io
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from prmim_methods.messages import one_line, shown
from prmim_train.config.layers import parse_options
from prmim_train.run.files import (
    delete,
    delete_for_good,
    flush,
    flush_tree,
    open_file,
    parse_object,
    read_file,
    read_json,
    write_json,
    write_text,
)
from prmim_train.run.manifest import damage, read_manifest, step_of, write_manifest
from prmim_train.run.processes import Agrees, FailedElsewhereError, on_main

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
IDENTITY = "run.json"
SUMMARY = "summary.json"
LOCK = ".lock"
TRACKER = "tracker.json"
CHECKPOINTS = "checkpoints"
RESCUE = "rescue_"
DAMAGED = "damaged_"
ADVICE = "delete the file, and resuming writes it again"
NUMBERS = (int, float, type(None))
_STEP = re.compile(r"step_(\d{8,})")
ID = re.compile(r"[0-9a-f]{32}")
DONE: Future[None] = Future()
"""A completed future, for processes without work."""
DONE.set_result(None)


class Saves(Agrees, Protocol):
    """Object that can save itself into a folder, such as an engine."""

    def async_save(self, directory: Path) -> Future[None]:
        """Start writing into an existing, empty folder.

        Collective: every process calls it.
        """


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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes.

        Creates the folder, and removes it if no run was started.

        Raises
        ------
        BlockingIOError
            If another process trains in the folder.
        NotADirectoryError
            If the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got the file {self.path}")
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"out: another process is training in {self.path}; wait until it has ended, or name another folder "
                "with --out"
            ) from None
        except PermissionError:
            raise
        except OSError as error:
            raise OSError(f"out: could not lock {self.path / LOCK}: {one_line(error)}") from error
        try:
            yield
        finally:
            if missing and not self.holds_run(self.path):
                lock.release()
                (self.path / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # not empty: other files were added
                    for folder in missing:
                        folder.rmdir()
            lock.release()

    def check_is_free(self) -> None:
        """Check that a new run can use the folder.

        Raises
        ------
        FileExistsError
            If the folder holds a run that has taken a step.
        """
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
            raise _no_run(path)
        return cls(path)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a folder holds a run."""
        return (path / CONFIG).is_file()

    def write_config(self, config: str) -> None:
        """Write the text of `config.yaml`. Creates the folder if needed."""
        (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG, config)

    def read_config(self) -> dict[str, Any]:
        """Return the options in `config.yaml`, which are not validated.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If it is empty, or not YAML of the form `option: value`.
        """
        path = self.path / CONFIG
        content = read_file(path)
        if content is None:
            raise _no_run(self.path)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"config: expected YAML, got an error in {path}: {error}") from None
        options = parse_options(text, str(path))
        if not options:
            raise ValueError(f"config: expected the options of the run in {path}, got none")
        return options

    def read_identity(self) -> tuple[str, dict[str, Any]] | None:
        """Return the ID and the origin of the run; None if they were not recorded.

        Raises
        ------
        ValueError
            If `run.json` is damaged.
        """
        found = read_json(self.path / IDENTITY)
        if found is None:
            return None
        run, facts = found.get("id"), found.get("facts")
        if not (isinstance(run, str) and ID.fullmatch(run) and isinstance(facts, dict)):
            raise ValueError(f"run: expected id and facts of the run in {self.path / IDENTITY}, got others")
        return run, facts

    def write_identity(self, facts: dict[str, Any]) -> None:
        """Write `run.json`: the origin and the ID of the run.

        The ID is generated the first time.
        """
        run = self._id() or self._id_of_checkpoints() or uuid.uuid4().hex
        write_json(self.path / IDENTITY, {"id": run, "facts": facts})

    def _id(self) -> str | None:
        found = self.read_identity()
        return None if found is None else found[0]

    def _id_of_checkpoints(self) -> str | None:
        """Return the ID stored in the newest checkpoint, if `run.json` is lost."""
        named = [read_manifest(checkpoint).get("run") for checkpoint in self.checkpoints()[-1:]]
        return named[0] if named and isinstance(named[0], str) and ID.fullmatch(named[0]) else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.path / SUMMARY, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """Read `summary.json`. Returns None if the run is not finished.

        Raises
        ------
        ValueError
            If the file is corrupt, or has no number of steps.
        """
        path = self.path / SUMMARY
        summary = read_json(path)
        if summary is not None and type(summary.get("steps")) is not int:
            raise ValueError(f"run: expected a number of steps in {path}, got {shown(summary)}; {ADVICE}")
        return summary

    def read_tracker(self, name: str) -> str | None:
        """ID of the run in a tracker; None if the tracker has not assigned one."""
        known = (read_json(self.path / TRACKER) or {}).get(name)
        if known is not None and not isinstance(known, str):
            raise ValueError(f"run: expected a text as {name} in {self.path / TRACKER}, got {shown(known)}; {ADVICE}")
        return known

    def write_tracker(self, name: str, run: str) -> None:
        """Store the ID of the run in a tracker."""
        write_json(self.path / TRACKER, {**(read_json(self.path / TRACKER) or {}), name: run})

    def leave_note(self, rank: int, note: dict[str, str]) -> None:
        """Leave a note for the main process; see `collect_notes`."""
        write_json(self.path / f".note.partial-{rank}.json", note)

    def collect_notes(self) -> dict[str, str]:
        """Merge and delete the notes of the other processes."""
        collected: dict[str, str] = {}
        for path in sorted(self.path.glob(".note.partial-*.json")):
            collected |= read_json(path) or {}
            path.unlink()
        return collected

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        line = json.dumps(record) + "\n"
        with io.BufferedWriter(open_file(self.path / METRICS, "a")) as file:
            file.write(line.encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of `metrics.jsonl`, without an incomplete last line.

        Raises
        ------
        ValueError
            If a line is corrupt. An incomplete last line is allowed: the process was killed while writing it.
        """
        path = self.path / METRICS
        *lines, unfinished = (read_file(path) or b"").split(b"\n")
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        records = [_read_record(line, f"line {number} of {path}") for number, line in numbered]
        if not _is_torn(unfinished):
            records.append(_read_record(unfinished, f"the last line of {path}"))
        return records

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` after a step."""
        path = self.path / METRICS
        if os.path.lexists(path):  # also a broken link, which must not be followed
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first.

        Rescue checkpoints and damaged ones are left out.
        """
        folder = self.path / CHECKPOINTS
        found = [entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name)] if folder.is_dir() else []
        return sorted(found, key=step_of)

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
            reason = self.damage(checkpoint)
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

    def damage(self, checkpoint: Path) -> str | None:
        """Describe a checkpoint's damage, if any; see `prmim_train.run.manifest.damage`."""
        return damage(checkpoint, self._id())

    def rescued_steps(self) -> set[int]:
        """Return the steps of the rescue checkpoints."""
        found = (self.path / CHECKPOINTS).glob(f"{RESCUE}*")
        names = [entry.name.removeprefix(RESCUE) for entry in found]
        return {int(name.removeprefix("step_")) for name in names if _STEP.fullmatch(name)}

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
                write_manifest(directory, self._id(), step_of(place))
                flush_tree(directory)
                if (self.path / METRICS).exists():  # a crash must not lose lines from before the checkpoint
                    flush(self.path / METRICS)
                directory.rename(place)
                flush(place.parent)
        except Exception:
            delete_for_good(directory)
            raise
        self._delete_old(keep)

    @contextmanager
    def explained(self, place: Path) -> Iterator[None]:
        """Convert an error into an OSError about a failed checkpoint.

        The message names the failed and the last good checkpoint.
        """
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
            delete(doomed)
            delete(old.rename(doomed))

    def remove_leftovers(self) -> None:
        """Delete incomplete files and folders of a killed run.

        Links are deleted, not followed.

        Raises
        ------
        ValueError
            If a line of `metrics.jsonl` is corrupt. Nothing is deleted then.
        """
        self.read_metrics()  # report a run that cannot be resumed before changing anything
        for folder in (self.path, self.path / CHECKPOINTS):
            for entry in folder.glob(".*.partial*"):
                delete(entry)


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
        Done when the checkpoint is renamed to its final name. Used in the main process only.
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


def _no_run(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"run: expected the folder of a run, but there is no {CONFIG} in {path}")


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, which keeps it but excludes it from reading."""
    place = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    while place.exists():
        place = place.with_name(f"{place.name}_again")
    return checkpoint.rename(place)


def _make_empty(directory: Path) -> None:
    delete(directory)
    directory.mkdir()  # without parents: do not recreate the folder of a deleted run


def _read_record(line: bytes, place: str) -> dict[str, Any]:
    """Parse a line of the metrics."""
    record = parse_object(line, place)
    if type(record.get("step")) is not int or not all(isinstance(value, NUMBERS) for value in record.values()):
        raise ValueError(f"run: expected a step and other numbers in {place}, got {shown(record)}")
    return record


def _is_torn(line: bytes) -> bool:
    """Whether a line is an incomplete record, or consists of zero bytes.

    A power cut can leave zero bytes.
    """
    content = line.strip(b"\0")
    if content and not content.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False

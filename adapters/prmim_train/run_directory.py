"""The folder of a run, and the only place that writes into it.

```
config.yaml                  every option of the run
metrics.jsonl                one JSON object a line
checkpoints/step_00000120/   weights.safetensors, the training state, and manifest.json
summary.json                 final numbers
tracker.json                 the name of the run in a tracker, where there is one
```

Nothing is ever half written.  A file is written beside its place, flushed to the disk and renamed over it; a checkpoint
is a folder made in the same way.  The one exception, `metrics.jsonl`, grows by whole lines, and a line that a crash cut
short is dropped on resume.

What a disk loses afterwards is found too: `manifest.json`, the last file of a checkpoint, has the size and the SHA-256
of every other one.  A checkpoint that does not agree with it is never read: the one before is taken, and the damaged
one is kept under the name `damaged_step_00000120` until somebody deletes it.

Of several processes the main one alone writes here, except that all write the files of a checkpoint, into a folder that
they all have to see.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prmim_train.processes import Agrees, FailedElsewhereError, on_main

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
"""Of what there is nothing to do for."""
DONE.set_result(None)


class Saves(Agrees, Protocol):
    """Anything that can write itself into a folder, from however many processes; an engine."""

    def async_save(self, directory: Path) -> Future[None]:
        """Begin to write into an existing, empty folder; every process has to call it."""


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

    def read_tracker(self, name: str) -> str | None:
        """Return the name that a tracker gave to the run, None where it gave none yet."""
        path = self.path / TRACKER
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return known.get(name)

    def write_tracker(self, name: str, run: str) -> None:
        """Note the name that a tracker gave to the run."""
        path = self.path / TRACKER
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_atomically(path, (json.dumps({**known, name: run}, indent=2) + "\n").encode())

    def leave_note(self, rank: int, note: dict[str, str]) -> None:
        """Leave something for the main process: see `collect_notes`."""
        write_atomically(self.path / f".note.partial-{rank}.json", json.dumps(note).encode())

    def collect_notes(self) -> dict[str, str]:
        """Return what other processes left in notes, all in one, and remove the notes."""
        collected: dict[str, str] = {}
        for path in sorted(self.path.glob(".note.partial-*.json")):
            collected |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        return collected

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
        """Return the folders of the checkpoints, oldest first; those rescued or set aside are not among them."""
        folder = self.path / CHECKPOINTS
        found = [entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name)] if folder.is_dir() else []
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))

    def latest_checkpoint(self, *, set_aside: bool = False) -> Path | None:
        """Return the folder of the newest checkpoint that is whole, None where there is none at all.

        Parameters
        ----------
        set_aside
            Rename those that are damaged, so that a run that goes on can write them again.

        Returns
        -------
        Path or None
            A line on the standard error names each one that is damaged and newer.

        Raises
        ------
        OSError
            If there are checkpoints, but all of them are damaged; nothing is renamed then.
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
                f"checkpoint: expected one that is whole in {place.parent}, but all {len(damaged)} are damaged; "
                f"{place.name}: {text}"
            )
        return None

    def rescued_steps(self) -> set[int]:
        """Return the steps of the rescue checkpoints."""
        found = (self.path / CHECKPOINTS).glob(f"{RESCUE}step_*")
        return {int(entry.name.removeprefix(f"{RESCUE}step_")) for entry in found}

    def start_checkpoint(self, engine: Saves, step: int, *, keep: int, prefix: str = "") -> "Writing":
        """Begin to write a checkpoint, whole or not at all; then the oldest ones are deleted.

        Every process has to call it, and to finish what it returns before the next one is begun.

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
        Writing

        Raises
        ------
        OSError
            If it could not be begun; see :meth:`Writing.finish`.
        FailedElsewhereError
            The same, in other processes than the main one, where it was that which could not write.
        """
        place = self.path / CHECKPOINTS / f"{prefix}step_{step:08d}"
        if engine.any(engine.rank == 0 and place.is_dir()):  # whole, since it bears its name
            return Writing(self, engine, place)
        directory = place.with_name(f".{place.name}.partial")  # the same in all processes
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
                if (self.path / METRICS).exists():  # its lines must not be lost where the checkpoint is not
                    _flush(self.path / METRICS)
                directory.rename(place)
                _flush(place.parent)
        except Exception:
            _delete_for_good(directory)
            raise
        self._delete_old(keep)

    @contextmanager
    def explained(self, place: Path) -> Iterator[None]:
        """Say of an error inside which checkpoint could not be written, and which one is there."""
        try:
            yield
        except FailedElsewhereError:
            raise
        except Exception as error:
            latest = self.checkpoints()[-1:]
            kept = f"the last good one is {latest[0]}" if latest else "there is no earlier one"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"checkpoint: could not write {place}: {reason}; {kept}") from error

    def _delete_old(self, keep: int) -> None:
        for old in self.checkpoints()[:-keep]:
            doomed = old.with_name(f".{old.name}.partial")  # half deleted, it must not bear its name
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(old.rename(doomed))

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written."""
        for folder in (self.path, self.path / CHECKPOINTS):
            for entry in folder.glob(".*.partial*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class Writing:
    """A checkpoint that is written in the background; see :meth:`RunDirectory.start_checkpoint`.

    Parameters
    ----------
    run
        The run that it is of.
    engine
        What is saved.
    place
        The folder that it will be.
    saved
        The engine's part.
    placed
        All of it; in the main process only.
    """

    def __init__(
        self, run: RunDirectory, engine: Saves, place: Path, saved: Future[None] = DONE, placed: Future[None] = DONE
    ) -> None:
        self.place = place
        self._run, self._engine = run, engine
        self._saved, self._placed = saved, placed

    def is_done(self) -> bool:
        """Say whether this process has nothing left to do for it."""
        return self._saved.done() and self._placed.done()

    def wait(self) -> None:
        """Wait until this process is done, whether or not it succeeds."""
        wait([self._saved, self._placed])

    def finish(self) -> Path:
        """Wait for the end of it, in every process.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        OSError
            If it could not be written; what was written of it is gone then, and older checkpoints are untouched.
        FailedElsewhereError
            The same, in other processes than the main one, where it was that which could not write.
        """
        self.wait()
        with self._run.explained(self.place):
            self._saved.result()  # which fails in all processes or in none
        on_main(self._engine, self._placed.result)
        return self.place


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint: how its files differ from its manifest; None where nothing is.

    Parameters
    ----------
    checkpoint
        Its folder. All of its files are read.

    Returns
    -------
    str or None
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    found = _files(checkpoint)  # names from the manifest are looked up, never opened
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
    """List the files of a checkpoint, all there are, with sizes and checksums."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _checksum(path)} for name, path in _files(directory).items()
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _files(directory: Path) -> dict[str, Path]:
    """Return the files below a folder, by their names relative to it, without the manifest."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    found.pop(MANIFEST, None)
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which it is kept and never read."""
    place = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    while place.exists():
        place = place.with_name(f"{place.name}_again")
    return checkpoint.rename(place)


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()  # without parents: a run whose folder was deleted must not begin another one


def _delete_for_good(directory: Path) -> None:
    """Delete what is there of a checkpoint that could not be written, until it has been gone for two seconds.

    The first file that fails ends a save. Orbax leaves others, already begun, to themselves, and has no way to wait for
    them: they appear in the folder while it is deleted, or bring it back, up to 0.6 s later where 1,500 arrays failed.
    """
    times_gone = 0
    for _ in range(60):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
        times_gone = 0 if directory.exists() else times_gone + 1
        if times_gone == 20:
            return


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

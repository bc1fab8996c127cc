"""Manifest of a checkpoint: its run and step, and size and SHA-256 of every file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from prmim_methods.files import is_special
from prmim_methods.messages import printable, shorten, shown
from prmim_train.run.files import read_json

MANIFEST = "manifest.json"


def damage(checkpoint: Path, run: str | None = None) -> str | None:
    """Compare a checkpoint with its manifest. Reads all files of the checkpoint.

    Parameters
    ----------
    checkpoint
        Folder of the checkpoint.
    run
        ID of the run that it must belong to. None: any.

    Returns
    -------
    str or None
        Description of the first damage found; None if the checkpoint is good.
    """
    try:
        listed = (read_json(checkpoint / MANIFEST) or {})["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read" if os.path.lexists(checkpoint / MANIFEST) else f"it has no {MANIFEST}"
    if special := next(filter(is_special, checkpoint.rglob("*")), None):
        return f"{_short(special.name)} is a pipe, a socket or a device"
    found = _files(checkpoint)  # names in the manifest are never opened as paths: they could point outside the folder
    for name, (size, checksum) in expected.items():
        if name not in found:
            return f"{_short(name)} is missing"
        if found[name].stat().st_size != size:
            return f"{name}: expected {shown(size)} bytes, got {found[name].stat().st_size}"
        try:
            if _checksum(found[name]) != checksum:
                return f"{name}: its content has changed"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return _foreign(checkpoint, run)


def _short(name: str) -> str:
    return shorten(printable(name), 80)


def _foreign(checkpoint: Path, run: str | None) -> str | None:
    """Describe why a good checkpoint is not one of the run; None if it is.

    Also None if either has no ID (earlier versions).
    """
    manifest = read_manifest(checkpoint)
    if run is not None and manifest.get("run", run) != run:
        return "it belongs to another run"
    if manifest.get("step", step_of(checkpoint)) != step_of(checkpoint):
        return "it belongs to another step"
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("_")[2])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint; empty if it cannot be read."""
    try:
        return read_json(checkpoint / MANIFEST) or {}
    except (OSError, ValueError):
        return {}


def write_manifest(directory: Path, run: str | None, step: int) -> None:
    """Write the manifest of a checkpoint.

    Run, step, and size and checksum of every file.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _checksum(path)} for name, path in _files(directory).items()
    }
    manifest = {"run": run, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _files(directory: Path) -> dict[str, Path]:
    """Files below a folder by relative name, without the manifest."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    found.pop(MANIFEST, None)
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

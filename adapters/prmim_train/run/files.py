"""Files of a run: atomic writes and validated reads."""

import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prmim_methods.files import open_regular
from prmim_methods.messages import shown
from prmim_methods.weight_files import write_atomically


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file."""
    content = read_file(path)
    return None if content is None else parse_object(content, str(path))


def parse_object(content: bytes, place: str) -> dict[str, Any]:
    """Parse a JSON object. Other content raises a ValueError that names the place."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        got = shown(content.decode(errors="replace")) if content else "nothing"
        raise ValueError(f"run: expected a JSON object in {place}, got {got}") from None
    if not isinstance(value, dict):
        raise ValueError(f"run: expected a JSON object in {place}, got {shown(value)}")
    return value


def read_file(path: Path) -> bytes | None:
    """Read a regular file; None if it does not exist."""
    try:
        with open_file(path) as file:
            return file.readall()
    except (FileNotFoundError, NotADirectoryError):
        return None


def open_file(path: Path, mode: Literal["r", "a"] = "r") -> io.FileIO:
    """Open a file of a run. A pipe, socket or device raises a ValueError."""
    try:
        return open_regular(path, mode)
    except ValueError as error:
        raise ValueError(f"run: {path}: {error}") from None


def delete(path: Path) -> None:
    """Delete a file, a folder with its content, or a link without its target.

    No-op if the path does not exist.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_for_good(directory: Path) -> None:
    """Delete a failed checkpoint until it has been gone for two seconds.

    Orbax stops a save at the first file that fails, but its other writes continue and offer nothing to wait for. They
    add files while the folder is being deleted, or recreate it: with 1,500 arrays, up to 0.6 s later.
    """
    times_gone = 0
    for _ in range(60):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
        times_gone = 0 if directory.exists() else times_gone + 1
        if times_gone == 20:
            return


def flush_tree(directory: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for entry in sorted(directory.rglob("*")):
        flush(entry)
    flush(directory)


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and does not need to flush them
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

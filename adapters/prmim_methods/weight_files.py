"""The format of weight files, independent of frameworks."""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prmim_methods.files import open_regular
from prmim_methods.hub import found_or_downloaded
from prmim_methods.messages import shown

METADATA_KEY = "prmim_architecture"
"""Key of the JSON of ``architecture()`` in a file's metadata."""

WEIGHTS_FILE = "weights.safetensors"
"""Name of the weight file in a checkpoint."""
CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the folder of a run."""

RENAMED_FIELDS = {"variant": "reconstruction"}
"""Fields of files from earlier versions, by their current names."""


def architecture_of(method: object) -> dict[str, Any]:
    """Return the architecture of a method; TypeError if it is not a method."""
    architecture = getattr(method, "architecture", None)
    if not callable(architecture):
        raise TypeError(f"method: expected a module with architecture(), got {type(method).__name__}")
    values: dict[str, Any] = architecture()
    return values


def dump_architecture(method: object) -> dict[str, str]:
    """Return the metadata of a method's weight file."""
    # Tensors have PyTorch's layout, and readers for PyTorch require this word.
    return {"format": "pt", METADATA_KEY: json.dumps(architecture_of(method))}


def read_architecture(metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the architecture in the metadata of a file; ValueError if there is none.

    Parameters
    ----------
    metadata
        The metadata of the file.
    path
        The file, for messages.
    """
    try:
        got = json.loads((metadata or {})[METADATA_KEY])
        return {RENAMED_FIELDS.get(field, field): value for field, value in got.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        place = os.fspath(path)
        raise ValueError(f"path: expected weights written by prmim, got {place} without an architecture") from None


def check_architecture(expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raise ValueError with the first different field unless architectures are equal."""
    for field in (*expected, *got):
        ours, theirs = expected.get(field), got.get(field)
        if ours != theirs:
            hint = ""
            if field == "cells" and theirs is None:  # also files older than that option
                hint = "; weights without cells need thrown_target: patch and extra_cells: none"
            if field == "cells" and ours is None:
                hint = "; weights with cells need thrown_target: cells, or extra_cells"
            if (ours, theirs) == ("relative_per_block", "relative"):
                hint = "; earlier versions fine-tuned one bias table for all blocks"
            raise ValueError(f"weights: {shown(field)[1:-1]}: expected {shown(ours)}, got {shown(theirs)}{hint}")


def find_weights(place: str | os.PathLike[str]) -> Path:
    """Return the weight file that a path stands for.

    Parameters
    ----------
    place
        A file; a folder with a file ``weights.safetensors``, such as a checkpoint; the folder of a run, for its newest
        undamaged checkpoint; or a name on the Hugging Face hub, see :func:`prmim_methods.hub.find_folder`.

    Raises
    ------
    FileNotFoundError
        If there is no such path, or no weights in it.
    ImportError, ValueError
        If a name on the hub cannot be downloaded.
    OSError
        If all checkpoints of a run are damaged.

    Warns
    -----
    UserWarning
        If a newer checkpoint is damaged: its weights do not match its ``manifest.json``.
    """
    path = found_or_downloaded(place, "path", (WEIGHTS_FILE,))
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"path: expected a file of weights or the folder of a run, got {path}")
        return path
    if (path / WEIGHTS_FILE).exists():
        return path / WEIGHTS_FILE
    found = sorted(path.glob(f"{CHECKPOINTS}/step_*/{WEIGHTS_FILE}"), key=lambda file: (len(file.parent.name), file))
    for file in reversed(found):
        if not is_damaged(file):
            return file
        warnings.warn(f"the checkpoint {file.parent} is damaged, and an earlier one is used", stacklevel=2)
    if found:
        raise OSError(f"path: expected a good checkpoint in {found[0].parent.parent}, but all are damaged")
    raise FileNotFoundError(f"path: expected {WEIGHTS_FILE} or the checkpoint of a run in {path}, got none")


def is_damaged(file: Path) -> bool:
    """Return whether a file of a checkpoint does not match its ``manifest.json``."""
    try:
        listed = json.loads(file.with_name("manifest.json").read_bytes())["files"][file.name]
        with open_regular(file) as content:
            return bool(hashlib.file_digest(content, "sha256").hexdigest() != listed["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[tuple[int, ...], str, bool]],
    path: str | os.PathLike[str],
) -> None:
    """Raise ValueError unless a file holds exactly the expected tensors.

    Parameters
    ----------
    expected
        Shapes by name.
    got
        Shape, name of the dtype, and whether it is floating-point, by name.
    path
        The file, for messages.
    """
    place = os.fspath(path)
    for name, shape in expected.items():
        if name not in got:
            raise ValueError(f"path: expected a tensor {name!r}, got none in {place}")
        got_shape, dtype, is_floating = got[name]
        if got_shape != shape:
            raise ValueError(f"path: {name}: expected shape {shape}, got {shown(got_shape)} in {place}")
        if not is_floating:
            raise ValueError(f"path: {name}: expected floating-point values, got {dtype} in {place}")
    for name in got:
        if name not in expected:
            raise ValueError(f"path: expected no tensor {shown(name)}, got one in {place}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    ``write`` fills a temporary file in the same folder, which is flushed to disk and then renamed. A killed process can
    leave it behind. Its name has the form ``.NAME.partial-XXXXXXXX``.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

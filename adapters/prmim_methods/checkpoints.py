"""Checkpoint files of any library: one file, shards, or a folder of either.

Reads names and JSON only; the adapters read the tensors.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmim_methods.files import open_regular
from prmim_methods.hub import SAFETENSORS, TORCH, found_or_downloaded
from prmim_methods.messages import one_line, shown
from prmim_methods.weight_files import CHECKPOINTS, WEIGHTS_FILE, find_weights

STANDARD = (
    WEIGHTS_FILE,
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Names of weight files in a folder, ours and those of the hub's libraries; the first existing one is read."""
INDEX = ".index.json"
POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_JSON = 2**26
"""Most bytes read from a JSON file; an index has a line per tensor."""
DOWNLOADED = ("*.json", f"*{SAFETENSORS}")
"""Files to download from a repository on the hub."""
EXPECTED = f"a checkpoint ({SAFETENSORS}, {', '.join(TORCH)}, or a folder with one), a run, or a name on the hub"


@dataclass(frozen=True)
class CheckpointFiles:
    """Files of a checkpoint.

    Parameters
    ----------
    place
        The source, for messages.
    files
        The files of tensors: one, or all shards.
    is_torch
        Whether the format is that of ``torch.save``; otherwise, it is safetensors.
    config
        Content of ``config.json``; empty without one.
    preprocessing
        Content of ``preprocessor_config.json``; empty without one.
    """

    place: str
    files: tuple[Path, ...]
    is_torch: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def find_checkpoint(source: str | os.PathLike[str]) -> CheckpointFiles:
    """Return the files of a checkpoint.

    Parameters
    ----------
    source
        A file of tensors, an index of shards (``*.index.json``), a folder that holds one of them, the folder of a run,
        or a name on the Hugging Face hub. From the hub, only ``.safetensors`` files and JSON are downloaded.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder, or a shard is missing.
    ImportError
        If a name on the hub needs ``huggingface_hub``, which is not installed.
    ValueError
        If the folder holds no checkpoint or several, or the file is no checkpoint: a git-LFS pointer, a pipe, or
        another kind of file.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.pth").write_bytes(b"PK")
    >>> _ = (folder / "config.json").write_text('{"hidden_size": 8}')
    >>> found = find_checkpoint(folder)
    >>> found.files[0].name, found.is_torch, found.config
    ('a.pth', True, {'hidden_size': 8})
    """
    path = find_source(source)
    weights = _candidate(path) if path.is_dir() else path
    files = shards(weights) if weights.name.endswith(INDEX) else (weights,)
    kinds = {_is_torch(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"source: expected shards of one format, got several in {path}")
    config, preprocessing = ({}, {})
    if path.is_dir():
        config, preprocessing = (read_json(path / name) or {} for name in ("config.json", "preprocessor_config.json"))
    return CheckpointFiles(str(path), files, kinds.pop(), config, preprocessing)


def find_source(source: str | os.PathLike[str], argument: str = "source") -> Path:
    """Return the path of a checkpoint; download it if the source is a hub name."""
    path = found_or_downloaded(source, argument, DOWNLOADED)
    if not path.exists():
        raise FileNotFoundError(f"{argument}: expected {EXPECTED}, got {path}, which does not exist")
    return path


def _candidate(folder: Path) -> Path:
    """Return the only checkpoint of a folder, or the newest undamaged one of a run."""
    if (folder / CHECKPOINTS).is_dir():
        return find_weights(folder)
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir())
    indices = [name for name in names if name.endswith(INDEX)]
    found = indices or [name for name in names if name.endswith((SAFETENSORS, *TORCH))]
    if len(found) == 1:
        return folder / found[0]
    got = f"{len(found)} of them, {_listed(found)}; name one file" if found else f"none in {folder}"
    raise ValueError(f"source: expected a folder with one checkpoint, got {got}")


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:3])) + " ..." * (len(names) > 3)


def shards(index: Path, argument: str = "source") -> tuple[Path, ...]:
    """Return the files that an index lists, which are next to it.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the index is corrupt. The messages name the argument.
    """
    names = (read_json(index, argument) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{argument}: expected an object weight_map in {index}, got {shown(names)}")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise FileNotFoundError(f"{argument}: expected the shard {shown(name)} next to {index}, got no such file")
        files.append(index.parent / name)
    return tuple(files)


def _is_torch(path: Path) -> bool:
    """Return whether ``torch.save`` wrote a file; ValueError if it is no checkpoint."""
    try:
        with open_regular(path) as file:
            start = file.read(len(POINTER))
    except ValueError as error:
        raise ValueError(f"source: expected {EXPECTED}, got {path}: {error}") from None
    if start == POINTER:
        raise ValueError(
            f"source: expected {EXPECTED}, got the git-LFS pointer {path}; `git lfs pull` fetches the file"
        )
    if path.suffix == SAFETENSORS:
        return False
    # An archive of torch.save, or a pickle in its old format.
    if path.suffix in TORCH and start.startswith((b"PK", b"\x80")):
        return True
    raise ValueError(f"source: expected {EXPECTED}, got {path}, which is no checkpoint")  # its content may be private


def read_json(path: Path, argument: str = "source") -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file.

    Raises
    ------
    ValueError
        If the path is no regular file, or holds something else; the message names the argument.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(LARGEST_JSON))  # truncated JSON is invalid
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: expected JSON in {path}, got {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: expected a JSON object in {path}, got {type(content).__name__}")
    return content

"""Local folders, or repositories of the Hugging Face hub in their place."""

import importlib
import os
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from prmim_methods.messages import one_line, shown

NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Ends of the names of files of tensors."""


def check_name(source: str, argument: str) -> None:
    """Raise ValueError unless a text has the form of a hub name, ``owner/name``."""
    if not NAME.fullmatch(source):
        raise ValueError(f"{argument}: expected a folder, or a name on the hub (owner/name), got {shown(source)}")


def local_folder(source: str, argument: str, file: str) -> Path | None:
    """Return a local folder, without network access; None if it is not downloaded.

    Parameters
    ----------
    source
        A folder, or a name on the hub, downloaded before.
    argument
        Name of the argument, for messages.
    file
        A file of the folder, whose presence shows that the folder was downloaded.

    Raises
    ------
    ValueError
        If there is no such folder and the text is not a name.
    """
    if Path(source).is_dir():
        return Path(source)
    check_name(source, argument)
    if find_spec("huggingface_hub") is None:  # then nothing was downloaded either
        return None
    found = importlib.import_module("huggingface_hub").try_to_load_from_cache(source, file)
    return Path(found).parent if isinstance(found, str) else None


def find_folder(source: str | Path, argument: str, files: Collection[str]) -> Path:
    """Return a folder, downloaded if the source is a name on the Hugging Face hub.

    Parameters
    ----------
    source
        A folder, or ``owner/name``; the latter needs ``huggingface_hub``, which caches the download.
    argument
        Name of the argument, for messages.
    files
        Names and patterns of the files to download.

    Returns
    -------
    Path

    Raises
    ------
    ImportError
        If ``huggingface_hub`` is needed and not installed.
    ValueError
        If there is no such folder, or it cannot be downloaded.

    Examples
    --------
    >>> find_folder("no name", "teacher", ["config.json"])
    Traceback (most recent call last):
    ...
    ValueError: teacher: expected a folder, or a name on the hub (owner/name), got 'no name'
    """
    if Path(source).is_dir():
        return Path(source)
    check_name(str(source), argument)
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ImportError(
            f"{argument}: expected a folder, or huggingface_hub installed to download a model, got "
            f"{shown(str(source))}; pip install 'prmim[hf]'"
        ) from None
    try:
        return Path(hub.snapshot_download(str(source), allow_patterns=list(files)))
    except Exception as error:  # any error of the client or the network
        expected = "a folder, or a model that can be downloaded"
        raise ValueError(f"{argument}: expected {expected}, got {shown(str(source))} ({one_line(error)})") from None


def found_or_downloaded(source: str | os.PathLike[str], argument: str, files: Collection[str]) -> Path:
    """Return a path; download it if it does not exist and is a name on the hub.

    A text is not a name if its first part is a local folder, or if it ends like a weight file. It is then a mistyped
    path, and returned unchanged. See :func:`find_folder` for parameters and errors.

    Examples
    --------
    >>> found_or_downloaded("weights/mae.pth", "source", ["*.json"]).name
    'mae.pth'
    """
    path = Path(source)
    is_path = path.exists() or path.parent.is_dir() or path.suffix in (SAFETENSORS, *TORCH, ".json")
    return path if is_path or not NAME.fullmatch(os.fspath(source)) else find_folder(path, argument, files)

"""What is known of a teacher before an engine is built: where its files are, if they are here."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from prmim_core.teacher import TeacherConfig
from prmim_core.teacher import read_teacher as read_folder

CONFIG = "config.json"


def read_teacher(name_or_path: str) -> TeacherConfig | None:
    """Read what a teacher is, without the network.

    Parameters
    ----------
    name_or_path
        A folder, or a name on the hub.

    Returns
    -------
    TeacherConfig or None
        None where it is no folder, and not among what was fetched from the hub before.

    Raises
    ------
    ValueError
        If it holds something else than a vision transformer that can teach.
    """
    folder = _folder(name_or_path)
    return None if folder is None else read_folder(folder)


def _folder(name_or_path: str) -> Path | None:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if find_spec("huggingface_hub") is None:  # then nothing was fetched either
        return None
    found = import_module("huggingface_hub").try_to_load_from_cache(name_or_path, CONFIG)
    return Path(found).parent if isinstance(found, str) else None

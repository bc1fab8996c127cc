"""Opening of files without blocking, for regular files only."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import Literal

NOT_REGULAR = "not a regular file, but a pipe, a socket or a device"


def open_regular(path: str | os.PathLike[str], mode: Literal["r", "a"] = "r") -> io.FileIO:
    """Open a regular file, unbuffered, for reading or appending.

    Opening a pipe without a process at its other end would block, and a device may never end.

    Parameters
    ----------
    path
        The file.
    mode
        ``"r"`` or ``"a"``; the latter creates the file if needed.

    Raises
    ------
    ValueError
        If the path is a pipe, a socket or a device.
    OSError
        If the file cannot be opened.
    """
    try:
        file = io.FileIO(path, mode, opener=_open_at_once)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe without a reader
            raise ValueError(NOT_REGULAR) from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(NOT_REGULAR)
    return file


def expanded(path: str) -> Path:
    """Return a path with `~` replaced by the home folder. `~` of an unknown user stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib raises for an unknown user


def _open_at_once(path: str, flags: int) -> int:
    # Without the flag, opening a named pipe waits for its other end. Windows has neither such pipes nor the flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def is_special(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device, or a link to one."""
    return path.exists() and not path.is_file() and not path.is_dir()

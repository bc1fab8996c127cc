"""Output streams that never fail.

A reader that exits, such as `head`, must not end a training.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["keep_output"]


def keep_output() -> None:
    """Make `sys.stdout` and `sys.stderr` discard what cannot be written.

    Writing fails after a closed pipe or a lost terminal, or on a full disk. Metrics and checkpoints do not depend on
    the output. Streams that were closed when the process started are opened on the null device first. Otherwise the
    next file, such as a checkpoint, would get their file descriptor, and libraries that print to descriptor 2 would
    write into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free file descriptor
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  # until exit
    sys.stdout, sys.stderr = _kept(sys.stdout), _kept(sys.stderr)


def _kept(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # a calling program has its own streams
        return stream
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Kept(stream)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Kept(io.RawIOBase):
    """A file that accepts all data, and writes to a stream as far as possible."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream  # whose deletion would close its file
        self._file: Any = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered under python -u
        self.name = stream.name

    def write(self, content: Any) -> int:
        try:
            while (written := self._file.write(content)) is None:  # a full, non-blocking pipe
                select.select([], [self._file], [])
        except OSError:
            return len(content)
        return int(written)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._file.fileno())

    def isatty(self) -> bool:
        return bool(self._file.isatty())

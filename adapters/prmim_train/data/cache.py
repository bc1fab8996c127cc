"""A bounded cache folder for parts of remote files.

All processes and runs of a machine share it. An entry is a file: a checksum, then the content. Entries are created by
renaming and never modified, so readers need no lock. Writers take turns. A damaged entry, for example after a power
failure, counts as missing.
"""

import hashlib
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from prmim_methods.files import expanded
from prmim_methods.messages import printable

__all__ = ["Cache", "open_cache"]

_CHECKSUM = 4  # bytes
_PAGE = 4096  # bytes; file systems allocate whole pages
_KEPT = 0.9  # fraction of the limit that remains after an eviction
_PATIENCE, _POLL = 10.0, 0.005  # seconds to wait for other writers: in total, and between two checks
_PREFIX, _PINNED = 2, ".pinned"
_ENTRY = re.compile(r"[0-9a-f]{30}(\.pinned)?")


@dataclass(frozen=True)
class Cache:
    """A folder of entries with LRU eviction. Created by `open_cache`.

    Parameters
    ----------
    folder : Path
    limit : int
        Maximum number of bytes on disk.

    Notes
    -----
    The file ``total`` holds an upper bound of the bytes in use. If the next entry does not fit, the folder is listed,
    entries are deleted down to 90 % of the limit, and the total is exact again. Pinned entries are deleted last.
    """

    folder: Path
    limit: int

    def get(self, key: str, *, pinned: bool = False) -> bytes | None:
        """Return the content of an entry, or None if it is missing or damaged."""
        path = self._path(key, pinned)
        try:
            entry = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        content = entry[_CHECKSUM:]
        if entry[:_CHECKSUM] == _checksum(content):
            return content
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, content: bytes, *, pinned: bool = False) -> None:
        """Add or replace an entry, unless it is larger than the cache.

        A failure, such as a full disk, is only a warning, since the caller has the content.
        """
        try:
            with self._lock():
                self._put(self._path(key, pinned), _checksum(content) + content)
        except (OSError, Timeout) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            warnings.warn(f"cache: cannot write to {printable(str(self.folder))}: {reason}", stacklevel=2)

    def _put(self, path: Path, entry: bytes) -> None:
        size = _on_disk(len(entry))
        path.unlink(missing_ok=True)  # the total stays too large, until the next eviction
        total = self._total()
        if total is None or total + size > self.limit:
            total = self._evict(size)
        if total + size > self.limit:
            return
        # First the total: a process that is killed in between leaves it too large, which the next eviction corrects.
        (self.folder / "total").write_text(str(total + size))
        partial = self.folder / "partial"
        partial.write_bytes(entry)
        path.parent.mkdir(exist_ok=True)
        partial.replace(path)

    def _total(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.folder / "total").read_text())
        return None

    def _evict(self, size: int) -> int:
        """Delete entries until `size` more bytes fit; return the bytes in use."""
        found = sorted(self._entries())
        total = sum(entry[2] for entry in found)
        if total + size <= self.limit:  # the total was too large
            return total
        for _, _, number, path in found:
            if total + size <= _KEPT * self.limit:
                break
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # of 100,000
                total -= number
        return total

    def _entries(self) -> Iterator[tuple[bool, float, int, str]]:
        """Iterate over the entries: whether it is pinned, last use, bytes on disk, path."""
        for folder in os.scandir(self.folder):
            if not (folder.is_dir(follow_symlinks=False) and len(folder.name) == _PREFIX):
                continue
            for entry in os.scandir(folder):
                if not _ENTRY.fullmatch(entry.name):  # of other programs
                    continue
                with suppress(FileNotFoundError):  # a damaged one that a reader deletes
                    status = entry.stat(follow_symlinks=False)
                    yield entry.name.endswith(_PINNED), status.st_mtime, _on_disk(status.st_size), entry.path

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with FileLock(self.folder / "lock").acquire(timeout=_PATIENCE, poll_interval=_POLL):
            yield

    def _path(self, key: str, pinned: bool) -> Path:
        name = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        return self.folder / name[:_PREFIX] / f"{name[_PREFIX:]}{_PINNED if pinned else ''}"


def open_cache(folder: str | None, limit: int) -> Cache | None:
    """Open a cache; None if `folder` is None.

    Creates the folder, accessible to the user only.

    Parameters
    ----------
    folder : str, optional
        ``~`` stands for the user's folder.
    limit : int
        Maximum number of bytes on disk.

    Raises
    ------
    ValueError
        If the folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> cache = open_cache(tempfile.mkdtemp(), 10**6)
    >>> cache.put("a", b"content")
    >>> cache.get("a"), cache.get("b")
    (b'content', None)
    """
    if folder is None:
        return None
    path = expanded(folder)
    cache = Cache(path.absolute(), limit)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with cache._lock():
            pass
    except (OSError, Timeout) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"cache: expected a folder that can be written to, or null, got {printable(folder)}: {reason}"
        ) from error
    return cache


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM, "little")


def _on_disk(size: int) -> int:
    return -(-size // _PAGE) * _PAGE

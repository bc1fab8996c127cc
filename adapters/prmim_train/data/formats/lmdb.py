"""Encoded images in an LMDB: each key is a name, each value an image file.

The memory map is opened read-only and without a lock. LMDB trusts its files: a damaged one can end the process.
"""

import os
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.config.packages import check_installed
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import MAX_FILE_BYTES, reason_of
from prmim_train.data.names import PackedNames, classes_of_folders

__all__ = ["DATA_FILE", "LMDB_ENDINGS", "LmdbRecords", "open_lmdb"]

DATA_FILE = "data.mdb"
"""File whose presence identifies a folder as an LMDB."""

LMDB_ENDINGS = (".lmdb", ".mdb")
"""Endings of an LMDB that is a single file."""

_PICKLED = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_NOTES = (b"__len__", b"__keys__")  # which some writers add


@dataclass(frozen=True)
class LmdbRecords:
    """Encoded images in an LMDB; see `prmim_train.data.formats.records.Records`.

    Parameters
    ----------
    path : Path
        The folder or the file.
    keys : sequence of str
        Key of each image, decoded like a file name.
    size : int64 array (number of images,)
        Length of each image file, in bytes.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    """

    path: Path
    keys: PackedNames
    size: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def content(self, index: int) -> bytes:
        """Return one value."""
        with _environment(self.path, _stamp(self.path)).begin(buffers=True) as transaction:
            value = transaction.get(os.fsencode(self.keys[index]))
            if value is None or len(value) != self.size[index]:
                raise ValueError("its LMDB changed since it was opened")
            if len(value) > MAX_FILE_BYTES:
                raise ValueError(f"{len(value):,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
            return bytes(value)

    def name(self, index: int) -> str:
        """Return the image's name for messages: its key."""
        return printable(self.keys[index])

    def identities(self) -> Identities:
        """Hash key and size."""
        sizes = self.size.tolist()
        return identities((os.fsencode(f"{key} {size}"), 0) for key, size in zip(self.keys, sizes, strict=True))


def open_lmdb(path: Path) -> tuple[LmdbRecords, str]:
    """Index the images in an LMDB, in the sorted order of the keys.

    Parameters
    ----------
    path : Path
        A folder with `DATA_FILE`, or a file.

    Returns
    -------
    records : LmdbRecords
        Labels come from folders in the keys (``cat/3.jpg``); see `prmim_train.data.names.classes_of_folders`.
    description : str

    Raises
    ------
    ImportError
        If ``lmdb`` is not installed.
    ValueError
        If the file is truncated or no LMDB, if it is empty, or if its values are pickled.
    """
    check_installed("data", "lmdb")
    where = printable(str(path))
    path = path.resolve()  # another spelling would be another environment
    keys, sizes, index = PackedNames(), array("q"), array("q")
    folders: dict[tuple[str, ...], int] = {}  # and its number, for each image in `index`
    try:
        environment = _environment(path, _stamp(path))
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (size := _data_file(path).stat().st_size) < needed:
            raise ValueError(f"truncated: {size:,} bytes, expected {needed:,}")
        with environment.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                if bytes(key) in _NOTES:
                    continue
                if not sizes and bytes(value[:2]) in _PICKLED:
                    raise ValueError("values are pickled Python objects, which can run code; expected image files")
                keys.append(os.fsdecode(bytes(key)))
                sizes.append(len(value))
                folder = tuple(part for part in keys[-1].split("/")[:-1] if part not in ("", ".", ".."))
                index.append(folders.setdefault(folder, len(folders)))
    except Exception as error:  # of lmdb
        raise ValueError(f"data: the LMDB {where}: {reason_of(error)}") from error
    if not sizes:
        raise ValueError(f"data: no images in the LMDB {where}")
    labels, class_names, remark = classes_of_folders(list(folders), np.array(index))
    records = LmdbRecords(path, keys, np.array(sizes, np.int64), labels, class_names)
    return records, f"LMDB {where}: {counted(len(records), 'image')}{remark}"


def _data_file(path: Path) -> Path:
    return path / DATA_FILE if path.is_dir() else path


def _stamp(path: Path) -> tuple[int, int]:
    status = _data_file(path).stat()
    return status.st_ino, status.st_mtime_ns


@lru_cache(maxsize=8)  # a process must not open an LMDB twice
def _environment(path: Path, stamp: tuple[int, int]) -> Any:
    """Open an LMDB, once per process and version of the file."""
    import lmdb

    return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, create=False, readahead=False)

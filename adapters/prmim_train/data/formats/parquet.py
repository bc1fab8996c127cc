"""Images in a column of parquet files, read by row.

Parquet stores rows in groups, and a row cannot be read without its group. Few groups are kept decoded, which bounds
the memory. In shuffled order, each image requires reading a group. Files are treated as untrusted input.
"""

import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.config.packages import check_installed
from prmim_train.data.formats.tables import (
    bytes_of,
    choose_split,
    class_names_of,
    image_column,
    label_column,
    splits_of_names,
    table_classes,
)
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import MAX_FILE_BYTES, read_part, reason_of
from prmim_train.data.storage import File, Place, open_each, open_place

__all__ = ["PARQUET_ENDING", "ParquetRecords", "open_parquet"]

PARQUET_ENDING = ".parquet"

_MAGIC = b"PAR1"
_MAX_FOOTER = 2**28  # bytes
_CACHE_BYTES = 2**28  # of decoded row groups in a process
_SLOW_BYTES = 2**22  # of a row group, when images are read in shuffled order


class _Groups:
    """Cache of the most recently read row groups, decoded.

    Shared by threads; a copy in another process starts empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0
        self.footers: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def get(self, number: int) -> Any:
        """Return a row group; None if it is not cached."""
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
            return self._groups.get(number)

    def add(self, number: int, values: Any) -> None:
        """Add a row group, and drop the oldest ones."""
        with self._lock:
            if number not in self._groups:
                self._groups[number] = values
                self._bytes += values.nbytes
            while self._bytes > _CACHE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class ParquetRecords:
    """Images in a parquet column; see `prmim_train.data.formats.records.Records`.

    Parameters
    ----------
    files : tuple of Path or Address
    column : str
        The column with the images: bytes, or structs with a field ``bytes``.
    footer_crc : tuple of int
        CRC-32 of the footer of each file. Detects files that changed during a run.
    first_row : int64 array (number of row groups + 1,)
        Number of the first image in each row group, over all files, and the number of images.
    file_of_group : int32 array (number of row groups,)
        Index into `files`.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    """

    files: tuple[Place, ...]
    column: str
    footer_crc: tuple[int, ...]
    first_row: NDArray[np.int64]
    file_of_group: NDArray[np.int32]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    _groups: _Groups = field(default_factory=_Groups, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.first_row[-1])

    def content(self, index: int) -> bytes:
        """Return one value of the column. Reads its row group if it is not cached."""
        group = int(np.searchsorted(self.first_row, index, side="right")) - 1
        values = self._groups.get(group)
        if values is None:
            values = self._read(group)
            self._groups.add(group, values)
        value = values[index - int(self.first_row[group])].as_py()
        if value is None:
            raise ValueError("null in place of an image")
        content: bytes = value
        return content

    def _read(self, group: int) -> Any:
        """Return the values of a row group: a pyarrow.ChunkedArray of bytes."""
        number = int(self.file_of_group[group])
        try:
            with open_place(self.files[number]) as file:
                footer = self._groups.footers.get(number)
                if footer is None:
                    if _footer_crc(file) != self.footer_crc[number]:
                        raise ValueError("changed since it was opened")
                    footer = _open(file).metadata
                    self._groups.footers[number] = footer
                place = group - int(np.searchsorted(self.file_of_group, number))
                table = _open(file, footer, repeated=_repeated(footer.row_group(place), self.column))
                return bytes_of(table.read_row_group(place, [self.column], use_threads=False).column(0))
        except ConnectionError:
            raise
        except Exception as error:  # of pyarrow, on damaged files
            raise ValueError(f"its parquet file: {reason_of(error)}") from error

    def name(self, index: int) -> str:
        """Return the image's name for messages: file name, then the number of the row."""
        number, row = self._place(index)
        return printable(f"{self.files[number].name}/{row}")

    def _place(self, index: int) -> tuple[int, int]:
        """Return the file of an image, and its row in that file."""
        number = int(self.file_of_group[int(np.searchsorted(self.first_row, index, side="right")) - 1])
        return number, index - int(self.first_row[int(np.searchsorted(self.file_of_group, number))])

    def identities(self) -> Identities:
        """Hash file name and row.

        The stamp is the checksum of the file's footer, which holds sizes and offsets.
        """
        rows = np.diff(self.first_row[np.searchsorted(self.file_of_group, np.arange(len(self.files) + 1))])
        return identities(
            (os.fsencode(f"{path.name}/{row}"), crc)
            for path, crc, number in zip(self.files, self.footer_crc, rows.tolist(), strict=True)
            for row in range(number)
        )


def open_parquet(
    files: Mapping[Place, str],
    where: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    split: str | None = None,
    for_test: bool = False,
    others: str = "",
) -> tuple[ParquetRecords, str]:
    """Open the images in a column of parquet files.

    Reads the footers and the column of labels.

    Parameters
    ----------
    files : mapping of Path or Address to str
        At least one, and a name of each that may contain the split.
    where : str
        Text of the user, for messages.
    image_key, label_key : str, optional
        The columns; see `prmim_train.data.formats.tables.image_column` and `label_column`.
    split : str, optional
        The split, if the names of all files contain one; see `prmim_train.data.formats.tables.choose_split`.
    for_test : bool, optional
        Whether these are test images.
    others : str, optional
        A phrase about other files in the folder.

    Returns
    -------
    records : ParquetRecords
    description : str

    Raises
    ------
    ImportError
        If pyarrow is not installed.
    ValueError
        If a file is truncated, corrupt or no parquet file, if columns are missing or of other types, or if a row group
        takes more than `MAX_FILE_BYTES`.
    OSError
        If a file cannot be opened.
    """
    check_installed("data", "pyarrow")
    groups = splits_of_names(files)
    chosen = choose_split(list(groups), split, for_test=for_test, where=where)
    paths = groups[chosen] if chosen is not None else list(files)
    column, label = "", None
    crcs, rows, numbers, parts = [], [0], [], []
    names: tuple[str, ...] | None = None
    largest = 0
    opened = open_each(paths, partial(_read_index, label_key=label_key))
    for number, path in enumerate(paths):
        name = printable(str(path))
        with _named_errors(name):
            file = next(opened)
            crcs.append(_footer_crc(file))
            table = _open(file)
            schema = table.schema_arrow
        if number == 0:
            column, label = image_column(schema, image_key, name), label_column(schema, label_key, name)
            names = class_names_of(schema, label)
        else:
            image_column(schema, column, name)
            label_column(schema, label, name)
            if class_names_of(schema, label) != names:
                raise ValueError(f"data: the parquet file {name}: other class names than in {printable(str(paths[0]))}")
        with _named_errors(name):
            for group in range(table.metadata.num_row_groups):
                number_of_rows, size = _group_size(table.metadata.row_group(group), column, file.seek(0, io.SEEK_END))
                largest = max(largest, size)
                rows.append(rows[-1] + number_of_rows)
                numbers.append(number)
            if label is not None:
                parts.append(table.read([label], use_threads=False).column(0))
    if not rows[-1]:
        raise ValueError(f"data: no rows in {where}")
    classes = table_classes(parts, names, label, rows[-1], is_wanted=label_key is not None)
    records = ParquetRecords(
        files=tuple(paths),
        column=column,
        footer_crc=tuple(crcs),
        first_row=np.array(rows, np.int64),
        file_of_group=np.array(numbers, np.int32),
        labels=classes.labels,
        class_names=classes.class_names,
    )
    return records, (
        f"{where}: {counted(len(records), 'image')}{classes.remark}, column {printable(column)}"
        + (f", split {chosen}" if chosen is not None else "")
        + (
            f", row groups of up to {largest / 2**20:.0f} MB (slow: see docs/guides/data.md)"
            if largest > _SLOW_BYTES
            else ""
        )
        + others
    )


def _read_index(file: File, label_key: str | None) -> None:
    """Read the parts of a file that `open_parquet` needs."""
    _footer_crc(file)
    table = _open(file)
    with suppress(ValueError):  # which `open_parquet` raises with the name of the file
        label = label_column(table.schema_arrow, label_key, "")
        if label is not None:
            table.read([label], use_threads=False)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"data: the parquet file {name}: {error}") from error
    except OSError as error:
        if error.errno is not None:  # errors of pyarrow have none
            raise
        raise ValueError(f"data: the parquet file {name}: {reason_of(error)}") from error
    except Exception as error:  # of pyarrow, on damaged files
        raise ValueError(f"data: the parquet file {name}: {reason_of(error)}") from error


def _footer_crc(file: File) -> int:
    """Return the CRC-32 of a file's footer; ValueError without one."""
    size = file.seek(0, io.SEEK_END)
    end = read_part(file, max(0, size - 8), 8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC:
        raise ValueError("truncated, encrypted or no parquet file")
    if length + 12 > size or length > _MAX_FOOTER:
        raise ValueError(f"damaged: a footer of {length:,} bytes in a file of {size:,}")
    return zlib.crc32(read_part(file, size - 8 - length, length))


def _open(file: File, footer: Any = None, repeated: Sequence[str] = ()) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file, metadata=footer, read_dictionary=repeated, page_checksum_verification=True)


def _chunks(group: Any, column: str) -> list[Any]:
    """Return the footer's entries for a column of a row group: one, or one for each field of a struct."""
    entries = (group.column(k) for k in range(group.num_columns))
    return [entry for entry in entries if f"{entry.path_in_schema}.".startswith(f"{column}.")]


def _repeated(group: Any, column: str) -> list[str]:
    """Return the column of bytes if the row group stores equal values once.

    It is read so, too. Otherwise, repeated values could take much more memory than their row group.
    """
    return [
        chunk.path_in_schema
        for chunk in _chunks(group, column)
        if chunk.path_in_schema in (column, f"{column}.bytes") and _DICTIONARY.issuperset(chunk.encodings)
    ]


_DICTIONARY = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}  # pyarrow reads no others so


def _group_size(group: Any, column: str, file_size: int) -> tuple[int, int]:
    """Return rows and bytes of a column in a row group, uncompressed, with equal values stored once.

    Read from the footer; impossible values raise ValueError.
    """
    size = sum(chunk.total_uncompressed_size for chunk in _chunks(group, column))
    if not 0 <= group.num_rows <= file_size:  # an image takes at least a byte
        raise ValueError(f"damaged: a row group of {group.num_rows:,} rows in a file of {file_size:,} bytes")
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"a row group of {size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}; write it again with a smaller "
            "row_group_size"
        )
    return group.num_rows, size

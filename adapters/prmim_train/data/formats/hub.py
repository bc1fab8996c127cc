"""Data sets of Hugging Face ``datasets``, from the hub or from ``save_to_disk``.

They are Arrow files, mapped into memory: any row can be read without the others.
"""

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.files import expanded
from prmim_methods.messages import counted, one_line, printable
from prmim_train.config.packages import check_installed
from prmim_train.data.formats.tables import (
    bytes_of,
    choose_split,
    class_names_of,
    image_column,
    label_column,
    paths_of,
    table_classes,
)
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import read_file

__all__ = ["HUB", "HubRecords", "open_hub"]

HUB = "hf:"
"""Prefix of such a data set on the command line."""

_AT_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?")


@dataclass(frozen=True)
class HubRecords:
    """Images in a data set's column; see `prmim_train.data.formats.records.Records`.

    Parameters
    ----------
    dataset : datasets.Dataset
        Its only column holds the images; rows are Arrow tables.
    title : str
        For the names of the images.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    """

    dataset: Any
    title: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def content(self, index: int) -> bytes:
        """Return one value of the column, or the content of its file if it holds a path."""
        column = self.dataset[index].column(0)
        content: bytes | None = bytes_of(column)[0].as_py()
        if content is not None:
            return content
        path = paths_of(column)[0].as_py()
        if path is None:
            raise ValueError("null in place of an image")
        return read_file(path)

    def name(self, index: int) -> str:
        """Return the image's name for messages: data set, split and row."""
        return printable(f"{self.title}/{index}")

    def identities(self) -> Identities:
        """Hash row, path and size; reads no image.

        The stamp is a checksum over all sizes.
        """
        import pyarrow.compute as compute

        column = self.dataset[:].column(0)
        sizes = compute.binary_length(bytes_of(column)).fill_null(-1).to_numpy().astype(np.int64)
        stamp = zlib.crc32(sizes.tobytes())
        known = zip(paths_of(column).to_pylist(), sizes.tolist(), strict=True)
        return identities((os.fsencode(f"{row} {path} {size}"), stamp) for row, (path, size) in enumerate(known))


def open_hub(
    name: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    split: str | None = None,
    for_test: bool = False,
) -> tuple[HubRecords, str]:
    """Open a data set of Hugging Face ``datasets``. Runs no code of the data set.

    Parameters
    ----------
    name : str
        A folder that ``save_to_disk`` wrote, or ``owner/name`` or ``owner/name/configuration`` on the hub.
    image_key, label_key : str, optional
        The columns; see `prmim_train.data.formats.tables.image_column` and `label_column`.
    split : str, optional
        See `prmim_train.data.formats.tables.choose_split`.
    for_test : bool, optional
        Whether these are test images.

    Returns
    -------
    records : HubRecords
    description : str

    Raises
    ------
    ImportError
        If ``datasets`` is not installed.
    ValueError
        If there is no such data set, or it cannot be loaded or has no images.
    """
    check_installed("data", "datasets")
    where = printable(f"{HUB}{name}")
    dataset, chosen = _load(name, split, for_test, where)
    schema = dataset.features.arrow_schema
    column, label = image_column(schema, image_key, where), label_column(schema, label_key, where)
    if not len(dataset):
        raise ValueError(f"data: no rows in {where}")
    dataset = dataset.with_format("arrow")
    parts = [] if label is None else [dataset.select_columns([label])[:].column(0)]
    names = class_names_of(schema, label)
    classes = table_classes(parts, names, label, len(dataset), is_wanted=label_key is not None)
    title = Path(name).name if chosen is None else f"{Path(name).name}/{chosen}"
    records = HubRecords(dataset.select_columns([column]), title, classes.labels, classes.class_names)
    taken = "" if chosen is None else f", split {printable(chosen)}"
    return records, (
        f"data set {where}: {counted(len(records), 'image')}{classes.remark}, column {printable(column)}{taken}"
    )


def _load(name: str, split: str | None, for_test: bool, where: str) -> tuple[Any, str | None]:
    """Return a data set and its split."""
    import datasets

    folder = expanded(name)
    if folder.is_dir():
        with _one_line(where):
            found = datasets.load_from_disk(str(folder))
        if not isinstance(found, datasets.DatasetDict):
            return found, choose_split([], split, for_test=for_test, where=where)
        chosen = choose_split(list(found), split, for_test=for_test, where=where)
        return found[chosen], chosen
    at_hub = _AT_HUB.fullmatch(name)
    if at_hub is None:
        raise FileNotFoundError(f"data: nothing at {where}; expected {HUB}FOLDER or {HUB}OWNER/NAME")
    with _one_line(where):
        splits = datasets.get_dataset_split_names(*at_hub.groups())
    chosen = choose_split(splits, split, for_test=for_test, where=where)
    with _one_line(where):
        return datasets.load_dataset(*at_hub.groups(), split=chosen), chosen


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, of the hub, or of damaged files
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"data: expected a data set in a folder or on the hub, got {where} ({reason})") from error

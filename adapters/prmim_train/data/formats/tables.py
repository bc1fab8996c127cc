"""Columns of tables: selection of the images, the labels and the split."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.data.names import MAX_CLASS_NAME, MAX_CLASSES, UNLABELLED, Classes

__all__ = [
    "bytes_of",
    "choose_split",
    "class_names_of",
    "image_column",
    "label_column",
    "paths_of",
    "splits_of_names",
    "table_classes",
]

T = TypeVar("T")

_LABEL_KEYS = ("label", "labels", "cls", "class", "class_id", "class_name", "fine_label")
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "validation", "valid", "val", "dev")
_NUM_LISTED = 20


def image_column(schema: Any, image_key: str | None, where: str) -> str:
    """Return the name of the column with encoded images.

    Parameters
    ----------
    schema : pyarrow.Schema
    image_key : str, optional
        The column. None: the only one of a suitable type.
    where : str
        The table, for messages.

    Raises
    ------
    ValueError
        If there is no such column, or if several are suitable; the message lists the columns.
    """
    fits = [field.name for field in schema if _holds_bytes(field.type)]
    if image_key is None and len(fits) == 1:
        return str(fits[0])
    if image_key is not None and image_key in fits:
        return image_key
    listed = _listed(schema)
    if image_key is None and fits:
        raise ValueError(f"image_key: expected one of {', '.join(map(printable, fits))} in {where}, got null: {listed}")
    wanted = "a column" if image_key is None else f"a column {image_key}"
    raise ValueError(f"image_key: expected {wanted} of image bytes in {where}, got {listed}")


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _listed(schema: Any) -> str:
    columns = [printable(f"{field.name} {' '.join(str(field.type).split())[:80]}") for field in schema]
    more = f", and {len(columns) - _NUM_LISTED:,} more" if len(columns) > _NUM_LISTED else ""
    return f"the columns {', '.join(columns[:_NUM_LISTED])}{more}" if columns else "no columns"


def label_column(schema: Any, label_key: str | None, where: str) -> str | None:
    """Return the name of the column with classes; None if there is none.

    Parameters
    ----------
    schema : pyarrow.Schema
    label_key : str, optional
        The column. None: the first with a usual name and a suitable type.
    where : str
        The table, for messages.

    Raises
    ------
    ValueError
        If there is no column `label_key`, or if it holds neither integers nor text.
    """
    fits = {field.name for field in schema if _holds_classes(field.type)}
    if label_key is None:
        return next((name for name in _LABEL_KEYS if name in fits), None)
    if label_key not in fits:
        raise ValueError(
            f"label_key: expected a column {label_key} of integers or text in {where}, got {_listed(schema)}"
        )
    return label_key


def _holds_classes(kind: Any) -> bool:
    import pyarrow.types as kinds

    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return bool(kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind))


def class_names_of(schema: Any, column: str | None) -> tuple[str, ...] | None:
    """Return the class names stored by Hugging Face ``datasets``; None without any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    is_list = isinstance(names, list) and len(names) < MAX_CLASSES and all(isinstance(name, str) for name in names)
    return tuple(printable(name[:MAX_CLASS_NAME]) for name in names) if is_list else None


def bytes_of(values: Any) -> Any:
    """Return a column of images as bytes. For structs, the field ``bytes``."""
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    return compute.struct_field(values, "bytes") if kinds.is_struct(values.type) else values


def paths_of(values: Any) -> Any:
    """Return the paths in a column of images; nulls if there are none."""
    import pyarrow as pa
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    if kinds.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        return compute.struct_field(values, "path")
    return pa.nulls(len(values), pa.string())


def table_classes(
    parts: Sequence[Any], names: tuple[str, ...] | None, column: str | None, number: int, *, is_wanted: bool
) -> Classes:
    """Return the classes in a column.

    Parameters
    ----------
    parts : sequence of pyarrow.ChunkedArray
        The column, in parts.
    names : tuple of str, optional
        Names of the classes, for integers.
    column : str, optional
        Its name. None: no labels.
    number : int
        Number of images.
    is_wanted : bool
        Whether the user named this column. Otherwise, a column without classes means no labels.

    Returns
    -------
    Classes
        Null and -1 are images without class.

    Raises
    ------
    ValueError
        If the values are not classes.
    """
    if column is None:
        return Classes(None, None, ", no labels")
    try:
        labels, class_names = _classes(parts, names)
        if len(labels) != number:
            raise ValueError(f"{number:,} values, got {len(labels):,}")
    except ValueError as error:
        if is_wanted:
            raise ValueError(f"label_key: expected in the column {printable(column)} {error}") from error
        return Classes(None, None, f", no labels (in the column {printable(column)}, expected {error})")
    unlabelled = int(np.count_nonzero(labels == UNLABELLED))
    if unlabelled == number:
        return Classes(None, None, ", no labels")
    without = f", {counted(unlabelled, 'image')} without class" if unlabelled else ""
    remark = f" in {counted(len(class_names), 'class', 'classes')}{without}"
    return Classes(labels, class_names, remark)


def _classes(parts: Sequence[Any], names: tuple[str, ...] | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels and class names of a column.

    Raises ValueError with the expected content.
    """
    import pyarrow as pa
    import pyarrow.types as kinds

    values = pa.chunked_array([chunk for part in parts for chunk in _plain(part).chunks], _plain(parts[0]).type)
    if kinds.is_integer(values.type):
        last = len(names) - 1 if names is not None else MAX_CLASSES - 1
        numbers = values.cast(pa.int64(), safe=False).fill_null(UNLABELLED).to_numpy()
        wrong = np.flatnonzero((numbers < UNLABELLED) | (numbers > last))
        if len(wrong):
            raise ValueError(f"classes from 0 to {last:,}, got {values[int(wrong[0])]} in row {wrong[0]:,}")
        return numbers, names or tuple(str(k) for k in range(int(numbers.max(initial=-1)) + 1))
    codes = values.combine_chunks().dictionary_encode()
    found = [printable(name[:MAX_CLASS_NAME]) for name in codes.dictionary.to_pylist()]
    class_names = tuple(sorted(set(found)))
    if len(class_names) > MAX_CLASSES:
        raise ValueError(f"at most {MAX_CLASSES:,} classes, got {len(class_names):,}")
    number_of = {name: k for k, name in enumerate(class_names)}
    table = np.array([*(number_of[name] for name in found), UNLABELLED], np.int64)
    return table[codes.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)], class_names


def _plain(values: Any) -> Any:
    import pyarrow.types as kinds

    return values.cast(values.type.value_type) if kinds.is_dictionary(values.type) else values


def choose_split(found: Sequence[str], split: str | None, *, for_test: bool, where: str) -> str | None:
    """Return the split to take; None if there are no splits.

    Parameters
    ----------
    found : sequence of str
        Existing splits.
    split : str, optional
        Requested split. None: test or validation for test images, else train.
    for_test : bool
        Whether the images are test images.
    where : str
        For messages.

    Raises
    ------
    ValueError
        If there is no such split, or the choice is ambiguous.

    Examples
    --------
    >>> choose_split(["test", "train"], None, for_test=False, where="photos")
    'train'
    """
    listed = ", ".join(map(printable, found[:_NUM_LISTED])) or "no splits"
    if split is not None:
        if split not in found:
            raise ValueError(f"split: expected a split in {where}, which has {listed}, got {split}")
        return split
    if len(found) < 2:
        return found[0] if found else None
    preferred = _TEST if for_test else _TRAIN
    chosen = next((name for name in preferred if name in found), None)
    if chosen is None:
        raise ValueError(f"split: expected one of {listed} in {where}, got null")
    return chosen


def splits_of_names(files: Mapping[T, str]) -> dict[str, list[T]]:
    """Group files by the split in their names.

    Examples: ``train-00000-of-00005.parquet``, ``test/0000.parquet``. Returns no splits if a name has none.
    """
    groups: dict[str, list[T]] = {}
    for file, name in files.items():
        words = re.split(r"[/\\_.-]", name.lower())
        split = next((word for word in words if word in (*_TRAIN, *_TEST)), None)
        if split is None:
            return {}
        groups.setdefault(split, []).append(file)
    return groups

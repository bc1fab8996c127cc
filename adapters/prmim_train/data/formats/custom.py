"""Images from a custom function: `--data package.module:function`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, one_line, printable
from prmim_methods.record import load_function
from prmim_train.data.identity import Identities
from prmim_train.data.names import UNLABELLED

__all__ = ["CustomRecords", "open_custom"]

_METHODS = ("__len__", "content", "name", "identities")


@dataclass(frozen=True)
class CustomRecords:
    """Records from a user's function; see `prmim_train.data.formats.records.Records`.

    Worker processes get the import path and call the function again.

    Parameters
    ----------
    path : str
        The import path of the function.
    records : object
        Return value of the function.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    """

    path: str
    records: Any
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.path, self.labels, self.class_names)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def content(self, index: int) -> bytes | NDArray[Any]:
        """Return the content from the user's method.

        Raises TypeError if it is neither bytes nor an array.
        """
        content = self.records.content(index)
        if not isinstance(content, bytes | np.ndarray):
            raise TypeError(f"content: expected bytes or an array, got {type(content).__name__}")
        return content

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        return printable(str(self.records.name(index)))

    def identities(self) -> Identities:
        """Return the identities from the user's method."""
        found: Identities = self.records.identities()
        return found


def open_custom(path: str) -> tuple[CustomRecords, str]:
    """Call a user's function, and validate its return value.

    Parameters
    ----------
    path : str
        Import path: ``package.module:function``. The function takes no argument, and returns the same images each time.

    Returns
    -------
    records : CustomRecords
    description : str

    Raises
    ------
    ValueError
        If there is no such function, or its return value is not `prmim_train.data.formats.records.Records`.
    """
    found = _load(path, None, None).records
    missing = [name for name in _METHODS if not callable(getattr(found, name, None))]
    if missing:
        raise _wrong(path, f"an object with the methods {', '.join(_METHODS)}", f"{_kind(found)} without {missing[0]}")
    with _named_errors(path):
        number, known = len(found), found.identities()
        given, names = getattr(found, "labels", None), getattr(found, "class_names", None)
    if not number:
        raise _wrong(path, "at least one image", "0")
    try:
        content, name = found.content(0), found.name(0)
    except Exception:  # an unreadable image, counted with the others
        content, name = b"", ""
    if not isinstance(content, bytes | np.ndarray):
        raise _wrong(path, "bytes or an array from content(0)", _kind(content))
    if not isinstance(name, str):
        raise _wrong(path, "text from name(0)", _kind(name))
    _check_identities(path, known, number)
    if given is None:
        return CustomRecords(path, found), f"{path}: {counted(number, 'image')}, no labels"
    labels, class_names = _classes(path, given, names, number)
    remark = f" in {counted(len(class_names), 'class', 'classes')}"
    return CustomRecords(path, found, labels, class_names), f"{path}: {counted(number, 'image')}{remark}"


def _load(path: str, labels: NDArray[np.int64] | None, class_names: tuple[str, ...] | None) -> CustomRecords:
    function = load_function("data", path)
    with _named_errors(path):
        return CustomRecords(path, function(), labels, class_names)


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the user's code raises
        raise ValueError(one_line(f"data: {path} failed ({type(error).__name__}: {error})")) from error


def _check_identities(path: str, found: Any, number: int) -> None:
    try:
        keys, stamps = found
        is_right = (keys.dtype, keys.shape, stamps.dtype, stamps.shape) == (np.uint64, (number,), np.int64, (number,))
    except (TypeError, ValueError, AttributeError):
        is_right = False
    if not is_right:
        raise _wrong(path, f"prmim_train.data.identity.identities of {number:,} images from identities()", _kind(found))


def _classes(path: str, given: Any, names: Any, number: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels and class names in their canonical form."""
    labels = np.asarray(given)
    if labels.shape != (number,) or labels.dtype.kind not in "iu":
        raise _wrong(path, f"{number:,} whole numbers as labels", f"{labels.dtype} {labels.shape}")
    last = int(labels.max())
    names = tuple(str(k) for k in range(last + 1)) if names is None else tuple(names)
    if last >= len(names) or labels.min() < UNLABELLED or not all(isinstance(name, str) for name in names):
        raise _wrong(
            path, "labels from -1 (unlabelled), and a name for each", f"{last} and {counted(len(names), 'name')}"
        )
    return labels.astype(np.int64), tuple(map(printable, names))


def _kind(value: Any) -> str:
    return type(value).__name__


def _wrong(path: str, expected: str, got: str) -> ValueError:
    return ValueError(one_line(f"data: expected {expected} from {path}, got {got}"))

"""File names and class names of many images."""

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import printable

__all__ = ["MAX_CLASSES", "PackedNames", "number_classes"]

MAX_CLASSES = 2**20
"""Labels must be smaller than this; larger ones are treated as errors in the data."""


class PackedNames(Sequence[str]):
    """Sequence of file names, stored in one byte string.

    A list of strings takes about 100 bytes per name, again in every worker process; this takes the length of the name
    plus 8 bytes, and is fast to pickle.

    Parameters
    ----------
    names : iterable of str, optional
        Any file names; bytes that are not UTF-8 (surrogate escapes) are preserved.

    Examples
    --------
    >>> names = PackedNames(f"cat/{k}.jpg" for k in range(1000))
    >>> names.append("dog/0.jpg")
    >>> len(names), names[7], names[-1], names[998:]
    (1001, 'cat/7.jpg', 'dog/0.jpg', ['cat/998.jpg', 'cat/999.jpg', 'dog/0.jpg'])
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Append a name."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or a list of names for a slice."""
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[k] for k in place]
        return os.fsdecode(bytes(self._bytes[self._ends[place - 1] if place else 0 : self._ends[place]]))


def number_classes(names: Iterable[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return a class number for each item, in the sorted order of the class names.

    Parameters
    ----------
    names : iterable of str
        Class of each item.

    Returns
    -------
    labels : int64 array (number of items,)
    class_names : tuple of str
        Sorted; made printable.

    Examples
    --------
    >>> labels, class_names = number_classes(["dog", "cat", "dog"])
    >>> labels.tolist(), class_names
    ([1, 0, 1], ('cat', 'dog'))
    """
    names = list(names)
    class_names = sorted(set(names))
    number = {name: k for k, name in enumerate(class_names)}
    return np.array([number[name] for name in names], np.int64), tuple(printable(name) for name in class_names)

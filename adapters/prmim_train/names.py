"""Many file names in little memory."""

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

__all__ = ["PackedNames"]


class PackedNames(Sequence[str]):
    """File names one after the other in one run of bytes: a fraction of the memory of a list, and soon pickled.

    A list takes about a hundred bytes for each name, once more in every worker process, and there may be millions.

    Parameters
    ----------
    names : iterable of str, optional
        Any that a file may have: bytes that are no UTF-8 come back as they were.

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
        """Add a name at the end."""
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
        """Return a name, or a list of some."""
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[k] for k in place]
        return os.fsdecode(bytes(self._bytes[self._ends[place - 1] if place else 0 : self._ends[place]]))

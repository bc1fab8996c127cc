"""File names and class names of many images."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable

__all__ = [
    "MAX_CLASSES",
    "MAX_CLASS_NAME",
    "UNLABELLED",
    "Classes",
    "PackedNames",
    "classes_of_folders",
    "ending_of",
    "expand_braces",
    "skipped",
]

MAX_CLASSES = 2**20
"""Upper bound of labels, exclusive. Larger labels are errors in the data."""

MAX_CLASS_NAME = 1000
"""Maximum number of characters of a class name."""

UNLABELLED = -1
"""Label of an image without a class, in a source that has classes."""

_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|eval|test|testing)\d*", re.IGNORECASE)
_MAX_STRAY = 0.01  # share of images outside the class folders; one is always tolerated
_NUM_ENDINGS = 4

MAX_NAMES = 2**20
"""Maximum number of names from the braces of a pattern."""

_BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{},]*(?:,[^{},]*)+))\}")


class PackedNames(Sequence[str]):
    """Sequence of file names, stored in one byte string.

    A list of strings takes about 100 bytes per name, in every worker process. This class takes the length of the name
    plus 8 bytes, and pickles fast.

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


class Classes(NamedTuple):
    """Classes of images by their folders.

    Parameters
    ----------
    labels : int64 array (number of images,) or None
        Class number of each image, or `UNLABELLED`; None without classes.
    class_names : tuple of str or None
        Sorted; made printable.
    remark : str
        A phrase for the description of the source.
    """

    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    remark: str


def classes_of_folders(folders: Sequence[tuple[str, ...]], index: NDArray[np.integer]) -> Classes:
    """Return the classes of images that lie in folders.

    The class is the first folder below the folders that all images share. If these folders are splits (at least two of
    ``train``, ``val``, ``test``, ...), the classes are the folders inside them. Images outside the class
    folders are unlabelled. There are no labels if more than 1 % of the images are unlabelled (one is always tolerated),
    or if there is a single class.

    Parameters
    ----------
    folders : sequence of tuples of str
        Distinct folders, as parts of paths. At least one.
    index : int array (number of images,)
        Folder of each image.

    Returns
    -------
    Classes

    Examples
    --------
    >>> folders = [("train", "cat"), ("train", "dog"), ("val", "cat"), ()]
    >>> labels, class_names, remark = classes_of_folders(folders, np.array([0, 1, 2, 3]))
    >>> labels.tolist(), class_names, remark
    ([0, 1, 0, -1], ('cat', 'dog'), ' in 2 classes in the folders train and val, 1 image without class')
    """
    counts = np.bincount(index, minlength=len(folders))
    names, splits = _class_names(folders, counts)
    class_names = sorted({name for name in names if name is not None})
    if len(class_names) < 2:
        return Classes(None, None, ", no labels")
    number = {name: k for k, name in enumerate(class_names)}
    of_folder = np.array([UNLABELLED if name is None else number[name] for name in names], np.int64)
    labels: NDArray[np.int64] = of_folder[index]
    unlabelled = int(np.count_nonzero(labels == UNLABELLED))
    inside = f" in the folders {' and '.join(splits)}" if splits else ""
    without = f", {counted(unlabelled, 'image')} without class" if unlabelled else ""
    remark = f" in {len(class_names):,} classes{inside}{without}"
    return Classes(labels, tuple(printable(name) for name in class_names), remark)


def _class_names(folders: Sequence[tuple[str, ...]], counts: NDArray[np.integer]) -> tuple[list[str | None], list[str]]:
    """Return each folder's class, or None, and the splits that contain the classes."""
    rest = {k: folder for k, folder in enumerate(folders) if counts[k]}
    tolerated = max(1, _MAX_STRAY * int(counts.sum()))
    level = _shared(rest.values())
    while stray := [k for k, folder in rest.items() if len(folder) == level]:  # pictures beside folders
        tolerated -= sum(int(counts[k]) for k in stray)
        if tolerated < 0 or len(stray) == len(rest):
            return [None] * len(folders), []
        rest = {k: folder for k, folder in rest.items() if k not in stray}
        level = _shared(rest.values())
    heads = sorted({folder[level] for folder in rest.values()})
    splits = heads if len(heads) > 1 and all(_SPLIT.fullmatch(head) for head in heads) else []
    level += bool(splits)
    return [folder[level] if k in rest and len(folder) > level else None for k, folder in enumerate(folders)], splits


def _shared(folders: Iterable[tuple[str, ...]]) -> int:
    """Return the number of leading folders that all paths share."""
    folders = list(folders)
    first, last = min(folders), max(folders)  # the common prefix of these two is that of all folders
    return next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def ending_of(name: str) -> str:
    """Return the ending of a file name in lower case.

    Both parts of ``.tar.gz`` and ``.nii.gz``.

    Examples
    --------
    >>> ending_of("cat.JPG"), ending_of("a.tar.gz"), ending_of("LICENSE")
    ('.jpg', '.tar.gz', 'no ending')
    """
    stem, ending = os.path.splitext(name.lower())  # noqa: PTH122  # of names that are no paths here
    inner = next((part for part in (".tar", ".nii") if stem.endswith(part) and ending), "")
    return inner + ending or "no ending"


def expand_braces(pattern: str) -> list[str]:
    """Expand lists and ranges in braces, as shells do; other braces stay.

    Raises
    ------
    ValueError
        If there would be more than `MAX_NAMES` names.

    Examples
    --------
    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    >>> expand_braces("a{1}.tar")
    ['a{1}.tar']
    """
    names = [""]
    place = 0
    for braces in _BRACES.finditer(pattern):
        literal, place = pattern[place : braces.start()], braces.end()
        first, last, listed = braces.groups()
        if listed is None and abs(int(last) - int(first)) * len(names) > MAX_NAMES:
            raise ValueError(f"data: expected at most {MAX_NAMES:,} names, got {printable(pattern)}")
        choices = listed.split(",") if listed is not None else _range(first, last)
        names = [f"{name}{literal}{choice}" for name in names for choice in choices]
        if len(names) > MAX_NAMES:
            raise ValueError(f"data: expected at most {MAX_NAMES:,} names, got {printable(pattern)}")
    return [name + pattern[place:] for name in names]


def _range(first: str, last: str) -> list[str]:
    """Return the numbers from first to last, padded like these."""
    is_padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    start, stop = int(first), int(last)
    step = 1 if stop >= start else -1
    return [f"{number:0{width}}" for number in range(start, stop + step, step)]


def skipped(endings: Counter[str], what: str = "other file") -> str:
    """Return the number of skipped files by ending, as text; empty if there are none.

    Examples
    --------
    >>> skipped(Counter({".txt": 12, ".heic": 4}))
    ', 16 other files skipped (.txt 12, .heic 4)'
    """
    number = endings.total()
    if not number:
        return ""
    listed = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{printable(ending)} {count:,}" for ending, count in listed[:_NUM_ENDINGS]]
    more = ["..."] if len(listed) > _NUM_ENDINGS else []
    return f", {counted(number, what)} skipped ({', '.join(named + more)})"

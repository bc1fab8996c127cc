"""Files below a folder, and files of a pattern."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prmim_methods.messages import printable
from prmim_train.data.names import expand_braces

__all__ = ["Parts", "matches", "walk", "with_endings"]

Parts = tuple[str, ...]
"""Path of a file below a folder, in parts."""


def with_endings(files: Sequence[Parts], endings: tuple[str, ...]) -> list[Parts]:
    """Return the files whose names have one of these endings, in upper or lower case."""
    return [parts for parts in files if parts[-1].lower().endswith(endings)]


def matches(pattern: str) -> list[Path]:
    """Return the files of a pattern, sorted.

    Raises FileNotFoundError if one of the names in braces matches none.
    """
    names = expand_braces(pattern)
    found = {name: glob.glob(name, recursive=True) for name in names}  # noqa: PTH207  # absolute patterns
    missing = [name for name in names if not found[name]]
    if missing and len(names) > 1:
        listed = ", ".join(printable(name) for name in missing[:_NUM_NAMED]) + ", ..." * (len(missing) > _NUM_NAMED)
        raise FileNotFoundError(
            f"data: {len(missing):,} of {len(names):,} files of {printable(pattern)} are missing: {listed}"
        )
    return sorted({Path(path) for paths in found.values() for path in paths})


_NUM_NAMED = 3


_Place = tuple[Parts, str]  # parts below the folder of the source, and the path


def walk(folder: Path) -> Iterator[Parts]:
    """Iterate over the paths, in parts, of all files that are not hidden.

    Follows links; visits each folder once.
    """
    # First all folders without a link on the way, then those behind one link, and so on. Then the paths do not depend
    # on the order of the system's listing.
    starts: list[_Place] = [((), str(folder))]
    visited: set[str] = set()
    while starts:
        links: list[_Place] = []
        for start in sorted(starts):
            yield from _walk_plain(start, visited, links)
        starts = links


def _walk_plain(start: _Place, visited: set[str], links: list[_Place]) -> Iterator[Parts]:
    """Iterate over the files below an unvisited folder.

    Appends links to folders to `links`.
    """
    stack = [start]  # trees can be deeper than Python's recursion
    while stack:
        parts, path = stack.pop()
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        with os.scandir(path) as entries:
            for entry in entries:
                inner = (*parts, entry.name)
                if entry.name.startswith("."):
                    continue
                if _is(entry.is_dir):
                    (links if entry.is_symlink() else stack).append((inner, entry.path))
                elif _is(entry.is_file) or _leads_nowhere(entry):
                    yield inner


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a circular link, or no permission for a folder on the way
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    """Whether a link is broken or its target inaccessible.

    Such images are not skipped, but count as unreadable.
    """
    return entry.is_symlink() and not _is(lambda: bool(entry.stat()))

"""Measured numbers in pages: blocks between markers, and columns of tables.

A block stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. Pages are rewritten atomically.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from prmim_methods.weight_files import write_atomically


def replace_block(page: str, name: str, text: str) -> str:
    """Return a page with another text between the markers of a block.

    Raises
    ------
    ValueError
        If the page does not have exactly one such block.

    Examples
    --------
    >>> replace_block("a <!-- gpu -->old<!-- /gpu --> b", "gpu", "new")
    'a <!-- gpu -->new<!-- /gpu --> b'
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, *rest = page.split(begin)
    if len(rest) != 1 or rest[0].count(end) != 1:
        raise ValueError(f"page: expected one block from {begin} to {end}, got {len(rest)} beginnings")
    return head + begin + text + end + rest[0].partition(end)[2]


def fill_column(page: str, column: str, values: Mapping[str, str]) -> str:
    r"""Return a page with other cells in a column of its tables.

    Parameters
    ----------
    page
        Markdown with tables.
    column
        Header of the column. All tables that have it are filled.
    values
        Cells by the first cell of their row, without emphasis. Other rows are not changed.

    Raises
    ------
    ValueError
        If a row is in no such table.

    Examples
    --------
    >>> page = "| | GPU |\n|---|---|\n| **dense** | not measured |\n| other | 3 |"
    >>> print(fill_column(page, "GPU", {"dense": "1"}))
    | | GPU |
    |---|---|
    | **dense** | 1 |
    | other | 3 |
    """
    lines, place, missing = page.split("\n"), None, set(values)
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            place = None
            continue
        cells = _cells(line)
        label = cells[0].replace("*", "")
        if number == 0 or not lines[number - 1].startswith("|"):
            place = cells.index(column) if column in cells else None
        elif place is not None and label in values:
            cells[place] = values[label]
            lines[number] = f"| {' | '.join(cells)} |"
            missing.discard(label)
    if missing:
        raise ValueError(f"page: expected rows {', '.join(sorted(missing))} in tables with a column {column!r}")
    return "\n".join(lines)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def write_page(path: Path, page: str) -> None:
    """Write a page atomically; no-op if it is unchanged."""
    if path.read_text("utf-8") != page:
        write_atomically(path, lambda file: file.write(page.encode()))

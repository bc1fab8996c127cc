"""What all benchmarks share: runs that take turns, ratios between them, tables that are printed and left as JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "torch", "jax", "triton", "transformers", "timm", "lightly", "fpsample", "Pillow", "grain")
"""Those whose versions a result names, where they are installed."""


def take_turns(runs: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Time runs in turns, so that a slow moment hits them all.

    Parameters
    ----------
    runs
        What to time, by name. A run returns when its work is done: whoever times a GPU has to wait for it inside.
    repeats
        Turns that are counted.
    warm_up
        Turns before those.

    Returns
    -------
    dict
        Seconds of each turn, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_up, repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median ratio of two runs, turn by turn.

    Examples
    --------
    >>> ratio([1.0, 4.0, 3.0], [2.0, 4.0, 4.0])
    0.75
    """
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "hardware": hardware(), "threads": _threads()}


def hardware() -> str:
    """Name what the numbers are measured on: the GPU if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} CPU cores"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


class Report:
    """Prints tables as they are ready, and leaves them as JSON.

    Parameters
    ----------
    name
        Name of the benchmark, and of its file.
    settings
        What the numbers hold for.
    folder
        Where the file goes; None: nowhere.

    Examples
    --------
    >>> report = Report("demonstration", {"batch": 2}, None)  # doctest: +ELLIPSIS
    demonstration: batch 2  [...]
    >>> report.table("time", {"ms": ".1f", "to dense": ".2f"}, {"dense": (12.0, 1.0), "half": (6.25, None)})
    time         ms  to dense
    dense      12.0      1.00
    half        6.2
    """

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{name}.json"
        self._content: dict[str, Any] = {"benchmark": name, "settings": dict(settings), **environment(), "tables": {}}
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())
        versions = ", ".join(f"{name} {version}" for name, version in self._content["versions"].items())
        print(f"{name}: {words}  [{self._content['hardware']}, {self._content['threads']} threads; {versions}]")

    def table(self, title: str, columns: Mapping[str, str], rows: Mapping[str, Iterable[float | str | None]]) -> None:
        """Print a table, and add it to the file.

        Parameters
        ----------
        title
            Head of the first column.
        columns
            Format of each column, by its head.
        rows
            Cells by the name of the row; None: an empty one.
        """
        filled = {label: tuple(cells) for label, cells in rows.items()}
        width = max(map(len, (title, *filled)))
        written = [[_written(cell, columns) for cell in zip(columns, cells, strict=True)] for cells in filled.values()]
        widths = [max(8, *map(len, column)) + 2 for column in zip(columns, *written, strict=True)]
        _print_row(title, width, columns, widths)
        for label, cells in zip(filled, written, strict=True):
            _print_row(label, width, cells, widths)
        self._content["tables"][title] = {
            label: dict(zip(columns, cells, strict=True)) for label, cells in filled.items()
        }
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def _written(cell: tuple[str, float | str | None], columns: Mapping[str, str]) -> str:
    column, value = cell
    return "" if value is None else value if isinstance(value, str) else format(value, columns[column])


def _print_row(label: str, width: int, cells: Iterable[str], widths: Iterable[int]) -> None:
    row = f"{label:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
    print(row.rstrip(), flush=True)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks"), metavar="FOLDER", help="where the results are left"
    )
    return parser

"""Timing in turns, ratios, goals, and tables that are printed and stored as JSON."""

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

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("numpy", "torch", "jax", "triton", "transformers", "fpsample", "Pillow", "grain")
"""Packages whose versions are stored with the results, if installed."""


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turns, so that temporary load affects all of them.

    Parameters
    ----------
    runs
        Functions by name. They must wait for asynchronous work, such as GPU kernels.
    repeats
        Number of timed turns.
    warm_up
        Number of untimed turns before.
    clock
        Returns seconds. Other load hardly changes those of ``time.process_time``, which count all threads.

    Returns
    -------
    dict
        Seconds of each turn, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_up, repeats):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over turns of the ratio of two times.

    Examples
    --------
    >>> ratio([1.0, 4.0, 3.0], [2.0, 4.0, 4.0])
    0.75
    """
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def verdict(value: float, goal: float) -> str:
    """Return whether a value is at most its goal, in words.

    Examples
    --------
    >>> verdict(0.7, goal=0.75), verdict(0.76, goal=0.75)
    ('met', 'MISSED')
    """
    return "met" if value <= goal else "MISSED"


def random_images(shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return uint8 noise of a shape (batch, height, width, channels)."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def pick_device(name: str) -> str:
    """Resolve ``"auto"`` to ``"cuda"`` if PyTorch finds a GPU, else to ``"cpu"``."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def environment() -> dict[str, Any]:
    """Return package versions, hardware and number of threads."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    cpu = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"versions": versions, "hardware": hardware, "threads": torch.get_num_threads()}


class Report:
    """Prints tables as soon as they are ready, and stores them in a JSON file.

    Parameters
    ----------
    name
        Name of the benchmark and of its file.
    settings
        Settings of the measurement, printed first.
    folder
        Folder of the file; None: no file.

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
        """Print a table and add it to the file.

        Parameters
        ----------
        title
            Header of the first column.
        columns
            Format of each column by its header.
        rows
            Cells by label of the row; None: an empty cell.
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
    """Return a parser with the options shared by all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks"), metavar="FOLDER", help="folder of the JSON results"
    )
    return parser

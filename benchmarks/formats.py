"""Speed of first epochs by file format, on disk and on local servers.

An epoch includes opening the data. It is measured with an empty cache (cold), with all parts in the cache (warm) and
without a cache. The batches must equal those of the folder, even if the stream starts in the middle.
"""

import statistics
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.servers import servers
from prmim_train.config.training import SourceOptions
from prmim_train.data.batches import train_batches
from prmim_train.data.sources import open_source

COLUMNS = {"cold": ".0f", "warm": ".0f", "no cache": ".0f", "resumes": ""}

Row = tuple[float | None, float, float | None, str]


def pack_tar(files: Sequence[Path], path: Path) -> str:
    """Write files into a tar file and return its path."""
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)
    return str(path)


def pack_parquet(files: Sequence[Path], path: Path) -> str:
    """Write files into a parquet column, one per row group; return the path.

    Larger groups suit tables that are read in order. In shuffled order, one image of a group would be used.
    """
    table = pa.table({"image": [file.read_bytes() for file in files]})
    pq.write_table(table, path, row_group_size=1, compression="none")
    return str(path)


def compare_formats(folder: str, files: Sequence[Path], where: Path, repeats: int, **shape: int) -> dict[str, Row]:
    """Return images per second: cold, warm, and without a cache.

    Also returns whether the stream resumes exactly.

    Parameters
    ----------
    folder : str
        Folder of the images.
    files : sequence of Path
        The images in it, sorted.
    where : Path
        Empty folder for copies and caches.
    repeats : int
        Turns of each measurement. The result is their median.
    **shape : int
        Options `batch` and `image_size`.
    """
    served = where / "served"
    served.mkdir()
    packed = {"tar": pack_tar(files, served / "packed.tar")}
    packed["parquet"] = pack_parquet(files, served / "packed.parquet")
    expected = epoch(folder, SourceOptions(), **shape)[0]
    rows: dict[str, Row] = {}
    for name, spec in {"folder": folder, **packed}.items():
        speeds = [epoch(spec, SourceOptions(), **shape)[1] for _ in range(repeats)]
        rows[name] = (None, statistics.median(speeds), None, resumes(spec, SourceOptions(), expected, **shape))
    with servers(served) as addresses:
        for name, path in packed.items():
            for protocol, address in addresses.items():
                spec, found = f"{address}/{Path(path).name}", []
                for turn in range(repeats):
                    kept = SourceOptions(cache=str(where / f"{protocol}-{name}-{turn}"))
                    turns = (kept, kept, SourceOptions(cache=None))
                    found.append([epoch(spec, options, **shape)[1] for options in turns])
                cold, warm, uncached = (statistics.median(column) for column in zip(*found, strict=True))
                exactly = resumes(spec, SourceOptions(cache=None), expected, **shape)
                rows[f"{protocol}, {name}"] = (cold, warm, uncached, exactly)
    return rows


def epoch(spec: str, options: SourceOptions, **shape: int) -> tuple[list[NDArray[Any]], float]:
    """Return the batches of the first epoch, and images per second."""
    start = time.perf_counter()
    batches = _batches(spec, options, 0, **shape)
    return batches, sum(map(len, batches)) / (time.perf_counter() - start)


def resumes(spec: str, options: SourceOptions, expected: list[NDArray[Any]], **shape: int) -> str:
    """Return, as text, whether the stream resumes exactly in mid-epoch."""
    start = len(expected) // 2
    found = _batches(spec, options, start, **shape)
    is_same = len(found) == len(expected) - start and all(map(np.array_equal, found, expected[start:]))
    return "exactly" if is_same else "NOT"


def _batches(spec: str, options: SourceOptions, start: int, *, batch: int, image_size: int) -> list[NDArray[Any]]:
    source = open_source(spec, channels=3, options=options)
    sizes = {"batch_size": batch, "image_size": (image_size, image_size)}
    with train_batches(source, **sizes, seed=0, start_step=start, total_steps=len(source) // batch) as batches:
        return [made.images for made in batches]

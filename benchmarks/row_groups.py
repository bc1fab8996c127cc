"""Time to read an image from a parquet file in shuffled order, by group size.

The contents are random bytes, which are as incompressible as JPEG files. Row groups are not kept between images, as for
data that is much larger than the cache of row groups. The files are in the cache of the system.
"""

import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import Report, argument_parser
from prmim_train.data.formats import parquet
from prmim_train.data.sources import FileSource, open_source


def milliseconds(source: Any, order: np.ndarray) -> float:
    """Return the processor time for the content of an image."""
    start = time.process_time()
    for index in order:
        source.records.content(int(index))
    return 1e3 * (time.process_time() - start) / len(order)


def write(where: Path, contents: list[bytes], rows: tuple[int, ...]) -> dict[str, str]:
    """Write the same contents into files; return their paths by description."""
    with tarfile.open(where / "images.tar", "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    paths = {"tar": str(where / "images.tar")}
    for number in rows:
        for compression, name in (("snappy", "snappy, as by default"), ("none", "no compression")):
            path = str(where / f"{number}-{compression}.parquet")
            pq.write_table(pa.table({"jpg": contents}), path, row_group_size=number, compression=compression)
            paths[f"{number} rows, {name}"] = path
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 10, 100), help="rows of a group")
    for name, default in {"images": 1000, "bytes": 100_000, "reads": 100, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    contents = [rng.bytes(options.bytes) for _ in range(options.images)]
    order = rng.permutation(options.images)[: options.reads]
    settings = {name: getattr(options, name) for name in ("images", "bytes", "reads", "repeats")}
    report = Report("row_groups", settings, options.json)
    rows = {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(parquet, "_CACHE_BYTES", 0):
        for name, path in write(Path(folder), contents, tuple(options.rows)).items():
            source = open_source(path, channels=3)
            assert isinstance(source, FileSource)
            rows[name] = [statistics.median(milliseconds(source, order) for _ in range(options.repeats))]
    report.table("content of an image", {"ms": ".2f"}, rows)


if __name__ == "__main__":
    main()

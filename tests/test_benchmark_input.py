"""The benchmark of the input: equal crops on both sides, and complete tables."""

import io
import json

import numpy as np
import pytest

from benchmarks import input as benchmark
from benchmarks import row_groups
from prmim_train.data.sources import open_source
from prmim_train.data.transforms import random_crop_box


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input") / "photographs"
    return open_source(benchmark.write_photographs(folder, (80, 60), 4), channels=3)


def test_both_sides_make_the_same_crops(photographs):
    plain = benchmark.Plain(photographs, 16)
    assert len(plain) == len(photographs)
    for index in range(len(plain)):
        rng = np.random.default_rng(index)
        crop = photographs.read_crop(index, (16, 16), lambda shape, rng=rng: random_crop_box(shape, rng))
        np.testing.assert_array_equal(plain[index], crop[:, ::-1] if rng.random() < 0.5 else crop)


def test_photographs_are_as_hard_to_decode_as_real_ones():
    file = io.BytesIO()
    benchmark.photograph(np.random.default_rng(0), (500, 375)).save(file, "JPEG", quality=90)
    assert 0.4 < len(file.getvalue()) / (500 * 375) < 0.7


def test_input_prints_and_stores_its_tables(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "READERS", {name: benchmark.READERS[name] for name in ("0 workers", "1 worker")})
    sizes = ["--size", "80", "60", "--large", "400", "300", "--pictures", "4", "--image-size", "32", "--batch", "4"]
    few = ["--images", "8", "--repeats", "1", "--crops", "3", "--steps", "1", "--step-batch", "2"]
    benchmark.main([*sizes, *few, "--json", str(tmp_path)])
    tables = json.loads((tmp_path / "input.json").read_text())["tables"]
    assert list(tables) == ["folder", "large", "source, 1 thread", "format", "reduced crops", "run"]
    assert list(tables["folder"]) == ["0 workers", "1 worker"]
    for row in (*tables["folder"].values(), *tables["large"].values()):
        assert row["images/s"] > 0
        assert row["to plain"] > 0
    assert list(tables["source, 1 thread"]) == ["folder", "tar", "npz, 36 px"]
    assert list(tables["format"]) == [
        "folder",
        "tar",
        "parquet",
        "http, tar",
        "s3, tar",
        "http, parquet",
        "s3, parquet",
    ]
    for row in tables["format"].values():
        assert row["warm"] > 0
        assert row["resumes"] == "exactly"
    assert tables["reduced crops"]["folder"] == {"share": 0, "PSNR, dB": None, "least": None}
    assert tables["reduced crops"]["large"]["PSNR, dB"] > 40
    for row in tables["run"].values():
        assert 0 < row["share, %"] < 100
    assert "digits" in capsys.readouterr().out


def test_row_groups_prints_its_table(capsys, tmp_path):
    row_groups.main(
        ["--rows", "2", "--images", "6", "--bytes", "50", "--reads", "4", "--repeats", "1", "--json", str(tmp_path)]
    )
    (table,) = json.loads((tmp_path / "row_groups.json").read_text())["tables"].values()
    assert list(table) == ["tar", "2 rows, snappy, as by default", "2 rows, no compression"]
    assert all(row["ms"] > 0 for row in table.values())
    assert "2 rows" in capsys.readouterr().out

"""`make gpu` in its dry mode: pieces, resuming, and numbers in the pages."""

import importlib
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import arms, gpu, pages, plan
from benchmarks.quality import data, records
from benchmarks.quality.arms import ARMS, DEFAULT, DENSE, STUDIES

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def launched(monkeypatch):
    """Run benchmarks in this process, at sizes that take milliseconds.

    pytest does not start itself.
    """
    small = {arm: {**options, **SMALL} for arm, options in arms.ARMS.items()}
    monkeypatch.setattr(arms, "ARMS", small)
    monkeypatch.setattr(arms, "METHODS", {"mae": small})
    monkeypatch.setattr(plan, "GRIDS", ((14, 14),))
    monkeypatch.setattr(plan, "_jitted", partial)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    calls = []

    def launch(words, seconds):
        calls.append(words)
        assert seconds > 0
        if words[0].startswith("benchmarks."):
            importlib.import_module(words[0]).main(list(words[1:]))
        else:
            suite = '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2"/></testsuites>'
            Path(words[words.index("--junitxml") + 1]).write_text(suite)
        return 0

    monkeypatch.setattr(gpu, "launch", launch)
    return calls


@pytest.fixture
def docs(tmp_path):
    """Return copies of the pages."""
    folder = tmp_path / "docs"
    (folder / "results").mkdir(parents=True)
    for name in ("performance.md", "accuracy.md"):
        shutil.copy(gpu.ROOT / "docs" / "results" / name, folder / "results")
    return folder


def test_a_dry_run_fills_the_pages_once(launched, docs, tmp_path):
    words = ["--dry", "--out", str(tmp_path / "out"), "--docs", str(docs), "--results", str(tmp_path / "results")]
    assert gpu.main(words) == 0
    assert len(launched) == len(gpu.PIECES)
    page = (docs / "results" / "performance.md").read_text()
    assert "7 tests on it passed, 0 failed, 2 were skipped." in page
    assert "No number on this page was measured on a GPU" not in page
    for row in ("partial 0.5", "**PR-MIM 0.5**", "14x14"):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row} |") and line.count("|") in (7, 8)]
        assert "not measured" not in line
    assert "| transformers, fused attention | 1.50 | 1.18 | 1.43 | 1.49 | | not measured |" in page  # no peers
    assert gpu.main(words) == 0
    assert len(launched) == len(gpu.PIECES)
    assert (docs / "results" / "performance.md").read_text() == page
    shutil.copy(gpu.ROOT / "docs" / "results" / "performance.md", docs / "results")
    assert gpu.main(["--pages", *words[1:]]) == 0  # numbers of the CPU are none of the GPU
    assert "No number on this page was measured on a GPU" in (docs / "results" / "performance.md").read_text()
    assert gpu.main(["--pages", *words]) == 0
    assert (docs / "results" / "performance.md").read_text() == page


def test_a_piece_that_fails_or_runs_out_of_time_is_repeated(monkeypatch, tmp_path, capsys):
    codes = {"benchmarks.step": 1, "benchmarks.memory": 124}
    calls = []
    monkeypatch.setattr(gpu, "launch", lambda words, seconds: calls.append(words) or codes.get(words[0], 0))
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.err == "gpu: failed: step, all arms\n"
    assert "memory: out of time" in output.out
    calls.clear()
    codes.clear()
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    assert [words[0] for words in calls] == ["benchmarks.step", "benchmarks.memory", "benchmarks.step"]
    calls.clear()
    assert gpu.main(["--dry", "--out", str(tmp_path / "other"), "--minutes", "0"]) == 0
    assert not calls


def test_pieces_of_a_dry_run_or_of_another_gpu_are_repeated(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(gpu, "launch", lambda words, seconds: calls.append(words) or 0)
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "train", lambda *_: True)
    monkeypatch.setattr(gpu, "write_pages", lambda *_, **__: None)
    runs = [(["--dry"], "one GPU"), ([], "one GPU"), ([], "one GPU"), ([], "another GPU")]
    for (words, hardware), number in zip(runs, (1, 2, 2, 3), strict=True):
        monkeypatch.setattr(gpu, "environment", lambda hardware=hardware: {"hardware": hardware})
        assert gpu.main([*words, "--out", str(tmp_path)]) == 0
        assert len(calls) == number * len(gpu.PIECES)


def test_a_dry_run_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "launch", lambda words, seconds: 0)
    assert gpu.main(["--dry"]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gpu-dry"]


def test_without_a_gpu_only_the_dry_mode_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu: PyTorch sees no GPU; --dry runs the pieces on the CPU\n"


def test_on_a_gpu_the_study_takes_the_rest_of_the_time(monkeypatch, docs, tmp_path):
    calls = []
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "launch", lambda words, seconds: calls.append(words) or 0)
    monkeypatch.setattr(data, "find", lambda *_: None)
    study, results = STUDIES["grid14"], tmp_path / "results"
    for arm, value in ((DENSE, 0.5), (DEFAULT, 0.52)):
        record = {"arm": arm, "seed": 0, "epochs": study.epochs, "macs_to_dense": study.cost_ratio(arm)}
        record |= {"steps": study.steps(arm), "test_images": 2000}
        options = {"options": {**study.world.pretrain, **ARMS[arm].options}, "finetune_options": study.world.finetune}
        records.save({**record, **options, "linear": value, "knn": value, "finetune": value}, study, results)
    out = ["--out", str(tmp_path / "out"), "--docs", str(docs), "--results", str(results)]
    assert gpu.main(["--minutes", "5", *out]) == 0
    assert calls[-1][:3] == ("benchmarks.quality", "--study", "grid14")
    assert 0 < float(calls[-1][calls[-1].index("--minutes") + 1]) < 5
    page = (docs / "results" / "accuracy.md").read_text()
    assert "| PR-MIM, cells | 1 | 0.69 | 25 | 52.00 % | 52.00 % | 52.00 % |" in page
    assert "| PR-MIM, cells | +2.00 | +2.00 | +2.00 |" in page


def test_a_study_without_its_images_is_skipped(monkeypatch, docs, tmp_path, capsys):
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "PIECES", {})
    folders = ["--out", str(tmp_path / "out"), "--docs", str(docs), "--results", str(tmp_path), "--data", str(tmp_path)]
    assert gpu.main(folders) == 0
    missing = tmp_path / "imagenette128_train.tar"
    assert capsys.readouterr().out == f"== grid14: skipped: data: expected {missing}, got no such file\n"


def test_a_process_that_takes_too_long_is_stopped(monkeypatch):
    assert gpu.launch(("platform",), 60) == 0

    def run(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.launch(("platform",), 1) == 124


def test_rows_and_blocks_that_a_page_lacks_are_errors():
    table = "| | GPU |\n|---|---|\n| dense | 1 |"
    with pytest.raises(ValueError, match="expected rows other"):
        pages.fill_column(table, "GPU", {"other": "1"})
    with pytest.raises(ValueError, match="expected rows dense"):
        pages.fill_column(table, "CPU", {"dense": "1"})
    with pytest.raises(ValueError, match="expected one block"):
        pages.replace_block("<!-- a -->", "a", "b")

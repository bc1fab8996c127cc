"""Benchmarks of backends, checkpoints, scan and start-up: tables of small models."""

import json

import pytest

from benchmarks import arms, backends, checkpoint, scan, startup
from prmim_torch import create_method
from prmim_train.cli.commands import main


def table(folder, benchmark, title):
    """Return the rows of a stored table, without empty cells."""
    content = json.loads((folder / f"{benchmark}.json").read_text())
    return {
        label: [cell for cell in cells.values() if cell is not None]
        for label, cells in content["tables"][title].items()
    }


def test_backends_start_from_equal_weights_and_print_their_times(tmp_path, monkeypatch, quick_compiler):
    shallow = {arm: {**arms.ARMS[arm], "depth": 1} for arm in backends.COMPARED}
    monkeypatch.setattr(backends, "ARMS", shallow)
    sizes = ["--image-size", "16", "--patch-size", "4", "--decoder-dim", "8", "--decoder-depth", "1"]
    options = ["--batch", "2", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path)]
    backends.main(["--model", "vit_tiny", *sizes, *options])
    rows = table(tmp_path, "backends", "JAX against torch")
    for arm in backends.COMPARED:
        for number in (1, 2):
            assert rows[f"{arm}, loss of step {number}"][2] == pytest.approx(1, abs=1e-4)
        assert all(ratio > 0 for ratio in rows[f"{arm}, ms per image"])
        compiling = [rows[f"{arm}, {part}, s"][0] for part in ("trace and lower", "compile")]
        assert 0 < min(compiling) < sum(compiling) < rows[f"{arm}, first step, s"][1]
    assert rows["plan, us per image"][2] > 0
    assert len(rows["PR-MIM 0.5 to dense"]) == 2


def test_checkpoint_prints_times_sizes_and_share_of_training(capsys, tmp_path, quick_compiler):
    sizes = ["--model", "vit_tiny", "--image-size", "32", "--decoder-depth", "1"]
    results = ["--json", str(tmp_path / "results"), "--folder", str(tmp_path)]
    checkpoint.main([*sizes, "--repeats", "1", "--step-seconds", "0.5", *results])
    content = json.loads((tmp_path / "results" / "checkpoint.json").read_text())
    assert content["settings"]["model"] == "vit_tiny"
    rows = {label: list(cells.values()) for label, cells in content["tables"]["checkpoint"].items()}
    for line in capsys.readouterr().out.splitlines()[2:]:
        label = next(label for label in rows if line.startswith(label))
        assert [float(cell) for cell in line.removeprefix(label).split()] == pytest.approx(rows[label], rel=1e-3)
    method = create_method("mae", model="vit_tiny", image_size=(32, 32), decoder_depth=1)
    learned = sum(parameter.numel() for parameter in method.parameters())
    # Weights and two moments of 4 bytes each; JAX's moments are compressed.
    assert rows["size, MB"] == pytest.approx([12e-6 * learned] * 2, rel=0.2)
    (share,) = [values for name, values in rows.items() if name.startswith("share of training, every 6256 steps")]
    for wait, percent in zip(rows["training waits, s"], share, strict=True):
        assert percent == pytest.approx(100 * wait / (wait + 6256 * 0.5))
    assert all(
        0 < wait < whole for wait, whole in zip(rows["training waits, s"], rows["written whole, s"], strict=True)
    )
    assert rows["step of 4096 images, s"] == [0.5, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_scan_compiles_less_than_the_loop(tmp_path, quick_compiler):
    options = ["--batch", "2", "--repeats", "1", "--json", str(tmp_path)]
    scan.main(["--depths", "3", "--decoder-depth", "1", "--dim", "8", *options])
    rows = table(tmp_path, "scan", "compilation")
    assert list(rows) == ["3 blocks, loop", "3 blocks, scan"]
    loop, scanned = rows.values()
    assert scanned[1] < loop[1]
    assert scanned[3] < loop[3]


def test_startup_prints_seconds_and_the_goal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, "COMMANDS", {"prmim": ("-c", "import time; time.sleep(0.3)")})
    monkeypatch.setattr(startup, "IMPORTS", {"import numpy": ("-c", "import numpy")})
    startup.main(["--repeats", "1", "--json", str(tmp_path)])
    rows = table(tmp_path, "startup", "start-up")
    cpu, ratio = rows["prmim"]
    assert 0 < cpu < 0.3  # a process that sleeps uses no core
    assert ratio == pytest.approx(cpu / rows["import numpy"][0])
    assert capsys.readouterr().out.splitlines()[-1] == f"goal for commands: at most 1.5 CPU s: {cpu:.2f}, met"


@pytest.mark.parametrize("name", startup.COMMANDS)
def test_startup_times_commands_that_answer(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, program, *words = startup.COMMANDS[name]
    assert (module, program) == ("-m", "prmim_train")
    assert main(words) == (2 if name.startswith("error") else 0)

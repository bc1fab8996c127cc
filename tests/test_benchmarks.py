"""The benchmarks run, and what they print of a small model can be read."""

import re

import pytest

from benchmarks import arms, backends, checkpoint, plan, scan, step
from prmim_torch import create_method


def test_the_official_layout_has_the_loss_of_the_dense_method():
    method = arms.build("dense", "vit_tiny")
    images, noise = arms.inputs(2)
    ours = method(images, noise).loss.item()
    official = arms.OfficialLayout(method)(images, noise).item()
    assert official == pytest.approx(ours, rel=1e-5)


def test_step_prints_a_row_for_every_arm(capsys):
    step.main(["--model", "vit_tiny", "--batch", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    for arm in ("official layout", *arms.ARMS):
        rows = [line for line in lines if line.startswith(arm)]
        assert len(rows) == 3, arm  # time, and what is saved at two precisions
        assert all(re.fullmatch(r"[ \d.]+", row.removeprefix(arm)) for row in rows)
    saved = {row.split()[0]: float(row.split()[-1]) for row in lines if row.startswith(("dense", "PR-MIM"))}
    assert 0 < saved["PR-MIM"] < saved["dense"] < 1


def test_plan_prints_a_row_for_every_grid_and_strategy(capsys):
    plan.main(["--images", "2", "--repeats", "1"])
    assert len(re.findall(r"^\d+x\d+ +(?:furthest|random)", capsys.readouterr().out, flags=re.MULTILINE)) == 4


@pytest.fixture
def quick_compiler():
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_backends_start_alike_and_print_what_each_takes(capsys, monkeypatch, quick_compiler):
    shallow = {arm: {**arms.ARMS[arm], "depth": 1} for arm in backends.COMPARED}
    monkeypatch.setattr(backends, "ARMS", shallow)
    sizes = ["--image-size", "16", "--patch-size", "4", "--decoder-dim", "8", "--decoder-depth", "1"]
    backends.main(["--model", "vit_tiny", *sizes, "--batch", "2", "--repeats", "1", "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines()[2:] if line]
    rows = {line[:28].strip(): [float(cell) for cell in line[28:].split()] for line in lines}
    for arm in backends.COMPARED:
        for number in (1, 2):
            assert rows[f"{arm}, loss of step {number}"][2] == pytest.approx(1, abs=1e-4)
        assert all(ratio > 0 for ratio in rows[f"{arm}, ms per image"])
        compiling = [rows[f"{arm}, {part}"][0] for part in ("trace and lower", "compile")]
        assert 0 < min(compiling) < sum(compiling) < rows[f"{arm}, first step, s"][1]
    assert rows["plan, us per image"][2] > 0
    assert len(rows["PR-MIM 0.5 to dense"]) == 2


def test_checkpoint_prints_times_sizes_and_their_share_of_training(capsys, tmp_path, quick_compiler):
    sizes = ["--model", "vit_tiny", "--image-size", "32", "--decoder-depth", "1"]
    checkpoint.main([*sizes, "--repeats", "1", "--step-seconds", "0.5", "--folder", str(tmp_path)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert "vit_tiny MAE, decoder of 1 blocks" in head
    rows = {line[:38].strip(): [float(cell) for cell in line[38:].split()] for line in lines[1:]}
    method = create_method("mae", model="vit_tiny", image_size=(32, 32), decoder_depth=1)
    learned = sum(parameter.numel() for parameter in method.parameters())
    # Weights and two moments of 4 bytes each; JAX's moments are compressed.
    assert rows["size, MB"] == pytest.approx([12e-6 * learned] * 2, rel=0.2)
    (share,) = [values for name, values in rows.items() if name.startswith("share of training, every 6256 steps")]
    for save, percent in zip(rows["save, s"], share, strict=True):
        assert percent == pytest.approx(100 * save / (save + 6256 * 0.5), abs=1e-3)
    assert rows["step of 4096 images, s"] == [0.5, 0.5]
    assert list(tmp_path.iterdir()) == []


def test_scan_prints_less_to_compile_than_the_loop(capsys, quick_compiler):
    scan.main(["--depths", "3", "--decoder-depth", "2", "--dim", "8", "--batch", "2", "--repeats", "1"])
    loop, scanned = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (loop[:2], scanned[:2]) == (["3", "loop"], ["3", "scan"])
    assert int(scanned[3]) < int(loop[3])
    assert int(scanned[5]) < int(loop[5])

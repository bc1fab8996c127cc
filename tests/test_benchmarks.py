"""The benchmarks run, and what they print of a small model can be read."""

import re

import pytest

from benchmarks import arms, backends, plan, step


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

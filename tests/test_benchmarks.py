"""The benchmarks run, and what they print of a small model can be read."""

import re

import pytest

from benchmarks import arms, plan, step


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

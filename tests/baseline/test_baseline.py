"""The project still computes what `record.py` recorded."""

import json
from pathlib import Path

import pytest

from tests.baseline import record

NUMBERS = json.loads(Path(__file__).with_name("numbers.json").read_text(encoding="utf-8"))


def test_plans():
    assert record.plans() == NUMBERS["plans"]


def test_costs():
    assert record.costs() == NUMBERS["costs"]


def test_losses(tmp_path, one_thread):
    # PyTorch only: the parity tests compare JAX with it. Kernels differ between processors, hence the tolerance.
    pytest.importorskip("torch")
    found = record.trainings("torch", record.write_teacher(tmp_path / "teacher"))
    assert found.keys() == NUMBERS["trainings"]["torch"].keys()
    for name, expected in NUMBERS["trainings"]["torch"].items():
        assert found[name]["parameters"] == expected["parameters"], name
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert found[name]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), name

"""The benchmark of the plan: tables, JSON file and figure."""

import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import plan
from prmim_core import furthest_point_sampling


@pytest.fixture
def small(monkeypatch):
    """Grids that take milliseconds, and a compiler without code generation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(plan, "GRIDS", ((4, 4), (2, 4, 4)))
    monkeypatch.setattr(plan, "SIDES", (4, 6))
    monkeypatch.setattr(plan, "PICKS", (4, 8))
    monkeypatch.setattr(plan, "PICKED_FROM", (6, 8))


def test_tables_have_a_row_for_every_case(small, tmp_path, capsys):
    picture = tmp_path / "growth.png"
    plan.main(["--images", "1", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path), "--plot", str(picture)])
    tables = json.loads((tmp_path / "plan.json").read_text())["tables"]
    rows = [list(table) for table in tables.values()]
    assert rows == [
        ["4x4", "2x4x4"],
        ["4x4, 4 picks", "2x4x4, 8 picks"],
        ["16", "36", "exponent"],
        ["4", "8", "exponent"],
    ]
    whole, sampling, by_tokens, _ = tables.values()
    assert list(whole["4x4"]) == ["NumPy", "torch, core", "torch", "torch compiled", "JAX jit"]
    assert all(value > 0 for row in (*whole.values(), *sampling.values()) for value in row.values())
    assert {"NumPy", "torch, core", "JAX jit"} <= set(by_tokens["exponent"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(label in printed for table in rows for label in table)


def test_a_case_has_the_tokens_of_its_images_of_14x14():
    case = plan.Case.of((28, 28), 256)
    assert (case.images, case.num_visible, case.num_picks) == (64, 196, 196)
    assert plan.Case.of((64, 64), 1).images == 1
    assert (case.is_visible.sum(axis=1) == 196).all()


@pytest.mark.parametrize("case", [plan.Case.of((4, 6), 2), plan.Case.of((4, 6), 2, num_picks=9)], ids=str)
def test_all_arms_that_return_picks_return_the_same(case):
    expected = furthest_point_sampling(case.grid, case.num_picks, case.noise, case.is_visible)
    runs = plan.sampling_runs(case, "cpu")
    for name in ("NumPy", "torch, core", "JAX jit"):
        np.testing.assert_array_equal(np.asarray(runs[name]()), expected, err_msg=name)


def test_exponents_are_fitted_to_the_times(monkeypatch):
    cases = {size: plan.Case.of((2, size), 1) for size in (2, 4, 8, 16)}
    sizes = iter(cases)

    def quadratic(runs, repeats):
        size = next(sizes)
        return {"ours": [1e-6 * size**2 * cases[size].images] * repeats}

    monkeypatch.setattr(plan, "take_turns", quadratic)
    monkeypatch.setattr(plan, "sampling_runs", lambda case, device: {})
    rows = plan.growth(cases, "cpu", 3)
    assert rows["8"]["ours"] == pytest.approx(64)
    assert rows["exponent"]["ours"] == pytest.approx(2)


@pytest.mark.skipif(importlib.util.find_spec("fpsample") is None, reason="fpsample is not installed")
def test_the_functions_of_the_peer_run():
    case = plan.Case.of((8, 8), 1)
    assert {"fps, one start", "kdline, one start"} <= set(plan.peer_runs(case))
    for run in plan.peer_runs(case).values():
        run()

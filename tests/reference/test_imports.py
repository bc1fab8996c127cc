"""The specification stands alone: it shares no code with what it judges."""

import ast
import sys
from pathlib import Path

import pytest

import prmim_reference

MODULES = sorted(Path(prmim_reference.__file__).parent.glob("*.py"))
ALLOWED = {"numpy", "safetensors", "prmim_reference"}


def imported_roots(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            roots.add(node.module.split(".")[0])
    return roots


def test_modules_are_found():
    assert {path.stem for path in MODULES} >= set(prmim_reference.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_numpy_and_the_standard_library_only(path):
    assert imported_roots(path) - set(sys.stdlib_module_names) <= ALLOWED


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_nothing_by_name_at_run_time(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "importlib", "exec", "eval"}


def test_the_walk_notices_a_forbidden_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from prmim_core.grid import Grid\n    import torch.nn\n")
    assert imported_roots(path) == {"prmim_core", "torch"}

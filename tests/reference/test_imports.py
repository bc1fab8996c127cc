"""The specification imports nothing by name at run time; `test_architecture.py` checks its other imports."""

import ast
from pathlib import Path

import pytest

import prmim_reference

MODULES = sorted(Path(prmim_reference.__file__).parent.glob("*.py"))


def test_modules_are_found():
    assert {path.stem for path in MODULES} >= set(prmim_reference.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_nothing_by_name_at_run_time(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "importlib", "exec", "eval"}

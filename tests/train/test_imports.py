"""The parts of the trainer import each other in one direction."""

import ast
from pathlib import Path

import pytest

import prmim_train

ROOT = Path(prmim_train.__file__).parent
LAYERS = ("config", "data", "run", "report", "evaluate", "pretrain", "cli", "__main__")
"""Each part may import itself and the parts before it."""


def part(path):
    """Part of the trainer that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(source):
    """Parts of the trainer that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("prmim_train.")}
    return found


def test_every_part_has_a_layer():
    assert {part(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = LAYERS[: LAYERS.index(part(path)) + 1] if part(path) in LAYERS else ()
    assert imported_parts(path.read_text(encoding="utf-8")) <= set(allowed)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy\nfrom prmim_train.run.loop import Job", {"run"}),
        ("def f():\n    from prmim_train import cli", {"cli"}),
        ("if TYPE_CHECKING:\n    import prmim_train.report.pictures, prmim_core", {"report"}),
    ],
)
def test_the_rule_finds_imports(source, expected):
    assert imported_parts(source) == expected

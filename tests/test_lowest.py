"""`tests/lowest.py` turns the bounds of the project file into pins."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pins = runpy.run_path(str(ROOT / "tests" / "lowest.py"))["pins"]
PROJECT = (ROOT / "pyproject.toml").read_text()


def version(text):
    return tuple(int(part) for part in text.split("."))


def test_the_tested_versions_are_at_least_the_bounds():
    tested = dict(re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    tested = {name.lower().replace("-", "_"): number for name, number in tested.items()}
    bounds = dict(pin.lower().replace("-", "_").split("==") for pin in pins(PROJECT))
    not_installed = {"wandb", "mlflow"}  # their tests need no package
    assert set(bounds) - set(tested) == not_installed
    for name in set(bounds) - not_installed:
        assert version(tested[name]) >= version(bounds[name]), name


def test_every_extra_but_those_of_developers_and_trackers_is_installed_at_its_bounds():
    extras = set(
        re.findall(
            r"^([a-z-]+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
        )
    )
    named = set(re.search(r"^ALL := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1).split(","))
    assert extras - named == {"gpu-tests", "foreign-tests", "docs", "dev", "wandb", "mlflow"}
    assert named <= extras


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        ('["numpy"]', "dependency: expected NAME>=VERSION, got numpy"),
        ('["numpy>=2,<3"]', "dependency: expected NAME>=VERSION, got numpy>=2,<3"),
        ('["numpy>=2", "numpy>=2.1"]', "numpy: expected one lower bound, got 2 and 2.1"),
    ],
)
def test_a_dependency_without_one_lower_bound_is_an_error(dependencies, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pins(f"[project]\ndependencies = {dependencies}")

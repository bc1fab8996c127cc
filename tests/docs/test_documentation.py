"""Code blocks of the documentation run, and their commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from docs import write_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").replace(".venv/bin/", "").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def with_block(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", with_block("python"), ids=name)
def test_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch, quick_compiler):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


PRMIM_COMMANDS = [
    pytest.param(command, id=f"{name(page)}: {command}")
    for page in PAGES
    for command in commands(page)
    if command.startswith("prmim ")
]


@pytest.mark.parametrize("command", PRMIM_COMMANDS)
def test_prmim_commands_name_options_that_exist(command):
    from prmim_train.cli.commands import COMMANDS
    from prmim_train.cli.options import split_words

    _, verb, *words = shlex.split(command)
    split_words(words, COMMANDS[verb].options(), COMMANDS[verb].places)


def test_tests_that_guarantees_name_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guides" / "data_guarantees.md").read_text()))
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    existing = {test for text in files for test in re.findall(r"^def (test_\w+)\(", text, flags=re.MULTILINE)}
    assert named
    assert named <= existing


def test_files_of_tests_that_formats_name_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "guides" / "data.md").read_text()))
    assert named
    assert named <= {path.name for path in (ROOT / "tests" / "train" / "data").glob("test_*.py")}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"\bmake ([a-z-]+)\b", "\n".join(commands(page)))}
    assert named
    assert named <= targets


def test_pictures_that_pages_show_exist():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{name(page)} shows {target}"


def test_a_broken_block_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nassert False, 'noticed'\n```\n")
    assert blocks(page, "python") == ["assert False, 'noticed'\n"]
    with pytest.raises(AssertionError, match="noticed"):
        exec(blocks(page, "python")[0], {})


@pytest.mark.parametrize("page", ["cli.md", "recipes.md", "deviations.md"])
def test_reference_pages_are_those_of_the_records(page):
    written = (write_reference.FOLDER / page).read_text(encoding="utf-8")
    assert write_reference.PAGES[page]() == written, "run docs/write_reference.py"


def test_reference_pages_name_everything_once():
    assert write_reference.PAGES.keys() == {"cli.md", "recipes.md", "deviations.md"}
    options = write_reference.PAGES["cli.md"]()
    assert all(f"\n## prmim {name}\n" in options for name in write_reference.COMMANDS)
    assert options.count("| `--throw_ratio` |") == 1
    rows = write_reference.deviations_page().splitlines()
    for found in write_reference.DEVIATIONS:
        assert sum(row.startswith(f"| {found.item} | {found.published} (") for row in rows) == 1

"""Every code block of the documentation runs, and every command in it is one that the program knows."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

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


def test_the_table_of_deviations_is_that_of_the_records():
    spec = importlib.util.spec_from_file_location("write_deviations", ROOT / "docs" / "write_deviations.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = writer.PAGE.read_text(encoding="utf-8")
    assert writer.with_table(page) == page, "run docs/write_deviations.py"
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 5]
    assert len(rows) == 1 + len(writer.DEVIATIONS)
    assert writer.with_table(page.replace("float16 with loss scaling", "float64")) == page

"""Write the reference pages that follow from the records of the code: python docs/write_reference.py.

The pages are `docs/reference/cli.md`, `docs/reference/recipes.md`, and the table of `docs/reference/deviations.md`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from prmim_methods.record import Option
from prmim_train.cli.commands import COMMANDS, Command
from prmim_train.config.deviations import DEVIATIONS, FAMILIES, STAGES, Deviation
from prmim_train.config.layers import read_header, recipe_names

FOLDER = Path(__file__).parent / "reference"

CLI_HEAD = """\
# Command line

`prmim COMMAND --help` prints the options of a command. This page lists the options of all commands.
`docs/write_reference.py` generates it.

- `--name VALUE` and `--name=VALUE` are equal. Hyphens in a name count as underscores.
- Options of type bool are switched on by `--name` and off by `--no_name`.
- Options can also be lines `name: value` of a YAML file, given as `--config FILE`. The command line takes precedence.
- `prmim --version` prints the version. `--traceback` shows the traceback of an error.
- The exit status is 0 on success, 1 after an error, 2 after a wrong option, and 128 plus the number of a signal.
"""

RECIPES_HEAD = """\
# Recipes

A recipe is a packaged file of options. `prmim inspect --config NAME` prints its source, options, cost, and differences
from the published run. `docs/write_reference.py` generates this page.
"""

DEVIATIONS_HEAD = "| where | what | published | read in | here | why |\n|---|---|---|---|---|---|\n"


def cli_page() -> str:
    """Return the page of all commands and options."""
    return CLI_HEAD + "".join(_command(name, command) for name, command in COMMANDS.items())


def _command(name: str, command: Command) -> str:
    groups = command.groups()
    if name == "inspect":  # as long as that of pretrain, and the same but for the recipes
        groups = {"": groups[""]}
    words = " ".join(["prmim", name, *map(str.upper, command.places), "[--option VALUE] ..."])
    text = f"\n## prmim {name}\n\n```text\n{words}\n```\n\n{command.description}\n"
    for title, items in groups.items():
        text += (f"\n### {name}: {_first_lower(title)}\n" if title else "") + "\n" + _options(items)
    if name == "inspect":
        text += "\nAll options of [prmim pretrain](#prmim-pretrain) are accepted too.\n"
    return text


def _first_lower(title: str) -> str:
    return title[0].lower() + title[1:]


def _options(items: Iterable[Option]) -> str:
    rows = (f"| `--{item.name}` | {_default(item)} | {_meaning(item)} |\n" for item in items)
    return "| option | default | meaning |\n|---|---|---|\n" + "".join(rows)


def _meaning(item: Option) -> str:
    text = _cell(item.help)
    return re.sub(r"recipe: [^.]*", "[recipe](recipes.md)", text) if item.name == "config" else text


def _default(item: Option) -> str:
    value = item.default
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{','.join(_number(part) for part in value)}`"
    return f"`{_number(value)}`"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def recipes_page() -> str:
    """Return the page of all packaged recipes."""
    text = RECIPES_HEAD
    for kind, title in (("pretrain", "Pre-training"), ("evaluate", "Fine-tuning and linear probes")):
        text += f"\n## {title}\n"
        for name in recipe_names(kind):
            header = read_header(name)
            command = header.pop("command")
            rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in header.items() if key != "title")
            text += f"\n### {name}\n\n{header['title']}\n\n```text\n{command}\n```\n\n| | |\n|---|---|\n{rows}"
    return text


def deviations_page() -> str:
    """Return the page of deviations with the table of today."""
    page = (FOLDER / "deviations.md").read_text(encoding="utf-8")
    return re.sub(r"^\| where .*?\n(?!\|)", lambda _: _deviations(), page, flags=re.MULTILINE | re.DOTALL)


def _deviations() -> str:
    rows = ((where(found), found.item, found.published, found.source, found.ours, found.reason) for found in DEVIATIONS)
    return DEVIATIONS_HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def where(found: Deviation) -> str:
    """Return the methods and stages of a record in words."""
    methods = ", ".join(FAMILIES[method] for method in found.methods) or "all"
    return f"{methods}: {', '.join(STAGES[stage] for stage in found.stages)}"


PAGES = {"cli.md": cli_page, "recipes.md": recipes_page, "deviations.md": deviations_page}
"""Function that returns the text of each page."""


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")

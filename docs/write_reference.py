"""Write the reference pages that follow from the records of the code: python docs/write_reference.py.

The pages are `docs/reference/cli.md`, `docs/reference/recipes.md`, and the tables of `docs/reference/deviations.md`.
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

CLI_END = (
    "\n**Next:** [recipes](recipes.md), packaged files of options; [train on your own images](../start/images.md).\n"
)

RECIPES_HEAD = """\
# Recipes

A recipe is a packaged file of options. `prmim inspect --config NAME` prints its source, options, cost, and differences
from the published run. `docs/write_reference.py` generates this page.
"""

RECIPES_END = (
    "\n**Next:** [differences from the published runs](deviations.md); [evaluation](../guides/evaluation.md).\n"
)

DEVIATIONS_HEAD = "| what | published | here | why |\n|---|---|---|---|\n"


def cli_page() -> str:
    """Return the page of all commands and options."""
    return CLI_HEAD + "".join(_command(name, command) for name, command in COMMANDS.items()) + CLI_END


def _command(name: str, command: Command) -> str:
    groups = command.groups()
    if name == "inspect":  # as long as that of pretrain, and the same but for the recipes
        groups = {"": groups[""]}
    words = " ".join(["prmim", name, *map(str.upper, command.places), "[--option VALUE] ..."])
    text = f"\n## prmim {name}\n\n```text\n{words}\n```\n\n{_text(command.description)}\n"
    for title, items in groups.items():
        text += (f"\n### {name}: {_first_lower(title)}\n" if title else "") + "\n" + _options(items)
    if name == "inspect":
        text += "\nAll options of [prmim pretrain](#prmim-pretrain) are accepted too.\n"
    return text


def _first_lower(title: str) -> str:
    return title[0].lower() + title[1:]


def _options(items: Iterable[Option]) -> str:
    rows = (f"| `--{item.name}` | {_meaning(item)}{_default(item)} |\n" for item in items)
    return "| option | meaning |\n|---|---|\n" + "".join(rows)


def _meaning(item: Option) -> str:
    text = _cell(item.help)
    return re.sub(r"recipe: [^.]*", "[recipe](recipes.md)", text) if item.name == "config" else text


def _default(item: Option) -> str:
    value = item.default
    if value is None:
        return ""
    if isinstance(value, bool):
        return f" Default: {'on' if value else 'off'}."
    if isinstance(value, tuple):
        return f" Default: `{','.join(_number(part) for part in value)}`."
    return f" Default: `{_number(value)}`."


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return _text(text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*"))


def _text(text: str) -> str:
    """Return a text with options as code: typography would turn two hyphens into a dash."""
    parts = text.split("`")
    parts[::2] = (re.sub(r"--\w+", r"`\g<0>`", part) for part in parts[::2])
    return "`".join(parts)


def recipes_page() -> str:
    """Return the page of all packaged recipes."""
    text = RECIPES_HEAD
    for kind, title in (("pretrain", "Pre-training"), ("evaluate", "Fine-tuning and linear probes")):
        text += f"\n## {title}\n"
        for name in recipe_names(kind):
            header = read_header(name)
            command = _two_lines(header.pop("command"))
            rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in header.items() if key != "title")
            text += f"\n### {name}\n\n{header['title']}\n\n```text\n{command}\n```\n\n| | |\n|---|---|\n{rows}"
    return text + RECIPES_END


def _two_lines(command: str, longest: int = 80) -> str:
    """Return a long command with its last option on a second line."""
    head, _, last = command.rpartition(" --")
    return command if len(command) <= longest else f"{head} \\\n    --{last}"


def deviations_page() -> str:
    """Return the page of deviations with the tables of today."""
    page = (FOLDER / "deviations.md").read_text(encoding="utf-8")
    return re.sub(r"^### .*?\n(?=## )", lambda _: _deviations(), page, count=1, flags=re.MULTILINE | re.DOTALL)


def _deviations() -> str:
    tables: dict[str, str] = {}
    # Differences of all methods first, those of one method last.
    for found in sorted(DEVIATIONS, key=lambda found: (-(len(found.methods) or len(FAMILIES)), found.methods)):
        published = f"{found.published} ({found.source})"
        row = f"| {' | '.join((found.item, published, found.ours, found.reason))} |\n"
        tables[where(found)] = tables.get(where(found), DEVIATIONS_HEAD) + row
    return "".join(f"### {title}\n\n{table}\n" for title, table in tables.items())


def where(found: Deviation) -> str:
    """Return the methods and stages of a record in words."""
    methods = ", ".join(FAMILIES[method] for method in found.methods) or "All methods"
    return f"{methods}: {', '.join(STAGES[stage] for stage in found.stages)}"


PAGES = {"cli.md": cli_page, "recipes.md": recipes_page, "deviations.md": deviations_page}
"""Function that returns the text of each page."""


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")

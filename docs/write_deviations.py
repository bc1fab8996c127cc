"""Write the table of `docs/deviations.md` from the records in `prmim_train.config.deviations`."""

import re
from pathlib import Path

from prmim_train.config.deviations import DEVIATIONS, FAMILIES, STAGES, Deviation

PAGE = Path(__file__).with_name("deviations.md")
HEAD = "| where | what | published | read in | here | why |\n|---|---|---|---|---|---|\n"


def table() -> str:
    """Return the records as a Markdown table."""
    rows = ((where(found), found.item, found.published, found.source, found.ours, found.reason) for found in DEVIATIONS)
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def where(found: Deviation) -> str:
    """Return the methods and stages of a record in words."""
    methods = ", ".join(FAMILIES[method] for method in found.methods) or "all"
    return f"{methods}: {', '.join(STAGES[stage] for stage in found.stages)}"


def with_table(page: str) -> str:
    """Return the text of the page with the table of today."""
    return re.sub(r"^\| where .*?\n(?!\|)", lambda _: table(), page, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

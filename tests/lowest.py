"""Print every dependency's lower bound as a constraint for pip.

Run ``python tests/lowest.py``; the bounds come from `pyproject.toml`.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def pins(text: str) -> list[str]:
    """Return a pin per dependency of a project file, of all extras.

    Raises
    ------
    ValueError
        If a dependency has no lower bound, or two different ones.

    Examples
    --------
    >>> pins('[project]\\ndependencies = ["numpy>=2.0", "jsonargparse[signatures]>=4.40; os_name == \\'nt\\'"]')
    ['jsonargparse==4.40', 'numpy==2.0']
    """
    project = tomllib.loads(text)["project"]
    found: dict[str, str] = {}
    for requirement in sum(project.get("optional-dependencies", {}).values(), project["dependencies"]):
        match = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)(?:;.*)?", requirement)
        if match is None:
            raise ValueError(f"dependency: expected NAME>=VERSION, got {requirement}")
        name, bound = match.groups()
        if found.setdefault(name, bound) != bound:
            raise ValueError(f"{name}: expected one lower bound, got {found[name]} and {bound}")
    return [f"{name}=={bound}" for name, bound in sorted(found.items())]


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins(PROJECT.read_text(encoding="utf-8"))) + "\n")

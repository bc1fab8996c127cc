"""Description of a packaged recipe.

Paper, command, published number, and differences from the published run.
"""

from prmim_train.config.deviations import deviations_of
from prmim_train.config.layers import read_header, read_options, recipe_names

__all__ = ["recipe_lines"]


def recipe_lines(name: str) -> list[str]:
    """Describe a packaged recipe: header, options, and deviations.

    Options are listed for recipes of `evaluate` only.

    Parameters
    ----------
    name
        Name of the recipe, of `pretrain` or `evaluate`.

    Returns
    -------
    list of str
        Lines of text.

    Examples
    --------
    >>> for line in recipe_lines("digits")[:3]:
    ...     print(line[:70])
    Recipe digits
      The embedded digits: 1,797 real handwritten digits of 8 x 8 pixels (
      paper                    none: a recipe of this project, made to sho
    """
    header = read_header(name)
    lines = [f"Recipe {name}", f"  {header.pop('title')}", *(_row(key, text) for key, text in header.items())]
    if name in recipe_names("evaluate"):
        lines += ["", "Options", *(_row(key, str(value)) for key, value in read_options(name, "evaluate").items())]
    if deviations := deviations_of(name):
        lines += ["", "Differences from the published run"]
    for found in deviations:
        rows = {"published": found.published, "here": found.ours, "reason": found.reason}
        lines += [f"  {found.item}", *(_row(f"  {key}", text) for key, text in rows.items())]
    return lines


def _row(name: str, value: str) -> str:
    return f"  {name:<23}  {value}"

"""Layers of options: packaged recipes, YAML files and the command line."""

from collections.abc import Mapping
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from prmim_methods.messages import one_line
from prmim_methods.methods import METHOD_OPTION
from prmim_train.config.plain_yaml import PlainLoader
from prmim_train.config.pretrain import special_option_names
from prmim_train.config.training import TrainingOptions

RECIPE_FOLDERS = {"pretrain": "recipes", "evaluate": "recipes/evaluate"}
"""Folder of the packaged recipes of each command."""

KIND_OPTIONS = {"method": "pretrain", "protocol": "evaluate"}
"""Options that only a file of one command has."""

RECIPE_COMMANDS = {"pretrain": "prmim pretrain --config", "evaluate": "prmim evaluate --run RUN --config"}
"""Command that uses a recipe, by the command of the recipe."""

DEPENDENT_OPTIONS = {"model": ("embed_dim", "depth", "num_heads"), "channels": ("mean", "std")}
"""Option to the options that it resets. A layer that sets the key drops them from lower layers. For example, a recipe's
width must not survive ``--model vit_small``."""

NOT_STORED = ("out", "resume", "allow_changes")
"""Options that a run does not store."""

LARGEST_FILE = 2**16
"""Maximum number of characters of a file of options."""


def merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge dictionaries of options; later ones override earlier ones.

    A layer that sets an option drops its dependent options (`DEPENDENT_OPTIONS`) from the layers below. A layer that
    changes the method drops the options that differ between methods. A layer with fewer epochs drops `warmup_epochs`,
    which was meant for a longer run. The default warm-up is a fraction of the epochs.

    Examples
    --------
    >>> merge_layers({"model": "vit_tiny", "depth": 4, "epochs": 10}, {"model": "vit_small"})
    {'model': 'vit_small', 'epochs': 10}
    >>> merge_layers({"mask_ratio": 0.8, "norm_pix": False, "stages": 3}, {"method": "simmim"})
    {'stages': 3, 'method': 'simmim'}
    >>> merge_layers({"epochs": 800, "warmup_epochs": 40}, {"epochs": 100})
    {'epochs': 100}
    """
    special = special_option_names()
    merged: dict[str, Any] = {}
    for layer in layers:
        dropped = {field for name, fields in DEPENDENT_OPTIONS.items() if name in layer for field in fields}
        method = merged.get("method", METHOD_OPTION.default)
        if layer.get("method", method) != method:
            dropped |= special
        if "epochs" in merged and layer.get("epochs", merged["epochs"]) < merged["epochs"]:
            dropped.add("warmup_epochs")
        merged = {name: value for name, value in merged.items() if name not in dropped} | dict(layer)
    return merged


def recipe_names(command: str = "pretrain") -> list[str]:
    """Return the sorted names of a command's packaged recipes.

    The command is `pretrain` or `evaluate`.
    """
    folder = resources.files("prmim_train.config") / RECIPE_FOLDERS[command]
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> str | None:
    """Return the text of a packaged recipe; None if there is none of that name."""
    for command, folder in RECIPE_FOLDERS.items():
        if name in recipe_names(command):
            return (resources.files("prmim_train.config") / folder / f"{name}.yaml").read_text(encoding="utf-8")
    return None


def read_header(name: str) -> dict[str, str]:
    """Parse the first comment of a recipe: `title`, paper, command, and so on.

    Examples
    --------
    >>> header = read_header("simmim_vit_base_finetune")
    >>> header["expected"], header["measured"]
    ('published: 83.8 % top-1 after 800 epochs of pre-training', 'not by us')
    """
    lines = (read_recipe(name) or "").splitlines()
    comment = [line.removeprefix("#").removeprefix(" ") for line in takewhile(lambda line: line[:1] == "#", lines)]
    title, fields, *_ = "\n".join(comment).split("\n\n")
    header = {"title": " ".join(title.split())}
    for line in fields.splitlines():
        key, _, text = line.partition(" ")
        last = key or list(header)[-1]
        header[last] = f"{header.get(last, '')} {text.strip()}".strip()
    return header


def read_options(name_or_path: str | Path, command: str = "pretrain") -> dict[str, Any]:
    """Read the options of a packaged recipe or of a YAML file.

    Parameters
    ----------
    name_or_path
        The name of a packaged recipe (`recipe_names`), else the path of a file.
    command
        The command that takes the options: `pretrain` or `evaluate`.

    Returns
    -------
    dict
        Option name to value, as parsed from YAML. Names and values are not validated.

    Raises
    ------
    FileNotFoundError
        If there is neither a recipe nor a file of that name.
    ValueError
        If the options are those of the other command, the file is longer than `LARGEST_FILE`, not YAML, or not a list
        of `name: value`. Anchors, aliases, tags, nested values and duplicate names are refused.
    """
    text = str(name_or_path)
    content = read_recipe(text)
    if content is None:
        path = Path(name_or_path)
        if not path.is_file():
            known = ", ".join(recipe_names(command))
            raise FileNotFoundError(f"config: expected a YAML file or one of the recipes {known}, got {text!r}")
        with path.open("rb") as file:
            content = file.read(4 * LARGEST_FILE + 1).decode("utf-8", errors="surrogateescape")
    options = parse_options(content, text)
    for option, owner in KIND_OPTIONS.items():
        if option in options and owner != command:
            hint = f"use {RECIPE_COMMANDS[owner]} {text}"
            raise ValueError(one_line(f"config: expected options of prmim {command}, got those of {owner}; {hint}"))
    return options


def parse_options(content: str, name: str) -> dict[str, Any]:
    """Parse the text of a YAML file of options; see `read_options`."""
    if len(content) > LARGEST_FILE:
        raise ValueError(f"config: expected at most {LARGEST_FILE:,} characters, got more in {name}")
    try:
        options = yaml.load(content, PlainLoader)  # a SafeLoader
    except Exception as error:  # of YAML's own, and whatever its constructors make of odd numbers
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or f"{type(error).__name__} {error}"
        raise ValueError(one_line(f"config: expected YAML, got an error in {name}{where}: {reason}")) from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"config: expected lines of the form 'option: value' in {name}, got {type(options).__name__}")
    return options


def stored_options(config: TrainingOptions) -> dict[str, Any]:
    """Return the options that a run stores, as plain values: those that have an effect in it."""
    kept = {name: value for name, value in config.flat().items() if name not in {*NOT_STORED, *config.foreign_options}}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def dump_options(config: TrainingOptions) -> str:
    """Return the options that a run stores as YAML.

    Examples
    --------
    >>> from prmim_train.config.pretrain import pretrain_config
    >>> config = pretrain_config(image_size=(32, 64), warmup_epochs=2)
    >>> pretrain_config(**parse_options(dump_options(config), "copy")) == config
    True
    """
    return yaml.safe_dump(stored_options(config), sort_keys=False, default_flow_style=None)

"""Parse the command line into a validated configuration.

Records declare the options; jsonargparse writes the help and converts the values.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from prmim_methods import METHODS, MethodConfig
from prmim_methods.messages import one_line, shown
from prmim_methods.methods import METHOD_OPTION
from prmim_methods.record import Option, Rule, options
from prmim_train.config.classify import FOREIGN, INHERITED, ClassifyConfig, protocol_defaults
from prmim_train.config.layers import LARGEST_FILE, merge_layers, read_options
from prmim_train.config.pretrain import (
    PretrainConfig,
    change,
    pretrain_config,
    pretrain_option_names,
    run_folder,
    special_option_names,
)
from prmim_train.config.training import DIGITS, OF_DATA
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import measured_range
from prmim_train.run.processes import say

AUTO = "auto"
"""Value of `pixel_range` that measures the range on the images, unless the run has stored one."""
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NULL_WORDS = ("null", "~")
NUMBERS: dict[Any, Any] = {
    tuple[int, ...]: int | tuple[int, ...],
    Sequence[int]: int | tuple[int, ...],
    Sequence[float]: float | tuple[float, ...],
}
"""Types of several numbers, and what the command line accepts for them, also a single number outside a list."""


def command_option(name: str, type: Any, help: str, default: Any = None) -> Option:
    """Create an option of a command that no record declares."""
    return Option(name, type, default, Rule(help=help))


def pretrain_options() -> dict[str, list[Option]]:
    """Return all options of a pre-training run by group.

    They come from the records of the run and of all methods.
    """
    grouped = _grouped(PretrainConfig)
    special = special_option_names()
    shared = [item for item in options(MethodConfig) if item.name not in {*special, "init_seed"}]
    of_methods = {
        "Method": [METHOD_OPTION, *shared],
        "Options that differ between methods": [_special_option(name) for name in _ordered(special)],
    }
    return {"Data": grouped.pop("Data"), **of_methods, **grouped}


def _ordered(names: Iterable[str]) -> list[str]:
    """Return names of method options in the order of their declaration."""
    wanted, found = set(names), dict[str, None]()
    for method in METHODS.values():
        found |= dict.fromkeys(item.name for item in options(method) if item.name in wanted)
    return list(found)


def _special_option(name: str) -> Option:
    """Return an option that differs between methods.

    The help names its methods and defaults.
    """
    owners = {method: item for method, record in METHODS.items() for item in options(record) if item.name == name}
    item = next(iter(owners.values()))
    texts: dict[str, list[str]] = {}
    for method, owner in owners.items():
        texts.setdefault(owner.help, []).append(method)
    text = item.help
    if len(texts) > 1:
        text = " ".join(f"For {', '.join(names)}: {help}" for help, names in texts.items())
    elif len(owners) < len(METHODS):
        text += f" For {', '.join(owners)} only."
    defaults = {method: owner.default for method, owner in owners.items()}
    if len(set(defaults.values())) > 1:
        text += f" Default: {', '.join(f'{value} for {method}' for method, value in defaults.items())}."
        item = dataclasses.replace(item, default=None)
    # The record of a method rejects the choices of other methods.
    choices = {choice: meaning for owner in owners.values() for choice, meaning in owner.rule.choices.items()}
    return dataclasses.replace(item, rule=dataclasses.replace(_with_help(item.rule, text), choices=choices))


def _with_help(rule: Rule, text: str) -> Rule:
    """Return a rule with a help text that already names the choices."""
    return dataclasses.replace(rule, help=text, shows_choices=False)


def classify_options() -> dict[str, list[Option]]:
    """Return the options of a classifier's training by group, without the protocol.

    The help names the protocols that use an option, and defaults that depend on the protocol.
    """
    defaults = {protocol: protocol_defaults(protocol) for protocol in FOREIGN}

    def complete(item: Option) -> Option:
        if item.name in INHERITED:
            return inherited(item)
        owners = [name for name, foreign in FOREIGN.items() if item.name not in foreign]
        text = item.help + (f" For {owners[0]} only." if len(owners) == 1 else "")
        values = {protocol: item.check(recipe.get(item.name, item.default)) for protocol, recipe in defaults.items()}
        different = [f"for {protocol}: {value}" for protocol, value in values.items() if value != item.default]
        text += f" Default {', '.join(different)}." if different else ""
        return dataclasses.replace(item, rule=_with_help(item.rule, text))

    grouped = _grouped(ClassifyConfig)
    return {group: [complete(item) for item in items if item.name != "protocol"] for group, items in grouped.items()}


def inherited(item: Option) -> Option:
    """Return an option whose value comes from the run unless it is given."""
    unless = ", unless --data names other images" if item.name in OF_DATA else ""
    text = f"{item.help} Not given: as in the run{unless}."
    return dataclasses.replace(item, default=None, rule=_with_help(item.rule, text))


def _grouped(record: type) -> dict[str, list[Option]]:
    """Return the options of a record by the title of the class that declares them."""
    groups: dict[str, list[Option]] = {}
    for item in options(record):
        owner = next(cls for cls in reversed(record.__mro__) if item.name in vars(cls).get("__annotations__", {}))
        groups.setdefault(owner.group, []).append(item)  # type: ignore[attr-defined]  # every record of a run has a group
    return groups


def build_parser(
    command: str, description: str, groups: Mapping[str, Sequence[Option]], places: Sequence[str] = ()
) -> ArgumentParser:
    """Build the parser of a command, with types and help.

    Parameters
    ----------
    command
        Name of the command.
    description
        Description of the command.
    groups
        Options by title of the group. The title of options without a group is empty.
    places
        Options that can also be given by position.
    """
    words = " ".join([command, *map(str.upper, places)])
    parser = ArgumentParser(
        prog=f"prmim {command}",
        usage=f"prmim {words} [--option VALUE] ...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for title, items in groups.items():
        group: Any = parser.add_argument_group(title) if title else parser
        for item in items:
            text = item.help.replace("%", "%%") + (f" Off: --no_{item.name}." if item.is_flag else "")
            metavar = "" if item.is_flag else "VALUE"
            kind = NUMBERS.get(item.kind, item.kind)
            kind = kind | None if item.is_optional else kind
            group.add_argument(f"--{item.name}", type=kind, default=item.default, help=text, metavar=metavar)
    return parser


def split_words(words: Sequence[str], items: Sequence[Option], places: Sequence[str] = ()) -> dict[str, str]:
    """Split the words after a command into options and their texts.

    Parameters
    ----------
    words
        `--name value`, `--name=value`, `--flag`, or `--no_flag`; hyphens inside a name count as underscores.
    items
        The options of the command.
    places
        Options that can be given by position, in this order.

    Returns
    -------
    dict
        Name to text. If an option is given twice, the last text counts.

    Raises
    ------
    ValueError
        If an option is unknown or has no value, or a word belongs to no option.

    Examples
    --------
    >>> items = [command_option("epochs", int, ""), command_option("flip", bool, "")]
    >>> split_words(["--epochs", "3", "--no-flip"], items)
    {'epochs': '3', 'flip': 'false'}
    >>> split_words(["3"], items, ["epochs"])
    {'epochs': '3'}
    >>> split_words(["--epoch", "3"], items)
    Traceback (most recent call last):
    ...
    ValueError: --epoch: unknown option; did you mean --epochs?
    """
    known = {item.name: item for item in items}
    given: dict[str, str] = {}
    rest, unnamed = list(words), list(places)
    while rest:
        word = rest.pop(0)
        if unnamed and not word.startswith("--"):
            given[unnamed.pop(0)] = word
            continue
        if not word.startswith("--"):
            raise ValueError(f"{one_line(word)}: expected an option, as in --{items[0].name} VALUE, got {shown(word)}")
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in known and known[name[3:]].is_flag and not has_value:
            given[name[3:]] = "false"
            continue
        if name not in known:
            raise ValueError(f"--{one_line(name)}: unknown option{suggest(name, known, '--')}")
        if not has_value:
            is_alone = not rest or rest[0].startswith("--")
            if known[name].is_flag:
                values = TRUE_WORDS + FALSE_WORDS + (NULL_WORDS if known[name].is_optional else ())
                is_alone = is_alone or rest[0].lower() not in values
            if is_alone and not known[name].is_flag:
                raise ValueError(f"{name}: expected {known[name].expected}, got nothing")
            text = "true" if is_alone else rest.pop(0)
        given[name] = text
    return given


def convert(parser: ArgumentParser, items: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert texts, or values from YAML, to the types of their options.

    Parameters
    ----------
    parser
        The parser of the command.
    items
        Options of the command.
    given
        Option name to text or value.

    Returns
    -------
    dict
        Name to value.

    Raises
    ------
    ValueError, TypeError
        If a value is not of its option's type, or not allowed.
    """
    known = {item.name: item for item in items}
    values: dict[str, Any] = {}
    for name, value in given.items():
        item = known[name]
        try:
            converted = getattr(parser.parse_object({name: _prepare(item, value)}, defaults=False), name)
        except (ArgumentError, ValueError, TypeError) as error:
            raise ValueError(f"{name}: expected {item.expected}, got {shown(value)}") from error
        values[name] = item.check(converted)
    return values


def _prepare(item: Option, value: Any) -> Any:
    """Parse a text as a flag, a number, comma-separated numbers, or null."""
    if item.kind is str:
        return value
    if isinstance(value, list):
        return [_number(part) for part in value]
    if not isinstance(value, str):
        return value
    if len(value) > LARGEST_FILE:
        raise ValueError(value)
    if item.is_optional and value in NULL_WORDS:
        return None
    if item.is_flag:
        if value.lower() not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError(value)
        return value.lower() in TRUE_WORDS
    listed = value.removeprefix("[").removesuffix("]")
    if "," in value or listed != value:
        return [_number(part) for part in listed.split(",")]
    return _number(value)


def _number(value: Any) -> Any:
    """Parse a text as a decimal number: 010 is ten; 1:30 and 1_000 are not numbers."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return int(text, 16)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    raise ValueError(value)


def suggest(name: str, known: Collection[str], prefix: str = "") -> str:
    """Suggest the known name closest to an unknown one; empty if none is close."""
    if len(name) > 2 * max(map(len, known)):
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def read_config(given: Mapping[str, str], parser: ArgumentParser, items: Sequence[Option]) -> PretrainConfig:
    """Merge the layers of options and return the validated configuration.

    Prints a line if options come from a source that the user did not name.

    Parameters
    ----------
    given
        The texts of the command line, including `config`.
    parser
        The parser of the command.
    items
        Its options.
    """
    config_file = given.get("config")
    found = {} if config_file is None else read_options(config_file)
    is_auto = {**found, **given}.get("pixel_range") == AUTO
    given, found = (
        {name: value for name, value in layer.items() if name != "pixel_range" or not (is_auto or value == AUTO)}
        for layer in (given, found)
    )
    line = convert(parser, items, given)
    line.pop("config", None)
    layers = [line]
    if config_file is not None:
        layers.insert(0, _convert_file(found, config_file, parser, items))
    merged = _with_recipe(layers)
    run = RunDirectory(run_folder(**merged))
    if merged.get("resume") and RunDirectory.holds_run(run.path):
        # The given options need to suit the options of the run, not those of a new run.
        own = _convert_file(run.read_config(), str(run.path), parser, items)
        out = {"out": str(run.path), "resume": True}
        return pretrain_config(**merge_layers(own, *layers, out))
    config = pretrain_config(**merged)
    if is_auto:
        low, high = measured_range(config)
        config = change(config, pixel_range=(low, high))
        say(f"Pixel range: {low:g},{high:g}, measured on the images.")
    if config.resume:
        # Schedulers repeat the same command, which then starts the run the first time.
        say(f"No run in {config.run_path} yet: --resume starts a new one.")
    if config.data == DIGITS:
        which = "No --data given" if "data" not in merge_layers(*layers) else "Data"
        say(
            f"{which}: the embedded digits, with the packaged recipe '{DIGITS}'. For your own images, add "
            "--data FOLDER (see prmim pretrain --help)."
        )
    return config


def read_classify_options(name_or_path: str, parser: ArgumentParser, items: Sequence[Option]) -> dict[str, Any]:
    """Read a classifier's training options from a packaged recipe or a YAML file.

    Parameters
    ----------
    name_or_path
        Name of the recipe, or path of the file.
    parser
        The parser of the command.
    items
        Options that are allowed in a file.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        If there is no such file, or an option is unknown, not allowed or one of `prmim pretrain`.
    """
    found = read_options(name_or_path, "evaluate")
    for name in found:
        if name in pretrain_option_names() and name not in {item.name for item in items}:
            raise ValueError(f"{name}: expected an option of prmim evaluate in {name_or_path}, got one of pretrain")
    return _convert_file(found, name_or_path, parser, items)


def _with_recipe(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge layers of options, over the recipe of the digits if they are the data."""
    merged = merge_layers(*layers)
    if merged.get("data", DIGITS) != DIGITS:
        return merged
    return merge_layers(read_options(DIGITS), *layers)


def _convert_file(
    found: Mapping[str, Any], name: str | Path, parser: ArgumentParser, items: Sequence[Option]
) -> dict[str, Any]:
    known = {item.name for item in items} - {"config"}
    for key in found:
        if key not in known:
            raise ValueError(f"{one_line(key)}: unknown option in {name}{suggest(key, known)}")
    return convert(parser, items, found)

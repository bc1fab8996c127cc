"""From the words of the command line to a checked configuration.

jsonargparse knows the type of every option and writes the help; the words are taken apart here, so that whatever is
wrong with them is told in one line that names the option.
"""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser

from prmim_train.classify_config import FOREIGN, INHERITED, RECIPES, ClassifyConfig
from prmim_train.config import DIGITS, PretrainConfig
from prmim_train.layers import merge_layers, parse_options, read_options
from prmim_train.methods import METHODS, SPECIAL_OPTIONS
from prmim_train.run_directory import RunDirectory

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")

EXPECTED = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[float, float]: "two numbers, as in 0.2,1",
    tuple[float, ...]: "one number for each channel, as in 0.5,0.5,0.5",
    int | tuple[int, ...]: "a whole number, or height,width",
}


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Parameters
    ----------
    name
        What stands behind `--`, and in a file.
    type
        A key of `EXPECTED`, or the union of one with None.
    help
        One sentence or two.
    default
        The value where nothing is given.
    """

    name: str
    type: Any
    help: str
    default: Any = None

    @property
    def is_flag(self) -> bool:
        """Whether the option may stand without a value."""
        return self.type is bool

    @property
    def expected(self) -> str:
        """What values look like, for messages."""
        for kind, words in EXPECTED.items():
            if self.type == kind:
                return words
            if self.type == typing.Optional[kind]:  # noqa: UP045  # `kind | None` is no expression mypy knows for a variable
                return f"{words}, or null"
        raise TypeError(f"{self.name}: no words for the type {self.type}")


def config_options() -> list[Option]:
    """Return one option for each field of `PretrainConfig`, its help from the class's docstring.

    The help of an option that not every method has ends with the methods that do.
    """

    def complete(option: Option) -> Option:
        if option.name not in SPECIAL_OPTIONS:
            return option
        owners = [name for name, traits in METHODS.items() if option.name in traits.options]
        return replace(option, help=f"{option.help} For {' and '.join(owners)} only.")

    return [complete(option) for option in _field_options(PretrainConfig)]


def classify_options() -> list[Option]:
    """Return one option for each field of `ClassifyConfig` but the protocol, which says what the defaults are.

    The help of an option tells where it has no effect, and what its default is if that depends on something.
    """

    def complete(option: Option) -> Option:
        if option.name in INHERITED:
            return replace(option, help=f"{option.help} Not given: as in the run.", default=None)
        owners = [name for name, foreign in FOREIGN.items() if option.name not in foreign]
        text = option.help + (f" For {owners[0]} only." if len(owners) == 1 else "")
        if option.name in RECIPES["linear"]:
            text += f" Not given, for linear: {RECIPES['linear'][option.name]}."
        return replace(option, help=text)

    return [complete(option) for option in _field_options(ClassifyConfig) if option.name != "protocol"]


def _field_options(config: type) -> list[Option]:
    """Return one option for each field of a dataclass, its help from the class's docstring."""
    types = typing.get_type_hints(config)
    texts = {entry.arg_name: entry.description for entry in parse_docstring(inspect.getdoc(config) or "").params}
    return [
        Option(
            field.name, types[field.name], " ".join((texts[field.name] or "").split()).replace("`", ""), field.default
        )
        for field in dataclasses.fields(config)
    ]


def build_parser(
    command: str, description: str, options: Sequence[Option], groups: Mapping[str, str] | None = None
) -> ArgumentParser:
    """Return the parser of one command: its types and its help.

    Parameters
    ----------
    command
        Its name.
    description
        What it does.
    options
        Its options.
    groups
        Titles of groups in the help, by the name of the option that begins the group.

    Returns
    -------
    ArgumentParser
    """
    parser = ArgumentParser(
        prog=f"prmim {command}",
        usage=f"prmim {command} [--option VALUE] ...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    group: Any = parser
    for option in options:
        if groups and option.name in groups:
            group = parser.add_argument_group(groups[option.name])
        metavar = "" if option.is_flag else "VALUE"
        text = option.help.replace("%", "%%") + (f" Off: --no_{option.name}." if option.is_flag else "")
        group.add_argument(f"--{option.name}", type=option.type, default=option.default, help=text, metavar=metavar)
    return parser


def split_words(words: Sequence[str], options: Sequence[Option]) -> dict[str, str]:
    """Take the words behind a command apart into options and their texts.

    Parameters
    ----------
    words
        `--name value`, `--name=value`, `--flag`, or `--no_flag`; hyphens inside a name count as underscores.
    options
        The options of the command.

    Returns
    -------
    dict
        Name to text; where an option is given twice, the last text.

    Raises
    ------
    ValueError
        If an option is unknown or has no value, or if a word belongs to none.

    Examples
    --------
    >>> options = [Option("epochs", int, ""), Option("flip", bool, "")]
    >>> split_words(["--epochs", "3", "--no-flip"], options)
    {'epochs': '3', 'flip': 'false'}
    >>> split_words(["--epoch", "3"], options)
    Traceback (most recent call last):
    ...
    ValueError: --epoch: unknown option; did you mean --epochs?
    """
    known = {option.name: option for option in options}
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word}: expected an option, as in --{options[0].name} VALUE, got {word!r}")
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in known and known[name[3:]].is_flag and not has_value:
            given[name[3:]] = "false"
            continue
        if name not in known:
            raise ValueError(f"--{name}: unknown option{suggest(name, known, '--')}")
        if not has_value:
            is_alone = not rest or rest[0].startswith("--")
            if known[name].is_flag:
                is_alone = is_alone or rest[0].lower() not in TRUE_WORDS + FALSE_WORDS
            if is_alone and not known[name].is_flag:
                raise ValueError(f"{name}: expected {known[name].expected}, got nothing")
            text = "true" if is_alone else rest.pop(0)
        given[name] = text
    return given


def convert(parser: ArgumentParser, options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn texts, or what YAML made of them, into values of the options' types.

    Parameters
    ----------
    parser
        The parser of the command.
    options
        Its options.
    given
        Name to text or value; every name is that of an option.

    Returns
    -------
    dict
        Name to value.

    Raises
    ------
    ValueError
        If a value is not of its option's type.
    """
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for name, value in given.items():
        option = known[name]
        try:
            plain = _prepare(option, value)
            values[name] = getattr(parser.parse_object({name: plain}, defaults=False), name)
        except (ArgumentError, ValueError, TypeError) as error:
            raise ValueError(f"{name}: expected {option.expected}, got {value!r}") from error
    return values


def _prepare(option: Option, value: Any) -> Any:
    """Rewrite the spellings that people use and YAML does not know."""
    if option.is_flag and isinstance(value, str):
        if value.lower() not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError(value)
        return value.lower() in TRUE_WORDS
    if option.type is not str and isinstance(value, str) and "," in value and not value.startswith(("[", "(")):
        return f"[{value}]"
    return value


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint at the known name that looks most like an unknown one; empty where none does."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def read_config(
    given: Mapping[str, str], parser: ArgumentParser, options: Sequence[Option], say: Callable[[str], None]
) -> PretrainConfig:
    """Lay the layers of options over each other and check the result.

    Parameters
    ----------
    given
        The texts of the command line, `config` among them.
    parser
        The parser of the command.
    options
        Its options.
    say
        Called with a line for the user where options come from somewhere that was not named.

    Returns
    -------
    PretrainConfig
    """
    line = convert(parser, options, given)
    config_file = line.pop("config", None)
    layers = [line]
    if config_file is not None:
        layers.insert(0, _convert_file(read_options(config_file), config_file, parser, options))
    config = _with_recipe(layers)
    if config.resume and RunDirectory.holds_run(config.run_path):
        run = RunDirectory(config.run_path)
        own = _convert_file(parse_options(run.read_config(), str(run.path)), str(run.path), parser, options)
        out = {"out": str(run.path), "resume": True}
        return PretrainConfig(**merge_layers(own, *layers, out))
    if config.resume:
        # The same command then starts a run and goes on with it, which is what job schedulers call again and again.
        say(f"No run in {config.run_path} yet: a new one begins.")
    if config.data == DIGITS:
        which = "No --data given" if "data" not in merge_layers(*layers) else "Data"
        say(
            f"{which}: the embedded digits, with the packaged recipe '{DIGITS}'. Your own images: --data FOLDER "
            "(see prmim pretrain --help)."
        )
    return config


def _with_recipe(layers: Sequence[Mapping[str, Any]]) -> PretrainConfig:
    merged = merge_layers(*layers)
    if merged.get("data", DIGITS) != DIGITS:
        return PretrainConfig(**merged)
    return PretrainConfig(**merge_layers(read_options(DIGITS), *layers))


def _convert_file(
    found: Mapping[str, Any], name: str | Path, parser: ArgumentParser, options: Sequence[Option]
) -> dict[str, Any]:
    known = {option.name for option in options} - {"config", "traceback"}
    for key in found:
        if key not in known:
            raise ValueError(f"{key}: unknown option in {name}{suggest(key, known)}")
    return convert(parser, options, found)

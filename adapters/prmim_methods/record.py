"""Records: frozen, self-validating dataclasses that declare each option once.

A field made by :func:`option` states its type, default, allowed values and one sentence of documentation. Validation,
the class docstring, the command line and its help all come from that declaration.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from prmim_methods.messages import one_line, shown

T = TypeVar("T", bound=type)

Function = Callable[..., Any]
"""Type of the custom functions and classes that an option of type ``str | Function`` accepts besides text."""
IMPORT_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
"""Pattern of an import path, ``package.module:function``."""

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number{}",
    float: "a number{}",
    str: "text",
    tuple[float, float]: "two numbers{}",
    tuple[float, float, float]: "three numbers{}",
    tuple[float, ...]: "one number{} for each channel",
    tuple[int, ...]: "a whole number{}, or one for each axis",
    Sequence[int]: "whole numbers{}",
    Sequence[float]: "numbers{}",
}
"""The types of options in words, with a place for the bounds."""

LARGEST_INTEGER = 2**31 - 1
"""Largest whole number of an option without an upper bound."""
LONGEST_TEXT = 4096
"""Maximal number of characters of an option's text, that of a path."""
LONGEST_TUPLE = 10_000
"""Maximal number of numbers of an option."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Control characters of terminals, which are not allowed in text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Documentation and allowed values of a field, as declared by :func:`option`.

    Parameters
    ----------
    help
        One sentence.
    choices
        Allowed values and their meaning; empty: all.
    above, below, at_least, at_most
        Bounds of a number, or of each number of a tuple.
    rising
        Whether the numbers of a tuple must be ascending; equal neighbours are allowed.
    function
        Arguments and result of custom functions, for the type ``str | Function``; empty: no function is allowed.
    shows_choices
        Whether the documentation lists the choices after the sentence.
    """

    help: str
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    rising: bool = False
    function: str = ""
    shows_choices: bool = True

    def range_words(self) -> str:
        """Return the bounds in words, for example ``" in (0, 1]"``; empty without bounds."""
        lower = self.above if self.at_least is None else self.at_least
        upper = self.below if self.at_most is None else self.at_most
        if lower is not None and upper is not None:
            return f" in {'[' if self.above is None else '('}{lower}, {upper}{']' if self.below is None else ')'}"
        if lower is not None:
            return f" above {lower}" if self.at_least is None else f" of at least {lower}"
        return "" if upper is None else f" of at most {upper}"

    def admits(self, number: float) -> bool:
        """Return whether a number is finite and within the bounds."""
        return (
            (isinstance(number, int) or math.isfinite(number))  # isfinite converts to float, which may overflow
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
        )


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a record or of a command.

    Parameters
    ----------
    name
        Name of the field, and of the option on the command line and in files.
    type
        A key of :data:`WORDS`, or its union with None.
    default
        Value of an option that is not given.
    rule
        Its documentation and allowed values.
    """

    name: str
    type: Any
    default: Any
    rule: Rule

    @property
    def kind(self) -> Any:
        """The type without None and functions."""
        if not (self.is_optional or self.takes_function):
            return self.type
        (kind,) = (kind for kind in typing.get_args(self.type) if kind not in (types.NoneType, Function))
        return kind

    @property
    def is_optional(self) -> bool:
        """Whether None is allowed."""
        return types.NoneType in typing.get_args(self.type)

    @property
    def takes_function(self) -> bool:
        """Whether a function or its import path is allowed."""
        return bool(self.rule.function)

    @property
    def is_flag(self) -> bool:
        """Whether the option is a flag, true or false, possibly null."""
        return self.kind is bool

    @property
    def expected(self) -> str:
        """The allowed values in words, for messages."""
        words = WORDS[self.kind].format(self.rule.range_words())
        if self.rule.choices:
            words = f"one of {', '.join(self.rule.choices)}"
        words += ", or package.module:function" * self.takes_function
        if self.rule.rising:
            words = re.sub("(whole )?numbers", r"ascending \g<0>", words)
        return words + (", or null" if self.is_optional else "")

    @property
    def help(self) -> str:
        """The documentation, the sentence, then the meaning of each choice."""
        if not self.rule.choices or not self.rule.shows_choices:
            return self.rule.help
        meanings = [f"{choice} ({meaning})" if meaning else choice for choice, meaning in self.rule.choices.items()]
        if self.takes_function:
            meanings.append(f"or a function of your own, package.module:function ({self.rule.function})")
        return f"{self.rule.help.removesuffix('.')}: {', '.join(meanings)}."

    def check(self, value: Any) -> Any:
        """Validate a value and return its canonical form.

        Lists become tuples; integers become floats where needed.

        Raises
        ------
        TypeError
            If the value has another type.
        ValueError
            If the value is not allowed. Both messages are one line: name, expected, got.
        """
        if value is None and self.is_optional:
            return None
        if self.names_function(value):
            return value
        try:
            checked = _CONVERTERS[self.kind](value)
            wanted = self._objection(checked)
        except TypeError:
            raise TypeError(f"{self.name}: expected {self.expected}, got {shown(value)}") from None
        except OverflowError:  # an integer out of the range of floats
            wanted = self.expected
        if wanted:
            raise ValueError(f"{self.name}: expected {wanted}, got {shown(value)}")
        return checked

    def names_function(self, value: Any) -> bool:
        """Return whether a value of this option is a function or an import path."""
        is_path = isinstance(value, str) and len(value) <= LONGEST_TEXT and IMPORT_PATH.fullmatch(value) is not None
        return self.takes_function and (callable(value) or is_path)

    def load(self, value: Any) -> Any:
        """Return the function at an import path, see `load_function`, or another value."""
        return value if callable(value) or not self.names_function(value) else load_function(self.name, value)

    def _objection(self, value: Any) -> str:
        """Return the expectation that a value of the right type violates; empty if none."""
        if self.rule.choices:
            return "" if value in self.rule.choices else self.expected
        if isinstance(value, bool):
            return ""
        if isinstance(value, str):
            return self._objection_to_text(value)
        numbers = value if isinstance(value, tuple) else (value,)
        is_rising = not self.rule.rising or all(a <= b for a, b in pairwise(numbers))
        if not (is_rising and numbers and all(self.rule.admits(number) for number in numbers)):
            return self.expected
        is_bounded = self.rule.at_most is not None or all(
            isinstance(number, float) or abs(number) <= LARGEST_INTEGER for number in numbers
        )
        return "" if is_bounded else f"whole numbers up to {LARGEST_INTEGER}"

    def _objection_to_text(self, text: str) -> str:
        if len(text) > LONGEST_TEXT:
            return f"at most {LONGEST_TEXT:,} characters"
        if CONTROL.search(text):
            return "text without control characters"
        return "" if text else self.expected


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError
    return int(value.__index__())


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    return os.fsdecode(value)


def _tuple(convert: Callable[[Any], Any], length: int | None = None) -> Callable[[Any], tuple[Any, ...]]:
    def convert_all(value: Any) -> tuple[Any, ...]:
        is_tuple = isinstance(value, tuple | list) and len(value) <= LONGEST_TUPLE
        if not is_tuple or (length is not None and len(value) != length):
            raise TypeError
        return tuple(map(convert, value))

    return convert_all


def _list(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Convert any number of values; a single value needs no list."""
    return lambda value: _tuple(convert)(value if isinstance(value, tuple | list) else (value,))


def _size(value: Any) -> tuple[int, ...]:
    """Convert one number for each axis; a single number stands for two equal sides."""
    return _tuple(_whole_number)(value if isinstance(value, tuple | list) else (value, value))


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _flag,
    int: _whole_number,
    float: _number,
    str: _text,
    tuple[float, float]: _tuple(_number, 2),
    tuple[float, float, float]: _tuple(_number, 3),
    tuple[float, ...]: _tuple(_number),
    tuple[int, ...]: _size,
    Sequence[int]: _list(_whole_number),
    Sequence[float]: _list(_number),
}


def option(
    help: str,
    *,
    default: Any,
    choices: Mapping[str, str] | None = None,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    rising: bool = False,
    function: str = "",
) -> Any:
    """Declare a field of a record; see :class:`Rule` for the other arguments."""
    rule = Rule(
        help=help,
        choices={} if choices is None else choices,
        above=above,
        below=below,
        at_least=at_least,
        at_most=at_most,
        rising=rising,
        function=function,
    )
    return dataclasses.field(default=default, metadata={"rule": rule})


def load_function(option: str, path: str) -> Any:
    """Return the function at an import path, ``package.module:function``.

    As for ``python -m``, the search includes the current folder.

    Raises
    ------
    ValueError
        If there is no such module or function; the message names the option.
    """
    module, _, name = path.partition(":")
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # any error that the module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(one_line(f"{option}: expected a function to import, got {path!r} ({reason})")) from error
    if not callable(found):
        raise ValueError(f"{option}: expected a function at {path}, got {shown(found)}")
    return found


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def record(cls: T) -> T:
    """Turn a class into a frozen, keyword-only dataclass; document its options.

    A subclass changes the default of an inherited option by assigning the new default; the declaration is kept.

    Examples
    --------
    >>> @record
    ... class Crop(Record):
    ...     '''A random crop.'''
    ...
    ...     scale: float = option("Smallest share of the area.", default=0.2, above=0, at_most=1)
    >>> Crop(scale=2)
    Traceback (most recent call last):
    ...
    ValueError: scale: expected a number in (0, 1], got 2
    """
    bases = [base for base in cls.__mro__[:0:-1] if dataclasses.is_dataclass(base)]
    inherited = {item.name: item for base in bases for item in dataclasses.fields(base)}
    for name in inspect.get_annotations(cls):
        if name in inherited and name in vars(cls) and not isinstance(vars(cls)[name], dataclasses.Field):
            setattr(cls, name, dataclasses.field(default=vars(cls)[name], metadata=inherited[name].metadata))
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # in place
    cls.__doc__ = _document(cls)
    return cls


def _document(cls: type) -> str:
    """Return the docstring of a record with a section *Parameters*."""
    text = inspect.cleandoc(cls.__doc__ or "")
    lines = ["Parameters", "----------"]
    for item in options(cls):
        lines += [item.name, f"    {item.help} Default: {item.default!r}."]
    head, heading, tail = re.split(r"(\n\n(?:\w+\n-+\n)|\Z)", text, maxsplit=1)
    return f"{head}\n\n" + "\n".join(lines) + heading + tail


def options(cls: type) -> tuple[Option, ...]:
    """Return the options of a record class, in the order of declaration."""
    return _options(cls)


@functools.cache  # cached, because resolving type hints takes longer than validating all values
def _options(cls: type) -> tuple[Option, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        Option(item.name, hints[item.name], item.default, item.metadata["rule"])
        for item in dataclasses.fields(cls)
        if "rule" in item.metadata
    )


def find_option(cls: type, name: str) -> Option:
    """Return an option of a record class by name; KeyError if there is none."""
    return {item.name: item for item in options(cls)}[name]


class Record:
    """Base of all records: validates options on creation, then calls :meth:`check`."""

    def __post_init__(self) -> None:
        """Validate, and bring the values into their canonical form."""
        for item in options(type(self)):
            object.__setattr__(self, item.name, item.check(getattr(self, item.name)))
        self.check()

    def check(self) -> None:
        """Validate combinations of options; raise ValueError with a one-line message."""

    def loaded(self, name: str) -> Any:
        """Return the value of an option; an import path is replaced by its function."""
        return find_option(type(self), name).load(getattr(self, name))

    def in_words(self, name: str) -> str:
        """Return the meaning of an option's value: the choice in words, or the function."""
        value = getattr(self, name)
        if not isinstance(value, str):
            return str(getattr(value, "__name__", type(value).__name__))
        return find_option(type(self), name).rule.choices.get(value, value)

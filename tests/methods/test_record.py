"""Declarations of options: validation, messages and documentation."""

import re
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from prmim_methods.messages import shown
from prmim_methods.record import Function, Option, Record, Rule, find_option, option, options, record


@record
class Crop(Record):
    """A random crop.

    Notes
    -----
    Bicubic.
    """

    group: ClassVar[str] = "Data"

    scale: float = option("Smallest share of the area.", default=0.2, above=0, at_most=1)
    kind: str = option("Shape of the crop.", default="square", choices={"square": "equal sides", "free": ""})
    seed: int | None = option("Seed. Null: none.", default=None, at_least=0)

    def check(self):
        """Validate options that depend on one another."""
        if self.kind == "square" and self.scale == 1:
            raise ValueError(f"scale: expected less than 1 for square crops, got {self.scale}")


@record
class Flip(Record):
    """Mirroring."""

    flip: bool = option("Mirror half of the crops.", default=True)


@record
class Augment(Crop, Flip):
    """Crops that may be mirrored."""

    kind: str = "free"
    flip: bool = False
    times: int = option("Crops of an image.", default=1, at_least=1)


def one(type, **rule):
    """Return an option without default."""
    return Option("x", type, None, Rule(help="An option.", **rule))


@pytest.mark.parametrize(
    ("item", "value", "expected"),
    [
        (one(bool), True, True),
        (one(int), 3, 3),
        (one(int), np.int64(3), 3),
        (one(float), 3, 3.0),
        (one(float), np.float32(0.5), 0.5),
        (one(float, at_least=0), 0, 0.0),
        (one(float, at_most=1), 1, 1.0),
        (one(str), "text", "text"),
        (one(str), Path("a/b"), "a/b"),
        (one(str, choices={"a": ""}), "a", "a"),
        (one(tuple[float, float]), [1, 2], (1.0, 2.0)),
        (one(tuple[float, float], rising=True), (1, 1), (1.0, 1.0)),
        (one(tuple[float, ...]), [1, 2, 3], (1.0, 2.0, 3.0)),
        (one(tuple[int, ...]), 8, (8, 8)),
        (one(tuple[int, ...]), [8], (8,)),
        (one(tuple[int, ...]), (8, 4, 2), (8, 4, 2)),
        (one(Sequence[int]), [8, 4], (8, 4)),
        (one(Sequence[int]), 8, (8,)),
        (one(Sequence[float]), (2, 0.5), (2.0, 0.5)),
        (one(Sequence[float]), 1, (1.0,)),
        (one(int | None), None, None),
        (one(int | None), 3, 3),
        (one(str | None), None, None),
    ],
    ids=lambda value: f"{value.type}" if isinstance(value, Option) else repr(value),
)
def test_values_become_canonical(item, value, expected):
    checked = item.check(value)
    assert checked == expected
    assert type(checked) is type(expected)


def own():
    """Return an option that names a choice or a function."""
    return Option("x", str | Function, "a", Rule(help="An option.", choices={"a": "the first"}, function="n -> m"))


@pytest.mark.parametrize("value", ["a", "math:sqrt", "os.path:join", "collections:OrderedDict.fromkeys", len, Path])
def test_an_option_may_take_a_function(value):
    assert own().check(value) == value
    loaded = own().load(value)
    assert loaded == value if value == "a" else callable(loaded)
    assert own().kind is str
    assert own().help == "An option: a (the first), or a function of your own, package.module:function (n -> m)."


@pytest.mark.parametrize(
    "value", ["b", "math.sqrt", "math:", ":sqrt", "math:sqrt:x", "a b:c", "1:30", "x:" + "y" * 4096]
)
def test_other_text_is_no_function(value):
    with pytest.raises(ValueError, match=r"^x: expected one of a, or package\.module:function, got '"):
        own().check(value)
    with pytest.raises(ValueError, match=r"^x: expected one of a, got 'math:sqrt'$"):
        one(str, choices={"a": ""}).check("math:sqrt")


def test_functions_of_the_current_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "prmim_own_module.py").write_text("def f():\n    return 3\n\nnumber = 4\n")
    (tmp_path / "prmim_broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert own().load("prmim_own_module:f")() == 3
    for value, message in (
        (
            "prmim_own_module:g",
            "got 'prmim_own_module:g' (AttributeError: module 'prmim_own_module' has no attribute 'g')",
        ),
        ("prmim_broken_module:f", "got 'prmim_broken_module:f' (ZeroDivisionError: division by zero)"),
        ("prmim_no_module:f", "got 'prmim_no_module:f' (ModuleNotFoundError: No module named 'prmim_no_module')"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape('x: expected a function to import, ' + message)}$"):
            own().load(value)
    with pytest.raises(ValueError, match=r"^x: expected a function at prmim_own_module:number, got 4$"):
        own().load("prmim_own_module:number")


WRONG = [
    (one(bool), 1, TypeError, "true or false"),
    (one(bool), None, TypeError, "true or false"),
    (one(int), True, TypeError, "a whole number"),
    (one(int), 2.0, TypeError, "a whole number"),
    (one(int), "3", TypeError, "a whole number"),
    (one(int, at_least=1), 0, ValueError, "a whole number of at least 1"),
    (one(int, at_least=0, at_most=2**31 - 1), 2**31, ValueError, "a whole number in [0, 2147483647]"),
    (one(int, at_least=1), 2**31, ValueError, "whole numbers up to 2147483647"),
    (one(tuple[int, ...], at_least=1), (8, 10**40), ValueError, "whole numbers up to 2147483647"),
    (one(int, at_least=1), 10**400, ValueError, "whole numbers up to 2147483647"),
    (one(int, at_least=1), -(10**400), ValueError, "a whole number of at least 1"),
    (one(int, at_least=1), 1 << 10**5, ValueError, "whole numbers up to 2147483647"),
    (one(int | None), "3", TypeError, "a whole number, or null"),
    (one(float), True, TypeError, "a number"),
    (one(float), "0.5", TypeError, "a number"),
    (one(float), None, TypeError, "a number"),
    (one(float), [0.5], TypeError, "a number"),
    (one(float), float("nan"), ValueError, "a number"),
    (one(float), float("inf"), ValueError, "a number"),
    (one(float), 10**400, ValueError, "a number"),
    (one(float, above=0), 0, ValueError, "a number above 0"),
    (one(float, at_least=0.5), 0, ValueError, "a number of at least 0.5"),
    (one(float, at_most=1), 2, ValueError, "a number of at most 1"),
    (one(float, above=0, below=1), 1, ValueError, "a number in (0, 1)"),
    (one(float, above=0, at_most=1), 0, ValueError, "a number in (0, 1]"),
    (one(float, at_least=0, below=1), 1, ValueError, "a number in [0, 1)"),
    (one(str), 3, TypeError, "text"),
    (one(str), "", ValueError, "text"),
    (one(str), "a\x1b[2J", ValueError, "text without control characters"),
    (one(str), "a\n", ValueError, "text without control characters"),
    (one(str | None), "a\x00b", ValueError, "text without control characters"),
    (one(str), "x" * 4097, ValueError, "at most 4,096 characters"),
    (one(str, choices={"a": "", "b": ""}), "c", ValueError, "one of a, b"),
    (one(str, choices={"a": "", "b": ""}), ["a"], TypeError, "one of a, b"),
    (one(str | None, choices={"a": ""}), "c", ValueError, "one of a, or null"),
    (one(tuple[float, float]), 0.5, TypeError, "two numbers"),
    (one(tuple[float, float]), (1, 2, 3), TypeError, "two numbers"),
    (one(tuple[float, float], at_least=0, below=1), (0.9, 1.0), ValueError, "two numbers in [0, 1)"),
    (one(tuple[float, float], above=0, rising=True), (2, 1), ValueError, "two ascending numbers above 0"),
    (one(tuple[float, ...]), (), ValueError, "one number for each channel"),
    (one(tuple[float, ...], above=0), (1, 0), ValueError, "one number above 0 for each channel"),
    (one(tuple[float, ...] | None), 0.5, TypeError, "one number for each channel, or null"),
    (one(tuple[int, ...], at_least=1), 0, ValueError, "a whole number of at least 1, or one for each axis"),
    (one(tuple[int, ...], at_least=1), (8, 0), ValueError, "a whole number of at least 1, or one for each axis"),
    (one(tuple[int, ...]), (8, 4.0), TypeError, "a whole number, or one for each axis"),
    (one(tuple[int, ...]), "88", TypeError, "a whole number, or one for each axis"),
    (one(tuple[int, ...]), (), ValueError, "a whole number, or one for each axis"),
    (one(Sequence[int], at_least=1, rising=True), (2, 1), ValueError, "ascending whole numbers of at least 1"),
    (one(Sequence[int]), (1, 2.0), TypeError, "whole numbers"),
    (one(Sequence[float], above=0), (1, 0), ValueError, "numbers above 0"),
    (one(Sequence[float] | None), "1", TypeError, "numbers, or null"),
    (one(Sequence[float]), (), ValueError, "numbers"),
]


@pytest.mark.parametrize(
    ("item", "value", "error", "expected"),
    WRONG,
    ids=[f"{expected}-{shown(value)[:20]}" for _, value, _, expected in WRONG],
)
def test_wrong_values(item, value, error, expected):
    with pytest.raises(error, match=f"^{re.escape(f'x: expected {expected}, got {shown(value)}')}$"):
        item.check(value)


def test_a_message_is_one_line():
    with pytest.raises(ValueError, match=r"^x: ") as caught:
        one(str, choices={"a": ""}).check("two\nlines")
    assert "\n" not in str(caught.value)


def test_a_record_validates_and_converts():
    assert Crop(scale=np.float32(0.5), seed=3) == Crop(scale=0.5, seed=np.int64(3))
    assert hash(Crop()) == hash(Crop(scale=0.2))
    with pytest.raises(ValueError, match=r"^scale: expected a number in \(0, 1\], got 2$"):
        Crop(scale=2)
    with pytest.raises(ValueError, match=r"^scale: expected less than 1 for square crops, got 1.0$"):
        replace(Crop(), scale=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ratio'"):
        Crop(ratio=1)
    with pytest.raises(TypeError, match="positional"):
        Crop(0.5)
    with pytest.raises(FrozenInstanceError):
        Crop().scale = 0.5


def test_a_subclass_changes_defaults_of_every_base():
    assert [item.name for item in options(Augment)] == ["flip", "scale", "kind", "seed", "times"]
    assert Augment() == Augment(flip=False, scale=0.2, kind="free", seed=None, times=1)
    assert (Crop().kind, Flip().flip) == ("square", True)
    assert find_option(Augment, "kind") == replace(find_option(Crop, "kind"), default="free")
    with pytest.raises(ValueError, match=r"^kind: expected one of square, free, got 'round'$"):
        Augment(kind="round")
    with pytest.raises(TypeError, match=r"^flip: expected true or false, got 0$"):
        Augment(flip=0)


def test_unknown_options_have_no_declaration():
    with pytest.raises(KeyError, match="ratio"):
        find_option(Crop, "ratio")


def test_the_docstring_lists_the_options():
    assert Crop.__doc__ == (
        "A random crop.\n"
        "\n"
        "Parameters\n"
        "----------\n"
        "scale\n"
        "    Smallest share of the area. Default: 0.2.\n"
        "kind\n"
        "    Shape of the crop: square (equal sides), free. Default: 'square'.\n"
        "seed\n"
        "    Seed. Null: none. Default: None.\n"
        "\n"
        "Notes\n"
        "-----\n"
        "Bicubic."
    )
    assert "flip\n    Mirror half of the crops. Default: False." in Augment.__doc__
    assert Flip.__doc__.startswith("Mirroring.\n\nParameters\n")


def test_help_names_the_choices_where_it_is_asked_to():
    kind = find_option(Crop, "kind")
    assert kind.help == "Shape of the crop: square (equal sides), free."
    assert replace(kind, rule=replace(kind.rule, shows_choices=False)).help == "Shape of the crop."

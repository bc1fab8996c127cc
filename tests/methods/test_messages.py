"""Messages: one printable line of bounded length."""

import pytest

from prmim_methods.messages import LONGEST_LINE, LONGEST_VALUE, one_line, shorten, shown


def test_messages_are_folded_into_one_line():
    assert one_line(OSError("disk\n full")) == "disk full"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("bell\a, null\0", r"bell\x07, null\x00"),
        ("c1 \x9b31m", r"c1 \x9b31m"),
        ("right to left \u202e", r"right to left \u202e"),
        ("byte \udcff", r"byte \xff"),
        ("größe 大きさ", "größe 大きさ"),
    ],
)
def test_what_is_not_printable_is_escaped(text, line):
    assert one_line(text) == line


@pytest.mark.parametrize("char", ["x", "\x1b", "\U000e0001"])
def test_messages_are_of_bounded_length(char):
    line = one_line("begin" + char * 10**6 + "end")
    assert len(line) <= LONGEST_LINE
    assert line.startswith("begin")
    assert line.endswith("end")
    assert line.isprintable()


LONG = ["x" * 10**6, b"x" * 10**6, [0] * 10**6, 1 << 10**5, [1 << 10**5], -(10**4000)]


@pytest.mark.parametrize("value", LONG, ids=range(len(LONG)))
def test_values_are_of_bounded_length(value):
    assert 0 < len(shown(value)) <= LONGEST_VALUE


def test_both_ends_are_kept():
    assert shorten("0123456789" * 2, 15) == "01234 ... 56789"
    assert shorten("0123456789" * 2, 20) == "0123456789" * 2

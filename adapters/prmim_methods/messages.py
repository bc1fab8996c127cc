"""Sanitized text for messages: one printable line of bounded length; errors that processes exchange as text."""

from typing import Any

LONGEST_VALUE = 100
"""Maximal number of characters of a value in a message."""
LONGEST_LINE = 450
"""Maximal number of characters of a message."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, OSError, FileNotFoundError, NotADirectoryError, PermissionError)
}
"""Error types that are re-raised in other processes, by name; any other type becomes a RuntimeError."""


def shown(value: Any) -> str:
    """Return the ``repr`` of a value, shortened to `LONGEST_VALUE` characters.

    Examples
    --------
    >>> shown("epochs"), shown([1, 2])
    ("'epochs'", '[1, 2]')
    >>> len(shown("x" * 10**6)) <= LONGEST_VALUE
    True
    """
    try:
        return shorten(repr(value), LONGEST_VALUE)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return f"{type(value).__name__} of too many digits"


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> counted(1, "image"), counted(2000, "class", "classes")
    ('1 image', '2,000 classes')
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def printable(text: str) -> str:
    r"""Return text with unprintable characters escaped, for one line of a terminal.

    Examples
    --------
    >>> print(printable("Zoë/a\nb.jpg"))
    Zoë/a\nb.jpg
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def one_line(message: object) -> str:
    r"""Return a message or an error as one line of at most `LONGEST_LINE` characters.

    Examples
    --------
    >>> one_line("two\nlines, and \x1b[31mred")
    'two lines, and \\x1b[31mred'
    """
    text = shorten(" ".join(str(message).split()) or type(message).__name__, LONGEST_LINE)
    return shorten(printable(text), LONGEST_LINE)


def shorten(text: str, length: int) -> str:
    """Shorten a text to at most ``length`` characters by cutting out its middle.

    Examples
    --------
    >>> shorten("abcdefghijklmnopqrstuvwxyz", 15)
    'abcde ... vwxyz'
    """
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _escape(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # surrogate escape: a byte of a file name that is not UTF-8
        return f"\\x{ord(char) & 0xFF:02x}"
    return char.encode("unicode_escape").decode("ascii")

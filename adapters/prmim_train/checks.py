"""Checks of single options; each raises one line: the option, what was expected, what came."""

import math
from collections.abc import Callable, Sequence


def check_text(name: str, value: object) -> None:
    """Raise TypeError unless a value is text that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}: expected text, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless a value is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r}")


def check_name(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of the known names.

    Examples
    --------
    >>> check_name("device", "gpu", ("auto", "cpu", "cuda"))
    Traceback (most recent call last):
    ...
    ValueError: device: expected auto or cpu or cuda, got 'gpu'
    """
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")


def check_integer(name: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    """Raise TypeError unless a value is a whole number, ValueError unless it lies in the range."""
    limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number {limits}, got {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")


def check_number(name: str, value: object, expected: str, is_valid: Callable[[float], bool]) -> None:
    """Raise TypeError unless a value is a number, ValueError unless it is finite and valid; `expected` words that."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number {expected}, got {value!r}")
    if not math.isfinite(value) or not is_valid(value):
        raise ValueError(f"{name}: expected a number {expected}, got {value!r}")


def check_range(name: str, value: object, *, low_open: float, high: float) -> None:
    """Raise unless a value is a pair of rising numbers above `low_open`, at most `high`."""
    expected = f"two rising numbers above {low_open:g}" + (f", at most {high:g}" if math.isfinite(high) else "")
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(x, int | float) for x in value):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    low, top = value
    if not low_open < low <= top <= high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_multiple(name: str, value: int, other: str, divisor: int) -> None:
    """Raise ValueError unless one option is a multiple of another."""
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {other} ({divisor}), got {value}")

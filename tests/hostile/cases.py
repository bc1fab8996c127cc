"""The register of hostile cases, and what cases share.

A case puts one hostile or faulty situation into an empty folder and checks that it is handled: what is right is done,
or one clear line says why not. Modules beside this one declare the cases, with `case` or `cases`.
"""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prmim_methods.messages import LONGEST_LINE

KINDS = {
    1: "two writers",
    2: "the split moves",
    3: "resume with another task",
    4: "checkpoints of another run",
    5: "broken pipes and signals",
    6: "damaged run files",
    7: "orphan workers",
    8: "tar files",
    9: "images and folders",
    10: "YAML",
    11: "absurd sizes",
    12: "take_tokens",
    13: "plans of another grid",
    14: "plans from bad input",
    15: "meta-device initialisation",
    16: "export and devices",
}
LONGEST_MESSAGE = len("prmim: error: ") + LONGEST_LINE
"""Most characters of a message to the user."""

TINY = (
    *("--data", "tiny.npz", "--channels", "1", "--image_size", "8", "--patch_size", "2", "--precision", "float32"),
    *("--embed_dim", "16", "--depth", "1", "--num_heads", "2"),
    *("--decoder_dim", "16", "--decoder_depth", "1", "--decoder_heads", "2"),
    *("--batch_size", "8", "--epochs", "1", "--log_every", "1", "--pictures", "0", "--eval_limit", "0"),
)
"""A run of a second, on the images that `write_tiny` writes."""


@dataclass(frozen=True)
class Case:
    """One situation.

    Parameters
    ----------
    kind
        Key of `KINDS`.
    name
        What is hostile about it.
    check
        Called with an empty folder. Returns if the situation is handled, raises if not.
    is_quick
        Whether CI runs it: takes about a second.
    """

    kind: int
    name: str
    check: Callable[[Path], None]
    is_quick: bool


CASES: list[Case] = []


def case(kind: int, name: str, *, quick: bool = True) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register the decorated function as a case."""

    def register(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES.append(Case(kind, name, check, quick))
        return check

    return register


def cases(
    kind: int, values: Mapping[str, Any], *, quick: bool = True
) -> Callable[[Callable[[Path, Any], None]], Callable[[Path, Any], None]]:
    """Register the decorated function once per value. The keys name the cases."""

    def register(check: Callable[[Path, Any], None]) -> Callable[[Path, Any], None]:
        CASES.extend(Case(kind, name, partial(_with_value, check, value), quick) for name, value in values.items())
        return check

    return register


def _with_value(check: Callable[[Path, Any], None], value: Any, folder: Path) -> None:
    check(folder, value)


def refused(call: Callable[[], Any], *errors: type[Exception], says: str = "") -> str:
    """Check that a call raises one of these errors, not a subclass.

    The message must be one line of bounded length that says something.

    Returns
    -------
    str
        The message.
    """
    try:
        result = call()
    except errors as error:
        found = error
    else:
        raise AssertionError(f"expected {errors}, got the result {str(result)[:200]}")
    assert type(found) in errors, f"expected {errors}, got {found!r}"
    return check_line(str(found), says)


def check_line(line: str, says: str = "") -> str:
    """Check that a message is one informative, printable line of bounded length."""
    assert line, "the message is empty"
    assert line.isprintable(), f"not one printable line: {line!r}"
    assert len(line) <= LONGEST_MESSAGE, f"{len(line)} characters: {line}"
    assert says in line, f"expected {says!r} in the message, got {line}"
    return line


def write_tiny(folder: Path, number: int = 24) -> None:
    """Write `tiny.npz`: images of 8 x 8 pixels in two classes."""
    images = np.random.default_rng(0).integers(0, 256, (number, 8, 8), np.uint8)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(number) % 2)


def prmim(folder: Path, *words: str, code: int = 0, says: str = "") -> str:
    """Run `prmim` in a folder, in this process, and check its exit code.

    Parameters
    ----------
    folder
        The working directory.
    words
        The command and its options.
    code
        The expected exit code.
    says
        A part of the error's line (`code` is not 0), or of the output.

    Returns
    -------
    str
        All output.
    """
    from prmim_train.cli.commands import main

    output = io.StringIO()
    with _inside(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        got = main(list(words))
    return _check_output(got, output.getvalue(), code, says)


def prmim_process(
    folder: Path, *words: str, code: int = 0, says: str = "", seconds: float = 120, env: Mapping[str, str] | None = None
) -> str:
    """Run `prmim` in a process of its own; otherwise as `prmim`."""
    done = subprocess.run(
        [sys.executable, "-m", "prmim_train", *words],
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return _check_output(done.returncode, done.stdout, code, says)


def _check_output(got: int, output: str, code: int, says: str) -> str:
    assert "Traceback" not in output, output
    assert got == code, f"expected exit code {code}, got {got}: {output[-2000:]}"
    if code in (1, 2):
        lines = [line for line in output.splitlines() if line.startswith("prmim: error: ")]
        assert len(lines) == 1, f"expected one line of error, got {output[-2000:]}"
        check_line(lines[0], says)
    else:
        assert says in output, f"expected {says!r} in the output, got {output[-2000:]}"
    return output


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

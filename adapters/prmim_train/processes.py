"""One run in several processes: who is the main one, and how the others hear of what went wrong there.

Processes are started by `torchrun`, or, for JAX, by whatever sets `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
`JAX_PROCESS_ID`.  All of them go through the same program; the main process, number 0, alone prints and writes files.
"""

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

# Of every launcher: where it says the number of this process and how many there are, and what else it has to say.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
)


class FailedElsewhereError(RuntimeError):
    """Something failed in the main process, which says what; this process ends too."""


class Agrees(Protocol):
    """A process among others; an engine."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0, which is the main one."""

    def any(self, flag: bool) -> bool:
        """Return whether any process says True; it returns when all have asked."""


class Place(NamedTuple):
    """Which process this is, and of how many."""

    rank: int
    world_size: int


def launched() -> Place:
    """Return what the environment says of this process, before there is an engine.

    Raises
    ------
    ValueError
        If it says nonsense.

    Examples
    --------
    >>> launched()
    Place(rank=0, world_size=1)
    """
    for rank, *needed in LAUNCHERS:
        if all(name in os.environ for name in needed):
            size = _number(needed[0], at_least=1)
            if size > 1:
                return Place(_number(rank, at_least=0), size)
    return Place(0, 1)


def is_main() -> bool:
    """Say whether this is the main process, by the environment; true where that says nonsense."""
    try:
        return launched().rank == 0
    except ValueError:
        return True


def say(text: str) -> None:
    """Print a line, in the main process alone."""
    if is_main():
        print(text, flush=True)


def on_main(engine: Agrees, call: Callable[[], T]) -> T | None:
    """Call something in the main process alone, while the others wait; if it fails, fail in all.

    Parameters
    ----------
    engine
        What the processes agree by.
    call
        What to call.

    Returns
    -------
    T or None
        What the call returned; None in the other processes.

    Raises
    ------
    Exception
        What the call raised.
    FailedElsewhereError
        That it raised, in the other processes.
    """
    result, failure = None, None
    if engine.rank == 0:
        try:
            result = call()
        except Exception as error:
            failure = error
    if engine.any(failure is not None):
        raise failure or FailedElsewhereError("the main process failed")
    return result


def _number(name: str, *, at_least: int) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < at_least:
        raise ValueError(f"{name}: expected a whole number of at least {at_least} in the environment, got {text!r}")
    return int(text)

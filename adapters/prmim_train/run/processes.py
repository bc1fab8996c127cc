"""Distributed runs: rank and world size, and work for the main process only.

`torchrun` starts the processes. For JAX, set `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. All
processes run the same program. Only the main process, rank 0, prints and writes files.
"""

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")

# Environment variables of each launcher: rank, world size, and others that must be set.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
)


class FailedElsewhereError(RuntimeError):
    """The main process failed, and reports why. Raised in the other processes, which stop too."""


class Agrees(Protocol):
    """One process of a distributed run, such as an engine."""

    @property
    def rank(self) -> int:
        """Rank of this process. The main process has rank 0."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Collective: returns when all processes have called it."""


class Place(NamedTuple):
    """Rank of this process, and the number of processes."""

    rank: int
    world_size: int


def launched() -> Place:
    """Read rank and world size from the environment, before an engine exists.

    Raises
    ------
    ValueError
        If a variable is not a valid number.

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
    """Whether this is the main process. True if the environment is invalid."""
    try:
        return launched().rank == 0
    except ValueError:
        return True


def say(text: str) -> None:
    """Print a line in the main process; other processes print nothing."""
    if is_main():
        print(text, flush=True)


def on_main(engine: Agrees, call: Callable[[], T]) -> T | None:
    """Run a function on rank 0. The other ranks wait, and fail if it fails.

    Parameters
    ----------
    engine
        This process.
    call
        The function.

    Returns
    -------
    T or None
        Result of `call`; None in the other processes.

    Raises
    ------
    Exception
        The error of `call`, in the main process.
    FailedElsewhereError
        If `call` failed, in the other processes.
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

"""Distributed runs: rank and world size, and work for the main process only.

`torchrun` or SLURM's `srun` starts the processes. For JAX without `srun`, set `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. All processes run the same program. Only the main process (rank 0) prints and
writes files.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from prmim_methods.messages import shown

T = TypeVar("T")

# Environment variables of each launcher: rank, world size, and others that must be set.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"),
)


SRUN = ("SLURM_PROCID", "SLURM_NTASKS")
_FIRST_PORT, _PORTS = 20_000, 10_000


def adopt_srun() -> None:
    """Set the variables of `torchrun` from those of SLURM's `srun`, unless set.

    A batch script that starts a command without `srun` is one process, although SLURM sets the number of tasks of the
    job. JAX detects the tasks of `srun` itself.
    """
    is_batch_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_NODELIST" not in os.environ
    if any(name not in os.environ for name in SRUN) or is_batch_script or "RANK" in os.environ:
        return
    rank, size = (os.environ[name] for name in SRUN)
    job = os.environ.get("SLURM_JOB_ID", "")
    described = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", rank),
        "MASTER_ADDR": _first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(_FIRST_PORT + int(job) % _PORTS if job.isdecimal() else _FIRST_PORT),
    }
    for name, text in described.items():
        os.environ.setdefault(name, text)


def _first_host(nodes: str) -> str:
    """Return the first host of a node list in the notation of SLURM.

    Examples
    --------
    >>> _first_host("gpu[017-019,023]"), _first_host("a1,b[2-3]"), _first_host("gpu7")
    ('gpu017', 'a1', 'gpu7')
    """
    found = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes)
    assert found is not None
    return found[1] + (found[2] or "")


class FailedElsewhereError(RuntimeError):
    """The main process failed and reports the error.

    Raised in the other processes.
    """


class Agrees(Protocol):
    """One process of a distributed run, such as an engine."""

    @property
    def rank(self) -> int:
        """Rank of this process. The main process has rank 0."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process.

        Collective: returns when all processes have called it.
        """


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
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < at_least:
        raise ValueError(
            f"{name}: expected a whole number from {at_least} to 999999 in the environment, got {shown(text)}"
        )
    return int(text)

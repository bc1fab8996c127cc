"""Worker processes that compute the items of a sequence in advance, in order.

Each worker has its own two pipes, for tasks and for items. A pipe closes when the process at its other side ends, even
in the middle of an item. A killed worker therefore never blocks the run, and a killed run leaves no workers. With the
worker processes of grain, workers outlived a killed parent by 600 seconds. Queues of `multiprocessing` have the same
problem: both sides hold both ends, and a reader waits forever for the rest of an item.

Arrays are sent as raw bytes, since pickle copies them several times on each side. Shared memory would save another
copy, but ends a run with a bus error in containers that limit it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Make", "WorkerPool"]

Task = TypeVar("Task", contravariant=True)
Item = TypeVar("Item", covariant=True)
Array = NDArray[Any]

_AHEAD = 2  # pending tasks per worker
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_PATIENCE = 5.0  # seconds to wait for the exit code of a process


class Make(Protocol[Task, Item]):
    """Function from a task to an array and another item.

    Picklable; called in the workers.
    """

    def __call__(self, task: Task, note: Callable[[int], None], /) -> tuple[Array, Item]:
        """Return an array and a picklable item.

        Call `note` with a number >= 0 that identifies the current work.
        """
        ...


@dataclass(frozen=True)
class _Worker:
    process: Any
    tasks: Connection
    items: Connection
    noted: Any  # C integer in shared memory


class WorkerPool(Iterator[tuple[Array, Item]], Generic[Task, Item]):
    """Iterator over arrays and items from worker processes, in task order.

    Parameters
    ----------
    make : callable
        See `Make`.
    tasks : iterable
        One small picklable task per item; consumed lazily.
    workers : int
        Number of processes. Task k goes to worker k modulo this number.
    describe : callable
        Maps a number that `make` noted to a description, for the error message of a worker that dies.
    prepare : callable, optional
        Called first in every worker. Picklable.

    Raises
    ------
    ChildProcessError
        While iterating, if a worker died. The message names the cause and the worker's current work.
    Exception
        While iterating, the error that `make` raised for an item.
    """

    def __init__(
        self,
        make: Make[Task, Item],
        tasks: Iterable[Task],
        *,
        workers: int,
        describe: Callable[[int], str],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._tasks, self._describe = iter(tasks), describe
        self._workers: list[_Worker] = []
        self._num_dealt = self._num_received = 0
        # Runs once: on close, on garbage collection, or at program exit, before multiprocessing joins its processes.
        self._end = util.Finalize(self, _end_workers, args=(self._workers,), exitpriority=10)
        try:
            for _ in range(workers):
                self._workers.append(_start(make, prepare))
            for _ in range(workers * _AHEAD):
                self._deal()
        except BaseException:
            self.close()
            raise

    def __next__(self) -> tuple[Array, Item]:
        """Return the next array and item."""
        if self._num_received == self._num_dealt:
            self.close()
            raise StopIteration
        number = self._num_received % len(self._workers)
        try:
            result = _receive(self._workers[number].items)
        except (EOFError, OSError) as error:
            raise ChildProcessError(self._obituary(number)) from error
        self._num_received += 1
        if isinstance(result, Exception):
            raise result
        self._deal()
        return result

    def close(self) -> None:
        """End the workers. Idempotent."""
        self._tasks, self._num_dealt = iter(()), self._num_received
        self._end()

    def _deal(self) -> None:
        for task in self._tasks:
            with suppress(OSError):  # `__next__` reports a worker that died
                self._workers[self._num_dealt % len(self._workers)].tasks.send(task)
            self._num_dealt += 1
            return

    def _obituary(self, number: int) -> str:
        worker = self._workers[number]
        worker.process.join(_PATIENCE)
        busy = f" while reading {self._describe(worker.noted.value)}" if worker.noted.value >= 0 else ""
        return f"data: worker process {number + 1} of {len(self._workers)} {_how(worker.process.exitcode)}{busy}"


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    meaning = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{meaning}"


def _start(make: Make[Any, Any], prepare: Callable[[], None] | None) -> _Worker:
    # Never fork: locks that threads of JAX, PyTorch or this package hold would stay locked in the child.
    context = multiprocessing.get_context("spawn")
    their_tasks, our_tasks = context.Pipe(duplex=False)
    our_items, their_items = context.Pipe(duplex=False)
    noted = context.RawValue("q", -1)
    process = context.Process(target=_work, args=(make, prepare, their_tasks, their_items, noted), daemon=True)
    with _signals_held_back():
        process.start()
    their_tasks.close()  # otherwise the pipe does not end with the process
    their_items.close()
    return _Worker(process, our_tasks, our_items, noted)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block the signals that end a run.

    New processes then ignore them from the start; see `_work`.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.tasks.close()
        worker.items.close()
        worker.process.kill()  # workers have no state to save
    for worker in workers:
        worker.process.join(_PATIENCE)  # a worker that waits for a lost disk cannot be killed


# ---------------------------------------------------------------------------------------------------- the pipes


def _send(pipe: Connection, result: tuple[Array, Any] | Exception) -> None:
    if isinstance(result, Exception):
        pipe.send((result, None, None))
        return
    array = np.ascontiguousarray(result[0])
    pipe.send((result[1], array.dtype.str, array.shape))
    content = array.reshape(-1).view(np.uint8).data
    if sys.platform == "win32":
        pipe.send_bytes(content)
        return
    while content:
        content = content[os.write(pipe.fileno(), content) :]


def _receive(pipe: Connection) -> tuple[Array, Any] | Exception:
    item, dtype, shape = pipe.recv()
    if dtype is None:
        error: Exception = item
        return error
    array = np.empty(shape, dtype)
    content = array.reshape(-1).view(np.uint8).data
    if sys.platform == "win32":
        pipe.recv_bytes_into(content)
        return array, item
    while content:
        number = os.readv(pipe.fileno(), [content])
        if number == 0:
            raise EOFError
        content = content[number:]
    return array, item


# ------------------------------------------------------------------------------------------------- in the workers


def _work(
    make: Make[Any, Any], prepare: Callable[[], None] | None, tasks: Connection, items: Connection, noted: Any
) -> None:
    # Terminals and batch systems signal all processes of a run. The main process reacts, and still needs batches.
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    waiting: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_take_in, args=(tasks, waiting), daemon=True).start()
    if prepare is not None:
        prepare()

    def note(number: int) -> None:
        noted.value = number

    while True:
        task = waiting.get()
        result: tuple[Array, Any] | Exception
        try:
            result = make(task, note)
        except Exception as error:
            result = _portable(error)
        note(-1)
        try:
            _send(items, result)
        except OSError:  # the main process is gone
            os._exit(0)


def _take_in(tasks: Connection, waiting: SimpleQueue[Any]) -> None:
    """Receive tasks immediately, so that sending never blocks.

    Exits the process as soon as the pipe ends.
    """
    while True:
        try:
            waiting.put(tasks.recv())
        except (EOFError, OSError):
            os._exit(0)


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled.

    Exceptions of libraries become RuntimeErrors.
    """
    if type(error).__module__ == "builtins":
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")

"""Worker processes that make the items of a sequence ahead of their use, given out in order.

Each worker has two pipes, one for what it is asked and one for what it answers, and nothing that it shares with others.
The end of a process is the end of its pipes: the other side notices at once, also in the middle of an item, so that
neither a killed worker leaves the run waiting nor a killed run leaves workers behind. (Queues of `multiprocessing`
cannot promise that: all sides hold both ends, and a reader waits for the rest of an item forever.)

Arrays go through the pipes as they lie in memory; pickled they would be copied several times on each side. Shared
memory would save yet another copy, but where a container has little of it a run ends in a bus error.
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

_AHEAD = 2  # tasks in the hands of each worker
_ENDING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5.0  # seconds for the system to say how a process ended whose pipe has


class Make(Protocol[Task, Item]):
    """Makes an array and an item beside it from a task. Must be picklable; called in the workers."""

    def __call__(self, task: Task, note: Callable[[int], None], /) -> tuple[Array, Item]:
        """Return array and item, which must be picklable; `note` a number from 0 on that says what it is working on."""
        ...


@dataclass(frozen=True)
class _Worker:
    process: Any
    tasks: Connection
    items: Connection
    noted: Any  # a C integer in shared memory


class WorkerPool(Iterator[tuple[Array, Item]], Generic[Task, Item]):
    """Arrays and items made by worker processes, in the order of their tasks.

    Parameters
    ----------
    make : callable
        See `Make`.
    tasks : iterable
        One for each item, small, picklable; taken one by one.
    workers : int
        Number of processes; task k goes to worker k modulo this number.
    describe : callable
        From a number that `make` noted to words: a worker that dies was busy with it.
    prepare : callable, optional
        Called first in every worker; picklable.

    Raises
    ------
    ChildProcessError
        While iterating, when a worker has ended by itself: the message says how, and what it was busy with.
    Exception
        While iterating, what `make` raised for an item.
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
        # Runs once: when closed, when forgotten, or at the end of the program, before that waits for its processes.
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
        """End the workers; may be called more than once."""
        self._tasks, self._num_dealt = iter(()), self._num_received
        self._end()

    def _deal(self) -> None:
        for task in self._tasks:
            with suppress(OSError):  # a worker that has ended is noticed where its items are waited for
                self._workers[self._num_dealt % len(self._workers)].tasks.send(task)
            self._num_dealt += 1
            return

    def _obituary(self, number: int) -> str:
        worker = self._workers[number]
        worker.process.join(_PATIENCE)
        busy = f" while it read {self._describe(worker.noted.value)}" if worker.noted.value >= 0 else ""
        return f"data: worker process {number + 1} of {len(self._workers)} {_how(worker.process.exitcode)}{busy}"


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    meaning = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{meaning}"


def _start(make: Make[Any, Any], prepare: Callable[[], None] | None) -> _Worker:
    # Never forked: threads of JAX, PyTorch and our own would leave locks behind that nobody opens.
    context = multiprocessing.get_context("spawn")
    their_tasks, our_tasks = context.Pipe(duplex=False)
    our_items, their_items = context.Pipe(duplex=False)
    noted = context.RawValue("q", -1)
    process = context.Process(target=_work, args=(make, prepare, their_tasks, their_items, noted), daemon=True)
    with _signals_held_back():
        process.start()
    their_tasks.close()  # or a pipe would not end with the process
    their_items.close()
    return _Worker(process, our_tasks, our_items, noted)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back what ends a run, so that processes started here are born deaf to it; see `_work`."""
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
        worker.process.kill()  # it has nothing to lose
    for worker in workers:
        worker.process.join(_PATIENCE)  # one that waits for a disk that is gone cannot be killed


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
    # Terminals and batch systems signal all processes of a run. The main one decides what to do, and needs its batches.
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
        except OSError:  # nobody is left to take it
            os._exit(0)


def _take_in(tasks: Connection, waiting: SimpleQueue[Any]) -> None:
    """Take tasks as they come, so that who sends them never waits; end the process with the pipe, whatever it does."""
    while True:
        try:
            waiting.put(tasks.recv())
        except (EOFError, OSError):
            os._exit(0)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent: exceptions of libraries need not survive the way."""
    if type(error).__module__ == "builtins":
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")

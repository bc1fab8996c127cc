"""Worker processes: what they make, and how it is told when one of them ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from prmim_train.data.workers import WorkerPool

MODULE = """
    import os, signal, time

    import numpy as np

    class LibraryError(Exception):
        def __init__(self, one, two):  # which pickle does not know how to make
            super().__init__(one + two)

    def act(task, note):
        note(7)
        match task:
            case ("fail",): raise ValueError("as it should")
            case ("fail strangely",): raise LibraryError("ab", "cd")
            case ("exit", code): os._exit(code)
            case ("signal", number): os.kill(os.getpid(), number)
            case ("sleep", seconds): time.sleep(seconds)
            case ("large", size): return np.arange(size, dtype=np.uint8), size
            case ("array", dtype, shape): return np.ones(shape, dtype).swapaxes(0, 1), None
        return np.zeros(0), task

    def prepare():
        os.environ["PREPARED"] = "yes"

    def prepared(task, note):
        return np.zeros(0), (os.environ.get("PREPARED"), os.getpid())

    def fail_to_begin():
        os._exit(9)

    class Locked:
        def __reduce__(self):
            raise TypeError("cannot be sent")

        __call__ = act
"""


@pytest.fixture
def acts(tmp_path, monkeypatch):
    """A module that worker processes can import."""
    import importlib

    (tmp_path / "acts_of_workers.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("acts_of_workers")
    yield module
    import sys

    del sys.modules["acts_of_workers"]
    assert multiprocessing.active_children() == []


def results(make, tasks, workers: int = 1, **options) -> list:
    pool = WorkerPool(make, tasks, workers=workers, describe=lambda number: f"image {number}", **options)
    try:
        return list(pool)
    finally:
        pool.close()


def run(*args, **options) -> list:
    return [item for _, item in results(*args, **options)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 4, 25])
def test_items_come_in_the_order_of_the_tasks(acts, workers, number):
    assert run(acts.act, range(number), workers) == list(range(number))


def test_tasks_are_taken_when_they_are_due(acts):
    taken = []
    tasks = (taken.append(k) or k for k in range(1000))
    pool = WorkerPool(acts.act, tasks, workers=2, describe=str)
    assert [next(pool)[1], next(pool)[1]] == [0, 1]
    assert len(taken) == 6  # two ahead for each worker
    pool.close()
    assert list(pool) == []


def test_neither_large_tasks_nor_large_items_lock_up(acts):
    expected = np.arange(3_000_000, dtype=np.uint8)
    made = results(acts.act, [("large", 3_000_000), b"y" * 3_000_000] * 6, 2)
    for array, size in made[::2]:
        np.testing.assert_array_equal(array, expected)
        assert size == len(expected)
    assert [len(item) for _, item in made[1::2]] == [3_000_000] * 6


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1, 1, 5), (200, 300, 7)])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "bool"])
def test_arrays_arrive_as_they_are_and_may_be_written_to(acts, dtype, shape):
    ((array, _),) = results(acts.act, [("array", dtype, shape)])
    expected = np.ones(shape, dtype).swapaxes(0, 1)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
    array[...] = 0


def test_workers_are_prepared_and_take_turns(acts):
    said = run(acts.prepared, range(6), 3, prepare=acts.prepare)
    assert {word for word, _ in said} == {"yes"}
    processes = [process for _, process in said]
    assert processes[:3] == processes[3:]
    assert len(set(processes)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_out_where_its_item_would(acts, workers):
    pool = WorkerPool(acts.act, [0, 1, ("fail",), 3], workers=workers, describe=str)
    assert [next(pool)[1], next(pool)[1]] == [0, 1]
    with pytest.raises(ValueError, match="as it should"):
        next(pool)
    pool.close()


def test_errors_that_cannot_be_sent_come_as_their_text(acts):
    with pytest.raises(RuntimeError, match="LibraryError: abcd"):
        run(acts.act, [("fail strangely",)])


@pytest.mark.parametrize(
    ("task", "end"),
    [
        (("exit", 0), "exited with code 0"),
        (("exit", 3), "exited with code 3"),
        (("signal", signal.SIGSEGV), "was killed by SIGSEGV"),
        (("signal", signal.SIGKILL), r"was killed by SIGKILL \(the system does this when memory runs out\)"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_ends_says_how_and_what_it_was_busy_with(acts, task, end, workers):
    message = rf"data: worker process {workers} of {workers} {end} while reading image 7$"
    started = time.monotonic()
    with pytest.raises(ChildProcessError, match=message):
        run(acts.act, [0] * (workers - 1) + [task, *range(100)], workers)
    assert time.monotonic() - started < 20


def test_a_worker_that_does_not_begin(acts):
    with pytest.raises(ChildProcessError, match=r"data: worker process 1 of 1 exited with code 9$"):
        run(acts.act, range(10), prepare=acts.fail_to_begin)


def test_a_function_that_cannot_be_sent_is_an_error_at_once(acts):
    with pytest.raises(TypeError, match="cannot be sent"):
        run(acts.Locked(), range(10))


@pytest.mark.parametrize("size", [10, 5_000_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_noticed_in_the_middle_of_an_item(acts, size, workers):
    """For items larger than a pipe, the worker hangs in one that the reader awaits."""
    pool = WorkerPool(acts.act, [("large", size)] * 20, workers=workers, describe=str)
    next(pool)
    time.sleep(0.5)  # until all of them have gone as far as they can
    os.kill(pool._workers[-1].process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="was killed by SIGKILL"):
        list(pool)
    pool.close()


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_to_the_whole_run_do_not_end_workers(acts, number):
    """The main process decides: it may have a checkpoint to write first."""
    assert run(acts.act, [0, ("signal", number), 2]) == [0, ("signal", number), 2]


@pytest.mark.parametrize("number", SIGNALS)
def test_nor_do_signals_while_workers_start(acts, number):
    pool = WorkerPool(acts.act, range(3), workers=1, describe=str)
    os.kill(pool._workers[0].process.pid, number)
    assert [item for _, item in pool] == [0, 1, 2]


def test_closing_does_not_wait_for_work(acts):
    pool = WorkerPool(acts.act, [("sleep", 60)] * 4, workers=2, describe=str)
    time.sleep(0.5)
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 5
    assert multiprocessing.active_children() == []


def test_a_forgotten_pool_ends_its_workers(acts):
    pool = WorkerPool(acts.act, range(100), workers=2, describe=str)
    next(pool)
    del pool
    assert multiprocessing.active_children() == []


PARENT = """
import sys, time
from prmim_train.data.workers import WorkerPool
import acts_of_workers as acts

if __name__ == "__main__":
    pool = WorkerPool(acts.act, [{task}] * 100, workers=2, describe=str)
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    {wait}
    print("ready", flush=True)
    time.sleep(600)
"""
STATES = {
    "starting": ("0", "pass"),
    "idle": ("0", "next(pool); next(pool)"),
    "busy": ("('sleep', 600)", "time.sleep(1)"),
    "sending": ("('large', 5_000_000)", "next(pool); time.sleep(0.3)"),
}


@pytest.mark.skipif(os.name == "nt", reason="lists processes as Linux does")
@pytest.mark.parametrize("state", STATES)
def test_workers_of_a_killed_process_end_and_leave_nothing(state, acts, tmp_path):
    task, wait = STATES[state]
    (tmp_path / "parent.py").write_text(PARENT.format(task=task, wait=wait))
    (tmp_path / "temporary").mkdir()
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent.stdout as output:
        workers = [int(word) for word in output.readline().split()]
        assert output.readline() == "ready\n"
        shared = set.union(*map(mapped_files, [parent.pid, *workers]))  # other programs have shared memory too
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 15  # a worker that starts may be importing
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert shared
    assert not [path for path in shared if path.exists()]


def mapped_files(process):
    """Return the files in shared memory that a process maps."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    names = (line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in lines)
    return {Path(name) for name in names if name.startswith("/dev/shm/")}


def is_running(process):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

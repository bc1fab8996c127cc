"""Processes on PyTorch that start fast.

They are forked from a server that has imported PyTorch and the trainer.

The imports take six of the seven seconds of a short run. A fork is a process of its own, as good to kill as any other.
"""

import multiprocessing
import os
import select
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")

# Does what the interpreter does with its words.
PROGRAM = """
import os, runpy, sys
log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for stream in (1, 2):
    os.dup2(log, stream)
os.environ.clear()
os.environ.update(env)
option, program, *_ = words
sys.argv = ["-c", *words[2:]] if option == "-c" else words[1:]
if option == "-c":
    exec(program, {"__name__": "__main__"})
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


class Forked:
    """A forked process that acts like a Python command.

    Implements the needed part of `subprocess.Popen`.

    Parameters
    ----------
    words
        ``-m``, a module and its arguments, or ``-c``, a program and its arguments.
    env
        All environment variables.
    log
        The output goes to the end of this file, or into this pipe.
    """

    def __init__(self, words: list[str], env: dict[str, str], log: Path) -> None:
        SERVER.set_forkserver_preload(["prmim_torch", "prmim_train.pretrain", "grain"])
        self.args = words
        self._process = SERVER.Process(target=exec, args=(PROGRAM, {"words": words, "env": env, "path": str(log)}))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        # `exitcode` does the same, but takes too long for a caller that asks a thousand times a second.
        if self._code is None and select.select([self._process.sentinel], [], [], 0)[0]:
            self._code = self._process.exitcode
        return self._code

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code; None if the process does not end within the timeout."""
        self._process.join(timeout)
        self._code = self._process.exitcode
        return self._code

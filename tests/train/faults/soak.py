"""Kill runs at random moments, restart them, and compare with undisturbed ones.

    .venv/bin/python tests/train/faults/soak.py --backend both --kills 20 --seed 0

The undisturbed run is one ``prmim pretrain`` on the embedded digits. The same command with ``--resume`` is started in
another folder, hurt, and restarted until it finishes; further runs follow until processes were hurt often enough. Each
run must then equal the undisturbed run bit for bit: ``metrics.jsonl`` except time fields, weights, training state,
names of the checkpoints, ``config.yaml`` and ``summary.json``. No incomplete files may be left.

Faults:

- ``sigkill`` at a random moment: during start-up, during training, while a checkpoint or a line of metrics is written;
- ``sigterm``: the run must save and exit by itself;
- ``truncate``: after SIGKILL, a file of the newest checkpoint is cut, changed by a byte or deleted, or the last line of
  the metrics is cut;
- ``twice``: the same command is started a second time at a random moment, and must be refused; then SIGKILL.

With ``--processes 2``, every run has several processes. Either all are hurt at once, or one of them; then the others
must exit within a minute.

The same seed draws the same moments. What a process is doing at that moment depends on the machine.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FAULTS = ("sigkill", "sigterm", "truncate", "twice")
BACKENDS = ("torch", "jax")

OPTIONS = {
    "data": "digits",
    "channels": 1,
    "image_size": 16,
    "patch_size": 4,
    "crop_scale": "0.8,1",
    "flip": "false",
    "holdout": 0.2,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "batch_size": 400,
    "base_learning_rate": 0.01,
    "precision": "float32",
    "device": "cpu",
    "log_every": 3,
    "checkpoint_every": 1,
    "keep_checkpoints": 3,
    "eval_limit": 0,
    "pictures": 0,
}
"""1,438 training images: an epoch has 3.6 steps. Checkpoints every 4 steps and lines every 3 steps, so that checkpoints
fall inside epochs and between lines."""

CHECKPOINT_STEPS, LOG_STEPS = 4, 3
STEPS_PER_EPOCH = 1438 / 400
TIMES = ("images_per_second", "waiting", "seconds")
PATIENCE = 300.0
"""Seconds without progress after which a process counts as hanging."""
PATIENCE_WITH_OTHERS = 60.0
"""Seconds within which a process must exit after another process of its run was hurt."""


class Failure(AssertionError):  # noqa: N818  # an observation, not an error of this program
    """A run violated its guarantees. The message says how to reproduce it."""


@dataclass
class Report:
    """Statistics of a soak.

    Parameters
    ----------
    hurt
        How often a process was hurt.
    moments
        Activity to how often a process was hurt during it. Activities can overlap.
    runs
        Number of runs finished and compared.
    seconds
        Duration.
    """

    hurt: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Pace:
    """Pace of an undisturbed run: seconds to the first step and per checkpoint."""

    start: float
    checkpoint: float


class Process:
    """A running ``prmim pretrain``, with one process or several.

    Parameters
    ----------
    backend
        One of `BACKENDS`.
    folder
        Folder of the run.
    log
        File for the output.
    programs
        Compilation cache of JAX.
    epochs
        Length of the run.
    number
        Number of processes.
    """

    def __init__(self, backend: str, folder: Path, log: Path, programs: Path, epochs: int, number: int) -> None:
        self.folder, self.log = folder, log
        self.old_checkpoints = set(checkpoints(folder))
        self.old_size = size(folder / "metrics.jsonl")
        port = free_port()
        self.processes = [
            launch(command(backend, folder, epochs), environment(programs) | place(backend, rank, number, port), log)
            for rank in range(number)
        ]

    def is_over(self) -> bool:
        """Whether all processes have exited."""
        return all(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int]:
        """Return the exit codes, once all processes have exited."""
        return [process.returncode for process in self.processes]

    def has_succeeded(self) -> bool:
        """Whether all processes exited with code 0."""
        return not any(self.codes())

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait for an event. Returns False if the processes exited first."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.is_over():
                return False
            if time.monotonic() > deadline:
                self.hurt(signal.SIGKILL)
                raise Failure(f"hangs: nothing happened for {PATIENCE:.0f} s\n{self.tail()}")
            time.sleep(0.0005)
        return True

    def sleep(self, seconds: float) -> bool:
        """Wait for some time. Returns False if the processes exited first."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def new_checkpoints(self) -> set[str]:
        """Return the existing complete checkpoints that this process wrote, by name."""
        return set(checkpoints(self.folder)) - self.old_checkpoints

    def is_writing(self) -> bool:
        """Whether a checkpoint is incomplete.

        Valid once the process has stepped: earlier leftovers are deleted by then.
        """
        newest = max(map(step_of, checkpoints(self.folder)), default=0)
        return any(step_of(name) > newest for name in partials(self.folder))

    def has_stepped(self) -> bool:
        """Whether it has written a line of metrics or a checkpoint, hence is training."""
        now = size(self.folder / "metrics.jsonl")
        self.old_size = min(self.old_size, now)  # resuming drops the lines after the last checkpoint
        return now > self.old_size or bool(self.new_checkpoints())

    def hurt(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one or all processes, and wait until all have exited."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        for process in chosen:
            with suppress(ProcessLookupError):
                process.send_signal(number)
        end = time.monotonic() + (PATIENCE if rank is None else PATIENCE_WITH_OTHERS)
        while not self.is_over():
            if time.monotonic() > end:
                for process in self.processes:
                    process.kill()
                    process.wait()
                who = "all" if rank is None else f"process {rank}"
                raise Failure(f"hangs: still there long after signal {number} to {who}\n{self.tail()}")
            time.sleep(0.01)

    def output(self) -> str:
        """Return the output."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """Return the end of the output."""
        return f"its output ({self.log}):\n" + "\n".join(self.output().splitlines()[-15:])


def launch(words: list[str], env: dict[str, str], log: Path) -> Any:
    """Start the interpreter with some arguments.

    Its output is appended to a file. Tests replace this function.
    """
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, *words], stdout=output, stderr=output, env=env)


def command(backend: str, folder: Path, epochs: int) -> list[str]:
    """Return the arguments of `python` for a run, equal for start and resume."""
    options = {"backend": backend, **OPTIONS, "epochs": epochs, "out": folder}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["-m", "prmim_train", "pretrain", *words, "--resume"]


def environment(programs: Path) -> dict[str, str]:
    """Return the environment of a run.

    One thread, unbuffered output, a compilation cache for JAX.

    Resets what makes JAX compile quickly, so that it compiles as for users.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def place(backend: str, rank: int, number: int, port: int) -> dict[str, str]:
    """Return the environment variables that tell a process its rank."""
    if number == 1:
        return {}
    names = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": number, "JAX_PROCESS_ID": rank}
    if backend == "torch":  # as torchrun would
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": number, "RANK": rank}
        names |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": number}
    return {name: str(value) for name, value in names.items()}


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
    return port


def checkpoints(folder: Path) -> list[str]:
    """Return the names of the complete checkpoints of a run, oldest first."""
    return sorted(name for name in _names(folder / "checkpoints") if name.startswith("step_"))


def partials(folder: Path) -> list[str]:
    """Return the names of incomplete checkpoints, half written or half deleted."""
    return [name for name in _names(folder / "checkpoints") if ".partial" in name]


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint, complete or not."""
    return int(name.split("step_")[1].partition(".")[0])


def leftovers(folder: Path) -> list[str]:
    """Return the names of all incomplete files and folders of a run."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".partial" in path.name)


def size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  # polled; names are enough
    except FileNotFoundError:
        return []


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of the metrics, without time fields."""
    path = folder / "metrics.jsonl"
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    records = [json.loads(line) for line in whole.splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def read_weights(folder: Path) -> tuple[Any, bytes]:
    """Return the parsed header of a weight file, and all bytes after it.

    The header is parsed because safetensors writes its metadata in an order that differs between processes.
    """
    content = (folder / "weights.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def read_state(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a training state by name, for either backend."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        from safetensors.numpy import load_file

        return {f"{shard.name}: {name}": value for shard in shards for name, value in load_file(shard).items()}
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        names = checkpointer.metadata(folder.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        tree = checkpointer.restore(folder.absolute(), restore_args=as_numpy)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def compare(expected: Path, actual: Path, *, asked_to_stop: bool = False) -> None:
    """Raise Failure unless the results of two runs are equal.

    Parameters
    ----------
    expected
        Folder of the undisturbed run.
    actual
        Folder of the run that was hurt.
    asked_to_stop
        Whether the run wrote checkpoints on request. Then only the last checkpoint is compared.
    """
    left = leftovers(actual)
    if left:
        raise Failure(f"half written and never deleted: {', '.join(left)}")
    ours, theirs = lines(actual), lines(expected)
    for number, (line, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if line != other:
            raise Failure(f"metrics.jsonl, line {number}: expected\n  {other}\ngot\n  {line}")
    if len(ours) != len(theirs):
        raise Failure(f"metrics.jsonl: expected {len(theirs)} lines, got {len(ours)}")
    names, other_names = (checkpoints(folder)[-1 if asked_to_stop else 0 :] for folder in (actual, expected))
    if names != other_names:
        raise Failure(f"checkpoints: expected {other_names}, got {names}")
    if (actual / "config.yaml").read_bytes() != (expected / "config.yaml").read_bytes():
        raise Failure("config.yaml: not byte for byte equal to the undisturbed run")
    last = checkpoints(expected)[-1]
    weights, other_weights = (read_weights(folder / "checkpoints" / last) for folder in (actual, expected))
    if weights != other_weights:
        raise Failure("weights.safetensors: not byte for byte equal to the undisturbed run")
    state, other_state = (read_state(folder / "checkpoints" / last / "training_state") for folder in (actual, expected))
    if state.keys() != other_state.keys():
        raise Failure(f"training_state: expected the names {sorted(other_state)}, got {sorted(state)}")
    for name, value in other_state.items():
        own = state[name]
        if (own.dtype, own.shape, own.tobytes()) != (value.dtype, value.shape, value.tobytes()):
            raise Failure(f"training_state, {name}: not bit for bit equal to the undisturbed run")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (actual, expected)]
    for summary in summaries:
        for name in TIMES:
            summary.pop(name, None)
    if summaries[0] != summaries[1]:
        raise Failure(f"summary.json: expected {summaries[1]}, got {summaries[0]}")


class Soak:
    """Runs on one backend, hurt by one kind of fault.

    Parameters
    ----------
    backend, fault
        One of `BACKENDS`, and one of `FAULTS`.
    kills
        How often to hurt a process.
    seed
        Seed of the moments.
    folder
        Folder for runs and outputs.
    epochs
        Length of a run, 3.6 steps per epoch.
    say
        Called with lines of progress.
    processes
        Number of processes of a run.
    """

    def __init__(
        self,
        backend: str,
        fault: str,
        *,
        kills: int,
        seed: int,
        folder: Path,
        epochs: int,
        say: Callable[[str], None],
        processes: int = 1,
    ) -> None:
        self.backend, self.fault, self.kills, self.seed, self.epochs = backend, fault, kills, seed, epochs
        self.processes = processes
        self.folder, self.say = folder, say
        self.random = random.Random(f"{seed} {backend} {fault}")
        self.lives = 0
        self.aimed = ""
        self.damaged: dict[str, int] = {}
        self.expected_warning: str | None = None
        self.report = Report()

    def run(self, undisturbed: Path, pace: Pace) -> Report:
        """Hurt runs until `kills` is reached, and compare each with the undisturbed run."""
        start = time.monotonic()
        while self.report.hurt < self.kills:
            run = self.folder / f"{self.backend}-{self.fault}-{self.report.runs}"
            try:
                while not self._live(run, pace):
                    pass
                compare(undisturbed, run, asked_to_stop=self.fault == "sigterm")
            except Failure as failure:
                raise Failure(
                    f"{self.backend}, {self.fault}, seed {self.seed}, after {self.report.hurt} of {self.kills} "
                    f"({self.epochs} epochs), run {run}: {failure}"
                ) from None
            self.report.runs += 1
        self.report.seconds = time.monotonic() - start
        return self.report

    def _live(self, run: Path, pace: Pace) -> bool:
        """Start a process and hurt it. Returns True if the run finished."""
        self.lives += 1
        process = self._start(run)
        if self.fault == "twice":
            process = self._start_again(process, run, pace)
        try:
            aim = self._aim(pace)
            if self.report.hurt >= self.kills or not aim(process):
                process.until(lambda: False)
                if not process.has_succeeded():
                    raise Failure(f"exit codes {process.codes()}\n{process.tail()}")
                self._check_warning(process, is_over=True)
                return True
            stepped = process.has_stepped()
            # Before the first step, the processes may not be connected yet, and would wait long for a killed one.
            rank = self._draw_rank() if stepped else None
            process.hurt(signal.SIGTERM if self.fault == "sigterm" else signal.SIGKILL, rank)
        finally:
            if not process.is_over():
                process.hurt(signal.SIGKILL)
        self._look(process, run, stepped)
        self._check_warning(process, is_over=False)
        if self.fault == "sigterm":
            self._check_left_by_itself(process, run, stepped)
        if self.fault == "truncate":
            self._damage(run)
        return process.has_succeeded()

    def _start(self, run: Path, suffix: str = "") -> Process:
        log = self.folder / f"{self.backend}-{self.fault}-{self.lives:04d}{suffix}.log"
        return Process(self.backend, run, log, self.folder / "programs", self.epochs, self.processes)

    def _start_again(self, first: Process, run: Path, pace: Pace) -> Process:
        """Start the same command at a random moment.

        Returns the process that trains; checks that the other is rejected.
        """
        second = None
        try:
            first.sleep(self.random.uniform(0, 2 * pace.start))
            second = self._start(run, "-again")
            first.until(second.is_over)
            # The second one wins only if it comes before the first one has locked the run.
            winner, loser = (second, first) if first.is_over() and not first.has_succeeded() else (first, second)
            if loser is second:
                second.until(lambda: False)
            is_refused = set(loser.codes()) == {1} and "another process is training in" in loser.tail()
            if loser.has_succeeded():  # fine if the run was finished before
                winner.until(lambda: False)
            if not is_refused and not (winner.is_over() and winner.has_succeeded() and loser.has_succeeded()):
                raise Failure(f"started twice: exit codes {loser.codes()}\n{loser.tail()}")
        except BaseException:
            for process in (first, second):
                if process is not None and not process.is_over():
                    process.hurt(signal.SIGKILL)
            raise
        self.report.moments["refused as the second" if loser is second else "refused as the first"] += 1
        return winner

    def _draw_rank(self) -> int | None:
        """Draw the process to hurt. None: all."""
        if self.processes == 1:
            return None
        rank = self.random.choice([None, *range(self.processes)])
        self.report.moments["all processes at once" if rank is None else f"process {rank} alone"] += 1
        return rank

    def _aim(self, pace: Pace) -> Callable[[Process], bool]:
        """Draw a moment, and return a function that waits for it.

        The function returns False if the process exited first.
        """
        draw = self.random
        kind = draw.choices(["start", "train", "checkpoint", "line"], [1, 2, 4, 2])[0]
        self.aimed = kind
        # On average, the kills of a soak cover most of one run.
        checkpoints_of_run = self.epochs * STEPS_PER_EPOCH / CHECKPOINT_STEPS
        span = draw.uniform(0, 1.4 * checkpoints_of_run / self.kills) * pace.checkpoint
        early, late = draw.uniform(0, 1.2 * pace.start), draw.uniform(0, pace.checkpoint)
        instant = draw.choice([0.0, draw.uniform(0, 0.1 * pace.checkpoint)])

        def wait(process: Process) -> bool:
            if kind == "start":
                return process.sleep(early)
            if not (process.until(process.has_stepped) and process.sleep(span)):
                return False
            if kind == "checkpoint":
                return process.until(process.is_writing) and process.sleep(instant)
            if kind == "line":
                before = size(process.folder / "metrics.jsonl")
                return process.until(lambda: size(process.folder / "metrics.jsonl") > before)
            return process.sleep(late)

        return wait

    def _look(self, process: Process, run: Path, stepped: bool) -> None:
        """Count the activities during which the process was hurt."""
        report = self.report
        report.hurt += 1
        found = []
        if not stepped:
            found.append("before the first step of a process")
        elif process.is_writing():
            found.append("while a checkpoint was written")
        elif partials(run):
            found.append("while an old checkpoint was deleted")
        done = [record["step"] for record in lines(run)]
        saved = list(map(step_of, checkpoints(run)))
        if done and done[-1] > max(saved, default=0):
            found.append("with steps logged since the last checkpoint")
        if stepped and done and done[-1] % STEPS_PER_EPOCH:
            found.append("in the middle of an epoch")
        report.moments.update(found)
        where = f"step {done[-1]}" if done else "no step yet"
        self.say(
            f"  {self.backend}, {self.fault} {report.hurt}/{self.kills}: {where}; {', '.join(found) or 'training'}"
        )

    def _check_left_by_itself(self, process: Process, run: Path, stepped: bool) -> None:
        codes = process.codes()
        if -signal.SIGTERM in codes and (not stepped or (run / "summary.json").exists()):  # there was nothing to save
            return
        if process.has_succeeded():  # it was taking its last step
            return
        if set(codes) != {128 + signal.SIGTERM}:
            raise Failure(f"expected exit code {128 + signal.SIGTERM} after SIGTERM, got {codes}\n{process.tail()}")
        saved = list(map(step_of, checkpoints(run)))
        done = [record["step"] for record in lines(run)]
        if max(done, default=0) > max(saved, default=0):
            raise Failure(f"SIGTERM: expected a checkpoint of step {done[-1]} or later, got {saved}\n{process.tail()}")
        self.report.moments["left by itself with a checkpoint"] += 1

    def _damage(self, run: Path) -> None:
        """Damage a file of the newest checkpoint, if an earlier one is good.

        Otherwise, or by chance, cut the last line of the metrics.
        """
        if (run / "summary.json").exists():  # a finished run reads nothing again
            return
        metrics = run / "metrics.jsonl"
        # Lines up to a checkpoint are flushed before the checkpoint gets its name: only later ones can be incomplete.
        is_last_line_new = [line["step"] for line in lines(run)][-1:] > list(map(step_of, checkpoints(run)))[-1:]
        if self.random.random() < 0.2 and is_last_line_new and size(metrics) > 40:
            os.truncate(metrics, size(metrics) - self.random.randint(1, 39))
            self.report.moments["a line torn"] += 1
            return
        whole = [name for name in checkpoints(run) if self.damaged.get(name) != _inode(run, name)]
        if len(whole) < 2 or whole[-1] != checkpoints(run)[-1] or self.expected_warning is not None:
            return
        place = run / "checkpoints" / whole[-1]
        file = self.random.choice(sorted(path for path in place.rglob("*") if path.is_file()))
        what = damage(file, self.random)
        self.damaged[whole[-1]] = _inode(run, whole[-1])
        self.expected_warning = whole[-1]
        self.report.moments[what] += 1
        self.say(f"    {file.relative_to(run)}: {what}")

    def _check_warning(self, process: Process, *, is_over: bool) -> None:
        """Check that the next process warned about the damaged checkpoint."""
        name = self.expected_warning
        if name is None:
            return
        if any(name in line and "warning" in line.lower() for line in process.output().splitlines()):
            self.expected_warning = None
            self.report.moments["passed over with a warning"] += 1
        elif is_over or process.has_stepped():
            raise Failure(f"expected a warning that names the damaged {name}\n{process.tail()}")


def damage(file: Path, draw: random.Random) -> str:
    """Cut a file, change one of its bytes, or delete it. Returns what was done."""
    what = draw.choice(["a file cut", "a byte changed", "a file deleted"])
    content = bytearray(file.read_bytes())
    if what == "a file deleted" or not content:
        file.unlink()
        return "a file deleted"
    place = draw.randrange(len(content))
    if what == "a file cut":
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return what


def _inode(run: Path, name: str) -> int:
    return (run / "checkpoints" / name).stat().st_ino


def run_undisturbed(backend: str, folder: Path, epochs: int, processes: int = 1) -> tuple[Path, Pace]:
    """Run once without faults, and measure the pace. Fills JAX's compilation cache."""
    run = folder / f"{backend}-undisturbed"
    start = time.monotonic()
    process = Process(backend, run, folder / f"{run.name}.log", folder / "programs", epochs, processes)
    try:
        process.until(process.has_stepped)
        stepped = time.monotonic()
        process.until(lambda: False)
    finally:
        if not process.is_over():
            process.hurt(signal.SIGKILL)
    if not process.has_succeeded():
        raise Failure(f"{backend}, undisturbed: exit codes {process.codes()}\n{process.tail()}")
    return run, Pace(stepped - start, (time.monotonic() - stepped) / len(lines(run)) * CHECKPOINT_STEPS / LOG_STEPS)


def soak(
    backend: str,
    faults: list[str],
    *,
    kills: int,
    seed: int,
    folder: Path,
    epochs: int,
    say: Callable[[str], None],
    processes: int = 1,
) -> dict[str, Report]:
    """Disturb runs on a backend by several faults, `kills` times each.

    Returns a report per fault.

    Raises
    ------
    Failure
        If a run differs from the undisturbed run. The message has the seed and the first difference.
    """
    say(f"{backend}: the undisturbed run ...")
    undisturbed, pace = run_undisturbed(backend, folder, epochs, processes)
    last = lines(undisturbed)[-1]["step"]
    say(f"  {last} steps; first step after {pace.start:.1f} s, a checkpoint every {pace.checkpoint:.2f} s")
    return {
        fault: Soak(
            backend, fault, kills=kills, seed=seed, folder=folder, epochs=epochs, say=say, processes=processes
        ).run(undisturbed, pace)
        for fault in faults
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns 0 if every run equals the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="both")
    parser.add_argument("--fault", choices=(*FAULTS, "all"), default="sigkill")
    parser.add_argument("--kills", type=int, default=20, help="how often to hurt a process, per backend and fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=84, help="length of a run, 3.6 steps per epoch")
    parser.add_argument("--processes", type=int, default=1, help="number of processes of a run")
    parser.add_argument("--folder", type=Path, help="folder to keep runs and outputs in (default: deleted)")
    options = parser.parse_args(arguments)
    backends = BACKENDS if options.backend == "both" else (options.backend,)
    faults = list(FAULTS) if options.fault == "all" else [options.fault]
    with _folder(options.folder) as folder:
        try:
            for backend in backends:
                reports = soak(
                    backend,
                    faults,
                    kills=options.kills,
                    seed=options.seed,
                    folder=folder,
                    epochs=options.epochs,
                    say=_say,
                    processes=options.processes,
                )
                for fault, report in reports.items():
                    _say(_summary(backend, fault, options.seed, report))
        except Failure as failure:
            _say(f"FAILED: {failure}")
            return 1
    return 0


def _summary(backend: str, fault: str, seed: int, report: Report) -> str:
    rows = [f"    {number:>4} {name}" for name, number in report.moments.most_common()]
    head = f"{backend}, {fault}, seed {seed}: survived {report.hurt}; {report.runs} runs equal to the undisturbed one"
    return "\n".join([f"{head}; {report.seconds:.0f} s", *rows])


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        wanted.mkdir(parents=True)  # must be new: runs of an earlier soak would be resumed
        yield wanted.absolute()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # a command prints


if __name__ == "__main__":
    sys.exit(main())

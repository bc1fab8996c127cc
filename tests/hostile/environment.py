"""Hostile environments: pipes, signals, damaged run files, dead parents."""

import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from cases import TINY, case, cases, check_line, prmim, refused, write_tiny

from prmim_train.run.directory import RunDirectory

REPOSITORY = Path(__file__).parents[2]
RUN = (*TINY, "--out", "run", "--resume", "--holdout", "0", "--epochs", "2", "--checkpoint_every", "1")
"""A run with two checkpoints: steps 3 and 6 of 6."""
LONGER = (*RUN, "--epochs", "3")
ENDLESS = (*RUN, "--epochs", "100000", "--checkpoint_every", "100000", "--keep_checkpoints", "2")
NOISE = ("Traceback", "Exception ignored", "BrokenPipeError", "AttributeError", "KeyError")

# ------------------------------------------------------------------------------------------------------- helpers


@cache
def _finished() -> tempfile.TemporaryDirectory[str]:
    """Make the run that the cases copy and damage."""
    folder = tempfile.TemporaryDirectory()
    write_tiny(Path(folder.name))
    prmim(Path(folder.name), "pretrain", *RUN)
    return folder


def copy_run(folder: Path) -> Path:
    """Copy the finished run and its images; return the folder of the run."""
    shutil.copytree(_finished().name, folder, dirs_exist_ok=True)
    return folder / "run"


def content(folder: Path) -> dict[str, object]:
    """Return names and content of everything below a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        is_plain = stat.S_ISREG(path.lstat().st_mode)
        found[str(path)] = path.read_bytes() if is_plain else stat.S_IFMT(path.lstat().st_mode)
    return found


def refuses(folder: Path, *words: str, says: str, code: int = 2) -> None:
    """Check that a command is refused in one line, and changes nothing."""
    before = content(folder)
    prmim(folder, *words, code=code, says=says)
    after = content(folder)
    assert after == before, set(after) ^ set(before) or "content has changed"


def steps(run: Path) -> list[int]:
    """Return the steps in the metrics."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that imports these packages."""
    path = [str(REPOSITORY / name) for name in ("", "adapters", "reference")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu", **more}


def start(folder: Path, *words: str, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
    """Start a run in a process of its own, whose output goes to a file."""
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "prmim_train", "pretrain", *words],
            cwd=folder,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **options,  # type: ignore[call-overload]
        )


def wait_for(condition: object, seconds: float = 200) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.05)


def until_stepping(folder: Path, *processes: subprocess.Popen[str]) -> None:
    """Wait until a run takes steps."""
    metrics = folder / "run" / "metrics.jsonl"

    def is_stepping() -> bool:
        assert all(process.poll() is None for process in processes), (folder / "output").read_text()[-2000:]
        return metrics.exists() and metrics.stat().st_size > 1000

    wait_for(is_stepping)


def check_stopped(folder: Path, process: subprocess.Popen[str], code: int) -> None:
    """Check that a run stopped with a checkpoint and no noise."""
    assert process.wait(60) == code, (folder / "output").read_text()[-2000:]
    output = (folder / "output").read_text()
    assert not any(word in output for word in NOISE), output[-2000:]
    last = RunDirectory(folder / "run").latest_checkpoint()
    assert last is not None
    assert int(last.name.removeprefix("step_")) >= steps(folder / "run")[-1]


# ------------------------------------------------------------------------------------------- 5: pipes and signals


LOST = {
    "stdout: head leaves": "| head -n 1",
    "both: a dead tee": "2>&1 | (head -c 300; exit 1)",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all streams closed": "<&- >&- 2>&-",
    "stdout on a full disk": ">/dev/full",
}


@cases(5, LOST, quick=False)
def output_lost(folder, redirection):
    write_tiny(folder)
    command = f'{sys.executable} -m prmim_train pretrain "$@" {redirection}'
    words = ["bash", "-c", command, "bash", *RUN]
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    # The exit code of a pipeline is that of its last command.
    assert done.returncode == (1 if "exit 1" in redirection else 0), done.stderr[-2000:]
    assert not any(word in done.stderr for word in NOISE), done.stderr[-2000:]
    assert steps(folder / "run") == [1, 2, 3, 4, 5, 6]
    assert (folder / "run" / "summary.json").exists()


@cases(5, {"inspect | head": ("inspect", 0), "an error without stderr": ("inspect --depth many", 2)}, quick=False)
def commands_without_output(folder, value):
    write_tiny(folder)
    words, code = value
    lost = "| true; exit ${PIPESTATUS[0]}" if code == 0 else "2>&-"
    command = f"set -o pipefail; {sys.executable} -m prmim_train {words} --data tiny.npz --channels 1 {lost}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert not any(word in done.stderr for word in NOISE), done.stderr[-2000:]


SIGNALS = {
    "SIGHUP": [signal.SIGHUP],
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM three times": [signal.SIGTERM] * 3,
    "SIGHUP from shell and terminal, then SIGTERM": [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM],
    "Ctrl-C, repeated by torchrun": [signal.SIGINT, signal.SIGINT],
}


@cases(5, SIGNALS, quick=False)
def signals(folder, numbers):
    write_tiny(folder)
    process = start(folder, *ENDLESS)
    until_stepping(folder, process)
    for number in numbers:
        process.send_signal(number)
    check_stopped(folder, process, 128 + numbers[0])


@case(5, "SIGHUP to the whole group, with data workers and JAX", quick=False)
def hang_up_of_group(folder):
    write_tiny(folder)
    process = start(folder, *ENDLESS, "--workers", "2", "--backend", "jax", start_new_session=True)
    until_stepping(folder, process)
    os.killpg(process.pid, signal.SIGHUP)
    check_stopped(folder, process, 128 + signal.SIGHUP)


@case(5, "SIGHUP under nohup", quick=False)
def hang_up_under_nohup(folder):
    write_tiny(folder)
    process = start(folder, *ENDLESS, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until_stepping(folder, process)
    process.send_signal(signal.SIGHUP)
    size = (folder / "run" / "metrics.jsonl").stat().st_size
    wait_for(lambda: (folder / "run" / "metrics.jsonl").stat().st_size > size + 2000)
    process.send_signal(signal.SIGTERM)
    check_stopped(folder, process, 128 + signal.SIGTERM)


@case(5, "the terminal closes", quick=False)
def terminal_closes(folder):
    write_tiny(folder)
    (folder / "output").touch()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        words = [sys.executable, "-m", "prmim_train", "pretrain", *ENDLESS]
        os.execve(sys.executable, words, environment())
    metrics = folder / "run" / "metrics.jsonl"
    os.set_blocking(terminal, False)

    def is_stepping() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 65536)
        return metrics.exists() and metrics.stat().st_size > 1000

    wait_for(is_stepping)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert RunDirectory(folder / "run").latest_checkpoint() is not None


@case(5, "SIGHUP to one of two processes", quick=False)
def hang_up_of_one_process(folder):
    write_tiny(folder)
    first, second = two_processes(folder, *ENDLESS)
    until_stepping(folder, first, second)
    second.send_signal(signal.SIGHUP)
    check_stopped(folder, first, 128 + signal.SIGTERM)  # the main process was told by the other one
    assert second.wait(60) == 128 + signal.SIGHUP


def two_processes(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Start a run of two processes, as torchrun does."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place["TMPDIR"] = str(folder / "temporary")
    (folder / "temporary").mkdir()
    return [start(folder, *words, env={**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def pipe(path: Path) -> None:
    """Put a pipe in place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    """Put a socket in place of a file."""
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFSOCK | 0o600)


def device(path: Path) -> None:
    """Put a link to a device that never ends in place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


IN_PLACE = {
    f"{kind} in place of {name}": (put, name)
    for kind, put in {"pipe": pipe, "socket": put_socket, "device": device}.items()
    for name in ("metrics.jsonl", "summary.json")
}


@cases(5, IN_PLACE)
def special_file_of_run(folder, value):
    put, name = value
    put(copy_run(folder) / name)
    refuses(folder, "pretrain", *LONGER, says=name)


@cases(5, {f"evaluate with a {put.__name__} as config.yaml": put for put in (pipe, put_socket, device)})
def special_config(folder, put):
    put(copy_run(folder) / "config.yaml")
    refuses(folder, "evaluate", "--run", "run", says="config.yaml")


@cases(5, {f"pipe as {name} of a checkpoint": name for name in ("manifest.json", "weights.safetensors", "state")})
def pipe_in_checkpoint(folder, name):
    run = copy_run(folder)
    place = run / "checkpoints" / "step_00000006"
    pipe(next((place / "training_state").iterdir()) if name == "state" else place / name)
    (run / "summary.json").unlink()
    output = prmim(folder, "pretrain", *RUN, says="step_00000006 is damaged, kept as damaged_step_00000006")
    assert "resuming after step 3" in output
    assert steps(run) == [1, 2, 3, 4, 5, 6]


@cases(5, {"--config": "config", "--init_weights": "init_weights", "--data": "data", "--out": "out"})
def pipe_as_option(folder, option):
    write_tiny(folder)
    pipe(folder / "pipe.npz")
    prmim(folder, "pretrain", *TINY, "--out", "run", f"--{option}", "pipe.npz", code=2, says=option)


@cases(5, {"pipe as config.json of a teacher": "config.json", "pipe as weights of a teacher": "model.safetensors"})
def pipe_of_teacher(folder, name):
    write_tiny(folder)
    (folder / "teacher").mkdir()
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "patch_size": 2, "image_size": 8}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    pipe(folder / "teacher" / name)
    words = ("--data", "tiny.npz", "--image_size", "8", "--patch_size", "2", "--method", "maskalign", "--channels", "1")
    prmim(folder, "inspect", *words, "--teacher", "teacher", code=2, says=name)


@cases(5, {"pipe as weights, PyTorch": "prmim_torch", "pipe as weights, JAX": "prmim_jax"})
def pipe_as_weights(folder, package):
    interop = __import__(f"{package}.interop", fromlist=["interop"])
    pipe(folder / "weights.safetensors")
    refused(lambda: interop.read_file(folder / "weights.safetensors"), ValueError, says="weights.safetensors")


# ----------------------------------------------------------------------------------------- 6: damaged files of runs


ODD = {"empty": b"", "list": b"[]", "object": b"{}", "number": b"3", "binary": b"\x7fELF\0\xff\xfe", "torn": b'{"st'}
LINES = {
    "a line cut": lambda line: line[: len(line) // 2],
    "a list": lambda line: b"[]",
    "an object": lambda line: b"{}",
    "a number": lambda line: b"3",
    "binary": lambda line: b"\x7fELF\0\xff\xfe",
    "a step in words": lambda line: line.replace(b'"step": 3', b'"step": "three"'),
    "a bit flipped": lambda line: bytes([line[0] ^ 1]) + line[1:],
    "an escape sequence": lambda line: b"\x1b[2J\x1b[31m" * 1000,
    "a nest": lambda line: b"[" * 100_000,
    "two lines joined": lambda line: line + line,
}


@cases(6, {f"metrics.jsonl: {name} in the middle": change for name, change in LINES.items()})
def corrupt_line(folder, change):
    metrics = copy_run(folder) / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")
    lines[2] = change(lines[2])
    metrics.write_bytes(b"\n".join(lines))
    refuses(folder, "pretrain", *LONGER, says="line 3 of run/metrics.jsonl")


@cases(6, {f"metrics.jsonl: {name}": odd for name, odd in ODD.items() if name not in ("empty", "torn")})
def odd_metrics(folder, odd):
    (copy_run(folder) / "metrics.jsonl").write_bytes(odd)
    refuses(folder, "pretrain", *LONGER, says="the last line of run/metrics.jsonl")


@cases(6, {"cut": lambda line: line[:20], "zeros": lambda line: bytes(4096), "cut, zeros": lambda line: b'{"st\0\0'})
def torn_last_line(folder, change):
    run = copy_run(folder)
    *lines, last, _ = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines, change(last)]))
    prmim(folder, "pretrain", *LONGER)
    assert steps(run) == [1, 2, 3, 4, 5, 7, 8, 9]


@cases(6, {f"summary.json: {name}": odd for name, odd in ODD.items()})
def odd_summary(folder, odd):
    run = copy_run(folder)
    (run / "summary.json").write_bytes(odd)
    refuses(folder, "pretrain", *RUN, says="summary.json")
    (run / "summary.json").unlink()  # as the message advises
    prmim(folder, "pretrain", *RUN)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


@cases(6, {f"config.yaml: {name}": odd for name, odd in ODD.items()})
def odd_config(folder, odd):
    (copy_run(folder) / "config.yaml").write_bytes(odd)
    refuses(folder, "pretrain", *LONGER, says="config.yaml")
    refuses(folder, "evaluate", "--run", "run", says="config.yaml")
    prmim(folder, "picture", "--run", "run", code=2, says="config.yaml")  # after the curve of the loss


@cases(
    6, {f"tracker.json: {name}": odd for name, odd in ODD.items() if name != "object"} | {"no text": b'{"wandb": 1}'}
)
def odd_tracker(folder, odd):
    (folder / "tracker.json").write_bytes(odd)
    refused(lambda: RunDirectory(folder).read_tracker("wandb"), ValueError, says="tracker.json")


FILES = {"names": b'{"files": ["a"]}', "sizes": b'{"files": {"weights.safetensors": {"bytes": [], "sha256": 3}}}'}


@cases(6, {f"manifest.json: {name}": odd for name, odd in {**ODD, **FILES, "nest": b"[" * 100_000}.items()})
def odd_manifest(folder, odd):
    run = copy_run(folder)
    for place in (run / "checkpoints").iterdir():
        (place / "manifest.json").write_bytes(odd)
    refuses(folder, "pretrain", *LONGER, says="step_00000006: ", code=1)
    prmim(folder, "picture", "--run", "run", "--pictures", "2", code=1, says="all 2 are damaged")


@case(6, "manifest.json: names with escape sequences")
def manifest_with_escapes(folder):
    run = copy_run(folder)
    for place in (run / "checkpoints").iterdir():
        (place / "manifest.json").write_text(json.dumps({"files": {"\x1b[2J" * 5000: {"bytes": 1, "sha256": ""}}}))
    refuses(folder, "pretrain", *LONGER, says="is missing", code=1)


LINKS = {
    "a folder elsewhere": "../../outside",
    "a file elsewhere": "../../outside/photo",
    "nothing": "nowhere",
    "itself": ".x.partial",
}


@cases(6, {f"checkpoints/.x.partial links to {name}": target for name, target in LINKS.items()})
def link_as_leftover(folder, target):
    run = copy_run(folder)
    (folder / "outside").mkdir()
    (folder / "outside" / "photo").write_text("mine")
    for name in ("checkpoints/.x.partial", "checkpoints/.step_00000009.partial", ".summary.json.partial-0a"):
        (run / name).symlink_to(target)
    prmim(folder, "pretrain", *LONGER)
    assert steps(run)[-1] == 9
    assert (folder / "outside" / "photo").read_text() == "mine"
    assert not any(".partial" in path.name for path in run.rglob("*"))


@case(6, "an old checkpoint is a link to a folder elsewhere")
def link_as_checkpoint(folder):
    run = copy_run(folder)
    (run / "checkpoints" / "step_00000003").rename(folder / "outside")
    (run / "checkpoints" / "step_00000003").symlink_to("../../outside")
    prmim(folder, "pretrain", *LONGER)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000009"]
    assert (folder / "outside" / "weights.safetensors").exists()


@cases(6, {f"a folder in place of {name}": name for name in ("metrics.jsonl", "summary.json")})
def folder_as_file(folder, name):
    run = copy_run(folder)
    (run / name).unlink()
    (run / name).mkdir()
    refuses(folder, "pretrain", *LONGER, says=name)


@case(6, "a rescue checkpoint of another name")
def odd_rescue(folder):
    run = copy_run(folder)
    (run / "checkpoints" / "rescue_step_last").mkdir()
    prmim(folder, "pretrain", *LONGER)
    assert steps(run)[-1] == 9


@case(6, "picture of metrics without losses")
def picture_of_odd_metrics(folder):
    (copy_run(folder) / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    check_line(prmim(folder, "picture", "--run", "run", "--kind", "loss", code=2).splitlines()[-1])


# ---------------------------------------------------------------------------------------------- 7: orphan workers


def children(process: int) -> list[int]:
    """Return the descendants of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            found += [number, *children(number)]
    return found


def is_running(process: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_ended(folder: Path, processes: list[int], shared: set[Path]) -> None:
    """Check that orphans end.

    Neither they nor their parents may leave anything outside of the run.
    """
    wait_for(lambda: not any(map(is_running, processes)), 20)
    left = {path.name for path in set(Path("/dev/shm").glob("*")) - shared}
    assert not any(name.startswith(("pym-", "psm_", "sem.mp-", "torch_")) for name in left), left
    names = {path.name for path in (folder / "temporary").iterdir()}
    names -= {name for name in names if name.startswith("torchinductor_")}  # PyTorch's cache, shared by all runs
    assert not names, names


def start_with_workers(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a run with data workers, and a folder of its own for temporary files."""
    write_tiny(folder)
    (folder / "temporary").mkdir()
    return start(folder, *ENDLESS, "--workers", "2", *words, env={"TMPDIR": str(folder / "temporary")})


@cases(7, {f"SIGKILL of a run with workers, {backend}": backend for backend in ("torch", "jax")}, quick=False)
def kill_run(folder, backend):
    shared = set(Path("/dev/shm").glob("*"))
    process = start_with_workers(folder, "--backend", backend)
    until_stepping(folder, process)
    started = children(process.pid)
    assert len(started) >= 2, started
    process.kill()
    process.wait()
    check_ended(folder, started, shared)


@case(7, "SIGKILL of a run whose workers are starting", quick=False)
def kill_starting_run(folder):
    shared = set(Path("/dev/shm").glob("*"))
    process = start_with_workers(folder)
    wait_for(lambda: len(children(process.pid)) >= 2)
    started = children(process.pid)
    process.kill()
    process.wait()
    check_ended(folder, started, shared)


@case(7, "SIGKILL of a stopped run with workers", quick=False)
def kill_stopped_run(folder):
    shared = set(Path("/dev/shm").glob("*"))
    process = start_with_workers(folder)
    until_stepping(folder, process)
    started = children(process.pid)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.kill()
    process.wait()
    check_ended(folder, started, shared)


@case(7, "SIGKILL of both processes of a run with workers", quick=False)
def kill_two_processes(folder):
    write_tiny(folder)
    shared = set(Path("/dev/shm").glob("*"))
    processes = two_processes(folder, *ENDLESS, "--workers", "1")
    until_stepping(folder, *processes)
    started = [child for process in processes for child in children(process.pid)]
    assert len(started) >= 2
    for process in processes:
        process.kill()
        process.wait()
    check_ended(folder, started, shared)


@case(7, "SIGKILL of one of two processes with workers", quick=False)
def kill_one_process(folder):
    write_tiny(folder)
    shared = set(Path("/dev/shm").glob("*"))
    first, second = two_processes(folder, *ENDLESS, "--workers", "1")
    until_stepping(folder, first, second)
    started = [*children(first.pid), *children(second.pid)]
    first.kill()
    first.wait()
    assert second.wait(60) != 0
    check_ended(folder, started, shared)


@case(7, "leftovers of killed processes are removed on resume")
def leftovers(folder):
    run = copy_run(folder)
    for name in (".config.yaml.partial-0a", ".summary.json.partial-1b", ".note.partial-1.json", ".loss.png.partial-2c"):
        (run / name).write_text("{")
    (run / "checkpoints" / ".step_00000009.partial" / "training_state").mkdir(parents=True)
    (run / "checkpoints" / ".step_00000003.partial").mkdir()
    prmim(folder, "pretrain", *LONGER)
    assert not any(".partial" in path.name for path in run.rglob("*"))
    assert "unreadable_images" in json.loads((run / "summary.json").read_text())

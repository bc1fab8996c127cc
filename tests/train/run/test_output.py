"""Output that nobody reads neither disturbs a program nor leaves a trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prmim_train.run.output import keep_output

pytestmark = pytest.mark.skipif(os.name == "nt", reason="closes file descriptors as shells do")

PROGRAM = """
import subprocess, sys, warnings
from prmim_train.run.output import keep_output

keep_output()
with open("file", "wb") as file:
    number = file.fileno()
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 100_000, "\\N{BULLET}\\udc80", file=stream, flush=True)
    print("pending", end="")
    print("pending", end="", file=sys.stderr)
    warnings.warn("a warning")
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('child')"])
with open("report", "w") as report:
    print(number, sys.stdout.isatty(), sys.stdin.read(), file=report)
"""


def run(folder, redirection, *options):
    """Run the program behind a shell's redirection; return its exit code and output."""
    (folder / "program.py").write_text(PROGRAM)
    words = [sys.executable, *options, "program.py"]
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (folder / "report").exists(), done.stderr
    return done.returncode, done.stdout, done.stderr


LOST = {
    "no reader": "| true",
    "no reader of both": "2>&1 | true",
    "a reader of one line": "2>/dev/null | head -c 9 >/dev/null",
    "closed stdout": ">&-",
    "closed stderr": "2>&- >/dev/null",
    "all closed": "<&- >&- 2>&-",
    "full disk": ">/dev/full 2>/dev/full",
}


@pytest.mark.parametrize("redirection", LOST.values(), ids=LOST)
def test_lost_output_is_discarded(redirection, tmp_path):
    code, output, error = run(tmp_path, redirection)
    assert code == 0, error[-500:]
    assert output == b""
    assert b"Exception ignored" not in error
    assert b"Traceback" not in error
    number, is_terminal, _ = (tmp_path / "report").read_text().split(" ", 2)
    assert int(number) > 2  # no file takes the number of a closed stream, to which libraries may print
    assert (tmp_path / "file").read_bytes() == b""
    assert is_terminal == "False"


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_other_output_is_written(options, tmp_path):
    code, output, error = run(tmp_path, "", *options)
    assert code == 0
    assert output.count(b"x") == error.count(b"x") == 300_000
    assert output.count(b"\\udc80\n") == 3  # what the terminal cannot show is escaped
    assert b"pending" in output
    for part in (b"pending", b"a warning", b"child"):
        assert part in error


def test_a_pipe_that_is_full_for_a_moment_loses_nothing(tmp_path):
    """Other programs can make a terminal or a pipe non-blocking.

    By default, this ends Python programs.
    """
    blocking = "import os, sys; os.set_blocking(1, False); import runpy; runpy.run_path('program.py')"
    (tmp_path / "program.py").write_text(PROGRAM)
    writer = subprocess.Popen(
        [sys.executable, "-c", blocking], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert writer.stdout is not None
    with writer.stdout:
        output = b"".join(iter(lambda: writer.stdout.read(4096), b""))
    assert writer.wait() == 0
    assert output.count(b"x") == 300_000


def test_streams_of_other_programs_are_left_alone(monkeypatch):
    class Stream:
        pass

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    keep_output()
    assert sys.stdout is sys.stderr is stream


def test_a_training_whose_reader_leaves_finishes(tiny_words, tmp_path):
    fake = Path(__file__).parents[1] / "fake_engine.py"
    (tmp_path / "prmim_fake.py").write_bytes(fake.read_bytes())
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "prmim_train", "pretrain", *tiny_words]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | head -n 1', "bash", *command],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert (tmp_path / "run" / "summary.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 7

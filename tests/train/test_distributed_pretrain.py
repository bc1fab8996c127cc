"""`prmim pretrain` in two processes: several commands in one torchrun launch."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from prmim_train.cli.commands import main  # noqa: E402
from prmim_train.run.directory import RunDirectory  # noqa: E402
from prmim_train.run.manifest import damage  # noqa: E402

SCRIPT = Path(__file__).with_name("pretrain_worker.py")
TIMES = ("images_per_second", "waiting", "seconds")


UNREADABLE = ("000.png", "001.png", "002.png")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that holds 300 photos, three of which cannot be read."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (300, 16, 16), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "photos" / f"{number:03}.png")
    for name in UNREADABLE:
        (folder / "photos" / name).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def two(shared):
    """What two processes made of the commands in the script."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, str(SCRIPT), str(shared)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return [json.loads((shared / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def worker():
    return importlib.import_module("tests.train.pretrain_worker")


@pytest.fixture(scope="module")
def command(worker):
    return worker.command


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(command, shared):
    """The run of one process."""
    assert main(command(shared / "one")) == 0
    return RunDirectory(shared / "one")


def assert_same_lines(found, expected):
    assert [line["step"] for line in found] == [1, 2, 4, 6, 8, 10, 12]
    for here, there in zip(found, expected, strict=True):
        assert here.keys() == there.keys()
        for name in set(here) - set(TIMES):
            # An image near the border of two classes may fall to the other side.
            tolerance = {"abs": 0.05} if "accuracy" in name else {"rel": 1e-3 if name == "test_loss" else 1e-4}
            assert here[name] == pytest.approx(there[name], **tolerance), name


def test_the_lines_are_those_of_one_process(two, one, shared):
    """Stopped, failed and resumed, at first with DDP, then with FSDP."""
    run = RunDirectory(shared / "run")
    assert_same_lines(run.read_metrics(), one.read_metrics())
    assert run.read_summary()["loss"] == pytest.approx(one.read_summary()["loss"], rel=1e-4)
    expected = one.read_summary()["evaluation"]
    assert run.read_summary()["evaluation"]["pixels"] == expected["pixels"]
    # An image near the border of two classes may fall to the other side.
    assert run.read_summary()["evaluation"]["trained"]["linear"] == pytest.approx(
        expected["trained"]["linear"], abs=0.1
    )


def test_a_run_of_two_processes_goes_on_in_one(two, one, shared, command):
    assert main(command(shared / "half", "--resume")) == 0
    assert_same_lines(RunDirectory(shared / "half").read_metrics(), one.read_metrics())


def test_a_signal_to_one_process_stops_all_at_the_next_line(two, shared):
    main_process, other = (results["stopped"] for results in two)
    assert main_process["code"] == other["code"] == 128 + signal.SIGTERM
    assert "prmim: Stopped after step 6 of 12 and saved a checkpoint. Resume with: " in main_process["err"]
    assert "prmim: " not in other["err"]


def test_what_fails_in_the_main_process_ends_all(two):
    main_process, other = (results["full disk"] for results in two)
    assert main_process["code"] == other["code"] == 1
    assert "step_00000012: No space left on device; the last good one is" in main_process["err"]
    assert other["err"] == ""


def test_the_main_process_alone_prints(two):
    for results in two[1:]:
        assert {name for name, result in results.items() if result["out"]} == set()
    out = two[0]["resumed"]["out"]
    for text in ("Run directory: ", "resuming after step 6", "Trained 12 steps", "trained encoder", "Picture: "):
        assert text in out
    assert "is finished" in two[0]["finished"]["out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken", "already holds a run"),
        ("uneven", "batch_size: expected a multiple of the 2 processes times accumulate (40), got 120"),
    ],
)
def test_what_is_wrong_for_all_is_told_by_each(name, message, two):
    for rank, results in enumerate(two):
        assert results[name]["code"] == 2
        (line,) = results[name]["err"].splitlines()
        assert line.startswith("prmim: error: " if rank == 0 else "prmim: process 1: error: ")
        assert message in line


def test_images_that_any_process_could_not_read_are_reported(two, shared):
    run = RunDirectory(shared / "photos run")
    assert tuple(run.read_summary()["unreadable_images"]) == UNREADABLE
    assert "3 of 300 images could not be read and were left out: 000.png" in two[0]["photos"]["out"]
    assert [entry.name for entry in run.path.glob(".*")] == [".lock"]


def test_attention_maps_are_those_of_one_process(two, shared, worker):
    assert main(worker.attention_command(shared, "attention in one")) == 0
    here, there = (
        np.load(shared / name / "attention_00000005.npz")["maps"] for name in ("attention", "attention in one")
    )
    np.testing.assert_allclose(here, there, atol=0.01)
    assert here.shape == (300, 16)
    assert (here[:3] == 1).all()  # unreadable
    assert (here[3:] != 1).any(1).all()
    assert not list((shared / "attention").glob(".attention*"))


def test_nothing_is_written_twice_or_left_over(two, shared):
    run = RunDirectory(shared / "run")
    pictures = {"reconstructions.png", "schedule.png", "loss.png"}
    files = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", ".lock", "run.json", "trained.npz"}
    assert {entry.name for entry in run.path.iterdir()} == files | pictures
    assert [entry.name for entry in run.checkpoints()] == ["step_00000006", "step_00000012"]
    assert [damage(entry) for entry in run.checkpoints()] == [None, None]


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_probes_are_made_and_change_nothing(two, one, shared):
    lines = RunDirectory(shared / "probed").read_metrics()
    assert 0 <= lines[-1].pop("probe_knn") <= 1
    assert 0 <= lines[-1].pop("probe_linear") <= 1
    assert_same_lines(lines, one.read_metrics())


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_a_classifier_learns_as_in_one_process(protocol, two, shared, worker):
    """That which is fine-tuned was stopped, and resumed with FSDP."""
    out = shared / f"{protocol} in one"
    assert main(worker.classifier(shared / "probed", out, *worker.PROTOCOLS[protocol])) == 0
    run, expected = RunDirectory(shared / protocol), RunDirectory(out)
    assert_same_lines(run.read_metrics(), expected.read_metrics())
    found, there = (json.loads((folder.path / "evaluation.json").read_text()) for folder in (run, expected))
    assert found["test_images"] == there["test_images"] == 359
    assert found["loss"] == pytest.approx(there["loss"], rel=1e-3)
    assert found["accuracy"] == pytest.approx(there["accuracy"], abs=0.02)


def test_the_main_process_alone_reports(two, shared):
    stopped, other = (results["tuning stopped"] for results in two)
    assert stopped["code"] == other["code"] == 128 + signal.SIGTERM
    assert "prmim: Stopped after step 6 of 12" in stopped["err"]
    assert "prmim: " not in other["err"]
    told = {"tuned": "% of 359 test images correct", "linear": "% of 359", "frozen": "Trained encoder"}
    for name, text in told.items():
        assert two[0][name]["code"] == two[1][name]["code"] == 0
        assert text in two[0][name]["out"]
        assert two[1][name]["out"] == ""
    record = json.loads((shared / "probed" / "evaluation.json").read_text())
    assert record["protocols"]["knn"]["test_images"] == 40
    for folder in ("finetune", "linear"):
        names = {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "evaluation.json", "confusion.png"}
        names |= {"curves.png", ".lock", "run.json", "trained.npz", "predictions.npz"}
        assert {entry.name for entry in (shared / folder).iterdir()} == names


def test_pictures_take_one_process(two):
    for results in two:
        assert results["picture"]["code"] == 2
        assert "command: expected one process for picture, got 2" in results["picture"]["err"]

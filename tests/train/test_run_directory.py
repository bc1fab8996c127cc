import errno
import json
import os

import pytest

from prmim_train import run_directory
from prmim_train.run_directory import RunDirectory, write_atomically


class Saver:
    def __init__(self, text="weights", error=None):
        self.text, self.error = text, error

    def save(self, directory):
        (directory / "weights.safetensors").write_text(self.text)
        if self.error is not None:
            raise self.error
        (directory / "state").write_text("state")


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_config("epochs: 1\n")
    return run


def names(run):
    return sorted(entry.name for entry in (run.path / "checkpoints").iterdir())


def test_the_last_checkpoints_are_kept(run):
    for step in (1, 2, 30, 100):
        run.save_checkpoint(Saver(str(step)), step, keep=2)
    assert names(run) == ["step_00000030", "step_00000100"]
    assert (run.latest_checkpoint() / "weights.safetensors").read_text() == "100"


def test_a_rescue_checkpoint_is_neither_counted_nor_resumed_from(run):
    run.save_checkpoint(Saver(), 1, keep=1)
    run.save_checkpoint(Saver(), 2, keep=1, prefix="rescue_")
    run.save_checkpoint(Saver(), 3, keep=1)
    assert names(run) == ["rescue_step_00000002", "step_00000003"]
    assert run.latest_checkpoint().name == "step_00000003"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nbadly")]
)
def test_a_failed_save_leaves_nothing_behind_and_the_old_checkpoint_whole(run, error):
    run.save_checkpoint(Saver("old"), 1, keep=1)
    with pytest.raises(OSError, match=r"checkpoint: could not write .*step_00000002.*last good one is") as caught:
        run.save_checkpoint(Saver("new", error), 2, keep=1)
    assert "\n" not in str(caught.value)
    assert names(run) == ["step_00000001"]
    assert (run.latest_checkpoint() / "weights.safetensors").read_text() == "old"


def test_a_checkpoint_bears_its_name_only_when_it_is_on_the_disk(run, monkeypatch):
    seen = []
    flush = os.fsync

    def fsync(descriptor):
        seen.append(names(run))
        flush(descriptor)

    monkeypatch.setattr(run_directory.os, "fsync", fsync)
    run.save_checkpoint(Saver(), 1, keep=1)
    assert len(seen) == 4  # two files, their folder, the folder above it
    assert all(not any(name.startswith("step_") for name in step) for step in seen[:3])
    assert names(run) == ["step_00000001"]


def test_writing_a_file_replaces_it_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_metrics_are_cut_back_and_a_torn_line_is_dropped(run):
    for step in (1, 10, 20):
        run.append_metrics({"step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert [record["step"] for record in run.read_metrics()] == [1, 10, 20]
    run.cut_metrics(10)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 10}\n'


def test_a_folder_is_free_until_a_run_has_taken_a_step(run):
    run.check_is_free()  # options alone are no loss
    run.append_metrics({"step": 1})
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        run.check_is_free()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="out: expected a folder"):
        RunDirectory(tmp_path / "file").check_is_free()


def test_opening_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: expected the folder of a run"):
        RunDirectory.open(tmp_path)


def test_leftovers_of_a_killed_run_are_removed(run):
    (run.path / "checkpoints" / ".step_00000001.partial-0a").mkdir()
    (run.path / ".summary.partial-0a.json").write_text("")
    run.remove_leftovers()
    assert names(run) == []
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoints", "config.yaml"]


def test_summary_round_trip(run):
    assert run.read_summary() is None
    run.write_summary({"loss": 0.5})
    assert run.read_summary() == {"loss": 0.5}
    assert json.loads((run.path / "summary.json").read_text()) == {"loss": 0.5}

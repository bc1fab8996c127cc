import errno
import json
import os
import stat
import time
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread

import pytest

from prmim_train.run import files as run_files
from prmim_train.run.directory import RunDirectory
from prmim_train.run.manifest import damage


class Saver:
    rank = 0

    def __init__(self, text="weights", error=None):
        self.text, self.error = text, error

    def any(self, flag):
        return flag

    def async_save(self, directory):
        saved = Future()
        try:
            saved.set_result(self._save(directory))
        except Exception as error:
            saved.set_exception(error)
        return saved

    def _save(self, directory):
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
        run.start_checkpoint(Saver(str(step)), step, keep=2).finish()
    assert names(run) == ["step_00000030", "step_00000100"]
    assert (run.latest_checkpoint() / "weights.safetensors").read_text() == "100"


def test_a_rescue_checkpoint_is_neither_counted_nor_resumed_from(run):
    run.start_checkpoint(Saver(), 1, keep=1).finish()
    run.start_checkpoint(Saver(), 2, keep=1, prefix="rescue_").finish()
    run.start_checkpoint(Saver(), 3, keep=1).finish()
    assert names(run) == ["rescue_step_00000002", "step_00000003"]
    assert run.latest_checkpoint().name == "step_00000003"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nbadly")]
)
def test_a_failed_save_leaves_nothing_behind_and_the_old_checkpoint_whole(run, error):
    run.start_checkpoint(Saver("old"), 1, keep=1).finish()
    with pytest.raises(OSError, match=r"checkpoint: could not write .*step_00000002.*last good one is") as caught:
        run.start_checkpoint(Saver("new", error), 2, keep=1).finish()
    assert "\n" not in str(caught.value)
    assert names(run) == ["step_00000001"]
    assert (run.latest_checkpoint() / "weights.safetensors").read_text() == "old"


class Straggler(Saver):
    """Fails while other files are still being written."""

    def _save(self, directory):
        def write_on():
            for pause in (*[0.02] * 20, 0.6):
                time.sleep(pause)
                with suppress(FileNotFoundError):  # folder deleted in between
                    (directory / "state").mkdir(parents=True, exist_ok=True)
                    (directory / "state" / "array").write_text("state")

        self.thread = Thread(target=write_on)
        self.thread.start()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_leaves_nothing_behind_though_files_of_it_are_still_written(run):
    saver = Straggler()
    with pytest.raises(OSError, match="No space left on device"):
        run.start_checkpoint(saver, 1, keep=1).finish()
    saver.thread.join()
    assert names(run) == []


def test_a_checkpoint_bears_its_name_only_when_it_is_on_the_disk(run, monkeypatch):
    seen = []
    flush = os.fsync

    def fsync(descriptor):
        seen.append(names(run))
        flush(descriptor)

    monkeypatch.setattr(run_files.os, "fsync", fsync)
    run.append_metrics({"step": 1})
    run.start_checkpoint(Saver(), 1, keep=1).finish()
    assert len(seen) == 6  # three files with the manifest, their folder, the metrics, the parent folder
    assert all(not any(name.startswith("step_") for name in step) for step in seen[:5])
    assert names(run) == ["step_00000001"]


def test_writing_a_file_replaces_it_or_leaves_it(run, monkeypatch):
    run.write_config("epochs: 2\n")
    assert run.read_config() == {"epochs": 2}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        run.write_config("epochs: 3\n")
    assert run.read_config() == {"epochs": 2}
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoints", "config.yaml"]


def test_metrics_are_cut_back_and_a_torn_line_is_dropped(run):
    for step in (1, 10, 20):
        run.append_metrics({"step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert [record["step"] for record in run.read_metrics()] == [1, 10, 20]
    run.cut_metrics(10)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 10}\n'


def test_a_folder_is_free_until_a_run_has_taken_a_step(run):
    run.check_is_free()  # overwriting options alone loses nothing
    run.append_metrics({"step": 1})
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        run.check_is_free()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="out: expected a folder"), RunDirectory(tmp_path / "file").locked():
        pass


def test_opening_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: expected the folder of a run"):
        RunDirectory.open(tmp_path)


def test_leftovers_of_a_killed_run_are_removed(run):
    (run.path / "checkpoints" / ".step_00000001.partial-0a").mkdir()
    (run.path / ".summary.partial-0a.json").write_text("")
    run.remove_leftovers()
    assert names(run) == []
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoints", "config.yaml"]


@pytest.fixture
def three(run):
    """A run with checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        run.start_checkpoint(Saver(f"weights of step {step}"), step, keep=3).finish()
    return run


def truncate(folder):
    os.truncate(folder / "weights.safetensors", 3)


def flip_a_bit(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[5] ^= 1
    (folder / "weights.safetensors").write_bytes(content)


def lose_a_file(folder):
    (folder / "state").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def tear_the_manifest(folder):
    os.truncate(folder / "manifest.json", 40)


def replace_the_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {"weights.safetensors": 7}}')


DAMAGES = {
    truncate: "weights.safetensors: expected 17 bytes, got 3",
    flip_a_bit: "weights.safetensors: its content has changed",
    lose_a_file: "state is missing",
    lose_the_manifest: "it has no manifest.json",
    tear_the_manifest: "its manifest.json cannot be read",
    replace_the_manifest: "its manifest.json cannot be read",
}


def test_the_manifest_names_all_files(run):
    place = run.start_checkpoint(Saver("abc"), 1, keep=1).finish()
    files = json.loads((place / "manifest.json").read_text())["files"]
    assert set(files) == {"weights.safetensors", "state"}
    checksum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc, from FIPS 180-2
    assert files["weights.safetensors"] == {"bytes": 3, "sha256": checksum}
    assert damage(place) is None


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(spoil, three, capsys):
    spoil(three.checkpoints()[-1])
    assert three.latest_checkpoint().name == "step_00000002"
    line = capsys.readouterr().err
    assert line.startswith("prmim: warning: checkpoint ")
    assert line.endswith(f"step_00000003 is damaged: {DAMAGES[spoil]}; step_00000002 is used\n")
    assert line.count("\n") == 1
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003"]


def test_damaged_checkpoints_are_set_aside_and_written_again(three, capsys):
    for _ in range(2):
        truncate(three.checkpoints()[-1])
        truncate(three.checkpoints()[-2])
        assert three.latest_checkpoint(set_aside=True).name == "step_00000001"
        assert "is damaged, kept as damaged_step_00000003" in capsys.readouterr().err
        three.start_checkpoint(Saver("new weights"), 2, keep=3).finish()
        three.start_checkpoint(Saver("new weights"), 3, keep=3).finish()
    assert (three.latest_checkpoint() / "weights.safetensors").read_text() == "new weights"
    assert names(three) == [
        *("damaged_step_00000002", "damaged_step_00000002_again"),
        *("damaged_step_00000003", "damaged_step_00000003_again"),
        *("step_00000001", "step_00000002", "step_00000003"),
    ]


def test_where_all_checkpoints_are_damaged_nothing_is_renamed_or_begun_anew(three):
    for checkpoint in three.checkpoints():
        truncate(checkpoint)
    message = r"checkpoint: expected a good one in .*, but all 3 are damaged; step_00000003: weights"
    with pytest.raises(OSError, match=message):
        three.latest_checkpoint(set_aside=True)
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_manifest_cannot_make_us_read_other_files(three, tmp_path):
    (tmp_path / "secret").write_text("x")
    place = three.checkpoints()[-1]
    manifest = {"files": {"../../../secret": {"bytes": 1, "sha256": ""}}}
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert damage(place) == "../../../secret is missing"


def test_an_old_checkpoint_half_deleted_does_not_bear_its_name(run, monkeypatch):
    run.start_checkpoint(Saver(), 1, keep=1).finish()
    remove = run_files.shutil.rmtree

    def fail(path, **options):
        if "step_00000001" in str(path) and not options:
            raise OSError("killed")
        remove(path, **options)

    monkeypatch.setattr(run_files.shutil, "rmtree", fail)
    with pytest.raises(OSError, match="killed"):
        run.start_checkpoint(Saver(), 2, keep=1).finish()
    assert [place.name for place in run.checkpoints()] == ["step_00000002"]
    monkeypatch.undo()
    run.remove_leftovers()
    assert names(run) == ["step_00000002"]


def test_notes_are_collected_once(run):
    run.leave_note(1, {"a": "x"})
    run.leave_note(12, {"b": "y"})
    assert run.collect_notes() == {"a": "x", "b": "y"}
    assert run.collect_notes() == {}


def test_the_names_that_trackers_gave_are_kept(run):
    assert run.read_tracker("wandb") is None
    run.write_tracker("wandb", "a1")
    run.write_tracker("mlflow", "b2")
    assert (run.read_tracker("wandb"), run.read_tracker("mlflow")) == ("a1", "b2")


def test_summary_round_trip(run):
    assert run.read_summary() is None
    run.write_summary({"steps": 3, "loss": 0.5})
    assert run.read_summary() == {"steps": 3, "loss": 0.5}
    assert json.loads((run.path / "summary.json").read_text()) == {"steps": 3, "loss": 0.5}


def content(folder):
    """Return the content of all files below a folder by name; targets of links."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


CORRUPT_LINES = {
    "{": '{"step": 2',
    "nothing of a line": "\0\xff",
    "list": "[]",
    "number": "7",
    "no step": "{}",
    "step in words": '{"step": "two"}',
    "true for a step": '{"step": true}',
    "words": '{"step": 2, "seconds": "long"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("line", CORRUPT_LINES.values(), ids=CORRUPT_LINES)
def test_a_corrupt_line_is_named_and_nothing_is_deleted(line, run):
    (run.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', encoding="latin-1")
    (run.path / ".summary.json.partial-0a").write_text("")
    before = content(run.path)
    for call in (run.read_metrics, lambda: run.cut_metrics(3), run.remove_leftovers):
        with pytest.raises(ValueError, match=r"^run: expected a .* in line 2 of .*metrics.jsonl, got ") as caught:
            call()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300
    assert content(run.path) == before


@pytest.mark.parametrize("end", ["", '{"step": 2', '{"step": 2, "lo', "{", "\0\0\0\0", '{"st\0\0'])
def test_only_the_end_of_the_last_line_can_be_missing(end, run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n\n' + end)
    assert run.read_metrics() == [{"step": 1}]
    run.cut_metrics(3)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("end", ["[]", "{}", "7", '"text"', "text", "\x7fELF"])
def test_a_last_line_that_is_no_beginning_of_one_is_corrupt(end, run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
    with pytest.raises(ValueError, match=r"in the last line of .*metrics.jsonl, got "):
        run.read_metrics()


ODD = {"empty": b"", "list": b"[]", "number": b"3", "torn": b'{"steps": 1', "binary": b"\x7fELF\0\xff", "null": b"null"}


@pytest.mark.parametrize("odd", [*ODD.values(), b"{}", b'{"steps": "all"}'], ids=[*ODD, "no steps", "steps in words"])
def test_an_odd_summary_is_named(odd, run):
    (run.path / "summary.json").write_bytes(odd)
    with pytest.raises(ValueError, match=r"^run: expected a .* in .*summary.json, got "):
        run.read_summary()


@pytest.mark.parametrize("odd", [*ODD.values(), b'{"wandb": 3}'], ids=[*ODD, "number as ID"])
def test_an_odd_tracker_file_is_named(odd, run):
    (run.path / "tracker.json").write_bytes(odd)
    with pytest.raises(ValueError, match=r"^run: expected a .* in .*tracker.json, got "):
        run.read_tracker("wandb")


@pytest.mark.parametrize("odd", [*ODD.values(), b"{}", b"epochs: [1\n"], ids=[*ODD, "no options", "torn YAML"])
def test_odd_options_are_named(odd, run):
    (run.path / "config.yaml").write_bytes(odd)
    with pytest.raises(ValueError, match=r"^config: expected .*config.yaml"):
        run.read_config()


@pytest.mark.parametrize("odd", [*ODD.values(), b"{}", b"[" * 100_000], ids=[*ODD, "no files", "deep"])
def test_an_odd_manifest_is_damage(odd, three):
    (three.checkpoints()[-1] / "manifest.json").write_bytes(odd)
    assert damage(three.checkpoints()[-1]) == "its manifest.json cannot be read"


def test_damage_is_told_in_one_short_line(three):
    names = {"\x1b[2J" + "x" * 10_000: {"bytes": 1, "sha256": ""}}
    (three.checkpoints()[-1] / "manifest.json").write_text(json.dumps({"files": names}))
    assert damage(three.checkpoints()[-1]).isprintable()
    assert len(damage(three.checkpoints()[-1])) < 100


SPECIAL = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.yaml", RunDirectory.read_config),
        ("summary.json", RunDirectory.read_summary),
        ("tracker.json", lambda run: run.read_tracker("wandb")),
        ("metrics.jsonl", RunDirectory.read_metrics),
        ("metrics.jsonl", lambda run: run.append_metrics({"step": 1})),
        ("metrics.jsonl", lambda run: run.cut_metrics(1)),
    ],
)
def test_a_pipe_in_place_of_a_file_does_not_block(name, read, make, run):
    (run.path / name).unlink(missing_ok=True)
    make(run.path / name)
    with pytest.raises(ValueError, match=rf"{name}: not a regular file, but a pipe, a socket or a device$"):
        read(run)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "state", "another"])
def test_a_pipe_in_a_checkpoint_is_damage(name, make, three):
    place = three.checkpoints()[-1]
    (place / name).unlink(missing_ok=True)
    make(place / name)
    assert damage(place) is not None
    assert three.latest_checkpoint().name == "step_00000002"


def test_links_among_leftovers_and_checkpoints_are_deleted_and_not_followed(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "photo").write_text("mine")
    folder = run.path / "checkpoints"
    targets = {"x": tmp_path / "outside", "y": tmp_path / "outside" / "photo", "z": tmp_path / "nowhere"}
    for name, target in targets.items():
        (folder / f".{name}.partial").symlink_to(target)
    run.remove_leftovers()
    assert names(run) == []
    (folder / ".step_00000002.partial").symlink_to(tmp_path / "outside")
    (folder / "step_00000001").symlink_to(tmp_path / "outside")
    run.start_checkpoint(Saver(), 2, keep=1).finish()
    assert names(run) == ["step_00000002"]
    assert (tmp_path / "outside" / "photo").read_text() == "mine"


def test_a_link_to_nothing_is_not_written_through(run, tmp_path):
    (run.path / "metrics.jsonl").symlink_to(tmp_path / "outside")
    run.cut_metrics(0)
    run.append_metrics({"step": 1})
    assert run.read_metrics() == [{"step": 1}]
    assert not (tmp_path / "outside").exists()


def test_a_rescue_checkpoint_of_another_name_is_passed_over(run):
    (run.path / "checkpoints" / "rescue_step_one").mkdir()
    (run.path / "checkpoints" / "rescue_step_00000012").mkdir()
    assert run.rescued_steps() == {12}

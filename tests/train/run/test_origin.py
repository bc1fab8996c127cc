"""A run belongs to one process, data set and task, as do its checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prmim_train.cli.commands import main
from prmim_train.config.pretrain import pretrain_config
from prmim_train.pretrain import Pretraining, pretrain
from prmim_train.run import processes
from prmim_train.run.directory import RunDirectory
from prmim_train.run.loop import Interrupted
from prmim_train.run.origin import read_trained
from prmim_train.run.prepare import open_run_data, read_run_config

EVALUATE = ["--protocol", "knn", "--baselines", "false", "--eval_limit", "100"]


def write_images(path: Path, number: int = 40, seed: int = 0) -> str:
    images = np.random.default_rng(seed).integers(0, 256, (number, 8, 8), np.uint8)
    np.savez(path, images=images, labels=np.arange(number) % 2)
    return str(path)


def write_folder(folder: Path, number: int = 20) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (number, 8, 8), np.uint8)
    for k, image in enumerate(pixels):
        place = folder / "ab"[k % 2] / f"{k:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
        os.utime(place, (1_000_000_000, 1_000_000_000))
    return str(folder)


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run on 40 images, of which it held out 8."""
    config = tiny(data=write_images(tmp_path / "images.npz"), batch_size=8)
    pretrain(config)
    return config


def fail(words, capsys):
    assert main([str(word) for word in words]) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------------------------------------------------- one process


def test_a_second_process_is_refused_and_disturbs_nothing(tiny):
    config = tiny()
    run = RunDirectory(config.run_path)
    with run.locked():
        run.write_config("method: mae\n")
        partial = run.path / "checkpoints" / ".step_00000004.partial"
        partial.mkdir()
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match="out: another process is training in"):
                pretrain(tiny(resume=resume))
        assert partial.is_dir()
    with RunDirectory(config.run_path).locked():
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from prmim_train.run.directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    with RunDirectory(tmp_path).locked():
        pass


def test_the_folder_of_a_run_that_was_never_started_is_removed(tiny, tmp_path):
    out = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match="model: expected weights that fit into memory"):
        pretrain(tiny(out=str(out), embed_dim=2**30))
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, ("1", "2", "1", "localhost", "20000")),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_NTASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_ID": "123456",
                "SLURM_STEP_NODELIST": "gpu[017-018]",
            },
            ("3", "4", "1", "gpu017", "23456"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, None),  # a batch script without srun
    ],
)
def test_tasks_of_srun_are_processes_of_one_run(monkeypatch, given, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # restores what adopt_srun sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.adopt_srun()
    assert tuple(os.environ.get(name) for name in names) == (expected or (None,) * 5)
    assert processes.launched() == ((int(expected[0]), int(expected[1])) if expected else (0, 1))


# --------------------------------------------------------------------------------------------------------- one data set


def test_images_that_were_added_are_reported_and_refused(run, capsys):
    words = ["--run", run.run_path, *EVALUATE]
    assert main(["evaluate", *map(str, words)]) == 0
    write_images(Path(run.data), number=41)
    expected = "got 41 images instead of 40"
    assert expected in fail(["evaluate", *words], capsys)
    assert expected in fail(["picture", "--run", run.run_path, "--kind", "schedule"], capsys)
    assert expected in fail(["evaluate", "--run", run.run_path, "--protocol", "finetune", "--epochs", "1"], capsys)
    with pytest.raises(ValueError, match=expected):
        pretrain(pretrain_config(**{**run.flat(), "resume": True, "epochs": 2}))


def test_images_that_were_trained_on_are_never_held_out(run, capsys):
    earlier = read_trained(RunDirectory(run.run_path))
    assert len(earlier.keys) == 32
    write_images(Path(run.data), number=60)  # the first 40 are others: NumPy draws all numbers anew
    old = np.load(run.data)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(run.data, images=np.concatenate([old["images"][40:], images]), labels=np.arange(60) % 2)
    directory = RunDirectory(run.run_path)
    data = open_run_data(directory, read_run_config(directory), allow_changes=True)
    found = data.source.identities()
    assert not set(found.keys[data.held_out].tolist()) & set(earlier.keys.tolist())
    assert 0 < len(data.held_out) < 12
    assert "held-out images were trained on, and are left out" in capsys.readouterr().out

    pretrain(pretrain_config(**{**run.flat(), "resume": True, "epochs": 2, "allow_changes": True}))
    assert set(earlier.keys.tolist()) < set(read_trained(directory).keys.tolist())
    again = open_run_data(directory, read_run_config(directory))  # the change is recorded
    assert not set(found.keys[again.held_out].tolist()) & set(earlier.keys.tolist())
    job = Pretraining(pretrain_config(**{**run.flat(), "resume": True, "epochs": 3}))
    assert job.data.held_out.tolist() == again.held_out.tolist()


def test_a_run_without_steps_remembers_no_images(run):
    directory = RunDirectory(run.run_path)
    shutil.rmtree(run.run_path / "checkpoints")
    for name in ("summary.json", "metrics.jsonl"):
        (run.run_path / name).unlink()
    write_images(Path(run.data), seed=1)
    pretrain(run)
    assert len(read_trained(directory).keys) == 32


@pytest.mark.parametrize("change", ["holdout: 0.2 -> 0.4", "seed: 0 -> 3"])
def test_a_split_that_was_changed_by_hand_is_refused(run, capsys, change):
    name, _, values = change.partition(": ")
    before, _, after = values.partition(" -> ")
    place = run.run_path / "config.yaml"
    text = place.read_text()
    assert f"{name}: {before}\n" in text
    place.write_text(text.replace(f"{name}: {before}\n", f"{name}: {after}\n"))
    assert "another split into training and held-out images" in fail(
        ["evaluate", "--run", run.run_path, *EVALUATE], capsys
    )


def test_another_share_can_be_held_out_of_what_was_not_trained_on(run, capsys):
    assert main(["evaluate", "--run", str(run.run_path), *EVALUATE, "--holdout", "0.5"]) == 0
    tested = json.loads((run.run_path / "evaluation.json").read_text())["protocols"]["knn"]["test_images"]
    assert 0 < tested <= 8
    assert "of 20 held-out images were trained on, and are left out." in capsys.readouterr().out


def test_a_test_set_of_training_images_is_refused(run, capsys, tmp_path):
    words = ["evaluate", "--run", run.run_path, *EVALUATE, "--test_data"]
    old = np.load(run.data)
    assert main([str(word) for word in [*words, run.data]]) == 0  # the held-out ones remain
    assert "32 of 40 test images were trained on, and are left out." in capsys.readouterr().out
    data = open_run_data(RunDirectory(run.run_path), run)
    np.savez(tmp_path / "trained.npz", images=old["images"][data.train], labels=old["labels"][data.train])
    assert "test_data: expected images that the run was not trained on, got none" in fail(
        [*words, tmp_path / "trained.npz"], capsys
    )


def test_contents_that_were_replaced_under_the_same_names_are_noticed(tiny, tmp_path, capsys):
    folder = write_folder(tmp_path / "photos")
    config = tiny(data=folder, batch_size=8)
    pretrain(config)
    words = ["evaluate", "--run", config.run_path, *EVALUATE]
    assert main([str(word) for word in words]) == 0
    place = tmp_path / "photos" / "a" / "000.png"
    os.utime(place, (1_100_000_000, 1_100_000_000))
    capsys.readouterr()
    assert "got files that were modified since" in fail(words, capsys)
    place.write_bytes(place.read_bytes() + b"\0")
    assert "got images of other names, sizes or pixels" in fail(words, capsys)


def test_a_copy_of_the_images_is_the_same_data(tiny, tmp_path, capsys):
    folder = write_folder(tmp_path / "photos")
    config = tiny(data=folder, batch_size=8)
    pretrain(config)
    shutil.copytree(folder, tmp_path / "copy")  # copies times
    pretrain(tiny(data=str(tmp_path / "copy"), batch_size=8, resume=True, epochs=2))
    assert f"data from '{folder}' to '{tmp_path / 'copy'}'" in capsys.readouterr().out


def test_a_single_class_that_an_earlier_version_recorded_is_no_change(tiny, tmp_path):
    write_folder(tmp_path / "photos" / "all")
    for place in (tmp_path / "photos").rglob("*.png"):
        place.rename(tmp_path / "photos" / "all" / place.name)
    config = tiny(data=str(tmp_path / "photos"), batch_size=8)
    pretrain(config)
    directory = RunDirectory(config.run_path)
    directory.write_identity({**directory.read_identity()[1], "labels": "of one class"})
    pretrain(pretrain_config(**{**config.flat(), "resume": True, "epochs": 2}))


def test_a_classifier_notices_other_test_images(run, tmp_path, capsys):
    test = write_images(tmp_path / "test.npz", 10, seed=1)
    words = ["evaluate", "--run", run.run_path, "--protocol", "finetune", "--epochs", "1", "--batch_size", "8"]
    words += ["--test_data", test]
    assert main([str(word) for word in words]) == 0
    write_images(Path(test), 12, seed=1)
    assert "got 12 test images instead of 10" in fail([*words, "--resume"], capsys)


def test_a_teacher_that_changed_is_noticed(tiny, teacher):
    config = tiny(
        method="maskalign",
        teacher=str(teacher),
        image_size=32,
        patch_size=8,
        channels=3,
        teacher_layers=2,
        fusion="sum",
        base_learning_rate=1e-6,
    )
    pretrain(config)
    (teacher / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="got another teacher"):
        pretrain(pretrain_config(**{**config.flat(), "resume": True, "epochs": 2}))


# ------------------------------------------------------------------------------------------------------------- one task


def stopped(tiny, monkeypatch, fake, **options):
    """Return the options of a run that was stopped after 4 of 12 steps."""
    import signal

    step = fake.train_step

    def train_step(self, images, sample):
        step(self, images, sample)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(fake, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(tiny(**options))
    return tiny(**options)


@pytest.mark.parametrize(
    ("option", "value"), [("mask_ratio", 0.5), ("throwing", "random"), ("batch_size", 60), ("crop_scale", (0.5, 1.0))]
)
def test_options_that_change_the_meaning_of_steps_are_refused(tiny, monkeypatch, fake, option, value):
    config = stopped(tiny, monkeypatch, fake)
    before = {path: path.read_bytes() for path in config.run_path.rglob("*") if path.is_file()}
    changed = {**config.flat(), "resume": True, option: value}
    with pytest.raises(ValueError, match=f"resume: expected the options of the run in .*, got a change of {option} "):
        pretrain(pretrain_config(**changed))
    assert before == {path: path.read_bytes() for path in config.run_path.rglob("*") if path.is_file()}
    pretrain(pretrain_config(**{**changed, "allow_changes": True}))


def test_other_options_may_change_and_are_listed(tiny, monkeypatch, fake, capsys):
    config = stopped(tiny, monkeypatch, fake)
    changes = {"log_every": 3, "base_learning_rate": 0.005, "recompute_blocks": True}
    pretrain(pretrain_config(**{**config.flat(), "resume": True, **changes}))
    expected = (
        "Options changed since the last start: recompute_blocks from False to True, log_every from 2 to 3, "
        "base_learning_rate from 0.01 to 0.005."
    )
    assert expected in capsys.readouterr().out


def test_a_finished_run_lists_options_that_come_too_late(run, capsys):
    pretrain(pretrain_config(**{**run.flat(), "resume": True, "pictures": 3}))
    output = capsys.readouterr().out
    assert "Options changed since the last start: pictures from 0 to 3." in output
    assert "is finished" in output
    with pytest.raises(ValueError, match="got a change of mask_ratio from"):
        pretrain(pretrain_config(**{**run.flat(), "resume": True, "mask_ratio": 0.5}))


def test_a_finished_run_without_checkpoints_is_not_called_finished(run):
    shutil.rmtree(run.run_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="expected the last checkpoint of the finished run in"):
        pretrain(pretrain_config(**{**run.flat(), "resume": True}))


def test_different_data_has_different_folders():
    names = ["photos.v1", "photos.v2", "photos", "photos.npz", "photos.tar"]
    assert len({pretrain_config(data=name).run_path for name in names}) == len(names)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path, monkeypatch, fake):
    config = stopped(tiny, monkeypatch, fake)
    other = tiny(out=str(tmp_path / "other"), seed=1, checkpoint_every=1)
    pretrain(other)
    ours = RunDirectory(config.run_path)
    manifest = json.loads((ours.checkpoints()[-1] / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert manifest["run"] == ours.read_identity()[0]
    shutil.copytree(RunDirectory(other.run_path).checkpoints()[-1], config.run_path / "checkpoints" / "step_00000012")
    assert "it belongs to another run" in ours.damage(ours.checkpoints()[-1])
    assert ours.latest_checkpoint().name == "step_00000004"


def test_a_renamed_checkpoint_is_refused(run):
    directory = RunDirectory(run.run_path)
    place = directory.checkpoints()[-1]
    place.rename(place.with_name("step_00000002"))
    with pytest.raises(OSError, match="it belongs to another step"):
        directory.latest_checkpoint()


def test_weights_of_another_run_do_not_fit_a_training_state(run, tiny, tmp_path):
    other = tiny(out=str(tmp_path / "other"), seed=1, data=run.data, batch_size=8)
    pretrain(other)
    ours, theirs = (RunDirectory(config.run_path).checkpoints()[-1] for config in (run, other))
    shutil.copy(theirs / "weights.safetensors", ours / "weights.safetensors")
    with pytest.raises(OSError, match=r"weights\.safetensors: its content has changed"):
        RunDirectory(run.run_path).latest_checkpoint()
    shutil.copy(theirs / "manifest.json", ours / "manifest.json")
    with pytest.raises(OSError, match="its content has changed"):
        RunDirectory(run.run_path).latest_checkpoint()


def test_a_run_that_lost_its_identity_takes_that_of_its_checkpoints(run):
    directory = RunDirectory(run.run_path)
    identity = directory.read_identity()
    (run.run_path / "run.json").unlink()
    pretrain(pretrain_config(**{**run.flat(), "resume": True, "epochs": 2}))
    assert directory.read_identity()[0] == identity[0]


@pytest.mark.parametrize("name", ["run.json", "trained.npz"])
def test_a_damaged_identity_is_named(run, capsys, name):
    (run.run_path / name).write_bytes(b"{}")
    assert name in fail(["evaluate", "--run", run.run_path, *EVALUATE], capsys)


def test_weights_that_are_not_finite_are_reported(tiny, tmp_path, fake, monkeypatch, capsys):
    config = tiny(data=write_images(tmp_path / "images.npz"), batch_size=8)
    save = fake._save
    monkeypatch.setattr(fake, "_save", lambda self, folder: (self.encoder.fill(np.nan), save(self, folder))[1])
    pretrain(config)
    for words in (["evaluate", "--run", config.run_path, *EVALUATE], ["picture", "--run", config.run_path]):
        assert "checkpoint: expected finite weights, got NaN or infinity in encoder of" in fail(words, capsys)

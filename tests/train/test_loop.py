import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prmim_train.config import PretrainConfig
from prmim_train.layers import parse_options
from prmim_train.loop import Interrupted, NonFiniteLoss, SpeedMeter, _duration, _loss_text, pretrain

HERE = Path(__file__).parent


def lines(config):
    return [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]


def weights(config):
    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    with np.load(latest / "weights.safetensors") as file:
        return {name: file[name] for name in file}


def stop_after(monkeypatch, fake, step, number=signal.SIGINT):
    """Send ourselves a signal in the middle of a step, as Ctrl-C would."""
    take = fake.train_step

    def train_step(self, images, sample):
        if self.step + 1 == step:
            signal.raise_signal(number)
        take(self, images, sample)

    monkeypatch.setattr(fake, "train_step", train_step)


def test_a_run_leaves_options_metrics_checkpoint_and_summary(tiny):
    config = tiny(epochs=2)
    summary = pretrain(config)
    records = lines(config)
    assert [record["step"] for record in records] == [1, *range(2, 25, 2)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert set(records[0]) == {
        *("step", "epoch", "loss", "loss_decoded", "loss_thrown", "lr", "grad_norm", "images_per_second", "seconds")
    }
    assert records[0]["images_per_second"] is None
    assert records[-1]["images_per_second"] > 0
    assert records[-1]["epoch"] == pytest.approx(24 * 120 / 1438, abs=1e-3)
    assert summary == json.loads((config.run_path / "summary.json").read_text())
    assert (summary["steps"], summary["train_images"], summary["held_out_images"]) == (24, 1438, 359)
    assert summary["loss"] == records[-1]["loss"]
    read = parse_options((config.run_path / "config.yaml").read_text(), "config.yaml")
    assert PretrainConfig(**read, out=config.out) == config
    assert sorted(p.name for p in (config.run_path / "checkpoints").iterdir()) == ["step_00000024"]


def test_no_held_out_image_is_trained_on(tiny, fake):
    pretrain(tiny(epochs=2))
    from prmim_train.prepare import open_data

    seen = set(np.concatenate(fake.made[0].seen).tolist())
    assert not seen & set(open_data(tiny()).held_out.tolist())
    assert len(seen) == 1438


def test_a_new_run_does_not_touch_an_old_one(tiny):
    pretrain(tiny())
    with pytest.raises(FileExistsError, match=r"out: .* already holds a run"):
        pretrain(tiny())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume_is_the_same_as_no_stop(tiny, fake, monkeypatch, tmp_path, number):
    whole = tiny(out=str(tmp_path / "whole"))
    pretrain(whole)
    config = tiny()
    with monkeypatch.context() as patch:
        stop_after(patch, fake, 7, number)
        with pytest.raises(Interrupted, match=r"Stopped after step 7 of 12.*Go on with: prmim pretrain --out") as stop:
            pretrain(config)
    assert stop.value.signal_number == number
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 7]
    pretrain(tiny(resume=True))
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value)
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 7, 8, 10, 12]
    seconds = [record["seconds"] for record in lines(config)]
    assert seconds == sorted(seconds)


def test_resuming_after_a_crash_cuts_metrics_back_to_the_checkpoint(tiny, fake, monkeypatch):
    take = fake.train_step

    def crash(self, images, sample):
        if self.step == 10:
            raise RuntimeError("power cut")
        take(self, images, sample)

    config = tiny(epochs=2, checkpoint_every=1, batch_size=240)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "train_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(config)
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 8, 10]  # the checkpoint is of step 6
    pretrain(replace(config, resume=True))
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 7, 8, 10, 12]


def test_resuming_before_the_first_checkpoint_starts_anew(tiny, fake, monkeypatch):
    config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(fake, "read_metrics", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(config)
    assert pretrain(tiny(resume=True))["steps"] == 12


def test_a_finished_run_says_so(tiny, fake, capsys):
    first = pretrain(tiny())
    engines = len(fake.made)
    assert pretrain(tiny(resume=True)) == first
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    assert len(fake.made) == engines


def test_a_finished_run_can_be_made_longer(tiny):
    pretrain(tiny())
    assert pretrain(tiny(resume=True, epochs=2))["steps"] == 24


def test_resuming_with_fewer_epochs_than_are_done_is_refused(tiny):
    pretrain(tiny(epochs=2))
    with pytest.raises(ValueError, match="epochs: expected more than the 24 steps"):
        pretrain(tiny(resume=True))


def test_weights_to_begin_with_that_are_missing_leave_nothing_behind(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"init_weights: expected a .* there is none at nowhere"):
        pretrain(tiny(init_weights="nowhere"))
    assert not (tmp_path / "run").exists()


def test_resuming_where_no_run_is_begins_one(tiny):
    first = pretrain(tiny(resume=True))
    assert first["steps"] == 12
    assert pretrain(tiny(resume=True)) == first


def test_resuming_another_model_is_refused(tiny):
    pretrain(tiny())
    with pytest.raises(ValueError, match="weights: expected shape"):
        pretrain(tiny(resume=True, epochs=2, image_size=32))


def test_a_loss_that_is_not_finite_is_rescued_and_ends_the_run(tiny, fake, monkeypatch):
    monkeypatch.setattr(fake, "bad_step", 5)
    config = tiny()
    with pytest.raises(NonFiniteLoss, match=r"not at step 5; .*rescue_step_00000005; try --clip_grad 1, or a lower"):
        pretrain(config)
    assert [entry.name for entry in (config.run_path / "checkpoints").iterdir()] == ["rescue_step_00000005"]
    assert [record["step"] for record in lines(config)] == [1, 2, 4]
    assert not (config.run_path / "summary.json").exists()


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tiny, fake, monkeypatch):
    config = tiny(epochs=2, checkpoint_every=1)
    take = fake.train_step

    def train_step(self, images, sample):
        take(self, images, sample)
        if self.step == 20:
            fake.save_error = OSError(errno.ENOSPC, "No space left on device")

    message = r"step_00000024: .*No space left on device; the last good one is .*step_00000012"
    with monkeypatch.context() as patch:
        patch.setattr(fake, "train_step", train_step)
        with pytest.raises(OSError, match=message):
            pretrain(config)
    fake.save_error = None
    assert [entry.name for entry in (config.run_path / "checkpoints").iterdir()] == ["step_00000012"]
    assert pretrain(tiny(epochs=2, checkpoint_every=1, resume=True))["steps"] == 24


def test_initial_weights_are_taken(tiny, fake, tmp_path):
    pretrain(tiny())
    first = tiny().run_path / "checkpoints" / "step_00000012" / "weights.safetensors"
    start = pretrain(tiny(out=str(tmp_path / "second"), init_weights=str(first)))
    assert start["loss"] < json.loads((tiny().run_path / "summary.json").read_text())["loss"]


def test_the_end_evaluates_and_draws(tiny, capsys):
    summary = pretrain(tiny(eval_limit=400, pictures=3))
    text = capsys.readouterr().out
    assert "trained encoder" in text
    assert summary["evaluation"]["trained"]["linear"] > 0.6  # chance is 0.1
    for name in ("reconstructions.png", "schedule.png", "loss.png"):
        assert (tiny().run_path / name).stat().st_size > 2000
        assert name in text


@pytest.mark.parametrize(
    ("changes", "losses", "picture"),
    [
        ({"method": "simmim"}, ["loss", "loss_decoded", "loss_thrown"], "reconstructions.png"),
        ({"method": "maskalign"}, ["loss", "loss_visible", "loss_thrown"], "similarity.png"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_each_method_logs_and_draws_what_is_its_own(changes, losses, picture, tiny, teacher, capsys):
    if changes["method"] == "maskalign":
        changes = {**changes, "teacher": str(teacher), "teacher_layers": 2}
    config = tiny(**changes, epochs=2, pictures=2)
    summary = pretrain(config)
    assert [name for name in lines(config)[0] if name.startswith("loss")] == losses
    assert [name for name in summary if name.startswith("loss")] == losses
    text = capsys.readouterr().out
    assert "steps in " in text
    for name in losses[1:]:
        assert f"{name.removeprefix('loss_')} {summary[name]:.4f}" in text
    assert {path.name for path in config.run_path.glob("*.png")} == {picture, "schedule.png", "loss.png"}


def test_the_decay_reaches_the_engine(tiny, fake):
    pretrain(tiny(decay="step"))
    assert fake.made[0].decay == "step"


def test_a_part_that_is_not_supervised_is_not_told():
    assert _loss_text({"loss": 0.5, "loss_decoded": 0.5, "loss_thrown": 0.0}) == "loss 0.5000 (decoded 0.5000)"
    assert _loss_text({"step": 3, "loss": 0.5}) == "loss 0.5000"


def test_unreadable_images_are_left_out_and_reported(tiny, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(150):
        Image.fromarray(rng.integers(0, 255, (20, 24), dtype=np.uint8)).save(folder / f"{number:03}.png")
    (folder / "007.png").write_bytes(b"")
    config = tiny(data=str(folder), epochs=3, batch_size=32, holdout=0.0, eval_limit=10, pictures=2)
    summary = pretrain(config)
    assert list(summary["unreadable_images"]) == ["007.png"]
    assert summary["evaluation"] == {"skipped": "the images have no labels"}
    assert "007.png" in capsys.readouterr().out


def test_ctrl_c_in_another_process(tmp_path):
    """The whole way: a real process, a real signal, the exit code, and the command that it prints."""
    shutil.copy(HERE / "fake_engine.py", tmp_path / "prmim_fake.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PRMIM_FAKE_DELAY": "0.05"}
    command = [sys.executable, "-m", "prmim_train", "pretrain", "--backend", "fake", "--out", "run", "--log_every", "1"]
    command += ["--eval_limit", "0", "--pictures", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 40
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert "Go on with: prmim pretrain --out run --resume" in err
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


def test_speed_does_not_count_the_first_step():
    meter = SpeedMeter()
    assert meter.recent is None
    assert meter.overall is None
    meter.update(100, now=60.0)  # a minute of compilation
    assert meter.recent is None
    assert meter.overall is None
    meter.update(100, now=61.0)
    meter.update(300, now=62.0)
    assert meter.recent == 300
    assert meter.overall == 200


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (59.9, "59 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")]
)
def test_durations_are_written_as_people_do(seconds, text):
    assert _duration(seconds) == text

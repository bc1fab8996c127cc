import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from prmim_train.cli.commands import main
from prmim_train.config.layers import parse_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.pretrain import pretrain
from prmim_train.run import loop
from prmim_train.run.directory import RunDirectory
from prmim_train.run.log import SpeedMeter, duration, loss_text
from prmim_train.run.loop import Interrupted, NonFiniteLoss

HERE = Path(__file__).parents[1]


def lines(config):
    return [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]


def untimed(config):
    """Return the lines without time fields."""
    return [
        {name: value for name, value in line.items() if name not in ("images_per_second", "waiting", "seconds")}
        for line in lines(config)
    ]


def weights(config):
    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    return load_file(latest / "weights.safetensors")


def stop_after(monkeypatch, fake, step, number=signal.SIGINT):
    """Send a signal to this process in the middle of a step, as Ctrl-C does."""
    take = fake.train_step

    def train_step(self, images, sample):
        if self.step + 1 == step:
            signal.raise_signal(number)
        take(self, images, sample)

    monkeypatch.setattr(fake, "train_step", train_step)


@pytest.fixture(autouse=True)
def hang_ups_end_programs():
    """Undo `nohup`, under which the tests may run."""
    if not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_run_leaves_options_metrics_checkpoint_and_summary(tiny):
    config = tiny(epochs=2)
    summary = pretrain(config)
    records = lines(config)
    assert [record["step"] for record in records] == [1, *range(2, 25, 2)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert set(records[0]) == {
        *(
            "step",
            "epoch",
            "loss",
            "loss_decoded",
            "loss_thrown",
            "lr",
            "grad_norm",
            "images_per_second",
            "waiting",
            "seconds",
        )
    }
    assert records[0]["images_per_second"] is None
    assert records[-1]["images_per_second"] > 0
    assert all(0 < record["waiting"] < 1 for record in records)
    assert records[-1]["epoch"] == pytest.approx(24 * 120 / 1438, abs=1e-3)
    assert summary == json.loads((config.run_path / "summary.json").read_text())
    assert (summary["steps"], summary["train_images"], summary["held_out_images"]) == (24, 1438, 359)
    assert summary["loss"] == records[-1]["loss"]
    read = parse_options((config.run_path / "config.yaml").read_text(), "config.yaml")
    assert pretrain_config(**read, out=config.out) == config
    assert sorted(p.name for p in (config.run_path / "checkpoints").iterdir()) == ["step_00000024"]


def test_no_held_out_image_is_trained_on(tiny, fake):
    pretrain(tiny(epochs=2))
    from prmim_train.run.prepare import open_data

    seen = set(np.concatenate(fake.made[0].seen).tolist())
    assert not seen & set(open_data(tiny()).held_out.tolist())
    assert len(seen) == 1438


def test_a_new_run_does_not_touch_an_old_one(tiny):
    pretrain(tiny())
    with pytest.raises(FileExistsError, match=r"out: .* already holds a run"):
        pretrain(tiny())


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", STOPPING)
def test_the_exit_code_names_the_signal(number, tiny_words, fake, monkeypatch):
    stop_after(monkeypatch, fake, 7, number)
    before = [signal.getsignal(each) for each in STOPPING]
    assert main(["pretrain", *tiny_words]) == 128 + number
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_the_command_that_is_told_resumes_the_run(tiny_words, fake, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, fake, 7, signal.SIGTERM)
        main(["pretrain", *tiny_words, "--out", str(tmp_path / "a run")])
    told = re.search(r"Resume with: prmim (.*)", capsys.readouterr().err)
    assert main(shlex.split(told[1])) == 0
    assert RunDirectory(tmp_path / "a run").read_summary()["steps"] == 12


def repeat(monkeypatch, fake, number, count):
    """Send a signal in the middle of step 3, several times."""
    take = fake.train_step

    def train_step(self, images, sample):
        if self.step == 2:
            for _ in range(count):
                signal.raise_signal(number)
        take(self, images, sample)

    monkeypatch.setattr(fake, "train_step", train_step)


@pytest.mark.parametrize("number", STOPPING)
def test_repeated_signals_do_not_prevent_the_checkpoint(number, tiny, fake, monkeypatch):
    """Shells and terminals, batch systems and `torchrun` repeat them."""
    repeat(monkeypatch, fake, number, 3)
    if number != signal.SIGINT:
        monkeypatch.setattr(loop, "MOMENT", -1.0)
    with pytest.raises(Interrupted, match="Stopped after step 3 of 12"):
        pretrain(tiny())
    assert RunDirectory(tiny().run_path).latest_checkpoint().name == "step_00000003"


def test_a_second_ctrl_c_stops_at_once(tiny, fake, monkeypatch):
    monkeypatch.setattr(loop, "MOMENT", -1.0)
    repeat(monkeypatch, fake, signal.SIGINT, 2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny())
    assert RunDirectory(tiny().run_path).latest_checkpoint() is None


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_run_under_nohup_ignores_hang_ups(tiny, fake, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    repeat(monkeypatch, fake, signal.SIGHUP, 2)
    assert pretrain(tiny())["steps"] == 12


@pytest.mark.parametrize("number", STOPPING)
def test_stop_and_resume_is_the_same_as_no_stop(tiny, fake, monkeypatch, tmp_path, number):
    whole = tiny(out=str(tmp_path / "whole"))
    pretrain(whole)
    config = tiny()
    with monkeypatch.context() as patch:
        stop_after(patch, fake, 7, number)
        with pytest.raises(Interrupted, match=r"Stopped after step 7 of 12.*Resume with: prmim pretrain --out") as stop:
            pretrain(config)
    assert stop.value.signal_number == number
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6]
    pretrain(tiny(resume=True))
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value)
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 8, 10, 12]
    assert untimed(config) == untimed(whole)
    seconds = [record["seconds"] for record in lines(config)]
    assert seconds == sorted(seconds)


@pytest.fixture
def crash(fake, monkeypatch):
    """Return a function that runs a configuration, and crashes at a step."""

    def run(config, step):
        take = fake.train_step

        def train_step(self, images, sample):
            if self.step + 1 == step:
                raise RuntimeError("power cut")
            take(self, images, sample)

        with monkeypatch.context() as patch:
            patch.setattr(fake, "train_step", train_step)
            with pytest.raises(RuntimeError, match="power cut"):
                pretrain(config)

    return run


def test_resuming_after_a_crash_cuts_metrics_back_to_the_checkpoint(tiny, crash):
    config = tiny(epochs=2, checkpoint_every=1, batch_size=240)
    crash(config, 11)
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 8, 10]  # the checkpoint is of step 6
    pretrain(replace(config, resume=True))
    assert [record["step"] for record in lines(config)] == [1, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(("log_every", "minutes"), [(1, None), (5, None), (50, None), (5, 1e-9)])
def test_crashes_leave_no_trace_in_the_metrics(log_every, minutes, tiny, crash, tmp_path):
    options = {"epochs": 3, "checkpoint_every": 1, "log_every": log_every, "holdout": 0.25}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    config = tiny(**options, checkpoint_minutes=minutes)
    crash(config, 3)
    config = replace(config, resume=True)
    for step in (13, 14, 15, 31):
        crash(config, step)
    pretrain(config)
    assert untimed(config) == untimed(whole)
    assert untimed(config)[0]["step"] == 1
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value)


def test_checkpoints_are_written_by_minutes_too(tiny, monkeypatch):
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr("prmim_train.run.checkpoints.time.monotonic", lambda: next(now))
    saved = []
    start = RunDirectory.start_checkpoint

    def note(self, engine, step, **options):
        saved.append(step)
        return start(self, engine, step, **options)

    monkeypatch.setattr(RunDirectory, "start_checkpoint", note)
    pretrain(tiny(checkpoint_minutes=1))  # reads the clock once per step, and once per checkpoint
    assert saved == [3, 6, 9, 12]


def test_a_damaged_checkpoint_is_passed_over_and_written_again(tiny, crash, capsys, tmp_path):
    options = {"epochs": 3, "checkpoint_every": 1}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    config = tiny(**options)
    crash(config, 30)
    damaged = config.run_path / "checkpoints" / "step_00000024"
    os.truncate(damaged / "weights.safetensors", 100)
    capsys.readouterr()
    pretrain(replace(config, resume=True))
    captured = capsys.readouterr()
    assert "step_00000024 is damaged, kept as damaged_step_00000024: weights.safetensors: expected" in captured.err
    assert "resuming after step 12" in captured.out
    assert untimed(config) == untimed(whole)
    names = sorted(entry.name for entry in (config.run_path / "checkpoints").iterdir())
    assert names == ["damaged_step_00000024", "step_00000024", "step_00000036"]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(tiny, crash):
    config = tiny(epochs=2, checkpoint_every=1)
    crash(config, 20)
    os.truncate(config.run_path / "checkpoints" / "step_00000012" / "weights.safetensors", 100)
    before = lines(config)
    with pytest.raises(OSError, match="checkpoint: expected a good one in"):
        pretrain(replace(config, resume=True))
    assert lines(config) == before


def test_a_run_of_another_backend_is_not_resumed(tiny, fake):
    pretrain(tiny())
    built = len(fake.made)
    message = (
        r"backend: expected fake, as in the run in .*run, got torch; to reuse only the weights: "
        r"--init_weights .*step_00000012/weights.safetensors --out ANOTHER"
    )
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(resume=True, epochs=2, backend="torch"))
    assert len(fake.made) == built


def test_the_engine_is_closed_whatever_happens(tiny, fake, crash):
    crash(tiny(), 3)
    pretrain(tiny(resume=True, eval_limit=20))
    assert len(fake.made) == 3  # the last one is the untrained encoder of the evaluation
    assert all(engine.is_closed for engine in fake.made)


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
    assert "is finished" in capsys.readouterr().out
    assert len(fake.made) == engines


def test_a_finished_run_can_be_made_longer(tiny):
    pretrain(tiny())
    assert pretrain(tiny(resume=True, epochs=2))["steps"] == 24


def test_resuming_with_fewer_epochs_than_are_done_is_refused(tiny):
    pretrain(tiny(epochs=2))
    with pytest.raises(ValueError, match="epochs: expected more than the 24 steps"):
        pretrain(tiny(resume=True))


def test_weights_to_begin_with_that_are_missing_leave_nothing_behind(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"init_weights: expected a .* got nowhere, which does not exist"):
        pretrain(tiny(init_weights="nowhere"))
    assert not (tmp_path / "run").exists()


def test_resuming_where_no_run_is_begins_one(tiny):
    first = pretrain(tiny(resume=True))
    assert first["steps"] == 12
    assert pretrain(tiny(resume=True)) == first


def test_resuming_another_model_is_refused(tiny):
    pretrain(tiny())
    with pytest.raises(ValueError, match="weights: expected shape"):
        pretrain(tiny(resume=True, epochs=2, image_size=32, allow_changes=True))


def test_a_loss_that_is_not_finite_is_rescued_and_ends_the_run(tiny, fake, monkeypatch):
    monkeypatch.setattr(fake, "bad_steps", (5,))
    config = tiny()
    with pytest.raises(
        NonFiniteLoss, match=r"got a non-finite step 5; .*rescue_step_00000005; try --clip_grad 1, or a lower"
    ):
        pretrain(config)
    assert fake.made[-1].is_closed
    assert [entry.name for entry in (config.run_path / "checkpoints").iterdir()] == ["rescue_step_00000005"]
    assert [record["step"] for record in lines(config)] == [1, 2, 4]
    assert not (config.run_path / "summary.json").exists()


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny, fake, monkeypatch):
    monkeypatch.setattr(fake, "bad_steps", (3, 7, 8, 9, 10))
    config = tiny(nonfinite="skip", max_skipped=4, pictures=2)
    assert pretrain(config)["steps"] == 12
    records = {record["step"]: record for record in lines(config)}
    assert {step: record.get("skipped", 0) for step, record in records.items()} == {
        **{1: 0, 2: 0, 4: 1, 6: 0, 8: 2, 10: 2, 12: 0}
    }
    assert records[8]["loss"] is records[8]["grad_norm"] is records[8]["loss_thrown"] is None  # mean of no steps
    assert records[4]["loss"] > records[12]["loss"]
    assert (config.run_path / "loss.png").exists()


def test_too_many_in_a_row_end_the_run(tiny, fake, monkeypatch):
    monkeypatch.setattr(fake, "bad_steps", (3, 7, 8, 9, 10, 11))
    config = tiny(nonfinite="skip", max_skipped=3)
    message = (
        r"loss: expected a finite .*, got 4 non-finite steps in a row up to step 10 \(max_skipped is 3\); "
        r"the last finite weights are in .*rescue_step_00000010; try"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        pretrain(config)
    assert lines(config)[-1]["step"] == 8


def test_skipped_steps_are_counted_across_a_crash(tiny, fake, crash, monkeypatch, tmp_path):
    monkeypatch.setattr(fake, "bad_steps", (9, 12, 13))
    options = {"epochs": 2, "checkpoint_every": 1, "nonfinite": "skip", "log_every": 8}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    config = tiny(**options)
    crash(config, 15)
    pretrain(replace(config, resume=True))
    assert untimed(config) == untimed(whole)
    assert [line.get("skipped") for line in lines(whole)] == [None, None, 3, None]


def test_whoever_goes_on_after_a_rescue_was_told_already(tiny, fake, monkeypatch):
    """The checkpoint of step 12 lies between the non-finite step and its reading."""
    monkeypatch.setattr(fake, "bad_steps", (11,))
    config = tiny(epochs=3, checkpoint_every=1, log_every=8)
    with pytest.raises(NonFiniteLoss, match="got a non-finite step 11; "):
        pretrain(config)
    config = replace(config, resume=True, clip_grad=1.0)
    assert pretrain(config)["steps"] == 36
    assert [line.get("skipped") for line in lines(config)] == [None, None, 1, None, None, None]


def test_a_step_that_is_not_finite_ends_a_run_that_skipped_others_before(tiny, fake, crash, monkeypatch):
    config = tiny(epochs=2, checkpoint_every=1, nonfinite="skip")
    monkeypatch.setattr(fake, "bad_steps", (3, 20))
    crash(config, 15)
    with pytest.raises(NonFiniteLoss, match=r"got non-finite steps up to step 20: 1; .*rescue_step_00000020"):
        pretrain(replace(config, resume=True, nonfinite="stop"))


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tiny, fake, monkeypatch):
    config = tiny(epochs=2, checkpoint_every=1)
    take = fake.train_step

    def train_step(self, images, sample):
        take(self, images, sample)
        if self.step == 20:
            patch.setattr(fake, "save_error", OSError(errno.ENOSPC, "No space left on device"))

    message = r"step_00000024: .*No space left on device; the last good one is .*step_00000012"
    with monkeypatch.context() as patch:
        patch.setattr(fake, "train_step", train_step)
        with pytest.raises(OSError, match=message):
            pretrain(config)
    assert [entry.name for entry in (config.run_path / "checkpoints").iterdir()] == ["step_00000012"]
    assert pretrain(tiny(epochs=2, checkpoint_every=1, resume=True))["steps"] == 24


def test_initial_weights_are_taken(tiny, tmp_path):
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
        (
            {"method": "mae", "extra_cells": "decoded"},
            ["loss", "loss_decoded", "loss_thrown", "loss_cells"],
            "reconstructions.png",
        ),
        ({"method": "maskalign"}, ["loss", "loss_visible", "loss_thrown"], "similarity.png"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_each_method_logs_and_draws_what_is_its_own(changes, losses, picture, tiny, teacher, capsys):
    if changes["method"] == "maskalign":
        changes = {**changes, "teacher": str(teacher), "teacher_layers": 2, "fusion": "sum"}
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
    assert fake.made[0].training.decay == "step"


def test_a_part_that_is_not_supervised_is_not_told():
    assert loss_text({"loss": 0.5, "loss_decoded": 0.5, "loss_thrown": 0.0}) == "loss 0.5000 (decoded 0.5000)"
    assert loss_text({"step": 3, "loss": 0.5}) == "loss 0.5000"
    assert loss_text({"loss": None, "loss_thrown": None}) == "no finite loss"


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
    """End to end: real process, real signal, exit code, and printed command."""
    shutil.copy(HERE / "fake_engine.py", tmp_path / "prmim_fake.py")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PRMIM_FAKE_DELAY": "0.05"}
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
    assert "Resume with: prmim pretrain --out run --resume" in err
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
    assert duration(seconds) == text

"""Full disks, read-only and deleted folders, images that vanish."""

import ctypes
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from prmim_train.cli.commands import main
from prmim_train.pretrain import pretrain

EPOCHS = 7  # as in conftest.py

# Program of a child process: does something in the middle of a run, after step `step`.
HURT = """
import ctypes, os, resource, sys
from pathlib import Path
from prmim_train.cli.commands import main
import prmim_{backend} as package

take = package.Engine.train_step

def train_step(self, images, sample):
    if self.step == {step}:
        {deed}
    take(self, images, sample)

{before}
package.Engine.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
# Drops the capabilities by which root ignores file permissions.
OBEY = 'os.geteuid() or ctypes.CDLL(None).capset(b"\\x22\\x05\\x08\\x20" + bytes(4), bytes(24))'

needs_rights = pytest.mark.skipif(
    os.name == "nt" or (os.geteuid() == 0 and not hasattr(ctypes.CDLL(None), "capset")),
    reason="root's capabilities cannot be dropped here",
)


@pytest.fixture
def hurt(soak, undisturbed, tmp_path):
    """Return functions that run with a disturbance, and that resume and compare."""

    def start(backend, step, deed="pass", before="pass"):
        folder, _, _ = undisturbed(backend)
        _, _, *words = soak.command(backend, tmp_path / "run", EPOCHS)
        code = HURT.format(backend=backend, step=step, deed=deed, before=before)
        # A pipe: where files may not grow, its output still can.
        os.mkfifo(tmp_path / "output")
        output = os.open(tmp_path / "output", os.O_RDONLY | os.O_NONBLOCK)
        process = soak.launch(["-c", code, *words], soak.environment(folder / "programs"), tmp_path / "output")
        code, said = process.wait(300), os.read(output, 65536).decode()
        os.close(output)
        return code, said

    def go_on(backend):
        folder, run, _ = undisturbed(backend)
        process = soak.Process(backend, tmp_path / "run", tmp_path / "log", folder / "programs", EPOCHS, 1)
        process.until(process.is_over)
        assert process.has_succeeded(), process.tail()
        soak.compare(run, tmp_path / "run")

    return start, go_on


def told(output):
    """Return the error line of a command."""
    (line,) = (line for line in output.splitlines() if line.startswith("prmim: error: "))
    assert "Traceback" not in output
    return line


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_disk_that_is_full_when_a_checkpoint_is_written(backend, hurt, tmp_path, soak):
    start, go_on = hurt
    code, output = start(backend, 10, LIMIT.format(bytes=16_384))
    assert code == 1
    line = told(output)
    # The checkpoint of step 8 may still be pending.
    failed = re.search(r"checkpoint: could not write \S*/step_0{6}(08|12): ", line)
    assert failed, line
    assert "too large" in line.lower()
    assert line.endswith(f"the last good one is {tmp_path / 'run' / 'checkpoints'}/step_{int(failed[1]) - 4:08d}")
    assert soak.leftovers(tmp_path / "run") == []
    go_on(backend)


def test_a_disk_that_is_full_in_the_middle_of_a_line(hurt, tmp_path):
    start, go_on = hurt
    metrics = tmp_path / "run" / "metrics.jsonl"
    code, output = start("torch", 2, LIMIT.format(bytes=f"Path({str(metrics)!r}).stat().st_size + 100"))
    assert code == 1
    assert "File too large" in told(output)
    torn = metrics.read_text().splitlines()[-1]
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)
    go_on("torch")


@needs_rights
def test_a_run_directory_that_may_not_be_written_to(hurt, tmp_path):
    start, go_on = hurt
    (tmp_path / "run").mkdir(mode=0o555)
    code, output = start("torch", 0, before=OBEY)
    assert code == 2
    assert str(tmp_path / "run") in told(output)
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "run").chmod(0o755)
    go_on("torch")


@needs_rights
def test_a_folder_that_may_no_longer_be_written_to(hurt, tmp_path):
    start, go_on = hurt
    checkpoints = tmp_path / "run" / "checkpoints"
    code, output = start("torch", 10, f"Path({str(checkpoints)!r}).chmod(0o555)", before=OBEY)
    assert code == 1
    line = told(output)
    assert "Permission denied" in line
    assert re.search(rf"the last good one is {checkpoints}/step_0{{7}}[48]$", line), line
    checkpoints.chmod(0o755)
    go_on("torch")


def act_at(monkeypatch, fake, step, deed):
    """Do something after a step."""
    take = fake.train_step

    def train_step(self, *batch):
        if self.step == step:
            deed()
        take(self, *batch)

    monkeypatch.setattr(fake, "train_step", train_step)


@pytest.mark.parametrize("step", [3, 11])  # next, the run writes a line (3) or a checkpoint (11)
def test_a_run_directory_that_is_deleted_under_the_run(step, tiny, fake, monkeypatch):
    config = tiny(batch_size=240, checkpoint_every=1, epochs=3, log_every=3 if step == 3 else 100)
    with monkeypatch.context() as patch:
        act_at(patch, fake, step, lambda: shutil.rmtree(config.run_path))
        with pytest.raises(OSError, match="run"):
            pretrain(config)
    assert not config.run_path.exists()  # an incomplete run directory would be worse than none
    assert pretrain(config)["steps"] == 18


@pytest.fixture
def photos(tmp_path):
    """A folder of 200 small images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(200):
        Image.fromarray(draw.integers(0, 255, (20, 20), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_under_the_run(workers, photos, tiny, fake, monkeypatch, tmp_path):
    options = {"data": str(photos), "batch_size": 16, "epochs": 6, "workers": workers, "holdout": 0.2}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    config = tiny(**options)
    away = tmp_path / "away"
    with monkeypatch.context() as patch:
        act_at(patch, fake, 25, lambda: photos.rename(away))
        with pytest.raises((OSError, ValueError), match=r"more than 1 %|could not be read|cannot be read"):
            pretrain(config)
    away.rename(photos)
    pretrain(tiny(**options, resume=True))
    assert final_weights(config) == final_weights(whole)


# Checkpoints follow steps 10, 20 and 30; maps are computed after steps 14, 24 and 34. A run that ends in step 16
# computes its first maps again; one that ends in step 22 reads them.
@pytest.mark.parametrize("step", [16, 22])
def test_a_run_that_ends_between_two_passes_goes_on_with_the_same_attention_maps(
    step, tiny, fake, monkeypatch, tmp_path
):
    pixels = np.random.default_rng(0).integers(0, 256, (240, 16, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    options = {"data": str(tmp_path / "images.npz"), "batch_size": 40, "epochs": 8, "checkpoint_every": 2, "flip": True}
    options |= {"throwing": "weighted", "attention_start": 3, "attention_every": 2}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    config = tiny(**options)

    def fail():
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        act_at(patch, fake, step, fail)
        with pytest.raises(KeyError, match="killed"):
            pretrain(config)
    pretrain(tiny(**options, resume=True))
    assert final_weights(config) == final_weights(whole)
    for name in ("attention_00000024.npz", "attention_00000034.npz"):
        assert (config.run_path / name).read_bytes() == (whole.run_path / name).read_bytes()


def final_weights(config):
    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    return {name: array.tobytes() for name, array in load_file(latest / "weights.safetensors").items()}


def test_what_a_run_left_half_written_before_its_first_step_is_deleted(tiny_words, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".config.partial-01234567.yaml").write_text("epo")
    assert main(["pretrain", *tiny_words, "--resume"]) == 0
    assert [path.name for path in run.rglob("*") if ".partial" in path.name] == []

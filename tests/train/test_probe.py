"""Online probes of frozen features: logged and drawn, without effect on the run."""

import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from prmim_train.pretrain import pretrain
from prmim_train.report.pictures import draw_loss
from prmim_train.run.directory import RunDirectory
from prmim_train.run.log import loss_text
from prmim_train.run.loop import Interrupted

TIMES = ("images_per_second", "waiting", "seconds")
PROBES = ("probe_knn", "probe_linear")


def untimed(config, *others):
    """Return the metrics without time and other fields."""
    lines = RunDirectory(config.run_path).read_metrics()
    return [{name: value for name, value in line.items() if name not in (*TIMES, *others)} for line in lines]


def weights(config):
    return load_file(RunDirectory(config.run_path).checkpoints()[-1] / "weights.safetensors")


@pytest.fixture(params=["fake", "torch", "jax"])
def backend(request):
    if request.param != "fake":
        pytest.importorskip("flax" if request.param == "jax" else "torch")
        request.getfixturevalue({"torch": "one_thread", "jax": "quick_compiler"}[request.param])
    return request.param


def test_a_probe_is_logged_and_changes_nothing(backend, tiny, tmp_path):
    options = {"backend": backend, "epochs": 3, "batch_size": 240, "log_every": 6, "eval_limit": 200, "holdout": 0.2}
    plain = tiny(out=str(tmp_path / "plain"), **options)
    summary = pretrain(plain)
    probed = tiny(**options, probe_every=2)
    pretrain(probed)
    lines = untimed(probed)
    assert [line["step"] for line in lines if "probe_knn" in line] == [12, 18]  # 6 steps an epoch
    assert all(0 <= line[name] <= 1 for line in lines for name in PROBES if name in line)
    assert untimed(probed, *PROBES) == untimed(plain)
    assert lines[-1]["probe_knn"] == summary["evaluation"]["trained"]["knn"]
    assert lines[-1]["probe_linear"] == summary["evaluation"]["trained"]["linear"]
    expected = weights(plain)
    for name, value in weights(probed).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_probe_makes_a_line_of_its_own(tiny):
    config = tiny(epochs=2, log_every=7, eval_limit=100, probe_every=1)  # 12 steps an epoch
    pretrain(config)
    assert {line["step"]: "probe_linear" in line for line in untimed(config)} == {
        **dict.fromkeys((1, 7, 14, 21), False),
        **dict.fromkeys((12, 24), True),
    }


def test_the_time_of_a_probe_is_no_training_time(tiny, monkeypatch):
    monkeypatch.setattr("prmim_train.pretrain.probe_run", lambda *given: time.sleep(1) or {"probe_knn": 0.5})
    config = tiny(epochs=3, log_every=3, eval_limit=100, probe_every=1)
    summary = pretrain(config)
    assert summary["seconds"] < 3  # the three probes alone take 3
    assert summary["images_per_second"] > 36 * 120 / 3


def test_resuming_probes_at_the_same_steps(tiny, tmp_path, monkeypatch, fake):
    options = {"epochs": 3, "eval_limit": 100, "probe_every": 1}
    whole = tiny(out=str(tmp_path / "whole"), **options)
    pretrain(whole)
    take = fake.train_step

    def train_step(self, images, sample):
        if self.step + 1 == 17:
            signal.raise_signal(signal.SIGTERM)
        take(self, images, sample)

    with monkeypatch.context() as patch:
        patch.setattr(fake, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(tiny(**options))
    pretrain(tiny(**options, resume=True))
    assert untimed(tiny()) == untimed(whole)


def test_a_probe_that_cannot_be_is_refused(tiny, tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros((20, 16, 16), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"probe_every: expected labelled images, .* but the images have no labels"):
        pretrain(tiny(probe_every=1, eval_limit=10, data=str(tmp_path / "plain.npz")))
    with pytest.raises(ValueError, match="probe_every: expected null, since eval_limit is 0, got 1"):
        tiny(probe_every=1)
    assert not tiny().run_path.exists()


def test_probes_are_told_and_drawn(tmp_path):
    records = [{"step": step, "epoch": step / 2, "loss": 1 / step, "lr": 0.1} for step in range(1, 7)]
    draw_loss(tmp_path / "plain.png", records)
    records[3] |= {"probe_knn": 0.5, "probe_linear": 0.625}
    records[5] |= {"probe_knn": 0.75, "probe_linear": 0.875}
    draw_loss(tmp_path / "probed.png", records)
    assert (tmp_path / "probed.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert loss_text(records[3]) == "loss 0.2500, probe knn 50.0 %, probe linear 62.5 %"

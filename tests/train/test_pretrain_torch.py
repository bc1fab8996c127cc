"""The whole way on PyTorch: the packaged recipe made small, resumed, evaluated, drawn."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prmim_train.cli import main  # noqa: E402
from prmim_train.loop import Interrupted, pretrain  # noqa: E402

SMALL = {"backend": "torch", "epochs": 1, "batch_size": 240}  # 6 steps


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(config):
    from safetensors.numpy import load_file

    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    return load_file(latest / "weights.safetensors")


def test_a_run_trains_evaluates_and_draws(tiny):
    config = tiny(**SMALL | {"epochs": 4, "eval_limit": 500, "pictures": 2})
    summary = pretrain(config)
    records = [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    counts = config.counts
    for record in records:
        parts = counts.decoded * record["loss_decoded"] + counts.thrown * record["loss_thrown"]
        assert record["loss"] == pytest.approx(parts / counts.masked, rel=1e-4)
    assert summary["evaluation"]["trained"]["linear"] > 0.5
    assert summary["parameters"] == sum(
        value.size for name, value in weights(config).items() if "pos_embed" not in name
    )
    assert {p.name for p in config.run_path.glob("*.png")} == {"reconstructions.png", "schedule.png", "loss.png"}


@pytest.mark.parametrize("changes", [{}, {"throwing": "none"}, {"variant": "none"}, {"norm_pix": False}])
def test_stop_and_resume_gives_the_same_weights(tiny, tmp_path, monkeypatch, changes):
    import signal

    import prmim_torch

    whole = tiny(out=str(tmp_path / "whole"), **SMALL, **changes)
    pretrain(whole)
    config = tiny(**SMALL, **changes)
    take = prmim_torch.Engine.train_step

    def train_step(self, images, sample):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    with monkeypatch.context() as patch:
        patch.setattr(prmim_torch.Engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert pretrain(tiny(**SMALL, **changes, resume=True))["steps"] == 6
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value, err_msg=name)


def test_resuming_another_model_is_told_in_one_line(tiny, capsys):
    config = tiny(**SMALL)
    pretrain(config)
    words = ["pretrain", "--out", str(config.run_path), "--resume", "--epochs", "2", "--decoder_depth", "2"]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("prmim: error: ")
    assert line.count("\n") == 1
    assert "decoder_depth" in line


def test_inspect_counts_parameters_without_training(tiny_words, capsys, tmp_path):
    words = [*tiny_words, "--backend", "torch"]
    assert main(["inspect", *words]) == 0
    text = capsys.readouterr().out
    assert "encoder + decoder" in text
    assert "decoder sequence    9 (dense: 17)" in text
    assert list(tmp_path.iterdir()) == []


def test_the_ways_of_throwing_are_those_of_the_backend():
    from prmim_core.options import THROWING
    from prmim_train import config

    assert set(config.THROWING) == set(THROWING)


@pytest.mark.parametrize("variant", ["kernel", "interpolate", "conv"])
def test_the_engine_costs_what_inspect_says(tiny, variant):
    from prmim_train.engine import create_engine
    from prmim_train.inspect import cost_reports
    from prmim_train.prepare import open_data

    config = tiny(**SMALL, variant=variant)
    engine = create_engine(config, open_data(config).budget)
    assert engine.cost().macs == cost_reports(config)[0].macs
    assert engine.cost().activation_bytes == cost_reports(config)[0].activation_bytes


def test_this_package_does_not_import_torch_itself():
    import subprocess

    code = "import sys, prmim_train.config, prmim_train.engine, prmim_train.run_directory, prmim_train.evaluate; "
    code += "import prmim_train.pictures, prmim_train.inspect, prmim_train.loop; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"

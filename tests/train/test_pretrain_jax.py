"""The whole way on JAX: a small run, resumed, evaluated, drawn."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from prmim_train.cli import main  # noqa: E402
from prmim_train.loop import Interrupted, pretrain  # noqa: E402

SMALL = {"backend": "jax", "epochs": 1, "batch_size": 240}  # 6 steps


@pytest.fixture(autouse=True)
def quick_compiler():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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


def test_stop_and_resume_gives_the_same_weights(tiny, tmp_path, monkeypatch):
    import signal

    import prmim_jax

    whole = tiny(out=str(tmp_path / "whole"), **SMALL)
    pretrain(whole)
    config = tiny(**SMALL)
    take = prmim_jax.Engine.train_step

    def train_step(self, images, sample):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    with monkeypatch.context() as patch:
        patch.setattr(prmim_jax.Engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert pretrain(tiny(**SMALL, resume=True))["steps"] == 6
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value, err_msg=name)


def test_inspect_counts_parameters_without_training(tiny_words, capsys, tmp_path):
    words = [*tiny_words, "--backend", "jax"]
    assert main(["inspect", *words]) == 0
    text = capsys.readouterr().out
    assert "encoder + decoder" in text
    assert "decoder sequence    9 (dense: 17)" in text
    assert list(tmp_path.iterdir()) == []


def test_the_ways_of_throwing_are_those_of_the_backend():
    from prmim_core.options import THROWING
    from prmim_train import config

    assert set(config.THROWING) == set(THROWING)


def test_a_run_loads_no_torch(tiny_words):
    words = [
        *tiny_words,
        "--backend",
        "jax",
        "--epochs",
        "1",
        "--batch_size",
        "240",
        "--pictures",
        "2",
        "--eval_limit",
        "60",
    ]
    code = "import sys; from prmim_train.cli import main; code = main(sys.argv[1:]); "
    code += "print(code, *sorted({'torch', 'jax', 'prmim_torch'} & set(sys.modules)))"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", code, "pretrain", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.splitlines()[-1] == "0 jax"
    assert "Warning" not in result.stderr

"""Fixtures of the training tests: a backend in NumPy, and small runs on it."""

import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prmim_train.cli.commands import main
from prmim_train.config.layers import merge_layers, read_options
from prmim_train.config.pretrain import PretrainConfig, pretrain_config
from tests.train import fake_engine

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}

TINY = {
    "data": "digits",
    "channels": 1,
    "image_size": 16,
    "patch_size": 4,
    "crop_scale": (0.8, 1.0),
    "flip": False,
    "holdout": 0.2,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    **DECODER,
    "epochs": 1,
    "batch_size": 120,
    "base_learning_rate": 0.01,
    "precision": "float32",
    "backend": "fake",
    "device": "cpu",
    "log_every": 2,
    "eval_limit": 0,
    "pictures": 0,
}
"""1,438 training images and batches of 120: 12 steps an epoch."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of `tests/train/fake_engine.py`, registered as backend `fake`."""
    monkeypatch.setitem(sys.modules, "prmim_fake", fake_engine)
    yield fake_engine.Engine
    fake_engine.Engine.made.clear()


@pytest.fixture
def tiny(fake: Any, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Make a configuration of 12 steps in `tmp_path / "run"`, with some changes."""

    def make(**changes: Any) -> PretrainConfig:
        options = {**TINY, "out": str(tmp_path / "run")}
        if changes.get("method", "mae") != "mae":
            options = {name: value for name, value in options.items() if name not in DECODER}
        return pretrain_config(**{**options, **changes})

    return make


@pytest.fixture
def tiny_recipe() -> Callable[..., PretrainConfig]:
    """Return a function from a recipe's name to a small version of it.

    Some options can be changed.
    """

    def make(name: str, **changes: Any) -> PretrainConfig:
        recipe = read_options(name)
        size = 4 * 4 * recipe.get("mask_unit", 1) if recipe["method"] == "mae" else 16  # units of 4 x 4 tokens
        tiny = {"image_size": size, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "channels": 3}
        if recipe["method"] == "videomae":
            tiny |= {"image_size": (4, 16, 16), "patch_size": (1, 4, 4)}
        tiny |= {name: size for name, size in DECODER.items() if name in recipe}
        if recipe.get("volumes"):
            tiny |= {"image_size": (16, 16, 16), "patch_size": (4, 4, 4), "embed_dim": 24, "decoder_dim": 12}
        # The lowest rate of a recipe can be higher than the peak rate of so small a batch.
        tiny |= {"batch_size": 32, "min_learning_rate": 0.0, "precision": "float32", "device": "cpu"}
        return pretrain_config(**merge_layers(recipe, {**tiny, **changes}))

    return make


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Folder of a teacher without weights; only engines need weights."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
    config = {"model_type": "clip_vision_model", "patch_size": 8, "image_size": 32, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tiny_words(fake: Any, tmp_path: Path) -> list[str]:
    """The same options as words of the command line."""
    words = []
    for name, value in {**TINY, "out": str(tmp_path / "run")}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name}", text]
    return words


@pytest.fixture(params=["torch", "jax"])
def backend(request: pytest.FixtureRequest, quick_compiler: None) -> str:
    """Return the name of each real backend in turn."""
    pytest.importorskip("flax" if request.param == "jax" else "torch")
    return str(request.param)


@pytest.fixture
def stop_and_resume(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], Path], None]:
    """Return a function that starts a run with some words, stops it after two steps, and resumes it."""
    engine = importlib.import_module(f"prmim_{backend}").Engine
    take = engine.train_step

    def train_step(self: Any, images: Any, sample: Any) -> None:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    def run(words: list[str], out: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "train_step", train_step)
            assert main([*words, "--out", str(out)]) == 128 + signal.SIGINT
        assert main(["pretrain", "--out", str(out), "--resume"]) == 0

    return run


@pytest.fixture
def assert_same_weights() -> Callable[[Path, Path], None]:
    """Return a function that compares the last checkpoints of two runs."""
    from safetensors.numpy import load_file

    def check(run: Path, other: Path) -> None:
        found, expected = (
            load_file(sorted((folder / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")
            for folder in (run, other)
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)

    return check

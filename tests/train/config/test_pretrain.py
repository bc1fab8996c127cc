"""Pre-training options: trainer options, flat lists, one message per error."""

import re

import pytest
import yaml

from prmim_methods import METHODS, MAEConfig, SimMIMConfig, create_config
from prmim_methods.record import options
from prmim_train.cli.commands import main
from prmim_train.config.axes import ThreeAxes
from prmim_train.config.classify import ClassifyConfig
from prmim_train.config.pretrain import (
    PretrainConfig,
    change,
    pretrain_config,
    pretrain_option_names,
    special_option_names,
)

BASE = {
    "mae": {},
    "simmim": {"method": "simmim"},
    "maskalign": {"method": "maskalign", "teacher": "owner/model"},
    "localmim": {"method": "localmim"},
    "videomae": {"method": "videomae", "patch_size": 16},
}
RISING = "two ascending numbers in (0, 1]"
WRONG = [
    ({"data": ""}, ValueError, "data: expected text, got ''"),
    ({"crop_scale": (0.5, 0.2)}, ValueError, f"crop_scale: expected {RISING}, got (0.5, 0.2)"),
    ({"crop_scale": (0.0, 1.0)}, ValueError, f"crop_scale: expected {RISING}, got (0.0, 1.0)"),
    ({"crop_scale": 0.5}, TypeError, f"crop_scale: expected {RISING}, got 0.5"),
    ({"crop_ratio": (0, 1)}, ValueError, "crop_ratio: expected two ascending numbers above 0, got (0, 1)"),
    ({"flip": "yes"}, TypeError, "flip: expected true or false, got 'yes'"),
    ({"holdout": 1.0}, ValueError, "holdout: expected a number in [0, 1), got 1.0"),
    ({"workers": -1}, ValueError, "workers: expected a whole number in [0, 1024], got -1"),
    ({"image_size": (224,), "patch_size": (16,)}, ValueError,
     "image_size: expected one number, height,width or frames,height,width, got (224,)"),
    ({"epochs": True}, TypeError, "epochs: expected a whole number of at least 1, got True"),
    ({"epochs": 1.5}, TypeError, "epochs: expected a whole number of at least 1, got 1.5"),
    ({"epochs": 0}, ValueError, "epochs: expected a whole number of at least 1, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size: expected a whole number of at least 1, got 0"),
    ({"batch_size": 10, "accumulate": 3}, ValueError, "batch_size: expected a multiple of accumulate 3, got 10"),
    ({"base_learning_rate": float("inf")}, ValueError, "base_learning_rate: expected a number above 0, got inf"),
    ({"min_learning_rate": 1.0}, ValueError,
     "min_learning_rate: expected at most the peak learning rate 0.0024, got 1"),
    ({"warmup_epochs": -1}, ValueError, "warmup_epochs: expected a number of at least 0, or null, got -1"),
    ({"warmup_epochs": 800}, ValueError, "warmup_epochs: expected fewer than the 800 epochs, got 800"),
    ({"decay": "linear"}, ValueError, "decay: expected one of cosine, whole_cosine, step, got 'linear'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of stop, skip, got 'ignore'"),
    ({"max_skipped": -1}, ValueError, "max_skipped: expected a whole number of at least 0, got -1"),
    ({"device": "gpu7"}, ValueError, "device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu7'"),
    ({"seed": -1}, ValueError, "seed: expected a whole number in [0, 2147483647], got -1"),
    ({"backend": ""}, ValueError, "backend: expected text, got ''"),
    ({"out": 3}, TypeError, "out: expected text, or null, got 3"),
    ({"resume": None}, TypeError, "resume: expected true or false, got None"),
    ({"log_every": 0}, ValueError, "log_every: expected a whole number of at least 1, got 0"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected a whole number of at least 1, got 0"),
    ({"checkpoint_minutes": 0}, ValueError, "checkpoint_minutes: expected a number above 0, or null, got 0"),
    ({"checkpoint_minutes": "ten"}, TypeError, "checkpoint_minutes: expected a number above 0, or null, got 'ten'"),
    ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints: expected a whole number of at least 1, got 0"),
    ({"tracker": "comet"}, ValueError, "tracker: expected one of none, tensorboard, wandb, mlflow, got 'comet'"),
    ({"init_weights": ""}, ValueError, "init_weights: expected text, or null, got ''"),
    ({"eval_limit": -1}, ValueError, "eval_limit: expected a whole number of at least 0, got -1"),
    ({"probe_every": 0}, ValueError, "probe_every: expected a whole number of at least 1, or null, got 0"),
    ({"probe_every": 2, "eval_limit": 0}, ValueError, "probe_every: expected null, since eval_limit is 0, got 2"),
    ({"pictures": -1}, ValueError, "pictures: expected a whole number in [0, 1000], got -1"),
    ({"scan_blocks": True}, ValueError, "scan_blocks: backend torch has no such option, only jax"),
    ({"scale_learning_rate": True, "method": "maskalign", "teacher": "owner/model"}, ValueError,
     "scale_learning_rate: method maskalign has no such option"),
    ({"scale_learning_rate": True, "reconstruction": "none", "min_learning_rate": 1e-3}, ValueError,
     "min_learning_rate: expected at most the peak learning rate 0.0008, got 0.001"),
    ({"throw_by": "unit"}, ValueError, "throw_by: method mae has no such option"),
    ({"method": "simclr"}, ValueError, f"method: expected one of {', '.join(METHODS)}, got 'simclr'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, 1),
        ({"throw_ratio": 0}, 1),
        ({"reconstruction": "none"}, 49 / 147),
        ({"thrown_weight": 0, "extra_cells": "known"}, 49 / 147),
        ({"reconstruction": "none", "throw_ratio": 0.25}, 98 / 147),
        ({"method": "simmim", "reconstruction": "none"}, 71 / 120),
        ({"reconstruction": "none", "scale_learning_rate": False}, 1),
    ],
    ids=str,
)
def test_the_learning_rate_follows_the_supervised_tokens(given, factor):
    """CrossMAE: 8e-4 if a third of the masked tokens is supervised."""
    config = pretrain_config(**{"scale_learning_rate": True, "min_learning_rate": 7e-4, **given})
    assert config.learning_rate == pytest.approx(factor * 2.4e-3, rel=1e-12)
    assert pretrain_config(**config.flat()) == config


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[str(given) for given, _, _ in WRONG])
def test_wrong_options(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pretrain_config(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio: expected a number in (0, 1), got 1.5"),
        ({"throw_ratio": 0.8}, "throw_ratio: expected at most mask_ratio 0.75, got 0.8"),
        ({"thrown_target": "none"}, "thrown_target: expected one of cells, patch, got 'none'"),
        ({"mask_ratio": "half"}, "mask_ratio: expected a number in (0, 1), got 'half'"),
        ({"depth": "deep"}, "depth: expected a whole number of at least 1, or null, got 'deep'"),
        ({"throw_by": "unit"}, "throw_by: method mae has no such option"),
        ({"method": "beit"}, f"method: expected one of {', '.join(METHODS)}, got 'beit'"),
    ],
    ids=str,
)
def test_a_wrong_value_gives_one_message_wherever_it_is_given(given, message, tmp_path, capsys):
    matches = f"^{re.escape(message)}$"
    with pytest.raises((ValueError, TypeError), match=matches):
        create_config(given.get("method", "mae"), **{name: value for name, value in given.items() if name != "method"})
    with pytest.raises((ValueError, TypeError), match=matches):
        pretrain_config(**given)
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(given))
    line = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    for words in (["--config", str(tmp_path / "options.yaml")], line):
        assert main(["inspect", "--data", "photos", *words]) == 2
        assert capsys.readouterr().err == f"prmim: error: {message}\n"


def test_the_defaults_are_the_published_recipe():
    config = pretrain_config()
    assert config.learning_rate == pytest.approx(2.4e-3)
    assert config.method == MAEConfig()
    assert config == PretrainConfig()


def test_the_seed_also_seeds_the_weights():
    assert pretrain_config(seed=7).method == MAEConfig(init_seed=7)
    assert pretrain_config(method="simmim", seed=7, drop_path=0).method == SimMIMConfig(init_seed=7, drop_path=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_flat_list_has_every_option_and_restores_the_configuration(method):
    config = pretrain_config(**BASE[method], seed=3, image_size=(64, 96), depth=2, mean=(0.1, 0.2, 0.3), epochs=5)
    flat = config.flat()
    own = {item.name for record in (PretrainConfig, METHODS[method]) for item in options(record)}
    assert set(flat) == {"method", *own} - {"init_seed"}
    assert (flat["method"], flat["image_size"], flat["epochs"]) == (method, (64, 96), 5)
    assert pretrain_config(**flat) == config


def test_changes_are_flat_and_validated():
    config = pretrain_config(method="simmim", epochs=5)
    changed = change(config, mask_ratio=0.5, seed=3, out="here")
    assert (changed.method.mask_ratio, changed.method.init_seed, changed.out, changed.epochs) == (0.5, 3, "here", 5)
    assert change(changed, mask_ratio=0.6, seed=0, out=None) == config
    with pytest.raises(ValueError, match=r"^throw_ratio: expected at most mask_ratio 0.2, got 0.25$"):
        change(config, mask_ratio=0.2)


def test_names_of_method_options():
    names, special = pretrain_option_names(), special_option_names()
    shared = names - special
    assert {"model", "image_size", "channels", "reconstruction", "stages", "thrown_weight", "data", "epochs"} <= shared
    assert {"mask_ratio", "throw_ratio", "throwing", "norm_pix", "mask_unit", "teacher", "drop_path"} <= special
    of_methods = {item.name for record in METHODS.values() for item in options(record)} - {"init_seed"}
    assert names == {"method", *of_methods, *(item.name for item in options(PretrainConfig))}


def test_blocks_are_scanned_by_jax_only():
    assert pretrain_config(backend="jax", scan_blocks=True).method.scan_blocks


def test_a_run_needs_the_import_path_of_a_function():
    for name in ("throwing", "reconstruction"):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected an import path, package\.module:function, got <built-in"
        ):
            pretrain_config(**{name: len})


def test_the_run_folder_is_named_after_method_and_data():
    assert pretrain_config().run_path.as_posix() == "runs/mae-digits"
    assert pretrain_config(data="/data/my photos/", method="simmim").run_path.as_posix() == "runs/simmim-my-photos"
    assert pretrain_config(data="x.npz", out="here").run_path.as_posix() == "here"


def test_a_folder_in_the_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(pretrain_config(out="~/runs/a").run_path) == "/home/me/runs/a"
    assert str(ClassifyConfig(out="~/runs/b").run_path) == "/home/me/runs/b"
    assert str(pretrain_config(out="~nobody-of-this-name/a").run_path) == "~nobody-of-this-name/a"


def test_clips_have_frames():
    assert pretrain_config(image_size=(32, 96), patch_size=(8, 16)).three_axes is None
    sizes = {"image_size": (4, 32, 96), "patch_size": (2, 8, 16), "decoder_dim": 96, "decoder_heads": 4}
    assert pretrain_config(**sizes).three_axes == ThreeAxes(4)
    config = pretrain_config(**sizes, volumes=True, spacing=(5, 1, 1))
    assert config.three_axes == ThreeAxes(4, volumes=True, spacing=(5, 1, 1))
    assert pretrain_config(**config.flat()) == config


def test_attention_maps_are_computed_before_the_last_epoch():
    with pytest.raises(ValueError, match="attention_start: expected fewer than the 5 epochs, got 41"):
        pretrain_config(throwing="weighted", epochs=5)
    with pytest.raises(ValueError, match="crop_padding: expected null with throwing weighted, got 4"):
        pretrain_config(throwing="weighted", crop_padding=4)
    with pytest.raises(ValueError, match="throwing: expected another choice than weighted for images of 3 axes"):
        pretrain_config(throwing="weighted", image_size=(4, 32, 96), patch_size=(2, 8, 16), decoder_dim=96)
    assert pretrain_config(epochs=5).attention_passes == 0
    # Published: after the epochs 40, 80, ..., 360 of 400, counted from 0.
    assert pretrain_config(throwing="weighted", epochs=400).attention_passes == 9

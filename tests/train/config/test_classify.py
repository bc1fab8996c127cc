"""Classifier options: published recipes, inheritance, wrong options."""

import re

import pytest
import yaml

from prmim_methods.record import options
from prmim_train.cli.options import classify_options
from prmim_train.config.classify import (
    DIGITS_RECIPES,
    FOREIGN,
    INHERITED,
    RECIPES,
    ClassifyConfig,
    classify_config,
    protocol_defaults,
)
from prmim_train.config.layers import dump_options, parse_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import read_run_config


def test_the_published_recipe_of_fine_tuning_is_the_default():
    base = pretrain_config(data="photos", flip=False, seed=7, precision="float32")
    config = classify_config(base, {"protocol": "finetune"})
    assert (config.epochs, config.batch_size, config.base_learning_rate, config.layer_decay) == (100, 1024, 5e-4, 0.65)
    assert (config.learning_rate, config.min_learning_rate) == (2e-3, 1e-6)
    assert (config.mixup, config.cutmix, config.mix_switch, config.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (config.rand_augment, config.rand_augment_operations, config.rand_augment_spread) == (9.0, 2, 0.5)
    assert (config.erasing, config.crop_scale, config.crop_ratio) == (0.25, (0.08, 1.0), (0.75, 4 / 3))
    assert (config.warmup, config.drop_path, config.betas, config.weight_decay) == (5, 0.1, (0.9, 0.999), 0.05)
    assert (config.clip_grad, config.ema_decay, config.pool) == (None, None, "mean")
    assert config.test_share((224, 224)) == 224 / 256
    assert (config.flip, config.seed, config.precision) == (False, 7, "float32")  # as in the run


def test_the_recipe_of_fine_tuning_repeats_the_defaults():
    config = ClassifyConfig(**{"protocol": "finetune", **protocol_defaults("finetune")})
    different = {name for name, value in config.flat().items() if value != ClassifyConfig().flat()[name]}
    assert different == {"holdout", "warmup_epochs"}
    assert config.warmup == ClassifyConfig().warmup


@pytest.mark.parametrize(
    ("size", "share"), [((16, 16), 0.875), ((224, 224), 0.875), ((224, 225), 1.0), ((384, 384), 1.0)]
)
def test_large_test_images_are_not_cropped(size, share):
    assert ClassifyConfig().test_share(size) == share
    assert ClassifyConfig(test_crop=0.5).test_share(size) == 0.5


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"protocol": "finetune"}, 5),
        ({"protocol": "finetune", "epochs": 200}, 5),
        ({"protocol": "finetune", "epochs": 50}, 2.5),
        ({"protocol": "finetune", "epochs": 50, "warmup_epochs": 5.0}, 5),
        ({"protocol": "finetune", "warmup_epochs": None, "epochs": 200}, 10),
        ({"protocol": "linear", "epochs": 9}, 1),
        ({"protocol": "linear", "data": "digits"}, 30 / 9),
    ],
    ids=str,
)
def test_shorter_trainings_warm_up_for_a_share(given, warmup):
    assert classify_config(pretrain_config(data="photos"), given).warmup == pytest.approx(warmup)


def test_the_run_overrides_the_recipe_in_its_own_options():
    base = pretrain_config(data="photos", holdout=0.3, flip=False)
    config = classify_config(base, {"protocol": "finetune"})
    assert (config.holdout, config.flip) == (0.3, False)  # the recipe: 0, true


def test_the_published_recipe_of_the_linear_probe():
    probe = classify_config(pretrain_config(data="photos"), {"protocol": "linear"})
    assert (probe.epochs, probe.warmup, probe.base_learning_rate, probe.weight_decay) == (90, 10, 0.1, 0.0)
    assert (probe.mixup, probe.cutmix, probe.label_smoothing, probe.rand_augment, probe.erasing) == (0,) * 5
    assert (probe.momentum, probe.trust, probe.min_learning_rate) == (0.9, 0.001, 0)
    assert (probe.pool, probe.batch_size, probe.learning_rate) == ("cls", 16384, pytest.approx(6.4))
    assert (probe.crop_draw, probe.batch_norm) == ("clamp", "device")
    assert classify_config(pretrain_config(data="photos"), {"protocol": "finetune"}).crop_draw == "retry"
    smaller = classify_config(pretrain_config(data="photos"), {"protocol": "linear", "batch_size": 4096})
    assert smaller.learning_rate == pytest.approx(1.6)


@pytest.mark.parametrize("protocol", RECIPES)
def test_given_options_override_those_of_the_run(protocol):
    base = pretrain_config(data="photos", backend="jax", seed=3, workers=2)
    config = classify_config(base, {"protocol": protocol})
    for name in INHERITED:
        assert getattr(config, name) == getattr(base, name)
    assert config.run_path == base.run_path / protocol
    given = {"seed": 1, "backend": "torch", "batch_size": 8, "epochs": 2, "data": "others", "out": "somewhere"}
    config = classify_config(base, {"protocol": protocol, **given})
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(("data", "key"), [("photos", "kind"), ("./photos/", "kind"), ("others", None)])
def test_keys_hold_for_the_data_of_the_run_under_any_path(data, key, tmp_path):
    base = pretrain_config(data="photos", label_key="kind", out=str(tmp_path))
    assert classify_config(base, {"protocol": "linear", "data": data}).label_key == key
    run = RunDirectory(tmp_path)
    run.write_config(dump_options(base))
    assert read_run_config(run, data=data).label_key == key


@pytest.mark.parametrize("protocol", RECIPES)
def test_the_digits_have_their_own_recipes(protocol):
    digits = classify_config(pretrain_config(data="digits"), {"protocol": protocol})
    for name, value in DIGITS_RECIPES[protocol].items():
        assert getattr(digits, name) == value
    assert digits.batch_size == 64
    # The images that are classified count, not those of the run.
    assert classify_config(pretrain_config(data="digits"), {"protocol": protocol, "data": "photos"}).batch_size > 1000
    assert classify_config(pretrain_config(data="photos"), {"protocol": protocol, "data": "digits"}).batch_size == 64


@pytest.mark.parametrize(("protocol", "name"), [(protocol, name) for protocol in FOREIGN for name in FOREIGN[protocol]])
def test_options_without_effect_are_refused(protocol, name):
    value = {"betas": (0.5, 0.5), "batch_norm": "all"}.get(name, 0.123)
    with pytest.raises(ValueError, match=f"^{name}: protocol {protocol} has no such option$"):
        ClassifyConfig(protocol=protocol, **{name: value})


WRONG = [
    ({"rand_augment": 11.0}, "rand_augment: expected a number in [0, 10], got 11.0"),
    ({"rand_augment_operations": 0}, "rand_augment_operations: expected a whole number in [1, 100], got 0"),
    ({"rand_augment_spread": -1.0}, "rand_augment_spread: expected a number of at least 0, got -1.0"),
    ({"erasing": 1.5}, "erasing: expected a number in [0, 1], got 1.5"),
    ({"mixup": float("nan")}, "mixup: expected a number of at least 0, got nan"),
    ({"cutmix": -1.0}, "cutmix: expected a number of at least 0, got -1.0"),
    ({"mix_switch": 2.0}, "mix_switch: expected a number in [0, 1], got 2.0"),
    ({"label_smoothing": 1.0}, "label_smoothing: expected a number in [0, 1), got 1.0"),
    ({"test_data": ""}, "test_data: expected text, or null, got ''"),
    ({"test_crop": 0.0}, "test_crop: expected a number in (0, 1], or null, got 0.0"),
    ({"test_every": 0}, "test_every: expected a whole number of at least 1, got 0"),
    ({"checkpoint": -1}, "checkpoint: expected a whole number of at least 0, or null, got -1"),
    # Options with defaults of their own, or with conditions, in each record that this one inherits from.
    ({"crop_scale": (0.0, 1.0)}, "crop_scale: expected two ascending numbers in (0, 1], got (0.0, 1.0)"),
    ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
    ({"batch_size": 10, "accumulate": 3}, "batch_size: expected a multiple of accumulate 3, got 10"),
    ({"min_learning_rate": 1.0}, "min_learning_rate: expected at most the peak learning rate 0.002, got 1"),
    ({"warmup_epochs": 100.0}, "warmup_epochs: expected fewer than the 100 epochs, got 100"),
    ({"betas": (1.0, 0.9)}, "betas: expected two numbers in [0, 1), got (1.0, 0.9)"),
    ({"precision": "float16"}, "precision: expected one of auto, float32, bfloat16, got 'float16'"),
    ({"device": "tpu"}, "device: expected auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
    ({"protocol": "knn"}, "protocol: expected one of finetune, linear, got 'knn'"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[str(given) for given, _ in WRONG])
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ClassifyConfig(**given)


def test_a_wrong_protocol_is_named_first():
    with pytest.raises(ValueError, match=r"^protocol: expected one of finetune, linear, got 'knn'$"):
        classify_config(pretrain_config(), {"protocol": "knn", "epochs": 0})


@pytest.mark.parametrize("protocol", RECIPES)
def test_options_survive_their_file(protocol):
    config = classify_config(pretrain_config(data="photos"), {"protocol": protocol, "mixup": 0.3, "checkpoint": 7})
    text = dump_options(config)
    assert ClassifyConfig(**parse_options(text, "copy"), out=config.out) == config
    assert set(yaml.safe_load(text)) & {"out", "resume", "allow_changes", *FOREIGN[protocol]} == set()


def test_the_command_line_has_every_option():
    found = [item for items in classify_options().values() for item in items]
    assert sorted(item.name for item in found) == sorted({item.name for item in options(ClassifyConfig)} - {"protocol"})
    named = {item.name: item for item in found}
    assert named["betas"].help == "Decay rates of AdamW. For finetune only."
    assert named["momentum"].help == "Momentum of LARS. For linear only."
    assert named["batch_norm"].help.endswith("so that their number has no effect). For linear only.")
    assert named["crop_draw"].help.endswith("as in MAE's linear probe). Default for linear: clamp.")
    assert named["epochs"].help == "Passes through the training images. Default for linear: 90."
    assert named["warmup_epochs"].help.endswith(" Default for finetune: 5.0, for linear: 10.0.")
    assert (
        named["flip"].help
        == "Mirror half of the crops left to right; for volumes, half along each axis. Not given: as in the run."
    )
    assert named["flip"].is_flag
    assert named["out"].help == "Folder of the classifier. Null: a subfolder of the run, named after the protocol."

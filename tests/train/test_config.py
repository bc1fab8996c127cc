import dataclasses

import pytest

from prmim_core.cost import VIT_SIZES
from prmim_train.config import (
    PretrainConfig,
    dump_options,
    merge_layers,
    parse_options,
    read_options,
    recipe_names,
    training_budget,
)

WRONG = [
    ({"throw_ratio": 0.8}, "throw_ratio: expected at most mask_ratio"),
    ({"throw_ratio": 1.0}, "throw_ratio: expected a number in"),
    ({"mask_ratio": 1.0}, "mask_ratio: expected a number in"),
    ({"mask_ratio": float("nan")}, "mask_ratio: expected a number in"),
    ({"mask_ratio": 0.0, "throw_ratio": 0.0}, "mask_ratio: expected a number in"),
    ({"mask_ratio": 0.9999}, "mask_ratio: 0.9999 leaves no visible token"),
    ({"image_size": 225}, "image_size: expected a multiple of the patch size 16x16, got 225x225"),
    ({"image_size": (224, 224, 224)}, "image_size: expected one number or height,width"),
    ({"patch_size": 0}, "patch_size: expected a whole number"),
    ({"channels": 0}, "channels: expected a whole number of at least 1, got 0"),
    ({"epochs": True}, "epochs: expected a whole number"),
    ({"epochs": 1.5}, "epochs: expected a whole number"),
    ({"batch_size": 10, "accumulate": 3}, "batch_size: expected a multiple of accumulate"),
    ({"precision": "float16"}, "precision: expected float32 or bfloat16, got 'float16'"),
    ({"throwing": "fps"}, "throwing: expected furthest or random or cell or none, got 'fps'"),
    ({"furthest_from": "hidden"}, "furthest_from: expected visible or none"),
    ({"variant": "linear"}, "variant: expected"),
    ({"method": "simclr"}, "method: expected mae"),
    ({"model": "resnet50"}, "model: expected vit_tiny or"),
    ({"embed_dim": 100, "num_heads": 3}, "embed_dim: expected a multiple of num_heads"),
    ({"decoder_dim": 100}, "decoder_dim: expected a multiple of decoder_heads"),
    ({"crop_scale": (0.5, 0.2)}, "crop_scale: expected two rising numbers above 0, at most 1"),
    ({"crop_scale": 0.5}, "crop_scale: expected two rising numbers"),
    ({"holdout": 1.0}, "holdout: expected a number in"),
    ({"mean": (0.5,)}, "mean: expected one number for each of the 3 channels"),
    ({"std": (0.5, 0.0, 0.5)}, "std: expected a number above 0"),
    ({"betas": (0.9, 1.0)}, "betas: expected a number in"),
    ({"warmup_epochs": 800}, "warmup_epochs: expected fewer than the 800 epochs"),
    ({"min_learning_rate": 1.0}, "min_learning_rate: expected at most the peak"),
    ({"base_learning_rate": float("inf")}, "base_learning_rate: expected a number above 0"),
    ({"seed": -1}, "seed: expected a whole number from 0"),
    ({"device": "gpu7"}, "device: expected auto or cpu or cuda"),
    ({"flip": "yes"}, "flip: expected true or false"),
    ({"data": ""}, "data: expected text"),
    ({"keep_checkpoints": 0}, "keep_checkpoints: expected a whole number of at least 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[next(iter(o)) + str(i) for i, (o, _) in enumerate(WRONG)])
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        PretrainConfig(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_published_recipe():
    config = PretrainConfig()
    assert config.learning_rate == pytest.approx(2.4e-3)
    assert (config.counts.visible, config.counts.decoded, config.counts.thrown) == (49, 49, 98)
    assert training_budget(config, 1_281_167).warmup_steps == round(40 * 1_281_167 / 4096)


def test_throwing_none_is_dense():
    config = PretrainConfig(throwing="none", mask_ratio=0.4)  # throw_ratio 0.5 would not fit
    assert (config.counts.decoded, config.counts.thrown) == (78 + 1, 0)
    assert config.method_options()["throwing"] == "none"


def test_sizes_may_be_rectangles():
    config = PretrainConfig(image_size=(32, 96), patch_size=(8, 16))
    assert config.grid.shape == (4, 6)
    assert config.method_options()["image_size"] == (32, 96)


def test_yaml_round_trip_keeps_every_option():
    config = PretrainConfig(data="photos", mean=(0.1, 0.2, 0.3), image_size=(32, 64), clip_grad=1.0, betas=(0.8, 0.9))
    read = parse_options(dump_options(config), "copy")
    assert set(read) == {field.name for field in dataclasses.fields(config)} - {"out", "resume"}
    assert PretrainConfig(**read) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_configuration(name):
    options = read_options(name)
    config = PretrainConfig(**options)
    for option, value in options.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(config, option) == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_what_one_must_know(name):
    from importlib import resources

    text = (resources.files("prmim_train") / "recipes" / f"{name}.yaml").read_text()
    head = text[: text.index("\n\n")] if name != "digits" else text
    for word in ("# paper", "# command", "# hardware"):
        assert word in head


def test_the_published_recipe_repeats_the_defaults():
    ours = PretrainConfig(**read_options("mae_vit_base"))
    different = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != f.default}
    # What the recipe sets for speed and size of the files, not for the result.
    assert different <= {"workers", "compile", "log_every", "checkpoint_every"}


def test_a_layer_that_names_a_model_drops_the_widths_below_it():
    merged = merge_layers(read_options("digits"), {"model": "vit_small"})
    assert PretrainConfig(**merged).encoder_size == VIT_SIZES["vit_small"]


def test_the_budget_counts_every_image():
    config = PretrainConfig(batch_size=64, epochs=3)
    assert training_budget(config, 100).total_steps == 5  # 300 / 64, rounded
    assert training_budget(config, 10).total_steps == 1  # a batch may be larger than the data
    with pytest.raises(ValueError, match="holdout: expected to leave"):
        training_budget(config, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: [1", "config: expected YAML, got an error in f.yaml line"),
        ("- epochs", "config: expected lines of the form"),
        ("1: 2", "config: expected lines of the form"),
    ],
)
def test_damaged_files_are_refused_in_one_line(content, message):
    with pytest.raises(ValueError, match="config: ") as caught:
        parse_options(content, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_empty_file_has_no_options():
    assert parse_options("# nothing\n", "f.yaml") == {}


def test_a_missing_file_names_the_recipes():
    with pytest.raises(FileNotFoundError, match="or one of the recipes digits, mae_vit_base"):
        read_options("nowhere.yaml")


def test_the_run_folder_is_named_after_method_and_data():
    assert PretrainConfig().run_path.as_posix() == "runs/mae-digits"
    assert PretrainConfig(data="/data/my photos/").run_path.as_posix() == "runs/mae-my-photos"
    assert PretrainConfig(data="x.npz", out="here").run_path.as_posix() == "here"

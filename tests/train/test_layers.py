import dataclasses
from importlib import resources

import pytest

from prmim_core.cost import VIT_SIZES
from prmim_train.config import PretrainConfig
from prmim_train.layers import dump_options, merge_layers, parse_options, read_options, recipe_names
from prmim_train.methods import METHOD_OPTIONS, METHODS, SPECIAL_OPTIONS

BASE = {"mae": {}, "simmim": {"method": "simmim"}, "maskalign": {"method": "maskalign", "teacher": "clip"}}


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip_keeps_every_option_that_the_method_has(method):
    options = {"data": "photos", "mean": (0.1, 0.2, 0.3), "image_size": (64, 96), "clip_grad": 1.0, "betas": (0.8, 0.9)}
    config = PretrainConfig(**options, **BASE[method])
    read = parse_options(dump_options(config), "copy")
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(read) == fields - {"out", "resume"} - (set(SPECIAL_OPTIONS) - set(METHOD_OPTIONS[method]))
    assert PretrainConfig(**read) == config


def test_a_layer_that_names_a_model_drops_the_widths_below_it():
    merged = merge_layers(read_options("digits"), {"model": "vit_small"})
    assert PretrainConfig(**merged).encoder_size == VIT_SIZES["vit_small"]


@pytest.mark.parametrize("method", ["simmim", "maskalign"])
def test_a_layer_that_changes_the_method_drops_what_belongs_to_the_other(method):
    merged = merge_layers(read_options("digits"), BASE[method])
    config = PretrainConfig(**merged)
    assert (config.method, config.mask_ratio, config.throw_ratio) == (method, None, None)
    assert (config.embed_dim, config.stages, config.base_learning_rate) == (96, 2, 8e-3)  # these belong to no method
    assert config.mask_share == METHODS[method].mask_ratio


@pytest.mark.parametrize("lower", [{"method": "mae"}, {}])
def test_naming_the_same_method_again_changes_nothing(lower):
    below = {**lower, "decoder_dim": 64, "mask_ratio": 0.8}
    assert merge_layers(below, {"method": "mae"}) == {**below, "method": "mae"}


def test_options_in_the_layer_that_changes_the_method_stay():
    merged = merge_layers({"mask_ratio": 0.75, "norm_pix": False}, {"method": "simmim", "mask_ratio": 0.5})
    assert merged == {"method": "simmim", "mask_ratio": 0.5}


def test_changing_the_method_twice_ends_with_the_last():
    merged = merge_layers({"decoder_dim": 64}, {"method": "simmim", "mask_unit": 4}, {"method": "mae", "epochs": 3})
    assert merged == {"method": "mae", "epochs": 3}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_configuration(name):
    options = read_options(name)
    config = PretrainConfig(**options)
    for option, value in options.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(config, option) == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_what_one_must_know(name):
    text = (resources.files("prmim_train") / "recipes" / f"{name}.yaml").read_text()
    head = text[: text.index("\nchannels:")]
    assert all(line.startswith("#") or line == "data: digits" for line in head.splitlines())
    words = ["paper", "command", "hardware", "measured"]
    if "vit_base" in name:
        words += ["cost", "published"]
        assert "measured   not by us" in head
        assert f"prmim pretrain --config {name} " in head
    for word in words:
        assert f"# {word:<10} " in head


def test_the_recipe_of_mae_repeats_the_defaults():
    ours = PretrainConfig(**read_options("mae_vit_base"))
    different = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != f.default}
    # The ratios are written down, which the defaults leave to the method; the rest is for speed and size of the files.
    assert different <= {"mask_ratio", "throw_ratio", "workers", "compile", "log_every", "checkpoint_every"}
    assert (ours.mask_ratio, ours.throw_ratio) == (METHODS["mae"].mask_ratio, METHODS["mae"].throw_ratio)


@pytest.mark.parametrize("method", METHODS)
def test_the_dense_recipe_differs_by_what_is_thrown_alone(method):
    ours, dense = (PretrainConfig(**read_options(f"{method}_vit_base{end}")) for end in ("", "_dense"))
    assert dense == dataclasses.replace(ours, throwing="none", throw_ratio=None)
    assert ours.is_rebuilt
    assert not dense.is_rebuilt


PUBLISHED = {  # peak learning rate, warm-up and length in epochs, images per step, as the authors' own code has them
    "mae": (2.4e-3, 40, 800, 4096),
    "simmim": (4e-4, 10, 800, 2048),
    "maskalign": (6e-4, 20, 200, 1024),
}


@pytest.mark.parametrize("method", METHODS)
def test_rates_are_the_published_ones(method):
    config = PretrainConfig(**read_options(f"{method}_vit_base"))
    warmup = config.epochs / 20 if config.warmup_epochs is None else config.warmup_epochs
    found = (config.learning_rate, warmup, config.epochs, config.batch_size)
    assert found == pytest.approx(PUBLISHED[method])


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

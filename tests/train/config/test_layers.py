"""Layers of options, their files, and the packaged recipes."""

import json
import re
from dataclasses import replace
from importlib import resources

import pytest

from prmim_methods import METHODS, vit_size
from prmim_train.config.layers import (
    dump_options,
    merge_layers,
    parse_options,
    read_options,
    read_recipe,
    recipe_names,
    stored_options,
)
from prmim_train.config.pretrain import pretrain_config
from prmim_train.report.inspect import cost_reports

BASE = {
    "mae": {},
    "simmim": {"method": "simmim"},
    "maskalign": {"method": "maskalign", "teacher": "clip"},
    "localmim": {"method": "localmim"},
    "videomae": {"method": "videomae", "patch_size": 16},
}


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip_keeps_every_option_that_the_method_has(method):
    options = {"data": "photos", "mean": (0.1, 0.2, 0.3), "image_size": (64, 96), "clip_grad": 1.0, "betas": (0.8, 0.9)}
    config = pretrain_config(**options, **BASE[method])
    read = parse_options(dump_options(config), "copy")
    assert read == stored_options(config)
    assert set(read) == set(config.flat()) - {"out", "resume", "allow_changes"}
    assert pretrain_config(**read) == config


def test_a_layer_that_names_a_model_drops_the_sizes_below_it():
    merged = merge_layers(read_options("digits"), {"model": "vit_small"})
    assert pretrain_config(**merged).method.encoder_size == vit_size("vit_small")


@pytest.mark.parametrize("method", ["simmim", "maskalign"])
def test_a_layer_that_changes_the_method_drops_options_of_the_other(method):
    merged = merge_layers(read_options("digits"), BASE[method])
    assert not {"mask_ratio", "throw_ratio", "throwing", "decoder_dim"} & set(merged)
    config = pretrain_config(**merged)
    assert config.method.name == method
    assert (config.method.embed_dim, config.method.stages, config.base_learning_rate) == (96, 2, 8e-3)  # shared ones
    assert config.method.mask_ratio == METHODS[method].mask_ratio


def test_the_size_of_the_images_outlasts_a_change_of_the_method():
    method = pretrain_config(**merge_layers(read_options("digits"), {"method": "videomae"})).method
    assert (method.name, method.image_size, method.patch_size) == ("videomae", (16, 16), (2, 2))


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
    config = pretrain_config(**options)
    for option, value in config.flat().items():
        given = options.get(option, value)
        side = (given, given) if option in ("image_size", "patch_size") and isinstance(given, int) else given
        assert value == (tuple(side) if isinstance(side, list) else side)
    assert set(options) <= set(config.flat())


@pytest.mark.parametrize(
    ("lower", "upper", "warmup"),
    [
        ({"epochs": 800, "warmup_epochs": 40}, {"epochs": 1600}, 40),  # MAE published both
        ({"epochs": 800, "warmup_epochs": 40}, {"epochs": 800}, 40),
        ({"epochs": 800, "warmup_epochs": 40}, {"epochs": 100}, None),
        ({"epochs": 800, "warmup_epochs": 40}, {"epochs": 100, "warmup_epochs": 7}, 7),
        ({"epochs": 800, "warmup_epochs": 40}, {"batch_size": 64}, 40),
        ({"warmup_epochs": 40}, {"epochs": 100}, 40),  # meant for no number of epochs
    ],
    ids=str,
)
def test_a_layer_with_fewer_epochs_drops_the_warm_up_below_it(lower, upper, warmup):
    assert merge_layers(lower, upper).get("warmup_epochs") == warmup


def test_a_short_run_of_a_recipe_warms_up_for_a_twentieth():
    recipe = read_options("mae_vit_base")
    for epochs, warmup in ((1600, 40), (800, 40), (100, 5)):
        assert pretrain_config(**merge_layers(recipe, {"epochs": epochs})).warmup == warmup


def test_the_recipe_of_mae_repeats_the_defaults():
    ours = pretrain_config(**read_options("mae_vit_base"))
    defaults = pretrain_config().flat()
    different = {name for name, value in ours.flat().items() if value != defaults[name]}
    # Speed, size of the files, and what a run on other images wants.
    assert different <= {"workers", "compile", "log_every", "checkpoint_every", "holdout", "warmup_epochs"}
    assert ours.warmup == pretrain_config().warmup


@pytest.mark.parametrize("method", METHODS)
def test_the_dense_recipe_is_the_baseline(method):
    ours, dense = (pretrain_config(**read_options(f"{method}_vit_base{end}")) for end in ("", "_dense"))
    assert ours.method.is_reconstructed
    assert dense.method == ours.method.baseline()
    assert dense == replace(ours, method=dense.method)


@pytest.fixture
def clip_base(tmp_path):
    """The size of CLIP ViT-B/16."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"patch_size": 16}}))
    return str(tmp_path)


@pytest.mark.parametrize("ending", ["", "_dense"])
@pytest.mark.parametrize("method", METHODS)
def test_recipes_state_their_cost(method, ending, clip_base):
    name = f"{method}_vit_base{ending}"
    options = read_options(name)
    if "teacher" in options:
        assert options["teacher"] == "openai/clip-vit-base-patch16"
        options["teacher"] = clip_base
    ours, other = cost_reports(pretrain_config(**options))
    text = (resources.files("prmim_train.config") / "recipes" / f"{name}.yaml").read_text()
    stated = text[text.index("# cost") : text.index("# expected")]
    macs = [f"{report.macs / 1e9:.3f}" for report in (ours, other)]
    if "teacher" in options:
        macs.insert(1, f"{ours.parts['teacher'].macs / 1e9:.3f}")
    memory = [f"{report.activation_bytes / 1e6:.0f}" for report in (ours, other)]
    assert re.findall(r"([\d.]+) G", stated) == (macs[:-1] if ending else macs)
    assert re.findall(r"(\d+) MB", stated) == (memory[:1] if ending else memory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: [1", "config: expected YAML, got an error in f.yaml line"),
        ("- epochs", "config: expected lines of the form"),
        ("1: 2", "config: expected lines of the form"),
    ],
)
def test_corrupt_files_give_one_line(content, message):
    with pytest.raises(ValueError, match="config: ") as caught:
        parse_options(content, "f.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_empty_file_has_no_options():
    assert parse_options("# nothing\n", "f.yaml") == {}


@pytest.mark.parametrize(
    ("name", "command", "hint"),
    [
        ("mae_vit_base", "evaluate", "pretrain; use prmim pretrain --config mae_vit_base"),
        ("mae_vit_base_linear", "pretrain", "evaluate; use prmim evaluate --run RUN --config mae_vit_base_linear"),
    ],
)
def test_a_recipe_of_the_other_command_is_refused(name, command, hint, tmp_path):
    with pytest.raises(ValueError, match=f"^config: expected options of prmim {command}, got those of {hint}$"):
        read_options(name, command)
    (tmp_path / "copy.yaml").write_text(read_recipe(name))
    with pytest.raises(ValueError, match=f"^config: expected options of prmim {command}, got those of"):
        read_options(tmp_path / "copy.yaml", command)


def test_a_missing_file_names_the_recipes():
    with pytest.raises(FileNotFoundError, match=r"or one of the recipes .*digits, .*mae_vit_base"):
        read_options("nowhere.yaml")

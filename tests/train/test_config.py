import pytest

from prmim_core import Grid, Schedule, TokenCounts
from prmim_train.config import SHARED_OPTIONS, PretrainConfig
from prmim_train.methods import METHOD_OPTIONS, METHODS, SPECIAL_OPTIONS

SIMMIM = {"method": "simmim"}
MASKALIGN = {"method": "maskalign", "teacher": "clip"}
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
    ({"method": "simclr"}, "method: expected mae or simmim or maskalign, got 'simclr'"),
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
    ({"decay": "linear"}, "decay: expected cosine or step, got 'linear'"),
    ({"parallel": "zero"}, "parallel: expected ddp or fsdp, got 'zero'"),
    ({"nonfinite": "ignore"}, "nonfinite: expected stop or skip, got 'ignore'"),
    ({"max_skipped": -1}, "max_skipped: expected a whole number of at least 0, got -1"),
    ({"checkpoint_minutes": 0}, "checkpoint_minutes: expected a number above 0, got 0"),
    ({"checkpoint_minutes": "ten"}, "checkpoint_minutes: expected a number above 0, got 'ten'"),
    ({"tracker": "comet"}, "tracker: expected none or tensorboard or wandb or mlflow, got 'comet'"),
    ({"recompute_blocks": "yes"}, "recompute_blocks: expected true or false, got 'yes'"),
    ({"scan_blocks": True}, "scan_blocks: backend torch has no such option, only jax"),
    ({"scan_blocks": 1, "backend": "jax"}, "scan_blocks: expected true or false, got 1"),
    # A method has its own options, and no others.
    ({"mask_unit": 4}, "mask_unit: method mae has no such option"),
    ({"teacher": "clip"}, "teacher: method mae has no such option"),
    ({"drop_path": 0.1}, "drop_path: method mae has no such option"),
    ({**SIMMIM, "decoder_dim": 256}, "decoder_dim: method simmim has no such option"),
    ({**SIMMIM, "norm_pix": False}, "norm_pix: method simmim has no such option"),
    ({**SIMMIM, "fusion": "sum"}, "fusion: method simmim has no such option"),
    ({**MASKALIGN, "mask_unit": 4}, "mask_unit: method maskalign has no such option"),
    ({**MASKALIGN, "furthest_from": "none"}, "furthest_from: method maskalign has no such option"),
    # SimMIM
    ({**SIMMIM, "image_size": 112}, "mask_unit: expected a divisor of the grid 7x7, got 2"),
    ({**SIMMIM, "image_size": (96, 112)}, "mask_unit: expected a divisor of the grid 6x7, got 2"),
    ({**SIMMIM, "mask_unit": 0}, "mask_unit: expected a whole number of at least 1, got 0"),
    ({**SIMMIM, "mask_unit": 2.0}, "mask_unit: expected a whole number of at least 1, got 2.0"),
    ({**SIMMIM, "mask_ratio": 0.99, "mask_unit": 14}, "mask_ratio: 0.99 leaves no visible token of the 196"),
    ({**SIMMIM, "throw_ratio": 0.7}, "throw_ratio: expected at most mask_ratio (0.6), since only masked tokens can"),
    ({**SIMMIM, "throw_by": "patch"}, "throw_by: expected token or unit, got 'patch'"),
    ({**SIMMIM, "position": "learned"}, "position: expected relative or absolute, got 'learned'"),
    ({**SIMMIM, "layer_scale": 0.0}, "layer_scale: expected a number in (0, 1), got 0.0"),
    ({**SIMMIM, "drop_path": 1.0}, "drop_path: expected a number in [0, 1), got 1.0"),
    # MaskAlign
    ({"method": "maskalign"}, "teacher: expected a folder with a vision transformer, or its name on the hub, got no"),
    ({**MASKALIGN, "teacher": ""}, "teacher: expected text, got ''"),
    ({**MASKALIGN, "throw_ratio": 0.5}, "throw_ratio: expected null, since method maskalign throws all masked tokens"),
    ({**MASKALIGN, "throwing": "random"}, "throwing: expected furthest or none, got 'random'"),
    ({**MASKALIGN, "masking": "block"}, "masking: expected attention or random, got 'block'"),
    ({**MASKALIGN, "fusion": "mean"}, "fusion: expected linear or sum, got 'mean'"),
    ({**MASKALIGN, "teacher_layers": 0}, "teacher_layers: expected a whole number of at least 1, got 0"),
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
    assert config.counts == TokenCounts(visible=49, decoded=49, thrown=98)


def test_throwing_none_is_dense():
    config = PretrainConfig(throwing="none", mask_ratio=0.4)  # throw_ratio 0.5 would not fit
    assert (config.counts.decoded, config.counts.thrown) == (78 + 1, 0)
    options = config.method_options()
    assert (options["throwing"], options["throw_ratio"]) == ("none", 0.0)
    assert not config.is_rebuilt


def test_sizes_may_be_rectangles():
    config = PretrainConfig(image_size=(32, 96), patch_size=(8, 16))
    assert config.grid.shape == (4, 6)
    assert config.method_options()["image_size"] == (32, 96)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, TokenCounts(49, 49, 98)),
        ({"throw_ratio": 0.25}, TokenCounts(49, 98, 49)),
        (SIMMIM, TokenCounts(76, 71, 49)),
        ({**SIMMIM, "throw_by": "unit"}, TokenCounts(76, 72, 48)),
        ({**SIMMIM, "throw_ratio": 0.5}, TokenCounts(76, 22, 98)),
        ({**SIMMIM, "throwing": "none"}, TokenCounts(76, 120, 0)),
        ({**SIMMIM, "mask_unit": 1}, TokenCounts(78, 69, 49)),
        (MASKALIGN, TokenCounts(58, 0, 138)),
        ({**MASKALIGN, "throwing": "none"}, TokenCounts(58, 0, 138)),
        ({**MASKALIGN, "mask_ratio": 0.5}, TokenCounts(98, 0, 98)),
    ],
    ids=str,
)
def test_ratios_become_the_counts_of_the_method(options, counts):
    config = PretrainConfig(**options)
    assert config.counts == counts == config.schedule.counts


def test_units_are_thrown_as_units_where_that_is_asked_for():
    assert PretrainConfig(**SIMMIM).schedule.unit is None
    config = PretrainConfig(**SIMMIM, throw_by="unit", stages=3)
    assert config.schedule == Schedule(Grid((14, 14)), config.counts, stages=3, unit=(2, 2))
    assert PretrainConfig(**SIMMIM, mask_unit=7).unit == (7, 7)


@pytest.mark.parametrize(
    ("options", "is_rebuilt"),
    [
        ({}, True),
        ({"variant": "none"}, False),
        ({"throw_ratio": 0.0}, False),
        (SIMMIM, True),
        ({**SIMMIM, "throwing": "none"}, False),
        (MASKALIGN, True),
        ({**MASKALIGN, "throwing": "none"}, False),
        ({**MASKALIGN, "thrown_weight": 0.0}, False),
    ],
    ids=str,
)
def test_whether_thrown_tokens_are_rebuilt(options, is_rebuilt):
    assert PretrainConfig(**options).is_rebuilt == is_rebuilt


BASE = {"mae": {}, "simmim": SIMMIM, "maskalign": MASKALIGN}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_given_its_own_options_and_no_others(method):
    options = PretrainConfig(**BASE[method]).method_options()
    own = {"seed" if name == "furthest_from" else name for name in METHOD_OPTIONS[method]}
    given = {"name", "image_size", "patch_size", "init_seed", "mask_ratio", "throw_ratio"}
    assert set(options) == {*given, *SHARED_OPTIONS, *own}
    assert options["name"] == method


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_open_is_the_methods_own(method):
    options = PretrainConfig(**BASE[method]).method_options()
    traits = METHODS[method]
    assert (options["mask_ratio"], options["throw_ratio"]) == (traits.mask_ratio, traits.throw_ratio)
    if method != "mae":
        assert options["drop_path"] == 0.1


def test_what_is_given_is_handed_on():
    given = {"mask_ratio": 0.5, "throw_ratio": 0.3, "drop_path": 0.0, "mask_unit": 1, "furthest_from": "none"}
    options = PretrainConfig(**SIMMIM, **given, seed=7).method_options()
    renamed = {"seed" if name == "furthest_from" else name: value for name, value in given.items()}
    assert renamed.items() <= options.items()
    assert options["init_seed"] == 7


def test_blocks_are_scanned_only_where_that_was_asked_for():
    assert "scan_blocks" not in PretrainConfig(backend="jax").method_options()
    assert PretrainConfig(backend="jax", scan_blocks=True).method_options()["scan_blocks"] is True


def test_blocks_are_recomputed_by_any_method_on_any_backend():
    assert PretrainConfig().method_options()["recompute_blocks"] is False
    assert PretrainConfig(**SIMMIM, backend="jax", recompute_blocks=True).method_options()["recompute_blocks"] is True


def test_every_option_of_the_table_is_a_field():
    fields = set(PretrainConfig.__dataclass_fields__)
    assert set(SPECIAL_OPTIONS) <= fields
    assert set(SHARED_OPTIONS) <= fields - set(SPECIAL_OPTIONS)


def test_the_run_folder_is_named_after_method_and_data():
    assert PretrainConfig().run_path.as_posix() == "runs/mae-digits"
    assert PretrainConfig(data="/data/my photos/", **SIMMIM).run_path.as_posix() == "runs/simmim-my-photos"
    assert PretrainConfig(data="x.npz", out="here").run_path.as_posix() == "here"

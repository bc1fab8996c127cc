"""Teachers: lookup, and parsing of configurations.

The adapters' tests read real weights.
"""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest

from prmim_methods import MaskAlignConfig, Transformer
from prmim_methods.teacher import check_images, find_teacher, local_teacher, read_teacher

CLIP = {"model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
CLIP |= {"intermediate_size": 128, "patch_size": 8, "image_size": 32}


@pytest.fixture
def folder(tmp_path):
    def write(config, preprocessing=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if preprocessing is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        return tmp_path

    return write


def test_a_configuration(folder):
    teacher = read_teacher(folder(CLIP, {"image_mean": [0.1, 0.2, 0.3]}))
    assert teacher.size == Transformer(64, 6, 4, 2)
    assert (teacher.patch_size, teacher.grid_shape, teacher.patch_dim) == ((8, 8), (4, 4), 192)
    assert (teacher.activation, teacher.eps) == ("quick_gelu", 1e-5)
    assert teacher.mean == (0.1, 0.2, 0.3)
    assert teacher.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert teacher.title == "CLIP, 6 blocks of width 64, patches of 8x8 pixels"


def test_sizes_of_configurations_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    for kind, family in (("CLIPVision", "clip"), ("ViT", "vit"), ("Dinov2", "dinov2")):
        given = sizes if kind == "Dinov2" else {**sizes, "intermediate_size": 256}
        getattr(transformers, f"{kind}Config")(**given).save_pretrained(tmp_path / family)
        found = read_teacher(tmp_path / family)
        assert (found.family, found.size, found.patch_size) == (family, Transformer(64, 6, 4), (8, 8))


def test_both_towers_of_clip(folder):
    both = {"model_type": "clip", "vision_config": CLIP, "text_config": {"hidden_size": 5}}
    assert read_teacher(folder(both)).size == Transformer(64, 6, 4, 2)


@pytest.mark.parametrize(
    ("model_type", "patch", "eps"), [("vit", 16, 1e-12), ("dinov2", 14, 1e-6), ("clip_vision_model", 32, 1e-5)]
)
def test_missing_values_are_defaults_of_the_family(folder, model_type, patch, eps):
    teacher = read_teacher(folder({"model_type": model_type}))
    assert teacher.size == Transformer(768, 12, 12, 4)
    assert (teacher.patch_size, teacher.grid_shape, teacher.eps) == ((patch, patch), (224 // patch,) * 2, eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "expected a model of type clip, clip_vision_model, vit, dinov2, got 'bert' in "),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "expected a DINOv2 model without SwiGLU layers, got one "),
        ({"hidden_act": "relu"}, "expected the activation gelu or quick_gelu, got 'relu' in "),
        ({"hidden_size": "64"}, "expected a whole number hidden_size in [1, 16384], got '64' in "),
        ({"num_attention_heads": 5}, "expected a divisor of the width 64 as heads, got 5 in "),
        ({"intermediate_size": 100}, "expected hidden layers of a multiple of the width 64, got 100 in "),
        ({"patch_size": [8, 8, 8]}, "expected one or two whole numbers patch_size, got [8, 8, 8] in "),
        ({"num_hidden_layers": 10**7}, "expected a whole number num_hidden_layers in [1, 1000], got 10000000 in "),
        ({"hidden_size": 10**4000}, "expected a whole number hidden_size in [1, 16384], got 1000"),
        ({"hidden_size": -64}, "expected a whole number hidden_size in [1, 16384], got -64 in "),
        ({"hidden_size": 64.0}, "expected a whole number hidden_size in [1, 16384], got 64.0 in "),
        ({"num_attention_heads": True}, "expected a whole number num_attention_heads in [1, 16384], got True in "),
        ({"intermediate_size": 0}, "expected a whole number intermediate_size in [1, 16384], got 0 in "),
        ({"intermediate_size": None}, "expected a whole number intermediate_size in [1, 16384], got None in "),
        ({"mlp_ratio": float("inf")}, "expected a number mlp_ratio of at least 0, got inf in "),
        ({"mlp_ratio": "4"}, "expected a number mlp_ratio of at least 0, got '4' in "),
        ({"mlp_ratio": 0}, "expected hidden layers of a multiple of the width 64, got 0 in "),
        ({"layer_norm_eps": float("nan")}, "expected a number layer_norm_eps of at least 0, got nan in "),
        ({"image_size": 4}, "expected images of at least a patch (8, 8), got (4, 4) in "),
        ({"image_size": [32, 10**9]}, "expected a whole number image_size in [1, 16384], got 1000000000 in "),
        ({"model_type": ["clip"]}, "expected a model of type clip, clip_vision_model, vit, dinov2, got ['clip'] in "),
        ({"vision_config": 5}, "expected an object vision_config, got 5 in "),
        ({"num_channels": 4}, "expected image_mean and image_std of 4 channels, got 3 and 3 in "),
    ],
    ids=str,
)
def test_unsupported_models(folder, change, message):
    with pytest.raises(ValueError, match=f"^teacher: {re.escape(message)}"):
        read_teacher(folder(CLIP | change))


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"image_std": [1, 0, 1]}, "a number image_std of at least 1e-06, got 0"),
        ({"image_std": [1, -1, 1]}, "a number image_std of at least 1e-06, got -1"),
        ({"image_mean": ["0", 0, 0]}, "a number image_mean of at least -16384, got '0'"),
        ({"image_mean": float("nan")}, "a number image_mean of at least -16384, got nan"),
        ({"image_mean": 5}, "image_mean and image_std of 3 channels, got 1 and 3"),
    ],
)
def test_unusable_statistics(folder, values, got):
    with pytest.raises(ValueError, match=f"^teacher: expected {re.escape(got)} in "):
        read_teacher(folder(CLIP, values))


def test_configurations_that_are_no_files(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"^teacher: expected JSON in .*config.json, got .*directory"):
        read_teacher(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", '"text"', "[" * 10**5, '{"a": ' + "9" * 5000 + "}", " " * 2**21])
def test_corrupt_configurations(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^teacher: expected (JSON|a JSON object) in .*config.json, got "):
        read_teacher(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_block(name, folder):
    place = folder(CLIP, {})
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    with pytest.raises(ValueError, match=f"teacher: expected files in .*, got a pipe, a socket or a device: '{name}'"):
        read_teacher(place)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(
        ValueError, match=r"^teacher: expected a folder with a config.json, got .*, which has no such file$"
    ):
        read_teacher(tmp_path)
    for find in (find_teacher, local_teacher):
        for source in ("nowhere", "/no/where"):
            message = f"teacher: expected a folder, or a name on the hub (owner/name), got {source!r}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                find(source)
    assert find_teacher(str(tmp_path)) == tmp_path


def test_images_that_a_teacher_cannot_process(folder):
    teacher = read_teacher(folder(CLIP))
    check_images(teacher, (4, 4), 3)
    check_images(teacher, (7, 7), 1)
    with pytest.raises(ValueError, match=r"^teacher: expected images of 2 axes, got a grid of 3$"):
        check_images(teacher, (4, 4, 4), 3)
    with pytest.raises(ValueError, match=r"^teacher: expected images of 3 channels, or of 1 to repeat, got 4$"):
        check_images(teacher, (4, 4), 4)


def test_downloaded_teachers_are_found(folder, monkeypatch):
    path = folder(CLIP)
    cached = {("owner/model", "config.json"): str(path / "config.json")}
    hub = SimpleNamespace(try_to_load_from_cache=lambda name, file: cached.get((name, file)), __spec__=object())
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert local_teacher("owner/model") == local_teacher(str(path)) == path
    assert local_teacher("owner/other") is None
    config = MaskAlignConfig(teacher="owner/model", fusion="sum")
    assert config.teacher_config == read_teacher(path)
    assert MaskAlignConfig(teacher="owner/other").teacher_config is None


def test_without_the_hub_nothing_is_downloaded(monkeypatch):
    monkeypatch.setattr("prmim_methods.hub.find_spec", lambda name: None)
    assert local_teacher("owner/model") is None
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"^teacher: expected a folder, or huggingface_hub installed to download a "):
        find_teacher("owner/model")


def test_failed_downloads_are_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    message = "teacher: expected a folder, or a model that can be downloaded, got 'owner/model' (no network)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_teacher("owner/model")


def test_an_architecture_needs_the_teacher(folder):
    config = MaskAlignConfig(teacher=folder(CLIP), depth=6)
    architecture = config.architecture()
    assert (architecture["teacher_dim"], architecture["teacher_layers"]) == (64, 5)
    assert config.baseline().architecture() == {**architecture, "reconstruction": "none"}
    message = "teacher: expected a local model, got 'owner/model', which is not downloaded"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MaskAlignConfig(teacher="owner/model").architecture()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_layers": 7}, "teacher_layers: expected 1 to 6, the teacher's depth, got 7"),
        (
            {"depth": 2},
            "fusion: expected 'sum' where depths differ, got 'linear' for 6 blocks of the teacher and 2 of the student",
        ),
        (
            {"image_size": (16,), "patch_size": (4,)},
            "teacher: expected images of 2 axes, got a grid of 1",
        ),
        ({"channels": 2}, "teacher: expected images of 3 channels, or of 1 to repeat, got 2"),
    ],
    ids=str,
)
def test_teachers_that_do_not_fit_the_options(folder, options, message):
    config = MaskAlignConfig(teacher=folder(CLIP), **{"depth": 6, **options})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _ = config.teacher_config
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config.cost()

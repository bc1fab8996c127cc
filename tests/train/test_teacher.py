import json
import sys
from types import SimpleNamespace

import pytest

from prmim_core import Transformer
from prmim_train.teacher import TeacherSize, read_teacher

SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "clip_vision_model", **SMALL, "intermediate_size": 128, "patch_size": 8},
            TeacherSize("CLIP", Transformer(64, 6, 4, 2), (8, 8), 3),
        ),
        (
            {"model_type": "clip", "vision_config": {**SMALL, "patch_size": 16}, "hidden_size": 999},
            TeacherSize("CLIP", Transformer(64, 6, 4), (16, 16), 3),
        ),
        # Files leave out what is the default.
        ({"model_type": "clip", "vision_config": {}}, TeacherSize("CLIP", Transformer(768, 12, 12), (32, 32), 3)),
        ({"model_type": "vit", "patch_size": [4, 4]}, TeacherSize("ViT", Transformer(768, 12, 12), (4, 4), 3)),
        ({"model_type": "vit", "num_channels": 1}, TeacherSize("ViT", Transformer(768, 12, 12), (16, 16), 1)),
        (
            {"model_type": "dinov2", **SMALL, "mlp_ratio": 3},
            TeacherSize("DINOv2", Transformer(64, 6, 4, 3), (14, 14), 3),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_the_size_is_read_from_the_folder(config, expected, tmp_path):
    found = read_teacher(write(tmp_path, config))
    assert found == expected
    assert found.patch_dim == expected.patch_size[0] ** 2 * expected.channels


def test_the_sizes_of_transformers_own_classes_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {**SMALL, "intermediate_size": 256, "patch_size": 8, "image_size": 32}
    for number, (kind, family) in enumerate((("CLIPVision", "CLIP"), ("ViT", "ViT"), ("Dinov2", "DINOv2"))):
        given = {name: value for name, value in sizes.items() if kind != "Dinov2" or name != "intermediate_size"}
        getattr(transformers, f"{kind}Config")(**given).save_pretrained(tmp_path / str(number))
        assert read_teacher(str(tmp_path / str(number))) == TeacherSize(family, Transformer(64, 6, 4), (8, 8), 3)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"teacher: expected a folder with config.json, there is none in"):
        read_teacher(str(tmp_path))


def test_a_model_that_sees_no_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: expected a model of type clip, .*dinov2, got 'bert' in"):
        read_teacher(write(tmp_path, {"model_type": "bert"}))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="teacher: expected JSON in"):
        read_teacher(str(tmp_path))


def test_what_was_fetched_before_is_found(tmp_path, monkeypatch):
    write(tmp_path, {"model_type": "vit", **SMALL})
    fetched = {("owner/model", "config.json"): str(tmp_path / "config.json")}
    hub = SimpleNamespace(try_to_load_from_cache=lambda name, file: fetched.get((name, file)), __spec__=object())
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert read_teacher("owner/model") == TeacherSize("ViT", Transformer(64, 6, 4), (16, 16), 3)
    assert read_teacher("owner/other") is None


def test_without_the_hub_a_name_says_nothing(monkeypatch):
    monkeypatch.setattr("prmim_train.teacher.find_spec", lambda name: None)
    assert read_teacher("owner/model") is None

import json
import sys
from types import SimpleNamespace

import pytest

from prmim_core import Transformer
from prmim_train.teacher import read_teacher

SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_folder_is_read(tmp_path):
    found = read_teacher(write(tmp_path, {"model_type": "clip_vision_model", **SMALL, "intermediate_size": 128}))
    assert (found.family, found.size, found.patch_size) == ("clip", Transformer(64, 6, 4, 2), (32, 32))
    assert found.patch_dim == 32 * 32 * 3


def test_the_sizes_of_transformers_own_classes_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {**SMALL, "intermediate_size": 256, "patch_size": 8, "image_size": 32}
    for number, (kind, family) in enumerate((("CLIPVision", "clip"), ("ViT", "vit"), ("Dinov2", "dinov2"))):
        given = {name: value for name, value in sizes.items() if kind != "Dinov2" or name != "intermediate_size"}
        getattr(transformers, f"{kind}Config")(**given).save_pretrained(tmp_path / str(number))
        found = read_teacher(str(tmp_path / str(number)))
        assert (found.family, found.size, found.patch_size) == (family, Transformer(64, 6, 4), (8, 8))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: expected a folder with a config.json, got .*, which has none"):
        read_teacher(str(tmp_path))


def test_a_model_that_sees_no_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: expected a model of type clip, .*dinov2, got 'bert' in"):
        read_teacher(write(tmp_path, {"model_type": "bert"}))


def test_what_was_fetched_before_is_found(tmp_path, monkeypatch):
    write(tmp_path, {"model_type": "vit", **SMALL})
    fetched = {("owner/model", "config.json"): str(tmp_path / "config.json")}
    hub = SimpleNamespace(try_to_load_from_cache=lambda name, file: fetched.get((name, file)), __spec__=object())
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = read_teacher("owner/model")
    assert (found.folder, found.family, found.size.dim) == (tmp_path, "vit", 64)
    assert read_teacher("owner/other") is None


def test_without_the_hub_a_name_says_nothing(monkeypatch):
    monkeypatch.setattr("prmim_train.teacher.find_spec", lambda name: None)
    assert read_teacher("owner/model") is None

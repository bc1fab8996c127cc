"""What a teacher's folder says of it; the adapters' tests read real folders that transformers wrote."""

import json
import re

import pytest

from prmim_core import Transformer
from prmim_core.teacher import check_layers, check_teacher, find_teacher, read_teacher

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


def test_both_towers_of_clip(folder):
    both = {"model_type": "clip", "vision_config": CLIP, "text_config": {"hidden_size": 5}}
    assert read_teacher(folder(both)).size == Transformer(64, 6, 4, 2)


@pytest.mark.parametrize(
    ("model_type", "patch", "eps"), [("vit", 16, 1e-12), ("dinov2", 14, 1e-6), ("clip_vision_model", 32, 1e-5)]
)
def test_what_is_left_out_is_the_familys_own(folder, model_type, patch, eps):
    teacher = read_teacher(folder({"model_type": model_type}))
    assert teacher.size == Transformer(768, 12, 12, 4)
    assert (teacher.patch_size, teacher.grid_shape, teacher.eps) == ((patch, patch), (224 // patch,) * 2, eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "expected a model of type clip, clip_vision_model, vit, dinov2, got 'bert' in "),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "expected a DINOv2 model without SwiGLU layers, got one "),
        ({"hidden_act": "relu"}, "expected the activation gelu or quick_gelu, got 'relu' in "),
        ({"hidden_size": "64"}, "expected a positive integer hidden_size, got '64' in "),
        ({"num_attention_heads": 5}, "expected a divisor of the width 64 as heads, got 5 in "),
        ({"intermediate_size": 100}, "expected hidden layers of a multiple of the width 64, got 100 in "),
        ({"patch_size": [8, 8, 8]}, "expected one or two positive integers patch_size, got [8, 8, 8] in "),
        ({"num_channels": 4}, "expected image_mean and image_std of 4 channels, got 3 and 3 in "),
    ],
    ids=str,
)
def test_what_can_be_no_teacher(folder, change, message):
    with pytest.raises(ValueError, match=f"^teacher: {re.escape(message)}"):
        read_teacher(folder(CLIP | change))


@pytest.mark.parametrize("content", ["", "[1]", "{", '"text"'])
def test_damaged_configurations(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^teacher: expected (JSON|a JSON object) in .*config.json, got "):
        read_teacher(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"^teacher: expected a folder with a config.json, got .*, which has none$"):
        read_teacher(tmp_path)
    with pytest.raises(ValueError, match=r"^teacher: expected a folder, or a name on the hub .*, got 'nowhere'$"):
        find_teacher("nowhere")
    assert find_teacher(str(tmp_path)) == tmp_path


def test_images_that_it_cannot_look_at(folder):
    teacher = read_teacher(folder(CLIP))
    check_teacher(teacher, (4, 4), 3)
    check_teacher(teacher, (7, 7), 1)
    with pytest.raises(ValueError, match=r"^teacher: expected images of 2 axes, got a grid of 3$"):
        check_teacher(teacher, (4, 4, 4), 3)
    with pytest.raises(ValueError, match=r"^teacher: expected images of 3 channels, or of 1 to repeat, got 4$"):
        check_teacher(teacher, (4, 4), 4)


def test_layers():
    assert (check_layers(None, 12), check_layers(5, 12)) == (12, 5)
    with pytest.raises(ValueError, match=r"^teacher_layers: expected 1 to 12, the teacher's depth, got 13$"):
        check_layers(13, 12)
    with pytest.raises(TypeError, match=r"^teacher_layers: expected an integer, got '5'$"):
        check_layers("5", 12)

"""Teachers: equal to transformers, frozen, and clear about invalid files."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prmim_methods import Transformer
from prmim_torch import Teacher
from tests import teachers

transformers = pytest.importorskip("transformers")

GRID = (4, 4)
# Sizes of images and grids: the teacher's own, resized images, and a resized position table too.
GEOMETRIES = {"own": ((16, 16), (4, 4)), "image resized": ((24, 8), (4, 4)), "both resized": ((18, 20), (3, 5))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {kind: teachers.save_teacher(kind, root / kind.replace(" ", "_")) for kind in teachers.KINDS}


@pytest.fixture
def images(make_images):
    return torch.from_numpy(make_images(2, 16, 16, 3))


def own_statistics(kind):
    name = "OPENAI_CLIP" if kind.startswith("clip") else "IMAGENET_DEFAULT"
    return [torch.tensor(getattr(transformers.image_utils, f"{name}_{part}")) for part in ("MEAN", "STD")]


def expected_output(kind, folder, images, grid, mean, std):
    """Return transformers' hidden states of all blocks, and the last attention."""
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    size = tuple(4 * tokens for tokens in grid)
    if size != tuple(images.shape[1:3]):
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
    model_of = {"clip": "CLIPVisionModel", "clip vision": "CLIPVisionModel", "dinov2": "Dinov2Model"}
    build = getattr(transformers, model_of.get(kind, "ViTModel"))
    model = build.from_pretrained(folder, attn_implementation="eager")
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True, output_attentions=True, **options)
    return torch.stack(output.hidden_states[1:]), output.attentions[-1][:, :, 0, 1:].mean(1)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", teachers.KINDS)
def test_outputs_are_those_of_transformers(folders, make_images, kind, geometry):
    size, grid = GEOMETRIES[geometry]
    images = torch.from_numpy(make_images(2, *size, 3))
    output = Teacher(folders[kind], grid, 3)(images)
    hidden, attention = expected_output(kind, folders[kind], images, grid, *own_statistics(kind))
    assert output.hidden.shape == (3, 2, 1 + grid[0] * grid[1], 32)
    assert attention.std(1).min() > 0.01  # else any values would be close
    torch.testing.assert_close(output.hidden, hidden, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output.attention, attention, rtol=1e-4, atol=1e-6)


def test_outputs_come_before_the_final_norm(folders, images):
    """MaskAlign uses outputs of blocks, without the final norm of transformers."""
    model = transformers.ViTModel.from_pretrained(folders["dino"])
    last = Teacher(folders["dino"], GRID, 3)(images).hidden[-1]
    assert not torch.allclose(model.layernorm(last), last, atol=0.1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layers_alone(folders, images, layers):
    every, last = Teacher(folders["clip"], GRID, 3)(images), Teacher(folders["clip"], GRID, 3, layers=layers)(images)
    assert torch.equal(last.hidden, every.hidden[3 - layers :])
    assert torch.equal(last.attention, every.attention)


def test_a_single_channel_is_repeated(folders, images):
    one, three = Teacher(folders["dino"], GRID, 1), Teacher(folders["dino"], GRID, 3)
    grey = images[..., :1]
    torch.testing.assert_close(one(grey).hidden, three(grey.expand(-1, -1, -1, 3)).hidden, rtol=1e-5, atol=1e-5)


def test_pixel_statistics_come_from_the_folder(folders, images, tmp_path):
    folder = shutil.copytree(folders["dino"], tmp_path / "dino")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    hidden, _ = expected_output("dino", folder, images, GRID, torch.full((3,), 0.5), torch.full((3,), 0.25))
    torch.testing.assert_close(Teacher(folder, GRID, 3)(images).hidden, hidden, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(Teacher(folders["dino"], GRID, 3)(images).hidden, hidden, atol=0.1)


def test_shards_are_read_together(folders, images, tmp_path):
    folder = teachers.save_teacher("clip", tmp_path / "clip", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(Teacher(folder, GRID, 3)(images).hidden, Teacher(folders["clip"], GRID, 3)(images).hidden)


@pytest.mark.parametrize("kind", teachers.KINDS)
def test_it_says_what_it_is(folders, kind):
    teacher = Teacher(folders[kind], GRID, 3)
    model = teachers.build_model(kind)
    base = {"clip": "vision_model", "classifier": "vit"}.get(kind)
    used = getattr(model, base) if base else model
    unused = ("pooler", "post_layernorm", "layernorm.", "embeddings.mask_token")
    expected = sum(p.numel() for name, p in used.named_parameters() if not name.startswith(unused))
    assert teacher.num_parameters == expected
    assert (teacher.dim, teacher.depth, teacher.num_heads, teacher.patch_size) == (32, 3, 4, (4, 4))
    assert teacher.size == Transformer(32, 3, 4, 2)
    assert teacher.description.endswith(f", 3 blocks of width 32, patches of 4x4 pixels, from {folders[kind]}")


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2"])
def test_products_in_bfloat16(folders, images, kind):
    exact = Teacher(folders[kind], GRID, 3)(images)
    teacher = Teacher(folders[kind], GRID, 3, dtype="bfloat16")
    dtypes = {part.weight.dtype for part in teacher._held[0].blocks.modules() if isinstance(part, nn.Linear)}
    assert dtypes == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Teacher(folders[kind], GRID, 3)(images)
    for rough in (teacher(images), cast):
        assert rough.hidden.dtype == rough.attention.dtype == torch.float32
        assert not torch.equal(rough.hidden, exact.hidden)
        assert (rough.hidden - exact.hidden).norm() < 0.03 * exact.hidden.norm()
        assert (rough.attention - exact.attention).norm() < 0.03 * exact.attention.norm()


def test_pixels_are_resized_in_full_precision(folders, make_images):
    teacher, seen = Teacher(folders["dino"], GRID, 3), []
    embed = teacher._held[0].embed
    teacher._held[0].embed = lambda patches: seen.append(patches) or embed(patches)
    images = torch.from_numpy(make_images(2, 24, 12, 3))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            teacher(images)
    assert torch.equal(seen[0], seen[1])


def test_devices_agree(folders, images, device):
    teacher = Teacher(folders["clip"], GRID, 3)
    expected = teacher(images)
    output = teacher.to(device)(images.to(device))
    torch.testing.assert_close(output.hidden.cpu(), expected.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.attention.cpu(), expected.attention, rtol=1e-4, atol=1e-5)


def test_it_is_no_part_of_what_is_learned_or_saved(folders, images):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = Teacher(folders["dino"], GRID, 3)
            self.layer = nn.Linear(2, 2)

    student = Student()
    assert set(student.state_dict()) == {"layer.weight", "layer.bias"}
    assert {name for name, _ in student.named_parameters()} == {"layer.weight", "layer.bias"}
    student.load_state_dict(student.state_dict())
    assert student.double().teacher(images).hidden.dtype == torch.float64
    assert student.to("meta").teacher(images.to("meta")).hidden.is_meta


def test_it_is_never_in_training_mode(images, tmp_path):
    folder = teachers.save_teacher("dino", tmp_path / "dino", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    teacher = Teacher(folder, GRID, 3)
    expected = teacher.eval()(images)
    assert torch.equal(teacher.train()(images).hidden, expected.hidden)


def test_random_numbers_and_screen_stay_as_they_were(folders, images, capfd):
    verbosity = transformers.utils.logging.get_verbosity()
    state = torch.random.get_rng_state()
    for folder in folders.values():
        Teacher(folder, GRID, 3)(images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2"])
def test_it_compiles_to_one_graph_and_gives_no_gradient(folders, images, kind):
    teacher = Teacher(folders[kind], GRID, 3, layers=2)
    output = torch.compile(teacher, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(output.hidden, teacher(images).hidden)
    assert not output.hidden.requires_grad
    assert not output.attention.requires_grad


def test_a_name_is_looked_up_on_the_hub(folders, images, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folders["clip"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    teacher = Teacher("openai/clip-vit-base-patch16", GRID, 3)
    assert torch.equal(teacher(images).hidden, Teacher(folders["clip"], GRID, 3)(images).hidden)
    ((name, patterns),) = asked
    assert name == "openai/clip-vit-base-patch16"
    assert not [pattern for pattern in patterns if not pattern.endswith((".json", ".safetensors"))]
    assert teacher.description.endswith("from openai/clip-vit-base-patch16")


def test_a_name_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"teacher: expected a folder, or a model that can be downloaded, got 'nobody/nothing' \(.+\)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Teacher("nobody/nothing", GRID, 3)


@pytest.mark.parametrize(
    ("source", "package", "message"),
    [
        (
            "nobody/nothing",
            "huggingface_hub",
            "teacher: expected a folder, or huggingface_hub installed to download .*",
        ),
        (
            None,
            "transformers",
            r"teacher: expected transformers to be installed, got no such package; pip install .*",
        ),
    ],
)
def test_missing_packages(folders, monkeypatch, source, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^{message}$"):
        Teacher(source or folders["dino"], GRID, 3)


def damaged(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def reconfigured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("dino", lambda folder: (folder / "config.json").unlink(), "expected a folder with a config.json, got .*"),
        ("dino", lambda folder: (folder / "config.json").write_text("{"), r"expected JSON in .*config.json, got .*"),
        ("dino", lambda folder: (folder / "config.json").write_text("[]"), r"expected a JSON object in .*, got list"),
        ("dino", reconfigured(model_type="siglip"), "expected a model of type clip, .*, dinov2, got 'siglip' in .*"),
        (
            "dinov2",
            reconfigured(model_type="dinov2_with_registers"),
            "expected a model of type clip, .*, dinov2, got 'dinov2_with_registers' in .*",
        ),
        ("dinov2", reconfigured(use_swiglu_ffn=True), "expected a DINOv2 model without SwiGLU layers, got one .*"),
        ("dino", reconfigured(hidden_act="relu"), "expected the activation gelu or quick_gelu, got 'relu' in .*"),
        ("dino", reconfigured(num_hidden_layers=4), r"expected a tensor 'layers.3\..*', got none in .*"),
        (
            "dino",
            reconfigured(intermediate_size=96),
            r"layers.0.mlp.fc1.bias: expected shape \(96,\), got \(64,\) in .*",
        ),
        (
            "dino",
            reconfigured(image_size="large"),
            r"expected a whole number image_size in \[1, 16384\], got 'large' in .*",
        ),
        ("dino", damaged, "expected weights in .safetensors files in .*, got .*"),
        ("dino", pickled, "expected weights in .safetensors files in .*, got .* no file named model.safetensors .*"),
        (
            "clip",
            lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'),
            "expected image_mean and image_std of 3 channels, got 1 and 3 in .*",
        ),
    ],
)
def test_what_is_no_teacher(folders, tmp_path, kind, spoil, message):
    folder = shutil.copytree(folders[kind], tmp_path / "teacher")
    spoil(folder)
    with pytest.raises(ValueError, match=f"^teacher: {message}$"):
        Teacher(folder, GRID, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere"}, r"teacher: expected a folder, or a name on the hub .*, got 'nowhere'"),
        ({"source": "/no/such/folder"}, r"teacher: expected a folder, or a name .*, got '/no/such/folder'"),
        ({"grid_shape": (4,)}, "teacher: expected images of 2 axes, got a grid of 1"),
        ({"grid_shape": (4, 4, 4)}, "teacher: expected images of 2 axes, got a grid of 3"),
        ({"channels": 4}, "teacher: expected images of 3 channels, or of 1 to repeat, got 4"),
        ({"layers": 0}, "layers: expected 1 to 3, the teacher's depth, got 0"),
        ({"layers": 4}, "layers: expected 1 to 3, the teacher's depth, got 4"),
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'bfloat16', got 'float16'"),
    ],
    ids=str,
)
def test_wrong_options(folders, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Teacher(**{"source": folders["dino"], "grid_shape": GRID, "channels": 3, **changes})


def test_files_of_the_project_are_read_alike(images, tmp_path):
    """Small teachers of other tests are written in two formats, without transformers."""
    first, second = (
        Teacher(teachers.write_teacher(tmp_path / names, names=names), GRID, 3)(images) for names in ("old", "new")
    )
    assert torch.equal(first.hidden, second.hidden)
    assert np.isfinite(first.hidden.numpy()).all()

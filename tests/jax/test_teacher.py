"""Teachers: transformers files, loaded into frozen blocks.

tests/parity compares their numbers.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from prmim_jax import Teacher
from prmim_jax.interop import named_variables
from prmim_jax.teacher import Frozen
from prmim_methods import Transformer
from tests import teachers

GRID = (4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return teachers.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def images(make_images):
    return jnp.asarray(make_images(2, 16, 16, 3))


@jax.jit
def look(teacher, images):
    return teacher(images)


def assert_same(got, expected):
    np.testing.assert_array_equal(got.hidden, expected.hidden)
    np.testing.assert_array_equal(got.attention, expected.attention)


def test_outputs(folder, images):
    output = look(Teacher(folder, GRID, 3), images)
    assert output.hidden.shape == (3, 2, 17, 32)
    assert output.attention.shape == (2, 16)
    assert output.hidden.dtype == output.attention.dtype == jnp.float32
    assert (output.attention > 0).all()
    assert (output.attention.sum(1) < 1).all()
    assert output.attention.std(1).min() > 0.01


@pytest.mark.parametrize("changes", [{"names": "new"}, {"prefix": "vit."}, {"names": "new", "prefix": "vit."}], ids=str)
def test_names_of_all_releases_are_known(folder, images, tmp_path, changes):
    other = teachers.write_teacher(tmp_path, **changes)
    assert_same(look(Teacher(other, GRID, 3), images), look(Teacher(folder, GRID, 3), images))


def test_shards_are_read_together(folder, images, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    places = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_same(look(Teacher(tmp_path, GRID, 3), images), look(Teacher(folder, GRID, 3), images))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_files_of_half_precision(folder, images, tmp_path, dtype):
    rough = look(Teacher(teachers.write_teacher(tmp_path, dtype=dtype), GRID, 3), images).hidden
    exact = look(Teacher(folder, GRID, 3), images).hidden
    assert rough.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rough - exact) < 0.02 * jnp.linalg.norm(exact)


def test_attention_without_biases(images, tmp_path):
    other = teachers.write_teacher(tmp_path, without=r"(query|key|value)\.bias", qkv_bias=False)
    teacher = Teacher(other, GRID, 3)
    assert not teacher.last_blocks.attn.qkv.bias[1].any()
    assert look(teacher, images).hidden.shape == (3, 2, 17, 32)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("scan", [False, True])
def test_the_last_layers_alone(folder, images, layers, scan):
    every, last = Teacher(folder, GRID, 3), Teacher(folder, GRID, 3, layers=layers, scan=scan)
    expected, output = look(every, images), look(last, images)
    np.testing.assert_allclose(output.hidden, expected.hidden[3 - layers :], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.attention, expected.attention, rtol=1e-5)


def test_a_single_channel_is_repeated(folder, images):
    grey = images[..., :1]
    one, three = look(Teacher(folder, GRID, 1), grey), look(Teacher(folder, GRID, 3), jnp.repeat(grey, 3, axis=-1))
    np.testing.assert_allclose(one.hidden, three.hidden, rtol=1e-5, atol=1e-5)


def test_pixel_statistics_come_from_the_folder(images, tmp_path):
    """With mean 0 and deviation 1, pixels of one value keep their value."""
    folder = teachers.write_teacher(tmp_path)
    black = jnp.zeros_like(images)
    own = look(Teacher(folder, GRID, 3), black)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    teacher = Teacher(folder, GRID, 3)
    np.testing.assert_allclose(
        teacher._embed(black)[:, 1:], (teacher.table[:, 1:] + teacher.bias[...]).repeat(2, axis=0), rtol=1e-6
    )
    assert not np.allclose(look(teacher, black).hidden, own.hidden, atol=0.1)


def test_weights_and_products_in_bfloat16(folder, images):
    exact = look(Teacher(folder, GRID, 3), images)
    teacher = Teacher(folder, GRID, 3, dtype="bfloat16")
    assert teacher.last_blocks.mlp.fc1.weight.dtype == jnp.bfloat16
    assert teacher.last_blocks.mlp.fc1.bias.dtype == jnp.float32
    rough = look(teacher, images)
    for name in ("hidden", "attention"):
        got, expected = getattr(rough, name), getattr(exact, name)
        assert got.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(got - expected) < 0.03 * jnp.linalg.norm(expected)


def test_it_is_no_part_of_what_is_learned_or_saved(folder):
    teacher = Teacher(folder, GRID, 3)
    assert named_variables(teacher) == {}
    assert not jax.tree.leaves(nnx.state(teacher, nnx.Param))
    frozen = jax.tree.leaves(nnx.state(teacher, Frozen))
    assert sum(array.size for array in frozen) == teacher.num_parameters


def test_no_gradient_goes_through(folder, images):
    graph, weights = nnx.split(Teacher(folder, GRID, 3))

    def total(weights):
        output = nnx.merge(graph, weights)(images)
        return output.hidden.sum() + output.attention.sum()

    assert not any(gradient.any() for gradient in jax.tree.leaves(jax.grad(total)(weights)))


def test_it_says_what_it_is(folder):
    teacher = Teacher(folder, GRID, 3)
    # Patches, positions, cls; of a block: attention, MLP, norms.
    assert teacher.num_parameters == 32 * 49 + 32 * 17 + 32 + 3 * (4 * 33 * 32 + 64 * 33 + 32 * 65 + 4 * 32)
    assert (teacher.dim, teacher.depth, teacher.num_heads, teacher.patch_size) == (32, 3, 4, (4, 4))
    assert teacher.size == Transformer(32, 3, 4, 2)
    assert teacher.description == f"ViT, 3 blocks of width 32, patches of 4x4 pixels, from {folder}"


def test_neither_torch_nor_transformers_is_needed(folder):
    program = (
        "import sys; sys.modules.update(torch=None, transformers=None, huggingface_hub=None)\n"
        f"from prmim_jax.teacher import Teacher\nprint(Teacher({str(folder)!r}, (4, 4), 3).depth)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "3\n"


def test_a_name_is_looked_up_on_the_hub(folder, images, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    teacher = Teacher("facebook/dino-vitb16", GRID, 3)
    assert_same(look(teacher, images), look(Teacher(folder, GRID, 3), images))
    ((name, patterns),) = asked
    assert name == "facebook/dino-vitb16"
    assert not [pattern for pattern in patterns if not pattern.endswith((".json", ".safetensors"))]


def test_a_name_without_network(monkeypatch):
    def download(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    message = r"teacher: expected a folder, or a model that can be downloaded, got 'a/b' \(no network at all\)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Teacher("a/b", GRID, 3)


def test_a_name_without_the_package_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expected = "teacher: expected a folder, or huggingface_hub installed to download a model"
    with pytest.raises(ImportError, match=f"^{expected}, got 'a/b'; pip install 'prmim\\[hf\\]'$"):
        Teacher("a/b", GRID, 3)


def damaged(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_of(weight_map):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({}, lambda folder: (folder / "config.json").unlink(), "expected a folder with a config.json, got .*"),
        ({}, lambda folder: (folder / "config.json").write_text("{"), r"expected JSON in .*config.json, got .*"),
        ({}, lambda folder: (folder / "config.json").write_text("[]"), r"expected a JSON object in .*, got list"),
        ({"model_type": "siglip"}, None, "expected a model of type clip, .*, dinov2, got 'siglip' in .*"),
        ({"model_type": "dinov2_with_registers"}, None, "expected a model of .*, got 'dinov2_with_registers' in .*"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, None, "expected a DINOv2 model without SwiGLU layers, .*"),
        ({"hidden_act": "relu"}, None, "expected the activation gelu or quick_gelu, got 'relu' in .*"),
        ({"num_hidden_layers": 4}, None, r"expected a tensor 'blocks.3\..*', got none in .*"),
        ({"num_hidden_layers": 0}, None, r"expected a whole number num_hidden_layers in \[1, 1000\], got 0 in .*"),
        ({"num_attention_heads": 5}, None, "expected a divisor of the width 32 as heads, got 5 in .*"),
        ({"intermediate_size": 80}, None, "expected hidden layers of a multiple of the width 32, got 80 in .*"),
        ({"intermediate_size": 96}, None, r"blocks.0.mlp.fc1.weight: expected shape \(96, 32\), got \(64, 32\) in .*"),
        ({"without": "layer.1.*key.bias"}, None, "expected a tensor 'blocks.1.attn.k.bias', got none in .*"),
        ({}, damaged, "expected weights in .safetensors files in .*, got .*"),
        ({}, index_of({"a": "1.safetensors"}), "expected the shard '1.safetensors' next to .*, got no such file"),
        ({}, index_of([]), r"expected an object weight_map in .*, got \[\]"),
        ({}, index_of("x"), "expected an object weight_map in .*, got 'x'"),
        ({}, index_of({"a": 1}), "expected an object weight_map in .*, got {'a': 1}"),
        ({}, lambda folder: (folder / "model.safetensors").unlink(), "expected .*, got no model.safetensors"),
        (
            {},
            lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'),
            "expected image_mean and image_std of 3 channels, got 1 and 3 in .*",
        ),
    ],
)
def test_what_is_no_teacher(tmp_path, changes, spoil, message):
    folder = teachers.write_teacher(tmp_path, **changes)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(ValueError, match=f"^teacher: {message}$"):
        Teacher(folder, GRID, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere"}, r"teacher: expected a folder, or a name on the hub .*, got 'nowhere'"),
        ({"source": "/no/such/folder"}, r"teacher: expected a folder, or a name .*, got '/no/such/folder'"),
        ({"grid_shape": (4,)}, "teacher: expected images of 2 axes, got a grid of 1"),
        ({"channels": 4}, "teacher: expected images of 3 channels, or of 1 to repeat, got 4"),
        ({"layers": 0}, "layers: expected 1 to 3, the teacher's depth, got 0"),
        ({"layers": 4}, "layers: expected 1 to 3, the teacher's depth, got 4"),
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'bfloat16', got 'float16'"),
    ],
    ids=str,
)
def test_wrong_options(folder, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Teacher(**{"source": folder, "grid_shape": GRID, "channels": 3, **changes})

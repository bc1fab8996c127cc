"""Teachers in JAX say what transformers says, and are the same as in PyTorch."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import prmim_jax
import prmim_torch
from tests import teachers

transformers = pytest.importorskip("transformers")

# Images of which size, for a grid of which shape: those that a teacher was made for, and a table to be resized.
GEOMETRIES = {"own": ((16, 16), (4, 4)), "resized": ((18, 20), (3, 5))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {kind: teachers.save_teacher(kind, root / kind.replace(" ", "_")) for kind in teachers.KINDS}


def make_images(*size):
    return np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)


def assert_close(got, expected, atol):
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=1e-4, atol=atol)
    np.testing.assert_allclose(got.attention, expected.attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", teachers.KINDS)
def test_both_adapters_give_the_same(folders, kind, geometry):
    size, grid = GEOMETRIES[geometry]
    here, there = (package.Teacher(folders[kind], grid, 3) for package in (prmim_torch, prmim_jax))
    images = make_images(*size)
    expected, got = here(torch.from_numpy(images)), jax.jit(lambda images: there(images))(jnp.asarray(images))
    assert_close(got, expected, 2e-5)
    for name in ("dim", "depth", "num_heads", "patch_size", "size", "channels", "num_parameters", "description"):
        assert getattr(there, name) == getattr(here, name), name


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2"])
def test_jax_gives_what_transformers_gives(folders, kind):
    """The oracle shares only the file: it resizes pixels and positions by itself."""
    size, grid = GEOMETRIES["resized"]
    images = make_images(*size)
    output = prmim_jax.Teacher(folders[kind], grid, 3)(jnp.asarray(images))
    name = "OPENAI_CLIP" if kind == "clip" else "IMAGENET_DEFAULT"
    mean, std = (torch.tensor(getattr(transformers.image_utils, f"{name}_{part}")) for part in ("MEAN", "STD"))
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, [4 * tokens for tokens in grid], mode="bicubic", align_corners=False)
    build = {"clip": "CLIPVisionModel", "dino": "ViTModel", "dinov2": "Dinov2Model"}[kind]
    model = getattr(transformers, build).from_pretrained(folders[kind], attn_implementation="eager")
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True, output_attentions=True, **options)
    np.testing.assert_allclose(output.hidden, torch.stack(expected.hidden_states[1:]), rtol=1e-4, atol=2e-5)
    attention = expected.attentions[-1][:, :, 0, 1:].mean(1)
    assert attention.std(1).min() > 0.01
    np.testing.assert_allclose(output.attention, attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("clip vision", {"layer_norm_eps": 0.1, "hidden_act": "gelu"}),
        ("dino", {"layer_norm_eps": 0.1, "hidden_act": "quick_gelu"}),
        ("dino", {"image_size": [16, 8], "patch_size": [4, 2], "qkv_bias": False}),
        ("dinov2", {"layer_norm_eps": 0.1, "mlp_ratio": 3}),
    ],
)
def test_configurations_are_obeyed(tmp_path, kind, changes):
    folder = teachers.save_teacher(kind, tmp_path / "teacher", **changes)
    images = make_images(16, 16)
    here, there = (package.Teacher(folder, (4, 4), 3) for package in (prmim_torch, prmim_jax))
    assert_close(there(jnp.asarray(images)), here(torch.from_numpy(images)), 2e-5)


@pytest.mark.parametrize("kind", teachers.KINDS)
def test_what_a_configuration_leaves_out_has_the_same_default(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] if kind == "clip" else config
    for name in ("hidden_act", "layer_norm_eps", "num_channels", "qkv_bias"):
        vision.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    images = make_images(16, 16)
    here, there = (package.Teacher(folder, (4, 4), 3) for package in (prmim_torch, prmim_jax))
    # In float64, or else no eps would be noticed.
    expected = here.double()(torch.from_numpy(images))
    with jax.enable_x64(True):
        for _, variable in nnx.iter_graph(there):
            if isinstance(variable, nnx.Variable):
                variable.set_value(variable[...].astype(np.float64))
        output = there(jnp.asarray(images))
        np.testing.assert_allclose(output.hidden, expected.hidden, rtol=1e-9, atol=1e-9)


def test_products_in_bfloat16_are_as_rough_on_both(folders):
    images = make_images(16, 16)
    here, there = (
        package.Teacher(folders["clip"], (4, 4), 3, dtype="bfloat16") for package in (prmim_torch, prmim_jax)
    )
    exact = prmim_torch.Teacher(folders["clip"], (4, 4), 3)(torch.from_numpy(images)).hidden.numpy()
    for output in (here(torch.from_numpy(images)), there(jnp.asarray(images))):
        error = np.linalg.norm(np.asarray(output.hidden) - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.03

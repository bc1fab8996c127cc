"""Weights of other code in JAX: safetensors, without PyTorch."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from prmim_jax import create_method, import_weights, init_weights, load_weights, save_weights
from prmim_jax.interop import named_weights
from tests.teachers import write_teacher

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(scope="module")
def giver():
    return create_method("mae", **SIZES, **DECODER, throw_ratio=0.0)


@pytest.fixture
def state(giver):
    """Return the weights of a MAE by the names of its authors."""
    named = {}
    for name, array in named_weights(giver).items():
        part, _, rest = name.partition(".")
        named[rest if part == "encoder" or rest == "mask_token" else f"decoder_{rest}"] = array
    return named


def assert_same(here, there):
    assert here.keys() == there.keys()
    for name, array in here.items():
        np.testing.assert_array_equal(array, there[name], err_msg=name)


def test_a_mae_of_its_authors_becomes_a_file_of_ours(giver, state, tmp_path):
    save_file({f"module.{name}": array for name, array in state.items()}, tmp_path / "theirs.safetensors")
    given = {"num_heads": 2, "decoder_heads": 2}
    found = import_weights(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", **given)
    assert found.architecture == giver.architecture()
    taker = create_method("mae", **SIZES, **DECODER, throw_ratio=0.0, init_seed=1)
    load_weights(taker, tmp_path / "ours.safetensors")
    assert_same(named_weights(giver), named_weights(taker))


def test_a_method_starts_from_all_parts_that_fit(giver, state, tmp_path):
    save_weights(giver, tmp_path / "w.safetensors")
    for source, place in ((state, "the state dict (MAE (timm's names))"), (tmp_path / "w.safetensors", None)):
        taker = create_method("mae", **SIZES, **DECODER, init_seed=1, scan_blocks=True)
        line = init_weights(taker, source)
        notes = "; mean and std of pixels: those of ImageNet assumed" if place else ""
        assert line == f"Initial weights: {place or f'{source} (prmim)'}, without cell_head and reconstruct{notes}"
        weights = named_weights(taker)
        assert_same({name: weights[name] for name in named_weights(giver)}, named_weights(giver))


def test_a_vit_of_transformers_in_bfloat16_is_read(tmp_path):
    folder = write_teacher(tmp_path / "vit", dtype=ml_dtypes.bfloat16, intermediate_size=128, hidden_act="gelu")
    with pytest.raises(ValueError, match=r"^source: expected the tensors of ViT in .*, got mismatched: .*mlp.fc1"):
        import_weights(folder)  # its hidden layers are twice as wide as the model, ours four times


def test_files_of_torch_are_sent_to_the_other_backend(tmp_path):
    (tmp_path / "mae.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ValueError, match=r"^source: expected safetensors, .*; `prmim import --backend torch` converts it$"
    ):
        import_weights(tmp_path / "mae.pth")


def test_shards_are_read_together(giver, state, tmp_path):
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = import_weights(tmp_path, num_heads=2, decoder_heads=2)
    assert_same(found.weights, named_weights(giver))

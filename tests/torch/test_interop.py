"""Weights in files."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from prmim_torch import create_method, load_weights, save_weights


@pytest.fixture
def method(tiny):
    return create_method("mae", **tiny)


def weights_of(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def assert_same(method, weights):
    state = method.state_dict()
    assert set(state) == set(weights)
    for name, tensor in state.items():
        assert torch.equal(tensor, weights[name]), name


def test_weights_come_back(tiny, method, tmp_path):
    save_weights(method, tmp_path / "weights.safetensors")
    other = create_method("mae", **tiny, init_seed=1)
    load_weights(other, tmp_path / "weights.safetensors")
    assert_same(other, method.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_file_names_its_architecture(method, tmp_path):
    save_weights(method, str(tmp_path / "weights.safetensors"))
    with safe_open(tmp_path / "weights.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["prmim_architecture"]) == method.architecture()


def test_weights_fit_another_schedule(tiny, method, tmp_path):
    save_weights(method, tmp_path / "weights.safetensors")
    options = {"mask_ratio": 0.5, "throw_ratio": 0.25, "stages": 1, "throwing": "random", "extra_cells": "known"}
    other = create_method("mae", **tiny, **options, init_seed=1)
    load_weights(other, tmp_path / "weights.safetensors")
    assert_same(other, method.state_dict())


def test_device_and_dtype_stay_those_of_the_method(tiny, method, tmp_path, device):
    save_weights(method.to(device), tmp_path / "weights.safetensors")
    other = create_method("mae", **tiny, init_seed=1).to(device).double()
    load_weights(other, tmp_path / "weights.safetensors")
    token = other.encoder.cls_token
    assert token.dtype == torch.float64
    assert token.device.type == device.type
    assert torch.equal(token.float(), method.encoder.cls_token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "weights: depth: expected 1, got 2"),
        ({"reconstruction": "conv"}, "weights: reconstruction: expected 'conv', got 'kernel'"),
        ({"image_size": (16, 32)}, r"weights: image_size: expected \[16, 32\], got \[16, 16\]"),
        ({"channels": 1}, "weights: channels: expected 1, got 3"),
        ({"cells": 1}, r"weights: cells: expected \[1, 1\], got \[2, 2\]"),
        ({"cell_norm": "window"}, "weights: cell_norm: expected 'window', got 'image'"),
        ({"thrown_target": "patch"}, r"weights: cells: expected None, got \[2, 2\]; weights with cells need .*"),
        ({"mean": (0.5, 0.5, 0.5)}, r"weights: mean: expected \[0.5, 0.5, 0.5\], got \[0.485, 0.456, 0.406\]"),
    ],
    ids=str,
)
def test_the_first_field_that_differs_is_named(tiny, method, tmp_path, options, message):
    save_weights(method, tmp_path / "weights.safetensors")
    other = create_method("mae", **{**tiny, **options})
    before = weights_of(other)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_weights(other, tmp_path / "weights.safetensors")
    assert_same(other, before)


def rewrite(path, change, metadata=None):
    with safe_open(path, framework="numpy") as file:
        kept = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, kept if metadata is None else metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.cls_token"), "path: expected a tensor 'encoder.cls_token', got none in .*"),
        (lambda t: t.update(extra=np.zeros(1)), "path: expected no tensor 'extra', got one in .*"),
        (
            lambda t: t.update({"decoder.norm.bias": np.zeros(9)}),
            r"path: decoder.norm.bias: expected shape \(8,\), got \(9,\) in .*",
        ),
        (
            lambda t: t.update({"decoder.norm.bias": np.zeros(8, np.int32)}),
            "path: decoder.norm.bias: expected floating-point values, got torch.int32 in .*",
        ),
    ],
)
def test_tensors_must_be_those_of_the_method(method, tmp_path, change, message):
    path = tmp_path / "weights.safetensors"
    save_weights(method, path)
    rewrite(path, change)
    before = weights_of(method)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_weights(method, path)
    assert_same(method, before)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"prmim_architecture": "{"}, {"prmim_architecture": "[]"}])
def test_files_of_others_are_refused(method, tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_weights(method, path)
    rewrite(path, lambda tensors: None, metadata)
    with pytest.raises(ValueError, match=r"^path: expected weights written by prmim, got .*$"):
        load_weights(method, path)


def test_other_bytes_are_refused(method, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"^path: expected a safetensors file, got .*$"):
        load_weights(method, path)
    with pytest.raises(FileNotFoundError):
        load_weights(method, tmp_path / "nothing.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_in_place_of_the_weights_does_not_block(method, tmp_path):
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a safetensors file, got .*not a regular file, but a pipe"):
        load_weights(method, tmp_path / "weights.safetensors")


def test_a_failed_write_leaves_the_old_file(method, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(method, path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with torch.no_grad():
        method.encoder.cls_token += 1
    with pytest.raises(OSError, match=r"disk full"):
        save_weights(method, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_module_without_architecture_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^method: expected a module with architecture\(\), got Linear$"):
        save_weights(torch.nn.Linear(2, 2), tmp_path / "weights.safetensors")

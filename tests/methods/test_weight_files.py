"""Metadata and tensors of weight files, and atomic writes."""

import hashlib
import json
import re
import sys
from types import SimpleNamespace

import pytest

from prmim_methods import MAEConfig, SimMIMConfig
from prmim_methods.weight_files import (
    METADATA_KEY,
    architecture_of,
    check_architecture,
    check_tensors,
    dump_architecture,
    find_weights,
    read_architecture,
    write_atomically,
)


class Method:
    def architecture(self):
        return {"method": "mae", "dim": 8}


def check_metadata(method, metadata):
    """Do what loading does first."""
    check_architecture(architecture_of(method), read_architecture(metadata, "w.safetensors"))


def test_metadata_round_trip():
    check_metadata(Method(), dump_architecture(Method()))


@pytest.mark.parametrize(
    "config", [MAEConfig(), SimMIMConfig(), MAEConfig(throw_ratio=0)], ids=["mae", "simmim", "dense"]
)
def test_files_that_call_the_reconstruction_variant(config):
    # Earlier versions wrote the field `reconstruction` under the name `variant`.
    values = config.architecture()
    old = {"variant" if name == "reconstruction" else name: value for name, value in values.items()}
    assert set(old) ^ set(values) == {"variant", "reconstruction"}
    check_metadata(config, {METADATA_KEY: json.dumps(old)})
    with pytest.raises(ValueError, match=r"^weights: reconstruction: expected '\w+', got 'conv'$"):
        check_metadata(config, {METADATA_KEY: json.dumps({**old, "variant": "conv"})})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "mae", "dim": 9}, "weights: dim: expected 8, got 9"),
        ({"method": "mae"}, "weights: dim: expected 8, got None"),
        ({"method": "mae", "dim": 8, "depth": 1}, "weights: depth: expected None, got 1"),
        (
            {"method": "mae", "dim": 8, "cells": [2, 2]},
            "weights: cells: expected None, got [2, 2]; weights with cells need thrown_target: cells, or extra_cells",
        ),
        ([1], "path: expected weights written by prmim, got w.safetensors without an architecture"),
    ],
)
def test_errors_name_the_first_field_that_differs(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_metadata(Method(), {METADATA_KEY: json.dumps(values)})


def test_files_without_cells():
    # Such as those from before there were any.
    old = MAEConfig(thrown_target="patch")
    check_metadata(old, dump_architecture(old))
    hint = "weights without cells need thrown_target: patch and extra_cells: none"
    with pytest.raises(ValueError, match=rf"^weights: cells: expected \[2, 2\], got None; {hint}$"):
        check_metadata(MAEConfig(), dump_architecture(old))


def test_classifiers_of_earlier_versions_are_refused_with_the_reason():
    """Their blocks shared one table of relative position bias."""

    class Tuned(Method):
        def architecture(self):
            return {"position": "relative_per_block"}

    metadata = {METADATA_KEY: '{"position": "relative"}'}
    hint = "earlier versions fine-tuned one bias table for all blocks"
    with pytest.raises(
        ValueError, match=rf"^weights: position: expected 'relative_per_block', got 'relative'; {hint}$"
    ):
        check_metadata(Tuned(), metadata)


@pytest.mark.parametrize("metadata", [None, {}, {METADATA_KEY: "{"}, {METADATA_KEY: "[" * 100_000}])
def test_missing_and_corrupt_metadata(metadata):
    with pytest.raises(ValueError, match=r"^path: expected weights written by prmim, got w.safetensors without"):
        check_metadata(Method(), metadata)


def test_objects_without_architecture():
    with pytest.raises(TypeError, match=r"^method: expected a module with architecture\(\), got int$"):
        dump_architecture(3)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({}, "path: expected a tensor 'a', got none in w"),
        ({"a": ((3,), "f32", True)}, "path: a: expected shape (2,), got (3,) in w"),
        ({"a": ((2,), "int8", False)}, "path: a: expected floating-point values, got int8 in w"),
        ({"a": ((2,), "f32", True), "b": ((), "f32", True)}, "path: expected no tensor 'b', got one in w"),
    ],
)
def test_wrong_tensors(got, message):
    check_tensors({"a": (2,)}, {"a": ((2,), "f32", True)}, "w")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_tensors({"a": (2,)}, got, "w")


def test_writes_are_atomic(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk\nfull")

    with pytest.raises(OSError, match="disk"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- files that a path names ---------------------------------------------------------------------------------------


def checkpoint(run, step, content=b"weights"):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(content)
    listed = {"weights.safetensors": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))
    return folder / "weights.safetensors"


def test_a_run_stands_for_its_newest_good_checkpoint(tmp_path):
    good = checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / "damaged_step_00000030").mkdir()
    assert find_weights(tmp_path) == find_weights(good.parent) == find_weights(str(good)) == good
    damaged = checkpoint(tmp_path, 100, b"weighty")
    with pytest.warns(UserWarning, match=f"^the checkpoint {damaged.parent} is damaged, and an earlier one is used$"):
        assert find_weights(tmp_path) == good
    newest = checkpoint(tmp_path, 100_000_000)
    assert find_weights(tmp_path) == newest


def test_where_there_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: expected a file of weights or the folder of a run, got "):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^path: expected weights.safetensors or the checkpoint of a run in "):
        find_weights(tmp_path)
    checkpoint(tmp_path, 3).with_name("manifest.json").unlink()
    with (
        pytest.raises(OSError, match=r"^path: expected a good checkpoint in .*, but all are damaged$"),
        pytest.warns(UserWarning, match="is damaged"),
    ):
        find_weights(tmp_path)


def test_names_on_the_hub_are_downloaded(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").touch()
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    assert find_weights("owner/model") == tmp_path / "weights.safetensors"
    assert asked == [("owner/model", ["weights.safetensors"])]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("nowhere", "runs/typo", "no/where.safetensors", tmp_path / "no" / "where"):
        with pytest.raises(FileNotFoundError, match="path: expected a file of weights or the folder of a run, got"):
            find_weights(path)

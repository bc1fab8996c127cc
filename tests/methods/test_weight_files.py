"""Metadata and tensors of weight files, and atomic writes."""

import json
import re

import pytest

from prmim_methods import MAEConfig, SimMIMConfig
from prmim_methods.weight_files import (
    METADATA_KEY,
    check_metadata,
    check_tensors,
    dump_architecture,
    write_atomically,
)


class Method:
    def architecture(self):
        return {"method": "mae", "dim": 8}


def test_metadata_round_trip():
    check_metadata(Method(), dump_architecture(Method()), "w.safetensors")


@pytest.mark.parametrize(
    "config", [MAEConfig(), SimMIMConfig(), MAEConfig(throw_ratio=0)], ids=["mae", "simmim", "dense"]
)
def test_files_that_call_the_reconstruction_variant(config):
    # Earlier versions wrote the field `reconstruction` under the name `variant`.
    values = config.architecture()
    old = {"variant" if name == "reconstruction" else name: value for name, value in values.items()}
    assert set(old) ^ set(values) == {"variant", "reconstruction"}
    check_metadata(config, {METADATA_KEY: json.dumps(old)}, "w.safetensors")
    with pytest.raises(ValueError, match=r"^weights: reconstruction: expected '\w+', got 'conv'$"):
        check_metadata(config, {METADATA_KEY: json.dumps({**old, "variant": "conv"})}, "w.safetensors")


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
        ([1], "path: expected weights written by prmim, got w.safetensors, whose metadata has none"),
    ],
)
def test_errors_name_the_first_field_that_differs(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_metadata(Method(), {METADATA_KEY: json.dumps(values)}, "w.safetensors")


def test_files_without_cells():
    # Such as those from before there were any.
    old = MAEConfig(thrown_target="patch")
    check_metadata(old, dump_architecture(old), "w.safetensors")
    hint = "weights without cells need thrown_target: patch and extra_cells: none"
    with pytest.raises(ValueError, match=rf"^weights: cells: expected \[2, 2\], got None; {hint}$"):
        check_metadata(MAEConfig(), dump_architecture(old), "w.safetensors")


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
        check_metadata(Tuned(), metadata, "w.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {METADATA_KEY: "{"}, {METADATA_KEY: "[" * 100_000}])
def test_missing_and_corrupt_metadata(metadata):
    with pytest.raises(ValueError, match=r"^path: expected weights written by prmim, got w.safetensors, whose"):
        check_metadata(Method(), metadata, "w.safetensors")


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

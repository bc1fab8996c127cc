"""Files of a checkpoint."""

import json
import os
import re

import pytest

from prmim_methods.checkpoints import find_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.pth"], "a.pth"),
        (["model.safetensors", "pytorch_model.bin", "optimizer.pt"], "model.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["weights.safetensors", "readme.md"], "weights.safetensors"),
    ],
)
def test_the_checkpoint_of_a_folder_is_found(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    found = find_checkpoint(tmp_path)
    assert [path.name for path in found.files] == [expected]
    assert found.is_torch == (not expected.endswith("safetensors"))
    assert (found.config, found.preprocessing) == ({"hidden_size": 8}, {})
    assert find_checkpoint(tmp_path / expected).config == {}


def test_shards_are_found_by_their_index(tmp_path):
    index = {"weight_map": {"a": "1.bin", "b": "2.bin", "c": "1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("1.bin", "2.bin"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    found = find_checkpoint(tmp_path)
    assert [path.name for path in found.files] == ["1.bin", "2.bin"]
    assert found.is_torch
    (tmp_path / "2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"^source: expected the shard '2.bin' next to .*, got no such file$"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"expected a folder with one checkpoint, got none in .*"),
        ({"a.pth": b"PK", "b.pth": b"PK"}, r"expected a folder .*, got 2 of them, 'a.pth', 'b.pth'; name one file"),
        (
            {"a.pth": POINTER.encode()},
            r"expected a checkpoint .*, got the git-LFS pointer .*; `git lfs pull` fetches .*",
        ),
        ({"a.pth": b"<html>"}, r"expected a checkpoint .*, got .*a.pth, which is no checkpoint"),
        ({"a.pth": b"PK", "config.json": b"{"}, r"expected JSON in .*config.json, got .*"),
        ({"a.pth": b"PK", "config.json": b"[]"}, r"expected a JSON object in .*config.json, got list"),
        ({"m.index.json": b"{}"}, r"expected an object weight_map in .*, got None"),
        ({"m.index.json": b'{"weight_map": {"a": "../a.pth"}}'}, r"expected the shard '../a.pth' next to .*"),
        (
            {
                "m.index.json": b'{"weight_map": {"a": "a.pth", "b": "b.safetensors"}}',
                "a.pth": b"PK",
                "b.safetensors": b"",
            },
            r"expected shards of one format, got several in .*",
        ),
    ],
)
def test_other_folders_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^source: {message}$"):
        find_checkpoint(tmp_path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"^source: expected a checkpoint .*, got .*notes.txt, which is no checkpoint$"
    ):
        find_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=re.escape(f"got {tmp_path / 'nothing.pth'}, which does not exist")):
        find_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"not a regular file, but a pipe"):
        find_checkpoint(tmp_path / "a.pth")

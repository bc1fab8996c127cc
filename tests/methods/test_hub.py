"""Folders on this machine, or repositories of the hub in their place."""

import re
import sys
from types import SimpleNamespace

import pytest

from prmim_methods.hub import find_folder, local_folder


def test_a_name_is_downloaded_with_the_wanted_files(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    assert find_folder("owner/model", "run", ("*.json",)) == tmp_path
    assert find_folder(tmp_path, "run", ("*.json",)) == tmp_path
    assert asked == [("owner/model", ["*.json"])]


@pytest.mark.parametrize("source", ["model", "owner/model/more", "owner/mod el", "-/", "../x y"])
def test_texts_that_are_no_names(source):
    message = f"init_weights: expected a folder, or a name on the hub (owner/name), got {source!r}"
    for find in (
        lambda: find_folder(source, "init_weights", ()),
        lambda: local_folder(source, "init_weights", "a.json"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            find()


def test_offline_it_is_one_line(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"^run: expected a folder, or a model that can be downloaded, got 'o/m' \(.*outgoing traffic has been dis.*\)$"
    )
    with pytest.raises(ValueError, match=message):
        find_folder("o/m", "run", ())

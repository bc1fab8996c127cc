"""Upload of a run: one commit, and a card with the run's own numbers."""

import os
import re
from unittest.mock import create_autospec

import pytest
import torch
import yaml

from prmim_train.cli.commands import main
from prmim_train.run.directory import RunDirectory
from prmim_train.run.files import write_json

hub = pytest.importorskip("huggingface_hub")

EVALUATION = {"train_images": 90, "test_images": 10, "classes": 2, "most_frequent_class": 0.5}
SUMMARY = {
    "method": "mae",
    "data": "photos | 100 images",
    "train_images": 90,
    "steps": 7,
    "loss": 0.51239,
    "device": "cpu",
    "evaluation": {**EVALUATION, "trained": {"knn": 0.9, "linear": 0.8}},
}


@pytest.fixture
def api(monkeypatch):
    """The hub's client, which accepts what the real one accepts, and keeps it."""
    client = create_autospec(hub.HfApi, instance=True)
    client.create_commit.return_value.commit_url = "https://hub/owner/model/commit/1"
    monkeypatch.setattr(hub, "HfApi", lambda: client)
    return client


@pytest.fixture
def run(make_run, tmp_path):
    method = make_run()
    run = RunDirectory(tmp_path / "run")
    run.write_summary(SUMMARY)
    for name in ("loss.png", "evaluation/confusion_knn.png"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(b"png")
    return run, method


def push(run, *words):
    return main(["push", "owner/model", "--run", str(run.path), *words])


def uploaded(api):
    ((repo, operations), _) = api.create_commit.call_args
    assert repo == "owner/model"
    return {operation.path_in_repo: operation for operation in operations}


def content(operation):
    with operation.as_file() as file:
        return file.read()


def test_all_files_are_one_commit(api, run, capsys):
    run, _ = run
    assert push(run, "--private") == 0
    assert capsys.readouterr().out == "Uploaded: https://hub/owner/model/commit/1\n"
    api.create_repo.assert_called_once_with("owner/model", private=True, exist_ok=True)
    api.create_commit.assert_called_once()
    files = uploaded(api)
    assert set(files) == {"README.md", "weights.safetensors", "config.yaml", "loss.png"}
    assert content(files["weights.safetensors"]) == (run.checkpoints()[0] / "weights.safetensors").read_bytes()
    assert content(files["config.yaml"]) == (run.path / "config.yaml").read_bytes()
    assert content(files["loss.png"]) == b"png"


def test_the_card_states_the_numbers_of_the_run(api, run):
    run, method = run
    assert push(run) == 0
    card = content(uploaded(api)["README.md"]).decode()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["tags"] == ["prmim", "masked-image-modeling", "mae"]
    assert 'encoder = prmim_torch.load_encoder("owner/model")' in text
    assert "uint8 (batch, 16, 16, 3) to (batch, 24)" in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {cell[0].removeprefix("| "): cell[1].removesuffix(" |") for cell in cells if len(cell) == 2}
    assert rows["data"] == "photos / 100 images"
    assert rows["final loss"] == "0.5124"
    assert rows["checkpoint"] == "step 7"
    assert rows["tokens"] == f"grid of 4 x 4; {method.config.summary()}"
    assert "MACs forward per image (-" in rows["cost"]
    assert re.search(r"trained encoder +90.0 % +80.0 %\n", text)
    assert "![loss.png](loss.png)" in text


def test_the_code_of_the_card_loads_what_was_uploaded(api, run, tmp_path, monkeypatch):
    run, method = run
    assert push(run) == 0
    files = uploaded(api)
    place = tmp_path / "downloaded"
    place.mkdir()

    def download(name, allow_patterns):
        assert name == "owner/model"
        for file in allow_patterns:
            (place / file).write_bytes(content(files[file]))
        return str(place)

    monkeypatch.setattr(hub, "snapshot_download", download)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    namespace = {"images": images}
    code = content(files["README.md"]).decode().partition("```python\n")[2].partition("```")[0]
    exec(code, namespace)
    assert torch.equal(namespace["features"], method.features(images))


def test_a_newer_evaluation_of_the_checkpoint_replaces_that_of_the_summary(api, run):
    run, _ = run
    found = {**EVALUATION, "trained": {"knn": 0.7}}
    write_json(run.path / "evaluation.json", {**found, "step": 7})
    assert push(run) == 0
    assert "70.0 %" in content(uploaded(api)["README.md"]).decode()
    assert "evaluation/confusion_knn.png" in uploaded(api)
    write_json(run.path / "evaluation.json", {**found, "step": 6})
    assert push(run, "--no_pictures") == 0
    card = content(uploaded(api)["README.md"]).decode()
    assert "70.0 %" not in card
    assert "90.0 %" in card
    assert not [name for name in uploaded(api) if name.endswith(".png")]


def test_numbers_of_another_step_are_not_stated(api, run):
    run, _ = run
    for steps, state in ((8, ", an earlier checkpoint"), (6, " of an unfinished run")):
        run.write_summary({**SUMMARY, "steps": steps})
        assert push(run) == 0
        card = content(uploaded(api)["README.md"]).decode()
        assert f"| checkpoint | step 7{state} |" in card
        assert "Not evaluated." in card
        assert "0.5124" not in card


def test_numbers_that_a_short_run_lacks_are_left_out(api, run):
    run, _ = run
    run.write_summary({**SUMMARY, "loss": None, "images_per_second": None})
    assert push(run) == 0
    card = content(uploaded(api)["README.md"]).decode()
    assert "final loss" not in card
    assert "images per second" not in card


def test_pictures_of_an_earlier_checkpoint_are_left_out(api, run):
    run, _ = run
    written = run.checkpoints()[-1].stat().st_mtime
    os.utime(run.path / "loss.png", (written - 1, written - 1))
    (run.path / "schedule.png").write_bytes(b"png")
    assert push(run) == 0
    assert [name for name in uploaded(api) if name.endswith(".png")] == ["schedule.png"]


def test_a_refused_upload_is_one_line(api, run, capsys):
    run, _ = run
    api.create_repo.side_effect = OSError("401 Client Error.\nInvalid user token.")
    assert push(run) == 2
    message = "prmim: error: repo: expected one that can be written, got 'owner/model' (401 Client Error. Invalid user "
    assert capsys.readouterr().err.startswith(message)


def test_offline_it_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push(run[0]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "offline mode is enabled" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model"], "repo: expected owner/name, got 'model'"),
        ([], "repo: expected the name of a repository, owner/name, got nothing"),
        (["owner/model", "--checkpoint", "3"], "checkpoint: expected one of the steps 7 in"),
    ],
)
def test_wrong_words(words, message, api, run, capsys):
    assert main(["push", *words, "--run", str(run[0].path)]) == 2
    assert capsys.readouterr().err.startswith(f"prmim: error: {message}")
    api.create_commit.assert_not_called()


def test_without_the_package_it_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr("prmim_train.config.packages.find_spec", lambda name: None)
    assert push(run[0]) == 2
    assert capsys.readouterr().err == (
        "prmim: error: repo: huggingface_hub is not installed; pip install 'prmim[hf]'\n"
    )

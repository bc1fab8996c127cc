"""Untrusted runs, options and checkpoints execute no code.

Nothing is written outside of the run.
"""

import hashlib
import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from prmim_train.cli.commands import main
from prmim_train.config.layers import parse_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.budget import training_budget
from prmim_train.run.engine import create_engine


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.marker)!r}).mkdir(exist_ok=True)",)


def plain(bomb):
    return pickle.dumps(bomb)


def zipped(bomb):
    """Pack a pickle as `torch.save` does."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def array(bomb):
    """Pack a pickle as NumPy does for object arrays."""
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    return file.getvalue()


PACKINGS = {"pickle": plain, "torch": zipped, "numpy": array}
PLANTED = (
    *("training_state.pt", "training_state.pkl", "optimizer.pt", "weights.pt", "pytorch_model.bin", "model.npz"),
    *("training_state/.metadata", "training_state/__0_0.distcp", "training_state/__0_0.pt"),
    *("training_state/checkpoint", "training_state/state.pickle", "training_state/state.npy"),
)
"""File names that current and former libraries unpickle."""


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_bomb_goes_off_where_something_unpickles(packing, tmp_path):
    marker = tmp_path / "marker"
    content = PACKINGS[packing](Bomb(marker))
    if packing == "numpy":
        np.load(io.BytesIO(content), allow_pickle=True)
    elif packing == "torch":
        torch = pytest.importorskip("torch")
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert marker.is_dir()


@pytest.fixture(params=["torch", "jax"])
def trained(request, tiny):
    """A saved engine of a real backend."""
    pytest.importorskip("torch" if request.param == "torch" else "flax")
    request.getfixturevalue({"torch": "one_thread", "jax": "quick_compiler"}[request.param])
    options = {"backend": request.param, "batch_size": 240, "epochs": 2, "checkpoint_every": 1}
    config = tiny(**options)
    budget = training_budget(config, 1438)
    engine = create_engine(config, budget)
    engine.train_step(np.zeros((240, 16, 16, 1), dtype=np.uint8), np.arange(240))
    place = config.run_path / "engine"
    place.mkdir(parents=True)
    engine.save(place)
    return config, budget, place


def restore(config, budget, place):
    engine = create_engine(config, budget)
    engine.restore(place)
    return engine


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_pickle_beside_the_training_state_is_not_looked_at(trained, packing, tmp_path):
    config, budget, place = trained
    marker = tmp_path / "marker"
    for name in PLANTED:
        (place / name).write_bytes(PACKINGS[packing](Bomb(marker)))
    try:
        assert restore(config, budget, place).step == 1
    except ValueError as error:  # unknown files may be refused
        assert "\n" not in str(error)  # noqa: PT017
    assert not marker.exists()


# If orbax fails to read, it leaves an event loop behind that warns when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pickle_in_place_of_any_file_is_not_executed(trained, tmp_path):
    config, budget, place = trained
    marker = tmp_path / "marker"
    content = plain(Bomb(marker))
    engine = create_engine(config, budget)
    refused = 0
    files = sorted(path for path in place.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(place, copy)
        (copy / path.relative_to(place)).write_bytes(content)
        try:
            engine.restore(copy)
        except (ValueError, OSError):
            refused += 1
        assert not marker.exists(), path
    assert refused >= 2  # weights and state


CODE = [
    "!!python/object/apply:os.mkdir ['{marker}']",
    "!!python/object/new:os.mkdir ['{marker}']",
    "!!python/object/apply:subprocess.check_call [['mkdir', '{marker}']]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
]


def test_the_first_of_these_goes_off_where_yaml_is_read_carelessly(tmp_path):
    import yaml

    yaml.unsafe_load(CODE[0].format(marker=tmp_path / "marker"))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("name", ["epochs", "data", "init_weights", "out"])
def test_code_in_the_options_of_a_run_is_refused(code, name, tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words]) == 0
    run = tmp_path / "run"
    kept = [line for line in (run / "config.yaml").read_text().splitlines() if not line.startswith(f"{name}:")]
    (run / "config.yaml").write_text("\n".join([*kept, f"{name}: " + code.format(marker=tmp_path / "marker")]) + "\n")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prmim: error: config: expected YAML")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["{tmp}/elsewhere", "../elsewhere", "run/../elsewhere"])
def test_a_run_cannot_name_another_place_to_write_to(place, tiny_words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *tiny_words]) == 0
    run = tmp_path / "run"
    with (run / "config.yaml").open("a") as file:
        file.write(f"out: {place.format(tmp=tmp_path)}\n")
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(run)}
    assert main(["pretrain", "--resume", "--out", str(run), "--epochs", "2"]) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(run)} == before
    assert "out" not in parse_options((run / "config.yaml").read_text(), "config.yaml")
    assert "24" in sorted(path.name for path in (run / "checkpoints").iterdir())[-1]


def test_weights_to_begin_with_are_only_read(tiny_words, tmp_path, capsys):
    secret = tmp_path / "notes.txt"
    secret.write_text("mine")
    assert main(["pretrain", *tiny_words]) == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    text = (run / "config.yaml").read_text().replace("init_weights: null", f"init_weights: {secret}")
    (run / "config.yaml").write_text(text)
    assert main(["pretrain", "--resume", "--out", str(run)]) != 0
    assert secret.read_text() == "mine"
    assert "mine" not in capsys.readouterr().err


def test_a_link_in_place_of_the_metrics_is_not_written_through(tiny_words, tmp_path):
    assert main(["pretrain", *tiny_words]) == 0
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "metrics.jsonl").rename(outside)
    (run / "metrics.jsonl").symlink_to(outside)
    before = outside.read_bytes()
    assert main(["pretrain", "--resume", "--out", str(run), "--epochs", "2"]) == 0
    assert outside.read_bytes() == before
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 24


def test_a_link_that_looks_half_written_or_old_does_not_delete_what_it_points_to(tiny_words, tmp_path):
    assert main(["pretrain", *tiny_words]) == 0
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "photo.jpg").write_text("mine")
    (run / "checkpoints" / ".step_00000001.partial").symlink_to(outside)
    (run / "checkpoints" / "step_00000001").symlink_to(outside)
    main(["pretrain", "--resume", "--out", str(run), "--epochs", "2"])
    assert (outside / "photo.jpg").read_text() == "mine"


def test_a_checksum_of_a_file_elsewhere_is_not_taken(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words, "--checkpoint_every", "1", "--epochs", "2"]) == 0
    run = tmp_path / "run"
    place = sorted((run / "checkpoints").iterdir())[-1]
    manifest = place / "manifest.json"
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 10)
    text = manifest.read_text()
    first = next(path.name for path in sorted(place.iterdir()) if path.name != "manifest.json")
    assert first in text
    manifest.write_text(text.replace(f'"{first}"', '"../../../outside"'))
    assert hashlib.sha256(outside.read_bytes()).hexdigest() not in text
    capsys.readouterr()
    main(["pretrain", "--resume", "--out", str(run), "--epochs", "3"])
    captured = capsys.readouterr()
    assert place.name in captured.err + captured.out
    assert outside.read_bytes() == b"x" * 10


def test_the_options_of_a_run_are_those_that_were_given(tiny_words, tmp_path):
    assert main(["pretrain", *tiny_words]) == 0
    read = parse_options((tmp_path / "run" / "config.yaml").read_text(), "config.yaml")
    assert pretrain_config(**read).epochs == 1

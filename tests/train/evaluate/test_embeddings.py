"""`prmim features` on the backend of the tests."""

import json
import sys

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.numpy import save_file

from prmim_methods.weight_files import dump_architecture
from prmim_train.cli.commands import main
from prmim_train.config.training import SourceOptions
from prmim_train.evaluate import embeddings
from prmim_train.evaluate.embeddings import read_info
from prmim_train.pretrain import pretrain
from prmim_train.run.directory import RunDirectory


@pytest.fixture
def run(tiny, monkeypatch):
    """A run of 12 steps.

    Features are written in parts of 500 images; the digits have four.
    """
    config = tiny()
    pretrain(config)
    monkeypatch.setattr(embeddings, "PART", 500)
    engine = sys.modules["prmim_fake"].EncoderEngine
    monkeypatch.setattr(engine, "calls", 0)
    monkeypatch.setattr(engine, "fails_at", None)
    return config.run_path


@pytest.fixture
def features(run):
    """Call the command."""
    return lambda out, *more, run=run: main(["features", "--run", str(run), "--out", str(out), *map(str, more)])


@pytest.fixture
def engine(run):
    return sys.modules["prmim_fake"].EncoderEngine


def expected(run):
    """Return the digits' features by the weights of the checkpoint."""
    from safetensors.numpy import load_file
    from sklearn.datasets import load_digits

    from prmim_core import patchify
    from prmim_train.data.batches import evaluation_batches
    from prmim_train.data.sources import open_source

    weights = load_file(RunDirectory(run).latest_checkpoint() / "weights.safetensors")["encoder"]
    with evaluation_batches(open_source("digits", channels=1), batch_size=1797, image_size=(16, 16)) as batches:
        images = next(iter(batches)).images
    return (patchify(images / 255.0, (4, 4)).reshape(1797, -1) @ weights).astype(np.float32), load_digits().target


def folders(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith("."))


def test_features_of_all_images_with_names_and_labels(run, features, engine, tmp_path, capsys):
    assert features(tmp_path / "new" / "f.npz") == 0
    found = np.load(tmp_path / "new" / "f.npz", allow_pickle=False)
    values, labels = expected(run)
    np.testing.assert_allclose(found["features"], values, rtol=1e-5)
    assert found["features"].dtype == np.float32
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["class_names"].tolist() == [str(digit) for digit in range(10)]
    assert found["names"][[0, -1]].tolist() == ["image 0", "image 1796"]
    info = read_info(tmp_path / "new" / "f.npz")
    assert info["encoder"].endswith("step_00000012/weights.safetensors")
    assert (info["images"], info["unreadable"], info["job"]["image_size"]) == (1797, 0, [16, 16])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.npz"]
    calls = engine.calls
    assert features(tmp_path / "new" / "f.npz") == 0
    assert engine.calls == calls
    *_, written, again = capsys.readouterr().out.splitlines()
    assert written.endswith("f.npz, 1,797 images, 32 values each")
    assert again.startswith("Already complete: ")


def test_a_given_null_is_no_missing_option(features, tmp_path, monkeypatch):
    caches, opened = [], embeddings.open_source

    def open_source(*values, options, **others):
        caches.append(options.cache)
        return opened(*values, options=options, **others)

    monkeypatch.setattr(embeddings, "open_source", open_source)
    for number, words in enumerate(([], ["--cache", "null"])):
        assert features(tmp_path / f"{number}.npz", *words) == 0
    assert caches == [SourceOptions().cache, None]


def test_a_table_has_the_same_content(features, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("f.npz", "f.parquet"):
        assert features(tmp_path / name) == 0
    table, arrays = parquet.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "f.npz", allow_pickle=False)
    assert table.column_names == ["name", "features", "label", "class_name"]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), arrays["features"])
    assert table["name"].to_pylist() == arrays["names"].tolist()
    assert table["class_name"].to_pylist() == arrays["class_names"][arrays["labels"]].tolist()
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    assert read_info(tmp_path / "f.parquet") == read_info(tmp_path / "f.npz")
    assert features(tmp_path / "f.parquet") == 0


def test_a_continued_job_writes_what_an_uninterrupted_one_does(features, engine, tmp_path, capsys):
    assert features(tmp_path / "whole.npz") == 0
    per_job = engine.calls
    engine.calls, engine.fails_at = 0, per_job // 2
    assert features(tmp_path / "f.npz") == 1
    assert capsys.readouterr().err == "prmim: error: no space left\n"
    (folder,) = (entry for entry in tmp_path.iterdir() if entry.name == ".f.npz.parts")
    done = [path.name for path in sorted(folder.glob("part_*"))]
    assert done
    (folder / ".part_00000001.npz.partial-0123").write_bytes(b"half")
    (tmp_path / ".f.npz.partial-0123").write_bytes(b"half")
    engine.calls, engine.fails_at = 0, None
    assert features(tmp_path / "f.npz") == 0
    assert 0 < engine.calls < per_job
    assert (tmp_path / "f.npz").read_bytes()[:4] == b"PK\x03\x04"
    whole, continued = (np.load(tmp_path / name, allow_pickle=False) for name in ("whole.npz", "f.npz"))
    for name in whole.files:
        np.testing.assert_array_equal(continued[name], whole[name], err_msg=name)
    assert folders(tmp_path) == []


def test_parts_and_files_of_another_job_are_left_alone(features, engine, tmp_path, capsys):
    engine.fails_at = 9
    assert features(tmp_path / "f.npz") == 1
    assert features(tmp_path / "f.npz", "--pool", "cls") == 2
    assert "f.npz.parts, got some with another pool: 'mean' instead of 'cls'" in capsys.readouterr().err
    assert features(tmp_path / "f.npz") == 0
    content = (tmp_path / "f.npz").read_bytes()
    assert features(tmp_path / "f.npz", "--layer", "1") == 2
    assert "f.npz exists, with features with another layer: None instead of 1" in capsys.readouterr().err
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert features(tmp_path / "images.npz") == 2
    assert "images.npz exists, with other content" in capsys.readouterr().err
    assert (tmp_path / "f.npz").read_bytes() == content


def test_damaged_parts_are_named(features, engine, tmp_path, capsys):
    engine.fails_at = 9
    assert features(tmp_path / "f.npz") == 1
    part = tmp_path / ".f.npz.parts" / "part_00000000.npz"
    part.write_bytes(part.read_bytes()[:100])
    assert features(tmp_path / "f.npz") == 2
    assert f"expected a part of the features in {part}, which is damaged" in capsys.readouterr().err
    part.unlink()
    assert features(tmp_path / "f.npz") == 0


def test_two_commands_do_not_write_one_file(features, tmp_path, capsys):
    (tmp_path / ".f.npz.parts").mkdir()
    with FileLock(tmp_path / ".f.npz.parts" / ".lock"):
        assert features(tmp_path / "f.npz") == 1
    assert "another process is writing" in capsys.readouterr().err
    assert features(tmp_path / "f.npz") == 0


def test_unreadable_images_are_left_out_and_told(features, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embeddings, "PART", 2)
    for name in ("a/0", "a/1", "b/2", "b/3", "b/4"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in ("a/1", "b/4"):
            path.write_bytes(b"")
        else:
            Image.fromarray(np.full((20, 20), 50, np.uint8)).save(path)
    assert features(tmp_path / "f.npz", "--data", tmp_path / "photos") == 0
    out = capsys.readouterr().out
    assert "2 of 5 images could not be read and were left out: a/1.png (empty file); b/4.png (empty file)" in out
    found = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert found["names"].tolist() == ["a/0.png", "b/2.png", "b/3.png"]
    assert found["labels"].tolist() == [0, 1, 1]
    assert found["features"].shape == (3, 32)
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")
    assert features(tmp_path / "g.npz", "--data", tmp_path / "photos") == 2
    assert "data: expected images that can be read, got 5 that cannot" in capsys.readouterr().err
    assert folders(tmp_path) == []


WRONG = [
    (["--layer", "2"], "layer: expected 0 to 1, the number of blocks, or null, got 2"),
    (["--pool", "max"], "pool: expected 'mean' or 'cls', got 'max'"),
    (["--image_size", "18"], "image_size: expected multiples of the patch size 4 x 4, got 18 x 18"),
    (["--image_size", "8000"], "image_size: expected at most 1,048,576 patches of an image, got 4,000,000"),
    (["--batch_size", "0"], "batch_size: expected a whole number of at least 1, got 0"),
    (["--checkpoint", "7"], "checkpoint: expected one of the steps 12 in"),
    (["--out", "f.csv"], "out: expected a file .npz or .parquet, got 'f.csv'"),
    (["--data", "nowhere"], "data: "),
    (["--run", "nowhere"], "run: expected the folder of a run, but there is no config.yaml in nowhere"),
    (["--run", __file__], f"run: expected a run or a safetensors file, got {__file__}"),
]


def test_wrong_options_are_one_line_and_leave_nothing(features, tmp_path, capsys):
    capsys.readouterr()
    for options, message in WRONG:  # one run for all
        assert features(tmp_path / "f.npz", *options) == 2, options
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"prmim: error: {message}")
        assert not list(tmp_path.glob("*f.npz*"))


def test_weights_of_a_file_must_be_finite(features, tiny, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    save_file({"encoder": np.full(3, np.nan, np.float32)}, path, dump_architecture(tiny().method))
    assert features(tmp_path / "f.npz", run=path) == 2
    assert f"run: expected finite weights, got NaN or infinity in encoder of {path}" in capsys.readouterr().err


def test_out_must_be_given(run, capsys):
    assert main(["features", "--run", str(run)]) == 2
    assert "out: expected the file to write, as in --out features.npz, got nothing" in capsys.readouterr().err


def test_files_that_are_no_features(tmp_path):
    np.savez(tmp_path / "f.npz", info=np.array(json.dumps([1])))
    with pytest.raises(ValueError, match=r"^out: expected a file of features, got "):
        read_info(tmp_path / "f.npz")

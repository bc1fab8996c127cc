import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from prmim_train.cli.commands import main
from prmim_train.evaluate import features
from prmim_train.evaluate.features import _spread, evaluate_run, format_evaluation, shrunken_pixels
from prmim_train.pretrain import pretrain
from prmim_train.run.engine import create_engine
from prmim_train.run.prepare import open_data


def test_frozen_features_of_the_digits_beat_chance(tiny):
    config = tiny(eval_limit=600)
    data = open_data(config)
    result = evaluate_run(config, data, create_engine(config, data.budget))
    assert (result["train_images"], result["test_images"], result["classes"]) == (600, 359, 10)
    for name in ("trained", "untrained", "pixels"):
        assert result[name]["knn"] > 0.7
        assert result[name]["linear"] > 0.7
    assert result["trained"] == result["untrained"]  # no step was taken
    assert 0.05 < result["most_frequent_class"] < 0.2
    assert format_evaluation(result).count("%") == 8


def test_baselines_are_left_out_where_they_are_not_wanted(tiny, capsys):
    config = tiny(eval_limit=100)
    pretrain(config)
    command = ["evaluate", "--run", str(config.run_path), "--protocol", "knn"]
    found = []
    for more in ([], ["--no_baselines"]):
        assert main([*command, *more]) == 0
        found.append(json.loads((config.run_path / "evaluation.json").read_text()))
    whole, alone = found
    assert set(whole) - set(alone) == {"untrained", "pixels"}
    assert alone == {name: value for name, value in whole.items() if name in alone}
    assert "raw pixels" not in capsys.readouterr().out.rpartition("Accuracy on")[2]


def test_without_labels_or_held_out_images_the_reason_is_told(tiny, tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros((20, 16, 16), dtype=np.uint8))
    for changes, reason in [({"data": str(tmp_path / "plain.npz")}, "no labels"), ({"holdout": 0.0}, "held out")]:
        config = tiny(eval_limit=10, **changes)
        data = open_data(config)
        result = evaluate_run(config, data, create_engine(config, data.budget))
        assert reason in result["skipped"]
        assert format_evaluation(result).startswith("No evaluation: ")


def test_one_class_is_no_task(tiny, tmp_path):
    np.savez(tmp_path / "one.npz", images=np.zeros((20, 16, 16), np.uint8), labels=np.zeros(20, np.int64))
    config = tiny(data=str(tmp_path / "one.npz"), eval_limit=10)
    data = open_data(config)
    assert "one class" in evaluate_run(config, data, create_engine(config, data.budget))["skipped"]


@pytest.fixture
def table(tmp_path):
    """Path of 80 images of four classes, two of them to a coarse class."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = []
    for pixels in np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8):
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        contents.append(file.getvalue())
    labels = np.arange(80) % 4
    parquet.write_table(pa.table({"image": contents, "label": labels, "coarse": labels // 2}), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_another_column_of_labels_is_no_other_data(tiny, table):
    config = tiny(data=table, label_key="coarse", batch_size=64)
    pretrain(config)
    for words, classes in (([], 2), (["--label_key", "label"], 4), (["--label_key", "null"], 4)):
        command = ["evaluate", "--run", str(config.run_path), "--protocol", "knn", "--no_baselines", *words]
        assert main([*command, "--eval_limit", "20"]) == 0
        assert json.loads((config.run_path / "evaluation.json").read_text())["classes"] == classes


def test_images_that_vanish_end_no_run_and_are_told_by_the_command(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "photos" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"{number}.png")
    config = tiny(data=str(tmp_path / "photos"), holdout=0.5, batch_size=6, eval_limit=10)
    pretrain(config)
    data = open_data(config)
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")
    result = evaluate_run(config, data, create_engine(config, data.budget))
    assert result["skipped"].startswith("data: none of the images can be read")
    capsys.readouterr()
    words = ["evaluate", "--run", str(config.run_path)]
    assert main(words) == 2
    assert "got images of other names, sizes or pixels" in capsys.readouterr().err
    assert main([*words, "--allow_changes"]) == 2
    assert capsys.readouterr().err.startswith("prmim: error: data: none of the images can be read")


def test_other_processes_are_told_that_there_is_no_evaluation(tiny, monkeypatch, capsys):
    config = tiny()
    pretrain(config)
    flags = []
    engine = sys.modules["prmim_fake"].EncoderEngine
    monkeypatch.setattr(engine, "any", lambda self, flag: flags.append(flag) or flag)
    monkeypatch.setattr(features, "_classify", lambda *given: features.Evaluation({"skipped": "one class"}, None, {}))
    assert main(["evaluate", "--run", str(config.run_path), "--no_baselines", "--eval_limit", "20"]) == 2
    assert capsys.readouterr().err == "prmim: error: data: one class\n"
    assert flags[-1]  # they wait for this flag


def test_shrinking_keeps_means_and_the_limit():
    images = np.random.default_rng(0).integers(0, 255, (2, 96, 64, 3), dtype=np.uint8)
    small = shrunken_pixels(images)
    assert small.shape == (2, 32 * 32 * 3)
    assert small.reshape(2, 32, 32, 3)[1, 2, 3, 0] == pytest.approx(images[1, 6:9, 6:8, 0].mean() / 255)
    assert shrunken_pixels(images[:, :33, :33]).shape == (2, 16 * 16 * 3)
    assert shrunken_pixels(images[:, :8, :8]).shape == (2, 8 * 8 * 3)


def test_a_limited_choice_is_spread_over_all():
    assert _spread(np.arange(100), 3).tolist() == [0, 50, 99]
    assert _spread(np.arange(4), 9).tolist() == [0, 1, 2, 3]

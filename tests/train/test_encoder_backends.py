"""Encoders of a small run, used alone and at twice the size, on both backends.

Images have 8 x 8 and 16 x 16 pixels.
"""

import json

import numpy as np
import pytest

from prmim_train.cli.commands import main
from prmim_train.data.batches import evaluation_batches
from prmim_train.data.sources import open_source
from prmim_train.evaluate.embeddings import read_info
from prmim_train.run.directory import RunDirectory

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

SMALL = {
    **{"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "epochs": 2, "batch_size": 240},
    **{"method": "simmim", "mask_unit": 2, "base_learning_rate": 0.01, "device": "cpu", "eval_limit": 0, "pictures": 0},
}
"""12 steps on the digits. SimMIM's bias depends on the grid, and so does its kernel."""
TRAINED = {"epochs": 1, "batch_size": 120, "log_every": 5, "mixup": 0, "cutmix": 0}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "run"
    assert main(["pretrain", "--out", str(path), *words(SMALL)]) == 0
    return path


def evaluate(run, *given):
    assert main(["evaluate", "--run", str(run), *map(str, given)]) == 0


def digits(size, number=64):
    with evaluation_batches(open_source("digits", channels=1), batch_size=number, image_size=(size, size)) as batches:
        return next(iter(batches)).images


def test_features_of_the_command_are_those_of_the_function_and_of_the_evaluation(run, tmp_path):
    import prmim_torch

    assert main(["features", "--run", str(run), "--out", str(tmp_path / "torch.npz"), "--image_size", "16"]) == 0
    found = np.load(tmp_path / "torch.npz", allow_pickle=False)["features"]
    encoder = prmim_torch.load_encoder(run, image_size=16)
    np.testing.assert_array_equal(found[:64], encoder(torch.from_numpy(digits(16))).numpy())
    # A file of weights is as good as a run, and JAX computes the same.
    weights = RunDirectory(run).latest_checkpoint() / "weights.safetensors"
    out = tmp_path / "jax.npz"
    given = ["--run", str(weights), "--out", str(out), "--image_size", "16", "--backend", "jax", "--device", "cpu"]
    assert main(["features", *given, "--precision", "float32"]) == 0
    np.testing.assert_allclose(np.load(out, allow_pickle=False)["features"], found, rtol=0, atol=1e-5)
    assert read_info(out)["job"]["weights"] == read_info(tmp_path / "torch.npz")["job"]["weights"]


def test_frozen_features_at_twice_the_size(run, capsys):
    found = {}
    for size in (8, 16):
        evaluate(run, "--image_size", size, "--eval_limit", 300, "--no_baselines")
        assert f"image size: {size} x {size} pixels\n" in capsys.readouterr().out
        found[size] = json.loads((run / "evaluation.json").read_text())
        assert found[size]["image_size"] == [size, size]
        assert found[size]["trained"]["linear"] > 0.2


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_classifiers_at_twice_the_size(run, protocol, tmp_path):
    solver = ["--solver", "lars"] if protocol == "linear" else []
    out = tmp_path / protocol
    evaluate(run, "--protocol", protocol, *solver, "--image_size", 16, "--out", out, *words(TRAINED))
    record = json.loads((out / "evaluation.json").read_text())
    assert record["image_size"] == [16, 16]
    assert "image_size: [16, 16]" in (out / "config.yaml").read_text()
    from safetensors import safe_open

    with safe_open(RunDirectory(out).latest_checkpoint() / "weights.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["prmim_architecture"])["image_size"] == [16, 16]
    evaluate(run, "--protocol", protocol, *solver, "--image_size", 16, "--out", out, "--resume")


def test_a_run_starts_from_weights_of_smaller_images(run, tmp_path):
    weights = RunDirectory(run).latest_checkpoint() / "weights.safetensors"
    larger = {**SMALL, "image_size": 16, "epochs": 1, "init_weights": weights}
    assert main(["pretrain", "--out", str(tmp_path / "larger"), *words(larger)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_size", "9"], "image_size: expected multiples of the patch size 2 x 2, got 9 x 9"),
        (["--image_size", "4,8,8"], "image_size: expected multiples of the patch size 2 x 2, got 4 x 8 x 8"),
        (
            ["--image_size", "9", "--protocol", "finetune"],
            "image_size: expected multiples of the patch size 2 x 2, got",
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_suit_the_patches(run, capsys, options, message):
    limit = [] if "finetune" in options else ["--eval_limit", "9"]
    assert main(["evaluate", "--run", str(run), *options, *limit]) == 2
    assert f"prmim: error: {message}" in capsys.readouterr().err

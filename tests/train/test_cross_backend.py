"""Runs that continue with their weights on the other backend.

One line reports what is lost.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
torch = pytest.importorskip("torch")

from prmim_train.cli.commands import main  # noqa: E402
from prmim_train.data.batches import evaluation_batches  # noqa: E402
from prmim_train.evaluate.features import evaluate_run  # noqa: E402
from prmim_train.run.directory import RunDirectory  # noqa: E402
from prmim_train.run.engine import create_engine  # noqa: E402
from prmim_train.run.prepare import open_data, read_run_config, restore_engine  # noqa: E402

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "epochs": 1,
    "batch_size": 240,
    "base_learning_rate": 0.01,
    "device": "cpu",
    "log_every": 2,
    "eval_limit": 0,
    "pictures": 0,
}
"""The rest is of the digits' recipe; 6 steps."""
WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
DIRECTIONS = [("torch", "jax"), ("jax", "torch")]


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler, one_thread):
    """Both frameworks are quick in every test here."""


def pretrain(out, backend, *more):
    assert main(["pretrain", *WORDS, "--backend", backend, "--out", str(out), *more]) == 0
    return RunDirectory(out)


def weights_of(run):
    return run.latest_checkpoint() / "weights.safetensors"


def losses(run):
    return {record["step"]: record["loss"] for record in run.read_metrics()}


@pytest.fixture(scope="module", params=DIRECTIONS, ids=" to ".join)
def first(request, tmp_path_factory):
    """Return a finished run on one backend, and the names of both backends."""
    here, there = request.param
    return pretrain(tmp_path_factory.mktemp("first") / "run", here), here, there


def test_the_other_backend_goes_on_as_the_same_one_would(first, tmp_path):
    begun, here, there = first
    more = ("--init_weights", str(weights_of(begun)), "--seed", "1")
    expected, got = (losses(pretrain(tmp_path / backend, backend, *more)) for backend in (here, there))
    assert got.keys() == expected.keys() == {1, 2, 4, 6}
    assert got[1] == pytest.approx(expected[1], rel=1e-4)
    assert got == pytest.approx(expected, rel=1e-3)
    # Or else the weights would make no difference.
    assert expected[1] < 0.95 * losses(begun)[1]


def test_features_and_accuracy_of_the_same_weights_agree(first):
    begun, _, there = first
    assert main(["evaluate", "--run", str(begun.path), "--protocol", "knn", "--eval_limit", "400"]) == 0
    expected = json.loads((begun.path / "evaluation.json").read_text())["trained"]

    config = read_run_config(begun, eval_limit=400)
    data = open_data(config)
    engine = restore_engine(begun, config, data.budget)
    other_config = replace(config, backend=there)
    other = create_engine(other_config, data.budget)
    other.load_weights(weights_of(begun))
    with evaluation_batches(data.source, data.held_out, batch_size=64, image_size=config.method.image_size) as batches:
        images = next(batches).images
    np.testing.assert_allclose(other.features(images), engine.features(images), rtol=1e-4, atol=1e-5)
    result = evaluate_run(other_config, data, other, ("knn",))
    # Of some images the fifth and the sixth neighbour are equally near but for rounding.
    assert result["trained"]["knn"] == pytest.approx(expected["knn"], abs=0.01)
    assert expected["knn"] > 2 * result["most_frequent_class"]


@pytest.fixture
def copied(first, tmp_path):
    """Return a copy of the run, arguments that continue it, and both backends."""
    begun, here, there = first
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(begun.path, run.path)
    return run, ["pretrain", "--out", str(run.path), "--resume", "--epochs", "2"], here, there


def test_a_resume_on_the_other_backend_is_refused_and_changes_nothing(copied, capsys):
    run, words, _, there = copied
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words, "--backend", there]) == 2
    line = capsys.readouterr().err
    assert line.startswith("prmim: error: ")
    assert line.count("\n") == 1
    assert str(run.path) in line
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert main(words) == 0
    assert max(losses(run)) == 12


def test_a_resume_on_the_other_backend_says_what_is_wrong(copied, capsys):
    _, words, here, there = copied
    capsys.readouterr()
    main([*words, "--backend", there])
    line = capsys.readouterr().err.removeprefix("prmim: error: ")
    assert line.startswith(f"backend: expected {here}, ")
    assert "--init_weights" in line


def test_a_torch_run_loads_nothing_of_the_jax_adapter(tmp_path):
    code = (
        "import sys; from prmim_train.cli.commands import main; code = main(sys.argv[1:]); "
        "print(code, *sorted(sys.modules))"
    )
    words = [*WORDS, "--pictures", "2", "--eval_limit", "60", "--out", str(tmp_path / "run"), "--backend", "torch"]
    command = [sys.executable, "-c", code, "pretrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    exit_code, *modules = result.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    assert "prmim_torch" in modules
    # Not among them: jax and orbax, which grain loads by itself where they are installed.
    assert {"prmim_jax", "flax", "optax"} & set(modules) == set()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_tall_images_of_13_channels_and_16_bits(backend, tmp_path):
    """Small spectrograms and satellite images: crops, range and pictures.

    The pictures show held-out images.
    """
    levels = np.random.default_rng(0).integers(0, 3500, (24, 64, 8, 13)).astype(np.uint16)
    np.savez(tmp_path / "a.npz", images=levels)
    options = {"data": tmp_path / "a.npz", "channels": 13, "image_size": "64,8", "patch_size": "8,4", "batch_size": 6}
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--pixel_range=0,3500", "--holdout=0.25", "--pictures=2", "--log_every=1", "--precision=float32"]
    run = pretrain(tmp_path / "run", backend, *words)
    assert len(losses(run)) == 3
    assert np.isfinite(list(losses(run).values())).all()
    for name in ("reconstructions.png", "schedule.png", "loss.png"):
        with Image.open(run.path / name) as picture:
            width, height = picture.size
            assert 150 < height < 1500  # a page, although the images are eight times as high as wide
            assert 600 < width < 1900

"""The whole way on JAX, with every method: small runs, resumed, evaluated, drawn."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from prmim_train.cli.commands import main  # noqa: E402
from prmim_train.config.layers import recipe_names  # noqa: E402
from prmim_train.pretrain import pretrain  # noqa: E402
from prmim_train.run.budget import training_budget  # noqa: E402
from prmim_train.run.engine import create_engine  # noqa: E402
from prmim_train.run.loop import Interrupted  # noqa: E402
from tests import teachers  # noqa: E402

SMALL = {"backend": "jax", "epochs": 1, "batch_size": 240}  # 6 steps
SIMMIM = {"method": "simmim", "depth": 2}
MASKALIGN = {"method": "maskalign", "depth": 3, "teacher_layers": 2}
LOCALMIM = {"method": "localmim", "depth": 2, "decoder_dim": 16, "decoder_heads": 2, "layers": (1, 2), "scales": (2, 1)}
VIDEOMAE = {
    "method": "videomae",
    "image_size": (4, 16, 16),
    "patch_size": (2, 4, 4),
    "decoder_dim": 16,
    "decoder_heads": 2,
}
METHODS = {"mae": {}, "simmim": SIMMIM, "maskalign": MASKALIGN, "localmim": LOCALMIM, "videomae": VIDEOMAE}


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler):
    """A run, its stopped twin and its resumption share their programs."""


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A DINO of three blocks on a 4 x 4 grid, written without any framework."""
    return str(teachers.write_teacher(tmp_path_factory.mktemp("teachers") / "vit"))


@pytest.fixture
def options(request):
    """Return a function from the name of a method to its options of a small run."""

    def make(method, **changes):
        teacher = {"teacher": request.getfixturevalue("vit")} if method == "maskalign" else {}
        return {**SMALL, **METHODS[method], **teacher, **changes}

    return make


def weights(config):
    from safetensors.numpy import load_file

    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    return load_file(latest / "weights.safetensors")


RUNS: dict[str, dict[str, object]] = {
    "mae": {"decoder": "cross", "class_tokens": 2, "position": "learned"},
    "simmim": {"decay": "step"},
    "maskalign": {"scan_blocks": True},
    "localmim": {},
    "videomae": {"fusion": "mff"},
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_goes_the_whole_way_and_stopping_changes_nothing(method, tiny, options, tmp_path, monkeypatch):
    import prmim_jax

    given = options(method, epochs=2, **RUNS[method])
    whole = tiny(out=str(tmp_path / "whole"), eval_limit=200, pictures=2, **given)
    summary = pretrain(whole)
    records = [json.loads(line) for line in (whole.run_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    assert summary["loss"] == records[-1]["loss"]
    assert summary["evaluation"]["trained"]["linear"] > 0.3  # chance is 0.1
    first = "reconstructions.png" if whole.method.predicts == "pixels" else "similarity.png"
    assert {p.name for p in whole.run_path.glob("*.png")} == {first, "schedule.png", "loss.png"}

    config = tiny(**given)
    take = prmim_jax.Engine.train_step

    def train_step(self, images, sample):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    with monkeypatch.context() as patch:
        patch.setattr(prmim_jax.Engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert pretrain(tiny(**given, resume=True))["steps"] == 12
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value, err_msg=name)

    kind = first.removesuffix(".png")
    assert main(["picture", "--run", str(config.run_path), "--kind", kind, "--pictures", "1"]) == 0
    assert (config.run_path / first).is_file()


# The backend torch trains the target "patch" too.
TARGET = {"extra_cells": "known", "cell_norm": "window", "throw_ratio": 0.75}


def test_a_target_is_trained_resumed_evaluated_and_drawn(tiny, options):
    config = tiny(**options("mae", **TARGET))
    run = ["--run", str(config.run_path)]
    assert pretrain(config)["steps"] == 6
    assert main(["pretrain", "--out", run[1], "--resume", "--epochs", "2"]) == 0
    records = [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 12
    assert records[-1]["loss"] < records[0]["loss"]
    assert tuple(name for name in records[-1] if name.startswith("loss")) == config.method.losses
    assert ("cell_head.weight" in weights(config)) is bool(config.method.cell_places)
    assert main(["evaluate", *run, "--protocol", "knn", "--eval_limit", "200"]) == 0
    assert main(["picture", *run, "--pictures", "1"]) == 0
    assert {p.name for p in config.run_path.glob("*.png")} == {"reconstructions.png", "schedule.png", "loss.png"}


def test_what_the_student_makes_of_an_image_is_set_beside_its_teacher(tiny, options):
    config = tiny(**options("maskalign", masking="random"))
    engine = create_engine(config, training_budget(config, 240))
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 1), dtype=np.uint8)
    compared = engine.compare(images, np.arange(3))
    assert compared.schedule == config.method.schedule
    assert compared.student.shape == compared.teacher.shape == (3, 16, 32)
    assert np.isfinite(compared.student).all()
    np.testing.assert_allclose(compared.teacher.mean(-1), 0, atol=1e-5)  # whitened
    np.testing.assert_allclose(compared.teacher.std(-1), 1, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_has_the_record_of_the_configuration(method, tiny, options):
    config = tiny(**options(method))
    engine = create_engine(config, training_budget(config, 240))
    assert engine.method.config == config.method


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_built(name, tiny_recipe, request):
    teacher = {"teacher": request.getfixturevalue("vit"), "teacher_layers": 2} if "maskalign" in name else {}
    config = tiny_recipe(name, backend="jax", **teacher)
    engine = create_engine(config, training_budget(config, 80))
    assert engine.num_parameters > 0


def test_a_run_loads_no_torch(tiny_words, vit):
    words = [*tiny_words, "--epochs", "1", "--batch_size", "240", "--pictures", "2", "--eval_limit", "60"]
    start = [words.index(name) for name in ("--decoder_dim", "--decoder_depth", "--decoder_heads")]
    words = [word for place, word in enumerate(words) if place not in start and place - 1 not in start]
    # Not even where there is a teacher, which the other backend leaves to a package that needs torch.
    words += ["--method", "maskalign", "--teacher", vit, "--depth", "3", "--teacher_layers", "2", "--backend", "jax"]
    code = "import sys; from prmim_train.cli.commands import main; code = main(sys.argv[1:]); "
    code += "print(code, *sorted({'torch', 'jax', 'prmim_torch', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "pretrain", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 jax"
    assert "Warning" not in result.stderr

"""End to end on PyTorch, with every method: train, resume, evaluate, draw."""

import json
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prmim_train.cli.commands import main  # noqa: E402
from prmim_train.config.layers import recipe_names  # noqa: E402
from prmim_train.pretrain import pretrain  # noqa: E402
from prmim_train.run.budget import training_budget  # noqa: E402
from prmim_train.run.engine import create_engine  # noqa: E402
from prmim_train.run.loop import Interrupted, NonFiniteLoss  # noqa: E402
from tests import teachers  # noqa: E402

SMALL = {"backend": "torch", "epochs": 1, "batch_size": 240}  # 6 steps
SIMMIM = {"method": "simmim", "depth": 2}
MASKALIGN = {"method": "maskalign", "depth": 3, "teacher_layers": 2}
LOCALMIM = {"method": "localmim", "depth": 2, "decoder_dim": 16, "decoder_heads": 2}
VIDEOMAE = {
    "method": "videomae",
    "image_size": (4, 16, 16),
    "patch_size": (2, 4, 4),
    "decoder_dim": 16,
    "decoder_heads": 2,
}
METHODS = {"mae": {}, "simmim": SIMMIM, "maskalign": MASKALIGN, "localmim": LOCALMIM, "videomae": VIDEOMAE}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of three blocks on a 4 x 4 grid, written by transformers."""
    pytest.importorskip("transformers")
    return str(teachers.save_teacher("clip vision", tmp_path_factory.mktemp("teachers") / "clip"))


@pytest.fixture
def options(request):
    """Return a function from the name of a method to its options of a small run."""

    def make(method, **changes):
        teacher = {"teacher": request.getfixturevalue("clip")} if method == "maskalign" else {}
        return {**SMALL, **METHODS[method], **teacher, **changes}

    return make


def untimed(config):
    """Return the lines of the metrics without the two fields that tell of time."""
    lines = [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_second", "waiting", "seconds")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def weights(config):
    from safetensors.numpy import load_file

    latest = sorted((config.run_path / "checkpoints").glob("step_*"))[-1]
    return load_file(latest / "weights.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_evaluates_and_draws(method, tiny, options):
    config = tiny(**options(method, epochs=4, eval_limit=500, pictures=2))
    summary = pretrain(config)
    records = [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    counts = config.method.counts
    sizes = {"loss_decoded": counts.decoded, "loss_thrown": counts.thrown}
    if method == "maskalign":
        sizes = {"loss_visible": 1 + counts.visible, "loss_thrown": counts.thrown}
    for record in records:
        whole = sum(record[name] * size for name, size in sizes.items())
        assert record["loss"] == pytest.approx(whole / sum(sizes.values()), rel=1e-3)
    assert summary["evaluation"]["trained"]["linear"] > 0.4  # chance is 0.1
    learned = {name: value for name, value in weights(config).items() if "pos_embed" not in name}
    if method == "maskalign":  # the last norm of its student is no part of the loss
        learned = {name: value for name, value in learned.items() if not name.startswith("encoder.norm.")}
    assert summary["parameters"] == sum(value.size for value in learned.values())
    first = "reconstructions.png" if config.method.predicts == "pixels" else "similarity.png"
    assert {p.name for p in config.run_path.glob("*.png")} == {first, "schedule.png", "loss.png"}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mae", {}),
        ("mae", {"throw_ratio": 0.0}),
        ("mae", {"reconstruction": "none"}),
        ("mae", {"norm_pix": False}),
        ("mae", {"thrown_target": "patch"}),
        ("mae", {"extra_cells": "decoded", "extra_cells_weight": 0.5}),
        ("mae", {"decoder": "cross"}),
        ("mae", {"fusion": "mff", "depth": 2}),
        ("mae", {"class_tokens": 3, "position": "learned", "mask_unit": 2, "drop_path": 0.5, "depth": 2}),
        ("simmim", {}),
        ("simmim", {"throw_ratio": 0.0, "position": "absolute", "decay": "step"}),
        ("simmim", {"throw_by": "unit", "throw_ratio": 0.5, "accumulate": 2}),
        ("localmim", {}),
        ("videomae", {}),
        ("maskalign", {}),
        ("maskalign", {"reconstruction": "none", "masking": "random", "fusion": "sum"}),
    ],
)
def test_stop_and_resume_gives_the_same_weights(method, changes, tiny, options, tmp_path, monkeypatch):
    import prmim_torch

    given = options(method, **changes)
    given["log_every"] = 3  # a line is begun before the stop and ended after it
    whole = tiny(out=str(tmp_path / "whole"), **given)
    pretrain(whole)
    config = tiny(**given)
    take = prmim_torch.Engine.train_step

    def train_step(self, images, sample):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    with monkeypatch.context() as patch:
        patch.setattr(prmim_torch.Engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert pretrain(tiny(**given, resume=True))["steps"] == 6
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(config)[name], value, err_msg=name)
    assert untimed(config) == untimed(whole)
    assert [line["step"] for line in untimed(config)] == [1, 3, 6]


TARGETS = {
    "patch": {"thrown_target": "patch"},
    "cells in addition": {"extra_cells": "known", "cell_norm": "window"},
    "nothing decoded": {"throw_ratio": 0.75},
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_trained_resumed_evaluated_and_drawn(target, tiny, options):
    config = tiny(**options("mae", **TARGETS[target]))
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


@pytest.mark.parametrize(
    ("trained", "line", "message"),
    [
        ("cells", "thrown_target: patch", "expected None, got [2, 2]; weights with cells need thrown_target: cells"),
        ("patch", "thrown_target: cells", "expected [2, 2], got None; weights without cells need thrown_target: patch"),
        ("patch", "", "expected [2, 2], got None; weights without cells need thrown_target: patch"),  # of older runs
    ],
)
def test_weights_of_another_target_are_refused_in_one_line(trained, line, message, tiny, options, capsys):
    config = tiny(**options("mae", thrown_target=trained))
    pretrain(config)
    place, run = config.run_path / "config.yaml", str(config.run_path)
    text = place.read_text()
    assert f"\nthrown_target: {trained}\n" in text
    place.write_text(text.replace(f"thrown_target: {trained}", line))
    capsys.readouterr()
    commands = (["picture", "--run", run, "--pictures", "1"], ["pretrain", "--out", run, "--resume", "--epochs", "2"])
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"prmim: error: weights: cells: {message}")
        assert error.count("\n") == 1
    place.write_text(text)  # with the option that the message names
    for command in commands:
        assert main(command) == 0


def spoil(monkeypatch, *steps):
    """Let the loss not be finite in some steps, counted from 1."""
    import prmim_torch

    take = prmim_torch.Engine.train_step

    def train_step(self, images, sample):
        if self.step + 1 not in steps:
            return take(self, images, sample)
        hook = self.method.register_forward_hook(lambda method, given, output: put_nan(output))
        take(self, images, sample)
        return hook.remove()

    monkeypatch.setattr(prmim_torch.Engine, "train_step", train_step)


def stop_at(monkeypatch, step):
    """Send ourselves a signal in the middle of a step, as Ctrl-C would."""
    import prmim_torch

    take = prmim_torch.Engine.train_step

    def train_step(self, images, sample):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    monkeypatch.setattr(prmim_torch.Engine, "train_step", train_step)


def put_nan(output):
    output.loss = output.loss * float("nan")


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny, options, tmp_path, monkeypatch):
    given = options("mae", epochs=2, nonfinite="skip", max_skipped=2, log_every=4)
    spoil(monkeypatch, 2, 6, 7)
    whole = tiny(out=str(tmp_path / "whole"), **given)
    pretrain(whole)
    lines = untimed(whole)
    assert {line["step"]: line.get("skipped", 0) for line in lines} == {1: 0, 4: 1, 8: 2, 12: 0}
    assert all(line["loss"] > 0 for line in lines)

    config = tiny(**given)
    stop_at(monkeypatch, 7)
    with pytest.raises(Interrupted):
        pretrain(config)
    monkeypatch.undo()
    pretrain(tiny(**given, resume=True))
    assert untimed(config) == lines  # the steps skipped before the stop are counted in the line after it


def test_too_many_in_a_row_end_the_run(tiny, options, monkeypatch):
    spoil(monkeypatch, 2, 4, 5, 6)
    with pytest.raises(NonFiniteLoss, match=r"got 3 non-finite steps in a row up to step 6 \(max_skipped is 2\)"):
        pretrain(tiny(**options("mae", nonfinite="skip", max_skipped=2)))


@pytest.mark.parametrize("method", ["simmim", "maskalign"])
def test_evaluate_and_picture_read_a_run_of_any_method(method, tiny, options, capsys):
    config = tiny(**options(method))
    pretrain(config)
    assert main(["evaluate", "--run", str(config.run_path), "--protocol", "knn", "--eval_limit", "200"]) == 0
    assert "trained encoder" in capsys.readouterr().out
    kind = "similarity" if method == "maskalign" else "reconstructions"
    assert main(["picture", "--run", str(config.run_path), "--kind", kind, "--pictures", "2"]) == 0
    assert [path.name for path in config.run_path.glob("*.png")] == [f"{kind}.png"]


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


def test_resuming_another_model_is_told_in_one_line(tiny, options, capsys):
    config = tiny(**options("mae"))
    pretrain(config)
    words = ["pretrain", "--out", str(config.run_path), "--resume", "--epochs", "2", "--decoder_depth", "2"]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("prmim: error: ")
    assert line.count("\n") == 1
    assert "decoder_depth" in line


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_built_and_takes_a_step(name, tiny_recipe, request):
    teacher = {"teacher": request.getfixturevalue("clip"), "teacher_layers": 2} if "maskalign" in name else {}
    config = tiny_recipe(name, backend="torch", compile=False, **teacher)
    engine = create_engine(config, training_budget(config, 80))
    images = np.random.default_rng(0).integers(0, 255, (32, *config.method.image_size, 3), dtype=np.uint8)
    engine.train_step(images, np.arange(32), engine.attention(images) if config.method.needs_weights else None)
    metrics = engine.read_metrics()
    assert metrics["nonfinite_step"] is None
    assert metrics["loss"] > 0


def test_this_package_does_not_import_torch_itself():
    import subprocess
    import sys

    code = "import sys, prmim_train.cli.commands, prmim_train.evaluate.classifier, prmim_train.report.pictures\n"
    code += "import prmim_train.pretrain; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"

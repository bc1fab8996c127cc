"""Small classifiers on PyTorch and JAX, on encoders trained briefly on digits."""

import json
import shutil
import signal
import sys

import numpy as np
import pytest

from prmim_train.cli.commands import main
from prmim_train.config.classify import classify_config
from prmim_train.evaluate.classifier import Classification, predict
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import read_run_config
from tests import teachers

pytest.importorskip("torch")
pytest.importorskip("flax")

SMALL = {
    **{"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "epochs": 2, "batch_size": 240},
    **{"base_learning_rate": 0.01, "device": "cpu", "eval_limit": 0, "pictures": 0},
}
"""The rest is of the digits' recipe; 12 steps."""
FEW = {"epochs": 1, "batch_size": 120, "base_learning_rate": 0.02, "log_every": 5, "mixup": 0, "cutmix": 0}
"""12 steps."""
MORE = {**FEW, "epochs": 7, "batch_size": 60, "layer_decay": 0.9}
"""168 steps, of which most classes are learned."""
ALL = {
    **{"epochs": 1, "batch_size": 120, "base_learning_rate": 0.01, "log_every": 5, "mixup": 0.8, "cutmix": 1},
    **{"rand_augment": 9, "erasing": 0.25, "drop_path": 0.2, "ema_decay": 0.9},
}
"""12 steps, with everything that draws or remembers."""
TIMES = ("images_per_second", "waiting", "seconds")
BACKENDS = ("torch", "jax")


def everything(protocol):
    return {name: value for name, value in ALL.items() if protocol == "finetune" or name != "drop_path"}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def evaluate(run, protocol, options, *more, code=0):
    solver = ["--solver", "lars"] if protocol == "linear" else []
    given = ["evaluate", "--run", str(run), "--protocol", protocol, *solver, *words(options), *map(str, more)]
    assert main(given) == code


def untimed(folder):
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in RunDirectory(folder).read_metrics()
    ]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(RunDirectory(folder).checkpoints()[-1] / "weights.safetensors")


def record(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler, one_thread):
    """All of these tests may use both frameworks."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function from a backend to a run's folder; each run is trained once."""
    made = {}

    def make(backend, **changes):
        key = (backend, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            options = {**SMALL, "backend": backend, "out": made[key], **changes}
            if changes.get("method") is None:
                options |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
            assert main(["pretrain", *words(options)]) == 0
        return made[key]

    return make


@pytest.fixture(scope="module")
def classifier(run, tmp_path_factory):
    """Return a function from a protocol and a backend to the folder of a classifier with everything, trained once."""
    made = {}

    def make(protocol, backend):
        if (protocol, backend) not in made:
            made[protocol, backend] = tmp_path_factory.mktemp("classifiers") / protocol
            evaluate(run(backend), protocol, everything(protocol), "--out", made[protocol, backend])
        return made[protocol, backend]

    return make


@pytest.mark.parametrize("backend", BACKENDS)
def test_fine_tuning_teaches_the_whole_encoder(backend, run, tmp_path):
    evaluate(run(backend), "finetune", MORE, "--out", tmp_path / "finetune")
    lines = untimed(tmp_path / "finetune")
    assert lines[0]["loss"] == pytest.approx(np.log(10), abs=1e-3)  # the head begins near 0
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert record(tmp_path / "finetune")["accuracy"] > 0.6
    before, after = weights(run(backend)), weights(tmp_path / "finetune")
    assert after["head.weight"].shape == (10, 32)
    encoder = {name for name in after if name.startswith("encoder.")}
    # The norm at the encoder's end is not used where the head sees the mean of the patches.
    assert encoder == {name for name in before if name.startswith("encoder.")} - {
        "encoder.norm.weight",
        "encoder.norm.bias",
    }
    same = {name for name in encoder if np.array_equal(after[name], before[name])}
    assert same <= {"encoder.cls_token"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_linear_probe_leaves_the_encoder_alone(backend, run, tmp_path):
    options = {**FEW, "epochs": 5, "batch_size": 60, "base_learning_rate": 80, "pool": "mean"}
    evaluate(run(backend), "linear", options, "--out", tmp_path / "linear")
    found = record(tmp_path / "linear")
    assert found["accuracy"] > 0.35
    assert found["loss"] < 0.8 * np.log(10)
    before, after = weights(run(backend)), weights(tmp_path / "linear")
    for name in after:
        if name.startswith("encoder."):
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert np.abs(after["fc_norm.running_mean"]).max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_stop_and_resume_is_the_same_as_no_stop(protocol, backend, run, classifier, tmp_path, monkeypatch):
    options, whole = everything(protocol), classifier(protocol, backend)
    engine = sys.modules[f"prmim_{backend}"].ClassifierEngine
    take = engine.train_step

    def train_step(self, images, sample, targets):
        if self.step + 1 == 7:
            signal.raise_signal(signal.SIGTERM)
        take(self, images, sample, targets)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", train_step)
        evaluate(run(backend), protocol, options, "--out", tmp_path / "stopped", code=128 + signal.SIGTERM)
    evaluate(run(backend), protocol, {}, "--out", tmp_path / "stopped", "--resume")
    assert untimed(tmp_path / "stopped") == untimed(whole)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(tmp_path / "stopped")[name], value, err_msg=name)
    assert record(tmp_path / "stopped") == record(whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_predictions_do_not_depend_on_the_batch(protocol, backend, run, classifier):
    directory, trained = RunDirectory(run(backend)), classifier(protocol, backend)
    given = {"protocol": protocol, "out": str(trained), "resume": True, "ema_decay": 0.9}
    job = Classification(classify_config(read_run_config(directory), given), directory)
    engine = job.create_engine()
    engine.restore(RunDirectory(trained).checkpoints()[-1])
    whole, parts = (predict(engine, job.test, (16, 16), batch_size=size) for size in (359, 7))
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert np.mean(whole.predicted == whole.truth) == record(trained)["accuracy"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_go_the_same_way(backend, run, classifier, tmp_path):
    """On the encoder of one, with all augmentation."""
    other = BACKENDS[1 - BACKENDS.index(backend)]
    evaluate(run(backend), "finetune", ALL, "--backend", other, "--out", tmp_path / other)
    for here, there in zip(untimed(classifier("finetune", backend)), untimed(tmp_path / other), strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            if "accuracy" in name:
                continue  # at chance after 12 steps, and the heads start from different small weights
            assert value == pytest.approx(there[name], rel=0.05 if name == "grad_norm" else 2e-3), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method_has_an_encoder_to_fine_tune(backend, run, tmp_path):
    teacher = teachers.write_teacher(tmp_path / "teacher")
    aligned = {"teacher": teacher, "teacher_layers": 1, "fusion": "sum"}
    for method, more, protocol in [("simmim", {}, "finetune"), ("maskalign", aligned, "linear")]:
        folder = run(backend, method=method, **more)
        evaluate(folder, protocol, FEW, "--pool", "cls" if protocol == "finetune" else "mean")
        assert 0 < record(folder / protocol)["accuracy"] <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("depth: 2", "depth: 1", "depth"),
        ("embed_dim: 32", "embed_dim: 16", "embed_dim"),
        ("patch_size: [4, 4]", "patch_size: [8, 8]", "patch_size"),
    ],
)
def test_weights_of_another_model_are_told_in_one_line(old, new, named, backend, run, tmp_path, capsys):
    pretrained, other = RunDirectory(run(backend)), RunDirectory(tmp_path / "other")
    options = (pretrained.path / "config.yaml").read_text()
    assert f"\n{old}\n" in options
    other.write_config(options.replace(f"\n{old}\n", f"\n{new}\n"))
    latest = pretrained.checkpoints()[-1]
    shutil.copytree(latest, other.path / "checkpoints" / latest.name)
    for more in (["--protocol", "knn", "--eval_limit", "9"], ["--protocol", "finetune"]):
        capsys.readouterr()
        assert main(["evaluate", "--run", str(other.path), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert not (other.path / "finetune").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_classifier_does_not_go_on_with_the_other_backend(backend, run, classifier, capsys):
    out, other = classifier("finetune", backend), BACKENDS[1 - BACKENDS.index(backend)]
    capsys.readouterr()
    evaluate(run(backend), "finetune", {"epochs": 2, "backend": other}, "--out", out, "--resume", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prmim: error: backend: expected {backend}, as in the run in {out}")
    assert line.endswith("start another classifier with --out ANOTHER")

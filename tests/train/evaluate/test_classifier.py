"""Fine-tuning and linear probing with LARS on the NumPy engine, end to end."""

import contextlib
import json
import re
import shlex
import signal
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from prmim_train.cli.commands import main
from prmim_train.config.classify import classify_config
from prmim_train.evaluate.classifier import Classification, cross_entropy, predict
from prmim_train.pretrain import pretrain
from prmim_train.run.directory import RunDirectory
from prmim_train.run.prepare import labelled_sides, open_data

TIMES = ("images_per_second", "waiting", "seconds")
FEW = ["--epochs", "2", "--batch_size", "120", "--base_learning_rate", "0.2", "--log_every", "4", "--mixup", "0",
       "--cutmix", "0"]  # fmt: skip
"""24 steps on the digits."""


@pytest.fixture
def run(tiny):
    """A finished pre-training run."""
    pretrain(tiny())
    return tiny().run_path


def evaluate(run, protocol, *more, code=0):
    solver = ["--solver", "lars"] if protocol == "linear" else []
    assert main(["evaluate", "--run", str(run), "--protocol", protocol, *solver, *map(str, more)]) == code


def fail(capsys, *words, code=2):
    """Run a command that must fail. Returns its error line."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line.removeprefix("prmim: error: ")


def untimed(folder):
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in RunDirectory(folder).read_metrics()
    ]


def weights(folder):
    return load_file(RunDirectory(folder).checkpoints()[-1] / "weights.safetensors")


@pytest.fixture
def stop_at(fake, monkeypatch):
    """Send a signal to this process in the middle of a step of a classifier."""
    engine = sys.modules[fake.__module__].ClassifierEngine
    take = engine.train_step

    @contextlib.contextmanager
    def at(step):
        def train_step(self, images, sample, targets):
            if self.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            take(self, images, sample, targets)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "train_step", train_step)
            yield

    return at


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_a_classifier_leaves_a_run_of_its_own(protocol, run, fake, capsys):
    before = weights(run)
    evaluate(run, protocol, *FEW)
    folder = run / protocol
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "evaluation.json", "confusion.png"}
    names |= {"curves.png", ".lock", "run.json", "trained.npz", "predictions.npz"}
    assert {entry.name for entry in folder.iterdir()} == names
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["accuracy"] > 0.6
    low, high = record["confidence_interval"]
    assert low < record["accuracy"] < high
    assert record["test_images"] == sum(entry["images"] for entry in record["per_class"].values()) == 359
    with np.load(folder / "predictions.npz") as predictions:
        assert (predictions[protocol] == predictions["truth"]).sum() == record["correct"]
    assert record["correct"] == round(sum(e["images"] * e["accuracy"] for e in record["per_class"].values()))
    assert (record["protocol"], record["checkpoint"], record["options"]["epochs"]) == (protocol, 12, 2)
    assert (record["step"], record["train_images"], record["unreadable_test_images"]) == (24, 1438, {})
    assert record["data"].startswith("digits: ")
    lines = untimed(folder)
    assert [line["step"] for line in lines] == [1, *range(4, 25, 4)]
    assert lines[-1]["test_accuracy"] == record["accuracy"]
    assert 0 < lines[-1]["accuracy"] <= 1
    assert "probe" not in " ".join(lines[-1])
    out = capsys.readouterr().out
    assert "% of 359 test images correct (95 % confidence interval: " in out
    assert f"{24:,} steps of 120 images (2 epochs)" in out
    # Fine-tuning changes the encoder, linear probing does not. The pre-training run is untouched.
    np.testing.assert_array_equal(weights(run)["encoder"], before["encoder"])
    is_same = np.array_equal(weights(folder)["encoder"], before["encoder"])
    assert is_same == (protocol == "linear")
    assert all(engine.is_closed for engine in fake.made)


def test_what_the_engine_is_given(run, fake):
    evaluate(run, "finetune", *FEW, "--layer_decay", "0.5", "--drop_path", "0.2", "--ema_decay", "0.99")
    evaluate(run, "linear", *FEW, "--momentum", "0.8")
    finetune, linear = fake.made[-2:]
    options = finetune.classifier
    assert (options.protocol, options.pool, options.is_frozen, options.drop_rate) == ("finetune", "mean", False, 0.2)
    assert (options.layer_decay, options.ema_decay) == (0.5, 0.99)
    options = linear.classifier
    assert (options.protocol, options.pool, options.is_frozen, options.drop_rate) == ("linear", "cls", True, 0.0)
    assert (options.momentum, options.trust, options.ema_decay) == (0.8, 0.001, None)
    assert finetune.training.learning_rate == pytest.approx(0.2 * 120 / 256)


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_stop_and_resume_is_the_same_as_no_stop(protocol, run, tmp_path, stop_at, capsys):
    mixed = [*FEW[:-4], "--mixup", "0.8", "--cutmix", "1", "--rand_augment", "9", "--erasing", "0.25"]
    if protocol == "linear":
        run = run.rename(tmp_path / "a run")
    evaluate(run, protocol, *mixed, "--out", tmp_path / "whole")
    with stop_at(7):
        evaluate(run, protocol, *mixed, code=128 + signal.SIGTERM)
    told = re.search(r"Resume with: prmim (.*)", capsys.readouterr().err)
    assert main(shlex.split(told[1])) == 0
    assert untimed(run / protocol) == untimed(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(run / protocol)[name], value)
    found = [json.loads((folder / "evaluation.json").read_text()) for folder in (run / protocol, tmp_path / "whole")]
    assert found[0] == found[1]


def test_a_probe_of_an_earlier_version_continues_as_it_began(run, stop_at):
    """Its options have no crop_draw and no batch_norm."""
    earlier = [*FEW[:-4], "--crop_draw", "retry", "--batch_norm", "all"]
    with stop_at(7):
        evaluate(run, "linear", *earlier, code=128 + signal.SIGTERM)
    path = run / "linear" / "config.yaml"
    path.write_text(re.sub(r"^(crop_draw|batch_norm): .*\n", "", path.read_text(), flags=re.MULTILINE))
    evaluate(run, "linear", "--resume")
    assert {"crop_draw: retry", "batch_norm: all"} <= set(path.read_text().splitlines())


def test_a_finished_classifier_says_so_and_another_needs_a_folder(run, capsys):
    evaluate(run, "finetune", *FEW)
    line = fail(capsys, "--run", run, "--protocol", "finetune", *FEW)
    assert line.startswith(f"out: {run / 'finetune'} already holds a run; continue it with --resume")
    evaluate(run, "finetune", "--resume")
    assert "is finished" in capsys.readouterr().out


def test_a_classifier_goes_on_without_the_checkpoint_it_began_from(run, stop_at):
    with stop_at(7):
        evaluate(run, "finetune", *FEW, code=128 + signal.SIGTERM)
    RunDirectory(run).checkpoints()[-1].rename(run / "gone")
    evaluate(run, "finetune", "--resume")
    assert json.loads((run / "finetune" / "evaluation.json").read_text())["checkpoint"] == 12


def test_workers_change_nothing(run, tmp_path):
    options = [*FEW[:-4], "--mixup", "0.8", "--cutmix", "1", "--rand_augment", "9", "--erasing", "0.25"]
    for workers in (0, 2):
        evaluate(run, "finetune", *options, "--workers", workers, "--out", tmp_path / str(workers))
    assert untimed(tmp_path / "0") == untimed(tmp_path / "2")


def test_predictions_do_not_depend_on_the_batch(tiny):
    config = tiny()
    data = open_data(config)
    _, test = labelled_sides(data)

    class Linear:
        def predict(self, images):
            flat = images.reshape(len(images), -1) / np.float32(255)
            return (flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 10))).astype(np.float32)

    whole = predict(Linear(), test, config.method.image_size, batch_size=1000)
    parts = predict(Linear(), test, config.method.image_size, batch_size=7)
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-5)
    np.testing.assert_array_equal(parts.truth, whole.truth)
    assert len(whole.truth) == 359
    assert whole.unreadable == {}


def test_another_source_can_be_tested_on(run, tmp_path):
    images, labels = np.zeros((30, 8, 8), np.uint8), np.arange(30) % 10
    names = np.array([str(9 - place) for place in range(10)])  # the same names in another order
    np.savez(tmp_path / "same.npz", images=images, labels=labels, names=names)
    evaluate(run, "finetune", *FEW, "--test_data", tmp_path / "same.npz")
    record = json.loads((run / "finetune" / "evaluation.json").read_text())
    assert record["test_images"] == 30
    assert record["accuracy"] == 0.1  # of ten classes with equal images
    assert record["per_class"]["0"]["images"] == 3
    assert main(["evaluate", "--run", str(run), "--protocol", "knn", "--test_data", str(tmp_path / "same.npz"),
                 "--eval_limit", "100"]) == 0  # fmt: skip
    assert json.loads((run / "evaluation.json").read_text())["protocols"]["knn"]["test_images"] == 30


def test_classes_of_the_test_data_are_mapped_by_name(tiny, tmp_path):
    data = open_data(tiny())
    names = np.array([str(9 - place) for place in range(10)])
    np.savez(tmp_path / "same.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 9]), names=names)
    train, test = labelled_sides(data, str(tmp_path / "same.npz"))
    assert test.labels.tolist() == [9, 8, 0]
    assert test.class_names == train.class_names


def test_clips_are_sampled_as_given(tiny, tmp_path):
    clips = np.zeros((20, 8, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "clips.npz", images=clips, labels=np.arange(20) % 2, names=np.array(["a", "b"]))
    of_clips = {"data": str(tmp_path / "clips.npz"), "image_size": (2, 16, 16), "patch_size": (1, 4, 4)}
    config = tiny(**of_clips, embed_dim=12, decoder_dim=12, batch_size=8)
    pretrain(config)
    own = classify_config(config, {"protocol": "finetune", "frame_stride": 4})
    job = Classification(own, RunDirectory(config.run_path))
    assert {side.source.three_axes.stride for side in (job.train, job.test)} == {4}


def test_what_is_wrong_is_told_in_one_line(run, tmp_path, capsys):
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "plain.npz", images=images)
    np.savez(tmp_path / "other.npz", images=images, labels=np.arange(6) % 2, names=np.array(["7", "cat"]))
    np.savez(tmp_path / "one.npz", images=images, labels=np.zeros(6, np.int64))
    empty = RunDirectory(tmp_path / "empty")
    empty.write_config((run / "config.yaml").read_text())
    given = ["--run", run, "--protocol", "finetune"]
    for words, message in [
        (["--run", "nowhere", "--protocol", "finetune"], "run: expected the folder of a run, but there is no config"),
        (["--run", empty.path, "--protocol", "finetune"], "run: expected a checkpoint in"),
        ([*given, "--checkpoint", "5"], f"checkpoint: expected one of the steps 12 in {run}, got 5"),
        ([*given, "--data", tmp_path / "plain.npz"], "data: expected labelled images, some of them held out, but the"),
        ([*given, "--data", tmp_path / "one.npz"], "data: expected labelled images, some of them held out, but the tr"),
        ([*given, "--holdout", "0"], "data: expected labelled images, some of them held out, but no images are held"),
        ([*given, "--test_data", tmp_path / "plain.npz"], "test_data: expected labelled images, got file"),
        (
            [*given, "--test_data", tmp_path / "other.npz"],
            f"test_data: expected the 10 classes of the training images, got others in {tmp_path / 'other.npz'}: "
            "missing: 0, 1, 2, 3, 4, 5, 6, 8 and 1 more; unknown: cat",
        ),
        ([*given, "--test_data", "nowhere"], "test_data: nothing at nowhere"),
        (
            [*given, "--eval_limit", "5"],
            "eval_limit: expected --protocol knn, or linear by lbfgs with it, got finetune",
        ),
        ([*given, "--momentum", "0.5"], "momentum: protocol finetune has no such option"),
        ([*given, "--mixup", "-1"], "mixup: expected a number of at least 0, got -1.0"),
        ([*given, "--pool", "max"], "pool: expected one of mean, cls, got 'max'"),
        ([*given, "--epoch", "5"], "--epoch: unknown option; did you mean --epochs?"),
        ([*given, "--solver", "lars"], "solver: expected --protocol linear with it, got finetune"),
        (
            ["--run", run, "--epochs", "5"],
            "epochs: expected --protocol finetune, or linear --solver lars with it, got no",
        ),
        (
            ["--run", run, "--protocol", "linear", "--epochs", "5"],
            "epochs: expected --protocol finetune, or linear --solver lars with it, got linear",
        ),
        (["--run", run, "--protocol", "linear", "--solver", "sgd"], "solver: expected one of lbfgs, lars, got 'sgd'"),
        (
            ["--run", run, "--protocol", "knn", "--eval_limit", "9", "--test_data", tmp_path / "other.npz"],
            "test_data: expected the 10 cl",
        ),
    ]:
        assert fail(capsys, *words).startswith(message), message
    assert not (run / "finetune").exists()


def test_a_file_lies_between_the_recipe_of_the_protocol_and_the_command_line(run, fake, tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(f"protocol: finetune\nlayer_decay: 0.5\nclip_grad: 3.0\nout: {tmp_path / 'own'}\nepochs: 3\n")
    words = [word for word in FEW if word != "2" and word != "--epochs"]
    assert main(["evaluate", "--run", str(run), "--config", str(file), *words, "--clip_grad", "2"]) == 0
    options = RunDirectory(tmp_path / "own").read_config()
    assert options.items() >= {"layer_decay": 0.5, "clip_grad": 2.0, "epochs": 3, "warmup_epochs": None}.items()
    assert fake.made[-1].training.warmup_steps == round(3 / 20 * 1438 / 120)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--config", str(file), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_packaged_recipe(run, fake, tmp_path):
    short = ["--epochs", "2", "--batch_size", "120", "--log_every", "4", "--out", str(tmp_path / "probe")]
    words = ["--config", "maskalign_vit_base_linear", "--holdout", "0.2", *short]
    assert main(["evaluate", "--run", str(run), *words]) == 0
    engine = fake.made[-1]
    assert (engine.classifier.protocol, engine.classifier.pool) == ("linear", "cls")
    assert engine.training.learning_rate == pytest.approx(0.025 * 120 / 256)
    record = json.loads((tmp_path / "probe" / "evaluation.json").read_text())
    assert (record["options"]["mixup"], record["options"]["weight_decay"]) == (0, 0)


def test_what_is_wrong_with_a_file_is_told_in_one_line(run, tmp_path, capsys):
    files = {
        "UNKNOWN": "protocol: finetune\nepoch: 3",
        "PRETRAIN": "protocol: finetune\ndecoder_dim: 3",
        "VALUE": "protocol: linear\nepochs: many",
        "FOREIGN": "protocol: linear\nlayer_decay: 0.5",
        "FROZEN": "protocol: knn",
        "ALONE": "epochs: 3",
        "COMMAND": "protocol: linear\nsolver: lars",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for words, message in [
        (["UNKNOWN"], f"epoch: unknown option in {tmp_path / 'UNKNOWN'}; did you mean epochs?"),
        (["PRETRAIN"], "decoder_dim: expected an option of prmim evaluate in"),
        (["VALUE"], "epochs: expected a whole number of at least 1, got 'many'"),
        (["FOREIGN"], "layer_decay: protocol linear has no such option"),
        (["FROZEN"], "protocol: expected finetune or linear with --config, got knn"),
        (["ALONE"], "protocol: expected finetune or linear with --config, got no protocol"),
        (["COMMAND"], "solver: unknown option in"),
        (["mae_vit_base"], "config: expected options of prmim evaluate, got those of pretrain; use prmim pretrain --c"),
        (["nowhere"], "config: expected a YAML file or one of the recipes mae_vit_base_finetune, mae_vit_base_linear"),
        (["mae_vit_base_linear", "--protocol", "finetune"], "protocol: expected linear with --config mae_vit_base_lin"),
        (
            ["mae_vit_base_linear", "--solver", "lbfgs"],
            "solver: expected lars with --config mae_vit_base_linear, got",
        ),
        (["mae_vit_base_finetune", "--solver", "lars"], "solver: expected --protocol linear with it, got finetune"),
        (["mae_vit_base_linear", "--eval_limit", "5"], "eval_limit: expected --protocol knn, or linear by lbfgs with"),
        (["mae_vit_base_linear"], "data: expected labelled images, some of them held out, but no images are held out"),
    ]:
        file = tmp_path / words[0]
        words[0] = str(file) if file.exists() else words[0]
        assert fail(capsys, "--run", run, "--config", *words).startswith(message), message
    assert not (run / "linear").exists()


def test_the_folder_of_a_classifier_is_no_run(run, capsys):
    evaluate(run, "finetune", *FEW)
    message = f"run: expected the folder of a pre-training run, got the classifier in {run / 'finetune'}"
    assert fail(capsys, "--run", run / "finetune") == message
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--out", run, "--resume")
    assert line == f"out: expected the folder of a finetune classifier, got another run in {run}"


def test_weights_of_another_model_are_refused(run, capsys):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("image_size: [16, 16]", "image_size: [32, 32]"))
    assert fail(capsys, "--run", run, "--protocol", "finetune").startswith("weights: expected shape")


def test_help_tells_defaults_that_depend(capsys):
    assert main(["evaluate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Not given: as in the run." in text
    assert "Default for linear: 16384." in text
    assert "Momentum of LARS. For linear only." in text


def test_cross_entropy_of_large_logits():
    logits = np.float32([[1000, 0], [0, 1000]])
    assert cross_entropy(logits, np.array([0, 1])) == 0
    assert cross_entropy(logits, np.array([1, 1])) == 500


def test_a_step_that_is_not_finite_ends_or_is_skipped(run, fake, capsys, monkeypatch):
    monkeypatch.setattr(fake, "bad_steps", (6,))
    line = fail(capsys, "--run", run, "--protocol", "finetune", *FEW, code=1)
    assert line.startswith("loss: expected a finite loss and gradient, got a non-finite step 6; ")
    assert (run / "finetune" / "checkpoints" / "rescue_step_00000006").is_dir()
    evaluate(run, "finetune", *FEW, "--nonfinite", "skip", "--out", run / "skipped")
    assert [line.get("skipped", 0) for line in untimed(run / "skipped")] == [0, 0, 1, 0, 0, 0, 0]


def test_the_options_of_a_classifier_name_no_other_place(run, tmp_path, stop_at, capsys):
    with stop_at(7):
        evaluate(run, "finetune", *FEW, code=128 + signal.SIGTERM)
    config = run / "finetune" / "config.yaml"
    text = config.read_text()
    config.write_text(text + f"out: {tmp_path / 'elsewhere'}\n")
    evaluate(run, "finetune", "--resume")
    assert not (tmp_path / "elsewhere").exists()
    assert (run / "finetune" / "summary.json").is_file()
    config.write_text(text + "epoch: 3\n")
    assert fail(capsys, "--run", run, "--protocol", "finetune", "--resume").startswith(
        f"out: expected options of prmim evaluate in {config}, got epoch"
    )


def test_options_given_with_resume_hold(run, stop_at):
    with stop_at(7):
        evaluate(run, "finetune", *FEW, code=128 + signal.SIGTERM)
    evaluate(run, "finetune", "--resume", "--epochs", "3")
    assert untimed(run / "finetune")[-1]["step"] == 36


def test_a_resumed_classifier_keeps_its_encoder(run, stop_at, capsys):
    with stop_at(7):
        evaluate(run, "finetune", *FEW, "--checkpoint", 12, code=128 + signal.SIGTERM)
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--resume", "--checkpoint", 7)
    assert "got a change of checkpoint from 12 to 7, which past steps depend on" in line
    with stop_at(9):
        evaluate(run, "finetune", *FEW, "--checkpoint", "null", "--resume", code=128 + signal.SIGTERM)
    assert "\ncheckpoint: 12\n" in (run / "finetune" / "config.yaml").read_text()


def test_an_earlier_checkpoint_can_be_evaluated(tiny, tmp_path, capsys):
    config = tiny(epochs=2, checkpoint_every=1)
    pretrain(config)
    run = config.run_path
    for step in (12, 24):
        evaluate(run, "finetune", *FEW, "--checkpoint", step, "--out", tmp_path / str(step))
        assert main(["evaluate", "--run", str(run), "--protocol", "knn", "--checkpoint", str(step),
                     "--eval_limit", "50"]) == 0  # fmt: skip
        assert f"checkpoint of step {step}\n" in capsys.readouterr().out
        assert json.loads((run / "evaluation.json").read_text())["step"] == step
    lines = [untimed(tmp_path / step)[0]["grad_norm"] for step in ("12", "24")]
    assert lines[0] != lines[1]


def test_images_that_cannot_be_read_are_left_out_and_told(run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8), dtype=np.uint8)
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / str(number)
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / "first.png")
        Image.fromarray(image).save(folder / "second.png")
    (tmp_path / "photos" / "3" / "second.png").write_bytes(b"")
    evaluate(run, "finetune", *FEW, "--test_data", tmp_path / "photos")
    record = json.loads((run / "finetune" / "evaluation.json").read_text())
    assert record["test_images"] == 19
    assert list(record["unreadable_test_images"]) == ["3/second.png"]
    assert record["per_class"]["3"]["images"] == 1
    assert capsys.readouterr().out.count("Unreadable test images, left out: 1\n") == 1


def test_a_batch_that_is_larger_than_an_epoch_is_told(run, capsys):
    evaluate(run, "finetune", *FEW, "--batch_size", "1440", "--epochs", "4", "--base_learning_rate", "0.01")
    assert "note: with batch_size 1,440, an epoch of 1,438 images has 1.0 steps" in capsys.readouterr().out


def test_a_probe_whose_steps_lead_nowhere_is_told(run, tmp_path, capsys):
    options = ["--epochs", "2", "--batch_size", "120", "--base_learning_rate"]
    evaluate(run, "linear", *options, "0.1", "--out", tmp_path / "short")
    out = capsys.readouterr().out  # 0.001 x 0.1 x 120 / 256 x 24
    assert "trust x learning rate x steps is 0.0011, too small for the head to converge" in out
    assert "try --base_learning_rate 900\n" in out
    evaluate(run, "linear", *options, "0.1", "--trust", "5", "--out", tmp_path / "long")
    assert "trust x" not in capsys.readouterr().out


def test_classes_of_one_name_are_refused(run, tmp_path, capsys):
    arrays = {"images": np.zeros((6, 8, 8), np.uint8), "labels": np.arange(6) % 3}
    np.savez(tmp_path / "twice.npz", **arrays, names=np.array(["cat", "dog", "cat"]))
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--data", tmp_path / "twice.npz", "--holdout", "0.5")
    assert line == "data: expected labelled images, some of them held out, but two classes have the same name"
    names = np.array([*"0123456789", "9"])
    np.savez(tmp_path / "eleven.npz", **arrays, names=names)
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--test_data", tmp_path / "eleven.npz")
    assert line.endswith("eleven.npz: two classes have the same name")


def test_several_processes_need_halves_for_mixing(run, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--batch_size", "9")
    message = "batch_size: expected an even number of images per process for mixup and cutmix, got 9 for 3 processes"
    assert line == message
    # Without mixing, the next check fails: the NumPy engine does not join other processes.
    line = fail(capsys, "--run", run, "--protocol", "finetune", "--batch_size", "9", "--mixup", "0", "--cutmix", "0")
    assert line.startswith("backend: expected one that joins the 3 launched processes, got fake")


def test_crashes_leave_no_trace(run, fake, monkeypatch, tmp_path, capsys):
    options = ["--epochs", "3", "--batch_size", "120", "--base_learning_rate", "0.2", "--log_every", "5",
               "--test_every", "1", "--checkpoint_every", "1", "--ema_decay", "0.9"]  # fmt: skip
    evaluate(run, "finetune", *options, "--out", tmp_path / "whole")
    engine = sys.modules[fake.__module__].ClassifierEngine
    take = engine.train_step

    def crash_at(step):
        def train_step(self, *batch):
            if self.step + 1 == step:
                raise RuntimeError("power cut")
            take(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "train_step", train_step)
            assert "power cut" in fail(capsys, "--run", run, "--protocol", "finetune", *options, "--resume", code=1)

    for step in (3, 13, 14, 31):
        crash_at(step)
    with monkeypatch.context() as patch:
        patch.setattr("prmim_train.evaluate.classifier.draw_learning", lambda *given: 1 / 0)
        fail(capsys, "--run", run, "--protocol", "finetune", *options, "--resume", code=1)
    assert not (run / "finetune" / "evaluation.json").exists()
    evaluate(run, "finetune", "--resume")
    assert untimed(run / "finetune") == untimed(tmp_path / "whole")
    assert [line["step"] for line in untimed(run / "finetune") if "test_accuracy" in line] == [12, 24, 36]
    for name in ("evaluation.json", "confusion.png", "curves.png"):
        assert (run / "finetune" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_no_image_that_is_tested_on_is_learned_from(run, fake, tiny):
    evaluate(run, "finetune", *FEW)
    data = open_data(tiny())
    seen = set(np.concatenate(fake.made[-1].seen).tolist())
    assert seen == set(data.train.tolist())
    assert not seen & set(data.held_out.tolist())

"""The study: every arm can be built, pieces add up to whole runs, and the table says what the results say."""

import json
import math
import time

import numpy as np
import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import arms, data, runs, tables
from benchmarks.quality.arms import ARMS, DEFAULT, DENSE, PARTIAL, STUDIES, Study, World
from benchmarks.quality.data import Images
from benchmarks.report import Report
from prmim_train.config import PretrainConfig

TINY = World(
    data="digits",
    pretrain={
        **{"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        **{"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "batch_size": 64, "precision": "float32"},
    },
    finetune={"epochs": 1},
)


@pytest.fixture
def study(monkeypatch):
    study = Study("tiny", TINY, (DENSE, DEFAULT), epochs=2, seeds=1)
    monkeypatch.setitem(STUDIES, "tiny", study)
    return study


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_study_is_a_valid_configuration_of_its_own(name):
    study = STUDIES[name]
    configs = [PretrainConfig(**{**study.world.pretrain, **ARMS[arm].options}) for arm in study.arms]
    told = [
        (config, ARMS[arm].detached, ARMS[arm].equal_compute) for config, arm in zip(configs, study.arms, strict=True)
    ]
    defaults = [
        arm
        for arm, it in zip(study.arms, told, strict=True)
        if it == (PretrainConfig(**study.world.pretrain), False, False)
    ]
    assert defaults == [DEFAULT]
    assert all(told.count(it) == 1 for it in told)
    assert study.arms[0] == DENSE


def test_equal_compute_means_as_many_multiply_accumulates_as_dense():
    study = STUDIES["confirm"]
    run = runs.Run(study, "PR-MIM, equal compute", 0, Images("x.npz", "y.npz"), None, "torch")
    ratio = runs.cost_ratio(study.world.pretrain, ARMS[DEFAULT])
    assert 0.5 < ratio < 0.9
    assert run.options()["epochs"] * ratio == pytest.approx(study.epochs, abs=ratio / 2)
    assert runs.Run(study, DENSE, 0, Images("x.npz", "y.npz"), None, "torch").options()["epochs"] == study.epochs


def test_a_study_is_done_in_pieces_and_what_is_done_is_skipped(study, tmp_path, capsys):
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--json", str(tmp_path)]
    options = ["--study", "tiny", "--arms", DEFAULT, "--jobs", "2", *where]
    images = data.find("digits", tmp_path, tmp_path)
    waiting = [runs.Run(study, DEFAULT, 0, images, tmp_path / "runs", "torch")]
    runs.carry_out(waiting, tmp_path / "results", jobs=2, deadline=time.monotonic() + 1)  # stopped while it starts
    assert not (tmp_path / "results").exists()
    assert quality.main([*options, "--minutes", "5"]) == 0
    found = tables.load(study, tmp_path / "results")
    assert {arm: list(seeds) for arm, seeds in found.items()} == {DENSE: [], DEFAULT: [0]}
    result = found[DEFAULT][0]
    assert result["epochs"] == 2
    assert result["macs_to_dense"] < 1
    assert runs.cost_ratio(study.world.pretrain, ARMS[DENSE]) == 1
    assert all(0 < result[name] <= 1 for name in ("linear", "knn", "finetune"))
    assert result["loss_thrown"] > 0
    capsys.readouterr()
    assert quality.main([*options, "--minutes", "5"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 runs are done" in printed
    assert f"{DEFAULT} " in printed
    assert "..." not in printed


def test_a_command_that_fails_is_named_and_nothing_is_written(study, tmp_path, capsys):
    study.world.pretrain["depth"] = 0
    try:
        where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--json", str(tmp_path)]
        assert quality.main(["--study", "tiny", "--jobs", "1", "--minutes", "5", *where]) == 1
    finally:
        study.world.pretrain["depth"] = 1
    assert "dense, seed 0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_images_that_are_not_there_are_asked_for(study, tmp_path, capsys):
    assert quality.main(["--study", "screen", "--minutes", "1", "--data", str(tmp_path), "--json", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("data: expected ")


def test_cifar_is_read_as_its_authors_publish_it(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), np.array([3, 1, 2, 0, 9, 5], np.uint8)
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(6, -1)], axis=1)
    records[:4].tofile(folder / "data_batch_1.bin")
    records[4:].tofile(folder / "data_batch_2.bin")
    records[:2].tofile(folder / "test_batch.bin")
    train, test = data.find("cifar10", tmp_path, tmp_path / "prepared")
    with np.load(train) as archive:
        assert (archive["images"] == images).all()
        assert (archive["labels"] == labels).all()
        assert archive["names"][9] == "truck"
    with np.load(test) as archive:
        assert (archive["images"] == images[:2]).all()


def test_differences_between_pixels_are_added_up(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    packed = images.copy()
    packed[..., ::2] -= images[..., 1:2]
    for axis in (2, 1):
        packed = np.diff(packed, axis=axis, prepend=np.uint8(0)).astype(np.uint8)
    for part in ("train", "test"):
        np.savez(tmp_path / f"cifar10_{part}.npz", residuals=packed, labels=np.arange(3, dtype=np.uint8))
    with np.load(data.find("cifar10", tmp_path, tmp_path / "prepared").train) as archive:
        assert (archive["images"] == images).all()


def results(**accuracies):
    common = {"epochs": 2, "macs_to_dense": 0.7, "loss_decoded": 0.5}
    return {
        arm: {seed: {**common, "linear": value} for seed, value in enumerate(found)}
        for arm, found in accuracies.items()
    }


def test_the_table_tells_means_errors_and_paired_differences(tmp_path, capsys):
    found = results(a=[0.5, 0.52, 0.54], b=[0.51, 0.55], c=[0.6])
    found = {DENSE: found["a"], PARTIAL: found["b"], DEFAULT: found["c"], "PR-MIM 0.25": {}}
    tables.show(found, Report("quality", {}, tmp_path))
    content = json.loads((tmp_path / "quality.json").read_text())["tables"]
    assert content["accuracy, %"][DENSE] == {"seeds": 3, "linear": "52.00 ± 1.15"}
    assert content["accuracy, %"][DEFAULT] == {"seeds": 1, "linear": "60.00"}
    assert content["points above dense"] == {PARTIAL: {"linear": "+2.00 ± 1.00"}, DEFAULT: {"linear": "+10.00"}}
    assert "PR-MIM 0.25" not in capsys.readouterr().out
    assert math.isnan(tables.mean_and_error([1.0])[1])


def of_tiny(arm):
    options = json.loads(json.dumps({**TINY.pretrain, **ARMS[arm].options}))
    return {"arm": arm, "seed": 0, "epochs": 2, "options": options, "finetune_options": TINY.finetune}


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"arm": PARTIAL}, {"finetune_options": {"epochs": 2}}, {"options": {"depth": 2}}]
)
def test_results_of_other_options_do_not_count(study, tmp_path, change):
    (tmp_path / "tiny").mkdir()
    for name, content in {"a": of_tiny(DENSE), "b": {**of_tiny(DEFAULT), **change}}.items():
        (tmp_path / "tiny" / f"{name}.json").write_text(json.dumps(content))
    found = tables.load(study, tmp_path)
    assert (list(found[DENSE]), list(found[DEFAULT])) == ([0], [])


def test_trainings_that_are_alike_in_two_studies_are_seen_together(study, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "short", Study("short", TINY, (DENSE,), epochs=1, seeds=1))
    monkeypatch.setitem(STUDIES, "same", Study("same", TINY, (DENSE, PARTIAL), epochs=2, seeds=2))
    for name, arm, seed in [("tiny", DENSE, 0), ("same", DENSE, 0), ("same", DENSE, 1), ("short", PARTIAL, 0)]:
        (tmp_path / name).mkdir(exist_ok=True)
        content = {**of_tiny(arm), "study": name, "seed": seed}
        (tmp_path / name / f"{arm}-{seed}.json").write_text(json.dumps(content))
    found = tables.load_alike(study, tmp_path)
    assert {seed: run["study"] for seed, run in found[DENSE].items()} == {0: "tiny", 1: "same"}
    assert not found[PARTIAL]


def test_steps_of_arms_are_timed_beside_the_dense_one(study, tmp_path, capsys):
    words = ["--results", str(tmp_path), "--json", str(tmp_path), "--time", "2"]
    assert quality.main(["--study", "tiny", *words]) == 0
    assert "training step" in capsys.readouterr().out
    rows = json.loads((tmp_path / "quality-tiny.json").read_text())["tables"]["training step"]
    assert list(rows) == [DENSE, DEFAULT]
    assert rows[DENSE]["to dense"] == rows[DENSE]["MACs to dense"] == 1
    assert rows[DEFAULT]["ms per image"] > 0
    assert rows[DEFAULT]["MACs to dense"] < 1


def test_the_picture_shows_what_there_is(tmp_path):
    found = results(a=[0.5, 0.52], b=[0.49, 0.5], c=[0.52, 0.53])
    tables.draw({DENSE: found["a"], PARTIAL: found["b"], DEFAULT: found["c"]}, tmp_path / "accuracy.png", "Digits.")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_detaching_keeps_what_is_rebuilt_and_cuts_its_gradient(monkeypatch):
    torch = pytest.importorskip("torch")
    from benchmarks.quality import detached
    from prmim_core import Grid, Schedule, TokenCounts
    from prmim_torch import ProgressiveReconstruction, make_plan

    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    plan = make_plan(schedule, torch.arange(16)[None])
    rebuild, features = ProgressiveReconstruction(8, schedule), torch.randn(1, 8, 8, requires_grad=True)
    before = rebuild(features, plan)
    monkeypatch.setattr(ProgressiveReconstruction, "_mix", ProgressiveReconstruction._mix)
    detached.detach()
    after = rebuild(features, plan)
    assert torch.equal(before, after)
    after[:, 8:].sum().backward()
    assert features.grad is None or not features.grad.any()
    assert rebuild.norm.bias.grad.any()


def test_arms_are_named_once():
    assert len(
        {runs.Run(STUDIES["confirm"], arm, 0, Images("", None), None, "torch").label for arm in arms.ARMS}
    ) == len(ARMS)

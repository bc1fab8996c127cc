"""The study of accuracy: arms, resumed trainings, stored records and tables."""

import io
import json
import math
import os
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import __main__ as quality
from benchmarks.quality import correct, data, records, runs, tables, verdicts
from benchmarks.quality.arms import (
    ARMS,
    DEEPER,
    DEFAULT,
    DENSE,
    EQUAL_ARMS,
    LONGER,
    MASKALIGN,
    PARTIAL,
    PATCHES,
    STUDIES,
    Study,
    World,
)
from benchmarks.quality.data import Images
from benchmarks.report import Report
from prmim_train.config.pretrain import pretrain_config
from prmim_train.data.batches import split_indices
from prmim_train.data.sources import open_source
from prmim_train.evaluate.scores import write_predictions
from tests.forked import Forked

TINY = World(
    data="digits",
    images=(1438, 359),
    pretrain={
        **{"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        **{"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "batch_size": 64, "precision": "float32"},
    },
    finetune={"epochs": 1},
)


@pytest.fixture
def study(monkeypatch):
    study = Study("tiny", TINY, (DENSE, DEFAULT), epochs=2, seeds=1, baselines=True)
    monkeypatch.setitem(STUDIES, "tiny", study)
    return study


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_a_study_are_valid_and_distinct(name):
    study = STUDIES[name]
    trained = {
        arm: (pretrain_config(**study.options(arm)), ARMS[arm].detached, ARMS[arm].equal_compute) for arm in study.arms
    }
    if DEFAULT in trained:
        assert trained[DEFAULT] == (pretrain_config(**study.world.pretrain), False, False)
    if PATCHES in trained:
        assert trained[PATCHES] == (pretrain_config(**{**study.world.pretrain, "thrown_target": "patch"}), False, False)
    assert sorted(study.order(study.arms, 1)) == sorted((arm, 0) for arm in study.arms)
    assert all(list(trained.values()).count(training) == 1 for training in trained.values())
    assert study.arms[0] in (DENSE, MASKALIGN)


def test_equal_compute_trains_for_the_macs_of_the_dense_arm():
    study = STUDIES["confirm"]
    run = runs.Run(study, "PR-MIM, equal compute", 0, Images("x.npz", "y.npz"), None, "torch")
    ratio = study.cost_ratio(DEFAULT)
    assert 0.5 < ratio < 0.9
    assert run.options()["epochs"] * ratio == pytest.approx(study.epochs, abs=ratio / 2)
    assert runs.Run(study, DENSE, 0, Images("x.npz", "y.npz"), None, "torch").options()["epochs"] == study.epochs


@pytest.mark.parametrize("name", ["long", "grid14"])
@pytest.mark.parametrize("arm", EQUAL_ARMS)
def test_all_ways_of_equal_compute_take_the_macs_of_the_dense_arm(name, arm):
    study = STUDIES[name]
    ratio = study.cost_ratio(arm)
    assert study.arm_epochs(arm) * ratio == pytest.approx(study.epochs, abs=ratio / 2)
    method = pretrain_config(**study.options(arm)).method
    depth = study.world.pretrain["decoder_depth"]
    assert method.decoder_depth == (2 * depth if arm == DEEPER else depth)
    assert method.counts.thrown == method.counts.num_tokens // 2


def test_a_study_resumes_interrupted_trainings_and_skips_finished_ones(study, tmp_path, capsys, monkeypatch):
    def start(run, words, threads):
        run.path.parent.mkdir(parents=True, exist_ok=True)
        return Forked(words[1:], os.environ | {"OMP_NUM_THREADS": str(threads)}, run.log)

    monkeypatch.setattr(runs, "_start", start)
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--json", str(tmp_path)]
    options = ["--study", "tiny", "--arms", DEFAULT, "--jobs", "2", *where]
    images = data.find(TINY, tmp_path, tmp_path)
    waiting = [runs.Run(study, DEFAULT, 0, images, tmp_path / "runs", "torch")]
    runs.carry_out(
        waiting, tmp_path / "results", jobs=2, deadline=time.monotonic() + 0.1
    )  # interrupted during its start
    assert not (tmp_path / "results").exists()
    assert quality.main([*options, "--minutes", "5"]) == 0
    found = records.load(study, tmp_path / "results")
    assert {arm: list(seeds) for arm, seeds in found.items()} == {DENSE: [], DEFAULT: [0]}
    result = found[DEFAULT][0]
    assert list(result)[:7] == ["study", "arm", "seed", "linear", "knn", "finetune", "untrained"]
    assert result["epochs"] == 2
    assert result["macs_to_dense"] < 1
    assert study.cost_ratio(DENSE) == 1
    assert "correct" not in result  # held-out images
    assert all(0 < result[name] <= 1 for name in ("linear", "knn", "finetune"))
    assert result["loss_thrown"] > 0
    assert result["pixels"]["knn"] > 0.9 > result["untrained"]["knn"] > 0.1
    capsys.readouterr()
    assert quality.main([*options, "--minutes", "5"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 runs are done" in printed
    assert f"{DEFAULT} " in printed
    assert "..." not in printed


def test_a_failed_command_is_reported_and_writes_no_record(study, tmp_path, capsys):
    study.world.pretrain["depth"] = 0
    try:
        where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--json", str(tmp_path)]
        assert quality.main(["--study", "tiny", "--jobs", "1", "--minutes", "5", *where]) == 1
    finally:
        study.world.pretrain["depth"] = 1
    assert "dense, seed 0" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_missing_images_are_reported(study, tmp_path, capsys):
    assert quality.main(["--study", "screen", "--minutes", "1", "--data", str(tmp_path), "--json", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("data: expected ")


def test_the_recipe_of_the_digits_is_chosen_without_its_held_out_images(tmp_path):
    images = data.find(STUDIES["recipe"].world, tmp_path, tmp_path)
    assert images.test is None
    digits, chosen = open_source("digits", channels=1), open_source(images.train, channels=1)
    train, held_out = split_indices(digits.labels, holdout=0.2, seed=0)
    assert len(chosen) == len(train) == 1438
    known = {digits.read(int(index)).tobytes() for index in train}
    unknown = {digits.read(int(index)).tobytes() for index in held_out} - known
    assert {chosen.read(index).tobytes() for index in range(len(chosen))} == known
    assert len(unknown) > 300
    np.testing.assert_array_equal(chosen.labels, digits.labels[train])


def write_cifar(folder, images, name="images"):
    """Write the same few images for training and test; return their world."""
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        np.savez(folder / f"cifar10_{part}.npz", **{name: images, "labels": np.arange(len(images))})
    return replace(STUDIES["long"].world, images=(len(images), len(images)))


def test_images_of_another_number_are_refused(tmp_path, capsys):
    write_cifar(tmp_path, np.zeros((3, 32, 32, 3), np.uint8))
    words = ["--study", "screen", "--minutes", "1", "--data", str(tmp_path), "--runs", str(tmp_path)]
    assert quality.main([*words, "--json", str(tmp_path)]) == 1
    expected = "expected 25,000 training and 10,000 test images of cifar10"
    assert capsys.readouterr().err == f"data: {expected} in {tmp_path}, got 3 training and 3 test images\n"


def test_prepared_images_are_those_of_the_folder(tmp_path):
    prepared = tmp_path / "prepared"
    for name, value in (("a", 1), ("b", 2), ("a", 1)):
        world = write_cifar(tmp_path / name, np.full((3, 32, 32, 3), value, np.uint8))
        with np.load(data.find(world, tmp_path / name, prepared).train) as archive:
            assert (archive["images"] == value).all()
    with pytest.raises(FileNotFoundError, match=r"^data: expected .*cifar10_train\.npz, got no such file$"):
        data.find(world, tmp_path / "nowhere", prepared)


def test_stored_differences_between_pixels_are_summed(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    packed = images.copy()
    packed[..., ::2] -= images[..., 1:2]
    for axis in (2, 1):
        packed = np.diff(packed, axis=axis, prepend=np.uint8(0)).astype(np.uint8)
    world = write_cifar(tmp_path, packed, "residuals")
    with np.load(data.find(world, tmp_path, tmp_path / "prepared").train) as archive:
        assert (archive["images"] == images).all()


def write_tar(path, images, labels):
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            member = tarfile.TarInfo(f"train/class{label}/{number}.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)


def test_images_of_tar_files_are_decoded_once(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), [1, 0, 1]
    world = replace(STUDIES["grid14"].world, images=(3, 3))
    with pytest.raises(FileNotFoundError, match=r"imagenette128_train\.tar"):
        data.find(world, tmp_path, tmp_path / "prepared")
    for part in ("train", "val"):
        write_tar(tmp_path / f"imagenette128_{part}.tar", images, labels)
    found = data.find(world, tmp_path, tmp_path / "prepared")
    with np.load(found.test) as archive:
        assert (archive["images"] == images).all()
        assert archive["labels"].tolist() == labels
        assert archive["names"].tolist() == ["class0", "class1"]
    monkeypatch.setattr(data, "open_source", None)
    assert data.find(world, tmp_path, tmp_path / "prepared") == found


def results(**accuracies):
    common = {"epochs": 2, "macs_to_dense": 0.7, "loss_decoded": 0.5}
    return {
        arm: {seed: {**common, "linear": value} for seed, value in enumerate(found)}
        for arm, found in accuracies.items()
    }


def test_tables_show_means_errors_and_paired_differences(tmp_path, capsys):
    found = results(a=[0.5, 0.52, 0.54], b=[0.51, 0.55], c=[0.6])
    found = {DENSE: found["a"], PARTIAL: found["b"], DEFAULT: found["c"], "PR-MIM 0.25": {}}
    tables.show(found, Report("quality", {}, tmp_path))
    content = json.loads((tmp_path / "quality.json").read_text())["tables"]
    assert content["accuracy, %"][DENSE] == {"seeds": 3, "linear": "52.00 ± 1.15"}
    assert content["accuracy, %"][DEFAULT] == {"seeds": 1, "linear": "60.00"}
    assert content["points above dense"] == {PARTIAL: {"linear": "+2.00 ± 1.00"}, DEFAULT: {"linear": "+10.00"}}
    assert "PR-MIM 0.25" not in capsys.readouterr().out
    assert math.isnan(tables.mean_and_error([1.0])[1])


def test_pages_compare_with_dense_if_it_was_trained():
    found = {DENSE: {}, DEFAULT: {0: {**dict.fromkeys(tables.ACCURACIES, 0.5), "macs_to_dense": 0.75, "epochs": 2}}}
    assert "50.00 %" in tables.markdown(found)
    assert "above dense" not in tables.markdown(found)
    found[DENSE] = {0: {**dict.fromkeys(tables.ACCURACIES, 0.25), "macs_to_dense": 1.0, "epochs": 2}}
    assert "+25.00" in tables.markdown(found)


def record_of(arm, seed=0, study="tiny"):
    options = {**TINY.pretrain, **ARMS[arm].options}
    record = {"study": study, "arm": arm, "seed": seed, "epochs": 2, "steps": 45, "test_images": 359}
    return {**record, "options": options, "finetune_options": TINY.finetune}


def test_saving_sorts_records_and_replaces_an_older_one(study, tmp_path):
    for arm, seed in [(DEFAULT, 1), ("no longer an arm", 0), (DEFAULT, 0), (DENSE, 0), (DEFAULT, 1)]:
        number = len(records.read(records.path_of(study, tmp_path)))
        records.save({"arm": arm, "seed": seed, "number": number}, study, tmp_path)
    assert [tuple(record.values()) for record in records.read(tmp_path / "tiny.jsonl")] == [
        (DENSE, 0, 3),
        (DEFAULT, 0, 2),
        (DEFAULT, 1, 4),
        ("no longer an arm", 0, 1),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.jsonl"]


@pytest.mark.parametrize("name", STUDIES)
def test_stored_records_are_of_the_current_options(name):
    stored = records.read(records.path_of(STUDIES[name], quality.RESULTS))
    assert sum(map(len, records.load(STUDIES[name], quality.RESULTS).values())) == len(stored)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 3},
        {"steps": 90},
        {"test_images": 777},
        {"arm": PARTIAL},
        {"finetune_options": {"epochs": 2}},
        {"options": {**TINY.pretrain, "depth": 2}},
        {"options": {**TINY.pretrain, **ARMS[DEFAULT].options, "throw_ratio": 0.25}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_records_of_other_options_do_not_count(study, tmp_path, change):
    for record in (record_of(DENSE), {**record_of(DEFAULT), **change}):
        records.save(record, study, tmp_path)
    found = records.load(study, tmp_path)
    assert (list(found[DENSE]), list(found[DEFAULT])) == ([0], [])


def test_options_of_the_same_meaning_are_the_same(study):
    record = record_of(DENSE)
    defaults = {"throw_ratio": 0, "crop_scale": [0.2, 1], "thrown_weight": 1.0}
    ignored = {"holdout": 0.0, "epochs": 2, "backend": "jax"}
    assert study.has({**record, "options": {**record["options"], **defaults, **ignored}})


def test_records_of_equal_trainings_in_two_studies_are_shown_together(study, tmp_path, monkeypatch):
    same = Study("same", TINY, (DENSE, PARTIAL), epochs=2, seeds=2)
    short = Study("short", TINY, (DENSE,), epochs=1, seeds=1)
    for other in (short, same):
        monkeypatch.setitem(STUDIES, other.name, other)
    for owner, arm, seed in [(study, DENSE, 0), (same, DENSE, 0), (same, DENSE, 1), (short, PARTIAL, 0)]:
        records.save(record_of(arm, seed, owner.name), owner, tmp_path)
    found = records.load_alike(study, tmp_path)
    assert {seed: record["study"] for seed, record in found[DENSE].items()} == {0: "tiny", 1: "same"}
    assert not found[PARTIAL]


def test_steps_are_timed_relative_to_the_dense_arm(study, tmp_path, capsys):
    words = ["--results", str(tmp_path), "--json", str(tmp_path), "--time", "2"]
    assert quality.main(["--study", "tiny", *words]) == 0
    assert "training step" in capsys.readouterr().out
    rows = json.loads((tmp_path / "quality-tiny.json").read_text())["tables"]["training step"]
    assert list(rows) == [DENSE, DEFAULT]
    assert rows[DENSE]["to dense"] == rows[DENSE]["MACs to dense"] == 1
    assert rows[DEFAULT]["ms per image"] > 0
    assert rows[DEFAULT]["MACs to dense"] < 1


def test_arms_without_a_step_of_their_own_are_timed_as_the_arm_of_equal_options(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "tiny", Study("tiny", TINY, (PARTIAL, DEFAULT, LONGER, DEEPER), epochs=2, seeds=1))
    words = ["--results", str(tmp_path), "--json", str(tmp_path), "--time", "1", "--arms", LONGER, DEEPER]
    assert quality.main(["--study", "tiny", *words]) == 0
    rows = json.loads((tmp_path / "quality-tiny.json").read_text())["tables"]["training step"]
    assert list(rows) == [PARTIAL, DEFAULT, DEEPER]
    assert rows[PARTIAL][f"to {PARTIAL}"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["maskalign", "--time", "1"], "teacher: expected the folder of a model, got runs/grid14-teacher, which "),
        (["imagenette", "--plot", "x.png"], "plot: expected records of arms such as 'PR-MIM, cells', got none"),
    ],
)
def test_what_a_study_lacks_is_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    assert quality.main(["--json", str(tmp_path), "--study", *words]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_the_figure_is_drawn_from_the_arms_at_hand(tmp_path):
    found = results(a=[0.5, 0.52], b=[0.49, 0.5], c=[0.52, 0.53])
    tables.draw({DENSE: found["a"], PARTIAL: found["b"], DEFAULT: found["c"]}, tmp_path / "accuracy.png", "Digits.")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_detaching_keeps_the_features_and_stops_their_gradient(monkeypatch):
    torch = pytest.importorskip("torch")
    from benchmarks.quality import detached
    from prmim_core import Grid, Schedule, TokenCounts
    from prmim_torch import ProgressiveReconstruction, make_plan

    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    plan = make_plan(schedule, torch.arange(16)[None])
    rebuild, features = ProgressiveReconstruction(8, schedule.grid), torch.randn(1, 8, 8, requires_grad=True)
    before = rebuild(features, plan)
    monkeypatch.setattr(ProgressiveReconstruction, "_mix", ProgressiveReconstruction._mix)
    detached.detach()
    after = rebuild(features, plan)
    assert torch.equal(before, after)
    after[:, 8:].sum().backward()
    assert features.grad is None or not features.grad.any()
    assert rebuild.norm.bias.grad.any()


def test_labels_of_arms_are_distinct():
    labels = {runs.Run(STUDIES["confirm"], arm, 0, Images("", None), None, "torch").label for arm in ARMS}
    assert len(labels) == len(ARMS)


def test_stored_records_are_those_of_todays_arms():
    for name, study in STUDIES.items():
        stored = records.read(records.path_of(study, quality.RESULTS))
        assert all(study.has(record) for record in stored), name


def write_records(folder, **accuracies):
    """Write records of 20 epochs: linear accuracies by arm, equal other accuracies."""
    study = STUDIES["long"]
    for arm, found in accuracies.items():
        for seed, value in enumerate(found):
            epochs = study.arm_epochs(arm)
            record = {"study": "long", "arm": arm, "seed": seed, "epochs": epochs, "macs_to_dense": 0.7}
            record |= {"steps": study.steps(arm), "test_images": 10_000}
            options = {"options": study.options(arm), "finetune_options": study.world.finetune}
            records.save({**record, **options, **dict.fromkeys(tables.ACCURACIES, value)}, study, folder)


@pytest.mark.parametrize(
    ("cells", "expected", "code"),
    [
        ([0.51, 0.52, 0.53], {"PASS"}, 0),
        ([0.51, 0.52], {"OPEN"}, 0),
        ([0.46, 0.45, 0.44], {"FAIL"}, 1),
    ],
)
def test_verdicts_on_claims(tmp_path, capsys, cells, expected, code):
    rivals = {DENSE: [0.51, 0.5, 0.52], PARTIAL: [0.48, 0.49, 0.5], PATCHES: [0.47, 0.48, 0.49]}
    write_records(tmp_path, **rivals, **{DEFAULT: cells})
    assert verdicts.main(["--results", str(tmp_path)]) == code
    printed, comparisons = capsys.readouterr().out.split("comparisons ")
    claims = printed.split("goals ")[0]
    lines = [line for line in claims.splitlines() if f"[{DEFAULT}] - " in line]
    assert len(lines) == 6
    assert {line.split()[-1] for line in lines} == expected
    assert "0.688" in claims
    assert "] - [" not in comparisons  # no rival has records


def test_claims_that_fail_are_the_misses_that_the_documentation_reports(capsys):
    assert verdicts.main([]) == 1
    claims = capsys.readouterr().out.split("goals ")[0].splitlines()
    failed = [line for line in claims if line.endswith("FAIL")]
    assert [line.split("], at least")[0] for line in failed] == [
        f"long, linear: [{DEFAULT}] - [{DENSE}",
        f"long, linear: [{DEFAULT}] - [{PARTIAL}",
    ]
    assert "-0.16 ± 0.14  [-0.78, +0.46]" in failed[0]


def test_the_error_over_images_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    number = 300
    right = {arm: rng.random((2, number)) < share for arm, share in (("a", 0.6), ("b", 0.5))}
    found = {
        arm: {
            seed: {"test_images": number, "knn": bits.mean(), "correct": {"knn": correct.pack(bits)}}
            for seed, bits in enumerate(rows)
        }
        for arm, rows in right.items()
    }
    difference = (right["a"].astype(int) - right["b"]).mean(axis=0)
    resampled = difference[rng.integers(0, number, (4000, number))].mean(axis=1)
    assert correct.image_error(found["a"], found["b"], "knn") == pytest.approx(resampled.std(), rel=0.05)
    error = 100 * correct.image_error(found["a"], found["b"], "knn")
    assert tables.points(found, "a", "b", "knn").endswith(f" ({error:.2f})")
    del found["b"][0]["correct"], found["b"][1]["correct"]  # as in older records
    assert "(" not in tables.points(found, "a", "b", "knn")


def test_predictions_of_a_training_become_bits(tmp_path):
    write_predictions(tmp_path / "predictions.npz", np.array([0, 1, 2]), {"knn": np.array([0, 2, 2])})
    found = correct.read_correct(tmp_path / "predictions.npz")
    assert correct.unpack(found["knn"], 3).tolist() == [True, False, True]
    assert correct.read_correct(tmp_path / "missing.npz") == {}


@pytest.mark.parametrize(
    ("others", "expected"),
    [({}, "open: 6 of 12 records"), ({DEEPER: [0.6, 0.61, 0.62]}, "PASS"), ({DEEPER: [0.4, 0.41, 0.42]}, "open")],
)
def test_a_goal_holds_by_one_of_its_ways(tmp_path, others, expected):
    write_records(tmp_path, **{DENSE: [0.5, 0.51, 0.52], DEFAULT: [0.5] * 3, LONGER: [0.49, 0.5, 0.51]}, **others)
    found = {"long": records.load(STUDIES["long"], tmp_path)}
    *_, verdict = verdicts.goal_row(found, verdicts.GOALS["long: better than dense at equal compute"])
    assert verdict.startswith(expected)

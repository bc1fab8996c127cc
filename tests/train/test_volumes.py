"""Volumes end to end on both backends: train, stop, resume, evaluate, draw."""

import json

import numpy as np
import pytest

from prmim_train.cli.commands import main

SMALL = {
    "image_size": "8,8,8",
    "patch_size": "4,4,4",
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "mask_ratio": 0.5,
    "throw_ratio": 0.25,
    "crop_scale": "0.1,0.5",
    "epochs": 2,
    "batch_size": 8,
    "min_learning_rate": 0,
    "workers": 0,
    "holdout": 0.25,
    "pictures": 2,
    "precision": "float32",
    "compile": "false",
    "device": "cpu",
}
"""The rest is of the recipe; 4 steps."""


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def scans(tmp_path, backend):
    """Twenty scans of two kinds and various sizes.

    NIfTI files with spacing for torch, arrays for jax.
    """
    rng = np.random.default_rng(0)
    nibabel = pytest.importorskip("nibabel") if backend == "torch" else None
    for k in range(20):
        kind, shape = k % 2, rng.integers((6, 14, 12), (9, 20, 18))
        values = rng.normal(600 * kind - 500, 100, shape).astype(np.int16)
        path = tmp_path / "scans" / f"kind{kind}" / f"{k:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if nibabel is None:
            np.save(path.with_suffix(".npy"), values)
        else:
            image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([-1, -1, 2, 1]))
            nibabel.save(image, path.with_suffix(".nii.gz" if k < 4 else ".nii"))
    spacing = {} if backend == "torch" else {"spacing": "2,1,1"}
    return {"data": tmp_path / "scans", **spacing}


def test_the_recipe_trains_resumes_evaluates_and_draws(backend, scans, stop_and_resume, tmp_path):
    drawn = {"torch": {"reconstructions.png", "schedule.png"}, "jax": set()}[backend]  # what is drawn is the same
    small = {**SMALL, "pictures": len(drawn)}
    start = ["pretrain", "--config", "volume_vit_small", *words(**scans, **small, backend=backend)]
    run = tmp_path / "run"
    stop_and_resume(start, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["evaluation"]["trained"]["linear"] == 1.0  # the kinds differ in brightness
    assert {path.name for path in run.glob("*.png")} >= drawn


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_a_resumed_run_has_the_same_weights_and_keeps_its_spacing(
    backend, scans, stop_and_resume, assert_same_weights, tmp_path, capsys
):
    nothing = words(eval_limit=0, pictures=0)
    start = ["pretrain", "--config", "volume_vit_small", *words(**scans, **SMALL, backend=backend), *nothing]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main([*start, "--out", str(whole)]) == 0
    stop_and_resume(start, half)
    assert_same_weights(half, whole)

    capsys.readouterr()
    assert main(["pretrain", "--out", str(half), "--resume", "--spacing", "9,1,1", "--epochs", "3"]) == 2
    assert "spacing" in capsys.readouterr().err

    features = tmp_path / "features.npz"
    assert main(["features", "--run", str(whole), "--out", str(features)]) == 0
    with np.load(features) as found:
        assert found["features"].shape == (20, 24)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_options_of_volumes_say_what_to_write(scans, capsys):
    data = words(**scans, channels=1)
    cases = {
        "--volumes true": "image_size: expected depth,height,width with volumes, as in --volumes true --image_size 96",
        "--volumes true --image_size 8,8,8 --patch_size 4,4,4 --decoder_dim 12 --embed_dim 24 --num_heads 2 "
        "--decoder_heads 2": "pixel_range: expected low,high or auto",
    }
    for line, message in cases.items():
        assert main(["inspect", *data, *line.split()]) == 2
        assert message in capsys.readouterr().err
    assert main(["stats", "--data", str(scans["data"]), "--volumes", "true"]) == 0
    text = capsys.readouterr().out
    assert "spacing             2 x 1 x 1 mm" in text
    assert "--volumes true --pixel_range" in text
    assert main(["inspect", "--config", "volume_vit_small", *words(**scans)]) == 0
    text = capsys.readouterr().out
    assert "spacing             2 x 1 x 1 mm" in text
    assert "of the volume" in text

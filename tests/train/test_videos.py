"""Videos end to end on both backends: train, stop, resume, evaluate, draw."""

import json

import numpy as np
import pytest
from PIL import Image

from prmim_train.cli.commands import main
from tests.videos import encode, numbered_frames

SMALL = {
    "image_size": "4,8,16",
    "patch_size": "2,4,4",
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "mask_ratio": 0.75,
    "throw_ratio": 0.25,
    "epochs": 2,
    "batch_size": 6,
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
def clips(tmp_path, backend):
    """Sixteen clips of two kinds and various lengths.

    Videos for torch, folders of frames for jax.
    """
    if backend == "torch":
        pytest.importorskip("av")
    for k in range(16):
        folder = tmp_path / "clips" / f"kind{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        frames = numbered_frames(8 + k, 16, 32) // (1 + k % 2)
        if backend == "torch":
            (folder / f"{k:02}.mp4").write_bytes(encode(frames, b_frames=2))
            continue
        (folder / f"{k:02}").mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{k:02}" / f"{number}.png")
    return tmp_path / "clips"


def test_the_recipe_resumes_exactly(backend, clips, stop_and_resume, assert_same_weights, tmp_path, capsys):
    start = ["pretrain", "--config", "video_vit_small", *words(data=clips, **SMALL, backend=backend)]
    start += words(eval_limit=0, pictures=0)
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main([*start, "--out", str(whole)]) == 0
    stop_and_resume(start, half)
    assert json.loads((half / "summary.json").read_text())["steps"] == 4
    assert_same_weights(half, whole)

    capsys.readouterr()
    assert main(["pretrain", "--out", str(half), "--resume", "--frame_stride", "2", "--epochs", "3"]) == 2
    assert "frame_stride" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_the_recipe_evaluates_draws_and_writes_features(clips, tmp_path):
    run, features = tmp_path / "run", tmp_path / "features.npz"
    assert main(["pretrain", "--config", "video_vit_small", *words(data=clips, out=run, **SMALL)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluation"]["trained"]["linear"] == 1.0  # the kinds differ in brightness
    assert {path.name for path in run.glob("*.png")} >= {"reconstructions.png", "schedule.png"}
    assert main(["features", "--run", str(run), "--out", str(features)]) == 0
    with np.load(features) as found:
        assert found["features"].shape == (16, 24)
        assert found["names"][0] == "kind0/00.mp4"


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_inspect_describes_the_frames(clips, capsys):
    given = words(data=clips, **SMALL)
    assert main(["inspect", "--config", "video_vit_small", *given]) == 0
    text = capsys.readouterr().out
    assert "frames              8 to 23, median 16\n  frames per second   25\n" in text
    assert "frames of a crop    4 frames, one in 4: 13 frames of the clip, 0.52 seconds\n" in text
    assert "warning             5 of 16 clips have fewer frames, and repeat their last one" in text
    assert main(["inspect", *given, "--method", "videomae"]) == 0
    assert "frames of a crop    4 frames, 0.16 seconds\n" in capsys.readouterr().out

"""The contact sheet: it shows what a run will see."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import prmim_torch.method
from prmim_core import count_tokens
from prmim_train.cli.commands import main
from prmim_train.config.pretrain import pretrain_config
from prmim_train.pretrain import Pretraining
from prmim_train.report import sheet
from prmim_train.report.figures import HIDDEN, new_figure
from prmim_train.report.sheet import first_samples, sheet_command, sheet_panels
from prmim_train.run.engine import create_engine
from prmim_train.run.prepare import open_data

METHODS = {
    "mae": {},
    "simmim": {"method": "simmim"},
    "weighted": {"throwing": "weighted", "epochs": 2, "attention_start": 1},
    "padded": {"crop_padding": 2},
}


@pytest.mark.parametrize("case", METHODS)
def test_samples_and_plans_are_those_of_the_first_steps(case, tiny, monkeypatch):
    config = tiny(
        **{"backend": "torch", "compile": False, "batch_size": 5, "flip": True, "crop_scale": (0.2, 1.0), "seed": 3},
        **METHODS[case],
    )
    job = Pretraining(config)
    plans, seen = [], []
    make_plan = prmim_torch.method.make_plan

    def recording(*arguments, **named):
        plans.append(make_plan(*arguments, **named))
        return plans[-1]

    monkeypatch.setattr(prmim_torch.method, "make_plan", recording)
    engine = create_engine(config, job.budget)
    with job.batches(engine) as batches:
        for _ in range(2):
            seen.append(next(batches))
            job.take_step(engine, seen[-1])
    samples = first_samples(config, job.data, 8)
    assert samples.step.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    for name in ("images", "index", "boxes"):
        expected = np.concatenate([getattr(batch, name) for batch in seen])[:8]
        np.testing.assert_array_equal(getattr(samples.batch, name), expected)
    assert len(set(samples.batch.index)) == 8
    np.testing.assert_array_equal(samples.plan.order, np.concatenate([plan.order.numpy() for plan in plans])[:8])


def test_there_are_no_more_samples_than_the_run_takes(tiny):
    config = tiny(batch_size=3, epochs=1, holdout=0.0)
    data = open_data(config)
    assert len(first_samples(config, data, 4).batch.index) == 4
    few = replace(data, train=data.train[:2])
    assert len(first_samples(config, few, 4).batch.index) == 2


SHAPES = {
    "rgb": {"image_size": (32, 32), "patch_size": (8, 8), "flip": True},
    "two": {"image_size": (32, 32), "patch_size": (8, 8), "channels": 2, "reconstruction": "none"},
    "thirteen": {"image_size": (32, 32), "patch_size": (8, 8), "channels": 13, "pixel_range": (0.0, 3500.0)},
    "tall": {"image_size": (256, 32), "patch_size": (32, 8), "channels": 1},
    "volume": {"image_size": (4, 16, 16), "patch_size": (2, 4, 4), "embed_dim": 24, "decoder_dim": 96, "volumes": True},
    "clip": {"image_size": (4, 16, 24), "patch_size": (2, 4, 4), "embed_dim": 24, "decoder_dim": 96},
}


def write_images(folder, method):
    shape = (6, *method.image_size, method.channels)
    rng = np.random.default_rng(0)
    depth = np.uint8 if method.pixel_range is None else np.uint16
    np.savez(folder / "a.npz", images=rng.integers(0, 255 if depth == np.uint8 else 3500, shape).astype(depth))
    return str(folder / "a.npz")


def config_of(case, folder):
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_depth": 1, "batch_size": 2, **SHAPES[case]}
    return pretrain_config(data=write_images(folder, pretrain_config(**options).method), **options)


@pytest.mark.parametrize("case", ["rgb", "thirteen", "tall", "volume"])
def test_sheets_are_drawn_whole_and_not_blank(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "NUM_SAMPLES", 2)
    sheet_command(config_of(case, tmp_path), str(tmp_path / "s.png"))
    assert capsys.readouterr().out == f"Sheet: {tmp_path / 's.png'}\n"
    with Image.open(tmp_path / "s.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    assert min(pixels.shape[:2]) > 250
    assert pixels.std() > 20
    white = (pixels == 255).all(axis=2)
    assert white[0].all()  # nothing is clipped
    assert white[-1].all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "s.png"]


@pytest.mark.parametrize("case", ["thirteen", "two"])
def test_the_panels_show_what_the_model_sees(case, tmp_path):
    config = config_of(case, tmp_path)
    samples = first_samples(config, open_data(config), 2)
    panels, method = sheet_panels(config, samples), config.method
    values = samples.batch.images.astype(np.float64)
    high = 255.0 if method.pixel_range is None else 3500.0
    shown = [0, 0, 0] if method.channels == 2 else [0, 1, 2]
    np.testing.assert_allclose(panels["crop"], values[..., shown].clip(0, high) / high, atol=1e-6)
    is_visible = panels["plan"] == 0
    assert (panels["visible"][is_visible] == panels["crop"][is_visible]).all()
    assert (panels["visible"][~is_visible] == HIDDEN).all()
    counts = count_tokens(16, 0.75, 0.5)
    assert counts == method.counts
    numbers = [int((panels["plan"][0] == kind).sum()) // 64 for kind in range(4)]
    # Without a reconstruction, thrown tokens have no stages.
    assert numbers == ([4, 4, 4, 4] if method.is_reconstructed else [4, 4, 8, 0])


def test_the_outline_is_the_area_of_the_crop(tmp_path):
    config = config_of("rgb", tmp_path)
    data = open_data(config)
    axes = new_figure(2, 2).subplots()
    box = np.array([0.25, 1.0, 0.75, 0.5], np.float32)  # mirrored
    sheet._draw_source(axes, data.source, 0, config, box)
    (outline,) = axes.patches
    assert outline.get_bbox().bounds == (16, 8, 16, 16)
    np.testing.assert_allclose(axes.images[0].get_array(), data.source.read(0) / 255)


def test_a_frame_of_a_clip_has_an_outline_each(tmp_path):
    config = config_of("clip", tmp_path)
    axes = new_figure(4, 2).subplots()
    sheet._draw_source(axes, open_data(config).source, 0, config, np.array([0, 0, 0.5, 0.5], np.float32))
    assert [outline.get_x() for outline in axes.patches] == [0, 25]  # two layers of tokens; 24 pixels and a gap


def test_a_large_image_is_read_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "LONGEST_SIDE", 16)
    config = config_of("tall", tmp_path)
    assert sheet._thumbnail(open_data(config).source, 0, config).shape == (16, 2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sheet", "s.txt"], "sheet: expected a file name that ends in .png, .pdf, .svg, got s.txt"),
        (["--sheet", "none/s.png"], "sheet: expected a file in an existing folder, got none/s.png"),
        (
            ["--sheet", "s.png", "--config", "mae_vit_base_linear"],
            "sheet: expected no other option with mae_vit_base_linear, a recipe of evaluate, got s.png",
        ),
    ],
)
def test_wrong_files_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_draws_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "NUM_SAMPLES", 1)
    assert main(["inspect", "--sheet", str(tmp_path / "s.png")]) == 0
    assert capsys.readouterr().out.startswith("No --data given")
    assert (tmp_path / "s.png").exists()

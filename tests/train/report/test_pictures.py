import numpy as np
import pytest
from PIL import Image

from prmim_core import Grid, Schedule, count_tokens, counter_noise, make_plan, patchify
from prmim_methods import MAEConfig, SimMIMConfig
from prmim_train.data.sources import ArraySource, UnreadableImageError
from prmim_train.report.figures import HIDDEN, frames_in_a_row, panel_axes
from prmim_train.report.pictures import (
    NOT_PREDICTED,
    _read_some,
    _reconstruction_caption,
    draw_loss,
    draw_reconstructions,
    draw_schedule,
    reconstruction_panels,
    token_kinds,
)


class Rebuilt:
    """A perfect reconstruction of the tokens that a method supervises."""

    def __init__(self, images, method):
        self.schedule = method.schedule
        plan = make_plan(self.schedule, counter_noise(0, 0, np.arange(len(images)), self.schedule.grid.num_tokens))
        self.order = plan.order
        self.patches = patchify(images / np.float32(255), method.patch_size).astype(np.float32)
        if not method.is_reconstructed:
            np.put_along_axis(self.patches, plan.thrown[..., None], np.nan, axis=1)


def draw(count=2, **options):
    method = MAEConfig(**{"image_size": (32, 32), "patch_size": (4, 4), **options})
    shape = (count, *method.image_size, method.channels)
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return images, Rebuilt(images, method), method


CASES = {
    "rgb": {},
    "grey": {"channels": 1},
    "two": {"channels": 2},
    "four": {"channels": 4},
    "seven": {"channels": 7},
    "wide": {"image_size": (16, 64)},
    "tall": {"image_size": (64, 16), "patch_size": (8, 4)},
    "dense": {"throw_ratio": 0.0},
    "partial": {"reconstruction": "none"},
    "all thrown": {"throw_ratio": 0.75},
    "windows": {"cell_norm": "window", "low_pass": 8.0},
    "one": {"count": 1},
    "stages": {"stages": 5},
    "clip": {"image_size": (4, 16, 24), "patch_size": (2, 4, 4), "decoder_dim": 96, "count": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_drawn_whole_and_not_blank(case, tmp_path):
    images, rebuilt, method = draw(**CASES[case])
    draw_reconstructions(tmp_path / "r.png", images, rebuilt, method)
    draw_schedule(tmp_path / "s.png", rebuilt.order, rebuilt.schedule)
    for name in ("r.png", "s.png"):
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        assert min(pixels.shape[:2]) > 150
        assert pixels.std() > 20
        white = (pixels == 255).all(axis=2)
        assert white[0].all()  # nothing is clipped
        assert white[-1].all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.png", "s.png"]


def test_the_panels_show_each_group_of_tokens_and_nothing_else():
    images, rebuilt, method = draw()
    panels = reconstruction_panels(images, rebuilt, method.patch_size)
    assert list(panels) == ["input", "visible", "decoded", "thrown", "whole"]
    np.testing.assert_allclose(panels["input"], images / 255, atol=1e-6)
    np.testing.assert_allclose(panels["whole"], images / 255, atol=1e-6)
    hidden = [(panels[name] == HIDDEN).all(axis=-1) for name in ("visible", "decoded", "thrown")]
    assert np.array_equal(sum(is_hidden.astype(int) for is_hidden in hidden), np.full(images.shape[:3], 2))
    assert hidden[0].mean() == pytest.approx(0.75, abs=0.01)
    assert hidden[2].mean() == pytest.approx(0.5, abs=0.01)


def test_frames_are_put_side_by_side():
    clips = np.arange(12.0).reshape(1, 3, 2, 2)
    assert frames_in_a_row(clips, np.nan)[0, 1].tolist()[:2] == [2, 3]
    assert frames_in_a_row(clips, -1)[0, 1].tolist() == [2, 3, -1, 6, 7, -1, 10, 11]


def test_what_is_not_predicted_is_shown_as_such():
    images, rebuilt, method = draw(reconstruction="none")
    panels = reconstruction_panels(images, rebuilt, method.patch_size)
    for name in ("thrown", "whole"):
        assert (panels[name] == NOT_PREDICTED).all(axis=-1).mean() == pytest.approx(0.5, abs=0.01)
    assert "Orange tokens are not predicted" in _reconstruction_caption(method)


def test_a_dense_method_has_no_thrown_column():
    images, rebuilt, method = draw(throw_ratio=0.0)
    assert list(reconstruction_panels(images, rebuilt, method.patch_size)) == ["input", "visible", "decoded", "whole"]


def test_predictions_outside_the_range_are_clipped():
    images, rebuilt, method = draw()
    rebuilt.patches = rebuilt.patches * 4 - 1
    whole = reconstruction_panels(images, rebuilt, method.patch_size)["whole"]
    assert whole.min() >= 0
    assert whole.max() <= 1


PIXELS = "tokens predict all pixels of their patch"
MEANS = "Thrown tokens predict the means of 2 x 2 cells of their patch"
SHOWN = ", shown with the brightness and contrast of the true"


@pytest.mark.parametrize(
    ("method", "sentences"),
    [
        (MAEConfig(), [f"Decoded {PIXELS}{SHOWN} patch", f"{MEANS}{SHOWN} image"]),
        (MAEConfig(norm_pix=False), [f"Decoded {PIXELS}", f"{MEANS}{SHOWN} image"]),
        (MAEConfig(cell_norm="window"), [f"Decoded {PIXELS}{SHOWN} patch", f"{MEANS}{SHOWN} patch and its neighbours"]),
        (SimMIMConfig(cell_norm="none"), [f"Decoded {PIXELS}", MEANS]),
        (SimMIMConfig(cells=4), [f"Decoded {PIXELS}", f"{MEANS.replace('2 x 2', '4 x 4')}{SHOWN} image"]),
        (SimMIMConfig(thrown_target="patch"), [f"Decoded and thrown {PIXELS}"]),
        (MAEConfig(thrown_target="patch"), [f"Decoded and thrown {PIXELS}{SHOWN} patch"]),
        (MAEConfig(thrown_target="patch", throw_ratio=0.75), [f"Thrown {PIXELS}{SHOWN} patch"]),
        (MAEConfig(throw_ratio=0.75), [f"{MEANS}{SHOWN} image"]),
        (MAEConfig(throw_ratio=0), [f"Decoded {PIXELS}{SHOWN} patch"]),
        (MAEConfig(throw_ratio=0, extra_cells="known"), [f"Decoded {PIXELS}{SHOWN} patch"]),
        (SimMIMConfig(throw_ratio=0, low_pass=40), [f"Decoded {PIXELS} after a low-pass filter"]),
        (
            SimMIMConfig(reconstruction="none"),
            [f"Decoded {PIXELS}", "Orange tokens are not predicted: this method does not supervise them"],
        ),
        (
            MAEConfig(throw_ratio=0, channels=7),
            [f"Decoded {PIXELS}{SHOWN} patch", "The first three of 7 channels are shown, as red, green and blue"],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_the_caption_tells_what_tokens_predict(method, sentences):
    told = _reconstruction_caption(method)
    assert told == ". ".join(["Numbers count tokens of the 14 x 14 grid", *sentences]) + "."


def colours(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(int(part) for part in colour) for colour in found[counts > 500]}


def test_thrown_tokens_that_are_not_rebuilt_have_no_stages(tmp_path):
    _, rebuilt, _ = draw(stages=2)
    draw_schedule(tmp_path / "rebuilt.png", rebuilt.order, rebuilt.schedule)
    draw_schedule(tmp_path / "left.png", rebuilt.order, rebuilt.schedule, is_reconstructed=False)
    assert len(colours(tmp_path / "rebuilt.png")) > len(colours(tmp_path / "left.png"))


def test_a_schedule_without_decoded_tokens_is_drawn(tmp_path):
    schedule = Schedule(Grid((6, 6)), count_tokens(36, 0.7, 1.0), throwing="random")
    plan = make_plan(schedule, counter_noise(0, 0, np.arange(2), 36))
    draw_schedule(tmp_path / "s.png", plan.order, schedule)
    orange = (224, 123, 40)  # decoded tokens
    assert orange not in colours(tmp_path / "s.png")
    assert token_kinds(plan.order, schedule).max() == 3


def test_token_kinds_count_what_the_schedule_counts():
    _, rebuilt, _ = draw(stages=3)
    kinds = token_kinds(rebuilt.order, rebuilt.schedule)
    for row, order in zip(kinds, rebuilt.order, strict=True):
        assert np.bincount(row).tolist() == [16, 16, 11, 11, 10]
        assert row[order[0]] == 0
        assert row[order[-1]] == 4


@pytest.mark.parametrize(
    ("measured", "labels"),
    [
        ({"loss_decoded": 1.0, "loss_thrown": 2.0}, ["all supervised tokens", "decoded", "thrown"]),
        ({"loss_visible": 1.0, "loss_thrown": 2.0}, ["all supervised tokens", "visible", "thrown"]),
        ({"loss_edges": 1.0}, ["all supervised tokens", "edges"]),  # of an unknown method
        ({"loss_decoded": 1.0, "loss_thrown": None}, ["all supervised tokens", "decoded"]),
        ({"loss_decoded": 1.0, "loss_thrown": 0.0}, ["all supervised tokens", "decoded"]),
        ({"loss_decoded": 1.0, "loss_cells": 0.5}, ["all supervised tokens", "decoded", "cells of other tokens"]),
    ],
    ids=str,
)
def test_the_loss_curves_are_those_that_were_measured(measured, labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("prmim_train.report.pictures.save_figure", lambda figure, path: drawn.append(figure))
    records = [{"epoch": k, "loss": 1 / (k + 1), "lr": 0.1, **measured} for k in range(5)]
    draw_loss(tmp_path / "loss.png", records)
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == labels


def test_the_loss_is_drawn(tmp_path):
    draw_loss(tmp_path / "loss.png", [{"epoch": k, "loss": 1 / (k + 1), "lr": 0.1} for k in range(5)])
    with Image.open(tmp_path / "loss.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_an_unreadable_image_gives_way_to_the_next():
    class Torn(ArraySource):
        def read(self, index):
            if index in (0, 5):
                raise UnreadableImageError(self.name(index), "torn")
            return super().read(index)

    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    shown, sample = _read_some(Torn(images, "ten"), np.arange(10), 2, (8, 8))
    assert sample.tolist() == [1, 6]
    assert shown[:, 0, 0, 0].tolist() == [1, 6]
    with pytest.raises(ValueError, match="at least one readable image"):
        _read_some(Torn(images, "ten"), np.array([0, 5]), 2, (8, 8))


@pytest.mark.parametrize(
    ("aspect", "size", "shape"),
    [
        (1.0, (6.0, 7.0), (6, 6)),
        (8.0, (7.2, 42.4), (36, 1)),  # panels below one another
        (0.125, (10.2, 17.2), (3, 14)),  # two samples beside one another, with a gap after each
    ],
)
def test_panels_of_all_proportions_fit_a_page(aspect, size, shape):
    figure, axes = panel_axes(6, 6, aspect, side=1.0, extra=1.0)
    assert axes.shape == (6, 6)
    assert axes[0, 0].get_subplotspec().get_gridspec().get_geometry() == shape
    assert sum(place.axison for place in figure.axes) == 36
    np.testing.assert_allclose(figure.get_size_inches(), size)

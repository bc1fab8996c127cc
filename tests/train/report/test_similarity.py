import numpy as np
import pytest
from PIL import Image

from prmim_core import Grid, Schedule, count_tokens, counter_noise, make_plan
from prmim_methods import LocalMIMConfig, MaskAlignConfig
from prmim_train.report.similarity import (
    _caption_text,
    _lower_end,
    _mean_text,
    central_token,
    draw_similarity,
    similarity_maps,
)


class Compared:
    """Student features proportional to the teacher's, optionally only visible ones."""

    def __init__(self, grid=(6, 6), batch=3, is_plain=False, noise=0.0):
        rng = np.random.default_rng(0)
        tokens = grid[0] * grid[1]
        self.schedule = Schedule(Grid(grid), count_tokens(tokens, 0.7, 1.0), throwing="random")
        plan = make_plan(self.schedule, counter_noise(0, 0, np.arange(batch), tokens))
        self.order, self.visible = plan.order, plan.visible
        self.teacher = rng.normal(size=(batch, tokens, 8)).astype(np.float32)
        self.student = (3 * self.teacher + noise * rng.normal(size=self.teacher.shape)).astype(np.float32)
        if is_plain:
            np.put_along_axis(self.student, plan.thrown[..., None], np.nan, axis=1)


def method_of(compared, **options):
    size = [4 * length for length in compared.schedule.grid.shape]
    return MaskAlignConfig(teacher="owner/model", image_size=size, patch_size=4, **options)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_maps_hold_cosines():
    compared = Compared(noise=1.0)
    maps = similarity_maps(compared)
    for image, query in enumerate(maps.query):
        for token in (0, 7, 35):
            teacher, student = compared.teacher[image].astype(float), compared.student[image].astype(float)
            assert maps.teacher[image, token] == pytest.approx(cosine(teacher[token], teacher[query]))
            assert maps.student[image, token] == pytest.approx(cosine(student[token], student[query]))
            assert maps.agreement[image, token] == pytest.approx(cosine(student[token], teacher[token]))
    assert maps.agreement.max() < 1


def test_a_factor_makes_no_difference():
    maps = similarity_maps(Compared())
    np.testing.assert_allclose(maps.agreement, 1, rtol=1e-6)
    np.testing.assert_allclose(maps.student, maps.teacher, atol=1e-6)


def test_the_query_is_visible_and_like_itself():
    compared = Compared(is_plain=True)
    maps = similarity_maps(compared)
    for image, query in enumerate(maps.query):
        assert query in compared.visible[image]
        assert maps.student[image, query] == pytest.approx(1)
        assert maps.is_visible[image].sum() == 10
    np.testing.assert_array_equal(np.isfinite(maps.student), maps.is_visible)
    np.testing.assert_array_equal(np.isfinite(maps.agreement), maps.is_visible)
    assert np.isfinite(maps.teacher).all()


def test_a_feature_of_length_zero_is_like_nothing():
    compared = Compared()
    compared.student[:] = 0
    assert np.all(similarity_maps(compared).agreement == 0)


def test_the_central_token_is_the_nearest_candidate():
    everyone = np.ones((1, 20), dtype=bool)
    assert central_token(Grid((4, 5)), everyone).tolist() == [7]  # row 1, column 2
    candidates = np.zeros((2, 20), dtype=bool)
    candidates[0, [0, 13, 19]] = candidates[1, [0, 4]] = True
    assert central_token(Grid((4, 5)), candidates).tolist() == [13, 0]


CASES = {
    "rebuilt": {},
    "plain": {"is_plain": True},
    "noisy": {"noise": 5.0},
    "one": {"batch": 1},
    "wide": {"grid": (4, 8), "batch": 2},
    "tall": {"grid": (8, 4), "batch": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_drawn_whole_and_not_blank(case, tmp_path):
    compared, channels = Compared(**CASES[case]), 1 if case == "noisy" else 3
    size = [4 * length for length in compared.schedule.grid.shape]
    images = np.random.default_rng(0).integers(0, 255, (len(compared.order), *size, channels), dtype=np.uint8)
    draw_similarity(tmp_path / "similarity.png", images, compared, method_of(compared))
    with Image.open(tmp_path / "similarity.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    assert min(pixels.shape[:2]) > 150
    assert pixels.std() > 20
    white = (pixels == 255).all(axis=2)
    for border in (white[0], white[-1], white[:, 0], white[:, -1]):  # nothing is clipped
        assert border.all()


def test_the_caption_says_what_hatching_means():
    compared = Compared(is_plain=True)
    is_visible = similarity_maps(compared).is_visible[0]
    text = _caption_text(compared, is_visible, method_of(compared, reconstruction="none"))
    assert "Hatched: 26 masked tokens, which" in text
    assert "are reconstructed" not in text
    text = _caption_text(Compared(), is_visible, method_of(compared))
    assert "26 masked tokens are reconstructed" in text
    assert "8 numbers for each of the 6 x 6 tokens" in text
    assert "Hatched" not in text


def test_a_method_that_predicts_masked_tokens_only_has_such_a_query():
    compared = Compared()
    np.put_along_axis(compared.student, compared.visible[..., None], np.nan, axis=1)
    maps = similarity_maps(compared)
    assert not maps.is_visible[np.arange(3), maps.query].any()
    np.testing.assert_array_equal(np.isfinite(maps.student), ~maps.is_visible)
    text = _caption_text(compared, maps.is_visible[0], LocalMIMConfig(image_size=24, patch_size=4))
    assert "is the predicted token nearest to the centre" in text
    assert "Hatched: 10 visible tokens, which" in text
    assert _mean_text(maps.agreement[0], maps.is_visible[0]) == "masked 1.00"


def test_means_of_what_is_missing_are_not_told():
    values, is_visible = np.array([0.5, 0.7, 0.1]), np.array([True, True, False])
    assert _mean_text(values, is_visible) == "visible 0.60, masked 0.10"
    assert _mean_text(np.array([0.5, 0.7, np.nan]), is_visible) == "visible 0.60"


@pytest.mark.parametrize(
    ("values", "low"), [([0.55, 1.0], 0.5), ([-0.31, 0.2], -0.4), ([1.0, 1.0], 0.9), ([np.nan, 0.25], 0.2)]
)
def test_colours_begin_at_a_number_that_reads_well(values, low):
    assert _lower_end(np.array(values)) == pytest.approx(low)

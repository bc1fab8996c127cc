"""RandAugment against Pillow's own operations, random erasing against what is said of it."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from prmim_train import augment
from prmim_train.augment import OPERATIONS, Augment, erase, rand_augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)


def photo(height=24, width=32, channels=3, seed=0):
    """Smooth colours with some noise: neither flat nor without structure."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, channels)).astype(float)
    large = np.kron(small, np.ones((height // 3, width // 4, 1)))
    return np.clip(large + rng.normal(0, 12, (height, width, channels)), 0, 255).astype(np.uint8)


def enhanced(kind):
    return lambda picture, strength, sign: kind(picture).enhance(max(0.1, 1 + sign * 0.9 * strength))


def moved(make):
    """By the matrix that Pillow is given."""
    return lambda picture, strength, sign: picture.transform(
        picture.size, Image.Transform.AFFINE, make(strength * sign, *picture.size), Image.Resampling.BICUBIC,
        fillcolor=FILL
    )  # fmt: skip


def brightened(picture, strength, sign):
    table = [min(255, value + int(110 * strength)) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


# What each operation is in Pillow's words, from the description of the recipe; how far rounding may lead away.
ORACLES = {
    "auto_contrast": (lambda picture, *_: ImageOps.autocontrast(picture), 1),
    "equalize": (lambda picture, *_: ImageOps.equalize(picture), 0),
    "invert": (lambda picture, *_: ImageOps.invert(picture), 0),
    "rotate": (lambda p, s, sign: p.rotate(sign * 30 * s, Image.Resampling.BICUBIC, fillcolor=FILL), 0),
    "posterize": (lambda picture, strength, _: ImageOps.posterize(picture, 4 - int(4 * strength)), 0),
    "solarize": (lambda picture, strength, _: ImageOps.solarize(picture, 256 - int(256 * strength)), 0),
    "solarize_add": (brightened, 0),
    "color": (enhanced(ImageEnhance.Color), 2),
    "contrast": (enhanced(ImageEnhance.Contrast), 2),
    "brightness": (enhanced(ImageEnhance.Brightness), 1),
    "sharpness": (enhanced(ImageEnhance.Sharpness), 2),
    "shear_x": (moved(lambda amount, width, height: (1, 0.3 * amount, 0, 0, 1, 0)), 0),
    "shear_y": (moved(lambda amount, width, height: (1, 0, 0, 0.3 * amount, 1, 0)), 0),
    "translate_x": (moved(lambda amount, width, height: (1, 0, 0.45 * amount * width, 0, 1, 0)), 0),
    "translate_y": (moved(lambda amount, width, height: (1, 0, 0, 0, 1, 0.45 * amount * height)), 0),
}


def test_there_is_an_oracle_for_every_operation():
    assert list(OPERATIONS) == list(ORACLES)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("strength", [0.3, 0.9, 0.97])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_pillow_does(name, strength, sign):
    oracle, tolerance = ORACLES[name]
    image = photo()
    expected = np.asarray(oracle(Image.fromarray(image), strength, sign)).astype(int)
    found = OPERATIONS[name](image, strength, sign, FILL)
    assert np.abs(found - expected).max() <= tolerance
    assert name in ("invert", "auto_contrast") or (found != image).any()


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_and_input(name, channels):
    image = photo(9, 12, channels)
    before = image.copy()
    found = OPERATIONS[name](image, 0.9, -1.0, (7,) * channels)
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)
    image.flags.writeable = False
    np.testing.assert_array_equal(OPERATIONS[name](image, 0.9, -1.0, (7,) * channels), found)


@pytest.mark.parametrize("name", [*ORACLES][3:])
def test_operations_of_no_strength_leave_images_alone(name):
    image = photo()
    found = OPERATIONS[name](image, 0.0, 1.0, FILL)
    expected = image & 0xF0 if name == "posterize" else image  # four bits are what is left at most
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_flat_images_are_no_exception(name):
    for value in (0, 77, 255):
        found = OPERATIONS[name](np.full((8, 8, 2), value, np.uint8), 0.9, 1.0, (value, value))
        assert len(np.unique(found)) == 1
    assert OPERATIONS[name](np.zeros((1, 1, 3), np.uint8), 0.9, 1.0, FILL).shape == (1, 1, 3)


def test_what_is_uncovered_is_filled():
    image = photo()
    found = OPERATIONS["translate_x"](image, 1.0, 1.0, FILL)
    assert (found[:, -14:] == FILL).all()  # 0.45 of 32 columns
    corner = OPERATIONS["rotate"](image, 1.0, 1.0, FILL)[0, 0]
    assert tuple(corner) == FILL


def test_operations_are_drawn_as_the_recipe_says(monkeypatch):
    seen = []
    names = list(OPERATIONS)
    for name in names:
        note = lambda image, strength, sign, fill, name=name: seen.append((name, strength, sign)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, note)
    rng, count = np.random.default_rng(0), 20_000
    for _ in range(count):
        rand_augment(np.zeros((1, 1, 1), np.uint8), rng, operations=2, level=9.0, spread=0.5, fill=(0,))
    assert len(seen) == pytest.approx(2 * count / 2, rel=0.02)  # each with probability one half
    drawn = [name for name, _, _ in seen]
    assert all(drawn.count(name) == pytest.approx(len(seen) / 15, rel=0.1) for name in names)
    strengths = np.array([strength for _, strength, _ in seen])
    assert strengths.max() == 1.0
    assert np.mean(strengths == 1.0) == pytest.approx(0.02275, abs=0.004)  # above 10: two standard deviations
    assert np.median(strengths) == pytest.approx(0.9, abs=0.002)
    assert np.mean([sign for _, _, sign in seen]) == pytest.approx(0, abs=0.03)


def test_how_much_is_drawn_does_not_depend_on_the_image():
    for function in (
        lambda image, rng: rand_augment(image, rng, fill=FILL),
        lambda image, rng: erase(image, rng, mean=MEAN, std=STD),
    ):
        left = []
        for image in (photo(), np.zeros((24, 32, 3), np.uint8)):
            rng = np.random.default_rng(5)
            function(image, rng)
            left.append(rng.random())
        assert left[0] == left[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_box_is_erased(channels):
    image = np.full((64, 48, channels), 255, np.uint8)
    mean, std = (0.3,) * channels, (0.05,) * channels
    shares, ratios, values = [], [], []
    for seed in range(300):
        found = erase(image, np.random.default_rng(seed), mean=mean, std=std)
        rows, columns = np.nonzero((found != 255).any(-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a box, and nothing around it
        shares.append(height * width / (64 * 48))
        ratios.append(height / width)
        values.append(found[rows, columns] / 255)
    assert 0.015 < min(shares) < 0.04
    assert 0.3 < max(shares) < 0.36
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 3.8
    assert np.median(np.log(ratios)) == pytest.approx(0, abs=0.25)  # as often high as wide
    pixels = np.concatenate(values)
    assert pixels.mean() == pytest.approx(0.3, abs=0.002)
    assert pixels.std() == pytest.approx(math.hypot(0.05, 12**-0.5 / 255), abs=0.001)


def test_a_box_that_never_fits_is_none():
    image = np.zeros((1, 1, 3), np.uint8)
    np.testing.assert_array_equal(erase(image, np.random.default_rng(0), mean=MEAN, std=STD), image)


def test_how_often_is_erased():
    augmented = Augment(MEAN, STD, erasing=0.25)
    rng, image = np.random.default_rng(0), np.zeros((12, 12, 3), np.uint8)
    assert np.mean([augmented(image, rng) is not image for _ in range(4000)]) == pytest.approx(0.25, abs=0.02)


def test_nothing_asked_for_is_nothing_done():
    rng, image = np.random.default_rng(0), photo()
    assert Augment(MEAN, STD)(image, rng) is image
    assert rng.random() == np.random.default_rng(0).random()


def test_the_same_generator_gives_the_same_image():
    augmented = Augment(MEAN, STD, level=9.0, erasing=0.5)
    image = photo()
    first, again, other = (augmented(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_corners_are_filled_with_the_mean(monkeypatch):
    given = []
    monkeypatch.setattr(augment, "rand_augment", lambda image, rng, **options: given.append(options) or image)
    Augment(MEAN, STD, level=7.0, spread=0.2, operations=3)(photo(), np.random.default_rng(0))
    assert given == [{"operations": 3, "level": 7.0, "spread": 0.2, "fill": FILL}]

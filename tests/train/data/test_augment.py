"""RandAugment and random erasing, compared with Pillow and formulas."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from prmim_train.data import augment
from prmim_train.data.augment import OPERATIONS, Augment, erase, rand_augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)


def photo(height=24, width=32, channels=3, seed=0):
    """Smooth colours with some noise: neither flat nor without structure."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, channels)).astype(float)
    large = np.kron(small, np.ones((height // 3, width // 4, 1)))
    return np.clip(large + rng.normal(0, 12, (height, width, channels)), 0, 255).astype(np.uint8)


def enhanced(kind):
    return lambda picture, amount: kind(picture).enhance(max(0.1, 1 + 0.9 * amount))


def moved(make):
    """By the matrix that Pillow is given."""
    return lambda picture, amount: picture.transform(
        picture.size, Image.Transform.AFFINE, make(amount, *picture.size), Image.Resampling.BICUBIC, fillcolor=FILL
    )


def brightened(picture, amount):
    table = [min(255, value + int(110 * abs(amount))) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


# Each operation in Pillow's words, from the description of the recipe.
IN_PILLOW = {
    "auto_contrast": lambda picture, amount: ImageOps.autocontrast(picture),
    "equalize": lambda picture, amount: ImageOps.equalize(picture),
    "invert": lambda picture, amount: ImageOps.invert(picture),
    "rotate": lambda picture, amount: picture.rotate(amount * 30, Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda picture, amount: ImageOps.posterize(picture, 4 - int(4 * abs(amount))),
    "solarize": lambda picture, amount: ImageOps.solarize(picture, 256 - int(256 * abs(amount))),
    "solarize_add": brightened,
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": moved(lambda amount, width, height: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": moved(lambda amount, width, height: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": moved(lambda amount, width, height: (1, 0, 0.45 * amount * width, 0, 1, 0)),
    "translate_y": moved(lambda amount, width, height: (1, 0, 0, 0, 1, 0.45 * amount * height)),
}


def by_channel(change):
    return lambda image, amount: np.stack([change(plane, amount) for plane in np.moveaxis(image, 2, 0)], axis=2)


def stretched(plane, amount):
    low, high = plane.min(), plane.max()
    return (plane - low) * 255 / (high - low) if high > low else plane


def equalized(plane, amount):
    counts = np.bincount(plane.astype(int).ravel(), minlength=256)
    share = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255  # pixels for each step of the new scale
    table = (np.cumsum(counts) - counts + share // 2) // share if share else np.arange(256)
    return table[plane.astype(int)]


def grey(image):
    weights = [0.299, 0.587, 0.114] if image.shape[2] == 3 else np.full(image.shape[2], 1 / image.shape[2])
    return np.rint(image @ weights)[..., None]


def smoothed(image):
    """The mean of nine pixels, the centre counted five times; the edges as they are."""
    result = image.copy()
    shifts = [(row, column) for row in range(3) for column in range(3)]
    height, width = image.shape[0] - 2, image.shape[1] - 2
    total = sum(image[row : row + height, column : column + width] for row, column in shifts)
    result[1:-1, 1:-1] = np.rint((total + 4 * image[1:-1, 1:-1]) / 13)
    return result


def blended(degenerate):
    def blend(image, amount):
        other = degenerate(image)
        return other + max(0.1, 1 + 0.9 * amount) * (image - other)

    return blend


# The same without Pillow, for any number of channels; and by how many grey levels rounding may lead away.
FORMULAS = {
    "auto_contrast": (by_channel(stretched), 1),
    "equalize": (by_channel(equalized), 0),
    "invert": (lambda image, amount: 255 - image, 0),
    "posterize": (lambda image, amount: image // (step := 2 ** (4 + int(4 * abs(amount)))) * step, 0),
    "solarize": (lambda image, amount: np.where(image < 256 - int(256 * abs(amount)), image, 255 - image), 0),
    "solarize_add": (lambda image, amount: np.where(image < 128, image + int(110 * abs(amount)), image), 0),
    "color": (blended(grey), 2),  # Pillow's luma may be one level off, which is then amplified
    "contrast": (blended(lambda image: np.rint(grey(image).mean())), 1),
    "brightness": (blended(lambda image: 0), 1),
    "sharpness": (blended(smoothed), 1),
}


def test_there_is_an_oracle_for_every_operation():
    assert list(OPERATIONS) == list(IN_PILLOW)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("amount", [0.3, -0.3, 0.9, -0.9, 0.97, -0.97])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_pillow_does(name, amount):
    image = photo()
    expected = np.asarray(IN_PILLOW[name](Image.fromarray(image), amount))
    found = OPERATIONS[name](image, amount, FILL)
    np.testing.assert_array_equal(found, expected)
    assert name in ("invert", "auto_contrast") or (found != image).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("amount", [0.0, 0.3, -0.9, 1.0, -1.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_operations_follow_their_formulas_for_any_number_of_channels(name, amount, channels):
    formula, tolerance = FORMULAS[name]
    image = photo(channels=channels)
    expected = np.clip(np.rint(formula(image.astype(float), amount)), 0, 255)
    found = OPERATIONS[name](image, amount, (0,) * channels).astype(int)
    assert np.abs(found - expected).max() <= tolerance


# Which place of the image, relative to the centre of the pixel in the corner, a pixel is taken from.
PLACES = {
    "shear_x": lambda amount, x, y: (x + 0.3 * amount * (y + 0.5), y),
    "shear_y": lambda amount, x, y: (x, y + 0.3 * amount * (x + 0.5)),
    "translate_x": lambda amount, x, y: (x + 0.45 * amount * 32, y),
    "translate_y": lambda amount, x, y: (x, y + 0.45 * amount * 24),
    "rotate": lambda amount, x, y: rotated(math.radians(30 * amount), x - 15.5, y - 11.5),
}


def rotated(angle, x, y):
    """Counter-clockwise, where y points down."""
    return (
        15.5 + math.cos(angle) * x - math.sin(angle) * y,
        11.5 + math.sin(angle) * x + math.cos(angle) * y,
    )


def ramps(x, y, channels):
    return np.stack([2 * x + 4 * y, 90 + 3 * x - 2 * y, 5 * x, 4 * y, 200 - x - y][:channels], axis=2)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("amount", [0.3, -0.9, 1.0])
@pytest.mark.parametrize("name", PLACES)
def test_operations_move_pixels_where_they_should(name, amount, channels):
    """On a ramp, values are positions.

    Pillow's cubic (a = -1) bends it a little, and rounds down.
    """
    y, x = np.mgrid[0:24, 0:32]
    found = OPERATIONS[name](ramps(x, y, channels).astype(np.uint8), amount, (1,) * channels).astype(int)
    x, y = PLACES[name](amount, x, y)
    is_inside = (x > 2) & (x < 29) & (y > 2) & (y < 21)
    assert is_inside.sum() > 100
    assert np.abs(found - ramps(x, y, channels))[is_inside].max() < 2
    is_outside = (x < -1) | (x > 32) | (y < -1) | (y > 24)
    assert (found[is_outside] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_and_input(name, channels):
    image = photo(9, 12, channels)
    before = image.copy()
    found = OPERATIONS[name](image, -0.9, (7,) * channels)
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)
    image.flags.writeable = False
    np.testing.assert_array_equal(OPERATIONS[name](image, -0.9, (7,) * channels), found)


@pytest.mark.parametrize("name", [*OPERATIONS][3:])
def test_operations_of_no_strength_leave_images_alone(name):
    image = photo()
    found = OPERATIONS[name](image, 0.0, FILL)
    expected = image & 0xF0 if name == "posterize" else image  # four bits are what is left at most
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_flat_images_are_no_exception(name):
    for value in (0, 77, 255):
        found = OPERATIONS[name](np.full((8, 8, 2), value, np.uint8), 0.9, (value, value))
        assert len(np.unique(found)) == 1
    assert OPERATIONS[name](np.zeros((1, 1, 3), np.uint8), 0.9, FILL).shape == (1, 1, 3)


def test_what_is_uncovered_is_filled():
    image = photo()
    found = OPERATIONS["translate_x"](image, 1.0, FILL)
    assert (found[:, -14:] == FILL).all()  # 0.45 of 32 columns
    corner = OPERATIONS["rotate"](image, 1.0, FILL)[0, 0]
    assert tuple(corner) == FILL


def test_operations_are_drawn_as_the_recipe_says(monkeypatch):
    seen = []
    names = list(OPERATIONS)
    for name in names:
        note = lambda image, amount, fill, name=name: seen.append((name, amount)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, note)
    rng, count = np.random.default_rng(0), 20_000
    for _ in range(count):
        rand_augment(np.zeros((1, 1, 1), np.uint8), rng, operations=2, level=9.0, spread=0.5, fill=(0,))
    assert len(seen) == pytest.approx(2 * count / 2, rel=0.02)  # each with probability one half
    drawn = [name for name, _ in seen]
    assert all(drawn.count(name) == pytest.approx(len(seen) / 15, rel=0.1) for name in names)
    amounts = np.array([amount for _, amount in seen])
    strengths = np.abs(amounts)
    assert strengths.max() == 1.0
    assert np.mean(strengths == 1.0) == pytest.approx(0.02275, abs=0.004)  # above 10: two standard deviations
    assert np.median(strengths) == pytest.approx(0.9, abs=0.002)
    assert np.mean(np.sign(amounts)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_frames_of_a_clip_are_changed_one_by_one(name, channels):
    frames = [photo(channels=channels, seed=seed) for seed in range(3)]
    found = OPERATIONS[name](np.concatenate(frames, axis=2), -0.9, FILL[:channels])
    if name == "contrast":  # by the mean brightness of the clip, as if it were one long image
        expected = np.split(OPERATIONS[name](np.concatenate(frames), -0.9, FILL[:channels]), 3)
    else:
        expected = [OPERATIONS[name](frame, -0.9, FILL[:channels]) for frame in frames]
    np.testing.assert_array_equal(found, np.concatenate(expected, axis=2))


def test_an_erased_box_of_a_clip_has_the_noise_of_each_channel():
    clip = np.zeros((64, 64, 30), np.uint8)
    found = erase(clip, np.random.default_rng(0), mean=(0.2, 0.4, 0.6), std=(0.01, 0.01, 0.01))
    rows, columns = np.nonzero(found.any(axis=-1))
    means = found[rows, columns].reshape(-1, 10, 3).mean(axis=0)
    np.testing.assert_allclose(means, np.broadcast_to([51, 102, 153], means.shape), atol=1)


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

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from prmim_train.data.transforms import (
    center_crop,
    check_crop_options,
    random_crop_box,
    random_flip,
    random_padded_crop,
    resize,
    resize_picture,
)


def noise_image(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def checkerboard(size: int) -> np.ndarray:
    return (np.indices((size, size)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_resize_filters_every_channel_by_itself(channels):
    image = noise_image(23, 31, channels)
    result = resize(image, (11, 9))
    for channel in range(channels):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        expected = np.asarray(plane.resize((9, 11), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(result[..., channel], expected)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("box", [None, (3, 2, 20, 17), (0.25, 1.5, 30.75, 22.0)])
def test_a_picture_is_resized_as_its_pixels_are(mode, channels, box):
    image = noise_image(23, 31, channels)
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    assert picture.mode == mode
    np.testing.assert_array_equal(resize_picture(picture, (11, 9), box=box), resize(image, (11, 9), box=box))


def test_a_picture_of_another_mode_is_refused():
    with pytest.raises(ValueError, match="picture: expected mode L, RGB, RGBX or RGBA, got CMYK"):
        resize_picture(Image.new("CMYK", (4, 4)), (2, 2))
    with pytest.raises(ValueError, match=r"size: expected .*got \(0, 2\)"):
        resize_picture(Image.new("L", (4, 4)), (0, 2))


def test_resize_to_the_same_size_changes_nothing():
    image = noise_image(13, 17, 3)
    np.testing.assert_array_equal(resize(image, (13, 17)), image)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_shrinking_is_antialiased(channels):
    board = np.repeat(checkerboard(64), channels, axis=2)
    for small in (resize(board, (8, 8)), center_crop(board, (8, 8))):
        inner = small[2:-2, 2:-2].astype(int)
        assert np.abs(inner - 127.5).max() <= 2


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 4), np.uint8), (2, 2), r"image: expected an array .*got uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float64), (2, 2), "image: expected an array .*got float64"),
        (np.zeros((4, 0, 3), np.uint8), (2, 2), r"image: .*got uint8 \(4, 0, 3\)"),
        (np.zeros((4, 4, 3), np.uint8), (0, 2), r"size: expected \(height, width\) of at least 1 pixel, got \(0, 2\)"),
    ],
)
def test_resize_and_crops_refuse_what_is_no_image(image, size, message):
    for function in (resize, center_crop):
        with pytest.raises(ValueError, match=message):
            function(image, size)


@pytest.mark.parametrize(
    ("scale", "ratio", "message"),
    [
        ((0.0, 1.0), (1.0, 1.0), "crop_scale: expected 0 < smallest <= largest <= 1"),
        ((0.5, 1.5), (1.0, 1.0), "crop_scale"),
        ((0.9, 0.2), (1.0, 1.0), "crop_scale"),
        ((0.2, 1.0), (2.0, 0.5), "crop_ratio: expected 0 < smallest <= largest"),
        ((0.2, 1.0), (0.0, 0.5), "crop_ratio"),
    ],
)
def test_crop_ranges_are_checked(scale, ratio, message):
    with pytest.raises(ValueError, match=message):
        check_crop_options(scale, ratio)
    with pytest.raises(ValueError, match=message):
        random_crop_box((8, 8), np.random.default_rng(0), scale=scale, ratio=ratio)


def test_an_unknown_draw_is_refused():
    with pytest.raises(ValueError, match=r"^crop_draw: expected 'retry' or 'clamp', got 'once'$"):
        random_crop_box((8, 8), np.random.default_rng(0), draw="once")


def test_crop_boxes_have_the_area_and_the_ratio_that_were_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((500, 400), rng) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 500
    assert (left + width).max() <= 400
    area, ratio = height * width / (500 * 400), width / height
    assert area.min() > 0.198
    assert area.max() <= 1
    assert ratio.min() > 3 / 4 - 0.01
    assert ratio.max() < 4 / 3 + 0.01
    # they reach the bounds, and lean to neither side
    assert area.min() < 0.21
    assert area.max() > 0.9
    assert abs(np.mean(top - (500 - height - top))) < 5
    assert abs(np.mean(left - (400 - width - left))) < 5


def test_crop_area_is_uniform_and_ratio_log_uniform_where_every_draw_fits():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((1000, 1000), rng, scale=(0.1, 0.5), ratio=(0.5, 2.0)) for _ in range(4000)])
    area = boxes[:, 2] * boxes[:, 3] / 1e6
    log_ratio = np.log2(boxes[:, 3] / boxes[:, 2])
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.015)
    np.testing.assert_allclose(np.quantile(log_ratio, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.06)


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((100, 1000), (0, 433, 100, 133)),  # too wide: the centre at the largest ratio
        ((1000, 100), (433, 0, 133, 100)),  # too high
        ((1, 50), (0, 24, 1, 1)),
        ((50, 1), (24, 0, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre_of_images_of_extreme_shape(shape, box):
    assert random_crop_box(shape, np.random.default_rng(0), scale=(1.0, 1.0)) == box


def test_crop_falls_back_to_the_whole_image_if_its_ratio_is_allowed():
    # only a drawn ratio of almost exactly 10 / 9 would fit, and give the same box
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert random_crop_box((90, 100), rng, scale=(1.0, 1.0), ratio=(1.0, 1.2)) == (0, 0, 90, 100)


@pytest.mark.parametrize(("draw", "mean"), [("retry", 0.432), ("clamp", 0.519)])
def test_the_mean_area_of_the_crops_of_a_common_photo(draw, mean):
    """At 375 x 500 pixels, by the two rules of the published recipes."""
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((375, 500), rng, scale=(0.08, 1.0), draw=draw) for _ in range(20_000)])
    top, left, height, width = boxes.T
    assert np.mean(height * width / (375 * 500)) == pytest.approx(mean, abs=0.005)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= 375
    assert (left + width).max() <= 500
    assert (np.mean(height == 375) > 0.1) == (draw == "clamp")


@pytest.mark.parametrize("shape", [(375, 500), (1, 50), (50, 1), (1, 1)])
def test_clamped_crops_are_drawn_once(shape):
    for seed in range(50):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        top, left, height, width = random_crop_box(shape, rng, scale=(0.08, 1.0), draw="clamp")
        area = shape[0] * shape[1] * same.uniform(0.08, 1.0)
        ratio = np.exp(same.uniform(np.log(3 / 4), np.log(4 / 3)))
        assert height == min(max(round(np.sqrt(area / ratio)), 1), shape[0])
        assert width == min(max(round(np.sqrt(area * ratio)), 1), shape[1])
        assert (top, left) == (same.integers(0, shape[0] - height + 1), same.integers(0, shape[1] - width + 1))


def test_crop_boxes_depend_on_the_generator_only():
    first, again, other = (random_crop_box((40, 60), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_flip_mirrors_one_image_in_two(channels):
    image = noise_image(2, 5, channels)
    rng = np.random.default_rng(0)
    num_flipped = 0
    for _ in range(2000):
        result = random_flip(image, rng)
        is_flipped = bool((result != image).any())
        np.testing.assert_array_equal(result, image[:, ::-1] if is_flipped else image)
        num_flipped += is_flipped
    assert 900 < num_flipped < 1100


@pytest.mark.parametrize("size", [(20, 20), (10, 30), (30, 10), (7, 13), (50, 80)])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (41, 41), (1, 1), (3, 100)])
def test_center_crop_has_the_size_asked_for(shape, size):
    assert center_crop(noise_image(*shape, 3), size).shape == (*size, 3)


def test_center_crop_takes_the_centre_and_keeps_proportions():
    image = np.zeros((40, 80, 1), np.uint8)
    image[:, 20:60] = 255  # exactly the centred square
    inner = center_crop(image, (10, 10))[:, 1:-1]
    assert inner.min() == 255
    np.testing.assert_array_equal(center_crop(image, (40, 40)), image[:, 20:60])


def test_center_crop_can_take_less_than_the_largest_box():
    image = noise_image(64, 96, 3)
    np.testing.assert_array_equal(center_crop(image, (32, 32), share=0.5), image[16:48, 32:64])
    np.testing.assert_array_equal(
        center_crop(image, (28, 28), share=0.875), resize(image, (28, 28), box=(20, 4, 76, 60))
    )
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share: expected a number in"):
            center_crop(image, (32, 32), share=share)


@pytest.mark.parametrize(("shape", "size"), [((8, 8), (8, 8)), ((9, 15), (6, 6)), ((20, 9), (5, 7))])
def test_a_padded_crop_is_a_window_of_the_resized_image(shape, size):
    image, (height, width), padding = noise_image(*shape, 3), size, 2
    zoom = max(height / shape[0], width / shape[1])
    covering = (round(shape[0] * zoom), round(shape[1] * zoom))
    resized = np.asarray(Image.fromarray(image).resize(covering[::-1], Image.Resampling.BILINEAR))
    rows, columns = (np.abs(np.arange(-padding, n + padding)) for n in covering)
    rows, columns = (np.where(i < n, i, 2 * n - 2 - i) for i, n in zip((rows, columns), covering, strict=True))
    padded = resized[rows][:, columns]
    rng, places = np.random.default_rng(0), set()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width, 3))[:, :, 0]
    for _ in range(1000):
        crop = random_padded_crop(image, size, rng, padding=padding)
        found = np.argwhere((windows == crop).all(axis=(2, 3, 4)))
        assert len(found) == 1
        places.add(tuple(found[0].tolist()))
    assert len(places) == windows.shape[0] * windows.shape[1]  # all of them


def test_a_padded_crop_of_a_thin_image_takes_little_memory():
    image, size, padding = noise_image(1, 3000, 1), (64, 32), 8  # 64 x 192,000 pixels if resized whole
    tracemalloc.start()
    crops = [random_padded_crop(image, size, np.random.default_rng(seed), padding=padding) for seed in range(20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    for seed, crop in enumerate(crops):
        _, left = (np.random.default_rng(seed).integers([2 * padding + 1, 64 * 3000 + 2 * padding - 32 + 1])).tolist()
        places = (np.abs(np.arange(left, left + 32) - padding) + 0.5) / 64 - 0.5  # in pixels of the image
        expected = np.interp(places, np.arange(3000), image[0, :, 0])
        assert np.abs(crop[..., 0] - expected).max() < 2


@pytest.mark.parametrize(
    ("size", "padding", "message"), [((4, 4), -1, "padding: expected at least 0, got -1"), ((0, 4), 1, "size: expect")]
)
def test_options_of_a_padded_crop_are_checked(size, padding, message):
    with pytest.raises(ValueError, match=message):
        random_padded_crop(noise_image(5, 5, 1), size, np.random.default_rng(0), padding=padding)

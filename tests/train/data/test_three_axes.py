"""Crops of clips and volumes: chosen frames and boxes, and resizing."""

import hashlib
import itertools
from math import prod

import numpy as np
import pytest

from prmim_train.config.axes import ThreeAxes
from prmim_train.data.batches import evaluation_batches, train_batches
from prmim_train.data.crops import crop_effect
from prmim_train.data.formats.arrays import ArraySource
from prmim_train.data.formats.stacks import resize_stack
from prmim_train.data.three_axes import (
    central_frames,
    central_volume_box,
    random_flips,
    random_frames,
    random_volume_box,
    read_center,
)

AXES = list(itertools.permutations(range(3)))
VOLUMES = ThreeAxes(8, volumes=True)


def volumes(number=4, shape=(10, 24, 20), spacing=None):
    values = np.random.default_rng(0).integers(0, 256, (number, *shape, 2), dtype=np.uint8)
    return ArraySource(values, "volumes", three_axes=ThreeAxes(8, volumes=True, spacing=spacing))


def batches(source, **options):
    options = {"batch_size": 4, "seed": 1, "total_steps": 2, "threads": 0} | options
    with train_batches(source, **options) as made:
        return np.concatenate([batch.images for batch in made])


# ---------------------------------------------------------------------------------------------------------------- clips


def test_a_clip_has_every_nth_frame_from_a_random_start():
    rng = np.random.default_rng(0)
    drawn = np.array([random_frames(20, 4, 3, rng) for _ in range(300)])
    assert set(np.diff(drawn).ravel().tolist()) == {3}
    assert set(drawn[:, 0].tolist()) == set(range(11))
    assert central_frames(20, 4, 3).tolist() == [5, 8, 11, 14]


def test_one_possible_start_takes_no_draw():
    rng = np.random.default_rng(0)
    assert random_frames(10, 4, 3, rng).tolist() == [0, 3, 6, 9]
    assert rng.random() == np.random.default_rng(0).random()


def test_the_last_frame_of_a_short_clip_repeats():
    assert random_frames(3, 5, 1, np.random.default_rng(0)).tolist() == [0, 1, 2, 2, 2]
    assert central_frames(1, 3, 2).tolist() == [0, 0, 0]


def test_clips_of_other_lengths_are_sampled_with_a_stride():
    numbers = np.arange(12, dtype=np.uint8).reshape(1, 12, 1, 1, 1)
    clips = ArraySource(np.broadcast_to(numbers, (4, 12, 9, 9, 1)).copy(), "clips", three_axes=ThreeAxes(4, stride=2))
    drawn = batches(clips, image_size=(4, 8, 8), total_steps=10)[..., 0, 0, 0].astype(int)
    assert set(np.diff(drawn).ravel().tolist()) == {2}
    assert set(drawn[:, 0].tolist()) == set(range(6))
    padded = batches(clips, image_size=(4, 8, 8), crop_padding=2)
    assert set(np.diff(padded[..., 0, 0, 0].astype(int)).ravel().tolist()) == {2}
    with evaluation_batches(clips, batch_size=4, image_size=(4, 9, 9), threads=0) as made:
        assert next(made).images[0, :, 4, 4, 0].tolist() == [2, 4, 6, 8]


def test_clips_of_the_given_length_are_drawn_as_ever():
    noise = np.random.default_rng(0).integers(0, 256, (6, 4, 20, 24, 3), dtype=np.uint8)
    images = batches(ArraySource(noise, "clips", three_axes=ThreeAxes(4)), image_size=(4, 10, 12), total_steps=6)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "cb98e872c2077d7c"


# -------------------------------------------------------------------------------------------------------------- volumes


def test_boxes_of_volumes_have_their_share_and_their_proportions_in_millimetres():
    shape, spacing, size = (60, 200, 160), (4.0, 1.0, 1.5), (8, 16, 16)
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_volume_box(shape, size, rng, spacing=spacing, scale=(0.05, 0.3), ratio=(0.8, 1.25)) for _ in range(400)]
    )
    starts, sides = boxes[:, :3], boxes[:, 3:]
    assert (starts >= 0).all()
    assert (starts + sides <= shape).all()
    shares = sides.prod(axis=1) / prod(shape)
    assert 0.045 < shares.min() < 0.07
    assert 0.28 < shares.max() < 0.31
    depth, height, width = (sides * spacing / size).T  # equal, but for the ratios and whole voxels
    assert 0.76 < (width / height).min() < 0.84
    assert 1.2 < (height / depth).max() < 1.35


def test_the_draws_of_a_box_never_change():
    rng = np.random.default_rng(5)
    assert random_volume_box((60, 200, 160), (8, 8, 8), rng, spacing=(4, 1, 1.5)) == (7, 8, 8, 48, 181, 94)


@pytest.mark.parametrize(
    ("shape", "largest"), [((10, 40, 40), (10, 12, 14)), ((40, 10, 40), (12, 10, 12)), ((9, 9, 1), (2, 1, 1))]
)
def test_a_box_that_does_not_fit_becomes_the_largest_central_one_or_is_clamped(shape, largest):
    options = {"scale": (1.0, 1.0), "ratio": (0.8, 1.2)}
    box = random_volume_box(shape, (8, 8, 8), np.random.default_rng(0), **options)
    assert box[3:] == largest
    assert box[:3] == tuple((most - side) // 2 for most, side in zip(shape, largest, strict=True))
    clamped = random_volume_box(shape, (8, 8, 8), np.random.default_rng(0), **options, draw="clamp")
    assert all(1 <= side <= most for side, most in zip(clamped[3:], shape, strict=True))


def test_the_central_box_is_the_largest_of_its_proportions_in_millimetres():
    assert central_volume_box((40, 200, 100), (8, 8, 8), spacing=(5, 1, 1)) == (10, 50, 0, 30, 150, 100)
    assert central_volume_box((40, 200, 100), (8, 8, 8), spacing=(5, 1, 1), share=0.5) == (15, 75, 25, 25, 125, 75)
    assert central_volume_box((40, 200, 100), (8, 8, 8), share=None) == (0, 0, 0, 40, 200, 100)
    source = volumes(shape=(8, 20, 20))
    np.testing.assert_array_equal(read_center(source, 1, (8, 8, 8)), source.images[1][:, 6:14, 6:14])


@pytest.mark.parametrize("axes", AXES)
def test_all_axes_are_resized_alike(axes):
    volume = np.random.default_rng(0).normal(size=(12, 9, 20, 2)).astype(np.float32)
    turned, size = volume.transpose(*axes, 3), (5, 7, 8)
    resized = resize_stack(volume, size, box=(1, 0.5, 2, 11.5, 8, 19))
    sides = np.array([[1, 0.5, 2], [11.5, 8, 19]])[:, axes].ravel().tolist()
    again = resize_stack(turned, tuple(size[axis] for axis in axes), box=sides)
    np.testing.assert_allclose(again, resized.transpose(*axes, 3), atol=2e-6)


def test_shrinking_is_antialiased_along_the_first_axis():
    stripes = np.zeros((40, 4, 4, 1), np.uint8)
    stripes[::2] = 200
    assert np.abs(resize_stack(stripes, (10, 4, 4)).astype(int) - 100).max() <= 8
    smooth = resize_stack(np.linspace(0, 1000, 40, dtype=np.float32).reshape(40, 1, 1, 1), (10, 1, 1))
    np.testing.assert_allclose(np.diff(smooth.ravel())[2:-2], 1000 / 39 * 4, rtol=1e-3)


def test_volumes_are_mirrored_along_each_axis():
    corner = np.zeros((2, 2, 2, 1), np.uint8)
    corner[0, 0, 0] = 1
    rng = np.random.default_rng(0)
    places = [tuple(np.argwhere(random_flips(corner, rng)[..., 0])[0]) for _ in range(400)]
    assert len(set(places)) == 8
    assert all(30 < places.count(place) < 75 for place in set(places))


def test_crops_of_volumes_depend_on_seed_and_record_only():
    source = volumes(spacing=(2, 1, 1))
    images = batches(source, image_size=(8, 8, 8))
    assert images.shape == (8, 8, 8, 8, 2)
    resumed = batches(source, image_size=(8, 8, 8), start_step=1)
    np.testing.assert_array_equal(resumed, images[4:])
    assert not np.array_equal(images, batches(volumes(), image_size=(8, 8, 8)))  # the spacing counts
    np.testing.assert_array_equal(
        batches(source, image_size=(10, 24, 20), crop_scale=(1, 1), crop_draw="clamp", flip=False, total_steps=1)[
            0
        ].shape,
        (10, 24, 20, 2),
    )


def test_the_effect_of_crops_is_measured_in_millimetres():
    effect = crop_effect([(20, 100, 100)], (10, 10, 10), scale=(0.2, 0.2), ratio=(1, 1), spacings=[(5, 1, 1)])
    side = (0.2 * 100**3) ** (1 / 3)
    np.testing.assert_allclose(effect.step, side / 10, rtol=0.03)
    np.testing.assert_allclose(effect.enlargement, 10 / round(side / 5))
    assert effect.stretch.max() < 1.1

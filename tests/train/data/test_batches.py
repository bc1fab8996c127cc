import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prmim_train
from prmim_train.config.axes import ThreeAxes
from prmim_train.data.batches import Batch, UnreadableImages, evaluation_batches, split_indices, train_batches
from prmim_train.data.sources import ArraySource, open_source
from prmim_train.data.transforms import center_crop, random_crop_box, random_flip, random_padded_crop, resize

NUM_IMAGES = 20


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Twenty small JPEG files of different sizes in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (20 + k, 40 - k, 3), dtype=np.uint8)
        path = folder / ("cat" if k % 2 else "dog") / f"{k:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return open_source(str(folder), channels=3)


def numbered(number: int, channels: int = 1) -> ArraySource:
    """Images of one value each, its number, which crops and flips leave as they are."""
    values = np.arange(number, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ArraySource(np.broadcast_to(values, (number, 9, 7, channels)).copy(), "numbers")


def run(source, **options) -> list[Batch]:
    options = {"batch_size": 8, "image_size": (16, 16), "seed": 3, "total_steps": 8} | options
    with train_batches(source, **options) as batches:
        return list(batches)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        assert sorted(a.unreadable) == sorted(b.unreadable)


def random_crop(image: np.ndarray, rng: np.random.Generator, **options) -> np.ndarray:
    top, left, height, width = random_crop_box(image.shape[:2], rng, **options)
    return resize(image[top : top + height, left : left + width], (16, 16))


def records(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.index for batch in batches])


# ------------------------------------------------------------------------------------------------------------- training


def test_batches_are_full_uint8_and_carry_their_records(photos):
    for batch in run(photos, image_size=(16, 24)):
        assert batch.images.shape == (8, 16, 24, 3)
        assert batch.images.dtype == np.uint8
        assert batch.index.shape == (8,)
        assert batch.index.dtype == np.int64
        assert batch.unreadable == ()


@pytest.mark.parametrize("number", [1, 2, 3, 5, 20, 50])
def test_every_epoch_is_another_permutation(number):
    order = records(run(numbered(number), batch_size=10, total_steps=number)).reshape(10, number)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(number), (10, number)))
    if number >= 20:
        assert len({tuple(epoch) for epoch in order.tolist()}) == 10


def test_an_image_stands_where_its_record_says():
    for batch in run(numbered(50, channels=7), total_steps=20):
        np.testing.assert_array_equal(batch.images, np.broadcast_to(batch.index[:, None, None, None], (8, 16, 16, 7)))


def test_only_the_given_indices_are_used(photos):
    indices = np.array([7, 2, 19, 11, 4])
    order = records(run(photos, indices=indices, batch_size=5, total_steps=4)).reshape(4, 5)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.broadcast_to(np.sort(indices), (4, 5)))


def test_seeds_give_different_orders_and_crops(photos):
    first, second = run(photos, seed=0), run(photos, seed=1)
    assert (records(first) != records(second)).any()
    # nor is one seed's second epoch the first of the next seed
    one, two = (records(run(numbered(40), batch_size=40, total_steps=2, seed=seed)).reshape(2, 40) for seed in (0, 1))
    assert (one[1] != two[0]).any()


def test_an_image_is_cropped_anew_in_every_epoch(photos):
    batches = run(photos, indices=np.array([5]), batch_size=6, total_steps=1)
    assert len({image.tobytes() for image in batches[0].images}) == 6


@pytest.mark.parametrize("start_step", [0, 1, 5, 7, 8])
def test_a_resumed_run_sees_what_it_would_have_seen(photos, start_step):
    assert_equal(run(photos, start_step=start_step), run(photos)[start_step:])


def test_the_end_of_the_run_does_not_change_its_beginning(photos):
    assert_equal(run(photos, total_steps=3), run(photos, total_steps=50)[:3])


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1}, {"threads": 5}, {"workers": 2}])
def test_threads_and_workers_change_nothing(broken_photos, options):
    """Nor do they where images are unreadable."""
    source, broken = broken_photos
    batches = run(source, batch_size=40, **options)
    assert_equal(batches, run(source, batch_size=40))
    assert {record for batch in batches for record, _ in batch.unreadable} == broken


def test_workers_resume_too(photos):
    assert_equal(run(photos, start_step=3, workers=1), run(photos)[3:])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("start_step", [0, 5])
def test_processes_deal_out_the_same_global_batches(broken_photos, world_size, start_step):
    """Images, crops and flips included, from any start, with unreadable images."""
    source, broken = broken_photos
    options = {"batch_size": 40, "total_steps": 16, "start_step": start_step}
    whole = run(source, **options)
    seen = set()
    for rank in range(world_size):
        part = run(source, rank=rank, world_size=world_size, **options)
        assert len(part) == 16 - start_step
        for ours, all_of_them in zip(part, whole, strict=True):
            np.testing.assert_array_equal(ours.images, all_of_them.images[rank::world_size])
            np.testing.assert_array_equal(ours.index, all_of_them.index[rank::world_size])
        seen |= {record for batch in part for record, _ in batch.unreadable}
    assert seen == broken


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 3}, {"workers": 1}, {"workers": 3}])
def test_threads_and_workers_change_nothing_for_a_process_of_many_either(photos, options):
    options |= {"rank": 1, "world_size": 4, "start_step": 3}
    for ours, all_of_them in zip(run(photos, **options), run(photos)[3:], strict=True):
        np.testing.assert_array_equal(ours.images, all_of_them.images[1::4])


def test_the_number_of_processes_may_change_on_the_way(photos):
    whole = run(photos)
    steps = {2: run(photos, total_steps=3, rank=1, world_size=2), 4: run(photos, start_step=3, rank=1, world_size=4)}
    for step, batch in enumerate([*steps[2], *steps[4]]):
        np.testing.assert_array_equal(batch.images, whole[step].images[1 :: 2 if step < 3 else 4])


def test_the_order_of_a_run_is_what_it_was():
    """Runs of earlier versions go on with the same batches: order, crops and flips."""
    batch = run(numbered(50), batch_size=10, total_steps=6)[5]
    assert batch.index.tolist() == [36, 24, 41, 49, 26, 10, 40, 4, 2, 12]
    noise = ArraySource(np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), dtype=np.uint8), "noise")
    images = np.concatenate([batch.images for batch in run(noise, batch_size=4, total_steps=2)])
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "41b870e3e65b7d70"


def test_all_frames_of_a_clip_are_cropped_and_flipped_alike():
    ramps = np.random.default_rng(0).integers(0, 256, (4, 1, 20, 24, 2), dtype=np.uint8)
    images = np.concatenate([ramps, 255 - ramps, ramps], axis=1)
    clips = ArraySource(images, "clips", three_axes=ThreeAxes(3))
    batch = run(clips, image_size=(3, 10, 12), total_steps=1)[0]
    assert batch.images.shape == (8, 3, 10, 12, 2)
    np.testing.assert_array_equal(batch.images[:, 0], batch.images[:, 2])
    assert np.abs(batch.images[:, 0].astype(int) + batch.images[:, 1] - 255).max() <= 1
    with evaluation_batches(clips, batch_size=4, image_size=(3, 20, 24)) as batches:
        np.testing.assert_array_equal(next(iter(batches)).images, clips.images)


def test_augmentation_can_be_switched_off():
    ramp = ArraySource(np.tile(np.arange(16, dtype=np.uint8) * 10, (4, 16, 1))[..., None], "ramps")
    options = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "batch_size": 4, "total_steps": 25}
    for batch in run(ramp, flip=False, **options):
        np.testing.assert_array_equal(batch.images, ramp.images)
    flipped = np.concatenate([batch.images[:, 0, 0, 0] for batch in run(ramp, **options)])
    assert set(flipped.tolist()) == {0, 150}
    assert 30 < (flipped == 150).sum() < 70


def test_boxes_are_the_places_of_the_crops():
    rows, columns = np.mgrid[:64, :64].astype(np.uint8)
    ramps = ArraySource(np.stack([4 * rows, 4 * columns], axis=2)[None], "two ramps")
    batches = run(ramps, batch_size=8, image_size=(8, 8), total_steps=2)
    centres = (np.arange(8) + 0.5) / 8
    for batch in batches:
        assert batch.boxes.shape == (8, 4)
        assert batch.boxes.dtype == np.float32
        for image, (top, left, bottom, right) in zip(batch.images, batch.boxes, strict=True):
            expected = 256 * (top + (bottom - top) * centres) - 2
            np.testing.assert_allclose(image[:, 4, 0], expected, atol=4)
            np.testing.assert_allclose(image[4, :, 1], 256 * (left + (right - left) * centres) - 2, atol=4)
    mirrored = np.concatenate([batch.boxes[:, 1] > batch.boxes[:, 3] for batch in batches])
    assert 0 < mirrored.sum() < 16


def test_the_ratio_of_crops_is_relative_to_the_image_size():
    """Relative to a square, a spectrogram has one crop, stretched sixfold."""
    spectrogram = ArraySource(np.zeros((1, 512, 64, 1), np.uint8), "black")
    batches = run(spectrogram, batch_size=16, image_size=(512, 64), total_steps=1, flip=False)
    top, left, bottom, right = batches[0].boxes.T
    assert len(set(top.tolist())) > 10
    ratio = (right - left) / (bottom - top)  # of fractions: 1 for crops like the image
    assert (ratio > 0.7).all()
    assert (ratio < 1.4).all()


def test_crop_options_reach_the_crops(photos):
    options = {"indices": np.array([0]), "batch_size": 1, "total_steps": 1, "flip": False}
    for given in ({"scale": (0.2, 0.2)}, {"scale": (1.0, 1.0), "ratio": (0.5, 0.5), "draw": "clamp"}):
        batch = run(photos, **options, **{f"crop_{name}": value for name, value in given.items()})[0]
        expected = random_crop(photos.read(0), np.random.default_rng((3, 0, 0)), **given)
        np.testing.assert_array_equal(batch.images[0], expected)
    for padding in (0, 3):
        rng = np.random.default_rng((3, 0, 0))
        expected = random_padded_crop(photos.read(0), (16, 16), rng, padding=padding)
        (batch,) = run(photos, **options | {"flip": True}, crop_padding=padding)
        np.testing.assert_array_equal(batch.images[0], random_flip(expected, rng))


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory):
    """JPEG files that the decoder reduces for crops of 16 pixels, some rotated."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    for k in range(6):
        exif = Image.Exif()
        exif[0x0112] = 1 + k
        picture = Image.fromarray(rng.integers(0, 256, (30 + k, 40 - k, 3), dtype=np.uint8)).resize((401, 299 + k))
        picture.save(folder / f"{k}.jpg", exif=exif)
    return open_source(str(folder), channels=3)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 3}, {"workers": 2}, {"start_step": 3}])
def test_reduced_crops_are_the_same_for_all(large_photos, options):
    whole = run(large_photos)
    assert_equal(run(large_photos, **options), whole[options.get("start_step", 0) :])
    for record, image in zip(whole[0].index[:6], whole[0].images[:6], strict=True):  # the first epoch
        rng = np.random.default_rng((3, 0, record))
        expected = random_flip(random_crop(large_photos.read(record), rng), rng)
        assert 0 < np.abs(image.astype(int) - expected).mean() < 2


def test_a_closed_iterator_gives_nothing_more(photos):
    batches = train_batches(photos, batch_size=4, image_size=(8, 8), seed=0, total_steps=9)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (
            {"image_size": (16, 0)},
            r"image_size: expected \(\[frames,\] height, width\) of at least 1 pixel, got \(16, 0\)",
        ),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        ({"start_step": -1}, "start_step: expected at least 0, got -1"),
        ({"start_step": 9}, "total_steps: expected at least 9, got 8"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"threads": -1}, "threads: expected at least 0, got -1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: expected 0 <"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio: expected 0 <"),
        ({"crop_draw": "once"}, "crop_draw: expected 'retry' or 'clamp', got 'once'"),
        ({"indices": np.array([], int)}, r"indices: expected a non-empty 1-d integer array, got int64 \(0,\)"),
        ({"indices": np.array([0.5])}, "indices: expected a non-empty 1-d integer array, got float64"),
        ({"indices": np.array([0, 20])}, "indices: expected 0 to 19, got 0 to 20"),
        ({"world_size": 0}, "world_size: expected at least 1, got 0"),
        ({"world_size": 2, "rank": 2}, "rank: expected 0 to 1, got 2"),
        ({"world_size": 2, "rank": -1}, "rank: expected 0 to 1, got -1"),
        ({"world_size": 3}, "batch_size: expected a multiple of the 3 processes, got 8"),
        ({"world_size": 16}, "batch_size: expected a multiple of the 16 processes, got 8"),
    ],
)
def test_arguments_are_checked_at_once(photos, options, message):
    options = {"batch_size": 8, "image_size": (16, 16), "seed": 3, "total_steps": 8} | options
    with pytest.raises(ValueError, match=message):
        train_batches(photos, **options)


# ---------------------------------------------------------------------------------------------------- unreadable images


@pytest.fixture(scope="session")
def broken_photos(tmp_path_factory):
    """Three hundred files of which three, two of them neighbours, cannot be read."""
    folder = tmp_path_factory.mktemp("broken")
    rng = np.random.default_rng(0)
    for k in range(300):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k:03}.png")
    (folder / "100.png").write_text("no image")
    (folder / "101.png").write_bytes(b"")
    truncated = (folder / "299.png").read_bytes()[:120]
    (folder / "299.png").write_bytes(truncated)
    return open_source(str(folder), channels=3), {100, 101, 299}


def test_an_unreadable_image_gives_its_place_to_the_next_one(broken_photos):
    source, broken = broken_photos
    options = {"batch_size": 50, "image_size": (8, 8), "seed": 0, "total_steps": 12}
    with train_batches(source, **options) as batches:
        read = list(batches)
        unreadable = batches.unreadable
    assert {record for batch in read for record, _ in batch.unreadable} == broken
    for epoch in records(read).reshape(2, 300):
        number_of_times = np.bincount(epoch, minlength=300)
        assert set(np.flatnonzero(number_of_times == 0)) == broken
        assert number_of_times[102] == 3  # in place of 100 and 101
        assert number_of_times[0] == 2  # after the last comes the first
    assert len(unreadable) == 3  # each counted once
    assert unreadable.reasons["101.png"] == "empty file"
    assert unreadable.report().startswith("3 of 300 images could not be read and were left out: 100.png (not one of ")


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_unreadable_ends_the_run(tmp_path, photos, workers):
    for k in range(NUM_IMAGES):
        (tmp_path / f"{k:02}.jpg").write_bytes((photos.records.folder / photos.records.files[k]).read_bytes())
    (tmp_path / "05.jpg").write_text("no image")
    (tmp_path / "06.jpg").write_text("no image")
    source = open_source(str(tmp_path), channels=3)
    message = (
        r"data: 2 of 20 images cannot be read so far, more than the 1% that is tolerated; .*: 05\.jpg \(not one of"
    )
    with pytest.raises(ValueError, match=message):
        run(source, workers=workers, batch_size=20)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_image_too_large_is_left_out_of_any_run(tmp_path, photos, workers):
    """However few images there are."""
    for k in range(NUM_IMAGES):
        (tmp_path / f"{k:02}.jpg").write_bytes((photos.records.folder / photos.records.files[k]).read_bytes())
    Image.new("RGB", (200, 200)).save(tmp_path / "05.jpg")
    source = open_source(str(tmp_path), channels=3, max_pixels=39_999)
    options = {"batch_size": 10, "image_size": (8, 8), "seed": 0, "total_steps": 4, "workers": workers}
    with train_batches(source, **options) as batches:
        assert not np.isin(5, records(list(batches)))
        assert batches.unreadable.reasons == {"05.jpg": "40,000 pixels, more than max_pixels 39,999"}


def test_a_single_image_that_is_unreadable_ends_the_run(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"data: 1 of 1 images cannot be read so far.*a\.jpg \(empty file\)"):
        run(open_source(str(tmp_path), channels=3), threads=0)


def test_the_error_is_short_whatever_the_names_are(tmp_path):
    for k in range(50):
        (tmp_path / f"{k:0200}.jpg").touch()
    unreadable = UnreadableImages(open_source(str(tmp_path), channels=1), num_images=4000)
    unreadable.add([(k, "x" * 200) for k in range(50)])
    with pytest.raises(ValueError, match=r"and 47 more$") as caught:
        unreadable.check()
    assert len(str(caught.value)) < 500


def test_a_folder_of_unreadable_images_ends_soon(tmp_path):
    for k in range(250):
        (tmp_path / f"{k:03}.jpg").touch()
    with pytest.raises(ValueError, match=r"data: 3 of 250 images cannot be read so far"):
        run(open_source(str(tmp_path), channels=3), threads=0)


def test_a_file_that_vanishes_is_unreadable(broken_photos, tmp_path):
    for k in range(200):
        Image.new("L", (4, 4), k).save(tmp_path / f"{k:03}.png")
    source = open_source(str(tmp_path), channels=1)
    (tmp_path / "007.png").unlink()
    with train_batches(source, batch_size=100, image_size=(4, 4), seed=0, total_steps=2) as batches:
        list(batches)
        assert batches.unreadable.reasons == {"007.png": "file not found"}


def test_unreadable_images_are_named_up_to_twenty():
    unreadable = UnreadableImages(numbered(100), num_images=10_000)
    assert unreadable.report() == ""
    unreadable.add([(k, "empty file") for k in range(30)])
    unreadable.check()
    report = unreadable.report()
    assert report.startswith("30 of 10,000 images could not be read and were left out: image 0 (empty file), ")
    assert report.endswith("image 19 (empty file), and 10 more")


def test_exactly_one_percent_is_tolerated():
    unreadable = UnreadableImages(numbered(200), num_images=200)
    unreadable.add([(0, "a"), (1, "b"), (1, "b")])
    unreadable.check()
    unreadable.add([(2, "c")])
    with pytest.raises(ValueError, match=r"data: 3 of 200 images .*image 0 \(a\), image 1 \(b\), image 2 \(c\)$"):
        unreadable.check()


@pytest.fixture
def tiny_files(tmp_path):
    """Three hundred images of one value, the last three digits of their number."""
    for k in range(300):
        Image.new("L", (4, 4), k % 256).save(tmp_path / f"{k:03}.png")
    return tmp_path


def test_a_folder_that_changes_under_the_run(tiny_files):
    """Missing files are unreadable, changed ones are read, new ones are ignored."""
    options = {"batch_size": 100, "image_size": (4, 4), "seed": 0, "total_steps": 6, "threads": 0}
    with train_batches(open_source(str(tiny_files), channels=1), **options) as batches:
        first = [next(batches) for _ in range(3)]
        (tiny_files / "007.png").unlink()
        (tiny_files / "008.png").write_bytes(b"cut off")
        Image.new("L", (9, 9), 255).save(tiny_files / "009.png")
        Image.new("L", (4, 4), 255).save(tiny_files / "000-new.png")
        second = list(batches)
        assert batches.unreadable.reasons == {
            "007.png": "file not found",
            "008.png": "not one of JPEG, PNG, WEBP, BMP, TIFF, GIF, PPM, JPEG2000, QOI, SGI, PSD, PCX",
        }
    assert set(records(first)) == set(range(300))
    assert set(records(second)) == set(range(300)) - {7, 8}
    values = {
        int(record): int(image[0, 0, 0])
        for batch in second
        for record, image in zip(batch.index, batch.images, strict=True)
    }
    assert values == {k: 255 if k == 9 else k % 256 for k in range(300) if k not in (7, 8)}


def test_a_folder_that_vanishes_under_the_run_ends_it(tiny_files):
    options = {"batch_size": 100, "image_size": (4, 4), "seed": 0, "total_steps": 6, "threads": 0}
    with train_batches(open_source(str(tiny_files), channels=1), **options) as batches:
        next(batches)
        shutil.rmtree(tiny_files)
        with pytest.raises(ValueError, match=r"data: 4 of 300 images cannot be read so far.*\(file not found\)"):
            list(batches)


def write_tar(path, files) -> None:
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_file_that_changes_under_the_run_ends_it(tmp_path, tiny_files, workers):
    """Its index is of the old one; no image is read from the wrong place."""
    path = tmp_path / "a.tar"
    names = sorted(tiny_files.glob("*.png"))
    write_tar(path, names)
    with train_batches(
        open_source(str(path), channels=1), batch_size=100, image_size=(4, 4), seed=0, total_steps=50, workers=workers
    ) as batches:
        next(batches)
        write_tar(path, names[::-1])
        with pytest.raises(ValueError, match=r"cannot be read so far.*its tar file: changed since it was opened"):
            list(batches)


def test_a_tar_file_and_a_folder_give_the_same_batches(photos, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(photos.records.folder, "photos")  # in sorted order
    tar = open_source(str(tmp_path / "a.tar"), channels=3)
    assert_equal(run(tar), run(photos))
    np.testing.assert_array_equal(tar.labels, photos.labels)


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_takes_the_centres_in_order(photos, threads):
    indices = np.array([4, 2, 9, 0, 19])
    with evaluation_batches(photos, indices, batch_size=2, image_size=(10, 12), threads=threads) as batches:
        read = list(batches)
    assert [len(batch.index) for batch in read] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([batch.index for batch in read]), indices)
    for batch in read:
        assert batch.images.dtype == np.uint8
        for image, record in zip(batch.images, batch.index, strict=True):
            np.testing.assert_array_equal(image, center_crop(photos.read(record), (10, 12)))


def test_evaluation_takes_whole_images(photos):
    with evaluation_batches(photos, batch_size=20, image_size=(16, 12), share=None) as batches:
        (batch,) = batches
    np.testing.assert_array_equal(batch.images, [resize(photos.read(k), (16, 12)) for k in range(NUM_IMAGES)])


def test_evaluation_leaves_unreadable_images_out_and_fills_the_batches(broken_photos):
    source, broken = broken_photos
    with evaluation_batches(source, batch_size=100, image_size=(8, 8)) as batches:
        read = list(batches)
        unreadable = batches.unreadable
    assert [len(batch.index) for batch in read] == [100, 100, 97]
    assert set(range(300)) - set(np.concatenate([batch.index for batch in read]).tolist()) == broken
    assert len(unreadable) == 3


def test_evaluation_says_so_if_nothing_can_be_read(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.jpg").touch()
    batches = evaluation_batches(open_source(str(tmp_path), channels=3), batch_size=2, image_size=(8, 8))
    with pytest.raises(ValueError, match=r"data: none of the images can be read: 3 of 3 .*: 0\.jpg \(empty file\), "):
        next(batches)


# ---------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("number", [0, 1, 7, 100, 1797])
@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.25, 0.99])
def test_a_split_parts_the_records(number, holdout):
    train, held_out = split_indices(number, holdout=holdout, seed=0)
    assert len(held_out) == round(number * holdout)
    assert train.dtype == held_out.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(number))


def test_a_split_is_random_but_repeatable():
    splits = [split_indices(1000, holdout=0.3, seed=seed)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0], splits[1])
    assert set(splits[0]) != set(splits[2])
    assert 400 < splits[0].mean() < 600


def test_a_split_by_labels_takes_its_share_of_every_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [10, 20, 100, 370]))
    train, held_out = split_indices(labels, holdout=0.1, seed=0)
    assert len(held_out) == 50
    assert len(train) == 450
    assert np.abs(np.bincount(labels[held_out]) - [1, 2, 10, 37]).max() <= 1


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_split_checks_the_fraction(holdout):
    with pytest.raises(ValueError, match=r"holdout: expected a number in \[0, 1\), got"):
        split_indices(10, holdout=holdout, seed=0)


# ------------------------------------------------------------------------------------------------------------ processes

SCRIPT = """
    import multiprocessing, sys, time
    from prmim_train.data.batches import evaluation_batches, train_batches
    from prmim_train.data.sources import open_source

    if __name__ == "__main__":
        digits = open_source("digits", channels=1)
        batches = train_batches(digits, batch_size=16, image_size=(8, 8), seed=0, total_steps=50, workers=2)
        first, second = next(batches), next(batches)  # one of each worker
        {end}
"""


def start(tmp_path, end: str) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(end=end))
    root = str(Path(prmim_train.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "default", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


DROP_ALL = "; ".join(
    [
        "threads = train_batches(digits, batch_size=16, image_size=(8, 8), seed=0, total_steps=50)",
        "evaluation = evaluation_batches(digits, batch_size=4, image_size=(8, 8))",
        "others = next(threads), next(evaluation)",
        "sys.exit(3)",
    ]
)


@pytest.mark.parametrize(("end", "status"), [(DROP_ALL, 3), ("batches.close()", 0), ("list(batches)", 0)])
def test_no_way_to_end_leaves_a_complaint(tmp_path, end, status):
    process = start(tmp_path, end)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (status, "", "")


@pytest.mark.parametrize("size", [8, 224])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_reported_and_nobody_waits_for_it(photos, workers, size):
    """In small batches and in such as do not go through a pipe at once."""
    options = {"batch_size": 16, "image_size": (size, size), "seed": 0, "total_steps": 10_000, "workers": workers}
    with train_batches(photos, **options) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        started = time.monotonic()
        message = (
            rf"^data: worker process [12] of {workers} was killed by SIGKILL \(.* memory .*\)( while reading .*jpg)?$"
        )
        with pytest.raises(ChildProcessError, match=message):
            list(batches)
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path):
    end = "print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(60)"
    process = start(tmp_path, end)
    try:
        children = process.stdout.readline().split()
        assert len(children) == 2
        assert all(_is_running(child) for child in children)
    finally:
        process.kill()
        process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(_is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_running(child) for child in children)


def _is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

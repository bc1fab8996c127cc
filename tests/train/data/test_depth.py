"""Depth and range of pixel values: what is kept, and what is rejected."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from prmim_train.cli.commands import main
from prmim_train.config.pretrain import change, pretrain_config
from prmim_train.data.batches import evaluation_batches, train_batches
from prmim_train.data.depth import in_8_bit_range
from prmim_train.data.image_files import UnreadableImageError, decode_crop, decode_image
from prmim_train.data.mixing import Mixing
from prmim_train.data.sources import ArraySource, open_source
from prmim_train.data.statistics import far_below, measure_images
from prmim_train.data.transforms import random_flip, resize
from prmim_train.run.prepare import measured_range, open_data

RNG = np.random.default_rng(0)
DEEP = {
    "uint8": RNG.integers(0, 256, (6, 12, 10, 2), np.uint8),
    "uint16": RNG.integers(0, 3500, (6, 12, 10, 2), np.uint16),
    "int16": RNG.integers(-900, 900, (6, 12, 10, 2), np.int16),
    "float32": RNG.normal(size=(6, 12, 10, 2)).astype(np.float32),
}


def write(tmp_path, kind: str, images) -> str:
    """Write images as one .npz file, as .npy files in a folder, or in a tar file."""
    if kind == "npz":
        np.savez(tmp_path / "a.npz", images=images)
        return str(tmp_path / "a.npz")
    (tmp_path / "npy").mkdir()
    for k, image in enumerate(images):
        np.save(tmp_path / "npy" / f"{k}.npy", image)
    if kind == "folder":
        return str(tmp_path / "npy")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "npy", "npy")
    return str(tmp_path / "a.tar")


@pytest.mark.parametrize("dtype", DEEP)
@pytest.mark.parametrize("kind", ["npz", "folder", "tar"])
def test_values_are_kept(tmp_path, kind, dtype):
    images = DEEP[dtype]
    source = open_source(write(tmp_path, kind, images), channels=2, keep_depth=True)
    expected = "float32" if dtype == "int16" else dtype
    assert source.depth == expected
    by_value = {image.tobytes(): image for image in images.astype(expected)}
    for k in range(len(source)):
        assert source.read(k).dtype == expected
        assert source.read(k).tobytes() in by_value
    options = {"batch_size": 6, "image_size": (12, 10), "total_steps": 1, "threads": 0}
    with train_batches(source, **options, seed=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False) as batches:
        batch = next(batches)
    assert batch.images.dtype == expected
    np.testing.assert_array_equal(batch.images, np.stack([source.read(int(k)) for k in batch.index]))
    with evaluation_batches(source, batch_size=6, image_size=(6, 5), threads=0) as batches:
        assert next(batches).images.dtype == expected


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_images_are_resized_and_mirrored_like_others(dtype):
    """8 bits, 16 bits and floats give the same pixels, up to rounding to 8 bits."""
    image = RNG.integers(0, 256, (40, 30, 3), np.uint8)
    scale = 257 if dtype == "uint16" else 1
    deep = image.astype(dtype) * np.dtype(dtype).type(scale)
    small = resize(deep, (11, 13), box=(1.5, 2.0, 25.0, 39.5)).astype(float) / scale
    assert np.abs(small.clip(0, 255) - resize(image, (11, 13), box=(1.5, 2.0, 25.0, 39.5))).max() <= 2
    rng = np.random.default_rng(2)  # which mirrors
    np.testing.assert_array_equal(random_flip(deep, rng), deep[:, ::-1])


def tiff(array, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF", **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("values", [DEEP["uint16"][0, ..., 0], DEEP["float32"][0, ..., 0], DEEP["uint8"][0, ..., 0]])
def test_tiff_files_keep_their_values(values, channels):
    content = tiff(values)
    found = decode_image(content, channels=channels, depth="float32")
    np.testing.assert_array_equal(found, np.repeat(values[..., None], channels, axis=2))
    crop = decode_crop(content, (4, 4), lambda shape: (1, 2, 8, 8), channels=channels, depth="float32")
    np.testing.assert_array_equal(crop, resize(found[1:9, 2:10], (4, 4)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_byte_order_of_16_bits_does_not_matter(channels):
    values = DEEP["uint16"][0, ..., 0]
    file = io.BytesIO()
    Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()).save(file, "TIFF")
    found = decode_image(file.getvalue(), channels=channels)
    np.testing.assert_array_equal(found, decode_image(tiff(values), channels=channels))
    array = values.astype(">u2")[..., None]
    np.testing.assert_array_equal(decode_image(array, channels=1), found[..., :1])


def test_deep_files_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(DEEP["uint16"][0, ..., 0]).save(file, "PNG", exif=exif)
    eight = decode_image(file.getvalue(), channels=1)
    deep = decode_image(file.getvalue(), channels=1, depth="uint16")
    assert deep.shape == eight.shape == (10, 12, 1)
    np.testing.assert_array_equal(np.rint(deep / 257), eight)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (DEEP["float32"][0], "float32 values, but the first images have uint16"),
        (DEEP["int16"][0], "int16 values, but the first images have uint16"),
    ],
)
def test_all_images_have_the_type_of_the_first(tmp_path, image, reason):
    path = write(tmp_path, "folder", [*DEEP["uint16"], *DEEP["uint16"], *DEEP["uint16"]])
    np.save(tmp_path / "npy" / "1.npy", image)  # the second of 18, of which eight are looked at
    source = open_source(path, channels=2, keep_depth=True)
    assert source.depth == "uint16"
    with pytest.raises(UnreadableImageError, match=reason):
        source.read(1)


def test_values_that_are_not_finite_are_unreadable(tmp_path):
    images = DEEP["float32"].copy()
    images[2, 3, 4, 1] = np.nan
    source = open_source(write(tmp_path, "npz", images), channels=2, keep_depth=True)
    source.read(1)
    with pytest.raises(UnreadableImageError, match="image 2: NaN or infinity"):
        source.read(2)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_values_without_a_range_need_one(tmp_path, dtype):
    path = write(tmp_path, "npz", DEEP[dtype])
    with pytest.raises(ValueError, match=rf"^pixel_range: expected low,high or auto for {dtype} images, got null$"):
        open_source(path, channels=2)
    source = open_source(write(tmp_path, "folder", DEEP[dtype]), channels=2)
    with pytest.raises(UnreadableImageError, match=f"{dtype} values have no fixed range; set pixel_range"):
        source.read(0)


def test_a_range_is_rising():
    with pytest.raises(ValueError, match=r"^pixel_range: expected low,high with low < high, got \(5.0, 5.0\)"):
        pretrain_config(pixel_range=(5, 5))


def test_a_range_is_measured_without_outliers(tmp_path):
    images = DEEP["uint16"].copy()
    images[0, 0, 0, 0] = 60_000
    config = pretrain_config(data=write(tmp_path, "npz", images), channels=2, image_size=8, patch_size=2, batch_size=2)
    low, high = measured_range(config)
    assert 0 <= low < 40
    assert 3450 < high < 3500
    images[0, 0, 0, 0] = 3600
    write(tmp_path, "npz", images)
    assert measured_range(config)[1] == 3600
    assert open_data(change(config, pixel_range=(low, high))).source.depth == "uint16"
    assert open_data(config).source.depth is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0] * 1999 + [4000], np.uint16), (0, 4000)),
        (np.array([0] * 1999 + [1], np.uint8), (0, 1)),
        (np.array([0.0] * 1999 + [0.123456], np.float32), (0, 0.12346)),
        (np.linspace(273.146, 273.164, 2000, dtype=np.float32), (273.145996, 273.164001)),
        (np.linspace(101321, 101324, 2000, dtype=np.float32), (101321, 101324)),
        (np.linspace(250.123, 310.123, 2000, dtype=np.float32), (250.12, 310.12)),
    ],
)
def test_the_range_of_sparse_and_of_nearly_equal_values(values, expected):
    assert measure_images(ArraySource(values.reshape(1, 40, 50, 1), "one")).pixel_range() == expected


def test_images_of_one_value_have_no_range():
    found = measure_images(ArraySource(np.full((2, 4, 4, 1), 7, np.float32), "two"))
    with pytest.raises(ValueError, match=r"^pixel_range: expected images with more than one value, got 7 only$"):
        found.pixel_range()


def test_measures_are_those_of_numpy():
    images = np.concatenate([DEEP["int16"], DEEP["int16"][1:2]])
    found = measure_images(ArraySource(images, "seven"), find_duplicates=True)
    np.testing.assert_allclose(found.mean, images.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(found.std, images.std(axis=(0, 1, 2)))
    assert (found.low, found.high) == (images.min(), images.max())
    assert found.duplicates == [("image 6", "image 1")]
    assert (dict(found.sizes), dict(found.depths), dict(found.channels)) == ({(12, 10): 7}, {"float32": 7}, {2: 7})


def test_the_sample_of_many_images_is_bounded():
    images = np.arange(4097, dtype=np.uint16).reshape(-1, 1, 1, 1)
    found = measure_images(ArraySource(images, "many"))
    assert np.concatenate(found.sample).tolist() == list(range(0, 4097, 2))
    assert found.pixel_range() == (0, 4096)
    assert len(measure_images(ArraySource(images[1:], "many")).sample) == 4096


def test_values_far_below_the_range_are_reported():
    found = measure_images(ArraySource(DEEP["uint16"], "six"))
    assert "of 65,535, so 8 bits keep 14 levels; see prmim stats" in far_below(found, None)
    assert far_below(found, (0, 4000)) == ""
    assert far_below(found, (0, 20_000)).endswith("of 20,000; see prmim stats, and set --pixel_range")
    assert far_below(measure_images(ArraySource(DEEP["uint8"], "six")), None) == ""


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_batches_are_mixed(dtype):
    images = DEEP[dtype][:4]
    mixed, targets = Mixing(np.array([0, 1, 0, 1]), 2, seed=0, mixup=0.8)(0, images, np.array([0, 0, 1, 1]))
    kept = targets[0, 0]
    assert mixed.dtype == dtype
    expected = kept * images + (1 - kept) * np.roll(images, -2, axis=0)
    np.testing.assert_allclose(mixed, expected, atol=0.51 if dtype == "uint16" else 1e-5)


def test_a_range_becomes_8_bits_for_pictures():
    images = np.array([0, 500, 1000, 2000], np.uint16)
    assert in_8_bit_range(images, (0, 1000)).tolist() == [0, 127.5, 255, 255]
    assert in_8_bit_range(images, None) is images


@pytest.mark.parametrize("place", ["line", "file"])
def test_a_range_is_measured_where_it_is_auto(tmp_path, capsys, place):
    data = write(tmp_path, "npz", DEEP["int16"])
    words = [
        "inspect",
        "--data",
        data,
        "--channels",
        "2",
        "--image_size",
        "8",
        "--patch_size",
        "2",
        "--batch_size",
        "2",
    ]
    (tmp_path / "a.yaml").write_text("pixel_range: auto\n")
    assert main(words) == 2
    assert "pixel_range: expected low,high or auto for int16 images, got null" in capsys.readouterr().err
    given = ["--pixel_range", "auto"] if place == "line" else ["--config", str(tmp_path / "a.yaml")]
    assert main([*words, *given]) == 0
    low, high = DEEP["int16"].min(), DEEP["int16"].max()
    assert f"Pixel range: {low},{high}, measured on the images." in capsys.readouterr().out
    assert main([*words, "--config", str(tmp_path / "a.yaml"), "--pixel_range", "-5,5"]) == 0
    assert "Pixel range" not in capsys.readouterr().out

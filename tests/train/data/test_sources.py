import contextlib
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image, features
from sklearn.datasets import load_digits

from prmim_train.config.axes import ThreeAxes
from prmim_train.config.classify import classify_config
from prmim_train.config.pretrain import pretrain_config
from prmim_train.data import image_files
from prmim_train.data.formats import arrays
from prmim_train.data.formats.folder import FolderRecords
from prmim_train.data.identity import identities
from prmim_train.data.names import PackedNames
from prmim_train.data.sources import ArraySource, UnreadableImageError, open_source
from prmim_train.data.transforms import resize
from prmim_train.run.prepare import labelled_sides, open_data


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_classes(tmp_path):
    for name in ("dog/b.JPG", "dog/a.png", "cat/deep/er/z.PnG", "cat/.hidden.png", ".git/x.png", "ant/1.webp"):
        save(tmp_path / name, Image.new("RGB", (4, 4)), format="PNG")
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path), channels=3)
    assert [source.name(k) for k in range(len(source))] == ["ant/1.webp", "cat/deep/er/z.PnG", "dog/a.png", "dog/b.JPG"]
    assert source.class_names == ("ant", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.description == f"folder {tmp_path}: 4 images in 3 classes, 1 other file skipped (.txt 1)"
    assert source.channels == 3
    assert source.read(1).shape == (4, 4, 3)


def test_a_folder_without_classes(tmp_path):
    save(tmp_path / "a.png", Image.new("L", (4, 5)))
    save(tmp_path / "more" / "b.png", Image.new("L", (4, 5)))
    source = open_source(str(tmp_path), channels=1)
    assert source.labels is None
    assert source.class_names is None
    assert source.description == f"folder {tmp_path}: 2 images, no labels"
    assert source.read(0).shape == (5, 4, 1)


def test_one_class_says_nothing(tmp_path):
    save(tmp_path / "x" / "a.png", Image.new("L", (4, 5)))
    assert open_source(str(tmp_path), channels=1).description.endswith(": 1 image, no labels")


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "a.png", Image.new("L", (4, 4)))
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    source = open_source(str(tmp_path / "data"), channels=1)
    assert list(source.records.files) == ["dog/a.png"]


def names(folder) -> list[str]:
    source = open_source(str(folder), channels=1)
    return [source.name(k) for k in range(len(source))]


def test_folders_that_link_to_each_other_do_not_multiply(tmp_path):
    """As many paths lead through them as there are orders to visit them."""
    for a in range(7):
        save(tmp_path / f"{a}" / "x.png", Image.new("L", (4, 4)))
        for b in range(7):
            (tmp_path / f"{a}" / f"to-{b}").symlink_to(tmp_path / f"{b}")
    assert names(tmp_path) == [f"{a}/x.png" for a in range(7)]


@pytest.mark.parametrize("is_reversed", [False, True])
def test_of_several_paths_to_a_folder_the_plainest_counts(tmp_path, monkeypatch, is_reversed):
    """In any listing order: the path without links, or with the fewest."""
    save(tmp_path / "data" / "z" / "plain.png", Image.new("L", (4, 4)))
    save(tmp_path / "elsewhere" / "in" / "b.png", Image.new("L", (4, 4)))
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "q").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "p").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere" / "in")
    scan = os.scandir

    @contextlib.contextmanager
    def scandir(path):
        with scan(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=is_reversed)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(tmp_path / "data") == ["p/in/b.png", "z/plain.png"]


def test_two_names_of_one_file_are_two_images(tmp_path):
    save(tmp_path / "a.png", Image.new("L", (4, 4)))
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    assert names(tmp_path) == ["a.png", "b.png", "c.png"]


def test_the_limit_of_a_run_holds_for_its_test_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 4, 4), np.uint8), labels=np.arange(9) % 2)
    for name, size in (("0/a.png", (5, 4)), ("1/b.png", (6, 4))):
        save(tmp_path / "test" / name, Image.new("L", size))
    config = pretrain_config(data=str(tmp_path / "a.npz"), channels=1, max_pixels=20, batch_size=4, epochs=30)
    test = labelled_sides(open_data(config), str(tmp_path / "test"))[1].source
    test.read(0)
    with pytest.raises(UnreadableImageError, match="24 pixels, more than max_pixels 20"):
        test.read(1)
    assert classify_config(config, {"protocol": "linear"}).max_pixels == 20


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_limit_of_pixels_holds_for_every_read(tmp_path, kind):
    save(tmp_path / "a" / "0.png", Image.new("L", (5, 4)))
    save(tmp_path / "a" / "1.png", Image.new("L", (6, 4)))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    path = str(tmp_path / ("a" if kind == "folder" else "a.tar"))
    source = pickle.loads(pickle.dumps(open_source(path, channels=1, max_pixels=20)))
    assert source.max_pixels == 20
    for read in (source.read, source.header, lambda k: source.read_crop(k, (2, 2), lambda shape: (0, 0, 2, 2))):
        read(0)
        with pytest.raises(UnreadableImageError, match="24 pixels, more than max_pixels 20"):
            read(1)


def test_a_link_to_itself_or_to_nothing_is_an_image_that_cannot_be_read(tmp_path):
    """Not one that is not there: somebody put it among the images."""
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nothing")
    source = open_source(str(tmp_path), channels=1)
    for k, reason in enumerate(["Too many levels of symbolic links", "file not found"]):
        with pytest.raises(UnreadableImageError, match=rf"^{'ab'[k]}\.png: {reason}$"):
            source.read(k)


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    save(tmp_path / "c.png", Image.new("L", (4, 4)))
    source = open_source(str(tmp_path), channels=1)
    assert [source.name(k) for k in range(len(source))] == ["c.png"]


def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    """As half of the images might be in there."""
    save(tmp_path / "a" / "a.png", Image.new("L", (4, 4)))
    scan = os.scandir

    def scandir(path):
        if str(path) == str(tmp_path / "a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list everything
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/a'"):
        open_source(str(tmp_path), channels=1)


@pytest.mark.parametrize("name", [b"a\nb.png", b"\xff.png", b"\x1b[31m.png"])
def test_names_that_no_terminal_should_see(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    path.mkdir()
    Image.new("L", (4, 4), 7).save(path / os.fsdecode(name))
    save(tmp_path / "z" / "a.png", Image.new("L", (4, 4), 7))
    source = open_source(str(tmp_path), channels=1)
    assert (source.read(0) == 7).all()
    assert source.name(0).isprintable()
    assert source.class_names is not None
    assert source.class_names[0].isprintable()


@pytest.mark.parametrize("spec", ["", "\0", "a\nb", "~nobody-of-that-name/x", "x" * 300, "[", "***"])
def test_a_name_that_leads_nowhere_is_an_error_of_one_line(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        open_source(spec, channels=1)
    assert "\n" not in str(caught.value)


def test_a_source_goes_through_pickle(tmp_path):
    save(tmp_path / "a.png", Image.new("L", (4, 4), 7))
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path), channels=1)))
    assert (source.read(0) == 7).all()


def test_reading_names_the_file_inside_the_folder(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").touch()
    with pytest.raises(UnreadableImageError, match=r"^x/a\.png: empty file$"):
        open_source(str(tmp_path), channels=3).read(0)


def test_folder_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"data: nothing at .*missing; expected a folder of images, .tar or .parquet files, .*, or \"digits\"$",
    ):
        open_source(str(tmp_path / "missing"), channels=3)
    with pytest.raises(ValueError, match=r"data: no images in .*: no files found; expected names ending in \.bmp"):
        open_source(str(tmp_path), channels=3)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(
        ValueError, match=r"data: no images in .*: 2 other files \(.csv 1, .txt 1\); expected names ending in .*\.webp"
    ):
        open_source(str(tmp_path), channels=3)
    with pytest.raises(ValueError, match=r"data: expected a folder of images, .*, a \.npz file, .*got .*a\.txt"):
        open_source(str(tmp_path / "a.txt"), channels=3)
    save(tmp_path / "a.png", Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match=r"channels: image files give 1 .*, 3 .* or 4 .*, got 7; .*\.npz"):
        open_source(str(tmp_path), channels=7)
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        open_source(str(tmp_path), channels=0)


def test_identities_of_many_files_take_little_memory(tmp_path):
    (tmp_path / "3.png").write_bytes(b"four")
    os.utime(tmp_path / "3.png", (9, 9))
    names = PackedNames(f"{k}.png" for k in range(10_000))
    tracemalloc.start()
    found = FolderRecords(tmp_path, names).identities()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    expected = identities((f"{k}.png {4 if k == 3 else -1}".encode(), 9 * (k == 3)) for k in range(10_000))
    np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------- endings and classes


def test_files_of_other_endings_are_counted_by_ending(tmp_path):
    names = ["a.jfif", "b.ppm", "c.pgm", "d.jp2", "e.tif"]
    for k, name in enumerate(names):
        form = {"jfif": "JPEG", "ppm": "PPM", "pgm": "PPM", "jp2": "JPEG2000", "tif": "TIFF"}[name[2:]]
        save(tmp_path / name, Image.new("L", (8, 8), 40 * k), format=form)
    for name in ("a.txt", "b.TXT", "LICENSE", "a.npy", "a.psd", "x.tar.gz"):
        (tmp_path / name).touch()
    source = open_source(str(tmp_path), channels=1)
    assert [source.name(k) for k in range(len(source))] == names
    assert [int(source.read(k).mean()) for k in range(5)] == [0, 40, 80, 120, 160]
    assert source.description.endswith(
        "5 images, no labels, 6 other files skipped (.txt 2, .npy 1, .psd 1, .tar.gz 1, ...)"
    )


def test_without_images_by_name_the_content_tells(tmp_path):
    for name in ("1f", "2e", "raw/a.dng"):
        save(tmp_path / name, Image.new("L", (4, 4), 9), format="TIFF" if "dng" in name else "PNG")
    for name in ("3d", "a.txt", "b.npy"):
        (tmp_path / name).write_bytes(b"BM, but no picture")
    source = open_source(str(tmp_path), channels=1)
    assert [source.name(k) for k in range(len(source))] == ["1f", "2e", "3d"]
    assert (source.read(1) == 9).all()
    assert source.description.endswith(": 3 images, no labels, 3 other files skipped (.dng 1, .npy 1, .txt 1)")


def test_arrays_are_images_of_any_number_of_channels(tmp_path):
    image = np.random.default_rng(0).integers(0, 2**16, (9, 7, 5), np.uint16)
    for name, array in (("a/0.npy", image), ("b/1.npy", image[..., 0].astype(np.uint8))):
        (tmp_path / name).parent.mkdir()
        np.save(tmp_path / name, array)
    source = open_source(str(tmp_path), channels=5)
    assert source.class_names == ("a", "b")
    np.testing.assert_array_equal(source.read(0), np.rint(image / 257))
    box = source.read_crop(0, (4, 3), lambda shape: (1, 2, shape[0] - 1, shape[1] - 2))
    np.testing.assert_array_equal(box, resize(source.read(0)[1:, 2:], (4, 3)))
    source.header(0)
    with pytest.raises(UnreadableImageError, match=r"^b/1\.npy: 1 channel, expected 5$"):
        source.read(1)
    with pytest.raises(ValueError, match=r"^channels: a/0\.npy has 5 channels, got 3$"):
        open_source(str(tmp_path), channels=3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4), np.int64), "expected uint8, uint16, int16, float32, got int64"),
        (np.zeros(4, np.uint8), r"expected an array \(height, width\) or \(height, width, channels\), got \(4,\)"),
        (np.zeros((5, 5), np.uint8), "25 pixels, more than max_pixels 20"),
        (np.array([[None]]), "contains Python objects"),
    ],
)
def test_an_array_that_is_no_image_says_why(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array)
    source = open_source(str(tmp_path), channels=1, max_pixels=20)
    for read in (source.read, source.header):
        with pytest.raises(UnreadableImageError, match=rf"^a\.npy: {reason}$"):
            read(0)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(UnreadableImageError):
        source.read(0)


def test_plugins_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_plugin", lambda name: None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(
        ValueError, match=r"1 other file \(\.heic 1\); expected .*; HEIF files need pip install pillow-heif$"
    ):
        open_source(str(tmp_path), channels=3)
    with pytest.raises(UnreadableImageError, match="starts like a HEIF file; HEIF files need pip install pillow-heif"):
        image_files.read_image(tmp_path / "a.heic", channels=3)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    save(tmp_path / "a.avif", Image.new("RGB", (16, 16), (200, 10, 10)))
    source = open_source(str(tmp_path), channels=3)
    assert np.abs(source.read(0).astype(int) - [200, 10, 10]).max() < 8


LAYOUTS = {
    "splits": (["train/cat/1", "train/dog/2", "val/cat/3", "test/4"], ["cat", "dog", "cat", None]),
    "splits without classes": (["train/1", "train/2", "val/3"], None),
    "one folder around all": (["all/cat/1", "all/dog/x/2"], ["cat", "dog"]),
    "a stray picture": (["1", "cat/2", "cat/3", "dog/4"], [None, "cat", "cat", "dog"]),
    "a stray picture above": (["1", "all/cat/2", "all/dog/3"], [None, "cat", "dog"]),
    "two stray pictures": (["1", "2", "cat/3", "dog/4"], None),
    "one class": (["cat/1", "cat/2"], None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_and_its_tar_have_the_same_classes(tmp_path, layout):
    names, expected = LAYOUTS[layout]
    for name in names:
        save(tmp_path / "data" / f"{name}.png", Image.new("L", (4, 4)))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(tmp_path / "data", "data")
    for path in ("data", "data.tar"):
        source = open_source(str(tmp_path / path), channels=1)
        found = None
        if source.labels is not None:
            of = {source.name(k).split("data/")[-1].split(".")[0].removeprefix("tar/"): k for k in range(len(names))}
            labels = [int(source.labels[of[name]]) for name in names]
            found = [None if label < 0 else source.class_names[label] for label in labels]
        assert found == expected


def test_images_without_a_class_are_no_part_of_an_evaluation(tmp_path):
    for k in range(20):
        save(tmp_path / "data" / "ab"[k % 2] / f"{k}.png", Image.new("L", (4, 4)))
        save(tmp_path / "test" / "ab"[k % 2] / f"{k}.png", Image.new("L", (4, 4)))
    for side in ("data", "test"):
        save(tmp_path / side / "stray.png", Image.new("L", (4, 4)))
    config = pretrain_config(data=str(tmp_path / "data"), channels=1, batch_size=4, epochs=30, holdout=0.2)
    for test in (None, str(tmp_path / "test")):
        for side in labelled_sides(open_data(config), test):
            assert set(side.labels[side.indices].tolist()) == {0, 1}


# --------------------------------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_digits(channels):
    source = open_source("digits", channels=channels)
    digits = load_digits()
    assert len(source) == 1797
    assert source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(source.labels, digits.target)
    pixels = source.read(5)
    assert pixels.shape == (8, 8, channels)
    assert pixels[..., 0].max() == 255
    np.testing.assert_array_equal(pixels[..., 0], np.rint(digits.images[5] * 255 / 16))
    assert source.name(5) == "image 5"


def test_digits_of_another_version_of_scikit_learn(monkeypatch):
    expected = open_source("digits", channels=1)
    monkeypatch.setattr(arrays, "find_spec", lambda name: None)  # the file is elsewhere
    source = open_source("digits", channels=1)
    np.testing.assert_array_equal(source.images, expected.images)
    np.testing.assert_array_equal(source.labels, expected.labels)


def test_digits_as_clips_stand_still():
    source = open_source("digits", channels=1, three_axes=ThreeAxes(3))
    assert source.description == "digits: 1,797 images of 3 x 8 x 8 pixels in 10 classes"
    np.testing.assert_array_equal(source.read(7), [open_source("digits", channels=1).read(7)] * 3)
    assert len(source.identities().keys) == 1797


def test_digits_have_1_3_or_4_channels():
    with pytest.raises(ValueError, match="channels: the digits give 1"):
        open_source("digits", channels=2)


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (64, 16)])
def test_a_crop_of_an_array_is_the_resized_box(channels, size):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 60, channels), dtype=np.uint8)
    shapes = []
    crop = ArraySource(images, "noise").read_crop(1, size, lambda shape: shapes.append(shape) or (3, 5, 30, 17))
    assert shapes == [(40, 60)]
    assert (crop.shape, crop.dtype) == ((*size, channels), np.uint8)
    np.testing.assert_array_equal(crop, resize(images[1, 3:33, 5:22].copy(), size))


def test_array_source_needs_no_file():
    source = ArraySource(np.zeros((2, 3, 4, 5), np.uint8), "nothing")
    assert source.read(1).shape == (3, 4, 5)

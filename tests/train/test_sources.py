import pickle
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from prmim_train.sources import ArraySource, UnreadableImageError, open_source, read_image


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """Return a smooth RGB image that no mirroring or turning leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 100 // (height + width)], -1).astype(np.uint8)


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


# --------------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff", "webp", "gif", "jpg", "jpeg"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_is_read_in_every_mode(tmp_path, ending, channels):
    rgb = Image.fromarray(gradient())
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    pixels = read_image(save(tmp_path / f"a.{ending}", rgb, **options), channels=channels)
    expected = np.asarray(rgb.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(24, 32, channels)
    assert pixels.shape == (24, 32, channels)
    assert pixels.dtype == np.uint8
    tolerance = {"jpg": 4, "jpeg": 20, "gif": 40}.get(ending, 0)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_grey_becomes_equal_channels_and_opaque_alpha(tmp_path):
    grey = gradient()[..., 0]
    path = save(tmp_path / "a.png", Image.fromarray(grey))
    np.testing.assert_array_equal(read_image(path, channels=1), grey[..., None])
    np.testing.assert_array_equal(read_image(path, channels=3), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(read_image(path, channels=4), np.stack([grey] * 3 + [np.full_like(grey, 255)], -1))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_rounded(tmp_path, ending):
    values = np.array([[0, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]], np.uint16)
    path = save(tmp_path / f"a.{ending}", Image.fromarray(values))
    assert read_image(path, channels=1).ravel().tolist() == [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    np.testing.assert_array_equal(read_image(path, channels=3)[..., 2], read_image(path, channels=1)[..., 0])


def test_cmyk_jpeg(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    path = save(tmp_path / "a.jpg", cmyk, quality=95)
    for channels in (3, 4):
        red, green, blue = read_image(path, channels=channels)[8, 8, :3].tolist()
        assert red > 240
        assert green < 15
        assert blue < 15
    assert 70 < read_image(path, channels=1)[8, 8, 0] < 85


def test_palette(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert read_image(save(tmp_path / "a.png", picture), channels=3)[3, 3].tolist() == [10, 200, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_or_kept(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (0, 0, 4, 8))
        path = save(tmp_path / "a.png", palette, transparency=0)
    else:
        path = save(tmp_path / "a.png", picture.convert(mode))
    for channels in (1, 3):
        pixels = read_image(path, channels=channels)
        assert (pixels[:, :4] == 0).all()
        assert (pixels[:, 4:] == 255).all()
    alpha = read_image(path, channels=4)[..., 3]
    assert (alpha[:, :4] == 255).all()
    assert (alpha[:, 4:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    picture = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{ending}", picture, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    tagged = picture.copy()
    tagged.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(read_image(path, channels=3), np.asarray(ImageOps.exif_transpose(tagged)))


def test_exif_orientation_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=exif, quality=100)
    expected = np.rot90(gradient(), -1).astype(int)
    assert np.abs(read_image(path, channels=3) - expected).max() < 30


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    first, second = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    path = save(tmp_path / "a.gif", first, save_all=True, append_images=[second])
    assert (read_image(path, channels=1) == 0).all()


def huge_png(path, width: int, height: int) -> None:
    """Write a small PNG file that says it is huge."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    chunks.append((b"IEND", b""))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))


def break_file(path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    whole = save(path.with_name("whole.jpg"), Image.fromarray(noise)).read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "header only":
            path.write_bytes(whole[:30])
        case "text":
            path.write_text("this is no image\n" * 50)
        case "empty":
            path.touch()
        case "gone":
            pass
        case "bomb":
            huge_png(path, 10_000, 10_000)
        case "larger bomb":
            huge_png(path, 60_000, 60_000)
        case "folder":
            path.mkdir()
        case "postscript":
            path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
        case "float":
            Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "truncated"),
        ("header only", "not one of|Truncated|truncated"),
        ("text", "not one of JPEG, PNG, WEBP, BMP, TIFF, GIF"),
        ("empty", "empty file"),
        ("gone", "file not found"),
        ("bomb", "exceeds limit of 89478485 pixels"),
        ("larger bomb", "decompression bomb"),
        ("folder", "[Dd]irectory"),
        ("postscript", "not one of"),
        ("float", "32 bits per value have no fixed range"),
    ],
)
def test_unreadable_files_say_why_in_one_line(tmp_path, kind, reason):
    path = tmp_path / "a.jpg"
    break_file(path, kind)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_image(path, channels=3)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_pillows_limit_is_unreadable_even_where_pillow_only_warns(tmp_path):
    break_file(tmp_path / "a.jpg", "bomb")
    with pytest.raises(UnreadableImageError, match="10000 x 10000 pixels, more than the limit of 89,478,485"):
        read_image(tmp_path / "a.jpg", channels=3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_damage_the_image(tmp_path):
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff garbage"
    path = save(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=exif)
    assert read_image(path, channels=3).shape == (24, 32, 3)


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
    assert source.description == f"folder {tmp_path}: 4 images in 3 classes"
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


def test_one_image_in_one_class(tmp_path):
    save(tmp_path / "x" / "a.png", Image.new("L", (4, 5)))
    assert open_source(str(tmp_path), channels=1).description.endswith(": 1 image in 1 class")


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "a.png", Image.new("L", (4, 4)))
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    source = open_source(str(tmp_path / "data"), channels=1)
    assert [source.name(k) for k in range(len(source))] == ["cat/up/dog/a.png", "dog/a.png"][-len(source) :]


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
    with pytest.raises(FileNotFoundError, match=r"data: nothing at .*missing; expected a folder of images, a \.npz"):
        open_source(str(tmp_path / "missing"), channels=3)
    with pytest.raises(ValueError, match=r"data: no images in .*: it holds no files; expected names ending in \.bmp"):
        open_source(str(tmp_path), channels=3)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(ValueError, match=r"data: no images in .*: 2 other files; expected names ending in .*\.webp"):
        open_source(str(tmp_path), channels=3)
    with pytest.raises(ValueError, match=r"data: expected a folder of images, a \.npz file, .*got the file .*a\.txt"):
        open_source(str(tmp_path / "a.txt"), channels=3)
    save(tmp_path / "a.png", Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match=r"channels: image files give 1 .*, 3 .* or 4 .*, got 7; .*\.npz"):
        open_source(str(tmp_path), channels=7)
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        open_source(str(tmp_path), channels=0)


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


def test_digits_have_1_3_or_4_channels():
    with pytest.raises(ValueError, match="channels: the digits give 1"):
        open_source("digits", channels=2)


# ------------------------------------------------------------------------------------------------------------------ npz


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_npz_of_any_channels(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2, 1, 0]), names=np.array(["x", "y", "z"]))
    source = open_source(str(tmp_path / "a.npz"), channels=channels)
    np.testing.assert_array_equal(source.read(3), images[3])
    assert source.description == f"file {tmp_path / 'a.npz'}: 5 images of 6 x 4 pixels in 3 classes"
    assert source.class_names == ("x", "y", "z")
    assert source.labels is not None
    assert source.labels.dtype == np.int64


def test_npz_without_channel_axis_labels_and_names(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=np.full((5, 6, 4), 9, np.uint8))
    source = open_source(str(tmp_path / "a.npz"), channels=1)
    assert source.read(0).shape == (6, 4, 1)
    assert source.labels is None
    assert source.class_names is None
    assert source.description.endswith("5 images of 6 x 4 pixels, no labels")


def test_npz_of_16_bits_and_labels_without_names(tmp_path):
    images = np.array([0, 128, 129, 65535], np.uint16).reshape(4, 1, 1)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2, 2, 0], np.uint8))
    source = open_source(str(tmp_path / "a.npz"), channels=1)
    assert [int(source.read(k)[0, 0, 0]) for k in range(4)] == [0, 0, 1, 255]
    assert source.read(0).dtype == np.uint8
    assert source.class_names == ("0", "1", "2")


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "holds no array named 'images', but x"),
        ({}, "holds no array named 'images', but nothing"),
        ({"images": IMAGES.astype(float)}, "'images' of .*: expected uint8 or uint16, got float64"),
        ({"images": IMAGES[0]}, r"'images' of .*: expected \(N, height, width\) or .*, got \(4, 4\)"),
        ({"images": IMAGES[:0]}, r"no images in .*: 'images' is \(0, 4, 4, 1\)"),
        ({"images": np.zeros((3, 4, 4, 3), np.uint8)}, r"channels: .* has 3 .*, got 1"),
        ({"images": IMAGES, "labels": np.zeros(4, int)}, r"'labels' of .*: expected \(3,\), one per image, got \(4,\)"),
        ({"images": IMAGES, "labels": np.zeros(3)}, "'labels' of .*: expected integers, got float64"),
        ({"images": IMAGES, "labels": np.array([0, -1, 2])}, "'labels' of .*: expected classes from 0, got -1"),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.array(["a", "b"])},
            "'names' of .*: expected a name for every class up to 2, got 2 names",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.arange(3)},
            "'names' of .*: expected a list of strings, got int64",
        ),
        ({"images": np.array([{}, None, 3], object)}, "array 'images' of .* cannot be read: it holds Python objects"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path / "a.npz"), channels=1)
    assert "\n" not in str(caught.value)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=f"data: no such file: {re.escape(str(path))}"):
        open_source(str(path), channels=1)
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"is not a \.npz file"):
        open_source(str(path), channels=1)
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(ValueError, match=r"is not a \.npz file"):
        open_source(str(path), channels=1)


def test_npz_with_damaged_content(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"array \'images\' of .* cannot be read: "):
        open_source(str(path), channels=1)


def test_array_source_needs_no_file():
    source = ArraySource(np.zeros((2, 3, 4, 5), np.uint8), "nothing")
    assert source.read(1).shape == (3, 4, 5)

"""Image files of every kind, valid and damaged: content, or a one-line reason."""

import contextlib
import io
import os
import pickle
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin

from prmim_methods.messages import printable
from prmim_train.data import image_files
from prmim_train.data.image_files import (
    UnreadableImageError,
    decode_crop,
    decode_image,
    open_part,
    read_header,
    read_image,
)
from prmim_train.data.transforms import resize


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """Return a smooth RGB image that no mirroring or turning leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 100 // (height + width)], -1).astype(np.uint8)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, colour: int = 0, content: bytes = b"", *more: tuple[bytes, bytes]):
    """Assemble a PNG file from a header and compressed content.

    They need not fit each other.
    """
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *more]
    chunks += [(b"IDAT", content), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@contextlib.contextmanager
def ordinary_user():
    """Give up the rights of root, who may read everything, for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ------------------------------------------------------------------------------------------------------ sound and odd


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff", "webp", "gif", "jpg", "jpeg"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_is_read_in_every_mode(tmp_path, ending, channels):
    rgb = Image.fromarray(gradient())
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    rgb.save(tmp_path / f"a.{ending}", **options)
    pixels = read_image(tmp_path / f"a.{ending}", channels=channels)
    expected = np.asarray(rgb.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(24, 32, channels)
    assert pixels.shape == (24, 32, channels)
    assert pixels.dtype == np.uint8
    tolerance = {"jpg": 4, "jpeg": 20, "gif": 40}.get(ending, 0)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_the_content_counts_not_the_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("L", (4, 4), 7), "PNG"))
    assert (read_image(tmp_path / "a.jpg", channels=1) == 7).all()


def test_grey_becomes_equal_channels_and_opaque_alpha():
    grey = gradient()[..., 0]
    content = encoded(Image.fromarray(grey), "PNG")
    np.testing.assert_array_equal(decode_image(content, channels=1), grey[..., None])
    np.testing.assert_array_equal(decode_image(content, channels=3), np.stack([grey] * 3, -1))
    opaque = np.stack([grey] * 3 + [np.full_like(grey, 255)], -1)
    np.testing.assert_array_equal(decode_image(content, channels=4), opaque)


def test_one_bit_per_pixel():
    content = encoded(Image.fromarray(np.array([[True, False]])), "PNG")
    assert decode_image(content, channels=1).ravel().tolist() == [255, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_rounded(kind):
    values = np.array([[0, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]], np.uint16)
    content = encoded(Image.fromarray(values), kind)
    assert decode_image(content, channels=1).ravel().tolist() == [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    np.testing.assert_array_equal(decode_image(content, channels=3)[..., 2], decode_image(content, channels=1)[..., 0])


def test_of_16_bit_colours_the_upper_eight_bits_are_kept():
    values = np.array([[[0, 255, 256], [32768, 65279, 65535]]], ">u2")
    content = png(2, 1, 16, 2, zlib.compress(b"\0" + values.tobytes()))
    assert decode_image(content, channels=3).tolist() == [[[0, 0, 1], [128, 254, 255]]]


@pytest.mark.parametrize("values", [np.zeros((4, 4), np.float32), np.zeros((4, 4), np.int32)])
def test_32_bits_per_value_have_no_range_to_scale_by(values):
    with pytest.raises(UnreadableImageError, match=r"^a\.tif: 32 bits per value have no fixed range"):
        decode_image(encoded(Image.fromarray(values), "TIFF"), channels=1, name="a.tif")


def test_cmyk_jpeg():
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)  # no cyan: red
    for channels in (3, 4):
        red, green, blue = decode_image(content, channels=channels)[8, 8, :3].tolist()
        assert red > 240
        assert green < 15
        assert blue < 15
    assert 70 < decode_image(content, channels=1)[8, 8, 0] < 85


def test_palette():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert decode_image(encoded(picture, "PNG"), channels=3)[3, 3].tolist() == [10, 200, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_or_kept(mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (0, 0, 4, 8))
        content = encoded(palette, "PNG", transparency=0)
    else:
        content = encoded(picture.convert(mode), "PNG")
    for channels in (1, 3):
        pixels = decode_image(content, channels=channels)
        assert (pixels[:, :4] == 0).all()
        assert (pixels[:, 4:] == 255).all()
    alpha = decode_image(content, channels=4)[..., 3]
    assert (alpha[:, :4] == 255).all()
    assert (alpha[:, 4:] == 0).all()


def test_half_transparency_is_mixed_with_white():
    content = encoded(Image.new("RGBA", (2, 2), (0, 100, 200, 51)), "WEBP", lossless=True)  # a fifth
    assert decode_image(content, channels=3)[0, 0].tolist() == [204, 224, 244]
    assert decode_image(content, channels=4)[0, 0].tolist() == [0, 100, 200, 51]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    picture = Image.fromarray(gradient())
    content = encoded(picture, kind, exif=tagged(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    picture.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(content, channels=3), np.asarray(ImageOps.exif_transpose(picture)))


def test_exif_orientation_of_a_jpeg():
    content = encoded(Image.fromarray(gradient()), "JPEG", exif=tagged(6), quality=100)  # to be turned clockwise
    expected = np.rot90(gradient(), -1).astype(int)
    assert np.abs(decode_image(content, channels=3) - expected).max() < 30


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_an_animation_or_of_several_pages_is_read(kind):
    first, second = (Image.new("RGB", (8, 8), (grey,) * 3) for grey in (0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.n_frames == 2
    assert (decode_image(content, channels=1) == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_images_of_one_row_or_column(shape, kind):
    content = encoded(Image.fromarray(np.full(shape, 200, np.uint8)), kind)
    pixels = decode_image(content, channels=1)
    assert pixels.shape == (*shape, 1)
    assert np.abs(pixels.astype(int) - 200).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_damage_the_image():
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff garbage"
    content = encoded(Image.fromarray(gradient()), "JPEG", exif=exif)
    assert decode_image(content, channels=3).shape == (24, 32, 3)


def test_pillows_warnings_can_be_switched_off():
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff garbage"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image_files.ignore_pillow_warnings()
        assert decode_image(encoded(Image.new("L", (4, 4)), "JPEG", exif=exif), channels=1).shape == (4, 4, 1)
        with pytest.raises(UnreadableImageError):
            decode_image(png(10_000, 10_000), channels=1)
        warnings.warn("of others", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["of others"]


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_files_have_1_3_or_4_channels(tmp_path, channels):
    for read in (lambda: decode_image(b"", channels=channels), lambda: read_image(tmp_path / "a", channels=channels)):
        with pytest.raises(ValueError, match=rf"channels: image files give 1 .* got {channels}; .*\.npz") as caught:
            read()
        assert not isinstance(caught.value, UnreadableImageError)


# -------------------------------------------------------------------------------------------------------------- crops


def smooth(height: int, width: int) -> np.ndarray:
    """Return an image without the finest frequencies, in which all places differ.

    Photographs are alike.
    """
    noise = np.random.default_rng(0).integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def reductions(monkeypatch):
    """By how much the decoder was told to reduce."""
    seen = []
    plain = JpegImagePlugin.JpegImageFile.draft

    def draft(self, mode, size):
        before = self.size
        result = plain(self, mode, size)
        seen.append(round(before[0] / result[1][2]))
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)
    return seen


PSNR_40 = 255**2 / 1e4
"""The mean square of differences at a peak signal-to-noise ratio of 40 dB."""


def mean_square(first: np.ndarray, second: np.ndarray) -> float:
    return np.square(first.astype(float) - second).mean()


def crop_and_resize(content: bytes, size, box, channels: int) -> np.ndarray:
    top, left, height, width = box
    pixels = decode_image(content, channels=channels)
    return resize(pixels[top : top + height, left : left + width], size)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_crop_is_the_resized_box_of_the_upright_image(kind, orientation, channels):
    content = encoded(Image.fromarray(smooth(61, 83)), kind, exif=tagged(orientation))
    shapes = []

    def choose(shape):
        shapes.append(shape)
        return box

    for box in [(3, 5, 47, 31), (0, 0, *decode_image(content, channels=1).shape[:2]), (60, 20, 1, 1)]:
        crop = decode_crop(content, (20, 22), choose, channels=channels)
        assert crop.dtype == np.uint8
        np.testing.assert_array_equal(crop, crop_and_resize(content, (20, 22), box, channels))
    assert shapes == [(83, 61) if orientation > 4 else (61, 83)] * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_crop_is_converted_as_the_whole_image_is(mode, channels):
    picture = Image.fromarray(smooth(61, 83))
    picture = (
        Image.fromarray(smooth(61, 83)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
    )
    content = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    box = (3, 5, 47, 31)
    crop = decode_crop(content, (20, 22), lambda shape: box, channels=channels)
    np.testing.assert_array_equal(crop, crop_and_resize(content, (20, 22), box, channels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "reduction"), [((100, 70), 2), ((30, 32), 4), ((20, 12), 8), ((1, 1), 8)])
def test_of_a_large_jpeg_a_crop_is_decoded_smaller(reductions, orientation, size, reduction):
    """Nearly as if it were decoded whole, though nothing is a multiple of anything."""
    content = encoded(Image.fromarray(smooth(611, 613)), "JPEG", quality=95, exif=tagged(orientation))
    box = (17, 101, 501, 333)
    crop = decode_crop(content, size, lambda shape: box, channels=3)
    assert reductions == [reduction]
    assert mean_square(crop, crop_and_resize(content, size, box, 3)) < PSNR_40


@pytest.mark.parametrize("kind", ["progressive", "grey", "CMYK", "several pictures"])
def test_every_kind_of_jpeg_is_decoded_smaller(reductions, kind):
    picture, other = Image.fromarray(smooth(400, 600)), Image.new("RGB", (600, 400))
    content = {
        "progressive": lambda: encoded(picture, "JPEG", progressive=True),
        "grey": lambda: encoded(picture.convert("L"), "JPEG"),
        "CMYK": lambda: encoded(picture.convert("CMYK"), "JPEG"),
        "several pictures": lambda: encoded(picture, "MPO", save_all=True, append_images=[other]),
    }[kind]()
    for channels in (1, 3, 4):
        crop = decode_crop(content, (40, 50), lambda shape: (1, 2, 390, 590), channels=channels)
        assert mean_square(crop, crop_and_resize(content, (40, 50), (1, 2, 390, 590), channels)) < PSNR_40
    assert reductions == [4, 4, 4]


@pytest.mark.parametrize(("box", "is_reduced"), [((0, 0, 128, 160), True), ((0, 0, 127, 160), False)])
def test_what_is_left_of_a_reduced_box_is_twice_as_large_as_the_result(reductions, box, is_reduced):
    content = encoded(Image.fromarray(smooth(200, 200)), "JPEG")
    crop = decode_crop(content, (32, 40), lambda shape: box, channels=3)
    assert reductions == [2] * is_reduced
    assert (crop == crop_and_resize(content, (32, 40), box, 3)).all() != is_reduced


@pytest.mark.parametrize("size", [(8, 8), (150, 150)])
@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_truncated_jpeg_is_unreadable_wherever_the_box_is(size, kept):
    content = encoded(Image.fromarray(smooth(200, 200)), "JPEG")
    with pytest.raises(UnreadableImageError, match=r"^a\.jpg: image file is truncated"):
        decode_crop(content[: int(kept * len(content))], size, lambda shape: (0, 0, 10, 10), channels=3, name="a.jpg")


def test_no_box_is_chosen_in_what_is_no_image():
    def choose(shape):
        raise AssertionError

    for content in (b"", b"no image", png(10_000, 10_000)):
        with pytest.raises(UnreadableImageError):
            decode_crop(content, (8, 8), choose, channels=3)


def test_what_is_asked_wrongly_is_no_fault_of_the_image():
    content = encoded(Image.new("L", (4, 4)), "PNG")

    def choose(shape):
        raise ValueError("no box")

    for error, size, channels in (("size: ", (0, 8), 1), ("channels: ", (8, 8), 2), ("no box", (8, 8), 1)):
        with pytest.raises(ValueError, match=f"^{error}") as caught:
            decode_crop(content, size, choose, channels=channels)
        assert not isinstance(caught.value, UnreadableImageError)


# --------------------------------------------------------------------------------------------------------- unreadable

NOISE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
JPEG = encoded(Image.fromarray(NOISE), "JPEG")
GIF = encoded(Image.fromarray(NOISE), "GIF")
NO_FORMAT = "not one of JPEG, PNG, WEBP, BMP, TIFF, GIF, PPM, JPEG2000, QOI, SGI, PSD, PCX"

UNREADABLE = {
    "truncated": (JPEG[: len(JPEG) // 2], "image file is truncated .*"),
    "cut in the header": (JPEG[:30], "Truncated File Read"),
    "cut in the first bytes": (GIF[:10], "starts like a GIF file, but is corrupt or of a kind that Pillow cannot read"),
    "text": (b"this is no image\n" * 50, NO_FORMAT),
    "a page in its place": (b"<!DOCTYPE html><title>404</title>", NO_FORMAT),
    "empty": (b"", "empty file"),
    "zeros": (bytes(5000), rf"{NO_FORMAT} \(all zeros\)"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", NO_FORMAT),
    "bomb, by Pillow's warning": (png(10_000, 10_000), "100,000,000 pixels, more than max_pixels 89,478,485"),
    "bomb, by Pillow's error": (png(60_000, 60_000), "3,600,000,000 pixels, more than max_pixels 89,478,485"),
    "bomb, jpeg": (
        JPEG.replace(b"\x00\x60\x00\x60", b"\xff\xff\xff\xff"),
        "4,294,836,225 pixels, more than max_pixels 89,478,485",
    ),
    "huge header, no content": (png(9_000, 9_000), "image file is truncated .*"),
    "no pixels": (png(0, 0), "starts like a PNG file, but is corrupt or of a kind that Pillow cannot read"),
}


@pytest.mark.parametrize("pillow_warns", ["error", "ignore", "default"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_content_says_why_in_one_line(kind, pillow_warns):
    """Pillow's warnings as errors (as in tests), ignored (as in runs), or printed."""
    content, reason = UNREADABLE[kind]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter(pillow_warns)
        with pytest.raises(UnreadableImageError, match=f"^a.jpg: ({reason})$") as caught:
            decode_image(content, channels=3, name="a.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gone", "file not found"),
        ("link to nothing", "file not found"),
        ("folder", "Is a directory"),
        ("pipe", "not a regular file, but a pipe, a socket or a device"),
        ("device", "not a regular file, but a pipe, a socket or a device"),
    ],
)
def test_what_is_no_file_is_unreadable_and_keeps_nobody_waiting(tmp_path, kind, reason):
    path = tmp_path / "a.jpg"
    match kind:
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)  # to open it plainly would wait for a writer
        case "device":
            path.symlink_to("/dev/zero")  # which never ends
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, channels=3)
    assert str(caught.value) == f"{path}: {reason}"


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    path.chmod(0)
    with ordinary_user(), pytest.raises(UnreadableImageError, match=r"a\.png: Permission denied$"):
        read_image(path, channels=1)


def test_a_file_above_the_limit_is_not_read(tmp_path):
    with (tmp_path / "a.webp").open("wb") as file:
        file.truncate(image_files.MAX_FILE_BYTES + 1)  # takes no room on the disk
    with pytest.raises(UnreadableImageError, match="536,870,913 bytes, more than the limit of 536,870,912"):
        read_image(tmp_path / "a.webp", channels=1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_before_memory_is_taken(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImageError, match=r"more than max_pixels 89,478,485$"):
        decode_image(png(*size), channels=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_the_limit_of_pixels_is_an_argument(kind, tmp_path):
    content = encoded(Image.new("L", (30, 20), 99), kind)
    (tmp_path / "a").write_bytes(content)
    assert decode_image(content, channels=1, max_pixels=600).shape == (20, 30, 1)
    read_header(io.BytesIO(content), max_pixels=600)
    for read in (
        lambda: decode_image(content, channels=1, max_pixels=599),
        lambda: decode_crop(content, (2, 2), lambda shape: (0, 0, *shape), channels=1, max_pixels=599),
        lambda: read_image(tmp_path / "a", channels=1, max_pixels=599),
        lambda: read_header(io.BytesIO(content), max_pixels=599),
    ):
        with pytest.raises(UnreadableImageError, match=r"600 pixels, more than max_pixels 599$"):
            read()


@pytest.mark.parametrize("size", [(2**20 + 1, 1), (1, 2**20 + 1)])
def test_a_side_has_a_limit_too(size):
    reason = f"{size[0]:,} x {size[1]:,} pixels, more than the limit of 1,048,576 per side"
    with pytest.raises(UnreadableImageError, match=f"^image: {reason}$"):
        decode_image(png(*size), channels=1)


def test_a_tile_may_not_exceed_the_limit_either():
    """A tile is decoded whole, even if the image is a small part of it."""
    tags = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 40_000),
        (323, 40_000),
        (324, 8),
        (325, 9),
    ]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    with pytest.raises(UnreadableImageError, match=r"1,600,000,000 pixels, more than max_pixels 89,478,485$"):
        decode_image(content, channels=1)


def test_the_limit_of_pixels_may_exceed_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encoded(Image.new("L", (30, 20), 99), "PNG")
    assert decode_image(content, channels=1, max_pixels=600).shape == (20, 30, 1)
    assert decode_crop(content, (2, 2), lambda shape: (0, 0, *shape), channels=1, max_pixels=600).shape == (2, 2, 1)
    assert Image.MAX_IMAGE_PIXELS == 600


def with_scans(number: int, size: int = 32) -> bytes:
    """Return a progressive JPEG with a number of scans.

    The last scan is repeated; it changes nothing.
    """
    content = encoded(Image.new("L", (size, size), 77), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (number - content.count(b"\xff\xda")) + content[-2:]


def test_a_jpeg_has_at_most_a_hundred_scans():
    """Each of these twelve bytes costs a pass over all pixels."""
    assert (decode_image(with_scans(100), channels=1) == 77).all()
    for number in (101, 3000):
        content = with_scans(number)
        with pytest.raises(UnreadableImageError, match=f"JPEG of {number:,} scans, more than the limit of 100$"):
            decode_image(content, channels=1)
        with pytest.raises(UnreadableImageError, match=f"JPEG of {number:,} scans, more than the limit of 100$"):
            decode_crop(content, (2, 2), lambda shape: (0, 0, *shape), channels=1)


def test_scans_are_counted_in_the_image_only():
    """Scans in metadata (previews) and after the end (videos of phones) do not count."""
    metadata = b"\xff\xe5" + struct.pack(">H", 2 + 2 * 200) + b"\xff\xda" * 200
    content = with_scans(100)
    content = content[:2] + metadata + content[2:] + b"\xff\xda" * 200
    assert (decode_image(content, channels=1) == 77).all()
    content = encoded(Image.fromarray(NOISE), "JPEG", quality=100, restart_marker_blocks=1)
    assert content.count(b"\xff") > 100
    assert image_files._count_scans(content + b"\xff\xda" * 200) == 1


def test_a_header_is_checked_without_reading_the_rest(tmp_path, monkeypatch):
    content = encoded(Image.fromarray(np.tile(NOISE, (9, 9, 1))), "BMP")
    (tmp_path / "a.bmp").write_bytes(b"." * 700 + content + b"." * 700)
    read, sizes = image_files.read_part, []

    def counted_read(file, start, size):
        sizes.append(size)
        return read(file, start, size)

    monkeypatch.setattr(image_files, "read_part", counted_read)
    with open_part(tmp_path / "a.bmp", 700, len(content)) as file:
        read_header(file)
    assert 0 < sum(sizes) < 100_000 < len(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"text" * 50, NO_FORMAT),
        (png(10_000, 10_000), "100,000,000 pixels, more than max_pixels 89,478,485"),
        (JPEG[:30], "Truncated File Read|starts like a JPEG file, but .*"),
    ],
)
def test_a_header_tells_what_cannot_be_read(tmp_path, content, reason):
    (tmp_path / "a").write_bytes(b"." * 700 + content + JPEG)
    with (
        open_part(tmp_path / "a", 700, len(content)) as file,
        pytest.raises(UnreadableImageError, match=f"^x: ({reason})$"),
    ):
        read_header(file, name="x")


def test_memory_that_runs_out_makes_an_image_unreadable(monkeypatch):
    def load(self):
        raise MemoryError

    content = encoded(Image.new("L", (4, 4)), "BMP")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UnreadableImageError, match=r"^image: not enough memory$"):
        decode_image(content, channels=1)


def test_an_error_goes_through_pickle():
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "empty file")))
    assert (str(error), error.name, error.reason) == ("a.jpg: empty file", "a.jpg", "empty file")


def test_long_reasons_are_cut():
    assert len(image_files.reason_of(ValueError("x" * 5000))) < 250


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("cat/Zoë 3.jpg", "cat/Zoë 3.jpg"),
        ("a\nb\x1b[31m.jpg", "a\\nb\\x1b[31m.jpg"),
        (os.fsdecode(b"\xff.jpg"), "\\xff.jpg"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
    ],
)
def test_names_cannot_do_things_to_a_terminal(name, printed):
    assert printable(name) == printed

"""Hostile cases of data: tar files, images, folders."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from functools import partial

import numpy as np
from cases import TINY, case, cases, check_line, prmim, prmim_process, refused, write_tiny
from PIL import Image

from prmim_train.data.image_files import UnreadableImageError, decode_crop, decode_image, ignore_pillow_warnings
from prmim_train.data.sources import open_source

BLOCK = 512
SECONDS = 5
"""Most seconds for a small file, on a busy machine."""
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

ignore_pillow_warnings()


def encoded(picture, kind, **options):
    """Return the content of an image file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.new("L", (8, 8), 7), "PNG")


# ------------------------------------------------------------------------------------------------------------ tar files


def tar(*names, form="gnu", **changes):
    """Return a tar file of images, with its end."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as archive:
        for name in names or [f"{k}.png" for k in range(6)]:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(PNG))
    return file.getvalue()


def bare(content):
    """Return a tar file without its end."""
    return content[: -(-len(content.rstrip(b"\0")) // BLOCK) * BLOCK]


def header(size):
    """Return the header of an image that claims this size."""
    info = tarfile.TarInfo("a.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


SIX = tar()
BARE = bare(SIX)  # a block of header and a block of content for each image
NO_END, MORE = "no end-of-archive marker", "after the end-of-archive marker"


@cases(
    8,
    {
        **{f"cut between members, {k} of 6 left": (BARE[: 2 * BLOCK * k], NO_END) for k in (1, 3, 5)},
        **{f"cut between members ({form})": (bare(tar(form=form, mtime=1.5)), NO_END) for form in FORMATS},
        "the end is missing": (BARE, NO_END),
        "cut in the padding of the last member": (BARE[:-100], NO_END),
        "cut in a header": (BARE[: 4 * BLOCK + 100], "truncated within the header"),
        "cut in a content": (BARE[: 5 * BLOCK + 10], "truncated or damaged"),
        "cut in the first block of the end": (BARE + bytes(BLOCK - 1), "truncated within the header"),
        "cut after a long name": (bare(tar("x" * 150 + ".png"))[: 2 * BLOCK], NO_END),
        "two archives": (SIX + SIX, MORE),
        "two archives, a block of zeros between": (BARE + bytes(BLOCK) + SIX, MORE),
        "three archives": (SIX + SIX + SIX, MORE),
        "an archive after an empty one": (bytes(10240) + SIX, MORE),
        "a block of zeros between two members": (BARE[: 4 * BLOCK] + bytes(BLOCK) + BARE[4 * BLOCK :], MORE),
        "zeros in place of a header": (BARE[: 4 * BLOCK] + bytes(BLOCK) + BARE[5 * BLOCK :], MORE),
        "zeros in place of two members": (BARE[: 4 * BLOCK] + bytes(4 * BLOCK) + BARE[8 * BLOCK :], MORE),
        "text after the end": (SIX + b"appended", MORE),
        "one byte after the end": (SIX + b"x", MORE),
        "a gzip file after the end": (SIX + b"\x1f\x8b\x08" + bytes(100), MORE),
        "a download that allocated 4 MiB": (BARE + bytes(2**22), "incomplete or damaged"),
        "an empty file": (b"", "empty file"),
        "one byte": (b"x", "not a tar file"),
        "zeros only": (bytes(10240), "no images"),
        "zeros in place of a long name": (tar("x" * 150 + ".png")[:BLOCK] + bytes(BLOCK) + SIX, "damaged"),
        "a changed letter in a header": (BARE[: 2 * BLOCK] + b"X" + BARE[2 * BLOCK + 1 :], "damaged header"),
        "members in reverse, as a damaged disk has them": (
            BARE[2 * BLOCK :] + BARE[BLOCK : 2 * BLOCK],
            "damaged header",
        ),
        "a size that passes the end": (
            header(8**11 - 1) + SIX,
            "damaged: the member at byte 0 would end at byte 8,589,",
        ),
        "compressed with gzip": (b"\x1f\x8b\x08\0" + bytes(200), "compressed (gzip)"),
        "compressed with zstd": (b"\x28\xb5\x2f\xfd" + bytes(200), "compressed (zstd)"),
        "a zip file": (b"PK\x03\x04" + bytes(200), "compressed (zip)"),
        "a web page": (b"<!DOCTYPE html><title>404</title>", "not a tar file"),
    },
)
def tar_that_is_refused(folder, situation):
    content, says = situation
    (folder / "a.tar").write_bytes(content)
    refused(lambda: open_source(str(folder / "a.tar"), channels=1), ValueError, says=says)


@cases(
    8,
    {
        "one block of zeros at the end": (BARE + bytes(BLOCK), 6),
        "an end without padding": (BARE + bytes(2 * BLOCK), 6),
        "an end of two and a half blocks": (BARE + bytes(2 * BLOCK + 100), 6),
        "an end of a tape's record": (BARE + bytes(2**20), 6),
        "archives joined correctly, without an end between": (BARE + SIX, 12),
        "two members of one name": (tar("a.png", "a.png"), 2),
        "names that differ in case": (tar("a.PNG", "A.png", "a.Png"), 3),
        "names that lead outside": (tar("/a.png", "../../b.png", "c/../../../d.png"), 3),
        "a thousand folders in each other": (tar("d/" * 1000 + "a.png", form="pax"), 1),
        "names with line breaks and escape codes": (tar("a\nb.png", "\x1b[31mc.png"), 2),
        "times with fractions": (tar(form="pax", mtime=1.5), 6),
    },
)
def tar_that_is_read(folder, situation):
    content, number = situation
    (folder / "a.tar").write_bytes(content)
    source = open_source(str(folder / "a.tar"), channels=1)
    assert len(source) == number, source.description
    for k in range(number):
        assert (source.read(k) == 7).all()
        check_line(source.name(k)[:400])


@case(8, "a tar file of the size of a disk, nearly all of it a hole")
def sparse_tar(folder):
    (folder / "a.tar").write_bytes(BARE)
    os.truncate(folder / "a.tar", 2**40)
    started = time.monotonic()
    refused(lambda: open_source(str(folder / "a.tar"), channels=1), ValueError, says="bytes after the last member")
    assert time.monotonic() - started < SECONDS


@case(8, "hard and symbolic links in place of images are counted")
def links_in_tar(folder):
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.png").hardlink_to(folder / "a.png")
    (folder / "c.png").symlink_to("a.png")
    with tarfile.open(folder / "x.tar", "w") as archive:
        archive.add(folder, "photos", filter=lambda info: None if info.name.endswith(".tar") else info)
    assert "1 image, no labels, 2 links skipped" in open_source(str(folder / "x.tar"), channels=1).description


@cases(8, {"a folder": "shards", "a pattern": "shards/*.tar"})
def one_shard_of_three_is_cut(folder, spec):
    (folder / "shards").mkdir()
    for k in range(3):
        (folder / "shards" / f"{k}.tar").write_bytes(BARE if k == 1 else SIX)
    refused(lambda: open_source(str(folder / spec), channels=1), ValueError, says="1.tar: no end-of-archive marker")


@cases(8, {"append the end": BARE, "unpack all": SIX + SIX[: 2 * BLOCK * 3] + tar("7.png", "8.png")}, quick=False)
def the_repair_in_the_message_works(folder, content):
    path = folder / "a.tar"
    path.write_bytes(content)
    message = refused(lambda: open_source(str(path), channels=1), ValueError)
    if "truncate" in message:
        command = ["truncate", "-s", "+1024", str(path)]
        expected = 6
    else:
        command = ["tar", "--ignore-zeros", "-xf", str(path), "-C", str(folder)]
        expected = 8
    assert " ".join(command[:3]) in message
    if shutil.which(command[0]):
        subprocess.run(command, check=True)
        if expected == 8:
            path.unlink()
        assert len(open_source(str(path if expected == 6 else folder), channels=1)) == expected


@cases(8, {"pretrain": "pretrain", "inspect": "inspect"})
def a_command_on_a_cut_tar(folder, command):
    (folder / "a.tar").write_bytes(BARE)
    prmim(folder, command, *TINY, "--data", "a.tar", code=2, says="a.tar: no end-of-archive marker")
    assert not (folder / "runs").exists()


# --------------------------------------------------------------------------------------------------------------- images


def decoded(content, **options):
    """Decode an image in every way, within a time limit; return the results.

    An error must be one line.
    """
    started = time.monotonic()
    found = []
    for decode in (
        partial(decode_image, content),
        partial(decode_crop, content, (4, 4), lambda shape: (0, 0, *shape)),
    ):
        try:
            found.append(decode(channels=3, name="x", **options).shape)
        except UnreadableImageError as error:
            found.append(check_line(str(error)))
    assert time.monotonic() - started < SECONDS, f"{time.monotonic() - started:.1f} s"
    return found


def unreadable(content, says, **options):
    """Check that an image is refused, in time."""
    for message in decoded(content, **options):
        assert isinstance(message, str), f"expected an error, got an image of {message}"
        assert says in message, message


def readable(content, shape, **options):
    """Check that an image is decoded, in time."""
    assert decoded(content, **options) == [shape, (4, 4, 3)]


GREY = Image.new("L", (64, 64), 128)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
SCAN = b"\xff\xda"


def with_scans(content, number):
    """Repeat the last scan of a JPEG until there are this many."""
    last = content[content.rindex(SCAN) : -2]
    return content[:-2] + last * (number - content.count(SCAN)) + content[-2:]


def one_scan_each(content):
    """Return a one-scan JPEG with one scan per colour, which need not fit the pixels."""
    place = content.index(SCAN)
    scans = [SCAN + b"\x00\x08\x01" + bytes((k, 0)) + b"\x00\x3f\x00" + bytes(20) for k in (1, 2, 3)]
    return content[:place] + b"".join(scans) * 2000 + b"\xff\xd9"


PROGRESSIVE = encoded(GREY, "JPEG", progressive=True)
LARGE = encoded(Image.new("L", (4000, 4000), 128), "JPEG", progressive=True)
METADATA = b"\xff\xe5" + struct.pack(">H", 402) + SCAN * 200


@cases(
    9,
    {
        "101 scans": with_scans(PROGRESSIVE, 101),
        "10,000 scans": with_scans(PROGRESSIVE, 10_000),
        "5,000 scans of 16 megapixels": with_scans(LARGE, 5_000),
        "scans after metadata": PROGRESSIVE[:2] + METADATA + with_scans(PROGRESSIVE, 500)[2:],
        "scans of a colour photograph": with_scans(encoded(PHOTO, "JPEG", progressive=True), 1000),
        "six thousand scans of a JPEG that is not progressive": one_scan_each(encoded(PHOTO, "JPEG")),
    },
)
def too_many_scans(folder, content):
    unreadable(content, "scans, more than the limit of 100")


@cases(
    9,
    {
        "100 scans": with_scans(PROGRESSIVE, 100),
        "marks of scans in metadata": PROGRESSIVE[:2] + METADATA + PROGRESSIVE[2:],
        "a video after the end, as phones write": PROGRESSIVE + (SCAN + bytes(50)) * 500,
        "restart marks in every block": encoded(GREY, "JPEG", restart_marker_blocks=1),
        "a preview of many scans in the metadata": PROGRESSIVE[:2]
        + b"\xff\xe1"
        + struct.pack(">H", 2 + len(with_scans(PROGRESSIVE, 500)))
        + with_scans(PROGRESSIVE, 500)
        + PROGRESSIVE[2:],
    },
)
def few_scans(folder, content):
    readable(content, (64, 64, 3))


def chunk(kind, body):
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width, height, content=b""):
    """Return a PNG file of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def png_with(chunks):
    """Return a PNG file with more chunks after its header."""
    return PNG[:33] + chunks + PNG[33:]


def jpeg_with(segments):
    """Return a JPEG with more segments."""
    return PROGRESSIVE[:2] + segments + PROGRESSIVE[2:]


def tiff(*tags, without=(), data=b"", following=0, width=8, height=8):
    """Return a TIFF file: an uncompressed grey image, with more or other tags."""
    plain = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    plain += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height)]
    tags = sorted({tag[0]: tag for tag in (*plain, *tags) if tag[0] not in without}.values())
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following) + data


def many_strips(number):
    """Return a TIFF file of this many strips of one row."""
    start = 8 + 2 + 9 * 12 + 4
    places = struct.pack("<I", start) * number + struct.pack("<I", 8) * number
    return tiff((273, 4, number, start), (278, 4, 1, 1), (279, 4, number, start + 4 * number), data=places)


def bmp_of_runs(width, height, runs):
    """Return a compressed BMP file."""
    palette = b"".join(bytes((k, k, k, 0)) for k in range(256))
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + sizes + palette + runs


def gif_with(extension):
    """Return a GIF file with an extension before its image."""
    content = encoded(Image.new("P", (8, 8)), "GIF")
    place = 13 + (3 << ((content[10] & 7) + 1) if content[10] & 128 else 0)
    return content[:place] + extension + content[place:]


FRAMES = [Image.new("RGB", (4, 4), (k, k, k)) for k in range(250)]
ZEROS = zlib.compress(bytes(10**8))
"""A hundred kilobytes that become a hundred megabytes."""


@cases(
    9,
    {
        "PNG of 60,000 x 60,000": (png_of(60_000, 60_000), "more than max_pixels"),
        "PNG of 2 x 2,147,483,647": (png_of(2, 2**31 - 1), "more than "),
        "PNG one pixel above the limit": (png_of(18_966, 4718), "89,481,588 pixels, more than max_pixels 89,478,485"),
        "BMP of two thousand million pixels": (bmp_of_runs(2**16, 2**15, b"\0\1"), "more than max_pixels"),
        "TIFF of 60,000 x 60,000": (tiff(width=60_000, height=60_000), "more than max_pixels"),
        "TIFF of one tile of 60,000 x 60,000": (
            tiff((322, 3, 1, 60_000), (323, 3, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 64), without=(273, 278, 279)),
            "more than max_pixels",
        ),
        "GIF with a frame larger than its screen": (
            encoded(Image.new("P", (8, 8)), "GIF").replace(b"\x08\0\x08\0", b"\xff\xff\xff\xff"),
            "more than max_pixels",
        ),
        "PNG with a compressed text of 100 MB": (png_with(chunk(b"zTXt", b"a\0\0" + ZEROS)), "too large"),
        "PNG with a colour profile of 100 MB": (png_with(chunk(b"iCCP", b"a\0\0" + ZEROS)), "too large"),
        "PNG with 100 compressed texts": (
            png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 100),
            "Too much memory",
        ),
        "JPEG of 65,500 x 65,500 in a hundred bytes": (
            encoded(GREY, "JPEG").replace(b"\0\x40\0\x40", b"\xff\xdc\xff\xdc"),
            "more than max_pixels",
        ),
        "PNG whose pixels are missing": (png_of(9000, 9000), "truncated"),
    },
)
def bomb(folder, situation):
    unreadable(*situation)


@cases(
    9,
    {
        "PNG with 20,000 texts": (png_with(chunk(b"tEXt", b"a\0b") * 20_000), (8, 8, 3)),
        "PNG with 50,000 empty chunks of pixels": (png_with(chunk(b"IDAT", b"") * 50_000), (8, 8, 3)),
        "PNG whose pixels go on for 100 MB": (png_of(8, 8, ZEROS), (8, 8, 3)),
        "JPEG with 50,000 empty segments": (jpeg_with(b"\xff\xec\0\2" * 50_000), (64, 64, 3)),
        "JPEG with 200 pieces of EXIF": (
            jpeg_with((b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)) * 200),
            (64, 64, 3),
        ),
        "GIF with 50,000 comments": (gif_with(b"\x21\xfe\x01a\0" * 50_000), (8, 8, 3)),
        "GIF with a comment of 5 MB": (gif_with(b"\x21\xfe" + (b"\xff" + b"a" * 255) * 20_000 + b"\0"), (8, 8, 3)),
        "GIF of 250 frames": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (4, 4, 3)),
        "WebP of 250 frames": (
            encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True, method=0),
            (4, 4, 3),
        ),
        "TIFF of 250 pages": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), (4, 4, 3)),
        "TIFF whose pages form a circle": (tiff(following=8), (8, 8, 3)),
        "TIFF of 20,000 strips": (many_strips(20_000), (8, 8, 3)),
        "TIFF whose tags all claim the same megabyte": (
            tiff(*((1000 + k, 1, 10**6, 8) for k in range(5000)), data=bytes(10**6)),
            (8, 8, 3),
        ),
        "PNG whose EXIF tags all claim the same bytes": (
            png_with(chunk(b"eXIf", tiff(*((1000 + k, 1, 60_000, 8) for k in range(3000)), data=bytes(60_000)))),
            (8, 8, 3),
        ),
    },
)
def much_metadata(folder, situation):
    readable(*situation)


@cases(
    9,
    {
        "a row of runs": b"\0\0" * 1000 + b"\0\1",
        "a jump of 255 rows": b"\0\2\xff\xff\0\1",
        "no end": b"\1\1",
    },
)
def wide_bmp(folder, runs):
    decoded(bmp_of_runs(2**20, 1, runs))


@cases(9, {"a row of a million pixels": (2**20, 1), "a column of a million pixels": (1, 2**20)})
def extreme_ratio(folder, size):
    readable(encoded(Image.new("L", size), "PNG"), (size[1], size[0], 3))


@cases(9, {"a row of twenty million pixels": (20_000_000, 1), "a column of twenty million pixels": (1, 20_000_000)})
def too_long(folder, size):
    unreadable(png_of(*size), "more than the limit of 1,048,576 per side")


# -------------------------------------------------------------------------------------------------------------- folders


def images_below(folder):
    """Return the names of a folder's images, found in time and readable."""
    started = time.monotonic()
    source = open_source(str(folder), channels=1)
    found = [source.name(k) for k in range(len(source))]
    assert time.monotonic() - started < SECONDS
    return found


def put(path, content=PNG):
    """Write an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@case(9, "seven folders that all link to each other")
def seven_folders(folder):
    for a in range(7):
        put(folder / str(a) / "x.png")
        for b in range(7):
            (folder / str(a) / f"to-{b}").symlink_to(folder / str(b))
    assert images_below(folder) == [f"{a}/x.png" for a in range(7)]


@case(9, "thirty folders, each with two links to the next")
def two_links_to_the_next(folder):
    for k in range(30):
        put(folder / "all" / f"{k:02}" / "x.png")
        for name in "ab":
            (folder / "all" / f"{k:02}" / name).symlink_to(folder / "all" / f"{(k + 1) % 30:02}")
    (folder / "data").mkdir()
    (folder / "data" / "start").symlink_to(folder / "all" / "00")
    assert len(images_below(folder / "data")) == 30


@cases(
    9,
    {
        "to the folder itself": ".",
        "to the folder above": "..",
        "to the data": "../../data",
        "to the root of the data, by its full path": None,
        "through a link to itself": "loop",
    },
)
def a_link(folder, target):
    put(folder / "data" / "a" / "x.png")
    (folder / "data" / "a" / "loop").symlink_to(folder / "data" if target is None else target)
    assert images_below(folder / "data") == ["a/x.png"]


@case(9, "a link to a folder of the data does not rename a class")
def link_to_a_class(folder):
    put(folder / "dog" / "x.png")
    put(folder / "cat" / "y.png")
    (folder / "ant").symlink_to(folder / "dog")
    source = open_source(str(folder), channels=1)
    assert (list(source.records.files), source.class_names) == (["cat/y.png", "dog/x.png"], ("cat", "dog"))


@case(9, "a class that lies elsewhere")
def class_elsewhere(folder):
    put(folder / "elsewhere" / "x.png")
    put(folder / "data" / "cat" / "y.png")
    (folder / "data" / "dog").symlink_to(folder / "elsewhere")
    (folder / "data" / "wolf").symlink_to(folder / "elsewhere")
    assert images_below(folder / "data") == ["cat/y.png", "dog/x.png"]


@case(9, "names of one file: hard links and links are images of their own")
def names_of_one_file(folder):
    put(folder / "a.png")
    (folder / "b.png").hardlink_to(folder / "a.png")
    (folder / "c.png").symlink_to("a.png")
    assert images_below(folder) == ["a.png", "b.png", "c.png"]


@case(9, "folders a hundred deep")
def deep_folders(folder):
    put(folder.joinpath(*["d"] * 100, "x.png"))
    assert len(images_below(folder)) == 1


@case(9, "what is named like an image, but is none")
def named_like_images(folder):
    put(folder / "x.png" / "y.png")  # a folder
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        if len(str(folder)) < 80:
            server.bind(str(folder / "socket.png"))
        assert images_below(folder) == ["x.png/y.png"]


@case(9, "other files are counted")
def other_files(folder):
    put(folder / "a.png")
    put(folder / "b.heic")
    put(folder / "shard.tar", SIX)
    assert open_source(str(folder), channels=1).description.endswith(
        "1 image, no labels, 2 other files skipped (.heic 1, .tar 1)"
    )


# ------------------------------------------------------------------------------------------------------ limit of pixels


def write_photos(folder, number=24, large=1):
    """Write images of 8 x 8 pixels in two classes to `photos`.

    The last images have 100 x 100 pixels.
    """
    for k in range(number):
        size = (100, 100) if k >= number - large else (8, 8)
        put(folder / "photos" / f"{k * 2 // number}" / f"{k:02}.png", encoded(Image.new("L", size, k), "PNG"))
    return ("--data", "photos", "--holdout", "0", "--out", "run", "--max_pixels", "9999")


def check_summary(folder):
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["unreadable_images"] == {"1/23.png": "10,000 pixels, more than max_pixels 9,999"}


@case(9, "one of 24 images is too large: the run goes on, and its limit holds for the test images", quick=False)
def one_too_large(folder):
    prmim(folder, "pretrain", *TINY, *write_photos(folder), "--epochs", "2", says="1 of 24 images could not be read")
    check_summary(folder)
    assert "max_pixels: 9999" in (folder / "run" / "config.yaml").read_text()
    shutil.copytree(folder / "photos", folder / "test")
    for place in sorted((folder / "test").rglob("*.png")):  # files of equal name, size and time were trained on
        place.rename(place.with_name(f"test-{place.name}"))
    words = ("evaluate", "--run", "run", "--test_data", "test", "--eval_limit", "99")
    prmim(folder, *words, says="1 of 24 images could not be read")


@case(9, "one of 24 images is too large, with worker processes", quick=False)
def one_too_large_for_workers(folder):
    prmim_process(folder, "pretrain", *TINY, *write_photos(folder), "--epochs", "2", "--workers", "1")
    check_summary(folder)


@cases(9, {"two of 24": 2, "all": 24})
def too_many_too_large(folder, number):
    options = (*TINY, *write_photos(folder, large=number), "--epochs", "3")
    prmim(folder, "pretrain", *options, code=2, says="cannot be read so far")


@case(9, "inspect lists the images above the limit")
def inspect_lists(folder):
    prmim(folder, "inspect", *TINY, *write_photos(folder), says="1 of 24 headers checked: 1/23.png (10,000 pixels")


@case(9, "inspect lists the images above the limit in a tar file")
def inspect_lists_tar(folder):
    options = write_photos(folder)
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "photos", "photos")
    words = (*TINY, *options, "--data", "a.tar")
    prmim(folder, "inspect", *words, says="1 of 24 headers checked: a.tar/photos/1/23.png (10,000 pixels")


@cases(9, {"0": "0", "-1": "-1", "text": "many", "nan": "nan", "a fraction": "1.5"})
def wrong_limit(folder, value):
    write_tiny(folder)
    prmim(folder, "inspect", *TINY, "--max_pixels", value, code=2, says="max_pixels: expected a whole number")


@case(9, "a limit above that of Pillow")
def high_limit(folder):
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100
    try:
        readable(encoded(GREY, "PNG"), (64, 64, 3), max_pixels=4096)
    finally:
        Image.MAX_IMAGE_PIXELS = before


# ------------------------------------------------------------------------------------------------------------------ npz


def npz(number=3, **arrays):
    """Return the content of a `.npz` file."""
    file = io.BytesIO()
    np.savez_compressed(file, images=np.zeros((number, 8, 8), np.uint8), **arrays)
    return file.getvalue()


def stored(shape, claim):
    """Return a `.npz` file that claims another shape than it has."""
    file = io.BytesIO()
    np.save(file, np.zeros((3, 8, 8), np.uint8))
    content = file.getvalue().replace(shape + b", }".ljust(50), claim + b", }".ljust(50 + len(shape) - len(claim)))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("images.npy", content)
    return archive.getvalue()


def twice(name):
    """Return a `.npz` file with two arrays of one name."""
    file = io.BytesIO(npz(labels=np.arange(3)))
    with zipfile.ZipFile(file, "a") as archive:
        content = archive.read(f"{name}.npy")
        archive.NameToInfo.clear()  # otherwise it warns
        archive.writestr(f"{name}.npy", content)
    return file.getvalue()


@cases(
    9,
    {
        "two files in one": (npz() + npz(), "other data before its arrays"),
        "text before the archive": (b"text" + npz(), "other data before its arrays"),
        "two arrays of images": (twice("images"), "more than one array 'images'"),
        "two arrays of labels": (twice("labels"), "more than one array 'labels'"),
        "cut in the middle": (npz()[:200], "not a .npz file"),
        "cut at its end": (npz()[:-1], "not a .npz file"),
        "a name in upper case": (npz().replace(b"images.npy", b"Images.npy"), "no array 'images'"),
        "a claim of a terabyte": (stored(b"(3, 8, 8)", b"(1000000000, 32, 32)"), "which do not match"),
        "a claim of fewer images": (stored(b"(3, 8, 8)", b"(2, 8, 8)"), "which do not match"),
    },
)
def npz_that_is_refused(folder, situation):
    content, says = situation
    (folder / "a.npz").write_bytes(content)
    refused(lambda: open_source(str(folder / "a.npz"), channels=1), ValueError, says=says)

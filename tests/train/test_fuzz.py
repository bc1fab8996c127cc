"""Damaged and malicious files: every reader returns content or a one-line error.

Each test changes sound files, and gives what comes out to a reader. Anything but an answer or the documented error is
a failure, and so are seconds of thought and memory out of proportion. By default the examples are few and always the
same; ``HYPOTHESIS_PROFILE=search pytest tests/train/test_fuzz.py`` tries forty times as many, new ones each time.
"""

import datetime
import faulthandler
import io
import json
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from prmim_train.config.layers import parse_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.data import image_files
from prmim_train.data.image_files import UnreadableImageError, decode_crop, decode_image
from prmim_train.data.sources import ArraySource, open_source
from prmim_train.data.transforms import center_crop, random_crop_box

MAX_PIXELS = 2**20
MAX_SECONDS = 10.0  # for one example, on a busy machine
MAX_MEMORY = 400  # MiB that a test may add to the process

many = settings(max_examples=4 * settings.default.max_examples)


@pytest.fixture(autouse=True)
def bounds():
    """End tests that hang in C, and fail those that take too much memory.

    No exception reaches code in C.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = 300 if settings.default.max_examples < 100 else 3600
    faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MEMORY * 1024


@contextmanager
def expecting(*errors, start: str = ""):
    """Allow these errors, not subclasses, in one line that begins so, within a time."""
    started, said = time.monotonic(), None
    try:
        yield
    except errors as error:
        said = error
    assert time.monotonic() - started < MAX_SECONDS
    if said is not None:
        assert type(said) in errors, f"{type(said).__name__}, which is none of {errors}"
        assert str(said).startswith(start)
        assert "\n" not in str(said)
        assert len(str(said)) < 2000


# ------------------------------------------------------------------------------------------------------------ mutations

INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
]


@st.composite
def mutations(draw, seeds):
    """One of the seeds after a few changes.

    Bytes are overwritten, cut out, inserted or repeated, or the end is cut off.
    """
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        # Headers are at the beginning: half of the changes are made there.
        place = draw(st.integers(0, max(0, len(content) - 1)) | st.integers(0, min(64, len(content))))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["flip", "write", "write", "delete", "insert", "repeat", "cut"])):
            case "flip" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "write":
                new = draw(st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=8))
                content[place : place + len(new)] = new
            case "delete":
                del content[place : place + length]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                content[place:place] = content[place : place + length] * draw(st.integers(1, 20))
            case "cut":
                del content[place:]
    return bytes(content)


def test_mutations_change_things():
    changed = []

    @given(mutations([b"0123456789" * 10]))
    def note(content):
        changed.append(content)

    note()
    assert len(set(changed)) > 20


# --------------------------------------------------------------------------------------------------------------- images


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def image_seeds() -> dict[str, list[bytes]]:
    y, x = np.mgrid[0:16, 0:20]
    rgb = Image.fromarray(np.stack([x * 12, y * 15, x * y % 256], -1).astype(np.uint8))
    other, grey, palette = rgb.transpose(Image.Transpose.ROTATE_180), rgb.convert("L"), rgb.quantize(16)
    alpha = rgb.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    animation = {"save_all": True, "append_images": [other]}
    return {
        "JPEG": [
            encoded(rgb, "JPEG", exif=exif),
            encoded(rgb, "JPEG", progressive=True, dpi=(72, 72)),
            encoded(grey, "JPEG", restart_marker_blocks=1),
            encoded(rgb.convert("CMYK"), "JPEG"),
        ],
        "PNG": [
            encoded(rgb, "PNG", exif=exif),
            encoded(palette, "PNG", transparency=3),
            encoded(deep, "PNG"),
            encoded(alpha, "PNG", **animation),
            encoded(grey.convert("1"), "PNG"),
        ],
        "GIF": [encoded(palette, "GIF"), encoded(rgb, "GIF", **animation), encoded(palette, "GIF", interlace=0)],
        "TIFF": [
            encoded(rgb, "TIFF", exif=exif),
            encoded(rgb, "TIFF", compression="tiff_lzw"),
            encoded(rgb, "TIFF", compression="jpeg"),
            encoded(grey.convert("1"), "TIFF", compression="group4"),
            encoded(deep, "TIFF", compression="tiff_adobe_deflate"),
            encoded(rgb, "TIFF", big_tiff=True, **animation),
            encoded(rgb.convert("YCbCr"), "TIFF"),
        ],
        "WEBP": [
            encoded(rgb, "WEBP", quality=50, exif=exif),
            encoded(alpha, "WEBP", lossless=True),
            encoded(rgb, "WEBP", **animation),
        ],
        "BMP": [encoded(rgb, "BMP"), encoded(palette, "BMP"), encoded(grey.convert("1"), "BMP")],
    }


IMAGES = image_seeds()


def check_decoding(content: bytes, channels: int) -> None:
    with expecting(UnreadableImageError, start="x.jpg: "):
        pixels = decode_image(content, channels=channels, max_pixels=MAX_PIXELS, name="x.jpg")
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == channels
        assert 0 < pixels.size <= MAX_PIXELS * channels
    for size in ((2, 2), (9, 7)):  # the smaller one lets the decoder of JPEG reduce
        with expecting(UnreadableImageError, start="x.jpg: "):
            options = {"channels": channels, "max_pixels": MAX_PIXELS, "name": "x.jpg"}  # so few take little time
            crop = decode_crop(content, size, lambda shape: (0, 0, *shape), **options)
            assert crop.shape == (*size, channels)


@pytest.mark.parametrize("kind", IMAGES)
def test_the_seeds_are_sound(kind):
    for content in IMAGES[kind]:
        assert decode_image(content, channels=3).shape[2] == 3


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images(kind):
    image_files.ignore_pillow_warnings()

    @many
    @given(mutations(IMAGES[kind]), st.sampled_from([1, 3, 4]))
    def check(content, channels):
        check_decoding(content, channels)

    check()


def with_checksums(content: bytes) -> bytes:
    """Return a PNG file with valid checksums, so that its chunks are trusted."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        length = min(int.from_bytes(content[place : place + 4], "big"), len(content) - place - 12)
        body = content[place + 4 : place + 8 + length]
        parts.append(struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts)


def test_damaged_png_files_with_sound_checksums():
    image_files.ignore_pillow_warnings()
    for content in IMAGES["PNG"]:
        assert with_checksums(content) == content

    @many
    @given(mutations(IMAGES["PNG"]))
    def check(content):
        check_decoding(with_checksums(content), 3)

    check()


@many
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"])
)
def test_bytes_that_are_no_image(content, start):
    check_decoding(start + content, 3)


@many
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.sampled_from([(1, 100_000), (100_000, 1), (2, 70_000)]),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(0, 2**32 - 1),
)
def test_crops_of_any_shape(shape, size, channels, seed):
    image = np.full((*shape, channels), 200, np.uint8)
    source = ArraySource(image[None], "one image")
    with expecting():
        box = random_crop_box(shape, np.random.default_rng(seed))
        for crop in (center_crop(image, size), source.read_crop(0, size, lambda shape: box)):
            assert crop.shape == (*size, channels)
            assert (crop == 200).all()


# ----------------------------------------------------------------------------------------------------------------- npz


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


ARRAYS = {
    "images": np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5),
    "labels": np.array([0, 1, 2]),
    "names": np.array(["a", "b", "c"]),
}


def zipped(members: dict[str, bytes], compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def check_opening(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with expecting(ValueError):
        source = open_source(str(path), channels=1)
        assert len(source) > 0
        assert source.labels is None or len(source.labels) == len(source)
        for k in range(min(len(source), 5)):
            assert source.name(k).isprintable()
            with expecting(UnreadableImageError):
                assert source.read(k).shape[2] == 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_archives_of_arrays(tmp_path, compression):
    seed = zipped({name: npy(array) for name, array in ARRAYS.items()}, compression)

    @many
    @given(mutations([seed]))
    def check(content):
        check_opening(tmp_path / "a.npz", content)

    check()


@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_arrays_in_sound_archives(tmp_path, name):
    @many
    @given(mutations([npy(ARRAYS[name])]))
    def check(content):
        members = {key: npy(array) for key, array in ARRAYS.items()} | {name: content}
        check_opening(tmp_path / "a.npz", zipped(members, zipfile.ZIP_STORED))

    check()


SHAPES = st.lists(st.integers(-3, 6) | st.sampled_from([10**6, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30]), max_size=5)
DTYPES = st.sampled_from(
    ["|u1", "<u2", ">u2", "<i8", "<u8", "<f4", "|b1", "|O", "<U3", "<U0", "|V0", "|S7", "<M8[s]", "x"]
)


@many
@given(st.sampled_from(sorted(ARRAYS)), SHAPES, DTYPES, st.integers(0, 200))
def test_arrays_whose_headers_claim_anything(tmp_path_factory, name, shape, dtype, length):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(length)
    members = {key: npy(array) for key, array in ARRAYS.items()} | {name: content}
    check_opening(tmp_path_factory.getbasetemp() / "a.npz", zipped(members, zipfile.ZIP_DEFLATED))


# ----------------------------------------------------------------------------------------------------------------- tar


def tar_seeds() -> list[bytes]:
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            members = [
                ("train/cat/1.png", IMAGES["PNG"][2]),
                ("train/dog/2.gif", IMAGES["GIF"][0]),
                ("dog/3.cls", b"1"),
            ]
            members += [] if form == tarfile.USTAR_FORMAT else [("x" * 150 + "/größe.png", IMAGES["PNG"][2])]
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
                archive.addfile(info, io.BytesIO(content))
        seeds.append(file.getvalue())
    return seeds


TARS = tar_seeds()


def test_damaged_tar_files(tmp_path):
    @many
    @given(mutations(TARS))
    def check(content):
        check_opening(tmp_path / "a.tar", content)

    check()


@many
@given(
    st.sampled_from(range(len(TARS))),
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted),
    st.sampled_from(["cut", "cut within a block", "zeros instead", "zeros between", "doubled", "repeated"]),
)
def test_no_image_of_a_tar_file_is_lost_in_silence(tmp_path_factory, number, blocks, change):
    """Cut, repeated, or zeroed blocks: rejected, or as many images as before."""
    content = TARS[number]
    start, end = (512 * block for block in blocks)
    before, between, after = content[:start], content[start:end], content[end:]
    changed = {
        "cut": before,
        "cut within a block": before + between[:100],
        "zeros instead": before + bytes(len(between)) + after,
        "zeros between": before + bytes(len(between)) + between + after,
        "doubled": content + content,
        "repeated": before + content,
    }[change]
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    numbers = []
    for archive in (content, changed):
        path.write_bytes(archive)
        with expecting(ValueError, start="data: "):
            numbers.append(len(open_source(str(path), channels=3)))
    is_empty = not any(changed[start:])  # zeros from a header to the end cannot be told from the end
    assert len(numbers) == 1 or numbers[1] >= numbers[0] or (change == "zeros instead" and is_empty)


FIELDS = {
    "name": (0, 100),
    "size": (124, 136),
    "sum": (148, 156),
    "kind": (156, 157),
    "magic": (257, 265),
    "prefix": (345, 500),
}
VALUES = [
    b"",
    b"\0",
    b"77777777777\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"-1\0",
    b" 1 2 3",
    b"../../x.png\0",
    b"/etc/a.png\0",
]
VALUES += [
    b"L",
    b"K",
    b"x",
    b"g",
    b"S",
    b"5",
    b"2",
    b"D",
    b"ustar\x0000",
    b"ustar  \0",
    b"a/" * 50,
    b"00000001000\0",
    b"\n.png\0",
]


@many
@given(
    st.sampled_from(TARS),
    st.lists(
        st.tuples(
            st.integers(0, 20), st.sampled_from(sorted(FIELDS)), st.sampled_from(VALUES) | st.binary(max_size=12)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_tar_files_whose_headers_claim_anything(tmp_path_factory, content, changes):
    content = bytearray(content)
    for block, field, value in changes:
        place = block * 512 % len(content)
        start, end = FIELDS[field]
        content[place + start : place + start + len(value[: end - start])] = value[: end - start]
        if field != "sum":
            content[place + 148 : place + 156] = b" " * 8
            content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    folder = tmp_path_factory.getbasetemp() / "tar"
    folder.mkdir(exist_ok=True)
    check_opening(folder / "a.tar", bytes(content))
    assert [path.name for path in folder.iterdir()] == ["a.tar"]


@many
@given(
    st.lists(
        st.sampled_from([b"path=", b"size=", b"13 ", b"9 ", b"\n", b"a", b"=", b"1", b"-", b"\0", b" ", b"999999"])
    )
)
def test_tar_files_with_any_extended_headers(tmp_path_factory, parts):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind, content in (("x", b"x", b"".join(parts)), ("a.png", b"0", IMAGES["PNG"][2])):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            archive.addfile(info, io.BytesIO(content))
    check_opening(tmp_path_factory.getbasetemp() / "b.tar", file.getvalue())


# -------------------------------------------------------------------------------------------------------------- options

# fmt: off
TOKENS = [
    "epochs: ", "mean: ", "a", ": ", "\n", "\n  ", "\t", "- ", "[", "]", "{", "}", ", ", "? ", "| ", "> ", '"', "'",
    "&a ", "*a", "<<: ", "!!python/object/apply:os.system ", "!!python/name:os.system ", "!!python/object/new:dict ",
    "!!int ", "!!float ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!!null ", "!!bool ", "! ", "!x ", "%TAG ",
    "%YAML 9.9\n", "---\n", "...\n", "#", "1", "1.5", "1e400", "-.inf", ".nan", "0x", "0b_", "1_000", "1:99:99", "~",
    "null", "yes", "= ", "@", "`", "é", "2020-99-99", "2020-01-01T99:00:00", "\\", "\0", "\ud800", "\ufeff", "\u2028",
]
# fmt: on
YAML = st.lists(st.sampled_from(TOKENS) | st.text(max_size=5)).map("".join)


def check_options(text: str) -> None:
    with expecting(ValueError, start="config: "):
        options = parse_options(text, "f.yaml")
        assert isinstance(options, dict)
        assert all(isinstance(name, str) for name in options)
        assert plain(options), f"{options!r} is made of more than plain values"


def plain(value) -> bool:
    """Return whether a value is made of plain ones only; it may contain itself."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match value:
            case dict():
                waiting += [*value.keys(), *value.values()]
            case list() | tuple() | set():
                waiting += value
            case None:
                pass
            case _:
                if type(value) not in (bool, int, float, str, bytes, datetime.date, datetime.datetime):
                    return False
    return True


@many
@given(YAML)
def test_any_text_gives_options_or_one_error(text):
    check_options(text)


@many
@given(
    mutations([b"method: mae\nimage_size: [32, 64]\nmean: &m [0.5, 0.5, 0.5]\nstd: *m\nflip: no\nbetas: [0.9, 0.95]\n"])
)
def test_damaged_files_of_options(content):
    check_options(content.decode("latin-1"))


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        "{a: " * 5000,
        "a: 2020-99-99",
        "a: 2020-01-01T00:00:00+99:99",
        "a: !!timestamp x",
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "a: 0b_",
        "a: 0x_",
        "a: " + "1" * 5000,
    ],
)
def test_values_that_yaml_cannot_make(text):
    check_options(text)


def test_a_value_that_grows_without_end_is_not_shown_whole():
    """A billion laughs: each of a dozen lists holds the one before nine times.

    They would fill any memory.
    """
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 5)]
    with expecting(ValueError, TypeError):
        pretrain_config(**parse_options(f"epochs: [{', '.join(lists)}]", "f.yaml"))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{path}]",
        "!!python/object/new:os.mkdir [{path}]",
        "!!python/object/apply:subprocess.run [[mkdir, {path}]]",
        "!!python/name:os.mkdir {path}",
        "!!python/module:antigravity ''",
        "!!python/tuple [1, 2]",
        "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{path}]",
    ],
)
@pytest.mark.parametrize("place", ["epochs: {}", "{}: 1", "- {}", "{}", "epochs: [1, {}]"])
def test_tags_construct_nothing(tmp_path, tag, place):
    path = tmp_path / "made"
    with pytest.raises(ValueError, match=r"^config: "):
        parse_options(place.format(tag.format(path=path)), "f.yaml")
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small method of PyTorch, and the bytes of its file of weights."""
    import prmim_torch

    sizes = {"image_size": (8, 8), "patch_size": (4, 4), "channels": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
    method = prmim_torch.create_method("mae", **sizes, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    prmim_torch.save_weights(method, path)
    return method, path.read_bytes(), path


def check_weights(weights, content: bytes) -> None:
    """The file is read, or refused and nothing of it used."""
    import torch

    import prmim_torch

    method, _, path = weights
    path.write_bytes(content)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    try:
        with expecting(ValueError):
            prmim_torch.load_weights(method, path)
            return
        assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    finally:
        method.load_state_dict(before)


def test_sound_weights_are_read(weights):
    import prmim_torch

    method, content, path = weights
    path.write_bytes(content)
    prmim_torch.load_weights(method, path)
    with pytest.raises(FileNotFoundError):
        prmim_torch.load_weights(method, path.with_name("missing.safetensors"))


def test_damaged_weights(weights):
    @many
    @given(mutations([weights[1]]))
    def check(content):
        check_weights(weights, content)

    check()


KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "prmim_architecture", "extra"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([2**31, 2**63, 2**64, 1e400, 0.5, "F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "X"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def test_weights_whose_headers_claim_anything(weights):
    _, content, _ = weights
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    @many
    @given(st.data())
    def check(draws):
        changed = json.loads(json.dumps(header))
        for _ in range(draws.draw(st.integers(1, 3))):
            name = draws.draw(st.sampled_from(sorted(changed)))
            match draws.draw(st.sampled_from(["entry", "part", "part", "drop"])):
                case "entry":
                    changed[name] = draws.draw(JSON)
                case "part" if isinstance(changed[name], dict):
                    changed[name][draws.draw(KEYS)] = draws.draw(JSON | st.text(max_size=5))
                case "drop" if len(changed) > 1:
                    del changed[name]
        text = json.dumps(changed).encode()
        check_weights(weights, struct.pack("<Q", len(text)) + text + data)

    check()


def test_a_header_cannot_break_the_line(weights):
    _, content, _ = weights
    assert content.count(b'"dtype":"F32"') > 1
    check_weights(weights, content.replace(b'"dtype":"F32"', b'"dtype":"\\n1"', 1))


@pytest.mark.parametrize(
    "notes",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "NaN",
        '{"a": 1' + "0" * 5000 + "}",
    ],
    ids=["lists", "objects", "digits", "nan", "digits inside"],
)
def test_weights_whose_notes_are_hard_to_parse(weights, notes):
    """The architecture is JSON text inside JSON text.

    Only its reader parses it.
    """
    _, content, _ = weights
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["prmim_architecture"] = notes
    text = json.dumps(header).encode()
    check_weights(weights, struct.pack("<Q", len(text)) + text + content[8 + length :])

"""NumPy archives: content, and rejection before unpickling or allocation."""

import io
import os
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from prmim_train.config.axes import ThreeAxes
from prmim_train.data.formats import npz
from prmim_train.data.sources import open_source


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


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_npz_of_clips(tmp_path, channels):
    clips = np.random.default_rng(0).integers(0, 256, (5, 2, 6, 4, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=clips[..., 0] if channels == 1 else clips)
    source = open_source(str(tmp_path / "a.npz"), channels=channels, three_axes=ThreeAxes(2))
    assert (source.channels, source.three_axes.frames) == (channels, 2)
    assert source.description.endswith("5 images of 2 x 6 x 4 pixels, no labels")
    np.testing.assert_array_equal(source.read(3), clips[3])


def test_clips_that_do_not_fit_are_refused(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, images=np.zeros((5, 2, 6, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(N, height, width\) or .*, got \(5, 2, 6, 4, 3\)"):
        open_source(path, channels=3)
    np.savez(path, images=np.zeros((5, 6, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(N, frames, height, width\) or .*, got \(5, 6, 4\)"):
        open_source(path, channels=1, three_axes=ThreeAxes(2))
    with pytest.raises(ValueError, match=r"no images in .*: 1 other file \(\.npz 1\); expected names ending in"):
        open_source(str(tmp_path), channels=1, three_axes=ThreeAxes(2))


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "no array 'images' in .*, only x"),
        ({}, "no array 'images' in .*, only nothing"),
        ({"images": IMAGES.astype(float)}, "'images' of .*: expected uint8, uint16, int16, float32, got float64"),
        ({"images": IMAGES[0]}, r"'images' of .*: expected \(N, height, width\) or .*, got \(4, 4\)"),
        ({"images": IMAGES[:0]}, r"no images in .*: 'images' is \(0, 4, 4, 1\)"),
        ({"images": np.zeros((3, 4, 4, 3), np.uint8)}, r"channels: .* has 3 channels, got 1"),
        ({"images": IMAGES, "labels": np.zeros(4, int)}, r"'labels' of .*: expected \(3,\), one per image, got \(4,\)"),
        ({"images": IMAGES, "labels": np.zeros(3)}, "'labels' of .*: expected integers, got float64"),
        (
            {"images": IMAGES, "labels": np.array([0, -1, 2])},
            "'labels' of .*: expected classes from 0 to 1,048,575, got -1",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.array(["a", "b"])},
            "'names' of .*: expected a name for each class up to 2, got 2 names",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.arange(3)},
            "'names' of .*: expected a list of strings, got int64",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2**20])},
            "'labels' of .*: expected classes from 0 to 1,048,575, got 1048576",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2**63], np.uint64)},
            "'labels' of .*: expected classes from 0 to 1,048,575, got 9223372036854775808",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.full(3, "x" * 1001)},
            "'names' of .*: expected a list of strings, got <U1001",
        ),
        (
            {"images": IMAGES, "labels": np.array([0, 1, 2]), "names": np.array(["a", "b", None], object)},
            "array 'names' of .* cannot be read: contains Python objects",
        ),
        ({"images": np.array([{}, None, 3], object)}, "array 'images' of .* cannot be read: contains Python objects"),
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


# ------------------------------------------------------------------------------------------------------- ill-meant ones


def npy(shape: str, dtype: str = "|u1", content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """Assemble a ``.npy`` file from a header that need not fit its content."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + content


def archive(path, compression: int = zipfile.ZIP_STORED, **members: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def refusal(path, channels: int = 1) -> str:
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^data: ") as caught:
        open_source(str(path), channels=channels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(10**6, 10**5, 10**5)", "cannot be read: "),  # an expression, not a number
        ("(1000000, 100000, 100000)", "uint8 (1000000, 100000, 100000) takes 10,000,000,000,0"),
        ("(4611686018427387904, 4, 4)", "takes 73,786,976,294,838,206,"),  # wraps around to 0 in 64 bits
        ("(2, 4, 5)", "uint8 (2, 4, 5) takes "),  # more than there is
        ("(2, 4, 3)", "uint8 (2, 4, 3) takes "),  # less
        ("(-2, -4, 4)", "invalid shape (-2, -4, 4)"),
        ("2.0", "shape is not valid"),
        ("(" * 3000, "cannot be read: "),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_header_must_fit_the_content(tmp_path, shape, message, version):
    path = archive(tmp_path / "a.npz", images=npy(shape, content=bytes(32), version=version))
    assert message in refusal(path)


@pytest.mark.parametrize("dtype", ["|O", "O", "|V0", "|S0", "nonsense", "<M8[ns]"])
def test_strange_types_are_refused(tmp_path, dtype):
    assert "images" in refusal(archive(tmp_path / "a.npz", images=npy("(2, 4, 4)", dtype, bytes(32))))


def test_names_without_characters_cannot_be_without_number(tmp_path):
    """They take no bytes, so any number of them would fit."""
    path = archive(
        tmp_path / "a.npz",
        images=npy("(2, 4, 4)", content=bytes(32)),
        labels=npy("(2,)", content=bytes(2)),
        names=npy("(1000000000000,)", "<U0"),
    )
    assert "'names' of " in refusal(path)


def test_a_longer_header_than_numpy_allows_is_not_read(tmp_path):
    """It might unpack to gigabytes."""
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 50_000_000) + b" " * 50_000_000
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=content)
    assert path.stat().st_size < 100_000
    assert "header of 50,000,000 bytes, more than the limit of 10,000" in refusal(path)


def test_an_archive_cannot_claim_more_than_can_be_packed(tmp_path):
    """Directory and header agree on a size that the packed bytes cannot have."""
    header = npy("(1000, 1000, 1000)")
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=header)
    size = struct.pack("<I", len(header))
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", len(header) + 10**9)))
    assert "bytes, which do not match the " in refusal(path)


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["images", "labels", "names"])
def test_nothing_is_unpickled(tmp_path, key):
    arrays = {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([0]), "names": np.array(["a"])}
    arrays[key] = np.array([Bomb(tmp_path / "exploded")], object)
    np.savez(tmp_path / "a.npz", **arrays)
    assert f"array '{key}' of {tmp_path / 'a.npz'} cannot be read: contains Python objects" in refusal(
        tmp_path / "a.npz"
    )
    np.load(tmp_path / "a.npz", allow_pickle=True)[key]
    assert (tmp_path / "exploded").is_dir()  # it would have worked


def test_a_pickle_in_front_of_an_archive_is_not_loaded(tmp_path):
    """A zip file may begin with anything; here it must begin with an array.

    `numpy.load` would look at the beginning.
    """
    import pickle

    file = io.BytesIO()
    np.savez(file, images=np.zeros((1, 4, 4), np.uint8))
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")) + file.getvalue())
    assert refusal(tmp_path / "a.npz").endswith("a.npz has other data before its arrays: concatenated or damaged")
    assert not (tmp_path / "exploded").exists()


def test_of_two_archives_in_one_file_none_is_lost(tmp_path):
    for name, number in (("a", 3), ("b", 5)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((number, 4, 4), np.uint8))
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes() + (tmp_path / "b.npz").read_bytes())
    assert np.load(tmp_path / "c.npz")["images"].shape == (5, 4, 4)  # NumPy takes the last one
    assert refusal(tmp_path / "c.npz").endswith("c.npz has other data before its arrays: concatenated or damaged")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["images", "labels", "names"])
def test_of_two_arrays_of_one_name_none_is_lost(tmp_path, name):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 1]), names=np.array(["a", "b"]))
    with zipfile.ZipFile(path, "a") as more:
        more.writestr(f"{name}.npy", more.read(f"{name}.npy"))
    assert refusal(path).endswith(f"a.npz has more than one array '{name}'")


def test_an_array_must_fit_into_memory(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.npz", images=npy("(2, 4, 4)", content=bytes(32)))
    monkeypatch.setattr(npz, "physical_memory", lambda: 100)
    assert re.search(r"uint8 \(2, 4, 4\) takes \d+ bytes, more than the memory of 100$", refusal(path))


def test_an_encrypted_archive_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", images=npy("(2, 4, 4)", content=bytes(32)))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "is encrypted, password required" in refusal(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    assert "not a regular file" in refusal(tmp_path / "a.npz")


def test_names_cannot_do_things_to_a_terminal(tmp_path):
    np.savez(
        tmp_path / "a.npz", images=np.zeros((1, 4, 4), np.uint8), labels=np.array([0]), names=np.array(["a\x1b[31m"])
    )
    assert open_source(str(tmp_path / "a.npz"), channels=1).class_names == ("a\\x1b[31m",)

"""Tar files: content, labels, and rejected files.

Python's own tarfile writes them.
"""

import gzip
import io
import os
import pickle
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from prmim_train.config.training import SourceOptions
from prmim_train.data.formats.tar_shards import open_tars, tar_members
from prmim_train.data.sources import UnreadableImageError, open_source

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 5), value).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, **options):
    """Write a tar file of (name, content), or (name, content, changes of the header)."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content, *changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def photos(number: int = 6, folder: str = "train") -> list[tuple[str, bytes]]:
    """Images whose value is their number, of two classes in turn."""
    return [(f"{folder}/{'dog' if k % 2 else 'cat'}/{k}.png", picture(k)) for k in range(number)]


def values(source) -> list[int]:
    return [int(source.read(k)[0, 0, 0]) for k in range(len(source))]


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_read_where_they_lie(tmp_path, form):
    path = write_tar(tmp_path / "a.tar", [("train", b"", {"type": tarfile.DIRTYPE}), *photos()], format=FORMATS[form])
    source = open_source(str(path), channels=1)
    assert values(source) == [0, 1, 2, 3, 4, 5]  # in the order of the archive
    assert source.read(3).shape == (5, 4, 1)
    assert source.channels == 1
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert source.labels.dtype == np.int64
    assert source.description == f"tar file {path}: 6 images in 2 classes"
    assert source.name(3) == "a.tar/train/dog/3.png"


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_long_and_foreign_names(tmp_path, form):
    names = [f"{'x' * 150}/{'y' * 120}/a.png", "größe/猫/b.png", "plain/c.png"]
    members = [(name, picture(k)) for k, name in enumerate(names)]
    source = open_source(str(write_tar(tmp_path / "a.tar", members, format=FORMATS[form])), channels=1)
    assert [source.records.names[k] for k in range(3)] == names
    assert values(source) == [0, 1, 2]


def test_times_in_headers_of_gnu_are_no_part_of_the_name(tmp_path):
    """GNU tar writes them on request, where ustar has the first half of long names."""
    path = write_tar(tmp_path / "a.tar", photos(2), format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[345:369] = b"14567012345\x0014567012346\0"
    set_checksum(content, 0)
    path.write_bytes(content)
    source = open_source(str(path), channels=1)
    assert list(source.records.names) == ["train/cat/0.png", "train/dog/1.png"]
    assert values(source) == [0, 1]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.AREGTYPE])
def test_a_long_name_replaces_one_that_looks_like_a_folder(tmp_path, kind):
    name = "d" * 99 + "/a.png"  # of which a header holds all up to the slash
    path = write_tar(tmp_path / "a.tar", [(name, picture(3)), *photos(1)], format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    assert content[1024:1124] == name[:100].encode()
    content[1024 + 156 : 1024 + 157] = kind
    set_checksum(content, 1024)
    path.write_bytes(content)
    source = open_source(str(path), channels=1)
    assert list(source.records.names) == [name, "train/cat/0.png"]
    assert values(source) == [3, 0]


def test_long_names_split_in_two(tmp_path):
    name = f"{'x' * 120}/a.png"
    source = open_source(
        str(write_tar(tmp_path / "a.tar", [(name, picture(7))], format=tarfile.USTAR_FORMAT)), channels=1
    )
    assert source.records.names[0] == name
    assert values(source) == [7]


def test_times_with_fractions_come_with_extended_headers(tmp_path):
    members = [(name, content, {"mtime": 1.25}) for name, content in photos()]
    source = open_source(str(write_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)), channels=1)
    assert values(source) == [0, 1, 2, 3, 4, 5]


def test_global_headers_are_passed_over(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos(), format=tarfile.PAX_FORMAT, pax_headers={"comment": "of git"})
    assert values(open_source(str(path), channels=1)) == [0, 1, 2, 3, 4, 5]


def test_what_is_no_image_is_passed_over(tmp_path):
    """Links and devices too, whatever their names and the sizes in their headers."""
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    members = [("a/readme.txt", b"x" * 700), *photos(2), ("a/._0.png", b"Mac OS"), (".git/1.png", picture(9))]
    members += [(f"a/{k}.png", b"", {"type": kind, "linkname": "/etc/passwd"}) for k, kind in enumerate(kinds)]
    members += [("a/new.png", b"y" * 600, {"type": b"Z"}), *photos(4)[2:], ("a/UPPER.PNG", picture(4))]
    path = write_tar(tmp_path / "a.tar", members)
    content = bytearray(path.read_bytes())
    place = content.index(b"a/0.png\0")
    content[place + 124 : place + 136] = b"00000007777\0"
    set_checksum(content, place)
    path.write_bytes(content)
    assert values(open_source(str(path), channels=1)) == [0, 1, 2, 3, 4]


def set_checksum(content: bytearray, place: int) -> None:
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])


def test_sizes_above_8_gib_are_understood(tmp_path):
    """Of a member that is no image, in a file whose content is a hole."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("film.mov")
    info.size = 9 * 2**30
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(info.size, io.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo("a.png")
            info.size = len(picture(3))
            archive.offset = file.tell()
            archive.addfile(info, io.BytesIO(picture(3)))
    assert values(open_source(str(path), channels=1)) == [3]


def test_old_files_with_holes_are_passed_over(tmp_path):
    """GNU's sparse files: further header blocks are counted in no size."""
    path = write_tar(tmp_path / "a.tar", [("sparse.png", b"x" * 600, {"type": b"S"}), ("b.png", picture(5))])
    content = bytearray(path.read_bytes())
    content[482] = 1
    set_checksum(content, 0)
    more = bytearray(1024)
    more[504] = 1
    path.write_bytes(bytes(content[:512] + more + content[512:]))
    assert values(open_source(str(path), channels=1)) == [5]


def test_names_are_never_paths(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(99))
    tricks = ["../outside.png", "/../../etc/a.png", str(outside), "./a/../../b.png"]
    path = write_tar(tmp_path / "a.tar", [(name, picture(k)) for k, name in enumerate(tricks)])
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(path), channels=1)
    assert values(source) == [0, 1, 2, 3]  # what the archive holds, not what lies at the path
    assert sorted(tmp_path.rglob("*")) == before


def test_any_number_of_threads_may_read(tmp_path):
    source = open_source(str(write_tar(tmp_path / "a.tar", photos(200))), channels=1)
    barrier = threading.Barrier(8)

    def read(thread: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(thread).permutation(200)
        return all((source.read(k) == k).all() for k in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_source_goes_through_pickle(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(str(write_tar(tmp_path / "a.tar", photos())), channels=1)))
    assert values(source) == [0, 1, 2, 3, 4, 5]
    assert source.name(5) == "a.tar/train/dog/5.png"


def test_an_index_takes_little_memory(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"c/{k:08}.png", b"") for k in range(20_000)])
    tracemalloc.start()
    source = open_source(str(path), channels=1)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 20_000
    assert size / 20_000 < 80  # bytes an image


# -------------------------------------------------------------------------------------------------------------- labels


def labels(tmp_path, *members, **options):
    source = open_source(str(write_tar(tmp_path / "a.tar", members, **options)), channels=1)
    return None if source.labels is None else source.labels.tolist(), source.class_names, source.description


def test_classes_are_numbers_beside_the_images(tmp_path):
    members = []
    for k, number in enumerate([2, 0, 2, 1]):
        key = f"s{k:06}"
        members += [(f"{key}.jpg", picture(k)), (f"{key}.cls", b"%d\n" % number), (f"{key}.json", b"{}")]
    found, names, description = labels(tmp_path, *members)
    assert found == [2, 0, 2, 1]
    assert names == ("0", "1", "2")
    assert description.endswith("a.tar: 4 images in 3 classes, 4 other files skipped (.json 4)")


def test_numbers_may_stand_before_images_and_count_more_than_folders(tmp_path):
    members = [("x/1.cls", b"1"), ("x/1.png", picture(0)), ("y/1.png", picture(1)), ("y/1.cls", b"0")]
    assert labels(tmp_path, *members)[:2] == ([1, 0], ("0", "1"))


def test_all_images_of_a_sample_are_of_its_class(tmp_path):
    members = [("1.left.png", picture(0)), ("1.right.png", picture(1)), ("1.cls", b"3")]
    assert labels(tmp_path, *members)[0] == [3, 3]


def test_samples_of_the_same_name_in_two_shards_are_two(tmp_path):
    for shard, number in (("a", 0), ("b", 1)):
        write_tar(tmp_path / f"{shard}.tar", [("000.png", picture(number)), ("000.cls", b"%d" % number)])
    source = open_source(str(tmp_path), channels=1)
    assert source.labels is not None
    assert source.labels.tolist() == values(source) == [0, 1]


def test_without_a_number_for_every_image_there_are_no_labels(tmp_path):
    members = [("c/1.png", picture(0)), ("c/1.cls", b"1"), ("d/2.png", picture(1))]
    found, names, description = labels(tmp_path, *members)
    assert (found, names) == (None, None)
    assert description.endswith("a.tar: 2 images, no labels (1 image without .cls file)")


@pytest.mark.parametrize("content", [b"cat", b"", b"-1", b"1.5", b"1048576", b"1" * 100, b"\xff"])
def test_a_class_is_a_number(tmp_path, content):
    with pytest.raises(ValueError, match=r"data: the tar file .*: k\.cls: expected a class, from 0 to 1,048,575, got "):
        labels(tmp_path, ("k.png", picture(0)), ("k.cls", content))


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["cat", "dog"], [0, 1]),
        (["./cat", "./dog"], [0, 1]),
        (["/data/train/cat", "/data/train/dog/deeper"], [0, 1]),
        (["train/dog", "train/cat"], [1, 0]),
        (["cat", "cat"], None),  # one class says nothing
        (["train", "train/cat"], None),  # images beside the folders
        ([".", "cat"], None),
    ],
)
def test_classes_are_the_folders_where_images_part(tmp_path, folders, found):
    members = [(f"{folder}/{k}.png", picture(k)) for k, folder in enumerate(folders)]
    assert labels(tmp_path, *members)[0] == found


def test_classes_in_json_files(tmp_path):
    members = [
        ("0.jpg", picture(0)),
        ("0.json", b'{"label": 2}'),
        ("1.jpg", picture(1)),
        ("1.json", b'{"cls": 0, "label": 1}'),
    ]
    assert labels(tmp_path, *members)[:2] == ([2, 0], ("0", "1", "2"))
    named = [(name, content.replace(b"2", b'"dog"').replace(b"0,", b'"cat",')) for name, content in members]
    assert labels(tmp_path, *named)[:2] == ([1, 0], ("cat", "dog"))
    assert labels(tmp_path, *members, ("0.cls", b"1"), ("1.cls", b"1"))[0] == [1, 1]
    found, _, description = labels(tmp_path, *members[:3])
    assert found is None
    assert description.endswith("2 images, no labels (1 image without class in a .json file)")
    with pytest.raises(ValueError, match=r"0\.json: expected a class, from 0 to 1,048,575, got '-2'"):
        labels(tmp_path, members[0], ("0.json", b'{"label": -2}'))


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000, b"\xff", b'{"label": true}', b'{"label": [1]}', b"3"])
def test_json_files_without_classes_are_other_files(tmp_path, content):
    found, _, description = labels(tmp_path, ("0.jpg", picture(0)), ("0.json", content))
    assert found is None
    assert description.endswith("1 image, no labels, 1 other file skipped (.json 1)")


# -------------------------------------------------------------------------------------------------------------- samples


def named(tmp_path, names, image_key=None):
    """Return the names of the images among members, and the description."""
    path = write_tar(tmp_path / "a.tar", [(name, picture(k)) for k, name in enumerate(names)])
    source = open_source(str(path), channels=1, options=SourceOptions(image_key=image_key))
    return list(source.records.names), source.description


SAMPLE = ["s0.seg.png", "s0.jpg", "s0.png", "s1.jpg", "s1.seg.png", "s1.png"]


def test_a_sample_has_one_image(tmp_path):
    found, description = named(tmp_path, SAMPLE)
    assert found == ["s0.jpg", "s1.jpg"]
    assert description.endswith("2 images, no labels, 4 further images skipped (.png 2, .seg.png 2)")
    assert named(tmp_path, ["scan.001.png", "scan.002.png", "other.png", "a/scan.png"])[0] == [
        *("scan.001.png", "scan.002.png", "other.png", "a/scan.png"),
    ]


@pytest.mark.parametrize(
    ("image_key", "found"),
    [
        ("png", ["s0.png", "s1.png"]),
        (".SEG.png", ["s0.seg.png", "s1.seg.png"]),
        ("seg.png; png", ["s0.seg.png", "s1.seg.png"]),
        ("tiff;jpg", ["s0.jpg", "s1.jpg"]),
    ],
)
def test_the_image_of_a_sample_can_be_named(tmp_path, image_key, found):
    assert named(tmp_path, SAMPLE, image_key)[0] == found


def test_any_member_can_be_the_image_of_a_sample(tmp_path):
    assert named(tmp_path, ["s0.input", "s0.jpg", "s1.input"], "input")[0] == ["s0.input", "s1.input"]


def test_an_image_key_of_no_member_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^image_key: expected an extension of the images .*, got tif; 6 members \(\.jpg"
    ):
        named(tmp_path, SAMPLE, "tif")
    (tmp_path / "a.png").write_bytes(picture(0))
    for spec in ("digits", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^image_key: expected null, since .* tar file"):
            open_source(spec, channels=1, options=SourceOptions(image_key="jpg"))


def test_arrays_in_tar_files_are_images_where_there_are_no_others(tmp_path):
    file = io.BytesIO()
    np.save(file, np.full((4, 5, 2), 7, np.uint8))
    members = [("0.npy", file.getvalue()), ("1.npy", file.getvalue())]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)), channels=2)
    assert values(source) == [7, 7]
    with pytest.raises(ValueError, match=r"^channels: a\.tar/0\.npy has 2 channels, got 3$"):
        open_source(str(tmp_path / "a.tar"), channels=3)
    write_tar(tmp_path / "b.tar", [*members, ("0.jpg", picture(3))])
    assert values(open_source(str(tmp_path / "b.tar"), channels=1)) == [3]


def test_a_folder_of_compressed_shards_says_so(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    assert "1 other file (.tar.gz 1); expected" in refusal(tmp_path)
    assert refusal(tmp_path).endswith("; decompress tar files")


# --------------------------------------------------------------------------------------------------------- many shards


@pytest.fixture
def shards(tmp_path):
    """Three shards of two images each, and an annex that holds one."""
    for k in range(3):
        write_tar(tmp_path / f"train-{k:03}.tar", photos(6)[2 * k : 2 * k + 2])
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "val-000.tar", [("train/cat/6.png", picture(6))])
    return tmp_path


def test_a_folder_of_shards(shards):
    (shards / "readme.md").write_text("tar files")
    source = open_source(str(shards), channels=1)
    assert sorted(values(source)) == [0, 1, 2, 3, 4, 5, 6]
    assert source.description == f"4 tar files in {shards}: 7 images in 2 classes, 1 other file skipped (.md 1)"
    assert source.name(0) == "val-000.tar/train/cat/6.png"


def test_images_in_a_folder_come_before_tar_files(shards):
    (shards / "a.png").write_bytes(picture(0))
    assert (
        open_source(str(shards), channels=1).description
        == f"folder {shards}: 1 image, no labels, 4 other files skipped (.tar 4)"
    )


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("train-*.tar", [0, 1, 2, 3, 4, 5]),
        ("train-00[12].tar", [2, 3, 4, 5]),
        ("train-???.tar", [0, 1, 2, 3, 4, 5]),
        ("*/val*.tar", [6]),
        ("**/*-000.tar", [6, 0, 1]),
    ],
)
def test_a_pattern_of_shards(shards, pattern, found):
    assert values(open_source(str(shards / pattern), channels=1)) == found


def test_a_name_is_no_pattern_where_it_exists(tmp_path):
    write_tar(tmp_path / "a[1].tar", [("a.png", picture(1))])
    write_tar(tmp_path / "a1.tar", [("a.png", picture(2))])
    assert values(open_source(str(tmp_path / "a[1].tar"), channels=1)) == [1]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("train-{000..002}.tar", [0, 1, 2, 3, 4, 5]),
        ("{more/val-000,train-002}.tar", [6, 4, 5]),
        ("train-{002,*}.tar", None),
    ],
)
def test_braces_are_expanded(shards, pattern, found):
    assert values(open_source(str(shards / pattern), channels=1)) == (found or [0, 1, 2, 3, 4, 5])


def test_shards_that_are_missing_are_named(shards):
    with pytest.raises(
        FileNotFoundError, match=r"^data: 97 of 100 files of .*\.tar are missing: .*train-003\.tar, .*\.\.\."
    ):
        open_source(str(shards / "train-{000..099}.tar"), channels=1)
    with pytest.raises(ValueError, match=r"^data: expected at most 1,048,576 names, got"):
        open_source(str(shards / "train-{0..99999999}.tar"), channels=1)


# ------------------------------------------------------------------------------------------------------------- refused


def refusal(path, channels: int = 1) -> str:
    with pytest.raises(ValueError, match=r"^data: ") as caught:
        open_source(str(path), channels=channels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_compressed_files_are_refused(tmp_path, mode, name, ending):
    with tarfile.open(tmp_path / f"a.{ending}", mode) as archive:
        info = tarfile.TarInfo("a.png")
        archive.addfile(info)
    assert refusal(tmp_path / f"a.{ending}") == (
        f"data: the tar file {tmp_path / f'a.{ending}'}: compressed ({name}), expected a plain tar file, which allows "
        "random access; decompress it first (compression hardly shrinks images)"
    )


@pytest.mark.parametrize("content", [b"hello" * 1000, b"x", b"\x00" * 100, bytes(range(256)) * 8])
def test_what_is_no_tar_file_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert refusal(tmp_path / "a.tar") == f"data: the tar file {tmp_path / 'a.tar'}: not a tar file"


@pytest.mark.parametrize("members", [[], [("a.txt", b"text")]])
def test_without_images_there_is_nothing_to_train_on(tmp_path, members):
    write_tar(tmp_path / "a.tar", members)
    assert refusal(tmp_path / "a.tar").startswith(f"data: no images in tar file {tmp_path / 'a.tar'}: expected members")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.tar").touch()
    assert refusal(tmp_path / "a.tar").endswith("a.tar: empty file")


@pytest.mark.parametrize("cut", [1, 400, 513, 700, 1024])
def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path, cut):
    """As an interrupted download leaves it: within content, within a header."""
    path = write_tar(tmp_path / "a.tar", [(f"{k}.png", picture(k) * 20) for k in range(9)])
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: len(content) - cut])
    assert "truncated" in refusal(path)


def members_only(path) -> bytes:
    """Return a tar file without its end-of-archive marker, which is zeros."""
    content = path.read_bytes()
    return content[: -(-len(content.rstrip(b"\0")) // 512) * 512]


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_without_an_end_an_archive_is_refused(tmp_path, cut):
    """A download interrupted between two members, or in the padding of one."""
    path = write_tar(tmp_path / "a.tar", photos())
    content = members_only(path)
    path.write_bytes(content[: len(content) - cut])
    assert refusal(path) == (
        f"data: the tar file {path}: no end-of-archive marker, so members may be missing: copy the file again, or, if "
        "it is complete, append the marker: truncate -s +1024 FILE"
    )
    with path.open("ab") as file:  # as that command does
        file.truncate(path.stat().st_size + 1024)
    assert values(open_source(str(path), channels=1)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [512, 1000, 1024, 5000, 2**20])
def test_the_end_may_be_short_or_long(tmp_path, number):
    path = write_tar(tmp_path / "a.tar", photos())
    path.write_bytes(members_only(path) + bytes(number))
    assert values(open_source(str(path), channels=1)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("zeros", [512, 1024, 10_240])
def test_an_archive_after_the_end_is_not_lost(tmp_path, zeros):
    """Python's tarfile would read the first archive only, as GNU tar does."""
    path = write_tar(tmp_path / "a.tar", photos())
    content = members_only(path)
    path.write_bytes(content + bytes(zeros) + content + bytes(1024))
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 6
    assert refusal(path) == (
        f"data: the tar file {path}: data at byte {len(content) + zeros:,}, after the end-of-archive marker at byte "
        f"{len(content):,}: concatenated or damaged; unpack with tar --ignore-zeros -xf FILE, check the number of "
        "images, and pack again"
    )


def test_zeros_in_the_middle_are_not_the_end(tmp_path):
    """As a lost sector leaves them, in place of a header or between two members."""
    path = write_tar(tmp_path / "a.tar", photos())
    content = path.read_bytes()
    place = content.index(b"train/dog/3.png")
    for damaged in (
        content[:place] + bytes(512) + content[place + 512 :],
        content[:place] + bytes(512) + content[place:],
    ):
        path.write_bytes(damaged)
        assert f"after the end-of-archive marker at byte {place:,}: concatenated or damaged" in refusal(path)


def test_the_last_byte_counts(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos())
    path.write_bytes(path.read_bytes() + bytes(9000) + b"x")
    assert f"data at byte {path.stat().st_size - 1:,}, after" in refusal(path)


@pytest.mark.parametrize("size", [2**21, 2**40])
def test_a_long_end_is_a_download_that_is_not_finished(tmp_path, size):
    """A file that was allocated but not completely written: the rest is zeros.

    It may be as long as a disk.
    """
    path = write_tar(tmp_path / "a.tar", photos())
    end = size - len(members_only(path))
    os.truncate(path, size)  # takes no room on the disk
    assert refusal(path) == (
        f"data: the tar file {path}: {end:,} bytes after the last member, more than 1,048,576: incomplete or damaged; "
        "copy the file again"
    )


def test_links_in_place_of_images_are_counted(tmp_path):
    """Tar writes them for the second name of a file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.png").write_bytes(picture(k))
        (folder / f"{k}-again.png").hardlink_to(folder / f"{k}.png")
    (folder / "link.png").symlink_to("0.png")
    (folder / "link.txt").symlink_to("0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, "photos")
    source = open_source(str(tmp_path / "a.tar"), channels=1)
    assert (
        source.description
        == f"tar file {tmp_path / 'a.tar'}: 3 images, no labels, 4 links skipped, 1 other file skipped (.txt 1)"
    )


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    """Python's tarfile would stop there silently, and lose half of the images."""
    path = write_tar(tmp_path / "a.tar", photos())
    content = bytearray(path.read_bytes())
    place = content.index(b"train/dog/3.png")
    content[place + 3] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 3
    assert refusal(path) == f"data: the tar file {path}: damaged header at byte {place:,}"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (b"77777777777\0", "truncated or damaged: the member at byte 1,024 would end at byte 8,589,936,127 of 10,240"),
        (b"\x80" + b"\xff" * 11, "truncated or damaged: the member at byte 1,024 would end at byte 309,48"),
        (
            b"\xff" * 12,
            "damaged header at byte 1,024",
        ),  # a negative size, which sends careless readers round in circles
        (b"-0000000001\0", "damaged header at byte 1,024"),
        (b"0x000000010\0", "damaged header at byte 1,024"),
        (b"0_000000010\0", "damaged header at byte 1,024"),
    ],
)
def test_absurd_sizes_are_refused(tmp_path, field, message):
    path = write_tar(tmp_path / "a.tar", photos(2))
    content = bytearray(path.read_bytes())
    content[1024 + 124 : 1024 + 136] = field
    set_checksum(content, 1024)
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    "record",
    [
        b"9 path=ab",  # its length runs into the padding
        b"999 path=a\n",
        b"0 path=a\n",
        b"-5 path=a\n",
        b"path=a\n",
        b"10 pathab\n",
        b"13 size=-100\n",
        b"13 size=1e10\n",
        b"9999999999999999999 size=1\n",
        bytes(20),
    ],
)
def test_damaged_extended_headers_are_refused(tmp_path, record):
    path = write_tar(tmp_path / "a.tar", [("x", record, {"type": b"x"}), *photos(2)], format=tarfile.USTAR_FORMAT)
    assert "damaged header at byte 512" in refusal(path)


def test_a_long_name_of_zeros_is_damage(tmp_path):
    """Its member would get the first hundred characters only, and be no image."""
    path = write_tar(tmp_path / "a.tar", [("x" * 150 + ".png", picture(0)), *photos(2)], format=tarfile.GNU_FORMAT)
    content = path.read_bytes()
    path.write_bytes(content[:512] + bytes(512) + content[1024:])
    assert "damaged header at byte 512" in refusal(path)


def test_a_size_in_an_extended_header_counts(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("x", b"15 size=100000\n", {"type": b"x"}), *photos(2)], format=tarfile.USTAR_FORMAT
    )
    assert "the member at byte 1,024 would end at byte 101,536" in refusal(path)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_notes_as_large_as_images_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [("x", bytes(2**21), {"type": kind})], format=tarfile.USTAR_FORMAT)
    assert "damaged: a long name or pax header of 2,097,152 bytes at byte 512, more than 1,048,576" in refusal(path)


def test_many_records_take_no_longer_each(tmp_path):
    """A megabyte of the shortest ones: two hundred thousand."""
    path = write_tar(tmp_path / "a.tar", [("x", b"5 a=\n" * 200_000, {"type": b"x"}), *photos(2)])
    assert values(open_source(str(path), channels=1)) == [0, 1]


def test_other_files_are_no_sources(tmp_path):
    (tmp_path / "a.tar.txt").touch()
    for spec in ("a.tar.txt", "*.txt"):
        message = refusal(tmp_path / spec)
        assert message.startswith("data: expected a folder of images, .tar or .parquet files, ")
        assert message.endswith(f', or "digits", got {tmp_path}/a.tar.txt')


def test_images_in_tar_files_have_1_3_or_4_channels(tmp_path):
    with pytest.raises(ValueError, match="channels: image files give 1"):
        open_source(str(write_tar(tmp_path / "a.tar", photos())), channels=7)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    assert "a.tar: not a regular file" in refusal(tmp_path / "a.tar")


# ------------------------------------------------------------------------------------------------------ under the run


def test_an_unreadable_image_is_named_with_its_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x\ny/a.png", b"no image"), ("b/b.png", b"")])
    source = open_source(str(path), channels=1)
    with pytest.raises(UnreadableImageError, match=r"^a\.tar/x\\ny/a\.png: not one of JPEG"):
        source.read(0)
    with pytest.raises(UnreadableImageError, match=r"^a\.tar/b/b\.png: empty file$"):
        source.read(1)


def test_an_archive_that_vanishes_or_changes_is_not_taken_for_the_old_one(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos())
    source = open_source(str(path), channels=1)
    write_tar(path, photos()[::-1])
    with pytest.raises(
        UnreadableImageError, match=r"a\.tar/train/cat/0\.png: its tar file: changed since it was opened"
    ):
        source.read(0)
    with pytest.raises(UnreadableImageError, match="its tar file: changed since it was opened"):
        source.header(0)
    path.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="its tar file: changed since it was opened"):
        source.read(0)
    path.unlink()
    with pytest.raises(UnreadableImageError, match="its tar file: file not found"):
        source.read(0)
    write_tar(path, photos() + photos(2, "val"))  # what was added at the end does not hurt
    assert values(source) == [0, 1, 2, 3, 4, 5]


def test_a_huge_image_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.webp")
    info.size = 2**30
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(2**30 + 512 + 1024)
    source = open_source(str(path), channels=1)
    for read in (source.read, source.header):
        with pytest.raises(UnreadableImageError, match="bytes, more than the limit of 536,870,912"):
            read(0)


def test_the_index_agrees_with_tarfile(tmp_path):
    """On a mixed archive: every plain file, its offset, and its size."""
    rng = np.random.default_rng(0)
    members = [
        (f"{'d' * int(rng.integers(1, 130))}/{k}.bin", rng.bytes(int(rng.integers(0, 3000)))) for k in range(100)
    ]
    for form in ("gnu", "pax"):
        path = write_tar(tmp_path / f"{form}.tar", members, format=FORMATS[form])
        with tarfile.open(path) as archive:
            expected = [(info.name, info.offset_data, info.size) for info in archive]
        with path.open("rb", buffering=0) as file:
            assert [member[:3] for member in tar_members(file)] == expected


def test_gzip_is_told_apart_from_a_tar_file(tmp_path):
    path = write_tar(tmp_path / "a.tar", photos())
    (tmp_path / "b.tar").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"compressed \(gzip\)"):
        open_tars([tmp_path / "b.tar"])

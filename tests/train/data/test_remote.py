"""Remote data, from local web and S3 servers: as from disk, despite faults."""

import errno
import functools
import io
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from benchmarks.servers import RangeHandler, s3_server, web_server
from prmim_train.config.training import SourceOptions
from prmim_train.data import storage
from prmim_train.data.batches import train_batches
from prmim_train.data.cache import open_cache
from prmim_train.data.formats.tar_shards import tar_members
from prmim_train.data.sources import UnreadableImageError, open_source
from prmim_train.pretrain import pretrain
from prmim_train.run.directory import RunDirectory

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NUM_IMAGES = 24


def write_tar(path: Path, numbers: range, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for k in numbers:
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 12), np.uint8)).save(file, "PNG")
            for name, content in ((f"{k:03}.png", file.getvalue()), (f"{k:03}.cls", str(k % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, tar: Path) -> None:
    """Write the images of a tar file, in row groups of five."""
    with tarfile.open(tar) as archive:
        contents = [archive.extractfile(member).read() for member in archive]
    columns = {"image": contents[::2], "label": [int(label) for label in contents[1::2]]}
    pq.write_table(pa.table(columns), path, row_group_size=5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folder with two tar files and two parquet files, which the servers serve."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_tar(folder / f"a-{number}.tar", range(12 * number, 12 + 12 * number), seed=number)
        write_parquet(folder / f"t-{number}.parquet", folder / f"a-{number}.tar")
    return folder


class Web:
    """A web server whose answers a test can change."""

    def __init__(self, folder):
        web = self
        self.requests = []  # method and range of each request
        self.answer = lambda handler: False

        class Handler(RangeHandler):
            def fault(self):
                web.requests.append((self.command, self.headers.get("Range")))
                return web.answer(self)

        self.server = web_server(folder, Handler)
        self.url = self.server.__enter__()

    @property
    def ranges(self):
        return [requested for method, requested in self.requests if method == "GET"]


@pytest.fixture
def web(shards, monkeypatch):
    monkeypatch.setattr(storage, "_DELAYS", (0.001, 0.001, 0.001))
    server = Web(shards)
    yield server
    server.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def s3(shards):
    with s3_server():
        storage._file_system.cache_clear()
        system = storage._file_system("s3")
        system.mkdir("bucket")
        for path in shards.iterdir():
            system.pipe(f"bucket/{path.name}", path.read_bytes())
        yield "s3://bucket"
    storage._file_system.cache_clear()


def options(tmp_path, **changes):
    return SourceOptions(**{"cache": str(tmp_path / "cache"), **changes})


def opened(spec, found):
    return open_source(spec, channels=1, options=found)


def assert_same(source, expected):
    assert [source.name(k) for k in range(len(source))] == [expected.name(k) for k in range(len(expected))]
    np.testing.assert_array_equal(source.labels, expected.labels)
    for found, known in zip(source.identities(), expected.identities(), strict=True):
        np.testing.assert_array_equal(found, known)
    for k in range(len(source)):
        np.testing.assert_array_equal(source.read(k), expected.read(k))
        assert source.header(k) == expected.header(k)


# ----------------------------------------------------------------------------------------------- the same as from disk


FILES = ["a-{0..1}.tar", "t-{0..1}.parquet"]


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("cached", [True, False])
def test_files_of_a_web_server(web, shards, tmp_path, files, cached):
    found = options(tmp_path, **({} if cached else {"cache": None}))
    source = opened(f"{web.url}/{files}", found)
    assert_same(source, opened(str(shards / files), found))
    assert all(web.ranges)
    assert (tmp_path / "cache").exists() == cached


@pytest.mark.parametrize("files", [*FILES, "a-*.tar", "t-?.parquet"])
def test_files_of_an_s3_server(s3, shards, tmp_path, files):
    assert_same(opened(f"{s3}/{files}", options(tmp_path)), opened(str(shards / files), SourceOptions()))


def test_descriptions_name_the_address(web, s3, tmp_path):
    found = options(tmp_path)
    assert opened(f"{s3}/a-1.tar", found).description == "tar file s3://bucket/a-1.tar: 12 images in 3 classes"
    assert opened(f"{web.url}/a-{{0..1}}.tar", found).description == f"2 tar files in {web.url}: 24 images in 3 classes"
    table = opened(f"{web.url}/t-0.parquet?secret", found)
    assert table.description == f"1 file {web.url}/t-0.parquet: 12 images in 3 classes, column image"


def test_words_of_a_common_folder_are_no_split(shards, s3, tmp_path):
    """Neither are those of a host, a bucket or a query."""
    folder = tmp_path / "train-sets"
    folder.mkdir()
    system = storage._file_system("s3")
    system.mkdir(folder.name)
    for source, split in (("t-0", "train"), ("t-1", "validation")):
        (folder / f"{split}-0.parquet").write_bytes((shards / f"{source}.parquet").read_bytes())
        system.pipe(f"{folder.name}/{split}-0.parquet", (shards / f"{source}.parquet").read_bytes())
    with web_server(tmp_path) as url:
        for store, query in ((url, "?key=a-test"), ("s3:/", "")):
            spec = f"{store}/{folder.name}/{{train,validation}}-0.parquet{query}"
            for split, name in ((None, "t-0"), ("train", "t-0"), ("validation", "t-1")):
                source = opened(spec, options(tmp_path, cache=None, split=split))
                assert len(source) == 12
                np.testing.assert_array_equal(source.read(0), opened(str(shards / f"{name}.parquet"), None).read(0))
            test = open_source(spec, channels=1, options=options(tmp_path), for_test=True)
            assert test.description.endswith("12 images in 3 classes, column image, split validation")


@pytest.mark.parametrize("files", FILES)
def test_a_second_start_requests_no_content(web, tmp_path, files):
    spec = f"{web.url}/{files}"
    first = opened(spec, options(tmp_path))
    for turn in range(2):
        web.requests.clear()
        assert_same(opened(spec, options(tmp_path)), first)
        assert [method for method, _ in web.requests] == ["HEAD"] * 2
        if turn == 0:  # the handles of another process
            storage._handle.cache_clear()


def test_the_index_stays_when_the_content_is_deleted(web, shards, tmp_path):
    opened(f"{web.url}/a-0.tar", options(tmp_path))
    for block in (tmp_path / "cache").glob("??/*"):
        if not block.name.endswith(".pinned"):
            block.unlink()
    web.requests.clear()
    source = opened(f"{web.url}/a-0.tar", options(tmp_path))
    assert_same(source, open_source(str(shards / "a-0.tar"), channels=1))
    assert web.ranges == [f"bytes=0-{(shards / 'a-0.tar').stat().st_size - 1}"]  # for the header of an image


def test_few_requests_index_many_members(web, shards, tmp_path):
    opened(f"{web.url}/a-0.tar", options(tmp_path, cache=None))
    size = (shards / "a-0.tar").stat().st_size
    # Whether ranges are served, the index, and the first few headers of images.
    assert web.ranges[:2] == [f"bytes={size - 1}-{size - 1}", f"bytes=0-{size - 1}"]


def test_large_members_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_AHEAD", 2000)
    monkeypatch.setattr(storage, "_BLOCK", 1000)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k in range(3):
            info = tarfile.TarInfo(f"{k}.npy")
            info.size = 10_000
            archive.addfile(info, io.BytesIO(bytes(10_000)))
    server = Web(tmp_path)
    try:
        [address] = storage.find_addresses(f"{server.url}/a.tar", None)
        [file] = storage.open_each([address], lambda file: list(tar_members(file)))
        assert [member.name for member in tar_members(file)] == ["0.npy", "1.npy", "2.npy"]
        starts = [int(requested.partition("=")[2].partition("-")[0]) for requested in server.ranges[1:4]]
        assert starts == [0, 10_752, 21_504]
    finally:
        server.server.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------------------------- refused


def refuse(status):
    def answer(handler):
        handler.refuse(HTTPStatus(status))
        return True

    return answer


def ignore_ranges(handler):
    del handler.headers["Range"]
    return False


def withhold_the_size(handler):
    handler.send_response(HTTPStatus.OK)
    handler.send_header("Connection", "close")
    handler.end_headers()
    return True


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (refuse(403), PermissionError, r"URL: access denied \(403\)"),
        (refuse(404), FileNotFoundError, r"nothing at URL"),
        (refuse(418), OSError, r"URL: the server answers 418"),
        (refuse(503), ConnectionError, r"URL: no answer after 4 attempts \(503,.*\)"),
        (ignore_ranges, ValueError, r"the tar file URL: the server supports no range requests"),
        (withhold_the_size, ValueError, r"URL: the server does not report the size of the file"),
    ],
    ids=["403", "404", "418", "503", "no ranges", "no size"],
)
def test_what_a_server_refuses_is_one_line(web, tmp_path, answer, kind, message):
    web.answer = answer
    with pytest.raises(kind, match=f"^data: {message.replace('URL', web.url + '/a-0.tar')}$"):
        opened(f"{web.url}/a-0.tar?signature=secret", options(tmp_path))


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("ftp://host/a.tar", ValueError, "expected an address that begins with .*s3://, gs://, got ftp://host/a.tar"),
        ("https://", ValueError, "expected an address that begins with .*, got https://"),
        ("http://host/*.tar", ValueError, "web servers do not list files: expected .*, got http://host/[*].tar"),
        ("http://127.0.0.1:1/a", ConnectionError, "http://127.0.0.1:1/a: no answer after 4 attempts .*failed.*"),
        ("WEB/{a-0,b,c}.tar", FileNotFoundError, "2 of 3 files of .* are missing: .*/b.tar, .*/c.tar"),
        ("WEB/a-0.png", ValueError, "expected .*, got .*/a-0.png"),
        ("S3/b-*.tar", FileNotFoundError, "no file matches s3://bucket/b-[*].tar"),
        ("S3/b.tar", FileNotFoundError, "nothing at s3://bucket/b.tar"),
        ("s3://other/b.tar", FileNotFoundError, "nothing at s3://other/b.tar"),
        ("s3://bucket", ValueError, "s3://bucket: expected a file or a pattern, got a folder"),
    ],
)
def test_what_cannot_be_found_is_one_line(web, s3, shards, tmp_path, spec, kind, message):
    (shards / "a-0.png").touch()
    with pytest.raises(kind, match=f"^data: {message}$"):
        opened(spec.replace("WEB", web.url).replace("S3", s3), options(tmp_path))


def test_a_bucket_without_credentials_is_one_line(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "_file_system", functools.cache(storage._file_system.__wrapped__))
    with pytest.raises(PermissionError, match=r"^data: s3://bucket/a-1.tar: no credentials found; for a public bucket"):
        opened(f"{s3}/a-1.tar", SourceOptions(cache=None))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr("prmim_train.config.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^data: fsspec is not installed; pip install 'prmim\[remote\]'$"):
        opened("s3://bucket/a.tar", SourceOptions(cache=None))


# --------------------------------------------------------------------------------------------------------- bad servers


@pytest.mark.parametrize("files", FILES)
def test_passing_failures_are_repeated(web, shards, tmp_path, files):
    def answer(handler):
        number = len(web.requests)
        if number % 3:
            return False
        if number % 2 or handler.command == "HEAD":  # whose answer has no content
            handler.refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:  # half an answer
            handler.send_response(HTTPStatus.PARTIAL_CONTENT)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            handler.wfile.write(b"x" * 50)
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    web.answer = answer
    source = opened(f"{web.url}/{files}", options(tmp_path, cache=None))
    assert_same(source, opened(str(shards / files), SourceOptions()))
    assert len(web.requests) > 12


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("status", [403, 404, 502])
def test_a_server_that_refuses_during_a_run_is_no_fault_of_an_image(web, tmp_path, files, status):
    source = opened(f"{web.url}/{files}", options(tmp_path, cache=None))
    web.answer = refuse(status)
    with pytest.raises(ConnectionError, match=r"^data: (a-1.tar/018.png|t-1.parquet/6): (access|not found|no answer)"):
        source.read(18)


def test_a_server_that_never_answers_does_not_block(web, tmp_path, monkeypatch):
    source = opened(f"{web.url}/a-0.tar", options(tmp_path, cache=None))
    monkeypatch.setattr(storage, "_SILENCE", 0.05)
    storage._file_system.cache_clear()
    storage._handle.cache_clear()
    source.read(0)
    released = threading.Event()
    web.answer = lambda handler: released.wait(20)
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"^data: a-0.tar/001.png: no answer after 4 attempts \(.*[Tt]imeout.*\)$"
    ):
        source.read(1)
    assert time.monotonic() - start < 5
    released.set()
    storage._file_system.cache_clear()
    storage._handle.cache_clear()


@pytest.mark.parametrize("readers", [{"threads": 2}, {"workers": 1}], ids=["threads", "worker"])
def test_a_dead_server_stops_the_batches_and_names_an_image(web, shards, tmp_path, readers):
    source = opened(f"{web.url}/a-{{0..1}}.tar", options(tmp_path, cache=None))
    batching = {"batch_size": 4, "image_size": (8, 8), "seed": 0, "total_steps": 10**6}
    with train_batches(open_source(str(shards / "a-*.tar"), channels=1), **batching, threads=0) as batches:
        expected = [next(batches).images for _ in range(8)]
    with train_batches(source, **batching, **readers) as batches:
        for images in expected:
            np.testing.assert_array_equal(next(batches).images, images)
        web.answer = refuse(500)
        with pytest.raises(ConnectionError, match=r"^data: a-\d.tar/\d+.png: no answer after \d attempts \(500,"):
            list(batches)


def test_a_run_resumes_exactly_when_the_server_is_back(web, shards, tiny, tmp_path):
    changes = {"batch_size": 4, "epochs": 4, "checkpoint_every": 1}
    whole = tiny(data=str(shards / "a-*.tar"), out=str(tmp_path / "whole"), **changes)
    pretrain(whole)
    remote = {"data": f"{web.url}/a-{{0..1}}.tar", "cache": str(tmp_path / "cache"), **changes}
    web.answer = lambda handler: len(web.requests) > 60 and refuse(502)(handler)
    with pytest.raises(ConnectionError, match=r"^data: a-\d.tar/\d+.png: no answer"):
        pretrain(tiny(**{**remote, "cache": None}))
    web.answer = lambda handler: False
    config = tiny(**remote, resume=True)
    assert pretrain(config)["steps"] == 19
    found, expected = (
        load_file(RunDirectory(item.run_path).checkpoints()[-1] / "weights.safetensors") for item in (config, whole)
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_file_that_changes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_DELAYS", ())
    folder = tmp_path / "web"
    folder.mkdir()
    write_tar(folder / "a.tar", range(6))
    with web_server(folder) as url:
        source = opened(f"{url}/a.tar", options(tmp_path, cache=None))
        source.read(0)
        write_tar(folder / "a.tar", range(6), seed=2)  # with the same headers
        with pytest.raises(UnreadableImageError, match=r"its tar file: changed since it was opened"):
            source.read(1)
        [before] = source.records.shards
        [after] = opened(f"{url}/a.tar", options(tmp_path)).records.shards
        assert before.stamp != after.stamp


def test_a_run_is_not_resumed_on_another_file(tiny, tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    write_tar(folder / "a.tar", range(6))
    with web_server(folder) as url:
        changes = {"data": f"{url}/a.tar", "cache": str(tmp_path / "cache"), "batch_size": 2}
        pretrain(tiny(**changes))
        write_tar(folder / "a.tar", range(1, 7))
        with pytest.raises(
            ValueError, match=r"^data: expected what the run in \S+ was trained on, got images of other"
        ):
            pretrain(tiny(**changes, resume=True, epochs=2))


def test_headers_of_the_user_go_with_every_request(web, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}})
    monkeypatch.setattr(storage, "_file_system", functools.cache(storage._file_system.__wrapped__))
    web.answer = lambda handler: handler.headers.get("Authorization") != "Bearer x" and refuse(401)(handler)
    opened(f"{web.url}/a-0.tar", options(tmp_path)).read(0)
    assert len(web.ranges) > 1


# ----------------------------------------------------------------------------------------------------------- the cache


def on_disk(folder):
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("*/*"))


def test_the_least_recently_used_entries_are_deleted(tmp_path):
    cache = open_cache(str(tmp_path / "cache"), 2**20)
    others = [tmp_path / "cache" / "ab" / "photo.png", tmp_path / "cache" / "photos" / ("0" * 30)]
    for other in others:
        other.parent.mkdir()
        other.write_bytes(b"not of the cache")
    cache.put("index", b"index", pinned=True)
    for number in range(40):
        cache.put(str(number), bytes([number]) * 50_000)
        assert on_disk(tmp_path / "cache") <= 2**20 + 2 * 4096  # the others
        assert cache.get("0") == b"\0" * 50_000  # in use
        time.sleep(0.002)
    assert cache.get("index", pinned=True) == b"index"
    kept = [number for number in range(1, 40) if cache.get(str(number)) is not None]
    assert kept == list(range(kept[0], 40))
    assert len(kept) > 15
    cache.put("large", bytes(2**21))
    assert cache.get("large") is None
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("damage", [lambda entry: entry[:-1], lambda entry: b"", lambda entry: entry[:-1] + b"?"])
def test_damaged_entries_are_read_again(web, shards, tmp_path, damage):
    source = opened(f"{web.url}/a-0.tar", options(tmp_path))
    for entry in (tmp_path / "cache").glob("??/*"):
        entry.write_bytes(damage(entry.read_bytes()))
    source = opened(f"{web.url}/a-0.tar", options(tmp_path))
    assert_same(source, open_source(str(shards / "a-0.tar"), channels=1))


def test_what_a_killed_writer_leaves_does_no_harm(tmp_path):
    folder = tmp_path / "cache"
    cache = open_cache(str(folder), 2**20)
    cache.put("a", b"content")
    (folder / "partial").write_bytes(b"half of a")
    (folder / "total").write_text("")
    cache.put("b", b"content")
    assert cache.get("a") == cache.get("b") == b"content"
    assert int((folder / "total").read_text()) == on_disk(folder)


WRITER = """
import sys
from prmim_train.data.cache import open_cache
cache = open_cache(sys.argv[1], 2**20)
for turn in range(3):
    for number in range(60):
        content = bytes([number]) * 30_000
        assert cache.get(str(number)) in (None, content)
        cache.put(str(number), content)
"""


def test_two_processes_share_a_cache(tmp_path):
    folder = tmp_path / "cache"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder)]) for _ in range(2)]
    largest = 0
    while any(writer.poll() is None for writer in writers):
        with suppress(FileNotFoundError):  # just deleted
            largest = max(largest, on_disk(folder))
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert 2**19 < on_disk(folder) <= 2**20
    assert largest <= 2**20 + 32768  # an entry that was listed, and then deleted


def test_a_file_in_place_of_the_cache_is_refused(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"^cache: expected a folder that can be written to, or null, got .*exists"):
        open_cache(str(tmp_path / "cache"), 2**20)


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    cache = open_cache(str(tmp_path / "cache"), 2**20)

    def fail(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(cache), "_put", fail)
    with pytest.warns(UserWarning, match=r"^cache: cannot write to .*: No space left on device$"):
        cache.put("a", b"content")

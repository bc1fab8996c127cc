"""The same images in every format: the same order, crops, labels and faults."""

import io
import itertools
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from prmim_train.config.pretrain import pretrain_config
from prmim_train.config.training import SourceOptions
from prmim_train.data.batches import train_batches
from prmim_train.data.formats import parquet
from prmim_train.data.identity import identities
from prmim_train.data.sources import UnreadableImageError, open_source
from prmim_train.run.origin import data_origin
from prmim_train.run.prepare import labelled_sides, open_data

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
lmdb = pytest.importorskip("lmdb")
datasets = pytest.importorskip("datasets")

NUM_IMAGES = 24
CLASSES = ("cat", "dog", "owl")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(seed):
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    size = (int(rng.integers(20, 40)), int(rng.integers(20, 40)), 3)
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


NAMES = [f"{CLASSES[k * 3 // NUM_IMAGES]}/{k:02}.png" for k in range(NUM_IMAGES)]
CONTENTS = [encoded(k) for k in range(NUM_IMAGES)]
LABELS = [k * 3 // NUM_IMAGES for k in range(NUM_IMAGES)]


def structs(contents):
    return pa.array([None if it is None else {"bytes": it, "path": "x.png"} for it in contents], STRUCT)


def write_folder(folder):
    for name, content in zip(NAMES, CONTENTS, strict=True):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(content)
    return str(folder / "photos")


def write_tar(folder):
    path = write_folder(folder)
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(path, "photos")
    return str(folder / "a.tar")


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def write_parquets(folder):
    """Two files with row groups of five rows; classes as text."""
    columns = {"image": structs(CONTENTS), "label": [CLASSES[label] for label in LABELS]}
    for k, rows in enumerate((slice(0, 13), slice(13, None))):
        (folder / "tables").mkdir(exist_ok=True)
        part = {name: values[rows] for name, values in columns.items()}
        write_parquet(folder / "tables" / f"{k}.parquet", part, row_group_size=5)
    return str(folder / "tables")


def write_binary(folder):
    """Plain bytes, beside another column of bytes; classes as numbers."""
    columns = {"thumb": [b""] * NUM_IMAGES, "jpg": CONTENTS, "kind": pa.array(LABELS, pa.uint8())}
    return write_parquet(folder / "a.parquet", columns)


def write_dataset(folder):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)), "id": datasets.Value("int64")}
    )
    images = [{"bytes": content, "path": None} for content in CONTENTS]
    columns = {"image": images, "label": LABELS, "id": list(range(NUM_IMAGES))}
    train = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict({"test": train.select(range(2)), "train": train})
    both.save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def write_lmdb(folder, items=None):
    with lmdb.open(str(folder / "images.lmdb"), map_size=2**24) as environment, environment.begin(write=True) as writer:
        for name, content in zip(NAMES, CONTENTS, strict=True) if items is None else items:
            writer.put(name if isinstance(name, bytes) else name.encode(), content)
    return str(folder / "images.lmdb")


class Custom:
    """What a user writes."""

    labels = LABELS
    class_names = CLASSES

    def __len__(self):
        return NUM_IMAGES

    def content(self, index):
        return CONTENTS[index]

    def name(self, index):
        return NAMES[index]

    def identities(self):
        return identities((name.encode(), 0) for name in NAMES)


@pytest.fixture
def custom(monkeypatch):
    """Make a module with a function `images`; return the import path."""
    numbers = itertools.count()

    def install(function):
        name = f"custom_{next(numbers)}"
        module = type(sys)(name)
        module.images = function
        monkeypatch.setitem(sys.modules, name, module)
        return f"{name}:images"

    return install


FORMATS = {
    "folder": (write_folder, {}),
    "tar": (write_tar, {}),
    "parquet": (write_parquets, {}),
    "binary": (write_binary, {"image_key": "jpg", "label_key": "kind"}),
    "hf": (write_dataset, {}),
    "lmdb": (write_lmdb, {}),
    "custom": (None, {}),
}


def batches(source):
    with train_batches(source, batch_size=8, image_size=(16, 12), seed=1, total_steps=5) as stream:
        return [(batch.images, batch.index) for batch in stream]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return open_source(write_folder(tmp_path_factory.mktemp("reference")), channels=3)


@pytest.mark.parametrize("kind", FORMATS)
def test_order_and_crops_do_not_depend_on_the_format(kind, tmp_path, reference, custom):
    write, options = FORMATS[kind]
    spec = custom(Custom) if write is None else write(tmp_path)
    source = open_source(spec, channels=3, options=SourceOptions(**options))
    assert len(source) == NUM_IMAGES
    for (images, records), (other, same) in zip(batches(source), batches(reference), strict=True):
        np.testing.assert_array_equal(records, same)
        np.testing.assert_array_equal(images, other)
    assert source.labels.tolist() == LABELS
    assert source.class_names == (("0", "1", "2") if kind == "binary" else CLASSES)
    assert [source.header(k) for k in range(NUM_IMAGES)] == [reference.header(k) for k in range(NUM_IMAGES)]
    assert len({source.name(k) for k in range(NUM_IMAGES)}) == NUM_IMAGES
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(5), source.read(5))
    found = source.identities()
    assert len(set(found.keys.tolist())) == NUM_IMAGES
    assert found.stamps.shape == (NUM_IMAGES,)
    again = open_source(spec, channels=None, options=SourceOptions(**options))
    assert again.channels == 3
    assert all((a == b).all() for a, b in zip(again.identities(), found, strict=True))


def opened(spec, channels=3, for_test=False, **options):
    return open_source(str(spec), channels=channels, options=SourceOptions(**options), for_test=for_test)


def refusal(spec, **options):
    """The message of a source that is refused: one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        opened(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": ["a"]}, {}, "image_key: expected a column of image bytes in {}, got the columns url string"),
        ({"a": [b"x"], "b": [b"y"]}, {}, "image_key: expected one of a, b in {}, got null: the columns a binary, b "),
        ({"a": [b"x"]}, {"image_key": "b"}, "image_key: expected a column b of image bytes in {}, got the columns a"),
        ({"a": [1], "b": [b"y"]}, {"image_key": "a"}, "image_key: expected a column a of image bytes in {}, got the "),
        ({"a": [b"x"]}, {"label_key": "b"}, "label_key: expected a column b of integers or text in {}, got the col"),
        ({"a": [b"x"], "b": [1.5]}, {"label_key": "b"}, "label_key: expected a column b of integers or text in {}, "),
        ({"a": [b"x"], "b": [-7]}, {"label_key": "b"}, "label_key: expected in the column b classes from 0 to 1,048,5"),
        ({"a": [b"x"]}, {"split": "test"}, "split: expected a split in file {}, which has no splits, got test"),
        ({"a": pa.array([], pa.binary())}, {}, "data: no rows in file {}"),
    ],
)
def test_tables_without_the_columns_are_refused(tmp_path, columns, options, message):
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert refusal(path, **options).startswith(message.format(path))


@pytest.mark.parametrize(
    ("values", "names", "labels", "remark"),
    [
        (pa.array(["b", None, "a"]), ("a", "b"), [1, -1, 0], "in 2 classes, 1 image without class"),
        (pa.array(["b", "a", "a"]).dictionary_encode(), ("a", "b"), [1, 0, 0], "in 2 classes"),
        (pa.array([2, 0, -1], pa.int8()), ("0", "1", "2"), [2, 0, -1], "in 3 classes, 1 image without class"),
        (pa.array([2**64 - 1, 0, 2**40], pa.uint64()), None, None, "no labels (in the column label, expected classes"),
        (pa.array([2**40, 0, 1]), None, None, "no labels (in the column label, expected classes from 0 to 1,048,575"),
        (pa.array([[1], [2], [3]]), None, None, "no labels"),
        (pa.array([None, None, None], pa.int32()), None, None, "no labels"),
    ],
)
def test_labels_of_a_table(tmp_path, values, names, labels, remark):
    source = opened(write_parquet(tmp_path / "a.parquet", {"image": structs(CONTENTS[:3]), "label": values}))
    assert source.class_names == names
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert remark in source.description


def test_images_that_a_table_lacks_are_unreadable(tmp_path):
    contents = [CONTENTS[0], None, b"", b"no image", CONTENTS[4][:80], CONTENTS[5]]
    nested = pa.array([{"bytes": None, "path": "/etc/passwd"}], STRUCT)
    column = pa.concat_arrays([structs(contents), nested])
    source = opened(write_parquet(tmp_path / "a.parquet", {"image": column}))
    reasons = {}
    for k in range(7):
        try:
            source.read(k)
        except UnreadableImageError as error:
            reasons[k] = str(error)
    assert sorted(reasons) == [1, 2, 3, 4, 6]
    assert reasons[1] == "a.parquet/1: null in place of an image"
    assert reasons[2] == "a.parquet/2: empty file"
    assert reasons[6] == "a.parquet/6: null in place of an image"


def test_a_truncated_or_damaged_table_is_refused_or_has_unreadable_images(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"image": structs(CONTENTS), "label": LABELS}, row_group_size=7, write_page_checksum=True)
    whole = path.read_bytes()
    for size in (0, 3, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refusal(path) == f"data: the parquet file {path}: truncated, encrypted or no parquet file"
    rng = np.random.default_rng(0)
    refused, unreadable = [], []
    for _ in range(60):
        changed = bytearray(whole)
        place = int(rng.integers(len(whole) // 2 if rng.random() < 0.5 else len(whole) - 1500, len(whole)))
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            source = opened(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        for k in range(0, len(source), 3):
            try:
                source.read(k)
            except UnreadableImageError as error:
                unreadable.append(str(error))
    assert refused
    assert unreadable
    assert not any("\n" in message for message in (*refused, *unreadable))


def test_a_table_that_changes_makes_its_images_unreadable(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(CONTENTS)}, row_group_size=5)
    source = opened(path)
    source.read(0)
    write_parquet(path, {"image": structs(CONTENTS[::-1])}, row_group_size=5)
    with pytest.raises(UnreadableImageError, match=r"^a.parquet/9: its parquet file: changed since it was opened$"):
        pickle.loads(pickle.dumps(source)).read(9)


def test_memory_for_row_groups_is_bounded(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(CONTENTS)}, row_group_size=4)
    source = opened(path)
    largest = max(sum(map(len, CONTENTS[k : k + 4])) for k in range(0, NUM_IMAGES, 4))
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 2 * largest + 1000)
    for k in (0, 5, 9, 13, 1, 23, 22):
        assert source.records.content(k) == CONTENTS[k]
        groups = source.records._groups
        assert groups._bytes == sum(values.nbytes for values in groups._groups.values()) <= 2 * largest + 1000
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", largest - 1)
    message = rf"data: the parquet file {path}: a row group of [\d,]+ bytes, more than the limit of {largest - 1:,}; "
    with pytest.raises(ValueError, match=f"^{message}write it again with a smaller row_group_size$"):
        opened(path)
    monkeypatch.setattr(parquet, "_SLOW_BYTES", 10)
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 2**29)
    assert "column image, row groups of up to 0 MB (slow: see docs/guides/data.md)" in opened(path).description


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "structs", "delta"])
def test_a_repeated_image_takes_no_more_memory_than_its_row_group(tmp_path, kind):
    contents = [CONTENTS[0]] * 300 + [None, *CONTENTS]
    column = structs(contents) if kind == "structs" else pa.array(contents, pa.binary())
    column = column.cast(pa.large_binary()) if kind == "large bytes" else column
    written = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}} if kind == "delta" else {}
    source = opened(write_parquet(tmp_path / "a.parquet", {"image": column}, **written))
    assert [source.records.content(k) for k in (0, 299, 301, 324)] == [contents[k] for k in (0, 299, 301, 324)]
    with pytest.raises(UnreadableImageError, match=r"^a.parquet/300: null in place of an image$"):
        source.read(300)
    assert (source.records._groups._bytes < 2 * sum(map(len, CONTENTS))) == (kind != "delta")


def test_names_of_parquet_files_tell_the_split(tmp_path):
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 4), ("test-00000-of-00001", 5)):
        write_parquet(tmp_path / f"{name}.parquet", {"image": structs(CONTENTS[:rows])})
    (tmp_path / "README.md").write_text("photos")
    assert opened(tmp_path).description == (
        f"folder {tmp_path}: 7 images, no labels, column image, split train, 1 other file skipped (.md 1)"
    )
    assert len(opened(tmp_path, split="test")) == 5
    assert len(opened(tmp_path, for_test=True)) == 5
    assert (
        refusal(tmp_path, split="dev")
        == f"split: expected a split in folder {tmp_path}, which has test, train, got dev"
    )
    write_parquet(tmp_path / "more.parquet", {"image": structs(CONTENTS[:1])})
    assert len(opened(tmp_path)) == 13


def test_tables_of_one_source_have_the_same_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": structs(CONTENTS[:1])})
    write_parquet(tmp_path / "b.parquet", {"jpg": structs(CONTENTS[:1])})
    assert refusal(tmp_path).startswith(
        f"image_key: expected a column image of image bytes in {tmp_path}/b.parquet, got"
    )


# ------------------------------------------------------------------------------------------------- Hugging Face, LMDB


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refusal("hf:owner/name").startswith(
        "data: expected a data set in a folder or on the hub, got hf:owner/name ("
    )
    assert refusal(f"hf:{tmp_path}/x") == f"data: nothing at hf:{tmp_path}/x; expected hf:FOLDER or hf:OWNER/NAME"
    assert refusal(f"hf:{tmp_path}").startswith(
        f"data: expected a data set in a folder or on the hub, got hf:{tmp_path} ("
    )


def test_splits_and_missing_images_of_a_data_set(tmp_path):
    spec = write_dataset(tmp_path)
    assert len(opened(spec, for_test=True)) == 2
    assert opened(spec, split="test").labels.tolist() == LABELS[:2]
    assert refusal(spec, split="x") == f"split: expected a split in {spec}, which has test, train, got x"
    (tmp_path / "a.png").write_bytes(CONTENTS[3])
    images = [{"bytes": None, "path": str(tmp_path / "a.png")}, None, {"bytes": CONTENTS[1], "path": None}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    single = datasets.Dataset.from_dict({"image": images}, features=features)
    single.save_to_disk(tmp_path / "single")
    source = opened(f"hf:{tmp_path / 'single'}")
    assert source.labels is None
    np.testing.assert_array_equal(source.read(2), opened(spec).read(1))
    np.testing.assert_array_equal(source.read(0), opened(spec).read(3))
    with pytest.raises(UnreadableImageError, match=r"^single/1: null in place of an image$"):
        source.read(1)
    assert refusal(f"hf:{tmp_path / 'single'}", split="train").endswith("which has no splits, got train")


def test_an_lmdb_is_refused_in_one_line(tmp_path):
    (tmp_path / "pickled").mkdir()
    path = write_lmdb(tmp_path / "pickled", [(b"0", pickle.dumps(CONTENTS[0]))])
    assert refusal(path) == (
        f"data: the LMDB {path}: values are pickled Python objects, which can run code; expected image files"
    )
    (tmp_path / "other.mdb").write_bytes(b"x" * 9000)
    assert refusal(tmp_path / "other.mdb").startswith(f"data: the LMDB {tmp_path}/other.mdb: ")
    path = write_lmdb(tmp_path)
    file = tmp_path / "images.lmdb" / "data.mdb"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])
    assert refusal(path).startswith(f"data: the LMDB {path}: truncated: ")
    (tmp_path / "empty").mkdir()
    path = write_lmdb(tmp_path / "empty", [(b"__len__", b"0")])
    assert refusal(path) == f"data: no images in the LMDB {path}"


def test_an_lmdb_is_opened_once_whatever_its_path(tmp_path, monkeypatch):
    path = write_lmdb(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.lmdb").symlink_to(path)
    sources = [opened(spec) for spec in (path, "images.lmdb", "link.lmdb")]
    assert sources[1].description == "LMDB images.lmdb: 24 images in 3 classes"
    for source in sources:
        np.testing.assert_array_equal(source.read(5), sources[0].read(5))


# --------------------------------------------------------------------------------------------------------------- custom


class WithoutName(Custom):
    name = None


class Empty(Custom):
    def __len__(self):
        return 0


class Texts(Custom):
    def content(self, index):
        return "text"


class TooFewLabels(Custom):
    labels = LABELS[1:]


class TooFewNames(Custom):
    class_names = CLASSES[:2]


class Keys(Custom):
    def identities(self):
        return list(range(NUM_IMAGES))


class Broken(Custom):
    def identities(self):
        raise KeyError("no identities")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: [1, 2], "expected an object with the methods __len__, content, name, identities from {}, got list w"),
        (WithoutName, "expected an object with the methods __len__, content, name, identities from {}, got WithoutNam"),
        (Empty, "expected at least one image from {}, got 0"),
        (Texts, "expected bytes or an array from content(0) from {}, got str"),
        (TooFewLabels, "expected 24 whole numbers as labels from {}, got int64 (23,)"),
        (TooFewNames, "expected labels from -1 (unlabelled), and a name for each from {}, got 2 and 2 names"),
        (Keys, "expected prmim_train.data.identity.identities of 24 images from identities() from {}, got list"),
        (Broken, "{} failed (KeyError: 'no identities')"),
        (lambda: 1 / 0, "{} failed (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_function_that_returns_something_else(custom, function, message):
    path = custom(function)
    assert refusal(path).startswith("data: " + message.format(path))


def test_there_is_no_such_function(custom):
    path = custom(Custom)
    assert refusal("nothing_here:images").startswith("data: expected a function to import, got 'nothing_here:images' (")
    assert refusal(path.replace("images", "x")).startswith("data: expected a function to import, got ")
    assert refusal(path, image_key="jpg").startswith(f"image_key: expected null, since {path} is no tar file, ")


class Arrays(Custom):
    """Five bands of 16 bits, a different type, and what is no image."""

    labels = None

    def content(self, index):
        if index == 3:
            raise KeyError("lost")
        return {1: None, 2: np.zeros((4, 4, 3), np.uint16)}.get(index, np.full((8, 6, 5), index, np.uint16))


def test_a_function_can_return_arrays(custom):
    source = open_source(custom(Arrays), channels=None, keep_depth=True)
    assert (source.channels, source.depth, source.labels) == (5, "uint16", None)
    np.testing.assert_array_equal(source.read(7), np.full((8, 6, 5), 7, np.uint16))
    assert source.header(7).shape == (8, 6)
    for k, reason in ((1, "expected bytes or an array, got NoneType"), (2, "3 channels, expected 5"), (3, "'lost'")):
        with pytest.raises(UnreadableImageError, match=f"{reason}$"):
            source.read(k)


class Mapped(Custom):
    """A part of a file."""

    def content(self, index):
        return np.memmap("images.raw", np.uint8, "r", offset=48 * index, shape=(8, 6))


def test_a_function_can_return_parts_of_a_mapped_file(custom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.arange(NUM_IMAGES * 48, dtype=np.uint8).reshape(NUM_IMAGES, 8, 6)
    pixels.tofile("images.raw")
    source = opened(custom(Mapped), channels=None)
    np.testing.assert_array_equal(source.read(7)[..., 0], pixels[7])
    assert source.read_crop(7, (4, 4), lambda shape: (0, 0, 8, 6)).shape == (4, 4, 1)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_test_images_have_a_format_of_their_own(tmp_path):
    """Options of the run apply where the other format has them.

    Of its splits, test is used.
    """
    columns = {"jpg": CONTENTS, "thumb": CONTENTS, "kind": [CLASSES[label] for label in LABELS]}
    table = write_parquet(tmp_path / "a.parquet", columns)
    config = pretrain_config(data=table, image_key="jpg", label_key="kind", image_size=16, patch_size=4, batch_size=4)
    data = open_data(config)
    for test, number in ((write_folder(tmp_path), 24), (table, 24)):
        assert len(labelled_sides(data, test)[1].indices) == number
    spec = write_dataset(tmp_path)
    for split in (None, "train"):
        config = pretrain_config(data=spec, split=split, image_size=16, patch_size=4, batch_size=4)
        train, test = labelled_sides(open_data(config), spec)
        assert (len(train.source), len(test.source)) == (24, 2)


class OtherNames(Custom):
    def identities(self):
        return identities((f"other {name}".encode(), 0) for name in NAMES)


def test_a_run_notices_that_a_function_returns_other_images(custom):
    path, train = custom(Custom), np.arange(20)
    origin = data_origin(opened(path), train)
    assert origin.difference(data_origin(opened(path), train).facts) is None
    other = data_origin(opened(custom(OtherNames)), train)
    assert other.difference(origin.facts) == "images of other names, sizes or pixels"

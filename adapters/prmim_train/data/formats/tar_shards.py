"""Images in uncompressed tar files (WebDataset shards).

An index of offsets gives random access without unpacking.

Opening a source reads headers only and trusts none of them: every archive is parsed completely or refused with a
one-line error. Member names serve as labels and in messages, never as paths. Devices and other special members are
skipped; so are links, which are counted.
"""

import io
import json
import os
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import ARRAY_ENDING, IMAGE_ENDINGS, image_endings, open_part, read_part, reason_of
from prmim_train.data.names import (
    MAX_CLASS_NAME,
    MAX_CLASSES,
    Classes,
    PackedNames,
    classes_of_folders,
    ending_of,
    skipped,
)
from prmim_train.data.storage import File, Place, common_folder, open_each, open_place

__all__ = ["COMPRESSED_TARS", "Member", "TarRecords", "open_tars", "tar_members"]

COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of compressed tar files, which `open_tars` refuses with the reason."""

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_NOTE = 2**20  # bytes of a long name or of a pax header; real ones have hundreds
_MAX_LABEL = 64  # bytes of a .cls file
_MAX_JSON = 2**20  # bytes of a .json file
_LABELS = (".cls", ".json")
_LABEL_FIELDS = ("cls", "label", "class", "class_id", "class_name")  # of a .json file
# Of several images with one key, the first in this order is the photograph: masks and depth maps are lossless.
_PREFERRED = (".jpg", ".jpeg", ".jfif", ".webp", ".jp2", ".heic", ".heif", ".avif")
_MAX_END = 2**20  # bytes of zeros at the end; tar pads to 10,240, for tapes up to a megabyte

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# Members without content, whatever size their header states. All other types have content.
_WITHOUT_CONTENT = (
    *_LINKS,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
# Members that describe the member after them.
_NOTES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK": "zip",
}


@dataclass(frozen=True)
class TarRecords:
    """Images in tar files; see `prmim_train.data.formats.records.Records`.

    Parameters
    ----------
    shards : tuple of Path or Address
        The tar files.
    names : sequence of str
        Member name of each image.
    shard : int32 array (number of images,)
        Index into `shards` of each image.
    offset, size : int64 arrays (number of images,)
        Position and length of each image's content in its tar file, in bytes.
    header_crc : uint32 array (number of images,)
        CRC-32 of the header block before each image's content. Detects archives that changed during a run.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional

    Notes
    -----
    `content` opens the tar file for each image, which takes microseconds, and keeps no state. Any number of threads and
    processes can read at the same time, from any number of shards.
    """

    shards: tuple[Place, ...]
    names: Sequence[str]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    header_crc: NDArray[np.uint32]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def content(self, index: int) -> bytes:
        """Return the content of one member."""
        with _named_errors(), open_place(self.shards[self.shard[index]]) as file:
            both = read_part(file, int(self.offset[index]) - _BLOCK, _BLOCK + int(self.size[index]))
            self._check(index, both[:_BLOCK])
        return both[_BLOCK:]

    def open(self, index: int) -> BinaryIO:
        """Open one member."""
        place, offset = self.shards[self.shard[index]], int(self.offset[index])
        with _named_errors():
            with open_place(place) as file:
                self._check(index, read_part(file, offset - _BLOCK, _BLOCK))
            return open_part(place, offset, int(self.size[index]))

    def _check(self, index: int, header: bytes) -> None:
        if zlib.crc32(header) != self.header_crc[index]:
            raise ValueError("changed since it was opened")

    def name(self, index: int) -> str:
        """Return the image's name for messages: shard, then member."""
        return printable(f"{self.shards[self.shard[index]].name}/{self.names[index]}")

    def identities(self) -> Identities:
        """Hash member name and size."""
        return identities(
            (os.fsencode(f"{name} {size}"), crc)
            for name, size, crc in zip(self.names, self.size.tolist(), self.header_crc.tolist(), strict=True)
        )


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"its tar file: {reason_of(error)}") from error


def open_tars(
    paths: Sequence[Place],
    *,
    image_key: str | None = None,
    others: Mapping[str, int] | None = None,
    endings: tuple[str, ...] | None = None,
) -> tuple[TarRecords, str]:
    """Index the images in uncompressed tar files.

    Parameters
    ----------
    paths : sequence of Path or Address
        At least one.
    image_key : str, optional
        Extension of the image of a sample, after the first dot of its name: ``"jpg"``, ``"seg.png"``, or choices in
        order of preference, ``"jpg;png"``. Default: see Notes.
    others : mapping of str to int, optional
        Number of files beside `paths` by ending, for the description.
    endings : tuple of str, optional
        Endings of clips and volumes. Default: the members are images.

    Returns
    -------
    records : TarRecords
        Labels come from ``key.cls`` files, which hold a class number: every image needs one in the same folder of the
        same tar file, with the same name up to the first dot. Without any ``.cls`` file, they come from ``key.json``
        files, whose field ``cls``, ``label``, ``class``, ``class_id`` or ``class_name`` is a class number or a class
        name; files without such a field are ignored if the first one is. Otherwise, labels come from folders; see
        `prmim_train.data.names.classes_of_folders`.
    description : str

    Raises
    ------
    ValueError
        If a file is compressed, truncated, corrupt or no tar file, if its end is missing or followed by more data (see
        `tar_members`), or if no file contains images.
    OSError
        If a file cannot be opened.

    Notes
    -----
    Images are members whose names end like image files (see `prmim_train.data.image_files.image_endings`), in upper or
    lower case, in the order of `paths` and of the members. Without any, ``.npy`` members are images. Hidden members (a
    part of the path starts with a dot) are skipped.

    Members of one folder with the same name up to the first dot are a sample, as in WebDataset. Beside ``s000.jpg``,
    ``s000.seg.png`` and ``s000.png`` are not images. If no member has a single ending, all are images:
    ``scan.001.png`` and ``scan.002.png``. The description counts skipped members, and links whose names end like those
    of images.
    """
    names = None if image_key is None else [f".{name.strip().lower().lstrip('.')}" for name in image_key.split(";")]
    index = _index(paths, partial(_Index, names, endings or image_endings()))
    if not len(index.names) and image_key is None and endings is None:
        index = _index(paths, partial(_Index, None, (ARRAY_ENDING,)))
    where = (
        f"tar file {printable(str(paths[0]))}"
        if len(paths) == 1
        else f"{len(paths):,} tar files in {common_folder(paths)}"
    )
    if not len(index.names):
        _raise_no_images(where, image_key, endings or IMAGE_ENDINGS, index.others + index.further)
    labels, class_names, remark = index.labels()
    links = f", {counted(index.num_links, 'link')} skipped" if index.num_links else ""
    further = skipped(index.further, "further image")
    records = TarRecords(
        shards=tuple(paths),
        names=index.names,
        shard=np.array(index.shard, np.int32),
        offset=np.array(index.offset, np.int64),
        size=np.array(index.size, np.int64),
        header_crc=np.array(index.header_crc, np.uint32),
        labels=labels,
        class_names=class_names,
    )
    skipped_files = skipped(index.others + Counter(others))
    return records, f"{where}: {counted(len(records), 'image')}{remark}{links}{further}{skipped_files}"


def _raise_no_images(where: str, image_key: str | None, endings: Sequence[str], others: Counter[str]) -> None:
    found = skipped(others, "member").removeprefix(", ").replace(" skipped", "") or "no members"
    if image_key is not None:
        raise ValueError(f"image_key: expected an extension of the images in {where}, got {image_key}; {found}")
    raise ValueError(f"data: no images in {where}: expected members whose names end in {', '.join(endings)}; {found}")


# ----------------------------------------------------------------------------------------------------------- index


class _Image(NamedTuple):
    """A member that looks like an image."""

    key: str
    extension: str  # from the first dot on, in lower case
    folder: tuple[str, ...]
    member: "Member"


def _index(paths: Sequence[Place], create: Callable[[], "_Index"]) -> "_Index":
    index = create()
    files = open_each(paths, lambda file: create().add(0, file))
    for number, path in enumerate(paths):
        try:
            index.add(number, next(files))
        except (ConnectionError, ValueError) as error:
            kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
            raise kind(f"data: the tar file {printable(str(path))}: {error}") from error
    return index


class _Index:
    """Offsets and labels of the images in tar files.

    Parameters
    ----------
    wanted
        Extensions of images, in order of preference. None: all that end in `endings`; see `open_tars`.
    endings
        Endings of images.
    """

    def __init__(self, wanted: Sequence[str] | None, endings: tuple[str, ...]) -> None:
        self._wanted, self._endings = wanted, endings
        self.names = PackedNames()
        self.shard, self.offset, self.size, self.header_crc = array("i"), array("q"), array("q"), array("I")
        self.folder = array("i")  # index into `folders` of each image
        self.folders: dict[tuple[str, ...], int] = {}
        self.num_links = 0  # with names of images
        self.others: Counter[str] = Counter()  # members that are neither images nor labels, by ending
        self.further: Counter[str] = Counter()  # further images of samples, by extension
        self._cls, self._json = _Labels(), _Labels()
        self._reads_json: bool | None = None  # None: before the first .json file

    def add(self, number: int, file: File) -> None:
        """Add the images of one tar file."""
        images: list[_Image] = []
        for member in tar_members(file):
            parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
            if not parts or any(part.startswith(".") for part in parts):
                continue
            *folder, name = parts
            stem, dot, extension = name.partition(".")
            key, extension = "/".join((*folder, stem)), (dot + extension).lower()
            if extension in (self._wanted or ()) or name.lower().endswith(self._endings):
                if member.is_link:
                    self.num_links += 1
                else:
                    images.append(_Image(key, extension, tuple(folder), member))
            elif member.is_link or extension not in _LABELS or not self._label(file, member, key, extension):
                self.others[ending_of(name)] += 1
        self._append(number, images)

    def _label(self, file: File, member: "Member", key: str, extension: str) -> bool:
        """Read the class of a sample from a member; return False if it holds none."""
        if extension == ".cls":
            self._cls.add(key, _read_class(file, member))
            return True
        if self._reads_json is False:
            return False
        value = _read_json_class(file, member)
        self._reads_json = self._reads_json or value is not None
        if value is not None:
            self._json.add(key, value)
        return value is not None

    def _append(self, number: int, images: Sequence[_Image]) -> None:
        """Append the image of each sample of a tar file."""
        extensions: dict[str, list[str]] = {}
        for image in images:
            extensions.setdefault(image.key, []).append(image.extension)
        chosen = {key: self._choose(found) for key, found in extensions.items()}
        for key, extension, folder, member in images:
            if extension not in chosen[key]:
                self.further[extension] += 1
                continue
            self.names.append(member.name)
            self.shard.append(number)
            self.offset.append(member.offset)
            self.size.append(member.size)
            self.header_crc.append(member.header_crc)
            self.folder.append(self.folders.setdefault(folder, len(self.folders)))
            self._cls.take(key)
            self._json.take(key)
        self._cls.end_file()
        self._json.end_file()

    def _choose(self, extensions: list[str]) -> list[str]:
        """Return the extensions of the images of a sample."""
        if self._wanted is not None:
            return [extension for extension in self._wanted if extension in extensions][:1]
        plain = [extension for extension in extensions if extension.count(".") == 1]
        if not plain:  # a name with dots, not a sample
            return extensions
        return [min(plain, key=lambda name: _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED))]

    def labels(self) -> Classes:
        """Return the labels, the class names, and a phrase that describes them."""
        if self._cls.is_used:
            return self._cls.labels(".cls file")
        if self._json.is_used:
            return self._json.labels("class in a .json file")
        return classes_of_folders(list(self.folders), np.array(self.folder))


class _Labels:
    """Classes of the images in tar files, from other members of their samples."""

    def __init__(self) -> None:
        self._value_of: dict[str, int | str] = {}  # by key, in the current file
        self._numbers: dict[int | str, int] = {}  # of the values, as they come
        self._of_image = array("i")  # number of each image's value; -1 without

    def add(self, key: str, value: int | str) -> None:
        """Add the class of a sample of the current file."""
        self._value_of[key] = value

    def take(self, key: str) -> None:
        """Append the class of the sample to which the next image belongs."""
        value = self._value_of.get(key)
        self._of_image.append(-1 if value is None else self._numbers.setdefault(value, len(self._numbers)))

    def end_file(self) -> None:
        """Drop the samples of the current file: keys are local to a file."""
        self._value_of = {}

    @property
    def is_used(self) -> bool:
        """Whether an image has a class."""
        return bool(self._numbers)

    def labels(self, missing: str) -> Classes:
        """Return the labels, the class names, and a phrase that describes them."""
        of_image, values = np.array(self._of_image, np.int64), list(self._numbers)
        if number := int(np.count_nonzero(of_image < 0)):
            return Classes(None, None, f", no labels ({counted(number, 'image')} without {missing})")
        names = [value for value in values if isinstance(value, int)]
        if len(names) == len(values):
            labels = np.array(names, np.int64)[of_image]
            class_names = tuple(str(k) for k in range(max(names) + 1))
        else:
            class_names = tuple(sorted({printable(str(value)) for value in values}))
            table = {name: k for k, name in enumerate(class_names)}
            labels = np.array([table[printable(str(value))] for value in values], np.int64)[of_image]
        return Classes(labels, class_names, f" in {counted(len(class_names), 'class', 'classes')}")


def _read_class(file: File, member: "Member") -> int:
    text = read_part(file, member.offset, min(member.size, _MAX_LABEL)).strip()
    if not text.isdigit() or member.size > _MAX_LABEL or int(text) >= MAX_CLASSES:
        raise _no_class(member, printable(os.fsdecode(text)))
    return int(text)


def _read_json_class(file: File, member: "Member") -> int | str | None:
    """Return the class number or name in a `.json` file; None if it states none."""
    if member.size > _MAX_JSON:
        return None
    try:
        content = json.loads(read_part(file, member.offset, member.size))
    except (ValueError, RecursionError):
        return None
    fields = content if isinstance(content, dict) else {}
    value = next((fields[name] for name in _LABEL_FIELDS if name in fields), None)
    if isinstance(value, str) and 0 < len(value) <= MAX_CLASS_NAME:
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if not 0 <= value < MAX_CLASSES:
        raise _no_class(member, str(value))
    return value


def _no_class(member: "Member", got: str) -> ValueError:
    return ValueError(f"{printable(member.name)}: expected a class, from 0 to {MAX_CLASSES - 1:,}, got {got!r}")


# --------------------------------------------------------------------------------------------------------- members
#
# Not parsed by `tarfile`, which takes three times as long and is unsafe for untrusted files. It treats a damaged header
# as the end of the archive, guesses at malformed pax records, and accepts negative sizes. Long names, pax headers and
# sparse maps can make it read gigabytes, recurse without limit, or (Python 3.11.7) search a megabyte for half an hour.


class Member(NamedTuple):
    """A regular file or a link in a tar file.

    Parameters
    ----------
    name : str
        Decoded like a file name.
    offset, size : int
        Position and length of its content, in bytes. A link has no content.
    header_crc : int
        CRC-32 of its header block.
    is_link : bool
        Whether it is a hard or symbolic link.
    """

    name: str
    offset: int
    size: int
    header_crc: int
    is_link: bool


def tar_members(file: File) -> Iterator[Member]:
    """Iterate over the regular files and links in a tar file, reading headers only.

    Parameters
    ----------
    file : binary file

    Yields
    ------
    Member
        The name is decoded like a file name and includes long names (GNU and pax).

    Raises
    ------
    ValueError
        If the file is compressed, truncated, corrupt or no tar file, or if it does not end as described below.

    Notes
    -----
    The end-of-archive marker is two blocks of zeros; one is accepted. Up to a megabyte of zeros may follow as padding;
    more indicates a file that was allocated but not completely written. Without a marker, the file may be truncated
    between two members. Data after the marker indicates a second archive, or damage in the middle of the file.

    References
    ----------
    POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
    """
    total = file.seek(0, io.SEEK_END)
    place = 0
    notes: dict[bytes, bytes] = {}
    while place < total:
        block = read_part(file, place, _BLOCK)
        if block == _ZEROS:
            _check_end(file, place, total)
            return
        _check_header(block, place)
        kind = block[156:157]
        name = os.fsdecode(notes.get(b"path") or _name(block))
        size = int(notes[b"size"]) if b"size" in notes and kind not in _NOTES else _number(block[124:136])
        if size is None:
            raise _damaged(place)
        if kind in _WITHOUT_CONTENT or (kind == tarfile.AREGTYPE and name.endswith("/")):  # the latter: a V7 folder
            size = 0
        start = place + _BLOCK if kind != tarfile.GNUTYPE_SPARSE else _after_sparse_map(file, block, place + _BLOCK)
        if start + size > total:
            raise ValueError(
                f"truncated or damaged: the member at byte {place:,} would end at byte {start + size:,} of {total:,}"
            )
        if kind in _NOTES:
            notes |= _read_note(kind, file, start, size)
        else:
            is_link = kind in _LINKS
            if (kind in _FILES and not name.endswith("/")) or is_link:
                yield Member(name, start, size, zlib.crc32(block), is_link)
            notes = {}
        place = start + -(-size // _BLOCK) * _BLOCK
    if not total:
        raise ValueError("empty file")
    raise ValueError(
        "no end-of-archive marker, so members may be missing: copy the file again, or, if it is complete, append the "
        "marker: truncate -s +1024 FILE"
    )


def _check_end(file: File, place: int, total: int) -> None:
    """Raise ValueError if nonzero bytes or too many zeros follow a position."""
    if total - place > _MAX_END:
        raise ValueError(
            f"{total - place:,} bytes after the last member, more than {_MAX_END:,}: incomplete or damaged; "
            "copy the file again"
        )
    rest = read_part(file, place, total - place)
    number = len(rest) - len(rest.lstrip(b"\0"))
    if number < len(rest):
        raise ValueError(
            f"data at byte {place + number:,}, after the end-of-archive marker at byte {place:,}: concatenated or "
            "damaged; unpack with tar --ignore-zeros -xf FILE, check the number of images, and pack again"
        )


def _check_header(block: bytes, place: int) -> None:
    """Raise ValueError unless a block is a header with the right checksum."""
    # The checksum is the sum of all bytes, with spaces in place of the checksum.
    if len(block) == _BLOCK and sum(block) - sum(block[148:156]) + 8 * ord(" ") == _number(block[148:156]):
        return
    if place > 0:
        raise ValueError(f"truncated within the header at byte {place:,}") if len(block) < _BLOCK else _damaged(place)
    for start, kind in _COMPRESSED.items():
        if block.startswith(start):
            raise ValueError(
                f"compressed ({kind}), expected a plain tar file, which allows random access; decompress it first "
                "(compression hardly shrinks images)"
            )
    raise ValueError("not a tar file")


def _damaged(place: int) -> ValueError:
    return ValueError(f"damaged header at byte {place:,}")


def _number(field: bytes) -> int | None:
    """Parse a number of a header; None if the field is invalid.

    Octal digits, or a binary number after a byte 128 (GNU, from 8 GiB).
    """
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _name(block: bytes) -> bytes:
    name, prefix = (block[start:end].partition(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    # Where ustar has the prefix, GNU has times.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _after_sparse_map(file: File, block: bytes, place: int) -> int:
    """Return where the content of a GNU sparse file begins.

    Further blocks of its map precede the content.
    """
    is_continued = block[482:483]
    while is_continued not in (b"", b"\0"):
        is_continued = read_part(file, place, _BLOCK)[504:505]
        place += _BLOCK
    return place


def _read_note(kind: bytes, file: File, start: int, size: int) -> dict[bytes, bytes]:
    """Return the fields that a long name or a pax header sets for the next member."""
    if size > _MAX_NOTE:
        raise ValueError(
            f"damaged: a long name or pax header of {size:,} bytes at byte {start:,}, more than {_MAX_NOTE:,}"
        )
    content = read_part(file, start, size)
    if size and not content[:1].strip(b"\0"):  # otherwise, a name with the ending of an image would be lost
        raise _damaged(start)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": content.partition(b"\0")[0]}
    fields = dict(_pax_records(content, start))
    if b"size" in fields and not (fields[b"size"].isdigit() and len(fields[b"size"]) <= 20):
        raise _damaged(start)
    return fields


def _pax_records(content: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over pax records: length, space, `keyword=value`, line feed."""
    place = 0
    while place < len(content) and content[place]:  # some writers pad with zeros
        space = content.find(b" ", place, place + 8)
        digits = content[place:space]
        end = place + int(digits) if space > place and digits.isdigit() else 0
        keyword, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(content) or content[end - 1 : end] != b"\n" or not equals:
            raise _damaged(start)
        yield keyword, value
        place = end

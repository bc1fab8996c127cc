"""Images inside tar files, as WebDataset's shards have them: read where they lie, by offset, never unpacked.

Only headers are read when a source is opened, and none is believed: an archive is understood from its first block to
its last, or refused in one line. Names serve as labels and in messages. None is ever used as a path, and links, devices
and whatever else is no plain file are passed over.
"""

import io
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_train.image_files import (
    IMAGE_ENDINGS,
    ChooseBox,
    UnreadableImageError,
    decode_crop,
    decode_image,
    open_regular,
    printable,
    read_part,
    reason_of,
)
from prmim_train.names import PackedNames

__all__ = ["MAX_CLASSES", "Member", "TarSource", "open_tars", "tar_members"]

ImageArray = NDArray[np.uint8]

MAX_CLASSES = 2**20
"""A class number from here on is taken for a mistake."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_NOTE = 2**20  # bytes of a long name or of extended headers; real ones have hundreds
_MAX_LABEL = 64  # bytes of a .cls file

# Kinds of members, one character in the header: plain files; what has no content whatever its header says; notes about
# the member that follows. All other kinds have a content, which is passed over.
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME = b"L"
_EXTENDED = (b"x", b"X")
_OLD_SPARSE = b"S"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK": "zip",
}


@dataclass(frozen=True)
class TarSource:
    """Images inside plain tar files, decoded when they are read.

    Made by `open_tars`, or by `prmim_train.sources.open_source`.

    Parameters
    ----------
    shards : tuple of Path
        The tar files.
    names : sequence of str
        Of every image, as its archive has it.
    shard : int32 array (number of images,)
        Which tar file holds each image.
    offset, size : int64 arrays (number of images,)
        Where in it the content of each image lies, in bytes.
    header_crc : uint32 array (number of images,)
        Of the header in front of each: an archive that was changed under the run is not taken for the old one.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA).
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional

    Notes
    -----
    `read` opens the file anew each time, which takes microseconds, and keeps nothing: it may be called from any number
    of threads and processes at once, for any number of shards.
    """

    shards: tuple[Path, ...]
    names: Sequence[str]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    header_crc: NDArray[np.uint32]
    channels: int
    description: str
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def read(self, index: int) -> ImageArray:
        """Return one image, uint8 (height, width, channels); `UnreadableImageError` if that fails."""
        return decode_image(self._content(index), channels=self.channels, name=self.name(index))

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Return a box of one image, resized: see `prmim_train.sources.ImageSource`."""
        return decode_crop(self._content(index), size, choose, channels=self.channels, name=self.name(index))

    def _content(self, index: int) -> bytes:
        try:
            with open_regular(self.shards[self.shard[index]]) as file:
                both = read_part(file, int(self.offset[index]) - _BLOCK, _BLOCK + int(self.size[index]))
            if zlib.crc32(both[:_BLOCK]) != self.header_crc[index]:
                raise ValueError("changed since it was opened")
        except (OSError, ValueError) as error:
            raise UnreadableImageError(self.name(index), f"its tar file: {reason_of(error)}") from error
        return both[_BLOCK:]

    def name(self, index: int) -> str:
        """Return what to call an image in messages: its tar file, and its name in there."""
        return printable(f"{self.shards[self.shard[index]].name}/{self.names[index]}")


def open_tars(paths: Sequence[Path], *, channels: int) -> TarSource:
    """Make an index of the images in plain tar files.

    Parameters
    ----------
    paths : sequence of Path
        At least one.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA).

    Returns
    -------
    TarSource
        With labels if every image has a file of the same name up to the first dot, in the same folder of the same tar
        file, that ends in ``.cls`` and holds the number of its class; or else, if there are no such files, and all
        images lie in folders after those that they all share are left aside: the first of these is the class.

    Raises
    ------
    ValueError
        If a file is no tar file, compressed, truncated or damaged, or there are no images in them.
    OSError
        If a file cannot be opened.

    Notes
    -----
    Images are members whose names end like an image file's (`IMAGE_ENDINGS`, in either case); hidden ones, in whose
    path a part begins with a dot, are left out. Their order is that of the files given and of the members.
    """
    index = _Index()
    for number, path in enumerate(paths):
        try:
            with open_regular(path) as file:
                index.add(number, file)
        except ValueError as error:
            raise ValueError(f"data: the tar file {printable(str(path))}: {error}") from error
    if not len(index.names):
        raise ValueError(
            f"data: no images in {_which(paths)}: expected members whose names end in {', '.join(IMAGE_ENDINGS)}"
        )
    labels, class_names, remark = index.labels()
    return TarSource(
        shards=tuple(paths),
        names=index.names,
        shard=np.array(index.shard, np.int32),
        offset=np.array(index.offset, np.int64),
        size=np.array(index.size, np.int64),
        header_crc=np.array(index.header_crc, np.uint32),
        channels=channels,
        description=f"{_which(paths)}: {_images(len(index.names))}{remark}",
        labels=labels,
        class_names=class_names,
    )


def _which(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return f"tar file {printable(str(paths[0]))}"
    return f"{len(paths):,} tar files in {printable(os.path.commonpath([path.parent for path in paths]) or '.')}"


def _images(number: int) -> str:
    return f"{number:,} image" + ("" if number == 1 else "s")


# ----------------------------------------------------------------------------------------------------------- index


class _Index:
    """Collects the images of tar files, with what labels them."""

    def __init__(self) -> None:
        self.names = PackedNames()
        self.shard, self.offset, self.size, self.header_crc = array("i"), array("q"), array("q"), array("I")
        self.classes = array("i")  # of each image, from its .cls file; -1 without
        self.folder = array("i")  # of each image, as a number
        self.folders: dict[tuple[str, ...], int] = {}

    def add(self, number: int, file: io.FileIO) -> None:
        """Add what one tar file holds."""
        keys: list[str] = []
        class_of: dict[str, int] = {}
        for member in tar_members(file):
            parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
            if not parts or any(part.startswith(".") for part in parts):
                continue
            *folder, name = parts
            stem, _, ending = name.partition(".")
            key = "/".join((*folder, stem))
            if name.lower().endswith(IMAGE_ENDINGS):
                keys.append(key)
                self._append(number, member, tuple(folder))
            elif ending == "cls":
                class_of[key] = _read_class(file, member)
        self.classes.extend(class_of.get(key, -1) for key in keys)

    def _append(self, number: int, member: "Member", folder: tuple[str, ...]) -> None:
        self.names.append(member.name)
        self.shard.append(number)
        self.offset.append(member.offset)
        self.size.append(member.size)
        self.header_crc.append(member.header_crc)
        self.folder.append(self.folders.setdefault(folder, len(self.folders)))

    def labels(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None, str]:
        """Return the label of every image, the names of the classes, and words for it."""
        labels = np.array(self.classes, np.int64)
        if (labels >= 0).all():
            class_names = tuple(str(k) for k in range(int(labels.max()) + 1))
            return labels, class_names, _in_classes(len(class_names))
        if (labels >= 0).any():
            return None, None, f", no labels ({_images(int((labels < 0).sum()))} without .cls file)"
        classes = _classes_of_folders(list(self.folders))
        if classes is None:
            return None, None, ", no labels"
        class_names = tuple(sorted(set(classes)))
        number = {name: k for k, name in enumerate(class_names)}
        label_of_folder = np.array([number[name] for name in classes], np.int64)
        printed = tuple(printable(name) for name in class_names)
        return label_of_folder[np.array(self.folder)], printed, _in_classes(len(class_names))


def _in_classes(number: int) -> str:
    return f" in {number:,} class" + ("" if number == 1 else "es")


def _classes_of_folders(folders: Sequence[tuple[str, ...]]) -> list[str] | None:
    """Return the class that each folder stands for; None if some images lie where all the folders begin."""
    first, last = min(folders), max(folders)  # what these two share, all between them do
    shared = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return None if any(len(folder) == shared for folder in folders) else [folder[shared] for folder in folders]


def _read_class(file: io.FileIO, member: "Member") -> int:
    text = read_part(file, member.offset, min(member.size, _MAX_LABEL)).strip()
    if not text.isdigit() or member.size > _MAX_LABEL or int(text) >= MAX_CLASSES:
        got = printable(os.fsdecode(text))
        raise ValueError(f"{printable(member.name)}: expected a class, from 0 to {MAX_CLASSES - 1:,}, got {got!r}")
    return int(text)


# --------------------------------------------------------------------------------------------------------- headers


class Member(NamedTuple):
    """A plain file inside a tar file: its name, where its content lies (bytes), and the CRC-32 of its header."""

    name: str
    offset: int
    size: int
    header_crc: int


def tar_members(file: io.FileIO) -> Iterator[Member]:
    """Give the plain files inside a tar file, in their order, reading headers only.

    Parameters
    ----------
    file : binary file

    Yields
    ------
    Member
        With its name as the archive has it, long names of GNU and POSIX included.

    Raises
    ------
    ValueError
        If this is no tar file or a compressed one, if it ends within a member, or if a header is damaged.

    References
    ----------
    POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format". As there,
    the archive ends with its first block of zeros.
    """
    total = os.fstat(file.fileno()).st_size
    place, notes = 0, _Notes()
    while place < total:
        header = read_part(file, place, _BLOCK)
        if header == _ZEROS:
            return
        _check_header(header, place)
        kind = header[156:157]
        is_note = kind == _LONG_NAME or kind in _EXTENDED
        start = place + _BLOCK if kind != _OLD_SPARSE else _after_sparse_map(file, header, place + _BLOCK)
        name = notes.name or _name(header)
        size = _number(header[124:136]) if notes.size is None or is_note else notes.size
        if size is None:
            raise _damaged(place)
        if kind in _WITHOUT_CONTENT or (kind == b"\0" and name.endswith("/")):  # the latter: a folder, long ago
            size = 0
        if start + size > total:
            raise ValueError(
                f"truncated or damaged: the member at byte {place:,} would end at byte {start + size:,} of {total:,}"
            )
        if is_note:
            notes.read(kind, file, start, size)
        else:
            if kind in _FILES and not name.endswith("/"):
                yield Member(name, start, size, zlib.crc32(header))
            notes = _Notes()
        place = start + -(-size // _BLOCK) * _BLOCK


@dataclass
class _Notes:
    """What members without a content of their own say about the one that follows."""

    name: str | None = None
    size: int | None = None

    def read(self, kind: bytes, file: io.FileIO, start: int, size: int) -> None:
        if size > _MAX_NOTE:
            raise ValueError(f"damaged: {size:,} bytes of notes at byte {start:,}, more than {_MAX_NOTE:,}")
        content = read_part(file, start, size)
        if kind == _LONG_NAME:
            self.name = os.fsdecode(content.partition(b"\0")[0])
            return
        for keyword, value in _extended_records(content, start):
            if keyword == b"path":
                self.name = os.fsdecode(value)
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise _damaged(start)
                self.size = int(value)


def _extended_records(content: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Give the records of an extended header: each is its length in digits, a space, `keyword=value`, a line feed."""
    place = 0
    while place < len(content) and content[place]:  # some writers fill the block with zeros
        space = content.find(b" ", place, place + 8)
        digits = content[place:space]
        end = place + int(digits) if space > place and digits.isdigit() else 0
        keyword, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(content) or content[end - 1 : end] != b"\n" or not equals:
            raise _damaged(start)
        yield keyword, value
        place = end


def _check_header(header: bytes, place: int) -> None:
    if len(header) == _BLOCK and _sum(header) == _number(header[148:156]):
        return
    if place == 0:
        for start, kind in _COMPRESSED.items():
            if header.startswith(start):
                raise ValueError(
                    f"compressed ({kind}), expected a plain tar file, in which any image can be found at once; "
                    "decompress it first (images hardly shrink, so little is lost)"
                )
        raise ValueError("not a tar file")
    raise ValueError(f"truncated within the header at byte {place:,}") if len(header) < _BLOCK else _damaged(place)


def _damaged(place: int) -> ValueError:
    return ValueError(f"damaged header at byte {place:,}")


def _sum(header: bytes) -> int:
    """Return the sum of all bytes, those of the sum itself counted as spaces."""
    return sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int | None:
    """Read a number: octal digits or (GNU, from 8 GiB on) binary after a byte 128; None if it is neither."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _after_sparse_map(file: io.FileIO, header: bytes, place: int) -> int:
    """Return where the content of a file with holes begins: behind blocks that continue the list of its parts."""
    goes_on = header[482:483]
    while goes_on not in (b"", b"\0"):
        goes_on = read_part(file, place, _BLOCK)[504:505]
        place += _BLOCK
    return place

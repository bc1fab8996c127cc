"""Images in uncompressed tar files (WebDataset shards): an index of offsets, and random access without unpacking.

Opening a source reads headers only and trusts none of them: every archive is parsed completely or refused with a
one-line error. Member names serve as labels and in messages, never as paths. Devices and other special members are
skipped; so are links, which are counted.
"""

import io
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_methods.files import open_regular
from prmim_methods.messages import printable
from prmim_train.data.identity import Identities, identities
from prmim_train.data.image_files import (
    IMAGE_ENDINGS,
    MAX_PIXELS,
    ChooseBox,
    UnreadableImageError,
    check_header,
    counted,
    decode_crop,
    decode_image,
    read_part,
    reason_of,
)
from prmim_train.data.names import MAX_CLASSES, PackedNames, number_classes

__all__ = ["Member", "TarSource", "open_tars", "tar_members"]

ImageArray = NDArray[np.uint8]

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_NOTE = 2**20  # bytes of a long name or of a pax header; real ones have hundreds
_MAX_LABEL = 64  # bytes of a .cls file
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
class TarSource:
    """Images in uncompressed tar files, decoded on access.

    Created by `open_tars` or `prmim_train.data.sources.open_source`.

    Parameters
    ----------
    shards : tuple of Path
        The tar files.
    names : sequence of str
        Member name of each image.
    shard : int32 array (number of images,)
        Index into `shards` of each image.
    offset, size : int64 arrays (number of images,)
        Position and length of each image's content in its tar file, in bytes.
    header_crc : uint32 array (number of images,)
        CRC-32 of the header block before each image's content. Detects archives that changed during a run.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA).
    description : str
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    max_pixels : int, optional
        Larger images are unreadable.

    Notes
    -----
    `read` opens the tar file for each image, which takes microseconds, and keeps no state. Any number of threads and
    processes can read at the same time, from any number of shards.
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
    max_pixels: int = MAX_PIXELS
    frames: None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def read(self, index: int) -> ImageArray:
        """Decode one image; see `prmim_train.data.sources.ImageSource`."""
        content, name = self._content(index), self.name(index)
        return decode_image(content, channels=self.channels, max_pixels=self.max_pixels, name=name)

    def read_crop(self, index: int, size: tuple[int, int], choose: ChooseBox) -> ImageArray:
        """Decode and resize a box of one image; see `prmim_train.data.sources.ImageSource`."""
        content, name = self._content(index), self.name(index)
        return decode_crop(content, size, choose, channels=self.channels, max_pixels=self.max_pixels, name=name)

    def check_header(self, index: int) -> None:
        """Check the header of one image; see `prmim_train.data.sources.ImageSource`."""
        place = int(self.offset[index]), int(self.size[index])
        check_header(self.shards[self.shard[index]], *place, max_pixels=self.max_pixels, name=self.name(index))

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
        """Return the image's name for messages: file name of the shard, then the member name."""
        return printable(f"{self.shards[self.shard[index]].name}/{self.names[index]}")

    def identities(self) -> Identities:
        """Hash member name and size; see `prmim_train.data.sources.ImageSource`."""
        return identities(
            (os.fsencode(f"{name} {size}"), crc)
            for name, size, crc in zip(self.names, self.size.tolist(), self.header_crc.tolist(), strict=True)
        )


def open_tars(paths: Sequence[Path], *, channels: int, max_pixels: int = MAX_PIXELS) -> TarSource:
    """Index the images in uncompressed tar files.

    Parameters
    ----------
    paths : sequence of Path
        At least one.
    channels : int
        1 (grey), 3 (RGB) or 4 (RGBA).
    max_pixels : int, optional
        Larger images are unreadable.

    Returns
    -------
    TarSource
        Labels come from ``key.cls`` files, which hold a class number: every image needs one in the same folder of the
        same tar file, with the same name up to the first dot. Without any ``.cls`` file, labels come from folders: the
        first folder after those that all images share is the class. Otherwise there are no labels.

    Raises
    ------
    ValueError
        If a file is compressed, truncated, corrupt or no tar file, if its end is missing or followed by more data (see
        `tar_members`), or if no file contains images.
    OSError
        If a file cannot be opened.

    Notes
    -----
    Images are members whose names end in one of `IMAGE_ENDINGS`, in upper or lower case, in the order of `paths` and of
    the members. Hidden members (a part of the path starts with a dot) are skipped. Links whose names end like an
    image's are skipped and counted in the description.
    """
    index = _Index()
    for number, path in enumerate(paths):
        try:
            with open_regular(path) as file:
                index.add(number, file)
        except ValueError as error:
            raise ValueError(f"data: the tar file {printable(str(path))}: {error}") from error
    where = (
        f"tar file {printable(str(paths[0]))}"
        if len(paths) == 1
        else f"{len(paths):,} tar files in {printable(os.path.commonpath([path.parent for path in paths]) or '.')}"
    )
    if not len(index.names):
        raise ValueError(f"data: no images in {where}: expected members whose names end in {', '.join(IMAGE_ENDINGS)}")
    labels, class_names, remark = index.labels()
    skipped = f", {counted(index.num_links, 'link')} skipped" if index.num_links else ""
    return TarSource(
        shards=tuple(paths),
        names=index.names,
        shard=np.array(index.shard, np.int32),
        offset=np.array(index.offset, np.int64),
        size=np.array(index.size, np.int64),
        header_crc=np.array(index.header_crc, np.uint32),
        channels=channels,
        description=f"{where}: {counted(len(index.names), 'image')}{remark}{skipped}",
        labels=labels,
        class_names=class_names,
        max_pixels=max_pixels,
    )


# ----------------------------------------------------------------------------------------------------------- index


class _Index:
    """Offsets and labels of the images in tar files."""

    def __init__(self) -> None:
        self.names = PackedNames()
        self.shard, self.offset, self.size, self.header_crc = array("i"), array("q"), array("q"), array("I")
        self.classes = array("i")  # number in each image's .cls file; -1 without
        self.folder = array("i")  # index into `folders` of each image
        self.folders: dict[tuple[str, ...], int] = {}
        self.num_links = 0  # with names of images

    def add(self, number: int, file: io.FileIO) -> None:
        """Add the images of one tar file."""
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
                if member.is_link:
                    self.num_links += 1
                    continue
                keys.append(key)
                self._append(number, member, tuple(folder))
            elif ending == "cls" and not member.is_link:
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
        """Return the labels, the class names, and a phrase that describes them."""
        labels = np.array(self.classes, np.int64)
        is_missing = labels < 0
        if not is_missing.any():
            class_names = tuple(str(k) for k in range(int(labels.max()) + 1))
        elif not is_missing.all():
            return None, None, f", no labels ({counted(int(is_missing.sum()), 'image')} without .cls file)"
        elif (classes := _classes_of_folders(list(self.folders))) is None:
            return None, None, ", no labels"
        else:
            label_of_folder, class_names = number_classes(classes)
            labels = label_of_folder[np.array(self.folder)]
        return labels, class_names, f" in {counted(len(class_names), 'class', 'classes')}"


def _classes_of_folders(folders: Sequence[tuple[str, ...]]) -> list[str] | None:
    """Return the class name of each folder; None if images lie directly in the folder that all share."""
    first, last = min(folders), max(folders)  # the common prefix of these two is that of all folders
    shared = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return None if any(len(folder) == shared for folder in folders) else [folder[shared] for folder in folders]


def _read_class(file: io.FileIO, member: "Member") -> int:
    text = read_part(file, member.offset, min(member.size, _MAX_LABEL)).strip()
    if not text.isdigit() or member.size > _MAX_LABEL or int(text) >= MAX_CLASSES:
        got = printable(os.fsdecode(text))
        raise ValueError(f"{printable(member.name)}: expected a class, from 0 to {MAX_CLASSES - 1:,}, got {got!r}")
    return int(text)


# --------------------------------------------------------------------------------------------------------- members
#
# Not parsed by `tarfile`, which takes three times as long and does not suit untrusted files. It takes a damaged header
# for the end of the archive, guesses at malformed pax records, and accepts negative sizes. Long names, pax headers and
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


def tar_members(file: io.FileIO) -> Iterator[Member]:
    """Iterate over the regular files and links in a tar file, in order, reading headers only.

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
    The end-of-archive marker is two blocks of zeros; one is accepted. Up to a megabyte of zeros may follow as padding:
    more look like a file that was allocated and is not yet written. Without a marker, the file may be truncated between
    two members. Data after the marker belongs to a second archive, or the marker is damage in the middle of the file.

    References
    ----------
    POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
    """
    total = os.fstat(file.fileno()).st_size
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


def _check_end(file: io.FileIO, place: int, total: int) -> None:
    """Raise ValueError unless a file has only zeros from a place on."""
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
    """Parse octal digits, or a binary number after a byte 128 (GNU, from 8 GiB); None if the field is neither."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _name(block: bytes) -> bytes:
    name, prefix = (block[start:end].partition(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    # Where ustar has the prefix, GNU has times.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _after_sparse_map(file: io.FileIO, block: bytes, place: int) -> int:
    """Return where the content of a GNU sparse file begins: after the blocks that continue its map."""
    is_continued = block[482:483]
    while is_continued not in (b"", b"\0"):
        is_continued = read_part(file, place, _BLOCK)[504:505]
        place += _BLOCK
    return place


def _read_note(kind: bytes, file: io.FileIO, start: int, size: int) -> dict[bytes, bytes]:
    """Return the fields that a long name or a pax header sets for the next member."""
    if size > _MAX_NOTE:
        raise ValueError(
            f"damaged: a long name or pax header of {size:,} bytes at byte {start:,}, more than {_MAX_NOTE:,}"
        )
    content = read_part(file, start, size)
    if size and not content[:1].strip(b"\0"):  # else a name would be lost, and with it the ending of an image's
        raise _damaged(start)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": content.partition(b"\0")[0]}
    fields = dict(_pax_records(content, start))
    if b"size" in fields and not (fields[b"size"].isdigit() and len(fields[b"size"]) <= 20):
        raise _damaged(start)
    return fields


def _pax_records(content: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over pax records: length in digits, a space, `keyword=value`, a line feed."""
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

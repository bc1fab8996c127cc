"""Folders of images that are the frames or slices of one clip or volume each."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prmim_methods.messages import counted, printable
from prmim_train.data.formats.stack_files import StackSource
from prmim_train.data.formats.stacks import Stack
from prmim_train.data.identity import Identities, identities_of_files
from prmim_train.data.image_files import (
    MAX_PIXELS,
    decode_image,
    image_endings,
    named_errors,
    open_part,
    read_file,
    read_header,
)
from prmim_train.data.names import PackedNames, classes_of_folders, ending_of, skipped
from prmim_train.data.paths import Parts
from prmim_train.data.transforms import plane_of

__all__ = ["FrameFolders", "FrameSource", "FrameStack", "find_frame_folders", "sorted_frames"]

_MULTI_PAGE = ("GIF", "PNG", "TIFF", "WEBP")  # but not JPEG, where further pictures are previews
_NUMBER = re.compile(r"(\d+)")


class FrameStack:
    """A folder of frames as one item; see `prmim_train.data.formats.stacks.Stack`.

    Parameters
    ----------
    folder : Path
    channels : int
        Of the frames that are read: 1 (grey), 3 (RGB) or 4 (RGBA).
    max_pixels : int, optional
        Larger frames are refused.

    Attributes
    ----------
    shape : (frames, height, width)
        The size is that of the first frame.
    channels : int
        Of the file of the first frame.
    depth : "uint8", "uint16" or "float32"
        Of the first frame.
    spacing, rate : None
    is_array : False

    Raises
    ------
    ValueError
        If there are no frames, or the first one is unreadable or a stack itself.
    OSError
        If the folder cannot be read.
    """

    spacing = None
    rate = None
    is_array = False

    def __init__(self, folder: Path, channels: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self._folder, self._channels, self._max_pixels = folder, channels, max_pixels
        self._names = sorted_frames(path.name for path in folder.iterdir())
        if not self._names:
            raise ValueError("no frames")
        with closing(open_part(folder / self._names[0])) as file:
            first = read_header(file, max_pixels=max_pixels, name=printable(self._names[0]))
            _check_single(file, printable(self._names[0]))
        self.shape = (len(self._names), *plane_of(first.shape))
        self.channels, self.depth = first.channels, first.depth

    def read(self, frames: NDArray[np.int64], box: tuple[int, int, int, int]) -> NDArray[Any]:
        """Return a box of some frames, in the type of the files.

        Shape (number of frames, height, width, channels).

        Parameters
        ----------
        frames : int array
            Numbers of frames, sorted. May repeat.
        box : (top, left, height, width)
            In pixels.

        Raises
        ------
        ValueError
            If a requested frame is unreadable, or its size differs from the first.
        """
        wanted, places = np.unique(frames, return_inverse=True)
        return np.stack([self._read(self._names[number], box) for number in wanted])[places]

    def _read(self, name: str, box: tuple[int, int, int, int]) -> NDArray[Any]:
        shown = printable(name)
        image = decode_image(
            self._content(name),
            channels=self._channels,
            max_pixels=self._max_pixels,
            name=shown,
            depth=self.depth,
        )
        if image.shape[:2] != self.shape[1:]:
            raise ValueError(
                f"frames of different sizes: {shown} has {image.shape[1]} x {image.shape[0]} pixels, "
                f"{printable(self._names[0])} {self.shape[2]} x {self.shape[1]}"
            )
        top, left, height, width = box
        return image[top : top + height, left : left + width]

    def _content(self, name: str) -> bytes:
        with named_errors(printable(name)):
            return read_file(self._folder / name)


def _check_single(file: BinaryIO, name: str) -> None:
    """Raise ValueError if a file holds several pictures of one size.

    Pictures of other sizes are previews.
    """
    file.seek(0)
    try:
        picture = Image.open(file, formats=_MULTI_PAGE)
    except UnidentifiedImageError:
        return
    number, size = getattr(picture, "n_frames", 1), picture.size
    if number > 1:
        picture.seek(1)
        if picture.size == size:
            raise ValueError(
                f"{name} has {number:,} pages, expected one frame; save each page as a file of its own, or all as .npy"
            )


def sorted_frames(names: Iterable[str]) -> list[str]:
    """Return the names of the frames in a folder, sorted by their numbers.

    Frames are the images of the most frequent ending, without hidden files.

    Examples
    --------
    >>> sorted_frames(["img_10.jpg", "img_9.jpg", "mask.png", "info.txt"])
    ['img_9.jpg', 'img_10.jpg']
    """
    return sorted(_frames(names), key=_natural_order)


def _frames(names: Iterable[str]) -> list[str]:
    of_ending: dict[str, list[str]] = defaultdict(list)
    endings = image_endings()
    for name in names:
        if name.lower().endswith(endings) and not name.startswith("."):
            of_ending[ending_of(name)].append(name)
    return max(of_ending.values(), key=lambda found: (len(found), ending_of(found[0])), default=[])


def _natural_order(name: str) -> tuple[list[str | int], str]:
    # Text and digits alternate, so parts of two names have comparable types.
    return [int(part) if k % 2 else part for k, part in enumerate(_NUMBER.split(name))], name


@dataclass(frozen=True)
class FrameFolders:
    """Folders of frames below a folder.

    Parameters
    ----------
    folder : Path
    clips : sequence of str
        Paths of the folders of frames, relative to `folder`.
    labels : int64 array (number of clips,), optional
    class_names : tuple of str, optional
    """

    folder: Path
    clips: Sequence[str]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.clips)

    def path(self, index: int) -> Path:
        """Return the folder of one clip."""
        return self.folder / self.clips[index]

    def name(self, index: int) -> str:
        """Return the clip's name for messages: its path relative to the folder."""
        return printable(self.clips[index])

    def identities(self) -> Identities:
        """Hash the names of the frames in every folder.

        The stamp is the modification time of the folder. A folder that cannot be examined has no frames and time 0.
        """
        return identities_of_files(self.clips, self._names_and_time)

    def _names_and_time(self, clip: str) -> tuple[list[str], int]:
        folder = self.folder / clip
        try:
            return sorted_frames(path.name for path in folder.iterdir()), int(folder.stat().st_mtime)
        except OSError:
            return [], 0


@dataclass(frozen=True)
class FrameSource(StackSource):
    """Source of folders of frames; see `prmim_train.data.sources.ImageSource`.

    Parameters
    ----------
    records : FrameFolders
    """

    records: Any

    @contextmanager
    def _opened(self, index: int) -> Iterator[Stack]:
        with named_errors(self.name(index)):
            yield FrameStack(self.records.path(index), self.channels, max_pixels=self.max_pixels)


def find_frame_folders(folder: Path, files: Sequence[Parts]) -> tuple[FrameFolders, str] | None:
    """Return the folders that are clips, and a description; None if there are none.

    A clip is a folder with at least two images of one ending. Its class is that of
    `prmim_train.data.names.classes_of_folders`, for the folder that it lies in.

    Parameters
    ----------
    folder : Path
    files : sequence of tuples of str
        All files below it, as parts of paths.

    Raises
    ------
    ValueError
        If `folder` itself is the only clip, or a clip lies in another one.
    """
    names: dict[Parts, list[str]] = defaultdict(list)
    for parts in files:
        names[parts[:-1]].append(parts[-1])
    frames = {parts: found for parts in sorted(names) if len(found := _frames(names[parts])) > 1}
    where = printable(str(folder))
    clips = list(frames)
    if not clips:
        return None
    if clips == [()]:
        raise ValueError(f"data: {where} is one clip of {len(frames[()]):,} frames; expected a folder of clips")
    for outer, inner in pairwise(clips):
        if inner[: len(outer)] == outer:
            both = [printable(str(folder.joinpath(*parts))) for parts in (outer, inner)]
            raise ValueError(f"data: frames in {both[0]} and in {both[1]}; expected no clip inside another")
    numbers: dict[Parts, int] = {}
    index = [numbers.setdefault(parts[:-1], len(numbers)) for parts in clips]
    labels, class_names, remark = classes_of_folders(list(numbers), np.array(index))
    others = Counter(ending_of(parts[-1]) for parts in files)
    others -= Counter(ending_of(name) for found in frames.values() for name in found)
    lengths = sorted({len(found) for found in frames.values()})
    span = " to ".join(f"{length:,}" for length in (lengths[0], *lengths[1:][-1:]))
    records = FrameFolders(folder, PackedNames("/".join(parts) for parts in clips), labels, class_names)
    return records, f"folder {where}: {counted(len(clips), 'folder')} of {span} frames{remark}{skipped(others)}"

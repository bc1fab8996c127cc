"""Image files in a folder."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import counted, printable
from prmim_train.config.training import CLIP_EXAMPLE, VOLUME_EXAMPLE
from prmim_train.data.formats.nifti import NIFTI_ENDINGS
from prmim_train.data.formats.tar_shards import COMPRESSED_TARS
from prmim_train.data.formats.video import VIDEO_ENDINGS
from prmim_train.data.identity import Identities, identities_of_files
from prmim_train.data.image_files import (
    ARRAY_ENDING,
    IMAGE_ENDINGS,
    image_endings,
    missing_plugins,
    open_part,
    read_file,
    read_header,
)
from prmim_train.data.names import PackedNames, classes_of_folders, ending_of, skipped
from prmim_train.data.paths import Parts, with_endings

__all__ = ["FolderRecords", "open_folder"]


@dataclass(frozen=True)
class FolderRecords:
    """Image files in a folder; see `prmim_train.data.formats.records.Records`.

    Parameters
    ----------
    folder : Path
    files : sequence of str
        Paths relative to `folder`.
    labels : int64 array (number of images,), optional
    class_names : tuple of str, optional
    """

    folder: Path
    files: Sequence[str]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def content(self, index: int) -> bytes:
        """Read one file."""
        return read_file(self.folder / self.files[index])

    def open(self, index: int) -> BinaryIO:
        """Open one file."""
        return open_part(self.folder / self.files[index])

    def name(self, index: int) -> str:
        """Return the image's name for messages: its path relative to the folder."""
        return printable(self.files[index])

    def identities(self) -> Identities:
        """Read size and modification time of every file, and hash path and size.

        A file that cannot be examined has size -1 and time 0.
        """
        return identities_of_files(self.files, self._size_and_time)

    def _size_and_time(self, name: str) -> tuple[int, int]:
        try:
            status = (self.folder / name).stat()
        except OSError:
            return -1, 0
        return status.st_size, int(status.st_mtime)


def open_folder(
    folder: Path, files: Sequence[Parts], *, max_pixels: int, endings: tuple[str, ...] | None = None
) -> tuple[FolderRecords, str]:
    """Find the images in a folder; see `prmim_train.data.sources.open_source`.

    Parameters
    ----------
    folder : Path
    files : sequence of tuples of str
        All files below it; see `prmim_train.data.paths.walk`.
    max_pixels : int
        Larger images do not identify an ending as one of images.
    endings : tuple of str, optional
        Endings of clips and volumes. Default: the files are images.

    Returns
    -------
    records : FolderRecords
    description : str

    Raises
    ------
    ValueError
        If there are no images.
    """
    images = with_endings(files, endings or image_endings())
    if not images and endings is None:
        images = _by_content(folder, files, max_pixels)
    found = Counter(ending_of(parts[-1]) for parts in files)
    where = printable(str(folder))
    if not images:
        others = skipped(found).removeprefix(", ").replace(" skipped", "") or "no files found"
        expected = f"expected names ending in {', '.join(endings or IMAGE_ENDINGS)}"
        raise ValueError(f"data: no images in {where}: {others}; {expected}{_hint(found)}")
    numbers: dict[Parts, int] = {}
    index = [numbers.setdefault(parts[:-1], len(numbers)) for parts in images]
    labels, class_names, remark = classes_of_folders(list(numbers), np.array(index))
    found -= Counter(ending_of(parts[-1]) for parts in images)
    records = FolderRecords(folder, PackedNames("/".join(parts) for parts in images), labels, class_names)
    noun = "video" if endings is not None and images[0][-1].lower().endswith(VIDEO_ENDINGS) else "image"
    return records, f"folder {where}: {counted(len(records), noun)}{remark}{skipped(found)}"


def _hint(endings: Collection[str]) -> str:
    """Return advice for files of these endings; empty for unknown endings."""
    if set(COMPRESSED_TARS).intersection(endings):
        return "; decompress tar files"
    if set(NIFTI_ENDINGS).intersection(endings):
        return f"; for volumes, write {VOLUME_EXAMPLE}"
    if set(VIDEO_ENDINGS).intersection(endings):
        return f"; for clips, write {CLIP_EXAMPLE}, or --clips true with prmim stats"
    return missing_plugins(endings)


def _by_content(folder: Path, files: Sequence[Parts], max_pixels: int) -> list[Parts]:
    """Return the files of endings that have an image among their first files.

    Without any, returns the arrays.
    """
    samples: dict[str, list[Parts]] = {}
    for parts in files:
        sample = samples.setdefault(ending_of(parts[-1]), [])
        if len(sample) < _NUM_SAMPLES:
            sample.append(parts)
    arrays, raw = samples.pop(ARRAY_ENDING, []), _RAW.intersection(samples)
    chosen = {
        ending
        for ending, sample in samples.items()
        if ending not in raw and any(_is_image(folder.joinpath(*parts), max_pixels) for parts in sample)
    }
    if not chosen and arrays:
        chosen = {ARRAY_ENDING}
    return [parts for parts in files if ending_of(parts[-1]) in chosen]


def _is_image(path: Path, max_pixels: int) -> bool:
    try:
        with open_part(path) as file:
            read_header(file, max_pixels=max_pixels)
    except (OSError, ValueError):
        return False
    return True


_NUM_SAMPLES = 8  # number of files per ending that are examined
# Pillow takes these for TIFF files, and reads the preview.
_RAW = frozenset((".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".sr2", ".srw"))

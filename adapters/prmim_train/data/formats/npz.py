"""Images and labels from a NumPy archive.

They are read without pickle, and checked before memory is allocated.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prmim_methods.files import open_regular
from prmim_methods.hardware import physical_memory
from prmim_methods.messages import printable
from prmim_train.config.training import VOLUME_EXAMPLE
from prmim_train.data.depth import SourceArray, depth_of
from prmim_train.data.formats.npy import read_npy_header
from prmim_train.data.image_files import reason_of
from prmim_train.data.names import MAX_CLASS_NAME, MAX_CLASSES

__all__ = ["read_npz"]

_MAX_DEFLATION = 1032  # largest compression ratio of deflate; higher stated ratios are false
_MAX_LISTED = 10
_USED = ("images", "labels", "names")


def read_npz(
    path: Path, channels: int | None, *, has_frames: bool = False
) -> tuple[SourceArray, NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Read images or clips from a ``.npz`` file, with labels and class names.

    Parameters
    ----------
    path : Path
        Archive with ``images`` (N, height, width) or (N, height, width, channels), of one of the types in
        `prmim_train.data.depth.DEPTHS`, and optionally ``labels`` (N,), integers from 0, and ``names``, one string per
        class. Clips have the frames after N.
    channels : int
        Number of channels that the images must have; None: any.
    has_frames : bool, optional
        Whether the items are clips or volumes. Default: images.

    Returns
    -------
    images : array (N, height, width, channels) or (N, frames, height, width, channels)
    labels : int64 array (N,) or None
    class_names : tuple of str or None
        The class numbers if the file has labels but no names. None without labels.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the content is invalid or ambiguous (concatenated archives, two arrays of one name), or contains Python
        objects, which would need pickle.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: no such file: {path}")
    with _opened(path) as archive:
        images = _read_images(archive, channels, has_frames)
        labels = _read_labels(archive, len(images))
        return images, labels, _read_names(archive, labels)


@contextmanager
def _opened(path: Path) -> Iterator["_Archive"]:
    where = printable(str(path))
    try:
        raw = open_regular(path)
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from error
    with raw, io.BufferedReader(raw) as file:
        try:
            opened = zipfile.ZipFile(file)
        except Exception as error:  # corrupt archives raise many types of errors
            reason = "not a zip archive" if isinstance(error, zipfile.BadZipFile) else reason_of(error)
            raise ValueError(f"data: {where} is not a .npz file ({reason}); write it with numpy.savez") from error
        with opened:
            yield _Archive(opened, where)


class _Archive:
    """Arrays of a ``.npz`` file.

    Errors are ValueErrors that name the file and the array.
    """

    def __init__(self, archive: zipfile.ZipFile, path: str) -> None:
        self._archive, self.path = archive, path
        self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        # Only the last of several archives or arrays would be read.
        if min((info.header_offset for info in archive.infolist()), default=0) > 0:
            raise ValueError(f"data: {path} has other data before its arrays: concatenated or damaged")
        if twice := [name for name in _USED if self.names.count(name) > 1]:
            raise ValueError(f"data: {path} has more than one array '{twice[0]}'")

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
        """Return shape and dtype of an array, checked against its number of bytes."""
        try:
            info = self._archive.getinfo(f"{name}.npy")
            with self._archive.open(info) as file:
                shape, dtype, header_size = read_npy_header(file)
            expected = header_size + math.prod(shape) * dtype.itemsize
            if expected != info.file_size or info.file_size > _MAX_DEFLATION * (info.compress_size + 1):
                raise ValueError(
                    f"{dtype} {shape} takes {expected:,} bytes, which do not match the {info.compress_size:,} stored"
                )
            if expected > (memory := physical_memory() or math.inf):
                raise ValueError(f"{dtype} {shape} takes {expected:,} bytes, more than the memory of {memory:,}")
        except Exception as error:
            raise self.error(name, error) from error
        return shape, dtype

    def read(self, name: str) -> NDArray[np.generic]:
        """Return an array; check its header first."""
        try:
            with self._archive.open(f"{name}.npy") as file:
                array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
                return array
        except Exception as error:
            raise self.error(name, error) from error

    def error(self, name: str, error: Exception) -> ValueError:
        return ValueError(f"data: array '{name}' of {self.path} cannot be read: {reason_of(error)}")


def _read_images(archive: _Archive, channels: int | None, has_frames: bool) -> SourceArray:
    path = archive.path
    if "images" not in archive.names:
        listed = [printable(name) for name in archive.names[:_MAX_LISTED]] + ["..."] * (
            len(archive.names) > _MAX_LISTED
        )
        raise ValueError(f"data: no array 'images' in {path}, only {', '.join(listed) or 'nothing'}")
    shape, dtype = archive.header("images")
    try:
        depth_of(dtype)
    except ValueError as error:
        raise ValueError(f"data: 'images' of {path}: {error}") from error
    axes = "N, frames, height, width" if has_frames else "N, height, width"
    axes_count = axes.count(",") + 1
    if len(shape) not in (axes_count, axes_count + 1):
        hint = f"; for clips or volumes, write {VOLUME_EXAMPLE}" if len(shape) == 5 else ""
        raise ValueError(f"data: 'images' of {path}: expected ({axes}) or ({axes}, channels), got {shape}{hint}")
    shape = (*shape, 1) if len(shape) == axes_count else shape
    if 0 in shape:
        raise ValueError(f"data: no images in {path}: 'images' is {shape}")
    if channels not in (None, shape[-1]):
        raise ValueError(f"channels: {path} has {shape[-1]} channels, got {channels}")
    images: SourceArray = archive.read("images").reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    return images


def _read_labels(archive: _Archive, number: int) -> NDArray[np.int64] | None:
    if "labels" not in archive.names:
        return None
    shape, dtype = archive.header("labels")
    if dtype.kind not in "iu":
        raise ValueError(f"data: 'labels' of {archive.path}: expected integers, got {dtype}")
    if shape != (number,):
        raise ValueError(f"data: 'labels' of {archive.path}: expected ({number},), one per image, got {shape}")
    labels = archive.read("labels")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= MAX_CLASSES:
        raise ValueError(
            f"data: 'labels' of {archive.path}: expected classes from 0 to {MAX_CLASSES - 1:,}, "
            f"got {smallest if smallest < 0 else largest}"
        )
    return labels.astype(np.int64)


def _read_names(archive: _Archive, labels: NDArray[np.int64] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    largest = int(labels.max())
    if "names" not in archive.names:
        return tuple(str(k) for k in range(largest + 1))
    shape, dtype = archive.header("names")
    if len(shape) != 1 or dtype.kind != "U" or dtype.itemsize > 4 * MAX_CLASS_NAME or shape[0] > MAX_CLASSES:
        raise ValueError(f"data: 'names' of {archive.path}: expected a list of strings, got {dtype} {shape}")
    if shape[0] <= largest:
        raise ValueError(
            f"data: 'names' of {archive.path}: expected a name for each class up to {largest}, got {shape[0]} names"
        )
    names = archive.read("names")
    try:
        return tuple(printable(str(name)) for name in names)
    except Exception as error:  # characters above 0x10FFFF are invalid
        raise archive.error("names", error) from error

"""Volumes in NIfTI files (``.nii``, ``.nii.gz``).

NIfTI is a format of medical imaging. `nibabel` reads the headers.
"""

import gzip
import io
import math
from importlib import import_module
from typing import Any, BinaryIO, cast

import numpy as np

from prmim_train.config.packages import check_installed
from prmim_train.data.depth import DEPTHS
from prmim_train.data.formats.stacks import FileStack

__all__ = ["MAX_VOLUME_BYTES", "NIFTI_ENDINGS", "is_nifti", "nifti_stack"]

NIFTI_ENDINGS = (".nii", ".nii.gz")

MAX_VOLUME_BYTES = 2**31
"""Maximum size of a volume in a compressed file, in uncompressed bytes. Volumes in ``.nii`` files have no limit."""

_GZIP = b"\x1f\x8b"
_ORIENTATION = ("S", "P", "L")
"""Directions of depth, rows and columns of a volume: head, back, and left of the patient, as in DICOM."""


def is_nifti(start: bytes) -> bool:
    """Whether the first bytes of a file, at least four, can belong to a NIfTI file."""
    return start.startswith(_GZIP) or _version(start) is not None


def _version(start: bytes) -> int | None:
    """Return the NIfTI version, 1 or 2; None for other files.

    A file starts with the length of its header, in either byte order.
    """
    lengths = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    return 1 if 348 in lengths else 2 if 540 in lengths else None


def nifti_stack(file: BinaryIO) -> FileStack:
    """Open a NIfTI file as a volume.

    Crops read their slices; gzipped files are read up to the last slice.

    The axes are those of DICOM, whatever their order in the file: depth from the feet to the head, rows from the front
    to the back, columns from the patient's right to the left. The spacing is that of the header.

    Parameters
    ----------
    file : binary file
        Must stay open until the stack is read.

    Returns
    -------
    FileStack
        Of one channel. Values are scaled by slope and intercept of the header, if these are not 1 and 0. Scaled values,
        and values of other types than those in `prmim_train.data.depth.DEPTHS`, are float32.

    Raises
    ------
    ImportError
        If nibabel is not installed.
    ValueError
        If the file is truncated or corrupt, has more or fewer than three axes, or no real numbers; if a gzipped volume
        has more than `MAX_VOLUME_BYTES` bytes.
    """
    check_installed("data", "nibabel", otherwise="volumes in .npy or .npz files")
    nibabel: Any = import_module("nibabel")

    is_gzipped = file.read(2) == _GZIP
    file.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file
    version = _version(stream.read(4))
    if version is None:
        raise ValueError("not a NIfTI file")
    stream.seek(0)
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header).from_fileobj(stream, check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("header without its volume (.hdr and .img); save both as one .nii file")
    lengths = _lengths(header)
    dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
    if dtype.kind not in "uif":
        raise ValueError(f"expected real numbers, got {dtype}")
    _check_size(file, is_gzipped, offset + math.prod(lengths) * dtype.itemsize)
    affine = header.get_best_affine()
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and steps.min() > 0):
        raise ValueError(f"expected a spacing above 0, got {' x '.join(f'{step:g}' for step in steps)}")
    turn = _turn(nibabel.orientations, affine)
    source = {axis: place for place, (axis, _) in enumerate(turn)}
    depth, height, width = (float(steps[source[axis]]) for axis in range(3))
    slope, intercept = header.get_slope_inter()
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    is_scaled = (slope, intercept) != (1, 0) or dtype.name not in DEPTHS
    return FileStack(
        file=stream,
        dtype=dtype,
        stored=(lengths[2], lengths[1], lengths[0], 1),  # the first axis of the header is the fastest
        offset=offset,
        axes=(2 - source[0], 2 - source[1], 2 - source[2], 3),
        backwards=tuple(axis for axis, direction in turn if direction < 0),
        spacing=(depth, height, width),
        slope=slope if is_scaled else None,
        intercept=intercept,
    )


def _turn(orientations: Any, affine: Any) -> list[tuple[int, int]]:
    """Return the volume's axis and direction (1 or -1) for each axis of the header."""
    found, wanted = orientations.io_orientation(affine), orientations.axcodes2ornt(_ORIENTATION)
    turn = orientations.ornt_transform(found, wanted).astype(int).tolist()
    return [(axis, direction) for axis, direction in turn]


def _lengths(header: Any) -> tuple[int, int, int]:
    """Return the lengths of the three axes. Ignores further axes of length 1."""
    shape = tuple(int(length) for length in header.get_data_shape())
    if len(shape) < 3 or min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise ValueError(f"expected a volume of three axes, got {shape}; save each volume as a file of its own")
    return shape[0], shape[1], shape[2]


def _check_size(file: BinaryIO, is_gzipped: bool, expected: int) -> None:
    if is_gzipped:  # its length is not known before it is read
        if expected > MAX_VOLUME_BYTES:
            limit = f"more than the limit of {MAX_VOLUME_BYTES:,}"
            raise ValueError(f"{expected:,} bytes unzipped, {limit}; save it as .nii")
    elif (size := file.seek(0, io.SEEK_END)) < expected:
        raise ValueError(f"truncated: {size:,} of {expected:,} bytes")

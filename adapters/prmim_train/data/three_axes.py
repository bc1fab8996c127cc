"""Crops of clips and volumes: random for training, central for evaluation.

All random numbers come from the `numpy.random.Generator` that the caller passes.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_train.config.axes import Spacing, ThreeAxes
from prmim_train.data.formats.stacks import Box, FrameArray, StackBox, resize_stack
from prmim_train.data.sources import ImageSource
from prmim_train.data.transforms import (
    CROP_TRIES,
    center_crop,
    check_crop_options,
    fold_frames,
    plane_of,
    relative_ratio,
    unfold_frames,
)

__all__ = [
    "central_frames",
    "central_volume_box",
    "random_flips",
    "random_frames",
    "random_volume_box",
    "read_center",
]

VolumeBox = tuple[int, int, int, int, int, int]
"""Front, top, left, depth, height and width, in voxels."""

_UNKNOWN: Spacing = (1.0, 1.0, 1.0)


def random_frames(number: int, wanted: int, stride: int, rng: np.random.Generator) -> FrameArray:
    """Draw the frames of a clip: every `stride`-th frame from a random start.

    Parameters
    ----------
    number : int
        Frames of the whole clip.
    wanted : int
        Frames of the result.
    stride : int
        Distance between two frames.
    rng : numpy.random.Generator
        Advanced by a draw if there is more than one start.

    Returns
    -------
    int64 array (wanted,)
        Sorted. If the clip is too short, its last frame is repeated.

    Examples
    --------
    >>> random_frames(100, 4, 8, np.random.default_rng(0)).tolist()
    [64, 72, 80, 88]
    >>> random_frames(5, 4, 2, np.random.default_rng(0)).tolist()
    [0, 2, 4, 4]
    """
    spare = _spare(number, wanted, stride)
    start = int(rng.integers(0, spare + 1)) if spare else 0
    return _frames(start, number, wanted, stride)


def central_frames(number: int, wanted: int, stride: int) -> FrameArray:
    """Return the frames of a clip from its middle; see `random_frames`.

    Examples
    --------
    >>> central_frames(10, 2, 2).tolist()
    [3, 5]
    """
    return _frames(_spare(number, wanted, stride) // 2, number, wanted, stride)


def _spare(number: int, wanted: int, stride: int) -> int:
    return max(0, number - (wanted - 1) * stride - 1)


def _frames(start: int, number: int, wanted: int, stride: int) -> FrameArray:
    return np.minimum(start + stride * np.arange(wanted, dtype=np.int64), number - 1)


def random_volume_box(
    shape: tuple[int, int, int],
    size: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    spacing: Spacing | None = None,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    draw: str = "retry",
) -> VolumeBox:
    """Draw the box of a random resized crop of a volume.

    Like `prmim_train.data.transforms.random_crop_box`. The share of the volume is uniform over `scale`. The logarithms
    of width / height and of height / depth, in millimetres, relative to those of `size`, are uniform over `ratio`.
    Apart from these ratios, the voxels of the resized crop are cubes for any spacing. The position is uniform over all
    positions inside the volume.

    Parameters
    ----------
    shape : (depth, height, width)
        Of the volume, in voxels.
    size : (depth, height, width)
        Of the resized crop, in voxels.
    rng : numpy.random.Generator
        Advanced by the draw.
    spacing : (depth, height, width), optional
        Millimetres per voxel of the volume. Default: the same along all axes.
    scale, ratio, draw
        See `prmim_train.data.transforms.random_crop_box`.

    Returns
    -------
    (front, top, left, depth, height, width) : ints
        In voxels.

    Raises
    ------
    ValueError
        If a range is invalid or the kind of draw unknown.

    Examples
    --------
    >>> box = random_volume_box((40, 200, 200), (8, 8, 8), np.random.default_rng(0),
    ...     spacing=(5, 1, 1), ratio=(1, 1))
    >>> box[3:]  # 178 to 180 mm along each axis
    (36, 178, 178)
    """
    check_crop_options(scale, ratio, draw)
    spacing = spacing or _UNKNOWN
    sides = tuple(length * step for length, step in zip(shape, spacing, strict=True))  # in millimetres
    bounds = relative_ratio(ratio, size[1:]), relative_ratio(ratio, size[:2])  # width / height, height / depth
    logs = [(math.log(low), math.log(high)) for low, high in bounds]
    # The order of the draws is fixed: workers and resumed runs must draw the same boxes.
    for _ in range(CROP_TRIES):
        volume = math.prod(sides) * rng.uniform(*scale)
        across, up = (math.exp(rng.uniform(*log)) for log in logs)  # width / height, height / depth
        depth = (volume / (across * up**2)) ** (1 / 3)
        wanted = (depth, up * depth, across * up * depth)
        box = [round(side / step) for side, step in zip(wanted, spacing, strict=True)]
        if draw == "clamp":  # always fits
            box = [min(max(side, 1), most) for side, most in zip(box, shape, strict=True)]
        if all(0 < side <= most for side, most in zip(box, shape, strict=True)):
            front, top, left = (int(rng.integers(0, most - side + 1)) for side, most in zip(box, shape, strict=True))
            return front, top, left, box[0], box[1], box[2]
    return _largest_box(shape, spacing, *bounds)


def _largest_box(
    shape: tuple[int, int, int], spacing: Spacing, across: tuple[float, float], up: tuple[float, float]
) -> VolumeBox:
    """Return the largest centred box with ratios of sides in given ranges.

    The ranges are those of width / height and of height / depth, in millimetres.
    """
    depth, height, width = (length * step for length, step in zip(shape, spacing, strict=True))
    height = min(height, width / across[0], depth * up[1])
    sides = (min(depth, height / up[0]), height, min(width, height * across[1]))
    box = [min(most, max(1, round(side / step))) for side, step, most in zip(sides, spacing, shape, strict=True)]
    front, top, left = ((most - side) // 2 for side, most in zip(box, shape, strict=True))
    return front, top, left, box[0], box[1], box[2]


def central_volume_box(
    shape: tuple[int, int, int],
    size: tuple[int, int, int],
    *,
    spacing: Spacing | None = None,
    share: float | None = 1.0,
) -> StackBox:
    """Return the largest centred box with the proportions of `size` in millimetres.

    Parameters
    ----------
    shape, size, spacing
        See `random_volume_box`.
    share : float or None, optional
        Scales the sides of the box, in (0, 1]. None: the whole volume, without keeping proportions.

    Returns
    -------
    (front, top, left, back, bottom, right) : floats
        In voxels.

    Examples
    --------
    >>> central_volume_box((40, 200, 200), (8, 8, 8), spacing=(2.5, 1, 1))
    (0.0, 50.0, 50.0, 40.0, 150.0, 150.0)
    """
    if share is None:
        return 0.0, 0.0, 0.0, float(shape[0]), float(shape[1]), float(shape[2])
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    spacing = spacing or _UNKNOWN
    zoom = share * min(length * step / wanted for length, step, wanted in zip(shape, spacing, size, strict=True))
    # min(): Pillow refuses boxes that rounding pushes past the edge.
    box = [min(float(most), wanted * zoom / step) for most, wanted, step in zip(shape, size, spacing, strict=True)]
    starts = [(most - side) / 2 for most, side in zip(shape, box, strict=True)]
    ends = [min(float(most), start + side) for most, start, side in zip(shape, starts, box, strict=True)]
    return starts[0], starts[1], starts[2], ends[0], ends[1], ends[2]


def _enclosing(box: StackBox) -> tuple[FrameArray, Box, StackBox]:
    """Return the whole voxels that a box touches, and the box relative to them."""
    first = [math.floor(start) for start in box[:3]]
    last = [math.ceil(end) for end in box[3:]]
    inner = [start - offset for start, offset in zip(box, first * 2, strict=True)]
    plane = (first[1], first[2], last[1] - first[1], last[2] - first[2])
    return np.arange(first[0], last[0]), plane, (inner[0], inner[1], inner[2], inner[3], inner[4], inner[5])


def random_flips(volume: NDArray[Any], rng: np.random.Generator, axes: tuple[int, ...] = (0, 1, 2)) -> NDArray[Any]:
    """Mirror a volume along each given axis with probability 0.5.

    Parameters
    ----------
    volume : array (depth, height, width, channels)
    rng : numpy.random.Generator
        Advanced by a draw for each axis, in the given order.
    axes : tuple of int, optional

    Returns
    -------
    array (depth, height, width, channels)
        The volume itself, or a mirrored copy.

    Examples
    --------
    >>> crop = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1)
    >>> random_flips(crop, np.random.default_rng(3)).ravel().tolist()
    [1, 0]
    """
    mirrored = tuple(axis for axis in axes if rng.random() < 0.5)
    return np.ascontiguousarray(np.flip(volume, mirrored)) if mirrored else volume


def read_center(source: ImageSource, record: int, size: tuple[int, ...], *, share: float | None = 1.0) -> NDArray[Any]:
    """Return the resized central crop of one image, clip or volume.

    Parameters
    ----------
    source : ImageSource
    record : int
        Index of the image.
    size : (height, width) or (frames, height, width)
        Of the result.
    share : float or None, optional
        See `prmim_train.data.transforms.center_crop`. None: the whole image, without keeping proportions. For a clip,
        this concerns the plane; the frames are the central ones.

    Returns
    -------
    array ([frames,] height, width, channels)

    Raises
    ------
    UnreadableImageError
        If the image cannot be read.
    """
    axes = source.three_axes
    if axes is None:
        if share is None:
            return source.read_crop(record, size, lambda shape: (0, 0, *shape))
        return center_crop(source.read(record), plane_of(size), share=share)
    if axes.volumes:
        return _read_central_volume(source, record, (size[0], size[1], size[2]), axes, share)

    def choose(shape: tuple[int, int, int]) -> tuple[FrameArray, Box]:
        return central_frames(shape[0], size[0], axes.stride), (0, 0, shape[1], shape[2])

    if share is None:
        return source.read_crop(record, size, choose)
    clip = fold_frames(source.read(record, choose))
    return unfold_frames(center_crop(clip, plane_of(size), share=share), size)


def _read_central_volume(
    source: ImageSource, record: int, size: tuple[int, int, int], axes: ThreeAxes, share: float | None
) -> NDArray[Any]:
    inner: StackBox | None = None

    def choose(shape: tuple[int, int, int]) -> tuple[FrameArray, Box]:
        nonlocal inner
        slices, box, inner = _enclosing(central_volume_box(shape, size, spacing=spacing, share=share))
        return slices, box

    spacing = spacing_of(source, record)
    return resize_stack(source.read(record, choose), size, box=inner)


def spacing_of(source: ImageSource, record: int) -> Spacing | None:
    """Return the millimetres per voxel of a volume; None if unknown.

    They are given, or come from the file.
    """
    axes = source.three_axes
    if axes is not None and axes.spacing is not None:
        return axes.spacing
    return source.header(record).spacing

"""How clips and volumes are sampled along the first of their three axes."""

from dataclasses import dataclass

__all__ = ["Spacing", "ThreeAxes"]

Spacing = tuple[float, float, float]
"""Millimetres per voxel along depth, height and width."""


@dataclass(frozen=True)
class ThreeAxes:
    """Sampling of clips or volumes along their first axis.

    Parameters
    ----------
    frames : int
        Frames or slices of a crop: the first number of ``image_size``.
    stride : int, optional
        Clips: a crop takes every `stride`-th frame.
    volumes : bool, optional
        The first axis is space, not time: crops are boxes, resized along all three axes.
    spacing : (depth, height, width), optional
        Volumes: millimetres per voxel. Default: from the file, or 1 if unknown.
    """

    frames: int
    stride: int = 1
    volumes: bool = False
    spacing: Spacing | None = None

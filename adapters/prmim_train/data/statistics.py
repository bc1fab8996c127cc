"""Statistics of images, measured on a sample.

Sizes, types, range, mean and standard deviation, and duplicates.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_train.config.axes import Spacing
from prmim_train.data.batches import UnreadableImages
from prmim_train.data.depth import PixelRange
from prmim_train.data.formats.stacks import Box, FrameArray
from prmim_train.data.image_files import UnreadableImageError, ignore_pillow_warnings
from prmim_train.data.sources import ImageSource, keeping_depth

__all__ = ["Statistics", "far_below", "full_range", "measure_images"]

_IMAGES_OF_SAMPLE = 4096  # maximum number of images for quantiles
_VALUES_OF_IMAGE = 4096
_FRAMES_OF_IMAGE = 16
_TAIL = 0.001  # maximum fraction of outliers on each side
_REACH = 0.1  # minimum distance of outliers from the other values, relative to the range of these
_NARROW = 0.01  # range of values, relative to the largest
_FAR_BELOW = 0.25


@dataclass
class Statistics:
    """Statistics of a number of images.

    Parameters
    ----------
    number
        Images that were read.
    unreadable
        Images that could not be read.
    sizes, depths, channels
        Number of images by shape, without channels, by type of the stored values, and by stored channels.
    spacings
        Number of volumes by millimetres per voxel, if known.
    rates
        Number of clips by frames per second, rounded to hundredths, if known.
    low, high
        Smallest and largest value.
    sums, squares
        Sums over all pixels of the values, and of their squares, by channel.
    pixels
        Number of pixels.
    sample
        Some values of each image, for at most 4,096 evenly spaced images.
    duplicates
        Names of duplicates, each with the name of the earlier image with equal pixels.
    """

    number: int
    unreadable: UnreadableImages
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    depths: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    spacings: Counter[Spacing] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    pixels: int = 0
    sample: list[NDArray[Any]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel."""
        return self.sums / max(1, self.pixels)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel."""
        return np.sqrt(np.maximum(0, self.squares / max(1, self.pixels) - self.mean**2))

    @property
    def is_whole(self) -> bool:
        """Whether all values have an integer type."""
        return "float32" not in self.depths

    def pixel_range(self) -> PixelRange:
        """Return the smallest and largest value without outliers.

        Extremes are outliers if their distance from 99.8 % of the values exceeds a tenth of the range of these values.
        If 99.8 % of the values are equal, there are no outliers.
        """
        values = np.concatenate(self.sample).astype(np.float64)
        low, high = (float(value) for value in np.quantile(values, (_TAIL, 1 - _TAIL)))
        reach = _REACH * (high - low)
        low = self.low if self.low >= low - reach else low
        high = self.high if self.high <= high + reach else high
        low, high = self._rounded(low, high)
        if low >= high:
            low, high = self._rounded(self.low, self.high)
        if low >= high:
            raise ValueError(f"pixel_range: expected images with more than one value, got {self.low:g} only")
        return low, high

    def _rounded(self, low: float, high: float) -> PixelRange:
        """Round to integers, or to five digits; a narrow range to nine, which tell all float32 values apart."""
        is_narrow = high - low < _NARROW * max(abs(low), abs(high))
        form = ".0f" if self.is_whole else ".9g" if is_narrow else ".5g"
        return float(f"{low:{form}}"), float(f"{high:{form}}")

    def add(self, image: NDArray[Any]) -> None:
        """Add the pixels of an image ([frames,] height, width, channels)."""
        for picture in image if image.ndim == 4 else image[None]:
            wide = picture.reshape(-1, image.shape[-1]).astype(np.float64)
            self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))
            self.sums = self.sums + wide.sum(axis=0)
            self.squares = self.squares + (wide**2).sum(axis=0)
            self.pixels += len(wide)

    def add_to_sample(self, image: NDArray[Any]) -> None:
        """Keep some values of an image ([frames,] height, width, channels)."""
        flat = image.reshape(-1)
        self.sample.append(flat[:: -(-len(flat) // _VALUES_OF_IMAGE)].copy())


def measure_images(
    source: ImageSource,
    limit: int | None = None,
    *,
    find_duplicates: bool = False,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Statistics:
    """Measure evenly spaced images of a source, in the depth of their files.

    Parameters
    ----------
    source
        The images.
    limit
        Number of images. None: all.
    find_duplicates
        Compare all pixels of images and volumes, and of some frames of clips. Otherwise, read some slices of volumes.
    show
        Wraps the iterator of records, such as a progress bar.

    Raises
    ------
    ValueError
        If none of the images can be read.

    Examples
    --------
    >>> from prmim_train.data.sources import open_source
    >>> found = measure_images(open_source("digits", channels=1), 100)
    >>> found.number, dict(found.sizes), found.low, found.high, found.pixel_range()
    (100, {(8, 8): 100}, 0.0, 255.0, (0.0, 255.0))
    """
    ignore_pillow_warnings()
    source = keeping_depth(source)
    count = len(source) if limit is None else min(limit, len(source))
    records = (np.arange(count) * len(source) // count).tolist()
    found = Statistics(0, UnreadableImages(source, count))
    seen: dict[bytes, int] = {}
    axes = source.three_axes
    some = None if axes is None or (axes.volumes and find_duplicates) else _some_frames
    for record in show(records):
        try:
            header = source.header(record)
            image = source.read(record, some)
        except UnreadableImageError as error:
            found.unreadable.add([(record, error.reason)])
            continue
        if found.number % -(-count // _IMAGES_OF_SAMPLE) == 0:
            found.add_to_sample(image)
        found.number += 1
        found.sizes[header.shape] += 1
        found.depths[header.depth] += 1
        found.channels[header.channels] += 1
        if header.spacing is not None:
            found.spacings[header.spacing] += 1
        if header.rate is not None:
            found.rates[round(header.rate, 2)] += 1
        found.add(image)
        if find_duplicates:
            content = hashlib.blake2b(repr(header.shape).encode() + image.tobytes(), digest_size=16).digest()
            if (first := seen.setdefault(content, record)) != record:
                found.duplicates.append((source.name(record), source.name(first)))
    if not found.number:
        raise ValueError(f"data: none of the images can be read: {found.unreadable.report()}")
    return found


def _some_frames(shape: tuple[int, int, int]) -> tuple[FrameArray, Box]:
    """Choose evenly spaced frames of a clip or a volume."""
    count = min(_FRAMES_OF_IMAGE, shape[0])
    return np.arange(count) * shape[0] // count, (0, 0, shape[1], shape[2])


def full_range(depth: str) -> PixelRange | None:
    """Return the range of an integer type; None for float32.

    Examples
    --------
    >>> full_range("uint16")
    (0, 65535)
    """
    return None if depth == "float32" else (0, int(np.iinfo(depth).max))


def far_below(found: Statistics, pixel_range: PixelRange | None) -> str:
    """Warn if images need a pixel range, or use less than a quarter of the run's.

    Returns an empty text otherwise.

    Parameters
    ----------
    found
        Statistics of the images.
    pixel_range
        Range of the run. None: that of the type.
    """
    (depth, _), *_ = found.depths.most_common(1)
    given = pixel_range or full_range(depth)
    if given is None:
        return f"pixel values are {depth}, which has no fixed range: without --pixel_range, no image can be read"
    if found.high >= given[0] + _FAR_BELOW * (given[1] - given[0]):
        return ""
    low, high = given
    levels = int(255 * (found.high - low) / (high - low)) + 1
    kept = f", so 8 bits keep {levels} levels" if pixel_range is None and depth == "uint16" else ""
    return f"pixel values reach {found.high:,.6g} of {high:,.6g}{kept}; see prmim stats, and set --pixel_range"

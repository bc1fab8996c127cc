"""Training and evaluation batches, prefetched by threads or worker processes.

The training stream depends on its arguments only. Each epoch is a permutation of the images; the sequence of epochs is
cut into full batches, which may span two epochs. Any step can be computed without the steps before it, so a resumed run
sees the same batches as an uninterrupted one. The number of threads, of worker processes and of distributed processes
does not change the global batches.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from prmim_methods.messages import shorten
from prmim_train.data.image_files import ignore_pillow_warnings
from prmim_train.data.sources import ImageSource, UnreadableImageError
from prmim_train.data.three_axes import random_flips, random_frames, random_volume_box, read_center, spacing_of
from prmim_train.data.transforms import (
    check_crop_options,
    fold_frames,
    plane_of,
    random_crop_box,
    random_flip,
    random_padded_crop,
    relative_ratio,
    unfold_frames,
)
from prmim_train.data.workers import WorkerPool

__all__ = [
    "Batch",
    "BatchIterator",
    "EvaluationBatch",
    "UnreadableImages",
    "evaluation_batches",
    "split_indices",
    "train_batches",
]

ImageArray = NDArray[Any]
IndexArray = NDArray[np.int64]
TargetArray = NDArray[np.float32]
BoxArray = NDArray[np.float32]
Box = tuple[float, float, float, float]
Failures = tuple[tuple[int, str], ...]  # (record, reason)
Augment = Callable[[ImageArray, np.random.Generator], ImageArray]
Mix = Callable[[int, ImageArray, IndexArray], tuple[ImageArray, TargetArray]]
_Rest = tuple[IndexArray, BoxArray, Failures, TargetArray | None]  # a batch without its images
Places = list[tuple[int, int]]  # (position in the stream, index into the records in use)

_TOLERANCE = 0.01  # share of unreadable images
_NUM_NAMED = 20
_NUM_NAMED_IN_ERRORS = 3
_MAX_NAMED = 110  # characters of a name with its reason
_MAX_THREADS = 8
_RECORDS_AHEAD = 256
_NO_BOX: Box = (np.nan, np.nan, np.nan, np.nan)


@dataclass(frozen=True, slots=True)
class Batch:
    """Training batch.

    Attributes
    ----------
    images : array (batch, [frames,] height, width, channels)
        uint8, or of the depth of the source.
    index : int64 array (batch,)
        Record of the source of each image.
    boxes : float32 array (batch, 4)
        Top, left, bottom, right of each crop as fractions of its image. Left is greater than right in mirrored crops.
        NaN with `crop_padding` and for volumes. For a clip, the box in the plane.
    unreadable : tuple of (int, str)
        Records that could not be read for this batch, and the reasons.
    targets : float32 array (batch, classes) or None
        Soft labels; None without `mix`.
    """

    images: ImageArray
    index: IndexArray
    boxes: BoxArray
    unreadable: Failures
    targets: TargetArray | None = None


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Evaluation batch.

    Attributes
    ----------
    images : array (batch, [frames,] height, width, channels)
        uint8, or of the depth of the source.
    index : int64 array (batch,)
        Record of the source of each image.
    """

    images: ImageArray
    index: IndexArray


class UnreadableImages:
    """Images that could not be read. Each image counts once.

    Parameters
    ----------
    source : ImageSource
        Provides the names of the images.
    num_images : int
        Number of images in use.

    Examples
    --------
    >>> from prmim_train.data.sources import open_source
    >>> unreadable = UnreadableImages(open_source("digits", channels=1), num_images=1797)
    >>> unreadable.add([(3, "empty file"), (3, "empty file")])
    >>> unreadable.check()
    >>> unreadable.report()
    '1 of 1,797 images could not be read and was left out: image 3 (empty file)'
    """

    def __init__(self, source: ImageSource, num_images: int) -> None:
        self._source = source
        self._num_images = num_images
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        """Return the number of unreadable images."""
        return len(self._reasons)

    @property
    def is_all(self) -> bool:
        """Whether all images are unreadable."""
        return len(self) >= self._num_images

    @property
    def reasons(self) -> dict[str, str]:
        """Reason by image name, in the order of the source."""
        return {self._source.name(record): self._reasons[record] for record in sorted(self._reasons)}

    def add(self, failures: Iterable[tuple[int, str]]) -> None:
        """Add records that could not be read, and the reasons."""
        for record, reason in failures:
            self._reasons.setdefault(record, reason)

    def check(self) -> None:
        """Raise if too many images are unreadable.

        Raises
        ------
        ValueError
            If more than one image and more than 1 % are unreadable, or all images are. The message names the first
            ones.
        """
        if len(self) > max(1, _TOLERANCE * self._num_images) or self.is_all:
            raise ValueError(
                f"data: {len(self):,} of {self._num_images:,} images cannot be read so far, more than the "
                f"{_TOLERANCE:.0%} that is tolerated; repair or remove them: {self.named(_NUM_NAMED_IN_ERRORS)}"
            )

    def report(self) -> str:
        """Describe the unreadable images in one line; empty if there are none.

        Names the first 20.
        """
        if not self._reasons:
            return ""
        was = "was" if len(self) == 1 else "were"
        return f"{len(self):,} of {self._num_images:,} images could not be read and {was} left out: {self.named()}"

    def named(self, most: int = _NUM_NAMED) -> str:
        """Return names and reasons of the first `most` images, shortened.

        The number of the others follows.
        """
        named = [
            shorten(f"{self._source.name(record)} ({self._reasons[record]})", _MAX_NAMED)
            for record in sorted(self._reasons)[:most]
        ]
        rest = len(self) - len(named)
        return ", ".join(named) + (f", and {rest:,} more" if rest else "")


T = TypeVar("T")


class _Reader(Generic[T]):
    """The part of a `BatchIterator` that its finalizer closes.

    Must not refer to the iterator.
    """

    def __init__(self, stream: Any, batches: Iterator[T]) -> None:
        self.stream = stream
        self.batches = batches

    def close(self) -> None:
        self.stream.close()
        # Drop the stream now: grain warns about iterators that live until the interpreter exits.
        self.stream, self.batches = None, iter(())


class BatchIterator(Iterator[T], Generic[T]):
    """Iterator over prefetched batches. Use it in a `with` block, or close it.

    Created by `train_batches` and `evaluation_batches`. The prefetching threads or processes end when the iterator is
    closed, exhausted or raises an error, and at the end of the program.

    Attributes
    ----------
    unreadable : UnreadableImages
        Images that could not be read, up to the last returned batch.
    """

    def __init__(self, stream: Any, batches: Iterator[T], unreadable: UnreadableImages) -> None:
        self.unreadable = unreadable
        self._reader = _Reader(stream, batches)
        self._close = weakref.finalize(self, self._reader.close)  # runs once, at the latest at program exit

    def __next__(self) -> T:
        """Return the next batch."""
        try:
            return next(self._reader.batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop prefetching; `next` then raises StopIteration. Idempotent."""
        self._close()

    def __enter__(self) -> Self:
        """Return the iterator."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the iterator."""
        self.close()


def train_batches(
    source: ImageSource,
    *,
    indices: IndexArray | None = None,
    batch_size: int,
    image_size: tuple[int, ...],
    seed: int,
    start_step: int = 0,
    total_steps: int,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    crop_draw: str = "retry",
    crop_padding: int | None = None,
    flip: bool = True,
    augment: Augment | None = None,
    mix: Mix | None = None,
    workers: int = 0,
    threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchIterator[Batch]:
    """Return the batches of a training run, from `start_step` on.

    Parameters
    ----------
    source : ImageSource
    indices : int array (number of images,), optional
        Records of the source to train on. Default: all.
    batch_size : int
        Images per global batch, over all distributed processes. All batches are full. A batch can be larger than an
        epoch.
    image_size : (height, width) or (frames, height, width)
        In pixels.
    seed : int
        From 0 to 2**32 - 1. Determines the order of the images and their augmentation.
    start_step : int, optional
        Number of steps already taken.
    total_steps : int
        Step at which the stream ends, counted from the beginning of the run.
    crop_scale, crop_ratio : tuple of two floats, optional
    crop_draw : "retry" or "clamp", optional
        See `prmim_train.data.transforms.random_crop_box`. `crop_ratio` is relative to width / height of `image_size`.
    crop_padding : int, optional
        In place of such crops: see `prmim_train.data.transforms.random_padded_crop`.
    flip : bool, optional
        Mirror images left to right with probability 0.5; volumes along each axis.
    augment : callable, optional
        Further augmentation of an image, after crop and flip. Takes the image and the generator that crop and flip
        were drawn from. Picklable; see `prmim_train.data.augment`.
    mix : callable, optional
        Returns images and targets of a batch, given the step (from 0), the images and their records. Picklable; see
        `prmim_train.data.mixing`.
    workers : int, optional
        Number of worker processes that prefetch batches. They take one or two seconds to start. 0 uses threads of this
        process, which is enough if reading is mostly decoding or waiting for a disk. With workers, a script needs
        ``if __name__ == "__main__":``.
    threads : int, optional
        Number of threads that prefetch a batch each, without workers. 0 reads on demand. Default: one per available
        core, at most 8. Memory holds about `threads` + 1 batches.
    rank, world_size : int, optional
        Rank of this process, and number of distributed processes. A process gets the rows ``rank::world_size`` of every
        global batch, `batch_size` / `world_size` images.

    Returns
    -------
    BatchIterator of Batch
        `total_steps` - `start_step` batches. Its `unreadable` lists the images that this process could not read.

    Raises
    ------
    ValueError
        If an argument is invalid; while iterating, if more than one image and more than 1 % cannot be read.
    ChildProcessError
        While iterating, if a worker process died. The message names the cause and the image that the worker was
        reading.

    Notes
    -----
    Augmentation is drawn from a generator seeded with (seed, epoch, record), so it does not depend on the process or
    worker that reads the image. An unreadable image is replaced by the next readable one in the order of `indices`.
    Pillow's warnings are silenced.

    Examples
    --------
    >>> from prmim_train.data.sources import open_source
    >>> digits = open_source("digits", channels=1)
    >>> with train_batches(digits, batch_size=4, image_size=(8, 8), seed=0,
    ...     total_steps=2) as batches:
    ...     shapes = [batch.images.shape for batch in batches]
    >>> shapes
    [(4, 8, 8, 1), (4, 8, 8, 1)]
    """
    grain = _import_grain()
    records = _check_indices(indices, len(source))
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("start_step", start_step, 0)
    _check_at_least("total_steps", total_steps, start_step)
    _check_at_least("workers", workers, 0)
    _check_image_size(image_size)
    check_crop_options(crop_scale, crop_ratio, crop_draw)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to 2**32 - 1, got {seed}")
    _check_processes(rank, world_size, batch_size)

    num_epochs = max(1, -(-total_steps * batch_size // len(records)))
    places = (
        grain.MapDataset.range(len(records))
        .seed(seed)
        .shuffle()  # differently in each epoch
        .repeat(num_epochs)
        .map_with_index(_place)[start_step * batch_size + rank : total_steps * batch_size : world_size]
        .batch(batch_size // world_size, drop_remainder=True, batch_fn=list)
    )
    # Threads and workers get whole batches, so the content of a batch does not depend on their number.
    crop: _Crop
    if crop_padding is not None:
        crop = _PaddedCrop(image_size, crop_padding)
    elif source.three_axes is not None and source.three_axes.volumes:
        crop = _VolumeCrop((image_size[0], image_size[1], image_size[2]), crop_scale, crop_ratio, crop_draw)
    else:
        crop = _AreaCrop(image_size, crop_scale, relative_ratio(crop_ratio, plane_of(image_size)), crop_draw)
    make = _TrainingBatch(source, records, image_size, seed, crop, flip, augment, mix, batch_size)
    ignore_pillow_warnings()
    if workers > 0:
        tasks = (places[step] for step in range(len(places)))
        stream: Any = WorkerPool(make, tasks, workers=workers, describe=source.name, prepare=ignore_pillow_warnings)
    else:
        stream = iter(places.map(make).to_iter_dataset(_read_options(threads)))
    unreadable = UnreadableImages(source, len(records))
    return BatchIterator(stream, _checked(stream, unreadable), unreadable)


def evaluation_batches(
    source: ImageSource,
    indices: IndexArray | None = None,
    *,
    batch_size: int,
    image_size: tuple[int, ...],
    share: float | None = 1.0,
    threads: int | None = None,
) -> BatchIterator[EvaluationBatch]:
    """Return center crops or whole images in order, without augmentation.

    Parameters
    ----------
    source : ImageSource
    indices : int array (number of images,), optional
        Records of the source, in this order. Default: all.
    batch_size : int
        Images per batch. The last batch can have fewer.
    image_size : (height, width) or (frames, height, width)
        In pixels.
    share : float or None, optional
        See `prmim_train.data.transforms.center_crop`. None: whole images, resized without keeping proportions.
    threads : int, optional
        Number of prefetching threads. 0 reads on demand. Default: one per available core, at most 8.

    Returns
    -------
    BatchIterator of EvaluationBatch
        Unreadable images are skipped and listed in its `unreadable`. The caller decides how many are too many;
        `unreadable.check` raises above one image and 1 %.

    Raises
    ------
    ValueError
        If an argument is invalid; while iterating, if no image can be read.

    Examples
    --------
    >>> from prmim_train.data.sources import open_source
    >>> digits = open_source("digits", channels=1)
    >>> with evaluation_batches(digits, np.arange(5), batch_size=3, image_size=(8, 8)) as batches:
    ...     [batch.index.tolist() for batch in batches]
    [[0, 1, 2], [3, 4]]
    """
    grain = _import_grain()
    records = _check_indices(indices, len(source))
    _check_at_least("batch_size", batch_size, 1)
    _check_image_size(image_size)
    ignore_pillow_warnings()
    dataset = grain.MapDataset.source(records).map(_EvaluationRecord(source, image_size, share))
    stream = dataset.to_iter_dataset(_read_options(threads, ahead=_RECORDS_AHEAD))
    iterator, unreadable = iter(stream), UnreadableImages(source, len(records))
    return BatchIterator(iterator, _regrouped(iterator, unreadable, batch_size), unreadable)


def split_indices(
    labels_or_number: NDArray[np.integer[Any]] | int, *, holdout: float, seed: int
) -> tuple[IndexArray, IndexArray]:
    """Split the records of a source at random into training and held-out records.

    Parameters
    ----------
    labels_or_number : int array (number of images,), or int
        Labels, or number of images. With labels, the split is stratified: each class has a proportional number of
        held-out images, to within one.
    holdout : float
        Fraction to hold out, in [0, 1); rounded to whole images.
    seed : int
        Determines the split.

    Returns
    -------
    train, held_out : int64 arrays
        Sorted, disjoint, and together all records.

    Raises
    ------
    ValueError
        If `holdout` is out of bounds.

    Examples
    --------
    >>> train, held_out = split_indices(np.array([0, 0, 0, 0, 1, 1, 1, 1]), holdout=0.25, seed=0)
    >>> len(train), len(held_out)
    (6, 2)
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: expected a number in [0, 1), got {holdout}")
    number = labels_or_number if isinstance(labels_or_number, int) else len(labels_or_number)
    shuffled = np.random.default_rng(seed).permutation(number)
    if not isinstance(labels_or_number, int):
        shuffled = shuffled[np.argsort(labels_or_number[shuffled], kind="stable")]
    num_held_out = round(number * holdout)
    # Hold out exactly num_held_out evenly spaced records. Each class is a run of the shuffled records, so its share is
    # proportional.
    place = np.arange(number, dtype=np.int64)
    is_held_out = (place + 1) * num_held_out // max(1, number) > place * num_held_out // max(1, number)
    return np.sort(shuffled[~is_held_out]).astype(np.int64), np.sort(shuffled[is_held_out]).astype(np.int64)


# ------------------------------------------------------------------------------------------------- single records


def _place(position: int, choice: int) -> tuple[int, int]:
    return position, int(choice)


@dataclass(frozen=True)
class _AreaCrop:
    """Reads a resized random area of an image, or of some frames of a clip."""

    size: tuple[int, ...]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    draw: str

    def __call__(self, source: ImageSource, record: int, rng: np.random.Generator) -> tuple[ImageArray, Box]:
        box = _NO_BOX

        def choose(shape: tuple[int, int]) -> tuple[int, int, int, int]:
            nonlocal box
            chosen = random_crop_box(shape, rng, scale=self.scale, ratio=self.ratio, draw=self.draw)
            (top, left, height, width), (rows, columns) = chosen, shape
            box = top / rows, left / columns, (top + height) / rows, (left + width) / columns
            return chosen

        axes = source.three_axes
        if axes is None:
            return source.read_crop(record, self.size, choose), box

        def choose_frames(shape: tuple[int, int, int]) -> tuple[IndexArray, tuple[int, int, int, int]]:
            chosen = choose((shape[1], shape[2]))  # before the start, as clips of one start were drawn first
            return random_frames(shape[0], self.size[0], axes.stride, rng), chosen

        return source.read_crop(record, self.size, choose_frames), box


@dataclass(frozen=True)
class _PaddedCrop:
    """Cuts a random window from a padded image, or from padded frames of a clip."""

    size: tuple[int, ...]
    padding: int

    def __call__(self, source: ImageSource, record: int, rng: np.random.Generator) -> tuple[ImageArray, Box]:
        plane, axes = plane_of(self.size), source.three_axes
        if axes is None:
            return random_padded_crop(source.read(record), plane, rng, padding=self.padding), _NO_BOX

        def choose(shape: tuple[int, int, int]) -> tuple[IndexArray, tuple[int, int, int, int]]:
            return random_frames(shape[0], self.size[0], axes.stride, rng), (0, 0, shape[1], shape[2])

        clip = fold_frames(source.read(record, choose))
        return unfold_frames(random_padded_crop(clip, plane, rng, padding=self.padding), self.size), _NO_BOX


@dataclass(frozen=True)
class _VolumeCrop:
    """Reads a resized random box of a volume."""

    size: tuple[int, int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    draw: str

    def __call__(self, source: ImageSource, record: int, rng: np.random.Generator) -> tuple[ImageArray, Box]:
        how: Any = {"spacing": spacing_of(source, record), "scale": self.scale, "ratio": self.ratio, "draw": self.draw}

        def choose(shape: tuple[int, int, int]) -> tuple[IndexArray, tuple[int, int, int, int]]:
            front, *plane_start, depth, height, width = random_volume_box(shape, self.size, rng, **how)
            return np.arange(front, front + depth), (plane_start[0], plane_start[1], height, width)

        return source.read_crop(record, self.size, choose), _NO_BOX


_Crop = _AreaCrop | _PaddedCrop | _VolumeCrop


class _TrainingBatch:
    """Creates the training batch at given positions of the stream.

    Pickled for worker processes.
    """

    def __init__(
        self,
        source: ImageSource,
        records: IndexArray,
        image_size: tuple[int, ...],
        seed: int,
        crop: _Crop,
        flip: bool,
        augment: Augment | None,
        mix: Mix | None,
        global_batch: int,
    ) -> None:
        self.source, self.records, self.image_size, self.seed = source, records, image_size, seed
        self.crop, self.flip = crop, flip
        self.augment, self.mix, self.global_batch = augment, mix, global_batch
        self.failed: dict[int, str] = {}  # this process does not try them again

    def __call__(self, places: Places, note: Callable[[int], None] = lambda record: None) -> tuple[ImageArray, _Rest]:
        parts: list[ImageArray] = []
        boxes: list[Box] = []
        records: list[int] = []
        failures: list[tuple[int, str]] = []
        for position, choice in places:
            image, box, record = self._read(position // len(self.records), choice, failures, note)
            parts.append(image)
            boxes.append(box)
            records.append(record)
        images, index, targets = np.stack(parts), np.array(records, np.int64), None
        if self.mix is not None:
            images, targets = self.mix(places[0][0] // self.global_batch, images, index)
        return images, (index, np.array(boxes, np.float32), tuple(failures), targets)

    def _read(
        self, epoch: int, choice: int, failures: list[tuple[int, str]], note: Callable[[int], None]
    ) -> tuple[ImageArray, Box, int]:
        """Read the chosen record, or the next readable one.

        Appends unreadable records to `failures`.
        """
        unreadable = UnreadableImages(self.source, len(self.records))
        while True:
            record = int(self.records[choice])
            if record not in self.failed:
                note(record)
                try:
                    return *self._augmented(epoch, record), record
                except UnreadableImageError as error:
                    self.failed[record] = error.reason
            failures.append((record, self.failed[record]))
            unreadable.add(failures[-1:])
            unreadable.check()  # ends the search after a few records
            choice = (choice + 1) % len(self.records)

    def _augmented(self, epoch: int, record: int) -> tuple[ImageArray, Box]:
        """Return the augmented crop of an image, and its box; see `Batch`."""
        # The order of the draws (crop, flip, augment) is fixed: workers and resumed runs must draw the same values.
        rng = np.random.default_rng((self.seed, epoch, record))
        image, box = self.crop(self.source, record, rng)
        if self.flip and isinstance(self.crop, _VolumeCrop):
            image = random_flips(image, rng)
        elif self.flip:
            crop, image = image, random_flip(image, rng)
            if image is not crop:
                box = box[0], box[3], box[2], box[1]
        if self.augment is None:
            return image, box
        if image.ndim == 3:
            return self.augment(image, rng), box
        return unfold_frames(self.augment(fold_frames(image), rng), self.image_size), box


class _Example(NamedTuple):
    image: ImageArray | None  # None: unreadable
    record: int
    unreadable: Failures


class _EvaluationRecord:
    def __init__(self, source: ImageSource, image_size: tuple[int, ...], share: float | None) -> None:
        self.source, self.image_size, self.share = source, image_size, share

    def __call__(self, record: Any) -> _Example:
        record = int(record)
        try:
            image = read_center(self.source, record, self.image_size, share=self.share)
        except UnreadableImageError as error:
            return _Example(None, record, ((record, error.reason),))
        return _Example(image, record, ())


# -------------------------------------------------------------------------------------------------------- batches


def _checked(stream: Iterator[tuple[ImageArray, _Rest]], unreadable: UnreadableImages) -> Iterator[Batch]:
    for images, (index, boxes, failures, targets) in stream:
        unreadable.add(failures)
        unreadable.check()
        yield Batch(images, index, boxes, failures, targets)


def _regrouped(stream: Iterator[_Example], unreadable: UnreadableImages, batch_size: int) -> Iterator[EvaluationBatch]:
    images: list[ImageArray] = []
    records: list[int] = []
    for example in stream:
        unreadable.add(example.unreadable)
        if example.image is not None:
            images.append(example.image)
            records.append(example.record)
        if len(images) == batch_size:
            yield EvaluationBatch(np.stack(images), np.array(records, np.int64))
            images, records = [], []
    if images:
        yield EvaluationBatch(np.stack(images), np.array(records, np.int64))
    elif unreadable.is_all:
        raise ValueError(f"data: none of the images can be read: {unreadable.report()}")


# --------------------------------------------------------------------------------------------------------- threads


def _import_grain() -> Any:
    """Import grain on demand: the import takes a second.

    Importing grain also imports jax if installed, and otherwise warns.
    """
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import grain
    finally:
        logging.set_verbosity(verbosity)
    return grain


def _read_options(threads: int | None, ahead: int = 1) -> Any:
    if threads is None:
        threads = min(_MAX_THREADS, _available_cores())
    _check_at_least("threads", threads, 0)
    return _import_grain().ReadOptions(num_threads=threads, prefetch_buffer_size=threads and threads + ahead)


def _available_cores() -> int:
    # Where available, the cores that this process may use: containers often get fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------------- checks


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_processes(rank: int, world_size: int, batch_size: int) -> None:
    _check_at_least("world_size", world_size, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    if batch_size % world_size:
        raise ValueError(f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}")


def _check_image_size(image_size: tuple[int, ...]) -> None:
    if len(image_size) not in (2, 3) or min(image_size) < 1:
        raise ValueError(f"image_size: expected ([frames,] height, width) of at least 1 pixel, got {image_size}")


def _check_indices(indices: IndexArray | None, number: int) -> IndexArray:
    if indices is None:
        return np.arange(number, dtype=np.int64)
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or len(indices) == 0:
        raise ValueError(f"indices: expected a non-empty 1-d integer array, got {indices.dtype} {indices.shape}")
    if indices.min() < 0 or indices.max() >= number:
        raise ValueError(f"indices: expected 0 to {number - 1}, got {indices.min()} to {indices.max()}")
    return indices.astype(np.int64)

"""Batches for training and for evaluation, read ahead of their use by threads or worker processes.

The training stream is a function of its arguments alone: epoch after epoch, each a permutation of the images, cut
into full batches that may straddle two epochs. Any step can be computed without those before it, so a resumed run
starts at its step and sees what an uninterrupted one would have seen; the number of threads or worker processes
changes nothing but the speed, and processes that train together deal the same batches out among themselves, however
many they are.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from prmim_train.image_files import ignore_pillow_warnings
from prmim_train.sources import ImageSource, UnreadableImageError
from prmim_train.transforms import center_crop, check_crop_options, random_crop_box, random_flip
from prmim_train.workers import WorkerPool

__all__ = [
    "Batch",
    "BatchIterator",
    "EvaluationBatch",
    "UnreadableImages",
    "evaluation_batches",
    "split_indices",
    "train_batches",
]

ImageArray = NDArray[np.uint8]
IndexArray = NDArray[np.int64]
TargetArray = NDArray[np.float32]
Failures = tuple[tuple[int, str], ...]  # (record, reason)
Augment = Callable[[ImageArray, np.random.Generator], ImageArray]
Mix = Callable[[int, ImageArray, IndexArray], tuple[ImageArray, TargetArray]]
_Rest = tuple[IndexArray, Failures, TargetArray | None]  # of a batch, without its images
Places = list[tuple[int, int]]  # (position in the stream, which of the records stands there)

_NUM_NAMED = 20
_MAX_THREADS = 8
_RECORDS_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch to train on.

    Attributes
    ----------
    images : uint8 array (batch, height, width, channels)
    index : int64 array (batch,)
        Which record of the source each image is.
    unreadable : tuple of (int, str)
        Records that could not be read while this batch was made, and why.
    targets : float32 array (batch, classes) or None
        What a classifier is to predict; None where nobody asked for it.
    """

    images: ImageArray
    index: IndexArray
    unreadable: Failures
    targets: TargetArray | None = None


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """A batch to evaluate on.

    Attributes
    ----------
    images : uint8 array (batch, height, width, channels)
    labels : int64 array (batch,) or None
        None if the source has no labels.
    index : int64 array (batch,)
        Which record of the source each image is.
    """

    images: ImageArray
    labels: IndexArray | None
    index: IndexArray


class UnreadableImages:
    """Collects images that could not be read: each is counted once.

    Parameters
    ----------
    source : ImageSource
        Names the images.
    num_images : int
        Images in use, of which `tolerance` is a fraction.
    tolerance : float, optional
        `check` raises above this fraction of unreadable images.

    Examples
    --------
    >>> from prmim_train.sources import open_source
    >>> unreadable = UnreadableImages(open_source("digits", channels=1), num_images=1797)
    >>> unreadable.add([(3, "empty file"), (3, "empty file")])
    >>> unreadable.check()
    >>> unreadable.report()
    '1 of 1,797 images could not be read and was left out: image 3 (empty file)'
    """

    def __init__(self, source: ImageSource, num_images: int, *, tolerance: float = 0.01) -> None:
        self._source = source
        self._num_images = num_images
        self._tolerance = tolerance
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        """Return how many images could not be read."""
        return len(self._reasons)

    @property
    def is_all(self) -> bool:
        """Whether not one image could be read."""
        return len(self) >= self._num_images

    @property
    def reasons(self) -> dict[str, str]:
        """Why each image could not be read, by name, in the order of the source."""
        return {self._source.name(record): self._reasons[record] for record in sorted(self._reasons)}

    def add(self, failures: Iterable[tuple[int, str]]) -> None:
        """Note records that could not be read, and why."""
        for record, reason in failures:
            self._reasons.setdefault(record, reason)

    def check(self) -> None:
        """Raise if too many images are unreadable.

        Raises
        ------
        ValueError
            If they are more than `tolerance` of all; the message names the first 20.
        """
        if len(self) > self._tolerance * self._num_images:
            raise ValueError(
                f"data: {len(self):,} of {self._num_images:,} images cannot be read so far, more than the "
                f"{self._tolerance:.0%} that is tolerated; repair or remove them: {self._names()}"
            )

    def report(self) -> str:
        """Return one line that names the first 20, empty if all images could be read."""
        if not self._reasons:
            return ""
        was = "was" if len(self) == 1 else "were"
        return f"{len(self):,} of {self._num_images:,} images could not be read and {was} left out: {self._names()}"

    def _names(self) -> str:
        named = [
            f"{self._source.name(record)} ({self._reasons[record]})" for record in sorted(self._reasons)[:_NUM_NAMED]
        ]
        rest = len(self) - len(named)
        return ", ".join(named) + (f", and {rest:,} more" if rest else "")


T = TypeVar("T")


class _Reader(Generic[T]):
    """What a `BatchIterator` closes: kept apart from it, so that closing may be left to its finalizer."""

    def __init__(self, stream: Any, batches: Iterator[T]) -> None:
        self.stream = stream
        self.batches = batches

    def close(self) -> None:
        self.stream.close()
        # Let go of the stream now: its parts, deleted as late as when the interpreter ends, would complain.
        self.stream, self.batches = None, iter(())


class BatchIterator(Iterator[T], Generic[T]):
    """Batches, read ahead in the background; use it in a `with` block, or close it.

    Made by `train_batches` and `evaluation_batches`. Closing ends the threads or processes that read ahead; so do the
    last batch, an error, and the end of the program.

    Attributes
    ----------
    unreadable : UnreadableImages
        What could not be read up to the batch last given out.
    """

    def __init__(self, stream: Any, batches: Iterator[T], unreadable: UnreadableImages) -> None:
        self.unreadable = unreadable
        self._reader = _Reader(stream, batches)
        self._close = weakref.finalize(self, self._reader.close)  # runs once, when the program ends at the latest

    def __next__(self) -> T:
        """Return the next batch."""
        try:
            return next(self._reader.batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End reading ahead; further calls of `next` raise StopIteration. May be called more than once."""
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
    image_size: tuple[int, int],
    seed: int,
    start_step: int = 0,
    total_steps: int,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    augment: Augment | None = None,
    mix: Mix | None = None,
    workers: int = 0,
    threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchIterator[Batch]:
    """Give the batches of a training run from one step on.

    Parameters
    ----------
    source : ImageSource
    indices : int array (number of images,), optional
        Records of the source to train on. Default: all.
    batch_size : int
        Images per global batch: of all processes together. Every batch is full; it may be larger than an epoch.
    image_size : (height, width)
        In pixels.
    seed : int
        From 0 to 2**32 - 1. The order of the images and their augmentation follow from it.
    start_step : int, optional
        Steps already taken.
    total_steps : int
        The stream ends after this step.
    crop_scale, crop_ratio : tuple of two floats, optional
        See `prmim_train.transforms.random_resized_crop`.
    flip : bool, optional
        Mirror one image in two.
    augment : callable, optional
        Changes an image further, after crop and flip; it is given the image and the generator that those were drawn
        from. Picklable; see `prmim_train.augment`.
    mix : callable, optional
        Makes images and targets of a whole batch from its step, counted from 0, its images and their records.
        Picklable; see `prmim_train.mixing`.
    workers : int, optional
        Worker processes that read ahead. They take a second or two to start; 0 means threads of this process, which
        is enough where reading is mostly decoding or waiting for a disk. As always with processes in Python, a script
        that uses them needs ``if __name__ == "__main__":``.
    threads : int, optional
        Without workers: threads that read ahead, each a batch of its own. 0 reads when asked. Default: one per
        available core, 8 at most. About `threads` + 1 batches are held in memory.
    rank, world_size : int, optional
        Of `world_size` processes that train together this is number `rank`, from 0. It is given the rows
        ``rank::world_size`` of every global batch, `batch_size` / `world_size` images.

    Returns
    -------
    BatchIterator of Batch
        Of `total_steps` - `start_step` batches. Images that could not be read are listed in its `unreadable`, which is
        checked at each batch, by every process for what it has seen itself.

    Raises
    ------
    ValueError
        If an argument is not as described; while iterating, if more than 1 % of the images cannot be read.
    ChildProcessError
        While iterating, if a worker process has died; the message says of what, and which image it was reading.

    Notes
    -----
    Augmentation is drawn from a generator seeded with (seed, epoch, record) alone: neither the process nor the worker
    that reads an image has a part in it. An image that cannot be read is replaced by the next readable one in the order
    of `indices`, and listed in `unreadable`. Pillow's warnings are switched off.

    Examples
    --------
    >>> from prmim_train.sources import open_source
    >>> digits = open_source("digits", channels=1)
    >>> with train_batches(digits, batch_size=4, image_size=(8, 8), seed=0, total_steps=2) as batches:
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
    check_crop_options(crop_scale, crop_ratio)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to 2**32 - 1, got {seed}")
    _check_processes(rank, world_size, batch_size)

    num_epochs = max(1, -(-total_steps * batch_size // len(records)))
    places = (
        grain.MapDataset.range(len(records))
        .seed(seed)
        .shuffle()  # anew in each epoch
        .repeat(num_epochs)
        .map_with_index(_place)[start_step * batch_size + rank : total_steps * batch_size : world_size]
        .batch(batch_size // world_size, drop_remainder=True, batch_fn=list)
    )
    # Batches, not records, are dealt out to threads and workers: what a batch holds does not depend on their number.
    make = _TrainingBatch(source, records, image_size, seed, crop_scale, crop_ratio, flip, augment, mix, batch_size)
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
    image_size: tuple[int, int],
    share: float = 1.0,
    threads: int | None = None,
) -> BatchIterator[EvaluationBatch]:
    """Give images in order, once, without augmentation: the centre of each, resized.

    Parameters
    ----------
    source : ImageSource
    indices : int array (number of images,), optional
        Records of the source, in the order wanted. Default: all.
    batch_size : int
        Images per batch; only the last batch may hold fewer.
    image_size : (height, width)
        In pixels.
    share : float, optional
        See `prmim_train.transforms.center_crop`.
    threads : int, optional
        Threads that read ahead. 0 reads when asked. Default: one per available core, 8 at most.

    Returns
    -------
    BatchIterator of EvaluationBatch
        Images that cannot be read are left out, and listed in its `unreadable`. How many are too many is for the caller
        to say: `unreadable.check` raises above 1 %.

    Raises
    ------
    ValueError
        If an argument is not as described; while iterating, if not one image can be read.

    Examples
    --------
    >>> from prmim_train.sources import open_source
    >>> digits = open_source("digits", channels=1)
    >>> with evaluation_batches(digits, np.arange(5), batch_size=3, image_size=(8, 8)) as batches:
    ...     [batch.labels.tolist() for batch in batches]
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
    return BatchIterator(iterator, _regrouped(iterator, unreadable, batch_size, source.labels), unreadable)


def split_indices(
    labels_or_number: NDArray[np.integer[Any]] | int, *, holdout: float, seed: int
) -> tuple[IndexArray, IndexArray]:
    """Split the records of a source at random into those to train on and those to hold out.

    Parameters
    ----------
    labels_or_number : int array (number of images,), or int
        The labels, or how many images there are. With labels, each class gives its share of the held-out images, to
        within one.
    holdout : float
        Fraction to hold out, in [0, 1); rounded to whole images.
    seed : int
        The split follows from it.

    Returns
    -------
    train, held_out : int64 arrays
        Each sorted; together all records, once.

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
    # Evenly spaced through the shuffled records, exactly num_held_out of them: classes, being runs there, give their
    # share.
    place = np.arange(number, dtype=np.int64)
    is_held_out = (place + 1) * num_held_out // max(1, number) > place * num_held_out // max(1, number)
    return np.sort(shuffled[~is_held_out]).astype(np.int64), np.sort(shuffled[is_held_out]).astype(np.int64)


# ------------------------------------------------------------------------------------------------- single records


def _place(position: int, choice: int) -> tuple[int, int]:
    return position, int(choice)


class _TrainingBatch:
    """Reads and augments what stands at some places of the stream. Goes to worker processes by pickle."""

    def __init__(
        self,
        source: ImageSource,
        records: IndexArray,
        image_size: tuple[int, int],
        seed: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        augment: Augment | None,
        mix: Mix | None,
        global_batch: int,
    ) -> None:
        self.source, self.records, self.image_size, self.seed = source, records, image_size, seed
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.augment, self.mix, self.global_batch = augment, mix, global_batch
        self.failed: dict[int, str] = {}  # not tried again by this process

    def __call__(self, places: Places, note: Callable[[int], None] = lambda record: None) -> tuple[ImageArray, _Rest]:
        parts: list[ImageArray] = []
        records: list[int] = []
        failures: list[tuple[int, str]] = []
        for position, choice in places:
            image, record = self._read(position // len(self.records), choice, failures, note)
            parts.append(image)
            records.append(record)
        images, index, targets = np.stack(parts), np.array(records, np.int64), None
        if self.mix is not None:
            images, targets = self.mix(places[0][0] // self.global_batch, images, index)
        return images, (index, tuple(failures), targets)

    def _read(
        self, epoch: int, choice: int, failures: list[tuple[int, str]], note: Callable[[int], None]
    ) -> tuple[ImageArray, int]:
        """Read the chosen record, or the next one that can be read; add what could not be to the failures."""
        unreadable = UnreadableImages(self.source, len(self.records))
        while True:
            record = int(self.records[choice])
            if record not in self.failed:
                note(record)
                try:
                    return self._augmented(epoch, record), record
                except UnreadableImageError as error:
                    self.failed[record] = error.reason
            failures.append((record, self.failed[record]))
            unreadable.add(failures[-1:])
            unreadable.check()  # ends the search, in the worst case after 1 % of the records
            choice = (choice + 1) % len(self.records)

    def _augmented(self, epoch: int, record: int) -> ImageArray:
        rng = np.random.default_rng((self.seed, epoch, record))
        choose = partial(random_crop_box, rng=rng, scale=self.crop_scale, ratio=self.crop_ratio)
        image = self.source.read_crop(record, self.image_size, choose)
        image = random_flip(image, rng) if self.flip else image
        return image if self.augment is None else self.augment(image, rng)


class _Example(NamedTuple):
    image: ImageArray | None  # None: could not be read
    record: int
    unreadable: Failures


class _EvaluationRecord:
    def __init__(self, source: ImageSource, image_size: tuple[int, int], share: float) -> None:
        self.source, self.image_size, self.share = source, image_size, share

    def __call__(self, record: Any) -> _Example:
        record = int(record)
        try:
            image = center_crop(self.source.read(record), self.image_size, share=self.share)
        except UnreadableImageError as error:
            return _Example(None, record, ((record, error.reason),))
        return _Example(image, record, ())


# -------------------------------------------------------------------------------------------------------- batches


def _checked(stream: Iterator[tuple[ImageArray, _Rest]], unreadable: UnreadableImages) -> Iterator[Batch]:
    for images, (index, failures, targets) in stream:
        unreadable.add(failures)
        unreadable.check()
        yield Batch(images, index, failures, targets)


def _regrouped(
    stream: Iterator[_Example], unreadable: UnreadableImages, batch_size: int, labels: IndexArray | None
) -> Iterator[EvaluationBatch]:
    images: list[ImageArray] = []
    records: list[int] = []
    for example in stream:
        unreadable.add(example.unreadable)
        if example.image is not None:
            images.append(example.image)
            records.append(example.record)
        if len(images) == batch_size:
            yield _evaluation_batch(images, records, labels)
            images, records = [], []
    if images:
        yield _evaluation_batch(images, records, labels)
    elif unreadable.is_all:
        raise ValueError(f"data: none of the images can be read: {unreadable.report()}")


def _evaluation_batch(images: list[ImageArray], records: list[int], labels: IndexArray | None) -> EvaluationBatch:
    index = np.array(records, np.int64)
    return EvaluationBatch(np.stack(images), None if labels is None else labels[index], index)


# --------------------------------------------------------------------------------------------------------- threads


def _import_grain() -> Any:
    """Import grain when it is needed: it takes a second, imports jax where that is installed, and warns where not."""
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
    # what the process may use, where the system says so: a container often gets fewer cores than the machine has
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


def _check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size: expected (height, width) of at least 1 pixel, got {image_size}")


def _check_indices(indices: IndexArray | None, number: int) -> IndexArray:
    if indices is None:
        return np.arange(number, dtype=np.int64)
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or len(indices) == 0:
        raise ValueError(
            f"indices: expected at least one integer, in one dimension, got {indices.dtype} {indices.shape}"
        )
    if indices.min() < 0 or indices.max() >= number:
        raise ValueError(f"indices: expected 0 to {number - 1}, got {indices.min()} to {indices.max()}")
    return indices.astype(np.int64)

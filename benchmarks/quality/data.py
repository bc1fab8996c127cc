"""Images of the studies, in formats that ``prmim`` reads."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.quality.arms import World
from prmim_train.config.layers import read_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.config.training import DIGITS
from prmim_train.data.sources import ImageSource, open_source
from prmim_train.run.prepare import open_data

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class Images(NamedTuple):
    """Paths of training and test images.

    Parameters
    ----------
    train
        Value of ``--data``.
    test
        Value of ``--test_data``. None: test on held-out training images.
    """

    train: str
    test: str | None


SOURCES = {
    "cifar10": ("cifar10_train.npz", "cifar10_test.npz"),
    "imagenette": ("imagenette128_train.tar", "imagenette128_val.tar"),
}
"""Files of training and test images, by data set."""


def find(world: World, folder: Path, prepared: Path) -> Images:
    """Find the images of a world, and convert them if necessary.

    Parameters
    ----------
    world
        Its data are ``"digits"`` (embedded), ``"digits_train"`` (their training images with seed 0), ``"cifar10"`` or
        ``"imagenette"``.
    folder
        Folder of the files in :data:`SOURCES`. An ``.npz`` file has ``labels`` (N,) and ``images`` (N, height, width,
        3), or their ``residuals``. The images of a tar file are decoded once.
    prepared
        Folder for converted files. A file of another source is replaced.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the numbers of images are not those of the world.
    """
    if world.data == "digits":
        return Images("digits", None)
    if world.data == "digits_train":
        return Images(str(_save_training_digits(prepared / "digits_train.npz")), None)
    sources = [folder / name for name in SOURCES[world.data]]
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"data: expected {source}, got no such file")
    train, test = (_prepare(source, prepared / f"{source.stem}.npz") for source in sources)
    found = tuple(_stored(path)[1] for path in (train, test))
    if found != world.images:
        expected, got = (f"{numbers[0]:,} training and {numbers[1]:,} test images" for numbers in (world.images, found))
        raise ValueError(f"data: expected {expected} of {world.data} in {folder}, got {got}")
    return Images(str(train), str(test))


def _save_training_digits(path: Path) -> Path:
    """Store the digits that the recipe ``digits`` trains on, without those that it holds out."""
    if not path.exists():
        data = open_data(pretrain_config(**read_options(DIGITS)))
        _save_source(path, data.source, data.train, DIGITS)
    return path


def _prepare(source: Path, path: Path) -> Path:
    """Store the images of a file as uint8, unless they are stored."""
    origin = f"{source.name}, CRC-32 {zlib.crc32(source.read_bytes()):08x}"
    if not path.exists() or _stored(path)[0] != origin:
        if source.suffix == ".tar":
            images = open_source(str(source), channels=3)
            _save_source(path, images, np.arange(len(images)), origin)
        else:
            _save(path, *_read_cifar(source), CIFAR_CLASSES, origin)
    return path


def _stored(path: Path) -> tuple[str, int]:
    """Return the origin of a converted file, and its number of images."""
    with np.load(path, allow_pickle=False) as archive:
        return str(archive.get("origin", "")), len(archive["labels"])


def _save_source(path: Path, source: ImageSource, chosen: NDArray[Any], origin: str) -> None:
    """Store chosen images of a source with classes; the images have equal size."""
    images = np.stack([source.read(int(index)) for index in tqdm(chosen, desc=path.name, unit="image")])
    assert source.labels is not None
    assert source.class_names is not None
    _save(path, images, source.labels[chosen], source.class_names, origin)


def _save(path: Path, images: NDArray[np.uint8], labels: NDArray[Any], names: Sequence[str], origin: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, images=images, labels=labels.astype(np.int64), names=np.array(names), origin=np.array(origin))
    partial.rename(path)


def _read_cifar(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images uint8 (N, 32, 32, 3) and labels (N,)."""
    with np.load(path, allow_pickle=False) as archive:
        if "residuals" not in archive:
            return archive["images"], archive["labels"]
        labels, images = archive["labels"], archive["residuals"]
    # Stored modulo 256: differences between neighbouring pixels along both axes, and of red and blue to green.
    for axis in (1, 2):
        images = np.cumsum(images, axis=axis, dtype=np.uint8)
    images[..., ::2] += images[..., 1:2]
    return images, labels

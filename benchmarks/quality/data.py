"""Images of the studies, in formats that ``prmim`` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

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


def find(name: str, folder: Path, prepared: Path) -> Images:
    """Find a data set, and convert it if necessary.

    Parameters
    ----------
    name
        ``"digits"`` (embedded), ``"digits_train"`` (their training images with seed 0), ``"cifar10"`` or
        ``"imagenette"``.
    folder
        Folder of the data sets. CIFAR-10: ``cifar10_train.npz`` and ``cifar10_test.npz``, or the published binary
        version ``cifar-10-batches-bin``. Imagenette: ``imagenette128_train.tar`` and ``imagenette128_val.tar``, which
        are decoded once, or ``imagenette/train`` and ``imagenette/val``; without validation images, part of the
        training images is held out.
    prepared
        Folder for converted files.

    Raises
    ------
    FileNotFoundError
        If the data set is missing. The message names the expected files.
    """
    if name == "digits":
        return Images("digits", None)
    if name == "digits_train":
        return Images(str(_save_training_digits(prepared / "digits_train.npz")), None)
    if name == "imagenette":
        return _find_imagenette(folder, prepared)
    return Images(*(str(_prepare_cifar(folder, prepared, part)) for part in ("train", "test")))


def _save_training_digits(path: Path) -> Path:
    """Store the digits that the recipe ``digits`` trains on, without those that it holds out."""
    if not path.exists():
        data = open_data(pretrain_config(**read_options(DIGITS)))
        _save_source(path, data.source, data.train)
    return path


def _find_imagenette(folder: Path, prepared: Path) -> Images:
    tars = {part: folder / f"imagenette128_{part}.tar" for part in ("train", "val")}
    if all(tar.exists() for tar in tars.values()):
        return Images(*(str(_decode(tar, prepared / f"imagenette_{part}.npz")) for part, tar in tars.items()))
    train, test = (folder / "imagenette" / part for part in tars)
    if train.exists():
        return Images(str(train), str(test) if test.exists() else None)
    raise FileNotFoundError(f"data: expected {' and '.join(map(str, tars.values()))}, or a folder {train}")


def _decode(tar: Path, path: Path) -> Path:
    """Store the images of a tar file as uint8, so that they are decoded once.

    The images have equal size.
    """
    if not path.exists():
        source = open_source(str(tar), channels=3)
        _save_source(path, source, np.arange(len(source)))
    return path


def _save_source(path: Path, source: ImageSource, chosen: NDArray[Any]) -> None:
    """Store chosen images of a source with classes; the images have equal size."""
    images = np.stack([source.read(int(index)) for index in tqdm(chosen, desc=path.name, unit="image")])
    assert source.labels is not None
    assert source.class_names is not None
    _save(path, images, source.labels[chosen], source.class_names)


def _prepare_cifar(folder: Path, prepared: Path, part: str) -> Path:
    path = prepared / f"cifar10_{part}.npz"
    if not path.exists():
        _save(path, *_read_cifar(folder, part), CIFAR_CLASSES)
    return path


def _save(path: Path, images: NDArray[np.uint8], labels: NDArray[Any], names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, images=images, labels=labels.astype(np.int64), names=np.array(names))
    partial.rename(path)


def _read_cifar(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images uint8 (N, 32, 32, 3) and labels (N,)."""
    packed, binary = folder / f"cifar10_{part}.npz", folder / "cifar-10-batches-bin"
    if packed.exists():
        with np.load(packed, allow_pickle=False) as archive:
            if "residuals" not in archive:
                return archive["images"], archive["labels"]
            labels, images = archive["labels"], archive["residuals"]
        # Stored modulo 256: differences between neighbouring pixels along both axes, and of red and blue to green.
        for axis in (1, 2):
            images = np.cumsum(images, axis=axis, dtype=np.uint8)
        images[..., ::2] += images[..., 1:2]
        return images, labels
    if binary.is_dir():
        files = sorted(binary.glob("data_batch_*.bin" if part == "train" else "test_batch.bin"))
        records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32) for file in files])
        return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), records[:, 0]
    raise FileNotFoundError(f"data: expected {packed}, or the binary version of CIFAR-10 in {binary}")

"""Origin of a run: its images, their split and its teacher.

The origin is recorded in the run directory, and compared on resume. `run.json` holds the ID of the run and the facts;
`trained.npz` holds the identity of every training image. Images that were trained on never count as held out, even if
the data change.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_methods.weight_files import write_atomically
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.identity import Identities
from prmim_train.data.sources import ImageSource
from prmim_train.run.directory import RunDirectory
from prmim_train.run.files import read_file
from prmim_train.run.processes import say

TRAINED = "trained.npz"

DIFFERENCES = {
    "images": "{got} images instead of {expected}",
    "names_and_sizes": "images of other names, sizes or pixels",
    "times": "files that were modified since",
    "labels": "other labels",
    "split": "another split into training and held-out images (it follows from seed, holdout and labels)",
    "teacher": "another teacher",
    "test_images": "{got} test images instead of {expected}",
    "test_names_and_sizes": "test images of other names, sizes or pixels",
    "test_times": "test files that were modified since",
    "test_labels": "other labels of the test images",
    "encoder": "the encoder of another run",
}
"""Facts of a run, and the text that reports a change of each."""


@dataclass(frozen=True)
class Origin:
    """Origin of a run.

    Parameters
    ----------
    facts
        Some of the keys of `DIFFERENCES`, with numbers or checksums.
    trained
        Identities of the training images.
    """

    facts: Mapping[str, Any]
    trained: Identities

    def difference(self, earlier: Mapping[str, Any]) -> str | None:
        """Describe the first difference from the recorded facts; None if all are equal."""
        for name, text in DIFFERENCES.items():
            if name in self.facts and self.facts[name] != earlier.get(name):
                return text.format(expected=earlier.get(name), got=self.facts[name])
        return None


def image_facts(source: ImageSource, found: Identities, prefix: str = "") -> dict[str, Any]:
    """Return the facts of an image source.

    Count, and checksums over names and sizes, over times, and over labels. Without labels, the fact is absent: runs of
    earlier versions recorded the single class of some folders.
    """
    facts = {
        f"{prefix}images": len(source),
        f"{prefix}names_and_sizes": _checksum(found.keys.tobytes()),
        f"{prefix}times": _checksum(found.stamps.tobytes()),
    }
    if source.labels is None or source.class_names is None:
        return facts
    names = "\n".join(source.class_names).encode(errors="surrogateescape")
    return {**facts, f"{prefix}labels": _checksum(source.labels.tobytes() + names)}


def data_origin(source: ImageSource, train: NDArray[np.int64]) -> Origin:
    """Return the origin of a run on some images of a source.

    Examines all files without reading their content.
    """
    found = source.identities()
    facts = {**image_facts(source, found), "split": _checksum(train.tobytes())}
    return Origin(facts, found.take(train))


def run_origin(config: PretrainConfig, source: ImageSource, train: NDArray[np.int64]) -> Origin:
    """Return the origin of a pre-training run: that of the data, and the teacher."""
    found = data_origin(source, train)
    return replace(found, facts={**found.facts, "teacher": _teacher_fact(getattr(config.method, "teacher", None))})


def record_origin(run: RunDirectory, origin: Origin, *, has_stepped: bool) -> None:
    """Write the origin of a run into its folder.

    Keeps the record of images of earlier steps.
    """
    known = read_trained(run) if has_stepped else None
    parts = [known, origin.trained] if known is not None else [origin.trained]
    keys = np.concatenate([part.keys for part in parts])
    stamps = np.concatenate([part.stamps for part in parts])
    pairs = np.unique(np.stack([keys.view(np.int64), stamps]), axis=1)
    write_atomically(run.path / TRAINED, lambda file: np.savez(file, keys=pairs[0].view(np.uint64), stamps=pairs[1]))
    run.write_identity(dict(origin.facts))


def check_origin(run: RunDirectory, origin: Origin, allow_changes: bool) -> None:
    """Compare an origin with the recorded one.

    Raises
    ------
    ValueError
        If they differ and changes are not allowed. Runs of earlier versions recorded nothing, and always pass.
    """
    recorded = run.read_identity()
    difference = None if recorded is None else origin.difference(recorded[1])
    if difference is None:
        return
    expected = f"what the run in {run.path} was trained on"
    if not allow_changes:
        raise ValueError(
            f"data: expected {expected}, got {difference}; restore it, start another run with --out, or add "
            "--allow_changes"
        )
    say(f"Changed: expected {expected}, got {difference}.")


def read_trained(run: RunDirectory) -> Identities | None:
    """Read the identities of the training images of a run; None if not recorded.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    path = run.path / TRAINED
    content = read_file(path)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keys, stamps = arrays["keys"], arrays["stamps"]
        if keys.dtype != np.uint64 or stamps.dtype != np.int64 or keys.ndim != 1 or keys.shape != stamps.shape:
            raise ValueError("other arrays")
    except Exception as error:  # of zip, zlib and NumPy's headers
        raise ValueError(f"run: expected the identities of the training images in {path}, which is damaged") from error
    return Identities(keys, stamps)


def is_trained_on(found: Identities, trained: Identities, *, elsewhere: bool = False) -> NDArray[np.bool_]:
    """Whether each image was trained on: bool (number of images,).

    Parameters
    ----------
    found
        The images.
    trained
        Images that were trained on.
    elsewhere
        Whether the images may be in another place, where a file of equal name and size can be another image. Then
        modification times must also be equal.
    """
    is_same: NDArray[np.bool_] = np.isin(found.keys, trained.keys)
    if elsewhere:
        pairs = set(zip(trained.keys.tolist(), trained.stamps.tolist(), strict=True))
        for place in np.flatnonzero(is_same):
            is_same[place] = (int(found.keys[place]), int(found.stamps[place])) in pairs
    return is_same


def _teacher_fact(teacher: str | None) -> str | None:
    """Return a teacher's hub name, or a checksum of its local files.

    The checksum is over names, sizes and times.
    """
    if teacher is None or not Path(teacher).is_dir():
        return teacher
    files = sorted(entry for entry in Path(teacher).iterdir() if entry.is_file())
    statuses = [(entry.name, entry.stat().st_size, int(entry.stat().st_mtime)) for entry in files]
    return _checksum(repr(statuses).encode(errors="surrogateescape"))


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

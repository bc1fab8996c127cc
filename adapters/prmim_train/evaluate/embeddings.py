"""Features of all images of a source, written to one file.

Interrupted jobs can be continued. Every `PART` images of the source are one part: a file in a hidden folder beside the
output. When all parts exist, the main process joins them, and deletes the folder. A part depends only on the indices of
its images. A continued job therefore writes the same file as an uninterrupted one, with any number of processes.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_methods import MethodConfig
from prmim_methods.architecture import encoder_of
from prmim_methods.encoder import EncoderConfig
from prmim_methods.files import expanded, open_regular
from prmim_methods.messages import shown
from prmim_methods.weight_files import WEIGHTS_FILE, write_atomically
from prmim_train.config.packages import check_installed
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.config.training import SAMPLING, SOURCE_OPTIONS, DataOptions, SourceOptions
from prmim_train.data.batches import evaluation_batches
from prmim_train.data.sources import ImageSource, open_source
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import EncoderEngine, check_launcher, create_encoder_engine
from prmim_train.run.files import delete, read_file, read_json, write_json
from prmim_train.run.origin import image_facts
from prmim_train.run.prepare import check_frames, file_architecture, find_checkpoint, read_run_config
from prmim_train.run.processes import FailedElsewhereError, is_main, on_main, say

__all__ = ["features_command", "read_info"]

PART = 1024
"""Number of images in a part."""
NPZ, PARQUET = ".npz", ".parquet"
JOB, LOCK = "job.json", ".lock"
_NUM_NAMED = 3


class Trained(NamedTuple):
    """An encoder with its weights and options.

    Parameters
    ----------
    record
        The method, or the encoder alone.
    weights
        File of the weights.
    options
        `backend`, `device`, `precision`, `max_pixels` and `SOURCE_OPTIONS`.
    sampling
        Sampling of clips and volumes.
    """

    record: MethodConfig | EncoderConfig
    weights: Path
    options: dict[str, Any]
    sampling: DataOptions


@dataclass(frozen=True)
class Output:
    """The file to write, and the folder of its parts.

    Parameters
    ----------
    path
        The file, `.npz` or `.parquet`.
    num_images
        Images of the source.
    """

    path: Path
    num_images: int

    @property
    def folder(self) -> Path:
        """Folder of the parts."""
        return self.path.with_name(f".{self.path.name}.parts")

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-self.num_images // PART)

    def part(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part_{number:08d}.npz"

    def images(self, number: int) -> NDArray[np.int64]:
        """Return the indices of the images of a part."""
        return np.arange(number * PART, min((number + 1) * PART, self.num_images), dtype=np.int64)

    def is_complete(self, job: dict[str, Any]) -> bool:
        """Whether the file exists as the result of a job.

        Another file raises FileExistsError.
        """
        if not self.path.exists():
            return False
        try:
            found = read_info(self.path).get("job")
        except (ValueError, OSError):
            found = None
        if found != job:
            what = (
                f"features with another {_first_difference(found, job)}" if isinstance(found, dict) else "other content"
            )
            raise FileExistsError(f"out: expected a new file, but {self.path} exists, with {what}")
        return True

    def begin(self, job: dict[str, Any]) -> None:
        """Create the folder of the parts, or check that it belongs to the job.

        Deletes incomplete files.
        """
        found = read_json(self.folder / JOB)
        if found is None:
            write_json(self.folder / JOB, job)
        elif found != job:
            raise ValueError(
                f"out: expected parts of the same job in {self.folder}, got some with another "
                f"{_first_difference(found, job)}; delete the folder, or name another file"
            )
        for folder, pattern in ((self.folder, ".*.partial-*"), (self.path.parent, f".{self.path.name}.partial-*")):
            for leftover in folder.glob(pattern):
                delete(leftover)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(f"out: another process is writing {self.path}; wait until it has ended") from None
        try:
            yield
        finally:
            lock.release()


def features_command(
    run: str,
    *,
    out: str,
    pool: str = "mean",
    layer: int | None = None,
    image_size: tuple[int, ...] | None = None,
    checkpoint: int | None = None,
    batch_size: int = 64,
    **given: Any,
) -> None:
    """Write the features of images to a file, with names and labels.

    Parameters
    ----------
    run
        Folder of a run, or a file of weights.
    out
        The file: `.npz` or `.parquet`.
    pool
        `mean` (of the patch tokens) or `cls`.
    layer
        Block whose output is written, before the final norm; 0: the input of the first block. None: the output of the
        encoder.
    image_size
        Size of the images in pixels. None: that of the run.
    checkpoint
        Step of the checkpoint. None: the newest good checkpoint.
    batch_size
        Images per forward pass.
    **given
        Options in place of those of the run: `SOURCE_OPTIONS`, `SAMPLING`, backend, device and precision.

    Raises
    ------
    ValueError
        If an option is not allowed or does not suit the encoder, or no image can be read.
    FileExistsError
        If the file exists and holds something else.
    FileNotFoundError
        If there is no run, no checkpoint or no file of weights.
    """
    path = Path(out)
    if path.suffix not in (NPZ, PARQUET):
        raise ValueError(f"out: expected a file {NPZ} or {PARQUET}, got {shown(out)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size}")
    if path.suffix == PARQUET:
        check_installed("out", "pyarrow", otherwise=f"a file {NPZ}")
    sampling = {name: given.pop(name) for name in SAMPLING if name in given}
    trained = _open_trained(expanded(run), checkpoint, given, sampling)
    check_frames(trained.record, image_size)
    encoder = trained.record.encoder_config(image_size)
    encoder.check_pool(pool)
    encoder.check_layer(layer)
    options = trained.options
    three_axes = trained.sampling.sampled_axes(encoder.image_size)
    taken = SourceOptions(**{name: options.pop(name) for name in SOURCE_OPTIONS})
    images = open_source(
        taken.data,
        channels=encoder.channels,
        max_pixels=options.pop("max_pixels"),
        three_axes=three_axes,
        keep_depth=encoder.pixel_range is not None,
        options=taken,
    )
    output = Output(path, len(images))
    with closing(
        create_encoder_engine(trained.record, weights=trained.weights, image_size=encoder.image_size, **options)
    ) as engine:
        check_launcher(options["backend"], engine)
        job = {
            "weights": _checksum(trained.weights),
            "pool": pool,
            "layer": layer,
            "image_size": list(encoder.image_size),
            "precision": engine.precision.value,
            **({} if three_axes is None else {"sampling": [three_axes.stride, three_axes.volumes, three_axes.spacing]}),
            **image_facts(images, images.identities()),
        }
        info = {"encoder": str(trained.weights), "data": images.description, "job": job}
        if engine.any(bool(on_main(engine, lambda: output.is_complete(job)))):
            say(f"Already complete: {path}")
            return
        say(f"{images.description}; {trained.weights}")

        def extract(pixels: NDArray[Any]) -> NDArray[np.float32]:
            return engine.features(pixels, pool, layer)

        _write(output, images, engine, extract, batch_size, info)


def _open_trained(run: Path, checkpoint: int | None, given: dict[str, Any], sampling: dict[str, Any]) -> Trained:
    """Find an encoder in the folder of a run, or in a file of weights."""
    names = (*SOURCE_OPTIONS, "backend", "device", "precision", "max_pixels")
    if run.is_file():
        record = encoder_of(file_architecture(run, checkpoint))
        defaults = {name: getattr(PretrainConfig, name) for name in names}
        return Trained(record, run, {**defaults, **given}, DataOptions(**sampling))
    directory = RunDirectory.open(run)
    config = read_run_config(directory, **{name: given[name] for name in SOURCE_OPTIONS if name in given})
    own = {name: getattr(config, name) for name in names}
    weights = find_checkpoint(directory, checkpoint) / WEIGHTS_FILE
    return Trained(config.method, weights, {**own, **given}, replace(config, **sampling))


def _write(
    output: Output,
    source: ImageSource,
    engine: EncoderEngine,
    extract: Callable[[NDArray[Any]], NDArray[np.float32]],
    batch_size: int,
    info: dict[str, Any],
) -> None:
    """Write the missing parts, distributed over the processes, then join all parts."""
    with _locked_on_main(output, engine):
        on_main(engine, lambda: output.begin(info["job"]))
        size = tuple(info["job"]["image_size"])
        _write_parts(output, engine, lambda part: _extract(source, output.images(part), extract, size, batch_size))
        on_main(engine, lambda: _join(output, source, info))


@contextmanager
def _locked_on_main(output: Output, engine: EncoderEngine) -> Iterator[None]:
    lock = output.locked()
    on_main(engine, lock.__enter__)
    try:
        yield
    finally:
        if engine.rank == 0:
            lock.__exit__(None, None, None)


def _write_parts(output: Output, engine: EncoderEngine, extract: Callable[[int], dict[str, NDArray[Any]]]) -> None:
    """Write the missing parts, in turns over the processes.

    If one process fails, all stop.
    """
    rounds = range(0, output.num_parts, engine.world_size)
    own = [first + engine.rank for first in rounds]
    with tqdm(total=output.num_images, desc="features", unit=" images", disable=None if is_main() else True) as bar:
        for first, number in zip(rounds, own, strict=True):
            failure = None
            try:
                if number < output.num_parts and not output.part(number).exists():
                    arrays = extract(number)
                    save = partial(np.savez, **arrays)  # type: ignore[arg-type]  # NumPy's annotation
                    write_atomically(output.part(number), save)
            except Exception as error:
                failure = error
            if engine.any(failure is not None):
                raise failure or FailedElsewhereError("another process failed")
            last = min(first + engine.world_size, output.num_parts)
            bar.update(sum(len(output.images(part)) for part in range(first, last)))


def _extract(
    source: ImageSource,
    indices: NDArray[np.int64],
    extract: Callable[[NDArray[Any]], NDArray[np.float32]],
    image_size: tuple[int, ...],
    batch_size: int,
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a part.

    Indices and features of images, and unreadable images with reasons.
    """
    index, features = [np.empty(0, np.int64)], []
    with evaluation_batches(source, indices, batch_size=batch_size, image_size=image_size) as batches:
        try:
            for batch in batches:
                index.append(batch.index)
                features.append(extract(batch.images))
        except ValueError:
            if not batches.unreadable.is_all:
                raise
        reasons = batches.unreadable.reasons
    unreadable = [f"{name} ({reason})".encode() for name, reason in reasons.items()]
    return {
        "index": np.concatenate(index),
        "features": np.concatenate(features) if features else np.empty((0, 0), np.float32),
        "unreadable": np.array(unreadable, np.bytes_),
    }


def _join(output: Output, source: ImageSource, info: dict[str, Any]) -> None:
    """Write the file from its parts, report, and delete the parts."""
    paths = [output.part(number) for number in range(output.num_parts)]
    unreadable = [text.decode() for path in paths for text in _read_array(path, "unreadable")]
    found = {path: _read_array(path, "index") for path in paths}
    found = {path: index for path, index in found.items() if len(index)}
    num_read = sum(map(len, found.values()))
    if unreadable:
        named = "; ".join(unreadable[:_NUM_NAMED]) + ("; ..." if len(unreadable) > _NUM_NAMED else "")
        say(f"{len(unreadable):,} of {output.num_images:,} images could not be read and were left out: {named}")
    if not num_read:
        delete(output.folder)
        raise ValueError(f"data: expected images that can be read, got {output.num_images:,} that cannot")
    dim = _read_array(next(iter(found)), "features").shape[1]
    info = {**info, "images": num_read, "unreadable": len(unreadable)}
    save = _save_npz if output.path.suffix == NPZ else _save_parquet
    write_atomically(output.path, lambda file: save(file, found, dim, source, info))
    delete(output.folder)
    say(f"Written: {output.path}, {num_read:,} images, {dim} values each")


def _read_array(path: Path, name: str) -> NDArray[Any]:
    """Read one array of a part."""
    try:
        with np.load(io.BytesIO(read_file(path) or b""), allow_pickle=False) as arrays:
            array: NDArray[Any] = arrays[name]
            return array
    except Exception as error:  # of zip, zlib and NumPy's headers
        raise ValueError(f"out: expected a part of the features in {path}, which is damaged; delete it") from error


Found = Mapping[Path, NDArray[np.int64]]
"""Indices of the images in each part."""


def _save_npz(file: BinaryIO, found: Found, dim: int, source: ImageSource, info: dict[str, Any]) -> None:
    index = np.concatenate(list(found.values()))
    arrays: dict[str, NDArray[Any]] = {"names": np.array([source.name(place) for place in index.tolist()])}
    if source.labels is not None:
        arrays["labels"] = source.labels[index]
        arrays["class_names"] = np.array(source.class_names)
    arrays["info"] = np.array(json.dumps(info))
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(index), dim)}
            np.lib.format.write_array_header_1_0(member, header)
            for path in found:
                member.write(_read_array(path, "features").astype("<f4").tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _save_parquet(file: BinaryIO, found: Found, dim: int, source: ImageSource, info: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("name", pa.string()), ("features", pa.list_(pa.float32(), dim))]
    if source.labels is not None:
        fields += [("label", pa.int64()), ("class_name", pa.string())]
    schema = pa.schema(fields, metadata={"prmim": json.dumps(info)})
    with pq.ParquetWriter(file, schema) as writer:
        for path, index in found.items():
            features = _read_array(path, "features")
            columns: dict[str, Any] = {
                "name": [source.name(place) for place in index.tolist()],
                "features": pa.FixedSizeListArray.from_arrays(features.ravel(), dim),
            }
            if source.labels is not None and source.class_names is not None:
                labels = source.labels[index]
                columns["label"] = labels
                columns["class_name"] = [source.class_names[label] if label >= 0 else None for label in labels]
            writer.write_table(pa.table(columns, schema=schema))


def read_info(path: Path) -> dict[str, Any]:
    """Read the origin of a file of features. Another file raises ValueError.

    Returns
    -------
    dict
        `encoder` and `data`, `images` and `unreadable` (numbers), and `job`: pool, layer, size, precision, and
        checksums of weights and images.
    """
    try:
        if path.suffix == PARQUET:
            import pyarrow.parquet as pq

            text = pq.read_schema(path).metadata[b"prmim"].decode()
        else:
            with np.load(path, allow_pickle=False) as arrays:
                text = str(arrays["info"])
        info = json.loads(text)
    except OSError:
        raise
    except Exception as error:  # of zip, zlib, NumPy and Arrow
        raise ValueError(f"out: expected a file of features, got {path}") from error
    if not isinstance(info, dict):
        raise ValueError(f"out: expected a file of features, got {path}")
    return info


def _first_difference(found: dict[str, Any], job: dict[str, Any]) -> str:
    name = next((name for name in (*job, *found) if found.get(name) != job.get(name)), "origin")
    got, ours = found.get(name), job.get(name)
    if isinstance(ours, str) and len(ours) == 64:  # checksums do not help the reader
        return name
    return f"{name}: {shown(got)} instead of {shown(ours)}"


def _checksum(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

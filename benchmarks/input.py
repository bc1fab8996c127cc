"""Throughput from image files to the device, and waiting time of a run.

The throughput is compared with a plain DataLoader. Both sides make batches of random crops on the device: decode a JPEG
file, crop 0.2 to 1 of the area, resize (bicubic), flip at random, uint8. The plain side follows common trainers: PIL,
default collate function, the same number of worker processes. Each turn restarts both sides; batches read ahead before
the clock starts are not counted.
"""

import argparse
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.formats import COLUMNS, compare_formats, pack_tar
from benchmarks.report import Report, argument_parser, ratio
from prmim_train.config.layers import read_options
from prmim_train.config.pretrain import PretrainConfig, pretrain_config
from prmim_train.data.batches import train_batches
from prmim_train.data.sources import ImageSource, open_source
from prmim_train.data.transforms import random_crop_box, resize
from prmim_train.run.engine import create_engine
from prmim_train.run.prepare import open_data

READERS = {
    "0 workers": {"threads": 0},
    "0 workers, 2 threads": {"threads": 2},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
}
"""Options of our readers. The plain side has the same number of workers and no threads."""

LARGE = (4000, 3000)
"""Width and height of a typical camera image."""

FOREVER = 10**6  # batches
READ_AHEAD = 2  # batches per worker, on both sides

Batches = AbstractContextManager[Iterator[Tensor]]


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Return noise (width, height) that compresses like photographs.

    As a JPEG file of quality 90, it takes about half a byte per pixel.
    """
    width, height = size
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, math.ceil(math.log2(max(size)))):
        shape = [max(1, 2**octave * side // max(size)) for side in (height, width)]
        grey = rng.standard_normal(shape, np.float32)
        for channel in range(3):
            layer = Image.fromarray(grey + 0.3 * rng.standard_normal(shape, np.float32))
            pixels[..., channel] += 55 * 0.8**octave * np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    pixels += 8 * rng.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, size: tuple[int, int], pictures: int) -> str:
    """Create a folder of JPEG files and return its path."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(pictures):
        photograph(rng, size).save(folder / f"{number:03}.jpg", quality=90)
    return str(folder)


# --------------------------------------------------------------------------------------------------- the two sides


class Plain(Dataset[Any]):
    """Random crops of image files, as in common trainers."""

    def __init__(self, source: Any, image_size: int) -> None:
        self.files = [source.records.folder / name for name in source.records.files]
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        picture = Image.open(self.files[index]).convert("RGB")
        top, left, height, width = random_crop_box((picture.height, picture.width), rng)
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(picture)


@contextmanager
def plain_batches(
    source: ImageSource, *, batch: int, image_size: int, device: str, workers: int = 0
) -> Iterator[Iterator[Tensor]]:
    """Yield batches of the plain side on the device."""
    dataset = Plain(source, image_size)
    # Forking is unsafe: this process has other threads.
    context = multiprocessing.get_context("forkserver") if workers else None
    loader = DataLoader(
        dataset,
        batch_sampler=(np.random.randint(len(dataset), size=batch).tolist() for _ in range(FOREVER)),  # noqa: NPY002
        num_workers=workers,
        pin_memory=device == "cuda",
        multiprocessing_context=context,
    )
    yield (images.to(device, non_blocking=True) for images in loader)


@contextmanager
def our_batches(
    source: ImageSource, *, batch: int, image_size: int, device: str, **readers: int
) -> Iterator[Iterator[Tensor]]:
    """Yield batches of ``train_batches`` on the device."""
    # Repeat the images to the size of a real data set: grain shuffles small ones more slowly.
    indices = np.resize(np.arange(len(source)), 2**16)
    options = {"indices": indices, "batch_size": batch, "image_size": (image_size, image_size), **readers}
    with train_batches(source, **options, seed=0, total_steps=FOREVER) as batches:
        yield (torch.from_numpy(made.images).to(device) for made in batches)


def seconds_per_batch(stream: Batches, device: str, ahead: int, number: int) -> float:
    """Return the seconds per batch, without batches that were read ahead."""
    with stream as batches:
        for _ in itertools.islice(batches, ahead):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(batches, number):
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / number


def compare(
    source: ImageSource, readers: dict[str, dict[str, int]], repeats: int, number: int, **shape: Any
) -> dict[str, tuple[float, ...]]:
    """Return rows of images per second: ours, per core, plain, ours to plain."""
    ours: dict[str, list[float]] = {name: [] for name in readers}
    plain: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):  # in turns, so that temporary load affects all
        for name, reader in readers.items():
            workers = reader.get("workers", 0)
            ahead = 1 + READ_AHEAD * max(reader.values())
            measure = partial(seconds_per_batch, device=shape["device"], ahead=ahead, number=number)
            ours[name].append(measure(our_batches(source, **shape, **reader)))
            plain[name].append(measure(plain_batches(source, **shape, workers=workers)))
    rows = {}
    for name, reader in readers.items():
        speed, other = (shape["batch"] / statistics.median(times[name]) for times in (ours, plain))
        rows[name] = (speed, speed / max(1, *reader.values()), other, ratio(plain[name], ours[name]))
    return rows


# ------------------------------------------------------------------------------------------------------- the tables


def pack(source: Any, where: Path, image_size: int) -> dict[str, str]:
    """Pack the images of a folder into files; return their paths by kind."""
    files = [source.records.folder / name for name in source.records.files]
    side = 8 * image_size // 7
    images = [resize(np.asarray(Image.open(file).convert("RGB")), (side, side)) for file in files]
    np.savez(where / "packed.npz", images=np.stack(images))
    return {"tar": pack_tar(files, where / "packed.tar"), f"npz, {side} px": str(where / "packed.npz")}


def compare_sources(
    sources: dict[str, ImageSource], repeats: int, number: int, **shape: Any
) -> dict[str, tuple[float, float]]:
    """Return rows of images per second in one thread, and ratios to the first source."""
    times: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats):
        for name, source in sources.items():
            stream = our_batches(source, threads=0, **shape)
            times[name].append(seconds_per_batch(stream, shape["device"], 1, number))
    first = next(iter(times.values()))
    return {name: (shape["batch"] / statistics.median(own), ratio(first, own)) for name, own in times.items()}


def reduced(source: ImageSource, image_size: int, crops: int) -> tuple[float, float | None, float | None]:
    """Compare crops with those of fully decoded images.

    Returns the share of crops that differ, and their median and least PSNR in dB.
    """
    size = (image_size, image_size)
    found = []
    for number in range(crops):
        index = number % len(source)
        image = source.read(index)
        top, left, height, width = box = random_crop_box(image.shape[:2], np.random.default_rng(number))
        expected = resize(image[top : top + height, left : left + width], size).astype(np.float64)
        error = np.square(source.read_crop(index, size, lambda shape, box=box: box) - expected).mean()
        if error:
            found.append(10 * math.log10(255**2 / error))
    return len(found) / crops, *((statistics.median(found), min(found)) if found else (None, None))


def waiting(config: PretrainConfig, steps: int, warm_up: int = 3) -> tuple[float, float, float]:
    """Return how long a training step waits for its images.

    The result is milliseconds per step, milliseconds of waiting, and their share in percent. Steps are synchronous.
    Steps of real runs are asynchronous, and hide more of the waiting.
    """
    data = open_data(config)
    engine = create_engine(config, data.budget)
    waited, whole = [], []
    with train_batches(
        data.source,
        indices=data.train,
        batch_size=config.batch_size,
        image_size=config.method.image_size,
        seed=config.seed,
        total_steps=warm_up + steps,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        crop_draw=config.crop_draw,
        flip=config.flip,
        workers=config.workers,
    ) as batches:
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - start)
            engine.train_step(batch.images, batch.index)
            engine.read_metrics()
            whole.append(time.perf_counter() - start)
    engine.close()
    per_step, wait = (1e3 * sum(times[warm_up:]) / steps for times in (whole, waited))
    return per_step, wait, 100 * wait / per_step


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    options = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    step_batch = options.step_batch or (256 if on_gpu else 16)
    multiprocessing.set_forkserver_preload(["torch.utils.data", "prmim_train.data.batches"])
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        folder = options.data or write_photographs(where / "small", tuple(options.size), options.pictures)
        large_folder = write_photographs(where / "large", tuple(options.large), 1)
        source, large = (open_source(path, channels=3) for path in (folder, large_folder))
        settings = {"images": source.description if options.data else f"{options.size[0]} x {options.size[1]}"}
        settings |= {"image_size": options.image_size, "batch": options.batch, "repeats": options.repeats}
        report = Report("input", settings, options.json)

        shape = {"batch": options.batch, "image_size": options.image_size, "device": device}
        columns = {"images/s": ".0f", "per core": ".0f", "plain": ".0f", "to plain": ".2f"}
        number = max(1, options.images // options.batch)
        report.table("folder", columns, compare(source, READERS, options.repeats, number, **shape))
        few = {**shape, "batch": max(1, options.batch // 8)}
        one = {"0 workers": READERS["0 workers"]}
        report.table("large", columns, compare(large, one, options.repeats, max(1, number // 4), **few))

        sources = {"folder": source}
        for name, path in pack(source, where, options.image_size).items():
            sources[name] = open_source(path, channels=3)
        rows = compare_sources(sources, options.repeats, number, **shape)
        report.table("source, 1 thread", {"images/s": ".0f", "to folder": ".2f"}, rows)

        files = [source.records.folder / name for name in source.records.files]
        size = {"batch": min(options.batch, len(files)), "image_size": options.image_size}
        report.table("format", COLUMNS, compare_formats(folder, files, where, options.repeats, **size))

        columns = {"share": ".2f", "PSNR, dB": ".1f", "least": ".1f"}
        chosen = {"folder": source, "large": large}
        crops = {name: reduced(images, options.image_size, options.crops) for name, images in chosen.items()}
        report.table("reduced crops", columns, crops)

        precision = "bfloat16" if on_gpu else "float32"
        small = {"data": folder, "image_size": options.image_size, "model": "vit_small", "batch_size": step_batch}
        small |= {"holdout": 0.0, "precision": precision, "compile": on_gpu}
        runs = {
            "digits": (pretrain_config(**read_options("digits")), 20 * options.steps),
            f"ViT-S/16, batch {step_batch}": (pretrain_config(**small), options.steps),
        }
        columns = {"ms a step": ".1f", "waiting": ".2f", "share, %": ".2f"}
        report.table("run", columns, {name: waiting(*run) for name, run in runs.items()})


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", help="folder of JPEG files (default: generated images)")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width and height of generated images")
    parser.add_argument("--large", type=int, nargs=2, default=LARGE, help="size of the large generated image")
    sizes = {"pictures": 64, "image_size": 224, "batch": 32, "images": 256, "repeats": 3, "crops": 32, "steps": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--step-batch", type=int, help="batch size of ViT-S/16 (default: 256 on a GPU, else 16)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

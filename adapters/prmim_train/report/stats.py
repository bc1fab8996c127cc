"""`prmim stats`: statistics of images, and matching options."""

import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from prmim_methods.encoder import times
from prmim_methods.messages import counted
from prmim_train.config.axes import ThreeAxes
from prmim_train.config.training import SourceOptions
from prmim_train.data.depth import PixelRange
from prmim_train.data.sources import ImageSource, open_source
from prmim_train.data.statistics import Statistics, far_below, full_range, measure_images

__all__ = ["describe_images", "stats_command"]

NUM_NAMED = 3
NUM_SIZES = 4


def stats_command(
    data: str,
    *,
    channels: int | None = None,
    limit: int | None = None,
    clips: bool = False,
    volumes: bool = False,
    **keys: Any,
) -> None:
    """Print statistics of the images of a source; see :func:`describe_images`.

    Parameters
    ----------
    data, channels, volumes
        As in `prmim pretrain`. Default of `channels`: as in the files.
    clips
        The images are clips: videos, folders of frames, or arrays. Reads 16 evenly spaced frames of each.
    limit
        Maximum number of images to read, evenly spaced. None: all.
    **keys
        Other options of `prmim_train.config.training.SourceOptions`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if clips and volumes:
        raise ValueError("clips: expected false with volumes, got true")
    options = SourceOptions(data=data, **keys)
    three_axes = ThreeAxes(1, volumes=volumes) if clips or volumes else None
    source = open_source(data, channels=channels, three_axes=three_axes, keep_depth=True, options=options)
    show = partial(tqdm, desc="images", disable=None, leave=False)  # no bar if the output is not a terminal
    print(describe_images(data, source, measure_images(source, limit, find_duplicates=True, show=show)))


def describe_images(data: str, source: ImageSource, found: Statistics) -> str:
    """Return two paragraphs: statistics of the images, and options to paste.

    Parameters
    ----------
    data
        Value of `--data`.
    source
        Source of the images.
    found
        Statistics of the images.
    """
    kept, given = _range_of(found)
    is_volumes = source.three_axes is not None and source.three_axes.volumes
    unit = "voxels" if is_volumes else "pixels"
    rows = [
        ("found", source.description),
        ("read", f"{counted(found.number, 'image')} of {len(source):,}"),
        ("unreadable", _named(len(found.unreadable), [found.unreadable.named(NUM_NAMED)])),
        ("duplicates", _named(len(found.duplicates), [f"{one} is {other}" for one, other in found.duplicates])),
        ("sizes", _counts([(f"{times(size)} {unit}", number) for size, number in found.sizes.most_common()])),
        ("channels", _counts([(str(value), number) for value, number in found.channels.most_common()])),
        ("type", _counts(found.depths.most_common())),
        ("values", f"{found.low:.6g} to {found.high:.6g}"),
        ("mean", f"{_numbers(found.mean)} per channel"),
        ("std", f"{_numbers(found.std)} per channel"),
    ]
    if found.rates:
        rows.insert(5, ("frame rates", _counts([(f"{rate:g} a second", n) for rate, n in found.rates.most_common()])))
    if is_volumes:
        rows.insert(5, ("spacing", _spacing_text(found)))
    if warning := far_below(found, None):
        rows.append(("warning", warning))
    low, high = kept
    unit_mean, unit_std = (found.mean - low) / (high - low), found.std / (high - low)
    options = [f"--data {shlex.quote(data)}", f"--channels {source.channels}"]
    options += ["--volumes true"] if is_volumes else []
    options += [f"--pixel_range {low:.10g},{high:.10g}"] if given else []
    options += [f"--mean {_numbers(unit_mean, ',')}", f"--std {_numbers(unit_std.clip(1e-4), ',')}"]
    lines = ["Images", *(f"  {name:<18}  {text}" for name, text in rows)]
    return "\n".join([*lines, "", "Options", f"  {' '.join(options)}"])


def _spacing_text(found: Statistics) -> str:
    """Describe the spacing of voxels in millimetres."""
    if not found.spacings:
        return "not in the files; --spacing depth,height,width sets it"
    return _counts([(f"{_numbers(size, ' x ')} mm", number) for size, number in found.spacings.most_common()])


def _range_of(found: Statistics) -> tuple[PixelRange, bool]:
    """Return the pixel range for training, and whether it must be given as an option."""
    (depth, _), *_ = found.depths.most_common(1)
    full = full_range(depth)
    if full is not None and depth == "uint8" and not far_below(found, None):
        return full, False
    return found.pixel_range(), True


def _named(number: int, names: Sequence[str]) -> str:
    more = f", and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
    return f"{number:,}: {', '.join(names[:NUM_NAMED])}{more}" if number else "0"


def _counts(items: Sequence[tuple[str, int]]) -> str:
    if len(items) == 1:
        return items[0][0]
    listed = ", ".join(f"{name} ({number:,})" for name, number in items[:NUM_SIZES])
    return listed + (f", and {len(items) - NUM_SIZES:,} more" if len(items) > NUM_SIZES else "")


def _numbers(values: Iterable[float], separator: str = ", ") -> str:
    return separator.join(f"{value:.4g}" for value in values)

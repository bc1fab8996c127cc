"""`prmim inspect`: data, tokens and cost of a run, before it starts."""

import math
from collections.abc import Sequence

import numpy as np

from prmim_methods import CostReport, PixelConfig
from prmim_methods.cost import PartCost
from prmim_methods.encoder import times
from prmim_methods.messages import counted, shorten
from prmim_methods.record import find_option
from prmim_train.config.axes import Spacing
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.batches import UnreadableImages
from prmim_train.data.crops import crop_effect
from prmim_train.data.image_files import ImageHeader, ignore_pillow_warnings
from prmim_train.data.sources import ArraySource, ImageSource, UnreadableImageError
from prmim_train.data.statistics import far_below, measure_images
from prmim_train.data.transforms import plane_of
from prmim_train.run.budget import Budget
from prmim_train.run.engine import Engine, check_backend
from prmim_train.run.prepare import RunData, open_data
from prmim_train.run.proposal import LEAST_IMAGES, doubts, propose
from prmim_train.run.size import OPTIMIZED_BYTES, accounting, excess, expected_precision

UNKNOWN = "unknown until the teacher is downloaded"
CUSTOM = "without your mixing module"
"""Suffix of numbers that exclude unknown parts."""
MAX_HEADERS = 2000
MAPS = "attention_maps"
"""Name of the cost of passes that compute attention maps."""
ONCE = {"teacher": "the teacher", MAPS: "attention maps"}
"""Parts without a backward pass."""
NUM_MEASURED = 8
"""Number of images whose pixel values `inspect` reads."""
MAX_ENLARGEMENT = 2
"""Median enlargement of the crops above which `inspect` warns."""
NUM_NAMED = 3
NUM_CLASSES = 10
MAX_NAME = 30


def inspect_run(config: PretrainConfig) -> str:
    """Describe by formula what `pretrain` would do with the same options.

    Trains nothing and writes nothing. Imports neither torch nor jax, and downloads no teacher. The device is not
    checked.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    str
        Several paragraphs: data, tokens, computation, memory, optimization. They also report a model that is too large
        for `pretrain`, and missing packages of the backend.

    Raises
    ------
    ValueError, TypeError, OSError
        As `pretrain` would.
    """
    data = open_data(config)
    paragraphs = [
        _data_lines(config, data),
        ["Tokens per image", *(_row(name, text) for name, text in config.method.describe())],
        _cost_lines(config),
        _memory_lines(config),
        _parameter_lines(config),
        _optimisation_lines(config, data.budget),
        _proposal_lines(config, data.budget),
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def format_brief(config: PretrainConfig, data: RunData, engine: Engine) -> str:
    """Describe a run in a few lines, printed when it starts.

    Parameters
    ----------
    config
        The options of the run.
    data
        Images and length of the run.
    engine
        Engine of the run.
    """
    found = doubts(config, data.budget)
    lines = [
        f"Data: {data.source.description}; {len(data.train):,} to train on, {len(data.held_out):,} held out",
        f"Tokens: {times(config.method.grid.shape)} grid; {config.method.summary()}",
        f"Model: {engine.num_parameters / 1e6:.2f} M parameters, {brief_cost(config)}; {engine.device}",
        f"Steps: {data.budget.total_steps:,} of {config.batch_size} images ({config.epochs} epochs), peak learning "
        f"rate {config.learning_rate:.3g} after {data.budget.warmup_steps:,} steps",
        *(f"Warning: {text}" for text in _range_warnings(config, data.source)),
        *(f"Warning: {text}" for text in found),
        *["prmim inspect, with the same options, proposes others for this number of images."] * bool(found),
    ]
    return "\n".join(lines)


def cost_reports(config: PretrainConfig) -> tuple[CostReport, CostReport] | None:
    """Return the cost per image of a run and of its baseline.

    The baseline is the published method without throwing. The passes over whole images that compute attention maps are
    spread over all epochs.

    Returns
    -------
    (CostReport, CostReport) or None
        None until a teacher that the cost depends on is downloaded.
    """
    how = accounting(config)
    ours, baseline = config.method.cost(how), config.method.baseline().cost(how)
    if ours is None or baseline is None:
        return None
    if isinstance(config.method, PixelConfig) and config.attention_passes:
        macs = config.attention_passes * config.method.attention_cost(how).macs // config.epochs
        ours = CostReport({**ours.parts, MAPS: PartCost(macs, 0)})
    return ours, baseline


def brief_cost(config: PretrainConfig) -> str:
    """Describe a run's cost per image, and the change from its baseline, in one line."""
    reports = cost_reports(config)
    if reports is None:
        return f"cost {UNKNOWN}"
    ours, baseline = reports
    change = _change(ours.macs, baseline.macs)
    compared = f"{change} against" if change else "as"
    macs = f"{_macs(ours.macs)} MACs forward per image" + f", {CUSTOM}" * (not ours.is_known)
    return f"{macs} ({compared} {config.method.baseline_name})"


def _data_lines(config: PretrainConfig, data: RunData) -> list[str]:
    source = data.source
    held_out = 100 * len(data.held_out) / len(source)
    return [
        "Data",
        _row("found", source.description),
        _row("to train on", f"{len(data.train):,} images"),
        _row("held out", f"{len(data.held_out):,} images ({held_out:.1f} %)"),
        _row("labels", _labels_text(source)),
        *_size_lines(config, source),
        *[_row("warning", text) for text in _range_warnings(config, source)],
    ]


def _labels_text(source: ImageSource) -> str:
    if source.class_names is None:
        return "none"
    names = [shorten(name, MAX_NAME) for name in source.class_names[:NUM_CLASSES]]
    more = ", ..." if len(source.class_names) > NUM_CLASSES else ""
    return f"{counted(len(source.class_names), 'class', 'classes')}: {', '.join(names)}{more}"


def _size_lines(config: PretrainConfig, source: ImageSource) -> list[str]:
    """Describe the sizes of evenly spaced images, and of their crops."""
    ignore_pillow_warnings()
    number = 1 if isinstance(source, ArraySource) else min(len(source), MAX_HEADERS)
    unreadable = UnreadableImages(source, number)
    headers: list[ImageHeader] = []
    for record in np.arange(number) * len(source) // number:
        try:
            headers.append(source.header(int(record)))
        except UnreadableImageError as error:
            unreadable.add([(int(record), error.reason)])
    lines = []
    if not isinstance(source, ArraySource):
        named = f": {unreadable.named(NUM_NAMED)}" if len(unreadable) else ""
        lines = [_row("unreadable", f"{len(unreadable):,} of {counted(number, 'header')} checked{named}")]
    if not headers:
        return lines
    if config.volumes:
        return [*lines, *_volume_lines(config, headers)]
    return [
        *lines,
        *_frame_lines(config, headers),
        *_crop_lines(config, [plane_of(header.shape) for header in headers]),
    ]


def _frame_lines(config: PretrainConfig, headers: Sequence[ImageHeader]) -> list[str]:
    """Describe the lengths of clips, and the frames of a crop; empty for images."""
    if config.three_axes is None:
        return []
    wanted, stride = config.three_axes.frames, config.frame_stride
    span = (wanted - 1) * stride + 1
    lengths = sorted(header.shape[0] for header in headers)
    rates = sorted(header.rate for header in headers if header.rate is not None)
    taken = f"{wanted} frames" + f", one in {stride}: {span} frames of the clip" * (stride > 1)
    if rates:
        taken += f", {span / rates[len(rates) // 2]:.3g} seconds"
    lines = [_row("frames", _range_text(lengths)), _row("frames of a crop", taken)]
    if rates:
        lines.insert(1, _row("frames per second", _range_text(rates)))
    if short := sum(length < span for length in lengths):
        advice = "; choose a smaller frame_stride" if stride > 1 else ""
        reason = f"{short:,} of {counted(len(lengths), 'clip')} have fewer frames, and repeat their last one{advice}"
        lines.append(_row("warning", reason))
    return lines


def _range_text(ordered: Sequence[float]) -> str:
    """Describe the smallest, the median and the largest of sorted numbers."""
    smallest, median, largest = (f"{ordered[place]:,.5g}" for place in (0, len(ordered) // 2, -1))
    return f"{smallest} to {largest}, median {median}" if smallest != largest else smallest


def _range_warnings(config: PretrainConfig, source: ImageSource) -> list[str]:
    """Warn if the values of a few images are far below the range."""
    try:
        warning = far_below(measure_images(source, NUM_MEASURED), config.method.pixel_range)
    except ValueError:  # unreadable images are reported already
        return []
    return [warning] if warning else []


def _crop_lines(config: PretrainConfig, shapes: list[tuple[int, int]]) -> list[str]:
    size = plane_of(config.method.image_size)
    flipped = ", mirrored" if config.flip else ""
    crops = f"{times(config.method.image_size)} pixels"
    if config.crop_padding is not None:
        enlargement = np.array([max(size[0] / height, size[1] / width) for height, width in shapes])
        crops += f", windows of the resized image with {config.crop_padding} mirrored pixels around it{flipped}"
        lines = [_row("crops", crops), _row("enlargement", f"{np.median(enlargement):.2g} times (median)")]
    else:
        effect = crop_effect(shapes, size, scale=config.crop_scale, ratio=config.crop_ratio, draw=config.crop_draw)
        share, enlargement = effect.share, effect.enlargement
        crops += f", {share.min():.2g} to {share.max():.2g} of the area (mean {share.mean():.2g}){flipped}"
        factors = f"{np.median(enlargement):.2g} times (median), {enlargement.min():.2g} to {enlargement.max():.2g}"
        lines = [
            _row("crops", crops),
            _row("enlargement", f"{factors}; stretched up to {effect.stretch.max():.3g} times along one side"),
        ]
    return [
        _row("image sizes", _sizes_text(shapes, "pixels")),
        *lines,
        *_enlargement_warning(float(np.median(enlargement))),
    ]


def _volume_lines(config: PretrainConfig, headers: list[ImageHeader]) -> list[str]:
    shapes = [header.shape for header in headers]
    spacings = [config.spacing or header.spacing for header in headers]
    size = config.method.image_size
    effect = crop_effect(
        shapes, size, scale=config.crop_scale, ratio=config.crop_ratio, draw=config.crop_draw, spacings=spacings
    )
    share, enlargement, step = effect.share, effect.enlargement, effect.step
    crops = f"{times(size)} voxels, {share.min():.2g} to {share.max():.2g} of the volume (mean {share.mean():.2g})"
    factors = f"{np.median(enlargement):.2g} times (median), {enlargement.min():.2g} to {enlargement.max():.2g}"
    known = [spacing for spacing in spacings if spacing is not None]
    lines = [
        _row("volume sizes", _sizes_text(shapes, "voxels")),
        _row("spacing", _spacing_text(known)),
        _row("crops", crops + ", mirrored along each axis" * config.flip),
    ]
    if len(known) == len(spacings):
        lines.append(
            _row("voxels of crops", f"{np.median(step):.3g} mm (median), {step.min():.3g} to {step.max():.3g}")
        )
    along = f"{factors}, along the axis with the fewest voxels; stretched up to {effect.stretch.max():.3g} times"
    return [*lines, _row("enlargement", along), *_enlargement_warning(float(np.median(enlargement)))]


def _spacing_text(spacings: Sequence[Spacing]) -> str:
    """Describe the spacing of volumes, where it is known."""
    if not spacings:
        return "unknown, so voxels count as cubes; --spacing depth,height,width sets it"
    found = sorted(set(spacings), key=math.prod)
    first, last = (" x ".join(f"{step:.3g}" for step in found[place]) for place in (0, -1))
    return f"{first} mm" if len(found) == 1 else f"{first} to {last} mm"


def _sizes_text(shapes: Sequence[tuple[int, ...]], unit: str) -> str:
    """Describe the smallest, the median and the largest size."""
    ordered = sorted(shapes, key=math.prod)
    smallest, median, largest = (times(ordered[place]) for place in (0, len(ordered) // 2, -1))
    return f"{smallest} to {largest} {unit}, median {median}" if len(set(ordered)) > 1 else f"{smallest} {unit}"


def _enlargement_warning(enlargement: float) -> list[str]:
    if enlargement <= MAX_ENLARGEMENT:
        return []
    reason = f"crops are enlarged {enlargement:.2g} times, so most patches show blur"
    return [_row("warning", f"{reason}; choose a smaller image_size or larger crops (crop_scale)")]


def _cost_lines(config: PretrainConfig) -> list[str]:
    title = "Multiply-accumulates per image, forward"
    reports = cost_reports(config)
    if reports is None:
        return [title, _row(UNKNOWN, "")]
    ours, baseline = reports
    factor = "four" if config.method.recompute_blocks else "three"
    once = "".join(f"; {what} once" for name, what in ONCE.items() if name in ours.parts)
    lines = [f"{title} (a training step: about {factor} times as many{once})", _table_head(config)]
    for name, part in ours.parts.items():
        compared = baseline.parts[name].macs if name in baseline.parts else 0
        if part.macs or compared or not part.is_known:
            lines.append(_cost_row(name.replace("_", " "), part.macs if part.is_known else None, compared))
    lines.append(_cost_row("total" if ours.is_known else "total of the others", ours.macs, baseline.macs))
    if isinstance(config.method, PixelConfig) and config.attention_passes:
        macs = _macs(config.method.attention_cost(accounting(config)).macs)
        passes = counted(config.attention_passes, "pass", "passes")
        lines.append(_row(MAPS.replace("_", " "), f"{passes} of {macs} in {config.epochs} epochs"))
    return lines


def _cost_row(name: str, ours: int | None, baseline: int) -> str:
    if ours is None:
        return f"  {name:<18}{'unknown':>12}{_macs(baseline):>12}"
    return f"  {name:<18}{_macs(ours):>12}{_macs(baseline):>12} {_change(ours, baseline):>9}".rstrip()


def _memory_lines(config: PretrainConfig) -> list[str]:
    reports = cost_reports(config)
    how = (
        f"estimate, fused attention, {expected_precision(config).value}"
        + ", blocks recomputed" * config.method.recompute_blocks
        + f", {CUSTOM}" * (reports is not None and not reports[0].is_known)
    )
    title = f"Memory for activations saved for the backward pass ({how})"
    if reports is None:
        return [title, _row(UNKNOWN, "")]
    ours, baseline = (report.peak_activation_bytes for report in reports)
    batch = config.micro_batch
    return [
        title,
        _table_head(config),
        f"  {'per image':<18}{_bytes(ours):>12}{_bytes(baseline):>12} {_change(ours, baseline):>9}".rstrip(),
        f"  {f'{batch} images at once':<17} {_bytes(ours * batch):>12}{_bytes(baseline * batch):>12}",
    ]


def _table_head(config: PretrainConfig) -> str:
    return f"  {'':<18}{'this run':>12}{config.method.baseline_name:>12}{'change':>10}"


def _change(ours: float, baseline: float) -> str:
    """Return the signed difference from the baseline; empty without a baseline.

    Large differences are given as a factor.
    """
    if baseline and ours >= 100 * baseline:
        return f"x {ours / baseline:.2g}"
    return f"{100 * (ours / baseline - 1):+.1f} %" if baseline and ours != baseline else ""


def _parameter_lines(config: PretrainConfig) -> list[str]:
    learned = config.method.parameters().learned
    memory = f"{_bytes(OPTIMIZED_BYTES * learned)} with gradients and optimizer"
    reports = cost_reports(config)
    others = f", {CUSTOM}" * (reports is not None and not reports[0].is_known)
    lines = [
        "Parameters",
        _row("learned", UNKNOWN if reports is None else f"{learned:,} ({memory}{others})"),
        _row("backend", _backend_text(config.backend)),
        _row("device", "auto: a GPU if there is one" if config.device == "auto" else config.device),
    ]
    reason = excess(config) or excess(config, images=config.micro_batch)
    return [*lines, _row("too large", reason)] if reason else lines


def _backend_text(backend: str) -> str:
    try:
        check_backend(backend)
    except ImportError as error:  # the rest of the report needs no framework
        return str(error).removeprefix("backend: ")
    return backend


def _optimisation_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    parts = f", in {config.accumulate} parts of {config.micro_batch}" if config.accumulate > 1 else ""
    supervised = " x {} / {}".format(*config.supervision) * config.scale_learning_rate
    rate = f"{config.base_learning_rate:g} x {config.batch_size} / 256{supervised} = {config.learning_rate:.4g}"
    decay = find_option(type(config), "decay").rule.choices[config.decay]
    minutes = f" or {config.checkpoint_minutes:g} minutes" if config.checkpoint_minutes is not None else ""
    precision = expected_precision(config)
    return [
        "Optimization",
        _row("effective batch", f"{config.batch_size} images per step{parts}"),
        _row("peak learning rate", rate),
        _row("steps", f"{budget.total_steps:,} ({config.epochs} epochs of {budget.steps_per_epoch:.4g} steps)"),
        _row("warm-up", f"{budget.warmup_steps:,} steps, then {decay}"),
        _row("lowest rate", f"{config.min_learning_rate:g}"),
        _row("precision", f"{precision.value} ({precision.reason})"),
        _row(
            "checkpoints", f"every {budget.checkpoint_steps:,} steps{minutes}; the last {config.keep_checkpoints} kept"
        ),
        _row("run directory", f"{config.run_path}"),
    ]


def _proposal_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    """Warn of options that do not suit the number of images, and propose others."""
    found = doubts(config, budget)
    if not found:
        return []
    lines = ["Few images or steps", *(_row("warning", text) for text in found)]
    if proposed := propose(config, budget):
        lines.append(_row("proposed", " ".join(f"--{name} {_value(value)}" for name, value in proposed.items())))
    if budget.num_images < LEAST_IMAGES:
        lines.append(_row("start", "--init_weights, with weights trained on more images of this kind, if you have any"))
    return lines


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(name: str, value: str) -> str:
    return f"  {name:<18}  {value}"


def _macs(count: int) -> str:
    if count >= 1e14:
        return f"{count / 1e12:.4g} T"
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _bytes(count: float) -> str:
    if count >= 1e14:
        return f"{count / 1e12:.4g} TB"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"

"""What a run will do and cost, told before it starts."""

from collections.abc import Sequence
from contextlib import closing
from math import prod

from prmim_train.budget import Budget
from prmim_train.config import PretrainConfig
from prmim_train.cost import cost_reports
from prmim_train.engine import Engine, create_engine
from prmim_train.prepare import RunData, open_data
from prmim_train.teacher import read_teacher

PART_NAMES = {
    "patch_embed": "patch embedding",
    "encoder": "encoder",
    "decoder_embed": "decoder input",
    "decoder": "decoder",
    "fusion": "layer fusion",
    "stages": "stages",
    "head": "prediction",
    "heads": "predictions",
    "teacher": "teacher",
}
TOKENS_OF_THROWING = {"furthest": "by furthest sampling", "random": "at random", "cell": "by a running cell"}
NO_COST = "unknown before the teacher is there"


def inspect_run(config: PretrainConfig) -> str:
    """Describe what `pretrain` would do with the same options; trains nothing and writes nothing.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    str
        Several paragraphs: data, tokens, computation, memory, optimisation.

    Raises
    ------
    ValueError, TypeError, OSError
        As `pretrain` would.
    """
    data = open_data(config)
    parameters = _parameter_lines(config, data.budget)  # first, since a teacher comes from the hub with the engine
    paragraphs = [
        _data_lines(config, data),
        _token_lines(config),
        _cost_lines(config),
        _memory_lines(config),
        parameters,
        _optimisation_lines(config, data.budget),
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs)


def format_brief(config: PretrainConfig, data: RunData, engine: Engine) -> str:
    """Describe a run in a few lines, as `pretrain` prints them at its start.

    Parameters
    ----------
    config
        The options of the run.
    data
        Its images and its length.
    engine
        Its engine.

    Returns
    -------
    str
    """
    lines = [
        f"Data: {data.source.description}; {len(data.train):,} to train on, {len(data.held_out):,} held out",
        f"Tokens: {_times(config.grid.shape)} grid; {_brief_tokens(config)}",
        f"Model: {engine.num_parameters / 1e6:.2f} M parameters, {_brief_cost(config)}; {engine.device}",
        f"Steps: {data.budget.total_steps:,} of {config.batch_size} images ({config.epochs} epochs), peak learning "
        f"rate {config.learning_rate:.3g} after {data.budget.warmup_steps:,} steps",
    ]
    return "\n".join(lines)


def _brief_tokens(config: PretrainConfig) -> str:
    counts = config.counts
    stages = f"in stages of {' + '.join(str(size) for size in config.schedule.stage_sizes)}"
    if config.method == "maskalign":
        masked = f"rebuilt {stages}" if config.is_rebuilt else "of which nothing is made"
        return f"{counts.visible} visible, {counts.masked} masked, {masked}; encoder sequence {_encoder_length(config)}"
    length = f"decoder sequence {_decoder_length(config)}"
    if config.method == "simmim":
        length = f"encoder sequence {_encoder_length(config)}"
    thrown = f"{counts.thrown} thrown {stages}" if config.is_rebuilt else f"{counts.thrown} thrown"
    return f"{counts.visible} visible, {counts.decoded} decoded, {thrown}; {length}"


def _brief_cost(config: PretrainConfig) -> str:
    reports = cost_reports(config)
    if reports is None:
        return f"cost {NO_COST}"
    ours, other = reports
    text = f"{_macs(ours.macs)} MACs forward per image"
    if config.method != "maskalign":
        return f"{text}, {_percent(1 - ours.macs / other.macs)} fewer than dense"
    text += f" (teacher: {_macs(ours.parts['teacher'].macs)})"
    return f"{text}, {_percent(ours.macs / other.macs - 1)} more than plain"


def _data_lines(config: PretrainConfig, data: RunData) -> list[str]:
    source = data.source
    number = len(source.class_names or ())
    labels = "none" if source.labels is None else f"{number} {'class' if number == 1 else 'classes'}"
    low, high = config.crop_scale
    crops = f"{_times(config.image_shape)} pixels, {low:g} to {high:g} of the area" + (
        ", mirrored" if config.flip else ""
    )
    return [
        "Data",
        _row("found", source.description),
        _row("to train on", f"{len(data.train):,} images"),
        _row("held out", f"{len(data.held_out):,} images ({_percent(len(data.held_out) / len(source))})"),
        _row("labels", labels),
        _row("crops", crops),
    ]


def _token_lines(config: PretrainConfig) -> list[str]:
    counts = config.counts
    grid = f"{_times(config.grid.shape)} = {counts.num_tokens} patches of {_times(config.patch_shape)} pixels"
    lines = ["Tokens per image", _row("grid", grid)]
    if config.method == "maskalign":
        return lines + _aligned_token_lines(config)
    dense = f"(dense: {counts.num_tokens + 1})"
    if config.method == "simmim":
        lines.append(_row("hidden as a whole", _unit_text(config)))
    lines.append(_row("visible", f"{counts.visible}"))
    lines.append(_row("decoded", f"{counts.decoded}, {_choice_text(config)}"))
    lines.append(_row("thrown", f"{counts.thrown} ({_percent(counts.thrown / counts.num_tokens)} of all)"))
    lines += _stage_lines(config)
    if config.method == "simmim":
        lines.append(_row("encoder sequence", f"{_encoder_length(config)}, with mask tokens and class token {dense}"))
    else:
        lines.append(_row("encoder sequence", f"{_encoder_length(config)}, with the class token"))
        lines.append(_row("decoder sequence", f"{_decoder_length(config)} {dense}"))
    supervised = counts.decoded if config.variant == "none" else counts.masked
    lines.append(_row("supervised", f"{supervised} of {counts.masked} masked"))
    return lines


def _aligned_token_lines(config: PretrainConfig) -> list[str]:
    counts = config.counts
    drawn = {"attention": "by the teacher's attention", "random": "at random"}[config.masking]
    supervised = f"class token, {counts.visible} visible"
    supervised += f" and {counts.masked} rebuilt tokens" if config.is_rebuilt else "; nothing is made of masked tokens"
    return [
        _row("visible", f"{counts.visible}, drawn {drawn}"),
        _row("masked", f"{counts.masked}, which the student does not see"),
        *_stage_lines(config),
        _row("encoder sequence", f"{_encoder_length(config)}, with the class token"),
        _row("teacher", _teacher_text(config)),
        _row("aligned layers", _layer_text(config)),
        _row("supervised", supervised),
    ]


def _teacher_text(config: PretrainConfig) -> str:
    teacher = read_teacher(str(config.teacher))
    if teacher is None:
        return f"{config.teacher}: its size is {NO_COST}"
    size = teacher.size
    seen = [length * patch for length, patch in zip(config.grid.shape, teacher.patch_size, strict=True)]
    return (
        f"{teacher.title}, {size.heads} heads; sees the whole image at {_times(seen)} pixels, "
        f"{config.grid.num_tokens + 1} tokens; frozen"
    )


def _layer_text(config: PretrainConfig) -> str:
    teacher = read_teacher(str(config.teacher))
    how = {"linear": "each with a learned mix of", "sum": "each with a learned mix, at first the mean, of"}
    mixed = f"{how[config.fusion]} the student's {config.encoder_size.depth}"
    if teacher is None:
        return f"the teacher's last {config.teacher_layers}, {mixed}"
    depth = teacher.size.depth
    return f"the teacher's {depth - config.teacher_layers + 1} to {depth}, {mixed}"


def _unit_text(config: PretrainConfig) -> str:
    tokens = prod(config.unit)
    units = tuple(length // size for length, size in zip(config.grid.shape, config.unit, strict=True))
    pixels = tuple(size * patch for size, patch in zip(config.unit, config.patch_shape, strict=True))
    hidden = config.counts.masked // tokens
    return f"{hidden} of {_times(units)} = {prod(units)} units of {_times(config.unit)} tokens, {_times(pixels)} pixels"


def _choice_text(config: PretrainConfig) -> str:
    if not config.counts.thrown:
        return "all masked ones: nothing is thrown"
    how = TOKENS_OF_THROWING[config.throwing]
    if config.throwing == "furthest" and config.furthest_from == "visible":
        how += " from the visible ones"
    what = "whole units, chosen" if config.throw_by == "unit" else "chosen"
    return f"{what} {how}"


def _stage_lines(config: PretrainConfig) -> list[str]:
    if not config.is_rebuilt:
        return []
    schedule = config.schedule
    return [
        _row(f"  stage {stage}", f"{size} rebuilt from {schedule.num_known(stage)} known, {config.variant}")
        for stage, size in enumerate(schedule.stage_sizes, start=1)
        if size
    ]


def _cost_lines(config: PretrainConfig) -> list[str]:
    title = "Multiply-accumulates per image, forward"
    reports = cost_reports(config)
    if reports is None:
        return [title, _row(NO_COST, "")]
    ours, other = reports
    times = "four" if config.recompute_blocks else "three"
    teacher = ", the teacher once" if "teacher" in ours.parts else ""
    title += f" (a training step takes about {times} times as many{teacher})"
    lines = [title, _table_head(config)]
    for key, part in ours.parts.items():
        lines.append(_cost_row(config, PART_NAMES.get(key, key), part.macs, other.parts[key].macs))
    lines.append(_cost_row(config, "total", ours.macs, other.macs, is_total=True))
    return lines


def _cost_row(config: PretrainConfig, name: str, ours: int, other: int, *, is_total: bool = False) -> str:
    change = _change(config, ours, other) if other and (is_total or ours != other) else ""
    return f"  {name:<18}{_macs(ours):>12}{_macs(other):>12}{change:>10}"


def _memory_lines(config: PretrainConfig) -> list[str]:
    how = f"estimate, fused attention, {config.precision}" + ", blocks recomputed" * config.recompute_blocks
    title = f"Memory for activations kept for the backward pass ({how})"
    reports = cost_reports(config)
    if reports is None:
        return [title, _row(NO_COST, "")]
    ours, other = (report.peak_activation_bytes for report in reports)
    batch = config.micro_batch
    return [
        title,
        _table_head(config),
        f"  {'per image':<18}{_bytes(ours):>12}{_bytes(other):>12}{_change(config, ours, other):>10}",
        f"  {f'{batch} images at once':<18}{_bytes(ours * batch):>12}{_bytes(other * batch):>12}",
    ]


def _table_head(config: PretrainConfig) -> str:
    other, change = ("plain", "added") if config.method == "maskalign" else ("dense", "saved")
    return f"  {'':<18}{'this run':>12}{other:>12}{change:>10}"


def _change(config: PretrainConfig, ours: int, other: int) -> str:
    """Say what is saved against the dense method, or added to MaskAlign, which has nothing that could be saved."""
    return _percent(ours / other - 1 if config.method == "maskalign" else 1 - ours / other)


def _parameter_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    try:
        with closing(create_engine(config, budget)) as engine:
            learned, device = engine.num_parameters, engine.device
    except ImportError as error:  # everything else on this page is known without the framework
        return ["Parameters", _row("unknown", str(error))]
    # float32 weight, gradient and the two moments of AdamW
    memory = f"{_bytes(16 * learned)} with gradients and optimiser"
    return [
        "Parameters",
        _row("learned", f"{learned:,} ({memory})"),
        _row("device", device),
    ]


def _optimisation_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    parts = f", {config.accumulate} parts of {config.micro_batch} after each other" if config.accumulate > 1 else ""
    rate = f"{config.base_learning_rate:g} x {config.batch_size} / 256 = {config.learning_rate:.4g}"
    return [
        "Optimisation",
        _row("effective batch", f"{config.batch_size} images per step{parts}"),
        _row("peak learning rate", rate),
        _row("steps", f"{budget.total_steps:,} ({config.epochs} epochs of {budget.steps_per_epoch:.4g} steps)"),
        _row("warm-up", f"{budget.warmup_steps:,} steps, {_decay_text(config)}"),
        _row("checkpoints", f"{_checkpoint_text(config, budget)}, the last {config.keep_checkpoints} are kept"),
        _row("run directory", f"{config.run_path}"),
    ]


def _checkpoint_text(config: PretrainConfig, budget: Budget) -> str:
    minutes = f" or {config.checkpoint_minutes:g} minutes" if config.checkpoint_minutes is not None else ""
    return f"every {budget.checkpoint_steps:,} steps{minutes}"


def _decay_text(config: PretrainConfig) -> str:
    if config.decay == "step":
        return "then the peak, and a tenth of it over the last eighth of the steps"
    return f"then half a cosine to {config.min_learning_rate:g}"


def _encoder_length(config: PretrainConfig) -> int:
    """Count what the encoder sees: SimMIM shows it mask tokens too."""
    counts = config.counts
    return counts.visible + (counts.decoded if config.method == "simmim" else 0) + 1


def _decoder_length(config: PretrainConfig) -> int:
    return config.counts.visible + config.counts.decoded + 1


def _row(name: str, value: str) -> str:
    return f"  {name:<18}  {value}"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _macs(count: int) -> str:
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"

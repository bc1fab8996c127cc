"""What a run will do and cost, told before it starts."""

from dataclasses import replace
from math import prod

from prmim_core import CostReport, Transformer, cost
from prmim_train.config import Budget, PretrainConfig
from prmim_train.engine import Engine, create_engine
from prmim_train.prepare import RunData, open_data

PART_NAMES = {
    "patch_embed": "patch embedding",
    "encoder": "encoder",
    "decoder_embed": "decoder input",
    "decoder": "decoder",
    "stages": "stages",
    "head": "prediction",
}


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
    paragraphs = [
        _data_lines(config, data),
        _token_lines(config),
        _cost_lines(config),
        _memory_lines(config),
        _parameter_lines(config, data.budget),
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
    counts = config.counts
    ours, dense = cost_reports(config)
    lines = [
        f"Data: {data.source.description}; {len(data.train):,} to train on, {len(data.held_out):,} held out",
        f"Tokens: {_times(config.grid.shape)} grid; {counts.visible} visible, {counts.decoded} decoded, "
        f"{counts.thrown} thrown in stages of {_stage_text(config)}; decoder sequence {_decoder_length(config)}",
        f"Model: {engine.num_parameters / 1e6:.2f} M parameters, {_macs(ours.macs)} MACs forward per image, "
        f"{_percent(1 - ours.macs / dense.macs)} fewer than dense; {engine.device}",
        f"Steps: {data.budget.total_steps:,} of {config.batch_size} images ({config.epochs} epochs), peak learning "
        f"rate {config.learning_rate:.3g} after {data.budget.warmup_steps:,} steps",
    ]
    return "\n".join(lines)


def cost_reports(config: PretrainConfig) -> tuple[CostReport, CostReport]:
    """Return the cost per image of a configuration, and of the same one with nothing thrown.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    ours, dense : CostReport
    """
    return _cost_report(config), _cost_report(replace(config, throwing="none"))


def _cost_report(config: PretrainConfig) -> CostReport:
    return cost(
        config.schedule,
        patch_dim=prod(config.patch_shape) * config.channels,
        encoder=config.encoder_size,
        decoder=Transformer(config.decoder_dim, config.decoder_depth, config.decoder_heads),
        variant=config.variant,  # type: ignore[arg-type]  # one of its names, as the configuration checked
        compute_bytes=4 if config.precision == "float32" else 2,
    )


def _data_lines(config: PretrainConfig, data: RunData) -> list[str]:
    source = data.source
    labels = "none" if source.labels is None else f"{len(source.class_names or ())} classes"
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
    counts, schedule = config.counts, config.schedule
    how = {"furthest": "by furthest sampling", "random": "at random", "cell": "by a running cell"}[schedule.throwing]
    if schedule.throwing == "furthest" and config.furthest_from == "visible":
        how += " from the visible ones"
    chosen = f"chosen {how}" if counts.thrown else "all masked ones: nothing is thrown"
    dense_length = counts.num_tokens + 1
    supervised = counts.decoded if config.variant == "none" else counts.masked
    lines = [
        "Tokens per image",
        _row(
            "grid", f"{_times(config.grid.shape)} = {counts.num_tokens} patches of {_times(config.patch_shape)} pixels"
        ),
        _row("visible", f"{counts.visible}"),
        _row("decoded", f"{counts.decoded}, {chosen}"),
        _row("thrown", f"{counts.thrown} ({_percent(counts.thrown / counts.num_tokens)} of all)"),
    ]
    for stage, size in enumerate(schedule.stage_sizes, start=1):
        if size and config.variant != "none":
            lines.append(
                _row(f"  stage {stage}", f"{size} rebuilt from {schedule.num_known(stage)} known, {config.variant}")
            )
    lines.append(_row("encoder sequence", f"{counts.visible + 1}, with the class token"))
    lines.append(_row("decoder sequence", f"{_decoder_length(config)} (dense: {dense_length})"))
    lines.append(_row("supervised", f"{supervised} of {counts.masked} masked"))
    return lines


def _cost_lines(config: PretrainConfig) -> list[str]:
    ours, dense = cost_reports(config)
    lines = [
        "Multiply-accumulates per image, forward (a training step takes about three times as many)",
        f"  {'':<18}{'this run':>12}{'dense':>12}{'saved':>10}",
    ]
    for key, part in ours.parts.items():
        other = dense.parts[key].macs
        saved = _percent(1 - part.macs / other) if other and part.macs != other else ""
        lines.append(f"  {PART_NAMES.get(key, key):<18}{_macs(part.macs):>12}{_macs(other):>12}{saved:>10}")
    total = _percent(1 - ours.macs / dense.macs)
    lines.append(f"  {'total':<18}{_macs(ours.macs):>12}{_macs(dense.macs):>12}{total:>10}")
    return lines


def _memory_lines(config: PretrainConfig) -> list[str]:
    ours, dense = (report.activation_bytes for report in cost_reports(config))
    batch = config.micro_batch
    return [
        f"Memory for activations kept for the backward pass (estimate, fused attention, {config.precision})",
        f"  {'':<18}{'this run':>12}{'dense':>12}{'saved':>10}",
        f"  {'per image':<18}{_bytes(ours):>12}{_bytes(dense):>12}{_percent(1 - ours / dense):>10}",
        f"  {f'{batch} images at once':<18}{_bytes(ours * batch):>12}{_bytes(dense * batch):>12}",
    ]


def _parameter_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    try:
        engine = create_engine(config, budget)
    except ImportError as error:  # everything else on this page is known without the framework
        return ["Parameters", _row("unknown", str(error))]
    # float32 weight, gradient and the two moments of AdamW
    memory = f"{_bytes(16 * engine.num_parameters)} with gradients and optimiser"
    return [
        "Parameters",
        _row("encoder + decoder", f"{engine.num_parameters:,} ({memory})"),
        _row("device", engine.device),
    ]


def _optimisation_lines(config: PretrainConfig, budget: Budget) -> list[str]:
    parts = f", {config.accumulate} parts of {config.micro_batch} after each other" if config.accumulate > 1 else ""
    rate = f"{config.base_learning_rate:g} x {config.batch_size} / 256 = {config.learning_rate:.4g}"
    return [
        "Optimisation",
        _row("effective batch", f"{config.batch_size} images per step{parts}"),
        _row("peak learning rate", rate),
        _row("steps", f"{budget.total_steps:,} ({config.epochs} epochs of {budget.steps_per_epoch:.4g} steps)"),
        _row("warm-up", f"{budget.warmup_steps:,} steps, then half a cosine to {config.min_learning_rate:g}"),
        _row("checkpoints", f"every {budget.checkpoint_steps:,} steps, the last {config.keep_checkpoints} are kept"),
        _row("run directory", f"{config.run_path}"),
    ]


def _decoder_length(config: PretrainConfig) -> int:
    return config.counts.visible + config.counts.decoded + 1


def _stage_text(config: PretrainConfig) -> str:
    return " + ".join(str(size) for size in config.schedule.stage_sizes)


def _row(name: str, value: str) -> str:
    return f"  {name:<18}  {value}"


def _times(shape: tuple[int, ...]) -> str:
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

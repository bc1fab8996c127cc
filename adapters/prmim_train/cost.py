"""What a configuration costs per image, told by the core's formulas; no framework is needed for that."""

from dataclasses import replace
from math import prod
from typing import Any

from prmim_core import CostReport, Transformer, cost, maskalign_cost, simmim_cost
from prmim_train.config import PretrainConfig
from prmim_train.teacher import read_teacher


def cost_reports(config: PretrainConfig) -> tuple[CostReport, CostReport] | None:
    """Return the cost per image of a configuration, and of the published method without progressive reconstruction.

    The latter is the dense method, which decodes all masked tokens; for MaskAlign, which decodes none, the plain one,
    which does nothing with them.

    Parameters
    ----------
    config
        The options of the run.

    Returns
    -------
    (CostReport, CostReport) or None
        This run's and the other's; None where the size of the teacher is not known yet.
    """
    ours, other = _cost_report(config), _cost_report(replace(config, throwing="none"))
    return None if ours is None or other is None else (ours, other)


def _cost_report(config: PretrainConfig) -> CostReport | None:
    shared: dict[str, Any] = {
        "patch_dim": prod(config.patch_shape) * config.channels,
        "encoder": config.encoder_size,
        "variant": config.variant if config.counts.thrown else "none",
        "recompute_blocks": config.recompute_blocks,
        "compute_bytes": 4 if config.precision == "float32" else 2,
    }
    if config.method == "mae":
        decoder = Transformer(config.decoder_dim, config.decoder_depth, config.decoder_heads)
        return cost(config.schedule, decoder=decoder, **shared)
    if config.method == "simmim":
        return simmim_cost(config.schedule, relative_position=config.position == "relative", **shared)
    teacher = read_teacher(str(config.teacher))
    if teacher is None:
        return None
    shared["variant"] = config.variant if config.is_rebuilt else "none"
    return maskalign_cost(
        config.schedule,
        teacher=teacher.size,
        teacher_patch_dim=teacher.patch_dim,
        teacher_tokens=config.grid.num_tokens,
        layers=config.teacher_layers,
        **shared,
    )

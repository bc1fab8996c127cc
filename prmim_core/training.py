"""The options of a training run that every engine shares: how the learning rate goes, and what is in range."""

from math import cos, pi
from typing import Literal, get_args

Decay = Literal["cosine", "step"]


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float, decay: Decay = "cosine"
) -> float:
    """Return the learning rate of a step, counted from 0.

    After a linear warm-up from 0: ``"cosine"``, half a cosine to ``minimum``; ``"step"``, constant, and a tenth after
    seven eighths of the steps (SimMIM), though never below ``minimum``.

    Examples
    --------
    >>> [learning_rate_at(step, 4, 2, 1.0, 0.0) for step in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    >>> [learning_rate_at(step, 8, 2, 1.0, 0.0, "step") for step in (1, 2, 6, 7)]
    [0.5, 1.0, 1.0, 0.1]
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "step":
        return max(peak * (0.1 if 8 * step >= 7 * total_steps else 1.0), minimum)
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1 + cos(pi * done))


def check_training(
    seed: int,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    clip_grad: float | None,
    accumulate: int,
    decay: str,
) -> None:
    """Raise ValueError unless the options of a training run are in range; see the engines for what they mean."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed}")
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps: expected 0 to total_steps {total_steps}, got {warmup_steps}")
    if not 0 <= min_learning_rate <= learning_rate < float("inf"):
        raise ValueError(
            f"learning_rate: expected a number of at least min_learning_rate {min_learning_rate}, got {learning_rate}"
        )
    if clip_grad is not None and not clip_grad > 0:
        raise ValueError(f"clip_grad: expected a positive number or None, got {clip_grad}")
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
    if decay not in get_args(Decay):
        raise ValueError(f"decay: expected 'cosine' or 'step', got {decay!r}")

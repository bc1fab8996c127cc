"""Learning-rate schedules."""

from math import cos, pi

DECAYS = {
    "cosine": "half a cosine to min_learning_rate",
    "whole_cosine": "half a cosine over the whole run, with its start replaced by the warm-up (SimMIM's fine-tuning)",
    "step": "constant, then a tenth over the last eighth of the run, as in SimMIM",
}
"""Decay of the learning rate after the warm-up."""


def learning_rate_at(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    minimum: float,
    decay: str = "cosine",
    start: float = 0.0,
) -> float:
    """Return the learning rate of a step, from 0: a linear warm-up, then a decay.

    Parameters
    ----------
    step
        The step.
    total_steps, warmup_steps
        Length of the run and of its warm-up.
    peak, minimum
        Learning rate at the end of the warm-up, and the lowest value after it.
    decay
        A key of :data:`DECAYS`.
    start
        Learning rate of the first step of the warm-up.

    Examples
    --------
    >>> [learning_rate_at(step, 4, 2, 1.0, 0.0) for step in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    >>> [round(learning_rate_at(step, 4, 2, 1.0, 0.0, "whole_cosine", start=0.2), 3)
    ...     for step in range(4)]
    [0.2, 0.6, 0.5, 0.146]
    >>> [learning_rate_at(step, 8, 2, 1.0, 0.0, "step") for step in (1, 2, 6, 7)]
    [0.5, 1.0, 1.0, 0.1]
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if decay == "step":
        return max(peak * (0.1 if 8 * step >= 7 * total_steps else 1.0), minimum)
    first = 0 if decay == "whole_cosine" else warmup_steps
    done = min((step - first) / max(total_steps - first, 1), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1 + cos(pi * done))

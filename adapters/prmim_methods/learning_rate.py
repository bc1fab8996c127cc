"""The learning-rate schedules."""

from math import cos, pi

DECAYS = {
    "cosine": "half a cosine to min_learning_rate",
    "step": "constant, then a tenth over the last eighth of the run, as in SimMIM",
}
"""How the learning rate falls after the warm-up."""


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, minimum: float, decay: str = "cosine"
) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up from 0, then a decay.

    Parameters
    ----------
    step
        The step.
    total_steps, warmup_steps
        Length of the run and of its warm-up.
    peak, minimum
        Learning rate after the warm-up, and the lowest one after it.
    decay
        A key of :data:`DECAYS`.

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

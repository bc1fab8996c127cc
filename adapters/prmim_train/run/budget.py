"""Length of a run: the only place where epochs become optimizer steps."""

from dataclasses import dataclass
from math import ceil

from prmim_train.config.training import TrainingOptions


@dataclass(frozen=True)
class Budget:
    """Length of a run in optimizer steps.

    Parameters
    ----------
    num_images
        Training images per epoch.
    steps_per_epoch
        Steps per epoch, usually a fraction, since batches cross epoch boundaries.
    total_steps
        Optimizer steps of the whole run.
    warmup_steps
        Steps of linear warm-up.
    checkpoint_steps
        Steps between checkpoints.
    """

    num_images: int
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int

    def is_end_of(self, epochs: int, step: int) -> bool:
        """Whether `step` is the nearest one to a multiple of `epochs` epochs.

        Examples
        --------
        >>> budget = Budget(num_images=1438, steps_per_epoch=11.98, total_steps=60, warmup_steps=3,
        ...     checkpoint_steps=12)
        >>> [step for step in range(1, 61) if budget.is_end_of(2, step)]
        [24, 48]
        """
        length = epochs * self.steps_per_epoch
        return step == round(max(1, round(step / length)) * length)

    def steps_of(self, start: int, every: int) -> tuple[int, ...]:
        """Return the steps that end epoch `start` and every `every`-th epoch after it.

        The last step of the run is left out.

        Examples
        --------
        >>> budget = Budget(num_images=1438, steps_per_epoch=11.98, total_steps=60, warmup_steps=3,
        ...     checkpoint_steps=12)
        >>> budget.steps_of(1, 2)
        (12, 36)
        """
        number = ceil(self.total_steps / self.steps_per_epoch / every)
        ends = (round((start + turn * every) * self.steps_per_epoch) for turn in range(number))
        return tuple(sorted({max(1, step) for step in ends if step < self.total_steps}))


def training_budget(config: TrainingOptions, num_images: int) -> Budget:
    """Convert epochs to optimizer steps.

    Batches cross epoch boundaries: no image is dropped, and a batch may be larger than the data set.

    Parameters
    ----------
    config
        Options of the run.
    num_images
        Training images, without the held-out ones.

    Returns
    -------
    Budget

    Examples
    --------
    >>> from prmim_train.config.pretrain import PretrainConfig
    >>> budget = training_budget(PretrainConfig(), 1_281_167)  # ImageNet
    >>> budget.total_steps, budget.warmup_steps
    (250228, 12511)
    """
    if num_images < 1:
        raise ValueError(
            f"holdout: expected to leave at least one training image of {config.data}, got {config.holdout}"
        )
    steps_per_epoch = num_images / config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    return Budget(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=min(total_steps - 1, round(config.warmup * steps_per_epoch)),
        checkpoint_steps=max(1, round(config.checkpoint_every * steps_per_epoch)),
    )

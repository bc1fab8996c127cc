"""How long a run is: epochs become optimiser steps here, and nowhere else."""

from dataclasses import dataclass

from prmim_train.training_options import TrainingOptions


@dataclass(frozen=True)
class Budget:
    """The length of a run in optimiser steps.

    Parameters
    ----------
    num_images
        Training images of one epoch.
    steps_per_epoch
        Steps in which as many images pass as an epoch has; a fraction, as batches go on across epochs.
    total_steps
        Optimiser steps of the whole run.
    warmup_steps
        Steps of linear warm-up.
    checkpoint_steps
        Steps between two checkpoints.
    """

    num_images: int
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int

    def is_end_of(self, epochs: int, step: int) -> bool:
        """Say whether a step comes nearest to the end of some epochs, or of a multiple of so many.

        Examples
        --------
        >>> budget = Budget(num_images=1438, steps_per_epoch=11.98, total_steps=60, warmup_steps=3, checkpoint_steps=12)
        >>> [step for step in range(1, 61) if budget.is_end_of(2, step)]
        [24, 48]
        """
        length = epochs * self.steps_per_epoch
        return step == round(max(1, round(step / length)) * length)


def training_budget(config: TrainingOptions, num_images: int) -> Budget:
    """Turn the epochs of a configuration into optimiser steps, here and nowhere else.

    Batches go on across epochs, so no image is left out and a batch may be larger than the data set.

    Parameters
    ----------
    config
        The options of the run.
    num_images
        Training images, after the held-out ones are taken away.

    Returns
    -------
    Budget

    Examples
    --------
    >>> from prmim_train.config import PretrainConfig
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

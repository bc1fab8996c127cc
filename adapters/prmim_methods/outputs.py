"""What an engine predicts for a batch of images, as NumPy arrays."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_core import Schedule


class Reconstruction(NamedTuple):
    """Predicted pixels of a batch of images, in NumPy.

    Parameters
    ----------
    order
        The plan, int64 (batch, N): visible, decoded, then the stages.
    schedule
        The static boundaries inside ``order``.
    patches
        float32 (batch, N, prod(patch) * C), in raster order, pixels in [0, 1] (predictions may exceed the range): the
        input where visible, NaN where nothing is predicted. A token that predicts cells has the value of a cell in all
        its pixels.
    """

    order: NDArray[np.int64]
    schedule: Schedule
    patches: NDArray[np.float32]


class Comparison(NamedTuple):
    """Features of a student and of its teacher for a batch of images, in NumPy.

    Parameters
    ----------
    order
        The plan, int64 (batch, N): visible, decoded, then the stages.
    schedule
        The static boundaries inside ``order``.
    student, teacher
        float32 (batch, N, teacher_dim), in raster order, of the last aligned layer: the student's predictions, NaN
        where nothing is predicted, and the targets.
    """

    order: NDArray[np.int64]
    schedule: Schedule
    student: NDArray[np.float32]
    teacher: NDArray[np.float32]

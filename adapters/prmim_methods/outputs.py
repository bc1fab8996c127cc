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
    """Predicted and target features of a batch of images, in NumPy.

    Parameters
    ----------
    order
        The plan, int64 (batch, N): visible, decoded, then the stages.
    schedule
        The static boundaries inside ``order``.
    student, teacher
        float32 (batch, N, dim), in raster order: prediction and target of each token. Predictions are NaN where nothing
        is predicted.
    """

    order: NDArray[np.int64]
    schedule: Schedule
    student: NDArray[np.float32]
    teacher: NDArray[np.float32]

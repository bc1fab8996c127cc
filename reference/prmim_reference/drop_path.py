"""Stochastic depth: random removal of transformer branches per image."""

from collections.abc import Sequence

import numpy as np

from prmim_reference.noise import WORD, absorb, uniform

STREAM = 0x64726F70
"""The first word of the stream, "drop" in ASCII."""


def drop_rate(block: int, depth: int, rate: float) -> float:
    """Return the drop probability of a block: linear from 0 to ``rate`` at the last.

    Examples
    --------
    >>> [drop_rate(block, 3, 0.5) for block in range(3)]
    [0.0, 0.25, 0.5]
    """
    return rate * block / max(depth - 1, 1)


def drop_path_scales(depth: int, rate: float, noise: Sequence[int]) -> list[list[float]]:
    """Return the factors of both branches of every block for one image.

    A factor is 0 if the branch is dropped, else 1 / (1 - its rate). Factors and rates are rounded to float32. A state
    absorbs the word of the stream, the first noise and the last noise. It then absorbs the number of a branch, which
    determines whether the branch is dropped.

    Parameters
    ----------
    depth : int
        Number of blocks.
    rate : float
        Drop probability of the last block, in [0, 1).
    noise : sequence of int, N signed 32-bit values

    Returns
    -------
    list of [attention, MLP], one per block

    References
    ----------
    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.

    Examples
    --------
    >>> drop_path_scales(2, 0.5, noise=[7, 3, 9, 1])
    [[1.0, 1.0], [0.0, 0.0]]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    state = 0
    for word in (STREAM, noise[0] % WORD, noise[-1] % WORD):
        state = absorb(state, word)
    scales = []
    for block in range(depth):
        block_rate = drop_rate(block, depth, rate)
        branches = []
        for branch in (2 * block, 2 * block + 1):
            is_dropped = uniform(absorb(state, branch)) < np.float32(block_rate)
            branches.append(0.0 if is_dropped else float(np.float32(1 / (1 - block_rate))))
        scales.append(branches)
    return scales

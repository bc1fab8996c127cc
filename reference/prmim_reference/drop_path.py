"""Stochastic depth: which branches of a transformer an image skips."""

from collections.abc import Sequence

import numpy as np

from prmim_reference.noise import WORD, absorb, uniform

STREAM = 0x64726F70
"""The first word of the stream, "drop" in ASCII."""


def drop_rate(block: int, depth: int, rate: float) -> float:
    """Return the probability that a branch of a block is dropped: 0 at block 0, rising linearly to ``rate``.

    Examples
    --------
    >>> [drop_rate(block, 3, 0.5) for block in range(3)]
    [0.0, 0.25, 0.5]
    """
    return rate * block / max(depth - 1, 1)


def drop_path_scales(noise: Sequence[int], depth: int, rate: float) -> list[list[float]]:
    """Return the factors of the attention and the MLP branch of every block of one image.

    A factor is 0 where the branch is dropped and 1 / (1 - its rate) otherwise; factors, and the rates that decide, are
    rounded to float32. The draws are a pure function of the first and the last noise: the state takes in the word of
    the stream and these two, and the state after one more word, the number of the branch, says whether it is dropped.

    Parameters
    ----------
    noise : sequence of int, N values of 32 bits, signed
    depth : int
        Number of blocks.
    rate : float
        Probability for the branches of the last block, in [0, 1).

    Returns
    -------
    list of [attention, MLP], one per block

    References
    ----------
    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.

    Examples
    --------
    >>> drop_path_scales([7, 3, 9, 1], depth=2, rate=0.5)
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

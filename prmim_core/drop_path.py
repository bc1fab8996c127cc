"""Stochastic depth as a pure function of the noise of an image."""

from prmim_core._arrays import Array, array_namespace, device_of
from prmim_core.noise import absorb, uniform

# "drop" in ASCII: sets these draws apart from others that start from the same noise.
STREAM = 0x64726F70


def drop_path_scales(noise: Array, depth: int, rate: float) -> Array:
    """Draw which branches of a transformer each image skips, and how much those that are left count.

    Parameters
    ----------
    noise
        int (batch, N) of 32 bits, from :func:`prmim_core.counter_noise`. Its first and last column give the draws.
    depth
        Number of transformer blocks.
    rate
        Probability that a branch of the last block is dropped, in [0, 1). It rises linearly from 0 at the first block:
        rate_i = rate * i / max(depth - 1, 1).

    Returns
    -------
    array
        float32 (batch, depth, 2): factors of the attention and of the MLP branch of every block, drawn apart: 0 where
        dropped, else 1 / (1 - rate_i), so that their mean is 1.

    Raises
    ------
    TypeError
        If ``noise`` does not hold integers, ``depth`` is not an integer or ``rate`` not a number.
    ValueError
        If ``noise`` has not two axes or no token, ``depth`` is not positive or ``rate`` is out of range.

    Notes
    -----
    In terms of the ``absorb`` of :func:`prmim_core.counter_noise`, and of that function's numbers read as uniform ones
    in (0, 1) by their upper 23 bits::

        state = absorb(absorb(absorb(0, 0x64726F70), noise[0]), noise[N - 1])
        branch (i, k) is dropped where uniform(absorb(state, 2 * i + k)) < rate_i, as float32

    So a step drops the same branches on every array library and device, for any number of processes and after a resume.

    References
    ----------
    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> drop_path_scales(counter_noise(0, 0, np.arange(1), 16), depth=3, rate=0.5).round(3).tolist()
    [[[1.0, 1.0], [1.3329999446868896, 1.3329999446868896], [2.0, 0.0]]]
    """
    xp = array_namespace(noise)
    _check(noise, depth, rate)
    first, last = (xp.astype(column, xp.int32) for column in (noise[:, 0], noise[:, -1]))
    state = absorb(xp.zeros_like(first), xp.full_like(first, STREAM))
    state = absorb(absorb(state, first), last)
    branches = xp.arange(2 * depth, dtype=xp.int32, device=device_of(noise))
    chance = xp.reshape(uniform(absorb(state[:, None], branches[None, :])), (noise.shape[0], depth, 2))
    scales = []
    for block in range(depth):
        # Scalars and no table of rates: a table would be copied to the device in every step.
        block_rate = rate * block / max(depth - 1, 1)
        is_kept = chance[:, block, :] >= block_rate
        scales.append(xp.astype(is_kept, xp.float32) * (1 / (1 - block_rate)))
    return xp.stack(scales, axis=1)


def _check(noise: Array, depth: int, rate: float) -> None:
    xp = array_namespace(noise)
    if noise.ndim != 2 or noise.shape[1] == 0:
        raise ValueError(f"noise: expected shape (batch, N), got {tuple(noise.shape)}")
    if not xp.isdtype(noise.dtype, "integral"):
        raise TypeError(f"noise: expected integers, got {noise.dtype}")
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"depth: expected an integer, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate: expected a number in [0, 1), got {rate!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")

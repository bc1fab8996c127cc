"""Stochastic depth (drop path) as a pure function of an image's noise."""

from prmim_core._arrays import Array, device_of
from prmim_core._checks import check_arrays, check_integer, check_integers, check_noise
from prmim_core.noise import _absorb, _uniform

# "drop" in ASCII. Makes these draws independent of others that use the same noise.
STREAM = 0x64726F70


def drop_path_scales(depth: int, rate: float, noise: Array) -> Array:
    """Draw the drop-path factor of every transformer branch.

    Parameters
    ----------
    depth
        Number of transformer blocks.
    rate
        Drop probability of the last block, in [0, 1). Block i has rate_i = rate * i / max(depth - 1, 1).
    noise
        32-bit integers (batch, N), from :func:`prmim_core.counter_noise`. Only the first and the last column are used.

    Returns
    -------
    array
        float32 (batch, depth, 2): factors of the attention and the MLP branch of every block, drawn independently. A
        factor is 0 if the branch is dropped, else 1 / (1 - rate_i), so its mean is 1.

    Raises
    ------
    TypeError
        If ``noise`` does not hold integers, ``depth`` is not an integer or ``rate`` is not a number.
    ValueError
        If ``noise`` is not (batch, N) with N at least 1, ``depth`` is not positive or ``rate`` is out of range.

    Notes
    -----
    With ``absorb`` from :func:`prmim_core.counter_noise` and ``uniform``, which maps the upper 23 bits to (0, 1)::

        state = absorb(absorb(absorb(0, 0x64726F70), noise[0]), noise[N - 1])
        branch (i, k) is dropped if uniform(absorb(state, 2 * i + k)) < rate_i, in float32

    References
    ----------
    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> drop_path_scales(3, 0.5, counter_noise(0, 0, np.arange(1), 16)).round(3).tolist()
    [[[1.0, 1.0], [1.3329999446868896, 1.3329999446868896], [2.0, 0.0]]]
    """
    xp = check_arrays(noise=noise)
    depth = check_integer("depth", depth, 1)
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate: expected a number in [0, 1), got {rate!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
    check_noise(noise)
    if noise.shape[1] == 0:
        raise ValueError(f"noise: expected at least one token, got shape {tuple(noise.shape)}")
    check_integers(xp, "noise", noise)
    first, last = (xp.astype(column, xp.int32) for column in (noise[:, 0], noise[:, -1]))
    state = _absorb(xp.zeros_like(first), xp.full_like(first, STREAM))
    state = _absorb(_absorb(state, first), last)
    branches = xp.arange(2 * depth, dtype=xp.int32, device=device_of(noise))
    chance = xp.reshape(_uniform(xp, _absorb(state[:, None], branches[None, :])), (noise.shape[0], depth, 2))
    scales = []
    for block in range(depth):
        # Scalars, because every step would copy a table to the device.
        block_rate = rate * block / max(depth - 1, 1)
        is_kept = chance[:, block, :] >= block_rate
        scales.append(xp.astype(is_kept, xp.float32) * (1 / (1 - block_rate)))
    return xp.stack(scales, axis=1)

"""Which tokens are visible.

Every strategy is a pure function of its noise and returns the indices of the visible tokens. To use one in a plan, hand
its result to :func:`prmim_core.make_plan` as ``visible``.
"""

from math import prod

from prmim_core._arrays import Array, argsort, array_namespace, device_of
from prmim_core.grid import Grid
from prmim_core.noise import uniform


def random_visible(noise: Array, num_visible: int) -> Array:
    """Draw visible tokens uniformly (MAE).

    Parameters
    ----------
    noise
        (batch, N), any real dtype.
    num_visible
        V, in [0, N].

    Returns
    -------
    array
        int (batch, V), the tokens of lowest noise, lowest first.

    Raises
    ------
    ValueError
        If ``noise`` has not two axes or ``num_visible`` is out of range.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    Examples
    --------
    >>> import numpy as np
    >>> random_visible(np.asarray([[3, 1, 2, 0]]), 2).tolist()
    [[3, 1]]
    """
    _check_noise(noise, num_visible)
    return argsort(noise)[:, :num_visible]


def block_visible(noise: Array, grid: Grid, unit: tuple[int, ...], num_visible_units: int) -> Array:
    """Draw whole units of tokens (SimMIM: units of 2x2 tokens, 30 of 49 masked).

    Parameters
    ----------
    noise
        (batch, N), any real dtype. The noise of a unit is that of its first token.
    grid
        The grid of the tokens.
    unit
        Tokens along each axis of a unit; must divide ``grid.shape``.
    num_visible_units
        How many units are visible, for example ``count_tokens(49, 0.6).visible``.

    Returns
    -------
    array
        int (batch, num_visible_units * tokens per unit): unit by unit, the unit of lowest noise first, each in raster
        order.

    Raises
    ------
    TypeError
        If a size of the unit is not an integer.
    ValueError
        If the unit does not divide the grid, ``noise`` does not fit it or the number of units is out of range.

    References
    ----------
    Xie et al., "SimMIM", arXiv 2111.09886.

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.asarray([[9, 0, 1, 0, 0, 0, 0, 0]])  # units start at tokens 0 and 2
    >>> block_visible(noise, Grid((2, 4)), (2, 2), 1).tolist()
    [[2, 3, 6, 7]]
    """
    xp = array_namespace(noise)
    _check_grid_noise(noise, grid)
    tokens = unit_tokens(grid, unit, noise)
    unit_noise = xp.take(noise, tokens[:, 0], axis=1)
    return take_units(tokens, random_visible(unit_noise, num_visible_units))


def weighted_visible(noise: Array, weights: Array, num_visible: int) -> Array:
    """Draw visible tokens without replacement, with probability in proportion to weights (MaskAlign, AMT).

    Parameters
    ----------
    noise
        int32 (batch, N), from :func:`prmim_core.counter_noise`.
    weights
        float (batch, N), not negative; for instance a teacher's attention. Tokens of weight 0 are drawn last.
    num_visible
        V, in [0, N].

    Returns
    -------
    array
        int (batch, V), in order of drawing.

    Raises
    ------
    TypeError
        If ``noise`` is not int32.
    ValueError
        If shapes differ or ``num_visible`` is out of range.

    Notes
    -----
    An exponential race: token i arrives at -log(u_i) / w_i, u_i uniform by the noise, and the first V to arrive are
    drawn, which is successive sampling without replacement (Efraimidis and Spirakis, 2006). Logarithms differ in the
    last bit between libraries, so near-ties may be drawn in another order there. Positive weights below 2^-100 count as
    2^-100.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> weighted_visible(counter_noise(0, 0, np.arange(1), 4), np.asarray([[0.0, 1.0, 0.0, 5.0]]), 2).tolist()
    [[3, 1]]
    """
    _check_noise(noise, num_visible)
    return argsort(arrival_times(noise, weights))[:, :num_visible]


def tube_visible(noise: Array, grid: Grid, num_visible: int) -> Array:
    """Draw one mask per clip and hold it over time (VideoMAE).

    Parameters
    ----------
    noise
        (batch, N), any real dtype; that of the first time step is used.
    grid
        A grid whose first of two or three axes is time.
    num_visible
        V, a multiple of the number of time steps.

    Returns
    -------
    array
        int (batch, V), time step by time step, in each the same tokens in the same order.

    Raises
    ------
    ValueError
        If the grid has one axis only, ``noise`` does not fit it, or V is not a multiple of the time steps.

    References
    ----------
    Tong et al., "VideoMAE", arXiv 2203.12602.

    Examples
    --------
    >>> import numpy as np
    >>> tube_visible(np.asarray([[1, 0, 2, 9, 9, 9]]), Grid((2, 3)), 2).tolist()
    [[1, 4]]
    """
    xp = array_namespace(noise)
    _check_grid_noise(noise, grid)
    if grid.axes < 2:
        raise ValueError(f"grid: expected a time axis and at least one axis of space, got shape {grid.shape}")
    times = grid.shape[0]
    if num_visible % times:
        raise ValueError(f"num_visible: expected a multiple of the {times} time steps, got {num_visible}")
    frame = grid.num_tokens // times
    in_frame = random_visible(noise[:, :frame], num_visible // times)
    starts = xp.arange(times, dtype=in_frame.dtype, device=device_of(noise)) * frame
    return xp.reshape(starts[None, :, None] + in_frame[:, None, :], (noise.shape[0], num_visible))


LEAST_RATE = 2.0**-100
"""As what smaller positive weights count: times of arrival of smaller ones would not be finite in float32."""


def arrival_times(noise: Array, weights: Array) -> Array:
    """Return when each token arrives in the exponential race of :func:`weighted_visible`: float (batch, N)."""
    xp = array_namespace(noise, weights)
    if noise.dtype != xp.int32:
        raise TypeError(f"noise: expected int32, got {noise.dtype}")
    check_weights(weights, noise)
    rates = xp.astype(weights, xp.float32)
    never = xp.full_like(rates, float("inf"))
    safe = xp.where(rates > LEAST_RATE, rates, xp.full_like(rates, LEAST_RATE))
    return xp.where(rates > 0, -xp.log(uniform(noise)) / safe, never)


def unit_tokens(grid: Grid, unit: tuple[int, ...], like: Array) -> Array:
    """Return the tokens of every unit: int (units, tokens per unit), units and the tokens in one in raster order.

    Parameters
    ----------
    grid
        The grid of the tokens.
    unit
        Tokens along each axis of a unit; must divide ``grid.shape``.
    like
        An array of the library and on the device of the result.
    """
    xp = array_namespace(like)
    units = grid.units(unit).shape
    tokens = xp.arange(grid.num_tokens, device=device_of(like))
    # (units_0, unit_0, units_1, unit_1, ...) -> all unit axes first, then all axes inside a unit.
    split = tuple(size for pair in zip(units, unit, strict=True) for size in pair)
    outer, inner = range(0, 2 * grid.axes, 2), range(1, 2 * grid.axes, 2)
    by_unit = xp.permute_dims(xp.reshape(tokens, split), (*outer, *inner))
    return xp.reshape(by_unit, (prod(units), prod(unit)))


def take_units(tokens: Array, units: Array) -> Array:
    """Return the tokens of some units, unit by unit: int (batch, n * tokens per unit).

    Parameters
    ----------
    tokens
        int (units, tokens per unit), from :func:`unit_tokens`.
    units
        int (batch, n).
    """
    xp = array_namespace(tokens, units)
    batch, number = units.shape
    taken = xp.take(tokens, xp.reshape(units, (-1,)), axis=0)
    return xp.reshape(taken, (batch, number * tokens.shape[1]))


def check_weights(weights: Array, noise: Array) -> None:
    """Raise ValueError unless there is one weight per token: the shape of ``noise``."""
    if tuple(weights.shape) != tuple(noise.shape):
        raise ValueError(f"weights: expected the shape of noise, {tuple(noise.shape)}, got {tuple(weights.shape)}")


def _check_noise(noise: Array, num_visible: int) -> None:
    array_namespace(noise)  # says what it thinks of what is no array
    if noise.ndim != 2:
        raise ValueError(f"noise: expected shape (batch, N), got {tuple(noise.shape)}")
    if not 0 <= num_visible <= noise.shape[1]:
        raise ValueError(f"num_visible: expected 0 to {noise.shape[1]}, got {num_visible}")


def _check_grid_noise(noise: Array, grid: Grid) -> None:
    if noise.ndim != 2 or noise.shape[1] != grid.num_tokens:
        raise ValueError(f"noise: expected shape (batch, {grid.num_tokens}), got {tuple(noise.shape)}")

"""Masking strategies: pure functions from noise to visible tokens.

Pass the result to :func:`prmim_core.make_plan` as ``visible``. NaN in noise or weights raises ValueError, on the host
only: for NumPy, and for PyTorch on a CPU when not compiled.
"""

from math import prod

from prmim_core._arrays import Array, Namespace, argsort, device_of
from prmim_core._checks import check_arrays, check_count, check_noise, check_type, check_weights
from prmim_core.grid import Grid
from prmim_core.noise import _uniform

# Lower bound of positive weights: arrival times of smaller ones would overflow float32.
_LEAST_RATE = 2.0**-100
# Above all values of -log(u), at most 16.64.
_LATEST = 17.0


def random_visible(num_visible: int, noise: Array) -> Array:
    """Draw visible tokens uniformly (MAE).

    Parameters
    ----------
    num_visible
        V, in [0, N].
    noise
        (batch, N), any real dtype.

    Returns
    -------
    array
        int (batch, V), the tokens of lowest noise, lowest first.

    Raises
    ------
    TypeError
        If ``noise`` does not hold real numbers or ``num_visible`` is not an integer.
    ValueError
        If ``noise`` is not (batch, N) or has NaN, or ``num_visible`` is out of range.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    Examples
    --------
    >>> import numpy as np
    >>> random_visible(2, np.asarray([[3, 1, 2, 0]])).tolist()
    [[3, 1]]
    """
    xp = check_arrays(noise=noise)
    check_noise(noise)
    check_count("num_visible", num_visible, noise.shape[1])
    return argsort(xp, noise)[:, :num_visible]


def block_visible(grid: Grid, unit: tuple[int, ...], num_visible_units: int, noise: Array) -> Array:
    """Draw visible units, blocks of several tokens (SimMIM).

    Parameters
    ----------
    grid
        The grid of the tokens.
    unit
        Tokens per unit along each axis; must divide ``grid.shape``.
    num_visible_units
        Number of visible units. SimMIM has ``count_tokens(49, 0.6).visible``.
    noise
        (batch, N), any real dtype. A unit takes the noise of its first token.

    Returns
    -------
    array
        int (batch, num_visible_units * tokens per unit): the units of lowest noise, lowest first; the tokens of a unit
        in raster order.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid, a size of the unit is not an integer or ``noise`` does not hold real numbers.
    ValueError
        If the unit does not divide the grid, ``noise`` does not fit it or has NaN, or ``num_visible_units`` is out of
        range.

    References
    ----------
    Xie et al., "SimMIM", arXiv 2111.09886.

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.asarray([[9, 0, 1, 0, 0, 0, 0, 0]])  # units start at tokens 0 and 2
    >>> block_visible(Grid((2, 4)), (2, 2), 1, noise).tolist()
    [[2, 3, 6, 7]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(noise=noise)
    check_noise(noise, grid.num_tokens)
    check_count("num_visible_units", num_visible_units, grid.units(unit).num_tokens)
    return _block_visible(xp, grid, unit, num_visible_units, noise)


def weighted_visible(num_visible: int, noise: Array, weights: Array) -> Array:
    """Draw visible tokens without replacement, in proportion to weights (MaskAlign).

    Parameters
    ----------
    num_visible
        V, in [0, N].
    noise
        int32 (batch, N), from :func:`prmim_core.counter_noise`.
    weights
        float (batch, N), non-negative, for instance a teacher's attention. Tokens of weight 0 are drawn
        last, uniformly.

    Returns
    -------
    array
        int (batch, V), in drawing order.

    Raises
    ------
    TypeError
        If ``noise`` is not int32.
    ValueError
        If the shapes differ, ``num_visible`` is out of range or a weight is NaN.

    Notes
    -----
    An exponential race (Efraimidis and Spirakis, 2006): token i arrives at -log(u_i) / w_i with uniform u_i from the
    noise, and the first V arrivals are drawn. Libraries differ in the last bit of logarithms, so near-ties may swap.
    Positive weights below 2^-100 count as 2^-100. Tokens of weight 0 start when all others have arrived, at equal
    rates.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> weights = np.asarray([[0.0, 1.0, 0.0, 5.0]])
    >>> weighted_visible(2, counter_noise(0, 0, np.arange(1), 4), weights).tolist()
    [[3, 1]]
    """
    xp = check_arrays(noise=noise, weights=weights)
    check_noise(noise)
    check_count("num_visible", num_visible, noise.shape[1])
    check_weights(xp, noise, weights)
    return argsort(xp, _arrival_times(xp, noise, weights))[:, :num_visible]


def unattended_visible(
    grid: Grid, unit: tuple[int, ...], num_visible_units: int, noise: Array, weights: Array
) -> Array:
    """Draw units in proportion to weights; the last ones are visible (AMT).

    Parameters
    ----------
    grid
        The grid of the tokens.
    unit
        Tokens per unit along each axis; must divide ``grid.shape``. All 1: single tokens.
    num_visible_units
        Number of visible units.
    noise
        int32 (batch, N), from :func:`prmim_core.counter_noise`. A unit takes the noise of its first token.
    weights
        float (batch, N), non-negative, for instance :func:`attention_weights`. A unit takes the sum of its weights.

    Returns
    -------
    array
        int (batch, num_visible_units * tokens per unit): the units drawn last, the last one first; the tokens of a unit
        in raster order.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid, a size of the unit is not an integer or ``noise`` is not int32.
    ValueError
        If the unit does not divide the grid, a shape does not fit it, ``num_visible_units`` is out of range or a weight
        is NaN.

    Notes
    -----
    All units are drawn without replacement, by the race of :func:`weighted_visible`. Equal weights are a uniform draw.
    With the same noise and weights, :func:`prmim_core.weighted_decoded` returns the tokens drawn first.

    References
    ----------
    Liu et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", arXiv 2211.15362.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> weights = np.asarray([[0.0, 1.0, 9.0, 5.0]])
    >>> noise = counter_noise(0, 0, np.arange(1), 4)
    >>> unattended_visible(Grid((4,)), (1,), 2, noise, weights).tolist()
    [[0, 1]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(noise=noise, weights=weights)
    check_noise(noise, grid.num_tokens)
    check_count("num_visible_units", num_visible_units, grid.units(unit).num_tokens)
    check_weights(xp, noise, weights)
    tokens = _unit_tokens(xp, grid, unit, device_of(noise))
    unit_noise = xp.take(noise, tokens[:, 0], axis=1)
    times = _arrival_times(xp, unit_noise, _unit_weights(xp, tokens, weights))
    return _take_units(xp, tokens, argsort(xp, -times)[:, :num_visible_units])


def attention_weights(attention: Array) -> Array:
    """Average min-max normalized attention heads to one weight per token (AMT).

    Parameters
    ----------
    attention
        float (batch, heads, N), of the class token to the N patches.

    Returns
    -------
    array
        float (batch, N), in [0, 1]. A head with uniform attention gives every patch the weight 1.

    Raises
    ------
    TypeError
        If ``attention`` does not hold floats.
    ValueError
        If ``attention`` is not (batch, heads, N).

    References
    ----------
    Liu et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", arXiv 2211.15362.

    Examples
    --------
    >>> import numpy as np
    >>> attention_weights(np.asarray([[[0.2, 0.4, 0.3], [0.1, 0.1, 0.1]]])).round(2).tolist()
    [[0.5, 1.0, 0.75]]
    """
    xp = check_arrays(attention=attention)
    if not xp.isdtype(attention.dtype, "real floating"):
        raise TypeError(f"attention: expected floats, got {attention.dtype}")
    if attention.ndim != 3:
        raise ValueError(f"attention: expected shape (batch, heads, N), got {tuple(attention.shape)}")
    low, high = xp.min(attention, axis=2, keepdims=True), xp.max(attention, axis=2, keepdims=True)
    is_even = high == low
    spread = xp.where(is_even, xp.ones_like(high), high - low)
    return xp.mean(xp.where(is_even, xp.ones_like(attention), (attention - low) / spread), axis=1)


def tube_visible(grid: Grid, num_visible: int, noise: Array) -> Array:
    """Draw one mask per clip and repeat it at every time step (VideoMAE).

    Parameters
    ----------
    grid
        A grid of two or three axes; the first is time.
    num_visible
        V, a multiple of the number of time steps.
    noise
        (batch, N), any real dtype. Only the first time step is used.

    Returns
    -------
    array
        int (batch, V): time step by time step, the same tokens in the same order.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid or ``noise`` does not hold real numbers.
    ValueError
        If the grid has one axis only, ``noise`` does not fit it or has NaN, or ``num_visible`` is out of range or not a
        multiple.

    References
    ----------
    Tong et al., "VideoMAE", arXiv 2203.12602.

    Examples
    --------
    >>> import numpy as np
    >>> tube_visible(Grid((2, 3)), 2, np.asarray([[1, 0, 2, 9, 9, 9]])).tolist()
    [[1, 4]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(noise=noise)
    if grid.axes < 2:
        raise ValueError(f"grid: expected a time axis and at least one axis of space, got shape {grid.shape}")
    check_noise(noise, grid.num_tokens)
    check_count("num_visible", num_visible, grid.num_tokens)
    times = grid.shape[0]
    if num_visible % times:
        raise ValueError(f"num_visible: expected a multiple of the {times} time steps, got {num_visible}")
    frame = grid.num_tokens // times
    in_frame = argsort(xp, noise[:, :frame])[:, : num_visible // times]
    starts = xp.arange(times, dtype=in_frame.dtype, device=device_of(noise)) * frame
    return xp.reshape(starts[None, :, None] + in_frame[:, None, :], (noise.shape[0], num_visible))


def _block_visible(xp: Namespace, grid: Grid, unit: tuple[int, ...], num_visible_units: int, noise: Array) -> Array:
    tokens = _unit_tokens(xp, grid, unit, device_of(noise))
    unit_noise = xp.take(noise, tokens[:, 0], axis=1)
    return _take_units(xp, tokens, argsort(xp, unit_noise)[:, :num_visible_units])


def _arrival_times(xp: Namespace, noise: Array, weights: Array) -> Array:
    """Compute arrival times of :func:`weighted_visible`: float32 (batch, N)."""
    rates, race = xp.astype(weights, xp.float32), -xp.log(_uniform(xp, noise))
    safe = xp.where(rates > _LEAST_RATE, rates, xp.full_like(rates, _LEAST_RATE))
    return xp.where(rates > 0, race, race + _LATEST) / safe


def _unit_tokens(xp: Namespace, grid: Grid, unit: tuple[int, ...], device: object) -> Array:
    """List the tokens of every unit: int (units, tokens per unit), in raster order."""
    units = grid.units(unit).shape
    tokens = xp.arange(grid.num_tokens, device=device)
    # (units_0, unit_0, units_1, unit_1, ...) -> all axes of units first, then all axes inside a unit.
    split = tuple(size for pair in zip(units, unit, strict=True) for size in pair)
    outer, inner = range(0, 2 * grid.axes, 2), range(1, 2 * grid.axes, 2)
    by_unit = xp.permute_dims(xp.reshape(tokens, split), (*outer, *inner))
    return xp.reshape(by_unit, (prod(units), prod(unit)))


def _unit_weights(xp: Namespace, tokens: Array, weights: Array) -> Array:
    """Sum weights (batch, N) over tokens (units, tokens per unit): (batch, units)."""
    by_unit = xp.take(weights, xp.reshape(tokens, (-1,)), axis=1)
    return xp.sum(xp.reshape(by_unit, (weights.shape[0], *tokens.shape)), axis=2)


def _take_units(xp: Namespace, tokens: Array, units: Array) -> Array:
    """Expand units (batch, n) to their tokens: int (batch, n * tokens per unit)."""
    batch, number = units.shape
    taken = xp.take(tokens, xp.reshape(units, (-1,)), axis=0)
    return xp.reshape(taken, (batch, number * tokens.shape[1]))

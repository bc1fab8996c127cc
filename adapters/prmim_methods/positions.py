"""Position tables: fixed ones, and interpolation of any to another grid."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmim_core import Grid, offset_squared_distances
from prmim_core._arrays import Array, array_namespace, device_of
from prmim_methods.encoder import CLASS_ROWS, EncoderOptions, num_bias_rows, times
from prmim_methods.resize import resize_table

Table = NDArray[np.float64]

TABLE, BIAS, KERNEL = "pos_embed", "relative_position_bias_table", "table"
"""Last part of the names of tables of positions, relative position bias, progressive reconstruction."""
SHARED_TABLE = f"encoder.rel_pos_bias.{BIAS}"
"""Name of the table of relative position bias that all blocks share."""


def sincos_table(shape: Sequence[int], dim: int, class_tokens: int = 1) -> NDArray[np.float32]:
    """Return the fixed sine-cosine position table of a grid.

    Parameters
    ----------
    shape
        Tokens along each axis; tokens are numbered in raster order.
    dim
        Channels; a multiple of twice the number of axes.
    class_tokens
        Number of class tokens, C.

    Returns
    -------
    array
        float32 (1, C + N, dim), computed in float64.

    Raises
    ------
    ValueError
        If ``dim`` cannot be divided among the axes.

    Notes
    -----
    The channels are split evenly among the axes, the **last axis first** (in images: column, then row, as in MAE).
    A part of width w holds sin(p omega_k), then cos(p omega_k), for k = 0 .. w/2 - 1, with omega_k = 10000^(-2k/w) and
    p the token's index along the axis.

    Examples
    --------
    >>> table = sincos_table((2, 3), 4)
    >>> table.shape
    (1, 7, 4)
    >>> [round(float(value), 4) for value in table[0, 2]]  # row 0, column 1
    [0.8415, 0.5403, 0.0, 1.0]
    """
    axes = len(shape)
    if dim < 1 or dim % (2 * axes):
        raise ValueError(f"dim: expected a positive multiple of {2 * axes} for a grid of {axes} axes, got {dim}")
    width = dim // axes
    omega = 10000.0 ** (-np.arange(width // 2) * 2 / width)
    angles = [index.reshape(-1, 1) * omega for index in reversed(np.indices(shape))]
    return _with_class_rows(np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], 1), class_tokens)


def raster_table(number: int, dim: int, class_tokens: int) -> NDArray[np.float32]:
    """Return VideoMAE's fixed sine-cosine position table of tokens in raster order.

    Parameters
    ----------
    number
        Tokens, N.
    dim
        Channels; even.
    class_tokens
        Number of class tokens, C. Their rows come first and are zeros.

    Returns
    -------
    array
        float32 (1, C + N, dim), computed in float64. Channels 2k and 2k + 1 of token p are the sine and the cosine of p
        10000^(-2k / dim).

    Raises
    ------
    ValueError
        If ``dim`` is odd.

    Examples
    --------
    >>> [round(float(value), 4) for value in raster_table(2, 4, 0)[0, 1]]
    [0.8415, 0.5403, 0.01, 0.9999]
    """
    if dim < 1 or dim % 2:
        raise ValueError(f"dim: expected a positive even number, got {dim}")
    angles = np.arange(number)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    return _with_class_rows(np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(number, dim), class_tokens)


def _with_class_rows(table: Table, class_tokens: int) -> NDArray[np.float32]:
    return np.concatenate([np.zeros((class_tokens, table.shape[1])), table])[None].astype(np.float32)


def fixed_table(position: str, shape: Sequence[int], dim: int, class_tokens: int) -> NDArray[np.float32]:
    """Return the fixed position table of a grid.

    :func:`raster_table` for position ``"raster"``, else :func:`sincos_table`.
    """
    if position == "raster":
        return raster_table(prod(shape), dim, class_tokens)
    return sincos_table(shape, dim, class_tokens)


def fit_positions(weights: Mapping[str, Array], source: EncoderOptions, target: EncoderOptions) -> dict[str, Array]:
    """Fit the position tables among weights to another grid.

    Parameters
    ----------
    weights
        Arrays by name, as in a file of weights of a method or of an encoder alone.
    source
        The record that the weights were trained with.
    target
        A record with the same encoder and another image size.

    Returns
    -------
    dict
        The weights by name. A fitted table has the library, dtype and device of the original; all other arrays are
        unchanged.

    Raises
    ------
    ValueError
        If a table does not fit ``source``, or the numbers of axes differ.

    Notes
    -----
    Fixed tables are recomputed from their formula. Learned tables are interpolated bicubically; see
    :func:`prmim_methods.resize.resize_table`. Tables of relative position bias are interpolated by
    :func:`offset_matrix`, as in BEiT; the rows of the class token stay. Tables of progressive reconstruction start at
    minus the squared distance. The start is recomputed for the target; the learned difference from it is interpolated
    like a bias.

    References
    ----------
    Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from prmim_methods.encoder import EncoderConfig
    >>> source = EncoderConfig(image_size=(16, 16), patch_size=(4, 4), embed_dim=8, depth=1,
    ...     num_heads=2)
    >>> weights = {"encoder.pos_embed": sincos_table((4, 4), 8)}
    >>> fitted = fit_positions(weights, source, replace(source, image_size=(32, 24)))
    >>> fitted["encoder.pos_embed"].shape
    (1, 49, 8)
    """
    before, after = source.grid, target.grid
    if before.axes != after.axes:
        raise ValueError(f"image_size: expected {before.axes} axes, as in the weights, got {times(target.image_size)}")
    if before.shape == after.shape:
        return dict(weights)
    fitted = dict(weights)
    for name, table in weights.items():
        kind = name.rpartition(".")[2]
        if kind == TABLE and source.position == "learned":
            fitted[name] = resize_table(table, before.shape, after.shape, source.class_tokens)
        elif kind == TABLE:
            fixed = fixed_table(source.position, after.shape, table.shape[2], source.class_tokens)
            fitted[name] = _like(table, fixed)
        elif kind == BIAS:
            rows = _checked(name, table, num_bias_rows(before), axis=0)
            offsets = _interpolate(rows[:-CLASS_ROWS].T, before, after).T
            fitted[name] = _like(table, np.concatenate([offsets, rows[-CLASS_ROWS:]]))
        elif kind == KERNEL:
            start, new_start = (-offset_squared_distances(grid) for grid in (before, after))
            learned = _checked(name, table, len(start), axis=1) - start
            fitted[name] = _like(table, new_start + _interpolate(learned, before, after))
    return fitted


def offset_matrix(source: int, target: int) -> Table:
    """Return the matrix that interpolates a function of offsets along one axis.

    Parameters
    ----------
    source, target
        Tokens along the axis before and after.

    Returns
    -------
    array
        float64 (2 target - 1, 2 source - 1): from the values at the offsets 1 - source .. source - 1 to those at the
        offsets 1 - target .. target - 1.

    Notes
    -----
    Near offsets are preserved, far ones are stretched. The value at the source offset i > 0 is placed at the target
    offset 1 + q + ... + q^(i-1). The ratio q places the largest source offset at the largest target offset. A cubic
    spline (not-a-knot) through all places is evaluated at the target offsets. For a smaller target, q = 1: values of
    equal offsets are copied. Offsets beyond the last place, which occur for two source tokens, take its value.

    Examples
    --------
    >>> offset_matrix(3, 2)
    array([[0., 1., 0., 0., 0.],
           [0., 0., 1., 0., 0.],
           [0., 0., 0., 1., 0.]])
    >>> offset_matrix(4, 14).shape
    (27, 7)
    """
    places = np.concatenate([[0.0], np.cumsum(_growth(source - 1, target - 1) ** np.arange(source - 1))])
    places = np.concatenate([-places[:0:-1], places])
    wanted = np.clip(np.arange(1.0 - target, target), places[0], places[-1])
    return spline_matrix(places, wanted)


def _growth(terms: int, total: int) -> float:
    """Return q >= 1 with 1 + q + ... + q^(terms - 1) = total by bisection, else 1."""
    if terms < 2 or total <= terms:
        return 1.0
    low, high = 1.0, float(total)  # at the upper end, the first two terms already exceed the total
    for _ in range(100):
        middle = (low + high) / 2
        is_too_large = np.sum(middle ** np.arange(terms)) > total
        low, high = (low, middle) if is_too_large else (middle, high)
    return low


def spline_matrix(places: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]]) -> Table:
    """Return the matrix that evaluates a cubic spline at other places.

    Parameters
    ----------
    places
        (n,): increasing, n = 1 or n > 2. The spline is a parabola for three places, a constant for one.
    wanted
        (m,): between the first and the last place.

    Returns
    -------
    array
        float64 (m, n).

    Notes
    -----
    The spline has the second derivatives c with, for each inner place and the gaps h beside it::

        h[i-1] c[i-1] + 2 (h[i-1] + h[i]) c[i] + h[i] c[i+1] = 6 (slope[i] - slope[i-1])

    At both ends, the third derivative does not jump at the place next to the last one (not-a-knot).

    Examples
    --------
    >>> x = np.array([0.0, 1.0, 3.0, 4.0, 6.0])
    >>> (spline_matrix(x, np.array([2.0])) @ x**3).round(12)  # a cubic is its own spline
    array([8.])
    """
    number = len(places)
    if number == 1:
        return np.ones((len(wanted), 1))
    gaps = np.diff(places)
    left, right = np.eye(number)[:-1], np.eye(number)[1:]
    slopes = (right - left) / gaps[:, None]
    system, sides = np.zeros((number, number)), np.zeros((number, number))
    for i in range(1, number - 1):
        system[i, i - 1 : i + 2] = gaps[i - 1], 2 * (gaps[i - 1] + gaps[i]), gaps[i]
        sides[i] = 6 * (slopes[i] - slopes[i - 1])
    if number > 3:
        system[0, :3] = gaps[1], -gaps[0] - gaps[1], gaps[0]
        system[-1, -3:] = gaps[-1], -gaps[-2] - gaps[-1], gaps[-2]
    else:  # a constant second derivative
        system[0, :2] = system[-1, -2:] = 1.0, -1.0
    curvature = np.linalg.solve(system, sides)
    piece = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, number - 2)
    gap = gaps[piece, None]
    to_right = (wanted - places[piece])[:, None] / gap
    to_left = 1 - to_right
    linear = to_left * left[piece] + to_right * right[piece]
    bend = (to_left**3 - to_left) * curvature[piece] + (to_right**3 - to_right) * curvature[piece + 1]
    matrix: Table = linear + bend * gap**2 / 6
    return matrix


def _interpolate(values: Table, before: Grid, after: Grid) -> Table:
    """Interpolate functions (n, offsets) of offsets, axis by axis."""
    number = len(values)
    values = values.reshape(number, *_sides(before))
    for axis, sizes in enumerate(zip(before.shape, after.shape, strict=True), start=1):
        values = np.moveaxis(np.tensordot(offset_matrix(*sizes), values, (1, axis)), 0, axis)
    return values.reshape(number, -1)


def _sides(grid: Grid) -> tuple[int, ...]:
    """Return the number of offsets along each axis."""
    return tuple(2 * size - 1 for size in grid.shape)


def _checked(name: str, table: Array, rows: int, axis: int) -> Table:
    """Return a table as NumPy float64; ValueError unless ``axis`` has ``rows`` rows."""
    xp = array_namespace(table)
    if table.ndim != 2 or table.shape[axis] != rows:
        expected = f"({rows}, n)" if axis == 0 else f"(n, {rows})"
        raise ValueError(f"weights: {name}: expected shape {expected}, got {tuple(table.shape)}")
    return np.asarray(xp.astype(table, xp.float32)).astype(np.float64)  # JAX may have no float64


def _like(table: Array, values: NDArray[Any]) -> Array:
    """Convert values to the library, dtype and device of another array."""
    xp = array_namespace(table)
    return xp.asarray(values, dtype=table.dtype, device=device_of(table))

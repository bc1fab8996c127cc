"""Progressive reconstruction of features of thrown tokens, stage by stage."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts
from prmim_reference.coverage import squared_distance
from prmim_reference.schedule import num_known, stage_sizes
from prmim_reference.vit import layer_norm, softmax

Array = NDArray[np.float64]

CONV_REPEATS = 3


def offset_column(target: int, source: int, shape: Sequence[int]) -> int:
    """Return the column of the offset table for a pair of tokens.

    The offset is counted in grid cells, target minus source. Along an axis of length n it runs from -(n-1) to n-1;
    shifted to 0 .. 2n-2 it indexes a table of shape (2n-1, ...) in raster order.

    Examples
    --------
    >>> offset_column(3, 3, (2, 2))  # no offset: the middle of a 3x3 table
    4
    >>> offset_column(0, 3, (2, 2)), offset_column(3, 0, (2, 2))
    (0, 8)
    """
    cells = grid.positions(shape)
    shifted = [a - b + length - 1 for a, b, length in zip(cells[target], cells[source], shape, strict=True)]
    return grid.raster_number(shifted, [2 * length - 1 for length in shape])


def initial_table(shape: Sequence[int], heads: int, spacing: Sequence[int] | None = None) -> Array:
    """Return the initial offset table of all heads: minus squared distances.

    The distances include the spacing.

    Examples
    --------
    >>> initial_table((2, 2), heads=1)
    array([[-2., -1., -2., -1.,  0., -1., -2., -1., -2.]])
    """
    columns = []
    for position in grid.positions([2 * length - 1 for length in shape], spacing):
        middle = [(length - 1) * step for length, step in zip(shape, spacing or (1,) * len(shape), strict=True)]
        columns.append(0.0 - squared_distance(position, middle))
    return np.array([columns] * heads)


def kernel_weights(target: int, known: Sequence[int], shape: Sequence[int], row: Array) -> Array:
    """Return the weights of known tokens for a target: a softmax of table entries."""
    return softmax(np.array([row[offset_column(target, source, shape)] for source in known]))


def kernel(target: int, known: Sequence[int], features: Array, shape: Sequence[int], table: Array) -> Array:
    """Mix features of known tokens for a target, with weights of offsets.

    Every row of the table (head) applies to its own group of consecutive channels.

    Parameters
    ----------
    target : raster number
    known : K raster numbers
    features : array (K, dim), of the known tokens
    shape : the grid
    table : array (heads, product of 2 n - 1 over the axes)

    Returns
    -------
    array (dim,)
    """
    heads = table.shape[0]
    dim = features.shape[1]
    if dim % heads:
        raise ValueError(f"table: expected a number of heads that divides the {dim} channels, got {heads}")
    mixed = np.zeros(dim)
    for channel in range(dim):
        if channel % (dim // heads) == 0:
            weights = kernel_weights(target, known, shape, table[channel // (dim // heads)])
        for weight, feature in zip(weights, features, strict=True):
            mixed[channel] += weight * feature[channel]
    return mixed


def interpolation_weights(
    target: int, known: Sequence[int], shape: Sequence[int], spacing: Sequence[int] | None = None
) -> list[float]:
    """Return the weights of known tokens for a target: inverse squared distances.

    They are normalized to sum 1.

    Examples
    --------
    >>> interpolation_weights(1, known=[0, 3], shape=(4,))
    [0.8, 0.2]
    """
    positions = grid.positions(shape, spacing)
    inverse = [1 / squared_distance(positions[target], positions[source]) for source in known]
    return [value / math.fsum(inverse) for value in inverse]


def interpolate(
    target: int,
    known: Sequence[int],
    features: Array,
    shape: Sequence[int],
    spacing: Sequence[int] | None = None,
) -> Array:
    """Mix features of known tokens for a target by inverse squared distance.

    Parameters
    ----------
    target : raster number, not among the known
    known : K raster numbers
    features : array (K, dim)
    shape, spacing : the grid

    Returns
    -------
    array (dim,)
    """
    mixed = np.zeros(features.shape[1])
    for weight, feature in zip(interpolation_weights(target, known, shape, spacing), features, strict=True):
        mixed += weight * feature
    return mixed


def stage_weights(
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    *,
    stages: int,
    spacing: Sequence[int] | None = None,
    visible_features: bool = True,
) -> list[Array]:
    """Return a matrix per stage: weights of known (columns) for thrown (rows) tokens.

    Parameters
    ----------
    order : the plan (see `schedule.make_order`)
    counts : TokenCounts
    shape, spacing : the grid
    stages : int
    visible_features : bool
        Whether visible tokens are among the known.

    Returns
    -------
    list of array (tokens of the stage, known tokens)

    Examples
    --------
    >>> stage_weights([0, 3, 1, 2], TokenCounts(1, 1, 2), (4,), stages=2)
    [array([[0.8, 0.2]]), array([[0.11111111, 0.44444444, 0.44444444]])]
    """
    matrices = []
    for stage, size in enumerate(stage_sizes(counts.thrown, stages), start=1):
        start = num_known(counts, stages, stage)
        known, targets = order[:start], order[start : start + size]
        if not visible_features:
            known = known[counts.visible :]
        rows = [interpolation_weights(target, known, shape, spacing) for target in targets]
        matrices.append(np.array(rows).reshape(size, len(known)))
    return matrices


def neighbours(token: int, shape: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Return the tokens in a window of 3 cells per axis, with their cell in it.

    The token itself is included.

    Examples
    --------
    >>> neighbours(0, (2, 2))
    [(0, (1, 1)), (1, (1, 2)), (2, (2, 1)), (3, (2, 2))]
    """
    cells = grid.positions(shape)
    result = []
    for cell in grid.positions((3,) * len(shape)):
        index = [i + step - 1 for i, step in zip(cells[token], cell, strict=True)]
        if all(0 <= i < length for i, length in zip(index, shape, strict=True)):
            result.append((grid.raster_number(index, shape), cell))
    return result


def convolve(known: Sequence[int], features: Array, shape: Sequence[int], kernel: Array) -> Array:
    """Fill the map around the known tokens by three rounds of depthwise convolution.

    Known tokens are filled from the start. In each round, an unfilled token becomes the sum of kernel times feature
    over the filled tokens of its window, divided by their number. It stays unfilled, and zero, if there are none.
    Filled tokens keep their value.

    Parameters
    ----------
    known : K raster numbers
    features : array (K, dim)
    shape : the grid
    kernel : array (dim, 3, ...), one axis of length 3 per axis of the grid; a cross-correlation, as in torch

    Returns
    -------
    array (N, dim)
        The map in raster order.
    """
    filled = dict(zip(known, features, strict=True))
    for _ in range(CONV_REPEATS):
        before = dict(filled)
        for token in range(grid.num_tokens(shape)):
            if token in before:
                continue
            seen = [(before[source], cell) for source, cell in neighbours(token, shape) if source in before]
            if not seen:
                continue
            total = np.zeros(features.shape[1])
            for feature, cell in seen:
                total += np.array([window[cell] for window in kernel]) * feature
            filled[token] = total / len(seen)
    nothing = np.zeros(features.shape[1])
    return np.array([filled.get(token, nothing) for token in range(grid.num_tokens(shape))])


def progressive_reconstruction(
    features: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    *,
    stages: int,
    reconstruction: str,
    parameters: Mapping[str, Array],
    spacing: Sequence[int] | None = None,
    visible_features: bool = True,
) -> Array:
    """Reconstruct the features of all thrown tokens of one image.

    Each stage uses visible tokens, decoded tokens and tokens of earlier stages. A layer norm (eps 1e-6) follows.

    Parameters
    ----------
    features : array (V + M, dim)
        Features of visible and decoded tokens, in plan order; without ``visible_features``, array (M, dim) of the
        decoded tokens.
    order : the plan (see `schedule.make_order`)
    counts : TokenCounts
    shape, spacing : the grid
    stages : int
    reconstruction : {"kernel", "interpolate", "conv"}
    parameters : mapping of str to array
        kernel: ``table``, ``norm.weight``, ``norm.bias``; conv: ``kernel``, ``norm.weight``, ``norm.bias``;
        interpolate: none.
    visible_features : bool
        Whether visible tokens have features. If not, only decoded tokens and those of earlier stages are known.

    Returns
    -------
    array (N, dim), in plan order; without ``visible_features``, array (M + T, dim) of the masked tokens

    Raises
    ------
    ValueError
        If the reconstruction is unknown, or tokens are thrown and none is known.
    """
    if counts.thrown and not len(features):
        raise ValueError("features: expected at least one known token to reconstruct others from, got none")
    for stage, size in enumerate(stage_sizes(counts.thrown, stages), start=1):
        if size == 0:
            continue
        start = num_known(counts, stages, stage)
        known, targets = order[:start], order[start : start + size]
        if not visible_features:
            known = known[counts.visible :]
        if reconstruction == "kernel":
            mixed = [kernel(target, known, features, shape, parameters["table"]) for target in targets]
        elif reconstruction == "interpolate":
            mixed = [interpolate(target, known, features, shape, spacing) for target in targets]
        elif reconstruction == "conv":
            image = convolve(known, features, shape, parameters["kernel"])
            mixed = [image[target] for target in targets]
        else:
            raise ValueError(f'reconstruction: expected "kernel", "interpolate" or "conv", got {reconstruction!r}')
        new = layer_norm(np.array(mixed), parameters.get("norm.weight"), parameters.get("norm.bias"))
        features = np.concatenate([features, new])
    return features

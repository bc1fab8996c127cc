"""Progressive reconstruction of thrown tokens from known tokens, stage by stage.

This module has no learned parameters. Learned modules live in the adapters and use its offset tables.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, array_namespace, as_index, device_of
from prmim_core._checks import check_arrays, check_tokens, check_type
from prmim_core.grid import Grid
from prmim_core.schedule import Plan, Schedule

Mix = Callable[[Array, Array, Array], Array]
"""Reconstructs tokens from (features (batch, K, dim), known (batch, K), thrown (batch, n)) as (batch, n, dim)."""


def reconstruct_stages(features: Array, plan: Plan, mix: Mix, *, visible_features: bool = True) -> Array:
    """Reconstruct thrown tokens, each stage from all tokens known before it.

    Parameters
    ----------
    features
        (batch, V + M, dim), features of visible and decoded tokens in plan order; (batch, M, dim) without
        ``visible_features``.
    plan
        The plan of the batch.
    mix
        ``mix(features, known, thrown)`` returns features (batch, n, dim) of the tokens ``thrown`` (batch, n), from the
        features (batch, K, dim) of the tokens ``known`` (batch, K).
    visible_features
        Whether visible tokens have features. False for a decoder that returns features of decoded tokens only (such as
        CrossMAE's): thrown tokens are reconstructed from decoded tokens and those of earlier stages.

    Returns
    -------
    array
        (batch, N, dim), features of all tokens in plan order; ``features`` come first, unchanged. Without
        ``visible_features``, (batch, M + T, dim), those of masked tokens.

    Raises
    ------
    ValueError
        If ``features`` do not fit the plan, tokens are thrown and none is known, or ``mix`` returns another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[0, 2, 1, 3]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    >>> mean = lambda features, known, thrown: features.mean(axis=1, keepdims=True)
    >>> reconstruct_stages(np.asarray([[[1.0], [3.0]]]), plan, mean)[0, :, 0].tolist()
    [1.0, 3.0, 2.0, 2.0]
    >>> features = np.asarray([[[3.0]]])
    >>> reconstruct_stages(features, plan, mean, visible_features=False)[0, :, 0].tolist()
    [3.0, 3.0, 3.0]
    """
    xp = array_namespace(features, plan.order)
    schedule = plan.schedule
    first = _first_known("features", schedule, visible_features)
    num_known = schedule.num_known(1) - first
    if features.ndim != 3 or tuple(features.shape[:2]) != (plan.order.shape[0], num_known):
        expected = f"({plan.order.shape[0]}, {num_known}, dim)"
        raise ValueError(f"features: expected shape {expected}, got {tuple(features.shape)}")
    for stage, size in enumerate(schedule.stage_sizes, start=1):
        if size:
            thrown = plan.stage(stage)
            reconstructed = mix(features, plan.known(stage)[:, first:], thrown)
            check_reconstructed(reconstructed, features, thrown)
            features = xp.concat([features, reconstructed], axis=1)
    return features


def check_reconstructed(reconstructed: Array, features: Array, thrown: Array) -> None:
    """Raise ValueError unless a mix returned features (batch, n, dim)."""
    expected = (*thrown.shape, features.shape[2])
    if tuple(reconstructed.shape) != expected:
        raise ValueError(f"mix: expected reconstructed features of shape {expected}, got {tuple(reconstructed.shape)}")


def interpolate(features: Array, plan: Plan, eps: float = 1e-6, *, visible_features: bool = True) -> Array:
    """Reconstruct thrown tokens by inverse distance weighting (Shepard, 1968).

    Parameters
    ----------
    features
        float (batch, V + M, dim), features of visible and decoded tokens in plan order; (batch, M, dim) without
        ``visible_features``.
    plan
        The plan of the batch.
    eps
        Added to the variance in the norm.
    visible_features
        Whether visible tokens have features, as in :func:`reconstruct_stages`.

    Returns
    -------
    array
        (batch, N, dim), features of all tokens in plan order; without ``visible_features``, those of masked tokens. A
        thrown token is the mean of all known tokens, weighted by inverse squared distance, then normalized over
        channels to mean 0 and variance 1.

    Raises
    ------
    ValueError
        As :func:`reconstruct_stages`.

    Notes
    -----
    One (n, K) x (K, dim) product per image and stage. :func:`stage_weights` returns the (n, K) matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> schedule = Schedule(Grid((4,)), TokenCounts(1, 1, 2), stages=1)
    >>> plan = Plan(np.asarray([[0, 3, 1, 2]]), schedule)
    >>> interpolate(np.asarray([[[0.0, 1.0], [1.0, 0.0]]]), plan)[0, 2:].round(3).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """
    xp = array_namespace(features, plan.order)

    def mix(features: Array, known: Array, thrown: Array) -> Array:
        weights = _inverse_distance_weights(xp, plan.schedule.grid, thrown, known)
        return _standardize(xp, xp.matmul(xp.astype(weights, features.dtype), features), eps)

    return reconstruct_stages(features, plan, mix, visible_features=visible_features)


def stage_weights(plan: Plan, *, visible_features: bool = True) -> tuple[Array, ...]:
    """Compute the matrices of :func:`interpolate`, one per stage.

    The plan's order and these matrices are sufficient for reconstruction. As NumPy arrays, they work in frameworks
    outside of the array API standard: TensorFlow, Keras, MLX, tinygrad.

    Parameters
    ----------
    plan
        The plan of the batch.
    visible_features
        Whether visible tokens have features, as in :func:`reconstruct_stages`. Without, their columns are left out.

    Returns
    -------
    tuple of arrays
        One float32 matrix (batch, stage_sizes[s - 1], num_known(s)) per stage s = 1 to S, empty for an empty stage.
        Rows are thrown tokens, columns known tokens, both in plan order. Rows sum to 1.

    Raises
    ------
    TypeError
        If ``plan`` is not a Plan.
    ValueError
        If tokens are thrown and none is known.

    Notes
    -----
    Given features x (batch, V + M, dim) of visible and decoded tokens in plan order, compute those of all tokens by::

        for weights in stage_weights(plan):
            new = weights @ x
            new = (new - mean(new)) / sqrt(variance(new) + eps)  over channels
            x = concatenate([x, new], axis=1)

    The stages cannot be merged into one matrix, because each is normalized before the next reads it.

    O(T N) operations per image. 48 kB per image for 196 tokens, 98 of them thrown, in two stages.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import Schedule, TokenCounts
    >>> plan = Plan(np.asarray([[0, 3, 1, 2]]), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    >>> [weights.shape for weights in stage_weights(plan)]
    [(1, 1, 2), (1, 1, 3)]
    >>> print(stage_weights(plan)[0])
    [[[0.8 0.2]]]
    """
    check_type("plan", plan, Plan)
    xp, schedule = array_namespace(plan.order), plan.schedule
    first = _first_known("plan", schedule, visible_features)
    return tuple(
        _inverse_distance_weights(xp, schedule.grid, plan.stage(stage), plan.known(stage)[:, first:])
        for stage in range(1, schedule.stages + 1)
    )


def _first_known(name: str, schedule: Schedule, visible_features: bool) -> int:
    """Return the first known position in plan order; ValueError if none is known."""
    first = 0 if visible_features else schedule.counts.visible
    if schedule.num_known(1) == first and schedule.counts.thrown:
        kinds = "visible or decoded" if visible_features else "decoded"
        raise ValueError(f"{name}: expected at least one {kinds} token to reconstruct others from, got none")
    return first


def _inverse_distance_weights(xp: Namespace, grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute the weights of a stage: float32 (batch, n, K). Rows sum to 1."""
    inverse = 1.0 / xp.astype(_pair_squared_distances(xp, grid, thrown, known), xp.float32)
    return inverse / xp.sum(inverse, axis=-1, keepdims=True)


def _standardize(xp: Namespace, x: Array, eps: float) -> Array:
    """Apply a layer norm without parameters (biased variance)."""
    mean = xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean((x - mean) ** 2, axis=-1, keepdims=True)  # PyTorch's var warns about empty batches
    return (x - mean) / xp.sqrt(variance + eps)


def num_offsets(grid: Grid) -> int:
    """Return the number of offsets between two tokens: the product of (2 * side - 1).

    Parameters
    ----------
    grid
        The grid of the tokens.

    Examples
    --------
    >>> num_offsets(Grid((14, 14)))
    729
    """
    check_type("grid", grid, Grid)
    return prod([2 * size - 1 for size in grid.shape])  # torch.compile does not support a generator here


def offset_squared_distances(grid: Grid) -> NDArray[np.int64]:
    """Compute the squared distance of every offset, spacing applied.

    Parameters
    ----------
    grid
        The grid of the tokens.

    Returns
    -------
    NDArray
        int64 (num_offsets,), in raster order of the offsets.

    Examples
    --------
    >>> offset_squared_distances(Grid((2, 2))).tolist()
    [2, 1, 2, 1, 0, 1, 2, 1, 2]
    """
    check_type("grid", grid, Grid)
    squares = [(np.arange(1 - size, size) * step) ** 2 for size, step in zip(grid.shape, grid.spacing, strict=True)]
    total = squares[0]
    for along_axis in squares[1:]:
        total = total[:, None] + along_axis
        total = total.reshape(-1)
    return total


def offset_index(grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute the index of the offset from every known to every thrown token.

    Parameters
    ----------
    grid
        The grid of the tokens.
    thrown, known
        int (batch, n) and (batch, K).

    Returns
    -------
    array
        int (batch, n, K), in [0, num_offsets): raster index of (thrown - known), in tokens along each axis.

    Raises
    ------
    TypeError
        If ``grid`` is not a Grid or an index does not hold integers.
    IndexError
        If a token is outside of the grid. Checked on the host only: NumPy, and PyTorch on a CPU when not compiled.

    Examples
    --------
    >>> import numpy as np
    >>> offset_index(Grid((2, 2)), np.asarray([[3]]), np.asarray([[0, 3]])).tolist()
    [[[8, 4]]]
    """
    check_type("grid", grid, Grid)
    xp = check_arrays(thrown=thrown, known=known)
    for name, tokens in (("thrown", thrown), ("known", known)):
        check_tokens(xp, name, tokens, grid.num_tokens)
    thrown, known = as_index(xp, thrown), as_index(xp, known)
    # The index of an offset is the difference of two raster indices in the grid of offsets, shifted to its centre. This
    # needs n + K indices per image and one subtraction per pair.
    return _offset_place(grid, thrown)[:, :, None] - _offset_place(grid, known)[:, None, :] + num_offsets(grid) // 2


def _offset_place(grid: Grid, tokens: Array) -> Array:
    """Compute the raster index of tokens in the wider grid of offsets."""
    place = tokens * 0
    stride = grid.num_tokens
    for size in grid.shape:
        stride //= size
        place = place * (2 * size - 1) + tokens // stride % size
    return place


def _pair_squared_distances(xp: Namespace, grid: Grid, thrown: Array, known: Array) -> Array:
    """Compute squared distances from thrown to known tokens: int (batch, n, K)."""
    thrown, known = as_index(xp, thrown), as_index(xp, known)
    total = xp.zeros((1, 1, 1), dtype=thrown.dtype, device=device_of(thrown))
    stride = grid.num_tokens
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        stride //= size
        along_axis = ((thrown // stride % size)[:, :, None] - (known // stride % size)[:, None, :]) * step
        total = total + along_axis * along_axis
    return total

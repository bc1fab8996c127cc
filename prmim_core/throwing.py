"""Throwing strategies: choose decoded tokens; other masked tokens are thrown.

Pass the result to :func:`prmim_core.make_plan` as ``decoded``, or name the strategy in
:class:`prmim_core.Schedule`. NaN in noise or weights raises ValueError, on the host only: for NumPy, and for
PyTorch on a CPU when not compiled.
"""

from collections.abc import Callable
from typing import Literal

from prmim_core._arrays import Array, Namespace, argsort, take_along_rows
from prmim_core._checks import (
    check_arrays,
    check_choice,
    check_count,
    check_integers,
    check_mask,
    check_noise,
    check_type,
    check_weights,
)
from prmim_core.counts import TokenCounts
from prmim_core.grid import Grid
from prmim_core.masking import _arrival_times
from prmim_core.noise import _noise_rank
from prmim_core.sampling import Sampler, _furthest_point_sampling

Throwing = Literal["furthest", "random", "weighted", "cell"]
FurthestFrom = Literal["visible", "none"]
ThrowingFunction = Callable[[Grid, TokenCounts, Array, Array], Array]
"""A custom strategy, (grid, counts, noise, is_visible) -> decoded, int (batch, M); noise and mask are (batch, N).

It must be pure. A schedule with a unit passes the grid of units, and counts and arrays of units.
"""

STRATEGIES: dict[Throwing, str] = {
    "furthest": "furthest sampling, spread over the image",
    "random": "a uniform draw",
    "weighted": "a draw in proportion to weights",
    "cell": "a running cell",
}
"""How each strategy chooses the decoded tokens, in words."""
WEIGHTED: tuple[Throwing, ...] = ("weighted",)
"""Strategies that need weights."""


def furthest_decoded(
    grid: Grid,
    num_decoded: int,
    noise: Array,
    is_visible: Array,
    *,
    furthest_from: FurthestFrom = "visible",
) -> Array:
    """Decode the masked tokens that furthest point sampling picks (PR-MIM).

    Parameters
    ----------
    grid
        The grid of the tokens.
    num_decoded
        M, at most the number of masked tokens.
    noise
        (batch, N), any real dtype; breaks ties as in :func:`prmim_core.furthest_point_sampling`.
    is_visible
        bool (batch, N).
    furthest_from
        ``"visible"``: each pick is the furthest from visible tokens and earlier picks. ``"none"``: from earlier picks
        only; the first pick is random.

    Returns
    -------
    array
        int (batch, M), in picking order.

    Raises
    ------
    TypeError
        If ``is_visible`` is not bool.
    ValueError
        If a shape does not fit, ``num_decoded`` is out of range or ``furthest_from`` is unknown.

    Notes
    -----
    The paper does not specify ``furthest_from``, the metric, or ties; these choices are ours.

    References
    ----------
    Li et al., "PR-MIM: Delving Deeper into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.

    Examples
    --------
    >>> import numpy as np
    >>> is_visible = np.asarray([[True, False, False, False, False]])
    >>> furthest_decoded(Grid((5,)), 2, np.asarray([[1, 0, 3, 2, 4]]), is_visible).tolist()
    [[4, 2]]
    """
    xp = _check(num_decoded, noise, is_visible, grid)
    check_choice("furthest_from", furthest_from, FurthestFrom)
    return _furthest(xp, grid, num_decoded, noise, is_visible, furthest_from, None)


def random_decoded(num_decoded: int, noise: Array, is_visible: Array) -> Array:
    """Decode masked tokens drawn uniformly (CrossMAE).

    Parameters
    ----------
    num_decoded
        M, at most the number of masked tokens.
    noise
        (batch, N), any real dtype.
    is_visible
        bool (batch, N).

    Returns
    -------
    array
        int (batch, M), the masked tokens of lowest noise, lowest first.

    Raises
    ------
    TypeError
        If ``is_visible`` is not bool.
    ValueError
        If a shape does not fit or ``num_decoded`` is out of range.

    References
    ----------
    Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391.

    Examples
    --------
    >>> import numpy as np
    >>> is_visible = np.asarray([[False, False, False, True]])
    >>> random_decoded(2, np.asarray([[4, 3, 2, 1]]), is_visible).tolist()
    [[2, 1]]
    """
    xp = _check(num_decoded, noise, is_visible)
    return _lowest_masked(xp, num_decoded, _noise_rank(xp, noise), is_visible)


def weighted_decoded(num_decoded: int, noise: Array, is_visible: Array, weights: Array) -> Array:
    """Decode masked tokens drawn without replacement in proportion to weights (AMT).

    Parameters
    ----------
    num_decoded
        M, at most the number of masked tokens.
    noise
        int32 (batch, N), from :func:`prmim_core.counter_noise`.
    is_visible
        bool (batch, N).
    weights
        float (batch, N), non-negative, for instance attention. See :func:`prmim_core.weighted_visible`.

    Returns
    -------
    array
        int (batch, M), in drawing order.

    Raises
    ------
    TypeError
        If ``noise`` is not int32 or ``is_visible`` is not bool.
    ValueError
        If a shape does not fit or ``num_decoded`` is out of range.

    References
    ----------
    Liu et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", arXiv 2211.15362.

    Examples
    --------
    >>> import numpy as np
    >>> from prmim_core import counter_noise
    >>> is_visible = np.asarray([[True, False, False, False]])
    >>> weights = np.asarray([[9.0, 0.0, 1.0, 0.0]])
    >>> weighted_decoded(1, counter_noise(0, 0, np.arange(1), 4), is_visible, weights).tolist()
    [[2]]
    """
    xp = _check(num_decoded, noise, is_visible)
    check_weights(xp, noise, weights)
    return _lowest_masked(xp, num_decoded, _arrival_times(xp, noise, weights), is_visible)


def cell_decoded(grid: Grid, num_decoded: int, noise: Array, is_visible: Array) -> Array:
    """Decode masked tokens by a running cell (VideoMAE V2).

    The tokens of a cell, 2x2 over the last two axes (4 in a row on a grid of one axis), have phases 0 to 3. Phases
    advance by one per time step, from an offset drawn per image. Tokens are decoded in order of phase, then of noise.

    Parameters
    ----------
    grid
        The grid of the tokens; the first of three axes is time.
    num_decoded
        M, at most the number of masked tokens.
    noise
        Integers (batch, N). The noise of token 0 gives the offset.
    is_visible
        bool (batch, N).

    Returns
    -------
    array
        int (batch, M), in order of phase.

    Raises
    ------
    TypeError
        If ``noise`` does not hold integers or ``is_visible`` is not bool.
    ValueError
        If a shape does not fit or ``num_decoded`` is out of range.

    Notes
    -----
    VideoMAE V2 decodes two of four phases, so its number of decoded masked tokens varies. The fixed M is our choice.

    References
    ----------
    Wang et al., "VideoMAE V2", arXiv 2303.16727.

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.asarray([[4, 7, 6, 5, 4, 3, 2, 1]])
    >>> is_visible = np.asarray([[True] + [False] * 7])
    >>> cell_decoded(Grid((2, 4)), 3, noise, is_visible).tolist()
    [[2, 3, 1]]
    """
    xp = _check(num_decoded, noise, is_visible, grid)
    check_integers(xp, "noise", noise)
    return _lowest_masked(xp, num_decoded, _cell_score(xp, grid, noise), is_visible)


def _check(num_decoded: int, noise: Array, is_visible: Array, grid: Grid | None = None) -> Namespace:
    if grid is not None:
        check_type("grid", grid, Grid)
    xp = check_arrays(noise=noise, is_visible=is_visible)
    check_noise(noise, None if grid is None else grid.num_tokens)
    check_mask(xp, "is_visible", is_visible, noise)
    check_count("num_decoded", num_decoded, noise.shape[1])
    return xp


def _choose_decoded(
    xp: Namespace,
    throwing: Throwing,
    grid: Grid,
    num_decoded: int,
    noise: Array,
    is_visible: Array,
    *,
    furthest_from: FurthestFrom,
    weights: Array | None,
    sampler: Sampler | None,
) -> Array:
    """Choose decoded tokens by the strategy of this name: int (batch, num_decoded)."""
    match throwing:
        case "furthest":
            return _furthest(xp, grid, num_decoded, noise, is_visible, furthest_from, sampler)
        case "random":
            score = _noise_rank(xp, noise)
        case "weighted":
            score = _arrival_times(xp, noise, weights)
        case "cell":
            score = _cell_score(xp, grid, noise)
    return _lowest_masked(xp, num_decoded, score, is_visible)


def _furthest(
    xp: Namespace,
    grid: Grid,
    num_decoded: int,
    noise: Array,
    is_visible: Array,
    furthest_from: FurthestFrom,
    sampler: Sampler | None,
) -> Array:
    is_known = is_visible if furthest_from == "visible" else None
    if sampler is not None:
        return sampler(grid, num_decoded, noise, is_known, ~is_visible)
    return _furthest_point_sampling(xp, grid, num_decoded, noise, is_known, ~is_visible)


def _cell_score(xp: Namespace, grid: Grid, noise: Array) -> Array:
    """Rank tokens by phase, then by noise: int32 (batch, N)."""
    # Unit spacing, because cells consist of neighbours whatever the spacing.
    columns = Grid(grid.shape).coordinates(noise)
    place = columns[-1] if grid.axes == 1 else columns[-2] % 2 * 2 + columns[-1] % 2
    time = columns[0] if grid.axes == 3 else xp.zeros_like(place)
    offset = noise[:, :1] & 3
    phase = (place + time)[None, :] + xp.astype(offset, xp.int32)
    return (phase & 3) * grid.num_tokens + _noise_rank(xp, noise)


def _lowest_masked(xp: Namespace, num_decoded: int, score: Array, is_visible: Array) -> Array:
    """Take the masked tokens of lowest score, lowest first: int (batch, num_decoded)."""
    by_score = argsort(xp, score)
    # A second stable sort moves visible tokens behind masked ones and otherwise keeps the order.
    is_visible_by_score = xp.astype(take_along_rows(xp, is_visible, by_score), xp.int32)
    masked_first = argsort(xp, is_visible_by_score)
    return take_along_rows(xp, by_score, masked_first[:, :num_decoded])

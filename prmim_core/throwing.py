"""Which masked tokens are decoded, and which are thrown.

A strategy takes the visible tokens as a mask and returns the indices of the tokens to decode; the other masked tokens
are thrown. :func:`choose_decoded` knows them by name. All but ``furthest`` are rivals to compare with.
"""

from typing import Literal, get_args

from prmim_core._arrays import Array, argsort, array_namespace, device_of
from prmim_core.grid import Grid
from prmim_core.masking import arrival_times
from prmim_core.noise import noise_rank
from prmim_core.sampling import Sampler, furthest_point_sampling

Throwing = Literal["furthest", "random", "weighted", "cell"]
Seed = Literal["visible", "none"]


def furthest_decoded(
    grid: Grid,
    noise: Array,
    is_visible: Array,
    num_decoded: int,
    *,
    seed: Seed = "visible",
    sampler: Sampler = furthest_point_sampling,
) -> Array:
    """Decode the tokens that furthest point sampling picks among the masked (PR-MIM).

    Parameters
    ----------
    grid
        The grid of the tokens.
    noise
        (batch, N); see :func:`prmim_core.furthest_point_sampling`.
    is_visible
        bool (batch, N).
    num_decoded
        M.
    seed
        ``"visible"``: the visible tokens are known from the start, so picks keep away from them too. ``"none"``: picks
        keep away from one another only, and the first is random.
    sampler
        Does the work: the core's own loop, or a framework's kernel that picks the same tokens.

    Returns
    -------
    array
        int (batch, M), in the order of picking.

    Notes
    -----
    The published text leaves seed, metric and ties open; these choices are ours.

    References
    ----------
    Li et al., "PR-MIM: Delving Deeper into Partial Reconstruction in Masked Image Modeling", arXiv 2411.15746.
    """
    known = is_visible if seed == "visible" else None
    return sampler(grid, num_decoded, noise, known, ~is_visible)


def random_decoded(noise: Array, is_visible: Array, num_decoded: int) -> Array:
    """Decode masked tokens at random: those of lowest noise, int (batch, M) (CrossMAE).

    References
    ----------
    Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391.
    """
    return _lowest_masked(noise_rank(noise), is_visible, num_decoded)


def weighted_decoded(noise: Array, is_visible: Array, num_decoded: int, weights: Array) -> Array:
    """Decode masked tokens drawn without replacement in proportion to weights (AMT).

    Parameters
    ----------
    noise
        int32 (batch, N).
    is_visible
        bool (batch, N).
    num_decoded
        M.
    weights
        float (batch, N), not negative, such as attention: what is attended to is decoded, the rest is thrown.

    Returns
    -------
    array
        int (batch, M), in order of drawing.

    References
    ----------
    Gui et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", arXiv 2211.15362.
    """
    return _lowest_masked(arrival_times(noise, weights), is_visible, num_decoded)


def cell_decoded(grid: Grid, noise: Array, is_visible: Array, num_decoded: int) -> Array:
    """Decode by a running cell (VideoMAE V2).

    A cell of 2x2 tokens (of 4 in a row on a grid of one axis) gives its tokens the phases 0 to 3; the phases advance by
    one with each time step, from an offset drawn per image. Tokens are decoded by rising phase, by rising noise within
    one, until there are M.

    Parameters
    ----------
    grid
        The grid of the tokens; the first of three axes is time.
    noise
        int32 (batch, N). That of token 0 gives the offset.
    is_visible
        bool (batch, N).
    num_decoded
        M.

    Returns
    -------
    array
        int (batch, M).

    Notes
    -----
    VideoMAE V2 keeps two of four phases whether or not a token is visible, so its number of decoded masked tokens
    varies. Filling up to M by phase keeps it fixed; this is ours.

    References
    ----------
    Wang et al., "VideoMAE V2", arXiv 2303.16727.
    """
    xp = array_namespace(noise)
    if not xp.isdtype(noise.dtype, "integral"):
        raise TypeError(f"noise: expected integers, got {noise.dtype}")
    # Unit spacing: a cell is made of neighbours, however far apart they lie.
    columns = Grid(grid.shape).coordinates(xp, device_of(noise))
    place = columns[-1] if grid.axes == 1 else columns[-2] % 2 * 2 + columns[-1] % 2
    time = columns[0] if grid.axes == 3 else xp.zeros_like(place)
    offset = noise[:, :1] & 3
    phase = (place + time)[None, :] + xp.astype(offset, xp.int32)
    return _lowest_masked((phase & 3) * grid.num_tokens + noise_rank(noise), is_visible, num_decoded)


def _lowest_masked(score: Array, is_visible: Array, num_decoded: int) -> Array:
    """Return the masked tokens of lowest score, lowest first: int (batch, num_decoded)."""
    xp = array_namespace(score)
    by_score = argsort(score)
    # A second stable sort moves the visible tokens behind the masked ones and keeps the order otherwise.
    is_visible_by_score = xp.astype(xp.take_along_axis(is_visible, by_score, axis=1), xp.int32)
    masked_first = argsort(is_visible_by_score)
    return xp.take_along_axis(by_score, masked_first[:, :num_decoded], axis=1)


def choose_decoded(
    throwing: Throwing,
    grid: Grid,
    noise: Array,
    is_visible: Array,
    num_decoded: int,
    *,
    seed: Seed = "visible",
    weights: Array | None = None,
    sampler: Sampler = furthest_point_sampling,
) -> Array:
    """Return the tokens that the strategy ``throwing`` decodes: int (batch, num_decoded).

    Raises
    ------
    ValueError
        If the strategy is not known, or ``weights`` are missing where it needs them or given where it does not.
    """
    if (weights is not None) != (throwing == "weighted"):
        came = "None" if weights is None else "an array"
        raise ValueError(f"weights: expected an array with throwing='weighted' only, got {came} with {throwing!r}")
    match throwing:
        case "furthest":
            return furthest_decoded(grid, noise, is_visible, num_decoded, seed=seed, sampler=sampler)
        case "random":
            return random_decoded(noise, is_visible, num_decoded)
        case "weighted":
            return weighted_decoded(noise, is_visible, num_decoded, weights)
        case "cell":
            return cell_decoded(grid, noise, is_visible, num_decoded)
        case _:
            raise ValueError(f"throwing: expected one of {', '.join(get_args(Throwing))}, got {throwing!r}")

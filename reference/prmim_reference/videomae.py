"""PR-MIM on VideoMAE and VideoMAE V2: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid, mae
from prmim_reference.counts import TokenCounts, count_tokens, rounding_rule
from prmim_reference.masking import block_visible
from prmim_reference.method import PixelOutput
from prmim_reference.method import encode as encode  # re-exported: shared by all methods
from prmim_reference.targets import grid_shape, low_pass, normalize_patch_channels, patchify
from prmim_reference.throwing import cell_phase

Array = NDArray[np.float64]


def tube_shape(shape: Sequence[int], mask_unit: int = 1) -> tuple[int, ...]:
    """Return the number of tokens along each axis that are masked together.

    A tube spans all time steps of a clip. Images of fewer than three axes have no time.

    Examples
    --------
    >>> tube_shape((8, 14, 14)), tube_shape((14, 14))
    ((8, 1, 1), (1, 1))
    """
    unit = (mask_unit,) * len(shape)
    return (shape[0], *unit[1:]) if len(shape) == 3 else unit


def kept_cells(shape: Sequence[int], throw_ratio: float, noise: Sequence[int]) -> list[int]:
    """Return the tokens that VideoMAE V2's decoder mask keeps, in raster order.

    The mask is a running cell over all tokens. Of its four phases, the lowest 4 (1 - throw_ratio) are kept.

    Examples
    --------
    >>> kept_cells((2, 2, 2), 0.5, noise=[0] * 8)
    [0, 1, 4, 7]
    """
    kept = 4 * (1 - throw_ratio)
    if kept not in (1, 2, 3):
        raise ValueError(f"throw_ratio: expected 0.25, 0.5 or 0.75 for dual masking, got {throw_ratio}")
    phases = [cell_phase(index, noise[0] % 4) for index in grid.positions(shape)]
    return [token for token, phase in enumerate(phases) if phase < kept]


def channel_targets(image: Array, patch_size: Sequence[int], radius: float | None) -> Array:
    """Return the target patches (N, patch_dim) of an image, normalized per channel.

    The image has values 0 .. 255; the units are [0, 1].
    """
    if radius is not None:
        image = low_pass(image, radius)
    return normalize_patch_channels(patchify(image / 255, patch_size), image.shape[-1])


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    patch_size: Sequence[int],
    mask_ratio: float = 0.9,
    mask_unit: int = 1,
    throw_ratio: float = 0.5,
    rounding: str = "exact",
    throwing: str = "furthest",
    low_pass: float | None = None,
    norm_pix: bool = True,
    norm_over: str = "channel",
    **options: Any,
) -> PixelOutput:
    """Compute the loss and the predictions of a batch.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file. Position tables are not recomputed.
    images : uint8 (batch, axes..., channels)
        Clips have three axes: time, height and width.
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    mask_ratio, throw_ratio : float
        Fractions of all tokens. The masked fraction of the tubes is rounded down.
    mask_unit : int
        Tokens along each side of a tube.
    rounding : {"exact", "float"}
    throwing : {"furthest", "random", "cell", "dual", "none"}
        "dual": the decoder also decodes the visible tokens that the running cell keeps; the loss ignores them.
    low_pass, norm_pix : see `mae.forward`
    norm_over : {"channel", "patch"}
        Region over which a target patch is normalized.
    **options
        See `mae.forward`.

    Returns
    -------
    PixelOutput
    """
    if norm_over not in ("channel", "patch"):
        raise ValueError(f'norm_over: expected "channel" or "patch", got {norm_over!r}')
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    tube = tube_shape(shape, mask_unit)
    tokens_per_tube = grid.num_tokens(tube)
    thrown_ratio = 0.0 if throwing == "none" else throw_ratio
    rule = rounding_rule(rounding, "amt_float", "amt")
    counts = count_tokens(grid.num_tokens(shape), mask_ratio, thrown_ratio, rule, mask_unit=tokens_per_tube)
    visible = [block_visible(shape, tube, counts.visible // tokens_per_tube, row) for row in noise.tolist()]
    repeated: list[list[int]] = [[] for _ in visible]
    if throwing == "dual" and throw_ratio > 0:
        throwing = "cell"
        for number, row in enumerate(noise.tolist()):
            kept = kept_cells(shape, throw_ratio, row)
            repeated[number] = [token for token in kept if token in visible[number]]
            decoded = len(kept) - len(repeated[number])
            counts = TokenCounts(counts.visible, decoded, counts.num_tokens - counts.visible - decoded)
    wanted = None
    if norm_pix and norm_over == "channel":
        wanted = [channel_targets(image, patch_size, low_pass) for image in images]
    return mae.forward(
        weights,
        images,
        noise,
        patch_size=patch_size,
        throwing=throwing,
        low_pass=low_pass,
        norm_pix=norm_pix,
        visible=visible,
        counts=counts,
        repeated=repeated,
        wanted=wanted,
        **options,
    )

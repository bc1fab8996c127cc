"""PR-MIM on SimMIM: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens, rounding_rule
from prmim_reference.masking import block_visible, unattended_visible, unit_shape
from prmim_reference.method import (
    PixelOutput,
    Targets,
    as_weights,
    check_reconstruction,
    encode_tokens,
    encoder_scales,
    image_patches,
    pixel_output,
    rebuild,
    supervise,
)
from prmim_reference.method import attention as attention  # re-exported: shared by all methods
from prmim_reference.method import encode as encode  # re-exported: shared by all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape
from prmim_reference.vit import Weights

Array = NDArray[np.float64]


def unit_counts(
    shape: Sequence[int],
    unit: Sequence[int],
    mask_ratio: float,
    throw_ratio: float,
    throw_by: str,
    rounding: str = "exact",
) -> TokenCounts:
    """Return the counts for masking by units, and throwing by tokens or units.

    Examples
    --------
    >>> unit_counts((14, 14), (2, 2), 0.6, 0.25, "token")  # 19 of 49 units are visible
    TokenCounts(visible=76, decoded=71, thrown=49)
    >>> unit_counts((14, 14), (2, 2), 0.6, 0.25, "unit")
    TokenCounts(visible=76, decoded=72, thrown=48)
    """
    if throw_by not in ("token", "unit"):
        raise ValueError(f'throw_by: expected "token" or "unit", got {throw_by!r}')
    tokens = grid.num_tokens(unit)
    return count_tokens(
        grid.num_tokens(shape),
        mask_ratio,
        throw_ratio,
        rounding_rule(rounding, "simmim_float"),
        mask_unit=tokens,
        throw_unit=tokens if throw_by == "unit" else 1,
    )


def image_features(
    patches: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    *,
    num_heads: int,
    stages: int,
    reconstruction: str,
    scales: Array | None,
) -> Array:
    """Return the inputs of the heads for one image, in plan order.

    Shape (V + M, dim), or (N, dim) with reconstruction.

    There is no decoder: the encoder sees visible patches, and a mask token per decoded token.
    """
    visible = order[: counts.visible]
    decoded = order[counts.visible : counts.visible + counts.decoded]
    encoded = encode_tokens(patches, visible, shape, weights, num_heads, mask_tokens=decoded, scales=scales)
    return rebuild(encoded[1:], order, counts, shape, weights, stages=stages, reconstruction=reconstruction)


def absolute_error(predicted: Array, target: Array) -> float:
    """Return the mean absolute error of a token."""
    return float(np.abs(predicted - target).sum() / predicted.size)


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    mask_ratio: float = 0.6,
    throw_ratio: float = 0.25,
    rounding: str = "exact",
    throwing: str = "furthest",
    furthest_from: str = "visible",
    stages: int = 2,
    reconstruction: str = "kernel",
    thrown_weight: float = 1.0,
    low_pass: float | None = None,
    thrown_target: str = "cells",
    cells: int | None = None,
    cell_norm: str = "image",
    extra_cells: str = "none",
    extra_cells_weight: float = 1.0,
    mask_unit: int = 2,
    throw_by: str = "token",
    drop_path: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    draw_weights: ArrayLike | None = None,
) -> PixelOutput:
    """Compute the loss and the predictions of a batch.

    The target is the pixels, normalized per channel. The published loss is the sum of absolute errors of masked tokens,
    divided by their number of pixels plus 1e-5 and by the number of channels. Here, it is the sum of the mean errors of
    tokens, divided by their number plus 1e-5 / (pixels of a patch). This is equivalent, and also applies to cells.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file. They determine the kind of positions and whether there
        is LayerScale.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    num_heads : int
    mask_ratio, throw_ratio : float
        Fractions of all tokens.
    rounding : {"exact", "float"}
        Arithmetic that converts ratios to counts: exact, or that of the original code (`counts.count_tokens`).
    throwing : {"furthest", "random", "weighted", "cell", "none"}
        "none" throws nothing (throw_ratio 0). If no token is thrown, masked tokens are in the order of "random", which
        has no effect.
    furthest_from : {"visible", "none"}
    stages : int
    reconstruction : {"kernel", "interpolate", "conv", "none"}
        "none": thrown tokens are neither reconstructed nor supervised.
    thrown_weight : float
        Weight of a thrown token in the loss; a decoded one has 1.
    low_pass : float, optional
        Radius, in periods per image, of the low-pass filter on the patches that tokens predict.
    thrown_target : {"cells", "patch"}
        Target of a thrown token: the means of the cells of its patch, or its pixels.
    cells : int, optional
        Cells of a patch along each axis; by default 2, or 1 along a side of odd length.
    cell_norm : {"image", "window", "none"}
        Region over which cells are normalized: the image, the patch and its neighbours, or none.
    extra_cells : {"none", "decoded", "known"}
        Tokens that predict cells in addition: none, decoded ones, or decoded and visible ones.
    extra_cells_weight : float
        Weight of these additional cells in the loss.
    mask_unit : int
        Tokens per masked unit along each axis; divides the grid.
    throw_by : {"token", "unit"}
        Throw single tokens or whole units.
    drop_path : float
        Rate of the last block in training; 0 is evaluation.
    mean, std : numbers per channel
        Defaults: ImageNet's for three channels, else 0.5.
    draw_weights : float (batch, N), optional
        Token weights for ``throwing="weighted"``. They also draw the visible units: units drawn last are visible.

    Returns
    -------
    PixelOutput

    Raises
    ------
    ValueError
        If a name is unknown, the unit does not divide the grid, or the weights have no or both kinds of positions.

    References
    ----------
    Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886.
    """
    check_reconstruction(reconstruction)
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    unit = unit_shape(shape, mask_unit)
    counts = unit_counts(shape, unit, mask_ratio, 0.0 if throwing == "none" else throw_ratio, throw_by, rounding)
    num_units = counts.visible // grid.num_tokens(unit)
    if throwing == "weighted":
        if draw_weights is None:
            raise ValueError('draw_weights: expected token weights for throwing="weighted", got None')
        drawn = zip(noise.tolist(), np.asarray(draw_weights).tolist(), strict=True)
        visible = [unattended_visible(shape, unit, num_units, *image) for image in drawn]
    else:
        visible = [block_visible(shape, unit, num_units, image_noise) for image_noise in noise.tolist()]
    if counts.thrown == 0:
        throwing, throw_by = "random", "token"

    targets = Targets(patch_size, False, reconstruction != "none", thrown_target, cells, cell_norm, extra_cells)
    orders, found = [], []
    for number, image in enumerate(images):
        image_noise = noise[number].tolist()
        order = make_order(
            shape,
            counts,
            image_noise,
            throwing=throwing,
            furthest_from=furthest_from,
            visible=visible[number],
            weights=None if draw_weights is None else np.asarray(draw_weights)[number].tolist(),
            unit=unit if throw_by == "unit" else None,
        )
        patches = image_patches(image, patch_size, mean, std)
        wanted_patches = image_patches(image, patch_size, mean, std, low_pass)
        features = image_features(
            patches,
            order,
            counts,
            shape,
            weights,
            num_heads=num_heads,
            stages=stages,
            reconstruction=reconstruction,
            scales=encoder_scales(image_noise, weights, drop_path),
        )
        found.append(
            supervise(
                features,
                patches,
                wanted_patches,
                order,
                counts,
                shape,
                weights,
                targets,
                head="head",
                error=absolute_error,
            )
        )
        orders.append(order)
    return pixel_output(
        found,
        orders,
        thrown_weight=thrown_weight,
        extra_cells_weight=extra_cells_weight,
        eps=1e-5 / grid.num_tokens(patch_size),
    )

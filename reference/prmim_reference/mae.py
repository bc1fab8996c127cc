"""PR-MIM on MAE: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens, rounding_rule
from prmim_reference.method import (
    PixelOutput,
    Targets,
    as_weights,
    check_reconstruction,
    encode_tokens,
    image_patches,
    pixel_output,
    rebuild,
    supervise,
)
from prmim_reference.method import encode as encode  # re-exported: the same for all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape
from prmim_reference.vit import Weights, linear, transformer

Array = NDArray[np.float64]


def decode_tokens(
    encoded: Array, visible: Sequence[int], decoded: Sequence[int], weights: Weights, num_heads: int
) -> Array:
    """Run the decoder on class token, visible and decoded tokens; return (V + M, dim) without class token."""
    table = weights["decoder.pos_embed"][0]
    embedded = linear(encoded, weights, "decoder.embed")
    sequence = [embedded[0] + table[0]]
    for place, token in enumerate(visible, start=1):
        sequence.append(embedded[place] + table[1 + token])
    for token in decoded:
        sequence.append(weights["decoder.mask_token"][0, 0] + table[1 + token])
    return transformer(np.array(sequence), weights, "decoder", num_heads)[1:]


def image_features(
    patches: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    *,
    num_heads: int,
    decoder_heads: int,
    stages: int,
    reconstruction: str,
) -> Array:
    """Return the features of one image that the heads read, in plan order: (V + M, dim), or (N, dim) if rebuilt."""
    visible = order[: counts.visible]
    decoded = order[counts.visible : counts.visible + counts.decoded]
    encoded = encode_tokens(patches, visible, shape, weights, num_heads)
    features = decode_tokens(encoded, visible, decoded, weights, decoder_heads)
    return rebuild(features, order, counts, shape, weights, stages=stages, reconstruction=reconstruction)


def squared_error(predicted: Array, target: Array) -> float:
    """Return the mean squared error of a token."""
    return float(((predicted - target) ** 2).sum() / predicted.size)


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    decoder_heads: int,
    mask_ratio: float = 0.75,
    throw_ratio: float = 0.5,
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
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    visible: ArrayLike | None = None,
    draw_weights: ArrayLike | None = None,
) -> PixelOutput:
    """Compute the loss and the predictions of a batch.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file. Position tables are not recomputed.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    num_heads, decoder_heads : int
    mask_ratio, throw_ratio : float
        Fractions of all tokens.
    rounding : {"exact", "float"}
        Arithmetic that turns ratios into counts: exact, or that of the original code (`counts.count_tokens`).
    throwing : {"furthest", "random", "weighted", "cell", "none"}
        "none" throws nothing (throw_ratio 0). If no token is thrown, masked tokens are in the order of "random"; their
        order has no effect then.
    furthest_from : {"visible", "none"}
    stages : int
    reconstruction : {"kernel", "interpolate", "conv", "none"}
        "none": thrown tokens are neither rebuilt nor supervised.
    thrown_weight : float
        Weight of a thrown token in the loss; a decoded one has 1.
    low_pass : float, optional
        Radius, in periods per image, of the low-pass filter on the patches that tokens predict.
    thrown_target : {"cells", "patch"}
        What a thrown token predicts: the means of the cells of its patch, or its pixels.
    cells : int, optional
        Cells of a patch along each axis; by default 2, or 1 along a side of odd length.
    cell_norm : {"image", "window", "none"}
        What cells are normalised over: the image, the patch and those next to it, or nothing.
    extra_cells : {"none", "decoded", "known"}
        Which other tokens also predict cells: none, the decoded ones, or those and the visible ones.
    extra_cells_weight : float
        Weight of the cells of such a token in the loss.
    norm_pix : bool
        Normalise target patches by their own statistics.
    mean, std : numbers per channel
        Defaults: ImageNet's for three channels, else 0.5.
    visible : int (batch, V), optional
        The visible tokens; by default those of lowest noise.
    draw_weights : float (batch, N), optional
        Token weights for ``throwing="weighted"``.

    Returns
    -------
    PixelOutput
    """
    check_reconstruction(reconstruction)
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    thrown_ratio = 0.0 if throwing == "none" else throw_ratio
    rule = rounding_rule(rounding, "mae_float")
    counts = count_tokens(grid.num_tokens(shape), mask_ratio, thrown_ratio, rule)
    if counts.thrown == 0:
        throwing = "random"

    targets = Targets(patch_size, norm_pix, reconstruction != "none", thrown_target, cells, cell_norm, extra_cells)
    orders, found = [], []
    for number, image in enumerate(images):
        order = make_order(
            shape,
            counts,
            noise[number].tolist(),
            throwing=throwing,
            furthest_from=furthest_from,
            visible=None if visible is None else np.asarray(visible)[number].tolist(),
            weights=None if draw_weights is None else np.asarray(draw_weights)[number].tolist(),
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
            decoder_heads=decoder_heads,
            stages=stages,
            reconstruction=reconstruction,
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
                head="decoder.pred",
                error=squared_error,
            )
        )
        orders.append(order)
    return pixel_output(found, orders, thrown_weight=thrown_weight, extra_cells_weight=extra_cells_weight)

"""PR-MIM on MAE: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens, rounding_rule
from prmim_reference.cross_decoder import cross_decode
from prmim_reference.fusion import fuse
from prmim_reference.masking import block_visible, unattended_visible, unit_shape
from prmim_reference.method import (
    PixelOutput,
    Targets,
    as_weights,
    check_reconstruction,
    encode_tokens,
    encoder_input,
    encoder_scales,
    encoder_states,
    image_patches,
    pixel_output,
    rebuild,
    supervise,
)
from prmim_reference.method import attention as attention  # re-exported: shared by all methods
from prmim_reference.method import encode as encode  # re-exported: shared by all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape
from prmim_reference.vit import Weights, linear, norm, transformer

Array = NDArray[np.float64]


def decode_tokens(
    encoded: Array, visible: Sequence[int], decoded: Sequence[int], weights: Weights, num_heads: int
) -> Array:
    """Decode visible and decoded tokens: (V + M, dim), without class tokens."""
    table = weights["decoder.pos_embed"][0]
    embedded = linear(encoded, weights, "decoder.embed")
    class_tokens = len(embedded) - len(visible)
    sequence = [embedded[place] + table[place] for place in range(class_tokens)]
    for place, token in enumerate(visible, start=class_tokens):
        sequence.append(embedded[place] + table[class_tokens + token])
    for token in decoded:
        sequence.append(weights["decoder.mask_token"][0, 0] + table[class_tokens + token])
    return transformer(np.array(sequence), weights, "decoder", num_heads)[class_tokens:]


def image_features(
    patches: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    *,
    num_heads: int,
    decoder_heads: int,
    decoder: str,
    stages: int,
    reconstruction: str,
    fusion: str,
    scales: Array | None,
    repeated: Sequence[int] = (),
) -> Array:
    """Return the inputs of the heads for one image, in plan order.

    Shape (V + M, dim), or (N, dim) with reconstruction.

    The visible tokens in `repeated` pass through the decoder again, as mask tokens.
    """
    visible = order[: counts.visible]
    decoded = order[counts.visible : counts.visible + counts.decoded]
    if decoder == "cross":
        start, _ = encoder_input(patches, visible, shape, weights)
        layers = [start, *encoder_states(patches, visible, shape, weights, num_heads, scales=scales)]
        features = cross_decode(layers, visible, decoded, weights, decoder_heads)
    else:
        if fusion == "mff":
            states = encoder_states(patches, visible, shape, weights, num_heads, scales=scales)
            encoded = norm(fuse(states, weights), weights, "encoder.norm")
        else:
            encoded = encode_tokens(patches, visible, shape, weights, num_heads, scales=scales)
        features = decode_tokens(encoded, visible, [*decoded, *repeated], weights, decoder_heads)
        features = features[: counts.visible + counts.decoded]
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
    fusion: str = "none",
    norm_pix: bool = True,
    decoder: str = "self",
    mask_unit: int = 1,
    drop_path: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    visible: ArrayLike | None = None,
    draw_weights: ArrayLike | None = None,
    counts: TokenCounts | None = None,
    repeated: Sequence[Sequence[int]] | None = None,
    wanted: Sequence[Array] | None = None,
) -> PixelOutput:
    """Compute the loss and the predictions of a batch.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file. Position tables are not recomputed. The rows of
        ``encoder.cls_token`` determine the number of class tokens.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    num_heads, decoder_heads : int
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
    fusion : {"none", "mff"}
        Input of the decoder: the output of the encoder's last block, or a learned mean of several (`fusion.fuse`).
    norm_pix : bool
        Normalize target patches by their own statistics.
    decoder : {"self", "cross"}
        Context of decoder blocks: visible and decoded tokens, or mixes of the encoder's layers.
    mask_unit : int
        Tokens per masked unit along each axis; divides the grid.
    drop_path : float
        Rate of the encoder's last block in training; 0 is evaluation.
    mean, std : numbers per channel
        Defaults: ImageNet's for three channels, else 0.5.
    visible : int (batch, V), optional
        The visible tokens; by default, the units of lowest noise.
    draw_weights : float (batch, N), optional
        Token weights for ``throwing="weighted"``. They also draw the visible units, unless these are given: units drawn
        last are visible.
    counts : TokenCounts, optional
        The counts; by default, from the ratios.
    repeated : for each image, visible tokens that are decoded again, without a loss; optional
    wanted : for each image, the patches (N, patch_dim) that tokens predict, already normalized; optional

    Returns
    -------
    PixelOutput
    """
    check_reconstruction(reconstruction)
    if decoder not in ("self", "cross"):
        raise ValueError(f'decoder: expected "self" or "cross", got {decoder!r}')
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    thrown_ratio = 0.0 if throwing == "none" else throw_ratio
    rule = rounding_rule(rounding, "mae_float")
    unit = unit_shape(shape, mask_unit)
    tokens = grid.num_tokens(unit)
    if counts is None:
        counts = count_tokens(grid.num_tokens(shape), mask_ratio, thrown_ratio, rule, mask_unit=tokens)
    num_units = counts.visible // tokens
    if visible is None and throwing == "weighted":
        if draw_weights is None:
            raise ValueError('draw_weights: expected token weights for throwing="weighted", got None')
        drawn = zip(noise.tolist(), np.asarray(draw_weights).tolist(), strict=True)
        visible = [unattended_visible(shape, unit, num_units, *image) for image in drawn]
    elif visible is None:
        visible = [block_visible(shape, unit, num_units, drawn) for drawn in noise.tolist()]
    if counts.thrown == 0:
        throwing = "random"

    norm_pix = norm_pix and wanted is None
    targets = Targets(patch_size, norm_pix, reconstruction != "none", thrown_target, cells, cell_norm, extra_cells)
    orders, found = [], []
    for number, image in enumerate(images):
        order = make_order(
            shape,
            counts,
            noise[number].tolist(),
            throwing=throwing,
            furthest_from=furthest_from,
            visible=np.asarray(visible)[number].tolist(),
            weights=None if draw_weights is None else np.asarray(draw_weights)[number].tolist(),
        )
        patches = image_patches(image, patch_size, mean, std)
        wanted_patches = image_patches(image, patch_size, mean, std, low_pass) if wanted is None else wanted[number]
        features = image_features(
            patches,
            order,
            counts,
            shape,
            weights,
            num_heads=num_heads,
            decoder_heads=decoder_heads,
            decoder=decoder,
            stages=stages,
            reconstruction=reconstruction,
            fusion=fusion,
            scales=encoder_scales(noise[number].tolist(), weights, drop_path),
            repeated=() if repeated is None else repeated[number],
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

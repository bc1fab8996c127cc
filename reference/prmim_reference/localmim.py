"""PR-MIM on LocalMIM: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import count_tokens, rounding_rule
from prmim_reference.hog import hog
from prmim_reference.mae import squared_error
from prmim_reference.method import (
    as_weights,
    check_reconstruction,
    encoder_states,
    image_patches,
    mean_or_zero,
    rebuild,
)
from prmim_reference.method import encode as encode  # re-exported: shared by all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import cell_targets, grid_shape
from prmim_reference.vit import Weights, gelu, linear, norm, transformer

Array = NDArray[np.float64]


def part(weights: Weights, name: str) -> dict[str, Array]:
    """Return the weights under the prefix `name`, without this prefix and its dot."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def decode(encoded: Array, visible: Sequence[int], decoded: Sequence[int], weights: Weights, num_heads: int) -> Array:
    """Decode visible and decoded tokens of one scale: (V + M, dim), no class token."""
    table = weights["pos_embed"][0]
    embedded = linear(encoded, weights, "embed")
    sequence = [embedded[0] + table[0]]
    for place, token in enumerate(visible, start=1):
        sequence.append(embedded[place] + table[1 + token])
    for token in decoded:
        sequence.append(weights["mask_token"][0, 0] + table[1 + token])
    # The blocks and the norm have no prefix, so one is added.
    named = {f"decoder.{key}": value for key, value in weights.items()}
    return transformer(np.array(sequence), named, "decoder", num_heads)[1:]


def predict_cells(feature: Array, weights: Weights, axes: int) -> dict[tuple[int, ...], Array]:
    """Return the predicted values of a token's cells, by position in the token.

    Each layer under ``up`` halves a cell along each axis. A layer norm and a GELU precede all but the first. The layer
    ``pred`` predicts the values of a cell.
    """
    cells = {(0,) * axes: feature}
    number = 0
    while f"up.{number}.weight" in weights:
        finer = {}
        for place, value in cells.items():
            row = value[None]
            if number > 0:
                row = gelu(norm(row, weights, f"norms.{number - 1}"))
            halves = linear(row, weights, f"up.{number}")[0].reshape(2**axes, -1)
            for half, offset in zip(halves, grid.positions((2,) * axes), strict=True):
                finer[tuple(2 * p + o for p, o in zip(place, offset, strict=True))] = half
        cells, number = finer, number + 1
    return {place: linear(value[None], weights, "pred")[0] for place, value in cells.items()}


def unit_of(token: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the place of a token's unit, of 2 tokens along each axis.

    Examples
    --------
    >>> unit_of(6, (4, 4))
    (0, 1)
    """
    return tuple(place // 2 for place in grid.positions(shape)[token])


def scale_predictions(
    features: Array,
    order: Sequence[int],
    supervised: Sequence[int],
    scale: float,
    weights: Weights,
    shape: Sequence[int],
) -> list[Array]:
    """Return the prediction of each supervised token at one scale.

    At a scale below 1, it is the prediction of the token's unit. The feature of a unit is the mean of the available
    features of its tokens.

    Parameters
    ----------
    features : array (n, dim)
        Features of the first n tokens of `order`.
    order, supervised : raster numbers
    scale : float
    weights : the head of the scale
    shape : the grid
    """
    known = order[: len(features)]
    predictions = []
    for token in supervised:
        if scale < 1:
            same = [row for row, other in enumerate(known) if unit_of(other, shape) == unit_of(token, shape)]
            feature = np.array([features[row] for row in same]).sum(axis=0) / len(same)
        else:
            feature = features[known.index(token)]
        cells = predict_cells(feature, weights, len(shape))
        predictions.append(np.concatenate([cells[place] for place in sorted(cells)]))
    return predictions


def hog_targets(
    image: Array, supervised: Sequence[int], scale: float, patch_size: Sequence[int], shape: Sequence[int], bins: int
) -> list[Array]:
    """Return the histograms of each supervised token's cells, or of its larger cell."""
    cells = hog(image, [int(side / scale) for side in patch_size], bins)
    side = max(int(scale), 1)
    wanted = []
    for token in supervised:
        if scale < 1:
            wanted.append(cells[unit_of(token, shape)])
            continue
        row, column = grid.positions(shape)[token]
        inside = [cells[side * row + i, side * column + j] for i in range(side) for j in range(side)]
        wanted.append(np.concatenate(inside))
    return wanted


def pixel_targets(
    patches: Array, supervised: Sequence[int], scale: float, patch_size: Sequence[int], shape: Sequence[int]
) -> list[Array]:
    """Return the means of each supervised token's cells, or of its larger cell."""
    side = max(int(scale), 1)
    every = cell_targets(patches, range(len(patches)), patch_size, shape, (side,) * len(shape), "image")
    if scale >= 1:
        return [every[token] for token in supervised]
    wanted = []
    for token in supervised:
        same = [every[other] for other in range(len(patches)) if unit_of(other, shape) == unit_of(token, shape)]
        wanted.append(np.array(same).sum(axis=0) / len(same))
    return wanted


@dataclass(frozen=True)
class LocalOutput:
    """Output of a forward pass.

    Attributes
    ----------
    loss : float
        The training loss.
    loss_decoded, loss_thrown : float
        Mean unweighted error of the decoded and of the thrown tokens, a sum over the scales; 0 if there are none.
    predicted : float64 (batch, supervised, values)
        Predictions of all scales, in plan order.
    order : int64 (batch, N)
        The plan.
    """

    loss: float
    loss_decoded: float
    loss_thrown: float
    predicted: Array
    order: NDArray[np.int64]


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    decoder_heads: int,
    scales: Sequence[float],
    layers: Sequence[int],
    target: str = "hog",
    bins: int = 9,
    mask_ratio: float = 0.75,
    throw_ratio: float = 0.5,
    rounding: str = "exact",
    throwing: str = "furthest",
    furthest_from: str = "visible",
    stages: int = 2,
    reconstruction: str = "kernel",
    thrown_weight: float = 1.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LocalOutput:
    """Compute the loss and the predictions of a batch.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file. Position tables are not recomputed.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    num_heads, decoder_heads : int
    scales : numbers
        Cells along each side of a token, for each decoder.
    layers : int
        The encoder block that each decoder reads, counted from 1.
    target : {"hog", "pixels"}
        Target of a cell: a histogram of oriented gradients, or the mean of its pixels.
    bins : int
        Bins of a histogram.
    mask_ratio, throw_ratio : float
        Fractions of all tokens.
    rounding, throwing, furthest_from, stages, reconstruction, thrown_weight, mean, std
        As in `mae.forward`.

    Returns
    -------
    LocalOutput

    Notes
    -----
    The published loss weights the cells of each scale by the resampled mask: the weight of a cell of 2 x 2 tokens is
    the masked share of these tokens. So each masked token counts the error of its cell once.
    """
    check_reconstruction(reconstruction)
    if target not in ("hog", "pixels"):
        raise ValueError(f'target: expected "hog" or "pixels", got {target!r}')
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    counts = count_tokens(grid.num_tokens(shape), mask_ratio, throw_ratio, rounding_rule(rounding, "mae_float"))
    if counts.thrown == 0:
        throwing = "random"
    num_known = counts.visible + counts.decoded

    orders, predictions = [], []
    decoded_errors: list[float] = []
    thrown_errors: list[float] = []
    for number, image in enumerate(images):
        order = make_order(shape, counts, noise[number].tolist(), throwing=throwing, furthest_from=furthest_from)
        supervised = order[counts.visible :] if reconstruction != "none" else order[counts.visible : num_known]
        patches = image_patches(image, patch_size, mean, std)
        states = encoder_states(patches, order[: counts.visible], shape, weights, num_heads)
        errors = [0.0] * len(supervised)
        predicted: list[list[Array]] = []
        for decoder, (scale, layer) in enumerate(zip(scales, layers, strict=True)):
            own = "encoder.norm" if decoder == len(scales) - 1 else f"norms.{decoder}"
            encoded = norm(states[layer - 1], weights, own)
            features = decode(
                encoded,
                order[: counts.visible],
                order[counts.visible : num_known],
                part(weights, f"decoders.{decoder}"),
                decoder_heads,
            )
            if counts.thrown > 0:
                stage_weights = {f"reconstruct.{key}": w for key, w in part(weights, f"reconstruct.{decoder}").items()}
                features = rebuild(
                    features, order, counts, shape, stage_weights, stages=stages, reconstruction=reconstruction
                )
            head = part(weights, f"heads.{decoder}")
            found = scale_predictions(features, order, supervised, scale, head, shape)
            if target == "hog":
                # Histograms of normalized pixels would be equal, but with rounding errors.
                wanted = hog_targets(image.astype(np.float64), supervised, scale, patch_size, shape, bins)
            else:
                wanted = pixel_targets(patches, supervised, scale, patch_size, shape)
            for place in range(len(supervised)):
                errors[place] += squared_error(found[place], wanted[place])
            predicted.append(found)
        decoded_errors += errors[: counts.decoded]
        thrown_errors += errors[counts.decoded :]
        predictions.append([np.concatenate(of_token) for of_token in zip(*predicted, strict=True)])
        orders.append(order)
    total = sum(decoded_errors) + thrown_weight * sum(thrown_errors)
    return LocalOutput(
        loss=mean_or_zero(total, len(decoded_errors) + thrown_weight * len(thrown_errors)),
        loss_decoded=mean_or_zero(sum(decoded_errors), len(decoded_errors)),
        loss_thrown=mean_or_zero(sum(thrown_errors), len(thrown_errors)),
        predicted=np.array(predictions),
        order=np.array(orders, np.int64),
    )

"""PR-MIM on MAE: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens
from prmim_reference.method import as_weights, check_reconstruction, encode_tokens, image_patches, mean_or_zero, rebuild
from prmim_reference.method import encode as encode  # re-exported: the same for all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape, normalize_patches
from prmim_reference.vit import Weights, linear, transformer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MAEOutput:
    """Output of a forward pass.

    Attributes
    ----------
    loss : float
        The training loss.
    loss_decoded, loss_thrown : float
        Mean unweighted loss of the decoded and of the thrown tokens; 0 if there are none.
    predicted : float64 (batch, supervised, patch_dim)
        Predictions for the supervised tokens, in plan order: decoded, then thrown (unless reconstruction is "none").
    order : int64 (batch, N)
        The plan.
    """

    loss: float
    loss_decoded: float
    loss_thrown: float
    predicted: Array
    order: NDArray[np.int64]


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


def predict_image(
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
    """Predict the supervised tokens of one image, in plan order."""
    visible = order[: counts.visible]
    decoded = order[counts.visible : counts.visible + counts.decoded]
    encoded = encode_tokens(patches, visible, shape, weights, num_heads)
    features = decode_tokens(encoded, visible, decoded, weights, decoder_heads)
    features = rebuild(features, order, counts, shape, weights, stages=stages, reconstruction=reconstruction)
    return linear(features[counts.visible :], weights, "decoder.pred")


def token_losses(predicted: Array, target: Array) -> list[float]:
    """Return the mean squared error of every token."""
    return [float(((p - t) ** 2).sum() / p.size) for p, t in zip(predicted, target, strict=True)]


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
    throwing: str = "furthest",
    furthest_from: str = "visible",
    stages: int = 2,
    reconstruction: str = "kernel",
    thrown_weight: float = 1.0,
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    visible: ArrayLike | None = None,
    draw_weights: ArrayLike | None = None,
) -> MAEOutput:
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
    throwing : {"furthest", "random", "weighted", "cell", "none"}
        "none" throws nothing (throw_ratio 0). If no token is thrown, masked tokens are in the order of "random"; their
        order has no effect then.
    furthest_from : {"visible", "none"}
    stages : int
    reconstruction : {"kernel", "interpolate", "conv", "none"}
        "none": thrown tokens are neither rebuilt nor supervised.
    thrown_weight : float
        Weight of a thrown token in the loss; a decoded one has 1.
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
    MAEOutput
    """
    check_reconstruction(reconstruction)
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    counts = count_tokens(grid.num_tokens(shape), mask_ratio, 0.0 if throwing == "none" else throw_ratio)
    if counts.thrown == 0:
        throwing = "random"

    orders, predictions = [], []
    decoded_losses: list[float] = []
    thrown_losses: list[float] = []
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
        predicted = predict_image(
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
        supervised = order[counts.visible : counts.visible + len(predicted)]
        target = patches[supervised]
        if norm_pix:
            target = normalize_patches(target, 1e-6)
        losses = token_losses(predicted, target)
        decoded_losses.extend(losses[: counts.decoded])
        thrown_losses.extend(losses[counts.decoded :])
        orders.append(order)
        predictions.append(predicted)

    return MAEOutput(
        loss=mean_or_zero(
            sum(decoded_losses) + thrown_weight * sum(thrown_losses),
            len(decoded_losses) + thrown_weight * len(thrown_losses),
        ),
        loss_decoded=mean_or_zero(sum(decoded_losses), len(decoded_losses)),
        loss_thrown=mean_or_zero(sum(thrown_losses), len(thrown_losses)),
        predicted=np.array(predictions),
        order=np.array(orders, np.int64),
    )

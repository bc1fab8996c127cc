"""PR-MIM on SimMIM: the complete forward pass in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens
from prmim_reference.masking import block_visible
from prmim_reference.method import (
    as_weights,
    check_variant,
    encode_tokens,
    encoder_scales,
    image_patches,
    mean_or_zero,
    rebuild,
)
from prmim_reference.method import encode as encode  # of whole images, the same for all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape
from prmim_reference.vit import Weights, linear

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SimMIMOutput:
    """What the forward pass of a batch gives.

    Attributes
    ----------
    loss : float
        The training loss.
    loss_decoded, loss_thrown : float
        Mean absolute error of the decoded and of the thrown tokens alone, before any weighting; 0 where there are none.
    predicted : float64 (batch, supervised, patch_dim)
        Predictions for the supervised tokens, in plan order: decoded, then (unless the variant is "none") thrown.
    order : int64 (batch, N)
        The plan.
    """

    loss: float
    loss_decoded: float
    loss_thrown: float
    predicted: Array
    order: NDArray[np.int64]


def unit_shape(shape: Sequence[int], mask_unit: int) -> tuple[int, ...]:
    """Return the tokens of a unit along each axis of the grid: as many along each.

    Examples
    --------
    >>> unit_shape((14, 14), 2)
    (2, 2)
    """
    if mask_unit < 1 or any(length % mask_unit for length in shape):
        raise ValueError(f"mask_unit: expected a divisor of the grid {'x'.join(map(str, shape))}, got {mask_unit}")
    return (mask_unit,) * len(shape)


def unit_counts(
    shape: Sequence[int], unit: Sequence[int], mask_ratio: float, throw_ratio: float, throw_by: str
) -> TokenCounts:
    """Return the counts where whole units are masked, and single tokens or whole units thrown.

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
        mask_unit=tokens,
        throw_unit=tokens if throw_by == "unit" else 1,
    )


def predict_image(
    patches: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    *,
    num_heads: int,
    stages: int,
    variant: str,
    scales: Array | None,
) -> Array:
    """Return the predictions for the supervised tokens of one image, in plan order.

    There is no decoder: the encoder sees the visible patches and a mask token for every decoded one, the thrown never
    enter it, and one linear layer turns features into pixels.
    """
    visible = order[: counts.visible]
    decoded = order[counts.visible : counts.visible + counts.decoded]
    encoded = encode_tokens(patches, visible, shape, weights, num_heads, mask_tokens=decoded, scales=scales)
    features = rebuild(encoded[1:], order, counts, shape, weights, stages=stages, variant=variant)
    return linear(features[counts.visible :], weights, "head")


def token_errors(predicted: Array, target: Array) -> list[float]:
    """Return the absolute error of every token, summed over its patch vector."""
    return [float(np.abs(p - t).sum()) for p, t in zip(predicted, target, strict=True)]


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    mask_ratio: float = 0.6,
    throw_ratio: float = 0.25,
    throwing: str = "furthest",
    seed: str = "visible",
    stages: int = 2,
    variant: str = "kernel",
    thrown_weight: float = 1.0,
    mask_unit: int = 2,
    throw_by: str = "token",
    drop_path: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SimMIMOutput:
    """Return the loss and the predictions of a batch.

    The target are the pixels, normalised per channel and not per patch. The loss is the sum of the supervised tokens'
    absolute errors, a thrown token's times ``thrown_weight``, divided by the number of their pixels (weighted alike,
    plus 1e-5) and by the number of channels.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or the ``.safetensors`` file. Whether positions are absolute or relative, and
        whether there is LayerScale, is told by what they hold.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    patch_size : pixels of a patch along each axis
    num_heads : int
    mask_ratio, throw_ratio : float
        Fractions of all tokens.
    throwing : {"furthest", "random", "cell", "none"}
        "none" throws nothing (throw_ratio 0). Wherever nothing is thrown the masked tokens come one by one in the order
        of "random", since their order has no influence then.
    seed : {"visible", "none"}
    stages : int
    variant : {"kernel", "interpolate", "conv", "none"}
        "none": thrown tokens are neither rebuilt nor supervised.
    thrown_weight : float
        Weight of a thrown token in the loss; a decoded one has 1.
    mask_unit : int
        Tokens along each axis of what is masked as a whole; divides the grid.
    throw_by : {"token", "unit"}
        Whether single tokens or whole units are thrown.
    drop_path : float
        Rate of the last block in training; 0 is evaluation.
    mean, std : numbers per channel
        ImageNet's by default for three channels, else 0.5.

    Returns
    -------
    SimMIMOutput

    Raises
    ------
    ValueError
        If a name is unknown, the unit does not divide the grid, or the weights tell no position or two.

    References
    ----------
    Z. Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886.
    """
    check_variant(variant)
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    unit = unit_shape(shape, mask_unit)
    counts = unit_counts(shape, unit, mask_ratio, 0.0 if throwing == "none" else throw_ratio, throw_by)
    if counts.thrown == 0:
        throwing, throw_by = "random", "token"

    orders, predictions = [], []
    decoded_errors: list[float] = []
    thrown_errors: list[float] = []
    for number, image in enumerate(images):
        image_noise = noise[number].tolist()
        order = make_order(
            shape,
            counts,
            image_noise,
            throwing=throwing,
            seed=seed,
            visible=block_visible(image_noise, shape, unit, counts.visible // grid.num_tokens(unit)),
            unit=unit if throw_by == "unit" else None,
        )
        patches = image_patches(image, patch_size, mean, std)
        predicted = predict_image(
            patches,
            order,
            counts,
            shape,
            weights,
            num_heads=num_heads,
            stages=stages,
            variant=variant,
            scales=encoder_scales(image_noise, weights, drop_path),
        )
        errors = token_errors(predicted, patches[order[counts.visible : counts.visible + len(predicted)]])
        decoded_errors.extend(errors[: counts.decoded])
        thrown_errors.extend(errors[counts.decoded :])
        orders.append(order)
        predictions.append(predicted)

    pixels, channels = grid.num_tokens(patch_size), images.shape[-1]
    weighted_pixels = (len(decoded_errors) + thrown_weight * len(thrown_errors)) * pixels
    weighted_error = sum(decoded_errors) + thrown_weight * sum(thrown_errors)
    return SimMIMOutput(
        loss=weighted_error / (weighted_pixels + 1e-5) / channels,
        loss_decoded=mean_or_zero(sum(decoded_errors), len(decoded_errors) * pixels * channels),
        loss_thrown=mean_or_zero(sum(thrown_errors), len(thrown_errors) * pixels * channels),
        predicted=np.array(predictions),
        order=np.array(orders, np.int64),
    )

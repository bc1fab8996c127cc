"""PR-MIM on MaskAlign: the student's forward pass and the loss in float64.

The outputs of the teacher for whole images are an argument.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference import grid
from prmim_reference.counts import TokenCounts, count_tokens, rounding_rule
from prmim_reference.masking import random_visible, weighted_visible
from prmim_reference.method import (
    as_weights,
    check_reconstruction,
    encoder_scales,
    encoder_states,
    image_patches,
    mean_or_zero,
    rebuild,
)
from prmim_reference.method import encode as encode  # re-exported: shared by all methods
from prmim_reference.schedule import make_order
from prmim_reference.targets import grid_shape
from prmim_reference.vit import Weights, attention_maps, layer_norm, linear

Array = NDArray[np.float64]

WHITENING_EPS = 1e-5


@dataclass(frozen=True)
class MaskAlignOutput:
    """Output of a forward pass.

    Attributes
    ----------
    loss : float
        The training loss.
    loss_visible : float
        Mean loss of the class token and the visible tokens.
    loss_thrown : float
        Mean unweighted loss of the thrown tokens; 0 if none are supervised.
    predicted : float64 (k, batch, 1 + supervised, teacher_dim)
        Predictions for every aligned layer of the teacher: class token, visible tokens, then thrown tokens (unless the
        reconstruction is "none" or their weight 0), in plan order.
    target : float64 (k, batch, 1 + supervised, teacher_dim)
        Targets: the whitened outputs of the teacher.
    order : int64 (batch, N)
        The plan.
    """

    loss: float
    loss_visible: float
    loss_thrown: float
    predicted: Array
    target: Array
    order: NDArray[np.int64]


def cls_attention(x: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Return the class token's attention to every patch, averaged over heads.

    Parameters
    ----------
    x : array (1 + N, dim)
        Input of the attention layer (after the norm), class token first.
    weights, name : the layer ``{name}.qkv``
    num_heads : int

    Returns
    -------
    array (N,)
        The sum is below 1, because the class token's attention to itself is left out.
    """
    shares = np.zeros(len(x) - 1)
    for looks_at in attention_maps(x, weights, name, num_heads):
        shares += looks_at[0, 1:] / num_heads
    return shares


def initial_fusion(fusion: str, teacher_layers: int, teacher_depth: int, student_depth: int) -> Array:
    """Return the initial weights of student layers for each aligned teacher layer.

    Parameters
    ----------
    fusion : {"linear", "sum"}
        "linear": the identity plus 0.01, for equal depths only. "sum": 1 / depth everywhere.
    teacher_layers : int
        Number of aligned layers, the last ones of the teacher.
    teacher_depth, student_depth : int

    Returns
    -------
    array (teacher_layers, student_depth)

    Examples
    --------
    >>> initial_fusion("linear", 2, 3, 3)
    array([[0.01, 1.01, 0.01],
           [0.01, 0.01, 1.01]])
    >>> initial_fusion("sum", 1, 12, 4)
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    if not 1 <= teacher_layers <= teacher_depth:
        raise ValueError(f"teacher_layers: expected 1 to {teacher_depth}, the teacher's depth, got {teacher_layers}")
    if fusion == "sum":
        return np.full((teacher_layers, student_depth), 1 / student_depth)
    if fusion != "linear":
        raise ValueError(f'fusion: expected "linear" or "sum", got {fusion!r}')
    if teacher_depth != student_depth:
        raise ValueError(
            f'fusion: expected "sum" where depths differ, got "linear" for {teacher_depth} layers of the teacher and '
            f"{student_depth} of the student"
        )
    matrix = np.full((teacher_depth, student_depth), 0.01)
    for layer in range(teacher_depth):
        matrix[layer, layer] += 1
    return matrix[teacher_depth - teacher_layers :]


def fuse(states: Sequence[Array], fusion: Array) -> list[Array]:
    """Return the sum of student layers weighted by each row of the fusion matrix."""
    if fusion.shape[1] != len(states):
        raise ValueError(f"fusion: expected a column for each of {len(states)} blocks, got {fusion.shape[1]}")
    fused = []
    for row in fusion:
        mixed = np.zeros_like(states[0])
        for share, state in zip(row, states, strict=True):
            mixed += share * state
        fused.append(mixed)
    return fused


def whiten(x: Array) -> Array:
    """Apply a layer norm (eps 1e-5) without weight and bias."""
    return layer_norm(x, eps=WHITENING_EPS)


def smooth_l1(difference: float) -> float:
    """Return half the square of a difference up to 1, else the absolute value - 1/2.

    Examples
    --------
    >>> [smooth_l1(difference) for difference in (0.5, -1.0, -3.0)]
    [0.125, 0.5, 2.5]
    """
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def token_losses(predicted: Array, target: Array) -> list[float]:
    """Return twice the smooth L1 distance of every token, mean over its channels."""
    losses = []
    for p, t in zip(predicted, target, strict=True):
        losses.append(sum(2 * smooth_l1(float(difference)) for difference in p - t) / p.size)
    return losses


def predict_image(
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
) -> list[Array]:
    """Predict every aligned layer of one image: class token, then plan order.

    The student encodes visible tokens only. Thrown tokens of each fused layer are reconstructed with shared weights.
    """
    states = encoder_states(patches, order[: counts.visible], shape, weights, num_heads, scales=scales)
    predictions = []
    for layer, fused in enumerate(fuse(states, weights["fusion"])):
        features = rebuild(fused[1:], order, counts, shape, weights, stages=stages, reconstruction=reconstruction)
        predictions.append(linear(np.concatenate([fused[:1], features]), weights, f"heads.{layer}"))
    return predictions


def choose_visible(
    masking: str, noise: Sequence[int], attention: Sequence[float] | None, num_visible: int
) -> list[int]:
    """Return the visible tokens of one image.

    "attention": drawn without replacement in proportion to the teacher's attention. "random": the tokens of lowest
    noise.
    """
    if masking == "random":
        return random_visible(num_visible, noise)
    if masking != "attention":
        raise ValueError(f'masking: expected "attention" or "random", got {masking!r}')
    if attention is None:
        raise ValueError('teacher_attention: expected one number per token for masking="attention", got None')
    return weighted_visible(num_visible, noise, attention)


def forward(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    noise: ArrayLike,
    *,
    teacher_hidden: ArrayLike,
    teacher_attention: ArrayLike | None = None,
    patch_size: Sequence[int],
    num_heads: int,
    mask_ratio: float = 0.7,
    rounding: str = "exact",
    masking: str = "attention",
    stages: int = 2,
    reconstruction: str = "kernel",
    thrown_weight: float = 1.0,
    drop_path: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> MaskAlignOutput:
    """Compute the loss and the predictions of a batch.

    All masked tokens are thrown. Losses are means over aligned layers, batch, tokens and channels. The class token and
    visible tokens have weight 1 in the training loss.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or a ``.safetensors`` file.
    images : uint8 (batch, axes..., channels)
    noise : int (batch, N)
    teacher_hidden : float (k, batch, 1 + N, teacher_dim)
        Outputs of the teacher's last k blocks for whole images, before any final norm: class token, then all tokens in
        raster order.
    teacher_attention : float (batch, N), optional
        `cls_attention` of the teacher's last block, for ``masking="attention"``.
    patch_size : pixels of a patch along each axis
    num_heads : int
    mask_ratio : float
    rounding : {"exact", "float"}
        Arithmetic that converts ratios to counts: exact, or that of the original code (`counts.count_tokens`).
    masking : {"attention", "random"}
    stages : int
    reconstruction : {"kernel", "interpolate", "conv", "none"}
        "none": thrown tokens are neither reconstructed nor supervised, which is the published MaskAlign.
    thrown_weight : float
        Weight of a thrown token in the loss; 0 is also the published MaskAlign.
    drop_path : float
        Rate of the last block in training; 0 is evaluation.
    mean, std : numbers per channel
        Defaults: ImageNet's for three channels, else 0.5.

    Returns
    -------
    MaskAlignOutput

    Raises
    ------
    ValueError
        If a name is unknown, or the teacher's outputs do not fit the images or weights.

    References
    ----------
    Xue et al., "Stare at What You See: Masked Image Modeling without Reconstruction", arXiv 2211.08887.
    """
    check_reconstruction(reconstruction)
    if thrown_weight == 0:
        reconstruction = "none"
    weights = as_weights(weights)
    images, noise = np.asarray(images), np.asarray(noise)
    shape = grid_shape(images.shape[1:-1], patch_size)
    counts = count_tokens(grid.num_tokens(shape), mask_ratio, 1.0, rounding_rule(rounding, "mae_float"))
    hidden, attention = teacher_outputs(teacher_hidden, teacher_attention, weights, len(images), counts.num_tokens)

    layers = len(hidden)
    orders = []
    predictions: list[list[Array]] = [[] for _ in range(layers)]
    targets: list[list[Array]] = [[] for _ in range(layers)]
    visible_losses: list[float] = []
    thrown_losses: list[float] = []
    for number, image in enumerate(images):
        image_noise = noise[number].tolist()
        looks_at = None if attention is None else attention[number].tolist()
        order = make_order(
            shape,
            counts,
            image_noise,
            throwing="random",  # no effect, since no token is decoded
            visible=choose_visible(masking, image_noise, looks_at, counts.visible),
        )
        predicted = predict_image(
            image_patches(image, patch_size, mean, std),
            order,
            counts,
            shape,
            weights,
            num_heads=num_heads,
            stages=stages,
            reconstruction=reconstruction,
            scales=encoder_scales(image_noise, weights, drop_path),
        )
        for layer in range(layers):
            rows = [0, *(1 + token for token in order)][: len(predicted[layer])]
            target = whiten(hidden[layer, number, rows])
            losses = token_losses(predicted[layer], target)
            visible_losses.extend(losses[: 1 + counts.visible])
            thrown_losses.extend(losses[1 + counts.visible :])
            predictions[layer].append(predicted[layer])
            targets[layer].append(target)
        orders.append(order)

    return MaskAlignOutput(
        loss=mean_or_zero(
            sum(visible_losses) + thrown_weight * sum(thrown_losses),
            len(visible_losses) + thrown_weight * len(thrown_losses),
        ),
        loss_visible=mean_or_zero(sum(visible_losses), len(visible_losses)),
        loss_thrown=mean_or_zero(sum(thrown_losses), len(thrown_losses)),
        predicted=np.array(predictions),
        target=np.array(targets),
        order=np.array(orders, np.int64),
    )


def teacher_outputs(
    teacher_hidden: ArrayLike, teacher_attention: ArrayLike | None, weights: Weights, batch: int, num_tokens: int
) -> tuple[Array, Array | None]:
    """Return the teacher's outputs as float64; ValueError if a shape does not fit."""
    hidden = np.asarray(teacher_hidden, np.float64)
    expected = (len(weights["fusion"]), batch, 1 + num_tokens, len(weights["heads.0.bias"]))
    if hidden.shape != expected:
        raise ValueError(f"teacher_hidden: expected shape {expected}, got {hidden.shape}")
    if teacher_attention is None:
        return hidden, None
    attention = np.asarray(teacher_attention, np.float64)
    if attention.shape != (batch, num_tokens):
        raise ValueError(f"teacher_attention: expected shape {(batch, num_tokens)}, got {attention.shape}")
    return hidden, attention

"""Parts shared by all methods: normalization, the encoder, and reconstruction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference.counts import TokenCounts
from prmim_reference.drop_path import drop_path_scales
from prmim_reference.masking import attention_weights
from prmim_reference.reconstruct import progressive_reconstruction
from prmim_reference.targets import cell_targets, grid_shape, low_pass, normalize_patches, patchify
from prmim_reference.vit import (
    Weights,
    attention_maps,
    depth,
    hidden_states,
    linear,
    norm,
    patch_embedding,
    relative_position_bias,
)

Array = NDArray[np.float64]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

POSITION_TABLE = "encoder.pos_embed"
RELATIVE_TABLE = "encoder.rel_pos_bias.relative_position_bias_table"


def as_weights(weights: Mapping[str, ArrayLike] | str | Path) -> dict[str, Array]:
    """Return weights as float64; a path is read as a ``.safetensors`` file."""
    if isinstance(weights, str | Path):
        from safetensors.numpy import load_file

        weights = load_file(weights)
    return {name: np.asarray(array, np.float64) for name, array in weights.items()}


def channel_statistics(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Array, Array]:
    """Return mean and deviation per channel.

    The defaults are ImageNet's for three channels, else 0.5.

    Examples
    --------
    >>> channel_statistics(1, None, None)
    (array([0.5]), array([0.5]))
    """
    if mean is None:
        mean = IMAGENET_MEAN if channels == 3 else (0.5,) * channels
    if std is None:
        std = IMAGENET_STD if channels == 3 else (0.5,) * channels
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one per channel, got {len(values)}")
    return np.array(mean, np.float64), np.array(std, np.float64)


def image_patches(
    image: Array,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    radius: float | None = None,
) -> Array:
    """Normalize an image (0 .. 255) per channel; cut it into patches (N, patch_dim).

    With a radius, high frequencies are removed first; see `targets.low_pass`.
    """
    channel_mean, channel_std = channel_statistics(image.shape[-1], mean, std)
    if radius is not None:
        image = low_pass(image, radius)
    return patchify((image / 255 - channel_mean) / channel_std, patch_size)


def encoder_input(
    patches: Array,
    tokens: Sequence[int],
    shape: Sequence[int],
    weights: Weights,
    *,
    mask_tokens: Sequence[int] = (),
) -> tuple[Array, Array | None]:
    """Return the first block's input (1 + n + m, dim), and any attention bias.

    Positions are absolute (``encoder.pos_embed``, added to the tokens) or relative (``encoder.rel_pos_bias``, a bias on
    attention scores), depending on the weights. The number of class tokens, C, is that of the rows of
    ``encoder.cls_token``, or 0 without it.

    Parameters
    ----------
    patches : array (N, patch_dim)
    tokens : n raster numbers of visible tokens
    shape : the grid
    weights : the layers under ``encoder``
    mask_tokens : m raster numbers of tokens that are replaced by ``encoder.mask_token``
    """
    if (POSITION_TABLE in weights) == (RELATIVE_TABLE in weights):
        raise ValueError(f"weights: expected either {POSITION_TABLE} or {RELATIVE_TABLE}, got both or neither")
    sequence = list(weights["encoder.cls_token"][0]) if "encoder.cls_token" in weights else []
    class_tokens = len(sequence)
    for token in tokens:
        sequence.append(patch_embedding(patches[token : token + 1], weights, "encoder.patch_embed.proj")[0])
    for _ in mask_tokens:
        sequence.append(weights["encoder.mask_token"][0, 0])
    seen = [*tokens, *mask_tokens]
    if POSITION_TABLE in weights:
        table, bias = weights[POSITION_TABLE][0], None
        rows = [*range(class_tokens), *(class_tokens + token for token in seen)]
        sequence = [x + table[row] for x, row in zip(sequence, rows, strict=True)]
    else:
        bias = relative_position_bias(seen, shape, weights[RELATIVE_TABLE])
    return np.array(sequence), bias


def encoder_states(
    patches: Array,
    tokens: Sequence[int],
    shape: Sequence[int],
    weights: Weights,
    num_heads: int,
    *,
    mask_tokens: Sequence[int] = (),
    scales: Sequence[Sequence[float]] | Array | None = None,
) -> list[Array]:
    """Run the encoder's blocks on some tokens of an image; see `encoder_input`.

    Parameters
    ----------
    patches, tokens, shape, weights, mask_tokens : see `encoder_input`
    num_heads : int
    scales : (depth, 2), optional
        See `vit.hidden_states`.

    Returns
    -------
    list of array (1 + n + m, dim), the class token first
        The output of every block, before the final norm.
    """
    x, bias = encoder_input(patches, tokens, shape, weights, mask_tokens=mask_tokens)
    return hidden_states(x, weights, "encoder", num_heads, bias, scales)


def encode_tokens(
    patches: Array,
    tokens: Sequence[int],
    shape: Sequence[int],
    weights: Weights,
    num_heads: int,
    *,
    mask_tokens: Sequence[int] = (),
    scales: Sequence[Sequence[float]] | Array | None = None,
) -> Array:
    """Encode tokens with the final norm: (C + n + m, dim); see `encoder_states`."""
    states = encoder_states(patches, tokens, shape, weights, num_heads, mask_tokens=mask_tokens, scales=scales)
    return norm(states[-1], weights, "encoder.norm")


def encoder_scales(noise: Sequence[int], weights: Weights, drop_path: float) -> Array | None:
    """Return the drop-path factors of one image; None for a rate of 0 (evaluation)."""
    if drop_path == 0:
        return None
    return np.array(drop_path_scales(depth(weights, "encoder"), drop_path, noise), np.float64)


def check_reconstruction(reconstruction: str) -> None:
    """Raise ValueError if the reconstruction is unknown."""
    if reconstruction not in ("kernel", "interpolate", "conv", "none"):
        raise ValueError(f'reconstruction: expected "kernel", "interpolate", "conv" or "none", got {reconstruction!r}')


def rebuild(
    features: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    *,
    stages: int,
    reconstruction: str,
) -> Array:
    """Reconstruct thrown tokens: (V + M, dim) -> (N, dim).

    The weights are those under ``reconstruct``.

    A no-op for the reconstruction "none".
    """
    if reconstruction == "none":
        return features
    own = {name.removeprefix("reconstruct."): w for name, w in weights.items() if name.startswith("reconstruct.")}
    return progressive_reconstruction(
        features, order, counts, shape, stages=stages, reconstruction=reconstruction, parameters=own
    )


def cells_of_patch(patch_size: Sequence[int], cells: int | None) -> tuple[int, ...]:
    """Return the cells of a patch along each axis.

    The default is 2, or 1 along a side of odd length.

    Examples
    --------
    >>> cells_of_patch((16, 3), None), cells_of_patch((16, 4), 4)
    ((2, 1), (4, 4))
    """
    return tuple((1 if side % 2 else 2) if cells is None else cells for side in patch_size)


@dataclass(frozen=True)
class Targets:
    """Targets of methods that predict pixels; the arguments of `forward`.

    Attributes
    ----------
    patch_size : pixels of a patch along each axis
    norm_pix : bool
        Normalize target patches by their own statistics.
    is_reconstructed : bool
        Whether thrown tokens are reconstructed.
    thrown_target : {"cells", "patch"}
    cells : int, optional
    cell_norm : {"image", "window", "none"}
    extra_cells : {"none", "decoded", "known"}
    """

    patch_size: Sequence[int]
    norm_pix: bool
    is_reconstructed: bool
    thrown_target: str
    cells: int | None
    cell_norm: str
    extra_cells: str


@dataclass(frozen=True)
class Supervised:
    """Predictions and errors of the supervised tokens of one image.

    Attributes
    ----------
    predicted : list of array (patch_dim,)
        Predicted patches, in plan order.
    predicted_cells : list of array (cell_dim,)
        Predicted cells, in plan order.
    decoded, thrown, extra : list of float
        The error of every decoded token, of every thrown token, and of the additional cells of other tokens.
    """

    predicted: list[Array]
    predicted_cells: list[Array]
    decoded: list[float]
    thrown: list[float]
    extra: list[float]


def supervise(
    features: Array,
    patches: Array,
    wanted_patches: Array,
    order: Sequence[int],
    counts: TokenCounts,
    shape: Sequence[int],
    weights: Weights,
    targets: Targets,
    *,
    head: str,
    error: Callable[[Array, Array], float],
) -> Supervised:
    """Predict the targets of one image's supervised tokens, and compute the errors.

    Parameters
    ----------
    features : array (V + M or N, dim)
        In plan order; with reconstruction, including thrown tokens.
    patches : array (N, patch_dim)
        The source of the cells.
    wanted_patches : array (N, patch_dim)
        The patches that tokens predict.
    order : the N raster numbers of the tokens, in plan order
    counts : the counts
    shape : the grid
    weights : with the layer `head`, and ``cell_head`` if a token predicts cells
    targets : what is predicted
    head : name of the layer that predicts patches
    error : maps prediction and target of a token to its error
    """
    if targets.thrown_target not in ("cells", "patch"):
        raise ValueError(f'thrown_target: expected "cells" or "patch", got {targets.thrown_target!r}')
    if targets.extra_cells not in ("none", "decoded", "known"):
        raise ValueError(f'extra_cells: expected "none", "decoded" or "known", got {targets.extra_cells!r}')
    cells = cells_of_patch(targets.patch_size, targets.cells)
    if targets.norm_pix:
        wanted_patches = normalize_patches(wanted_patches, 1e-6)
    found = Supervised([], [], [], [], [])
    for place, token in enumerate(order):
        is_visible, is_thrown = place < counts.visible, place >= counts.visible + counts.decoded
        if is_thrown and not targets.is_reconstructed:
            continue
        if not is_visible and (not is_thrown or targets.thrown_target == "patch"):
            predicted = linear(features[place : place + 1], weights, head)[0]
            found.predicted.append(predicted)
            (found.thrown if is_thrown else found.decoded).append(error(predicted, wanted_patches[token]))
        if is_thrown:
            has_cells = targets.thrown_target == "cells"
        elif is_visible:
            has_cells = targets.extra_cells == "known"
        else:
            has_cells = targets.extra_cells in ("known", "decoded")
        if has_cells:
            predicted = linear(features[place : place + 1], weights, "cell_head")[0]
            wanted = cell_targets(patches, [token], targets.patch_size, shape, cells, targets.cell_norm)[0]
            found.predicted_cells.append(predicted)
            (found.thrown if is_thrown else found.extra).append(error(predicted, wanted))
    return found


@dataclass(frozen=True)
class PixelOutput:
    """Output of a forward pass of a method that predicts pixels.

    Attributes
    ----------
    loss : float
        The training loss.
    loss_decoded, loss_thrown : float
        Mean unweighted error of the decoded and of the thrown tokens; 0 if there are none.
    loss_cells : float
        Mean unweighted error of the additional cells of other tokens; 0 if there are none.
    predicted : float64 (batch, n, patch_dim)
        Predicted patches, in plan order: decoded tokens, then thrown ones if they predict patches.
    predicted_cells : float64 (batch, n, cell_dim)
        Predicted cells, in plan order.
    order : int64 (batch, N)
        The plan.
    """

    loss: float
    loss_decoded: float
    loss_thrown: float
    loss_cells: float
    predicted: Array
    predicted_cells: Array
    order: NDArray[np.int64]


def pixel_output(
    found: Sequence[Supervised],
    orders: Sequence[Sequence[int]],
    *,
    thrown_weight: float,
    extra_cells_weight: float,
    eps: float = 0.0,
) -> PixelOutput:
    """Average the errors of a batch.

    The loss is the weighted sum of all errors, divided by the sum of the weights of the tokens: 1 for a decoded token,
    ``thrown_weight`` for a thrown one. Additional cells have the weight ``extra_cells_weight`` in the numerator only.
    ``eps`` is added to the denominator.
    """
    decoded = [error for image in found for error in image.decoded]
    thrown = [error for image in found for error in image.thrown]
    extra = [error for image in found for error in image.extra]
    total = sum(decoded) + thrown_weight * sum(thrown) + extra_cells_weight * sum(extra)
    return PixelOutput(
        loss=mean_or_zero(total, len(decoded) + thrown_weight * len(thrown) + eps),
        loss_decoded=mean_or_zero(sum(decoded), len(decoded)),
        loss_thrown=mean_or_zero(sum(thrown), len(thrown)),
        loss_cells=mean_or_zero(sum(extra), len(extra)),
        predicted=np.array([image.predicted for image in found]),
        predicted_cells=np.array([image.predicted_cells for image in found]),
        order=np.array(orders, np.int64),
    )


def mean_or_zero(total: float, weight: float) -> float:
    """Return total / weight, or 0 if the weight is 0."""
    return total / weight if weight else 0.0


def encode(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Array:
    """Encode unmasked images without drop path: float64 (batch, C + N, dim).

    The C class tokens come first.

    Parameters
    ----------
    weights : mapping of str to array, or a path
        The arrays of a saved method, or the ``.safetensors`` file.
    images : uint8 (batch, axes..., channels)
    patch_size : pixels of a patch along each axis
    num_heads : int
    mean, std : numbers per channel
        Defaults: ImageNet's for three channels, else 0.5.
    """
    weights, images = as_weights(weights), np.asarray(images)
    shape = grid_shape(images.shape[1:-1], patch_size)
    encoded = []
    for image in images:
        patches = image_patches(image, patch_size, mean, std)
        encoded.append(encode_tokens(patches, range(len(patches)), shape, weights, num_heads))
    return np.array(encoded)


def attention(
    weights: Mapping[str, ArrayLike] | str | Path,
    images: ArrayLike,
    *,
    patch_size: Sequence[int],
    num_heads: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Array:
    """Return the class token's attention in the last block: float64 (batch, N).

    Images are not masked.

    Min-max normalized per head and averaged (`masking.attention_weights`). The arguments are those of `encode`.
    """
    weights, images = as_weights(weights), np.asarray(images)
    shape = grid_shape(images.shape[1:-1], patch_size)
    found = []
    for image in images:
        patches = image_patches(image, patch_size, mean, std)
        x, bias = encoder_input(patches, range(len(patches)), shape, weights)
        last = depth(weights, "encoder") - 1
        x = [x, *hidden_states(x, weights, "encoder", num_heads, bias)][last]
        x = norm(x, weights, f"encoder.blocks.{last}.norm1")
        maps = attention_maps(x, weights, f"encoder.blocks.{last}.attn", num_heads, bias)
        found.append(attention_weights([head[0, 1:].tolist() for head in maps]))
    return np.array(found)

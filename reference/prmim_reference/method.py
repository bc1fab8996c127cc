"""Parts that all methods share: normalisation of pixels, the encoder, and reconstruction."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prmim_reference.counts import TokenCounts
from prmim_reference.drop_path import drop_path_scales
from prmim_reference.reconstruct import progressive_reconstruction
from prmim_reference.targets import grid_shape, patchify
from prmim_reference.vit import (
    Weights,
    depth,
    hidden_states,
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
    """Return mean and deviation per channel; the defaults are ImageNet's for three channels, else 0.5.

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
    image: Array, patch_size: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Array:
    """Normalise an image of values 0 .. 255 per channel and cut it into patches (N, patch_dim)."""
    channel_mean, channel_std = channel_statistics(image.shape[-1], mean, std)
    return patchify((image / 255 - channel_mean) / channel_std, patch_size)


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
    """Run the encoder's blocks on some tokens of an image.

    Positions are absolute (``encoder.pos_embed``, added to the tokens) or relative (``encoder.rel_pos_bias``, a bias on
    attention scores), depending on the weights.

    Parameters
    ----------
    patches : array (N, patch_dim)
    tokens : n raster numbers of visible tokens
    shape : the grid
    weights : the layers under ``encoder``
    num_heads : int
    mask_tokens : m raster numbers of tokens that are replaced by ``encoder.mask_token``
    scales : (depth, 2), optional
        See `vit.hidden_states`.

    Returns
    -------
    list of array (1 + n + m, dim), the class token first
        The output of every block, before the final norm.
    """
    if (POSITION_TABLE in weights) == (RELATIVE_TABLE in weights):
        raise ValueError(f"weights: expected either {POSITION_TABLE} or {RELATIVE_TABLE}, got both or neither")
    sequence = [weights["encoder.cls_token"][0, 0]]
    for token in tokens:
        sequence.append(patch_embedding(patches[token : token + 1], weights, "encoder.patch_embed.proj")[0])
    for _ in mask_tokens:
        sequence.append(weights["encoder.mask_token"][0, 0])
    seen = [*tokens, *mask_tokens]
    if POSITION_TABLE in weights:
        table, bias = weights[POSITION_TABLE][0], None
        sequence = [x + table[row] for x, row in zip(sequence, [0, *(1 + token for token in seen)], strict=True)]
    else:
        bias = relative_position_bias(seen, shape, weights[RELATIVE_TABLE])
    return hidden_states(np.array(sequence), weights, "encoder", num_heads, bias, scales)


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
    """Encode some tokens of an image and apply the final norm: (1 + n + m, dim); see `encoder_states`."""
    states = encoder_states(patches, tokens, shape, weights, num_heads, mask_tokens=mask_tokens, scales=scales)
    return norm(states[-1], weights, "encoder.norm")


def encoder_scales(noise: Sequence[int], weights: Weights, drop_path: float) -> Array | None:
    """Return the drop-path factors of the encoder's branches for one image; None for a rate of 0 (evaluation)."""
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
    """Append the features of thrown tokens, (V + M, dim) -> (N, dim), with the weights under ``reconstruct``.

    A no-op for the reconstruction "none".
    """
    if reconstruction == "none":
        return features
    own = {name.removeprefix("reconstruct."): w for name, w in weights.items() if name.startswith("reconstruct.")}
    return progressive_reconstruction(
        features, order, counts, shape, stages=stages, reconstruction=reconstruction, parameters=own
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
    """Encode whole images without masking or drop path: float64 (batch, 1 + N, dim), class token first.

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

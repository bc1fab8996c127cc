"""The decoder of CrossMAE in float64: mask tokens attend to encoder layers only."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prmim_reference.vit import Weights, depth, linear, mlp, norm, softmax

Array = NDArray[np.float64]


def mix_of_layers(layers: Sequence[Array], shares: Sequence[float] | Array) -> Array:
    """Return the weighted sum of feature maps of equal shape.

    Examples
    --------
    >>> mix_of_layers([np.array([[1.0]]), np.array([[10.0]])], [2.0, 0.5])
    array([[7.]])
    """
    total = np.zeros_like(layers[0])
    for share, layer in zip(shares, layers, strict=True):
        total += share * layer
    return total


def cross_attention(query: Array, context: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Return the attention output of one query: (dim,).

    The first half of the fused layer ``kv`` are keys, the second half values, each head by head. Scores are scaled by
    head_dim^-0.5.

    Parameters
    ----------
    query : array (dim,)
    context : array (n, context dim)
    weights, name : the layers ``{name}.q``, ``{name}.kv`` and ``{name}.proj``
    num_heads : int
        Divides dim.
    """
    dim = query.size
    if dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {dim}, got {num_heads}")
    head_dim = dim // num_heads
    asked = linear(query[None], weights, f"{name}.q")[0]
    keys_and_values = linear(context, weights, f"{name}.kv")
    keys, values = keys_and_values[:, :dim], keys_and_values[:, dim:]
    heads = []
    for head in range(num_heads):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        looks_at = softmax(keys[:, channels] @ asked[channels] / math.sqrt(head_dim))
        heads.append(looks_at @ values[:, channels])
    mixed: Array = linear(np.concatenate(heads)[None], weights, f"{name}.proj")[0]
    return mixed


def cross_block(x: Array, context: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Apply a pre-norm block of cross-attention and an MLP to a token (dim,)."""
    query = norm(x[None], weights, f"{name}.norm1")[0]
    x = x + cross_attention(query, norm(context, weights, f"{name}.norm_context"), weights, f"{name}.attn", num_heads)
    mixed: Array = mlp(norm(x[None], weights, f"{name}.norm2"), weights, f"{name}.mlp")[0]
    return x + mixed


def cross_decode(
    layers: Sequence[Array], visible: Sequence[int], decoded: Sequence[int], weights: Weights, num_heads: int
) -> Array:
    """Return the features of visible, then decoded tokens of one image: (V + M, dim).

    Row k of ``decoder.mix`` holds the shares of the layers in the mix that block k reads. If the weights contain
    ``decoder.embed``, an additional row gives the features of the visible tokens. Otherwise these are NaN.

    Parameters
    ----------
    layers : 1 + encoder depth arrays (C + V, encoder dim)
        The input of the encoder's blocks and the output of each, class tokens first.
    visible : V raster numbers
    decoded : M raster numbers
    weights : the layers under ``decoder``
    num_heads : int
    """
    table, number_of_blocks = weights["decoder.pos_embed"][0], depth(weights, "decoder")
    mixes = [mix_of_layers(layers, shares) for shares in weights["decoder.mix"]]
    dim, num_visible = table.shape[1], len(visible)
    class_tokens = len(layers[0]) - num_visible
    features = np.full((num_visible + len(decoded), dim), np.nan)
    if "decoder.embed.weight" in weights:
        seen = norm(mixes[number_of_blocks][class_tokens:], weights, "decoder.norm_visible")
        features[:num_visible] = linear(seen, weights, "decoder.embed")
    for place, token in enumerate(decoded, start=num_visible):
        x = weights["decoder.mask_token"][0, 0] + table[class_tokens + token]
        for number in range(number_of_blocks):
            x = cross_block(x, mixes[number], weights, f"decoder.blocks.{number}", num_heads)
        features[place] = x
    return norm(features, weights, "decoder.norm")

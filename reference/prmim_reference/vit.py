"""The vision transformer in float64: one image at a time, tokens in rows.

Weights are a mapping from names to arrays, with timm's names; a linear layer's weight is (out, in), as in torch.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prmim_reference import grid

Array = NDArray[np.float64]
Weights = Mapping[str, Array]

LAYER_NORM_EPS = 1e-6

_erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x: Array, weights: Weights, name: str) -> Array:
    """Apply the linear layer ``name``: (n, in) to (n, out)."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None) -> Array:
    """Normalise every row to mean 0 and variance 1 (biased, eps 1e-6), then scale and shift it if told to.

    Examples
    --------
    >>> layer_norm(np.array([[1.0, 3.0]])).round(3)
    array([[-1.,  1.]])
    """
    result = np.empty_like(x)
    for row, values in enumerate(x):
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / values.size
        result[row] = (values - mean) / math.sqrt(variance + LAYER_NORM_EPS)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result


def gelu(x: Array) -> Array:
    """Return x times the normal distribution's probability below x: the exact form, by the error function.

    Examples
    --------
    >>> gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    return np.asarray(x * 0.5 * (1 + _erf(x / math.sqrt(2))), np.float64)


def softmax(x: Array) -> Array:
    """Return exp(x) divided by its sum over the last axis.

    Examples
    --------
    >>> softmax(np.log(np.array([1.0, 3.0])))
    array([0.25, 0.75])
    """
    # The largest exponent is taken out first, which changes nothing but keeps exp finite.
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=-1, keepdims=True), np.float64)


def attention(x: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Let every token look at all tokens of its image.

    The fused layer ``qkv`` gives queries, keys and values, one after another, each of them head by head. A head's
    scores are scaled by head_dim^-0.5.

    Parameters
    ----------
    x : array (n, dim)
    weights, name : the layers ``{name}.qkv`` and ``{name}.proj``
    num_heads : int
        Divides dim.
    """
    dim = x.shape[1]
    if dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {dim}, got {num_heads}")
    head_dim = dim // num_heads
    qkv = linear(x, weights, f"{name}.qkv")
    query, key, value = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
    heads = []
    for head in range(num_heads):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[:, channels] @ key[:, channels].T / math.sqrt(head_dim)
        heads.append(softmax(scores) @ value[:, channels])
    return linear(np.concatenate(heads, axis=1), weights, f"{name}.proj")


def mlp(x: Array, weights: Weights, name: str) -> Array:
    """Apply two linear layers with a GELU between them."""
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def norm(x: Array, weights: Weights, name: str) -> Array:
    """Apply the layer norm ``name``."""
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def block(x: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Apply one pre-norm transformer block: attention, then the MLP, each added to what came in."""
    x = x + attention(norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", num_heads)
    return x + mlp(norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp")


def depth(weights: Weights, name: str) -> int:
    """Return how many blocks the weights hold under ``{name}.blocks``."""
    number = 0
    while f"{name}.blocks.{number}.norm1.weight" in weights:
        number += 1
    return number


def transformer(x: Array, weights: Weights, name: str, num_heads: int) -> Array:
    """Apply all blocks of ``name`` and its final norm."""
    for number in range(depth(weights, name)):
        x = block(x, weights, f"{name}.blocks.{number}", num_heads)
    return norm(x, weights, f"{name}.norm")


def patch_embedding(patches: Array, weights: Weights, name: str) -> Array:
    """Embed patches (n, pixels * channels) by the convolution weight (dim, channels, patch axes...).

    A patch vector holds the channels of a pixel together; the convolution's weight has them first.
    """
    weight = weights[f"{name}.weight"]
    rows = np.array([np.moveaxis(kernel, 0, -1).reshape(-1) for kernel in weight], np.float64)
    return patches @ rows.T + weights[f"{name}.bias"]


def sin_cos_table(shape: Sequence[int], dim: int) -> Array:
    """Return the frozen position table: a row of zeros for the class token, then one row per token.

    The channels are split in equal parts, one per axis, the **last** axis first (for images: column, then row). The
    part of an axis, w channels wide, holds the sines, then the cosines, of the token's index along it times
    10000^(-k / (w / 2)), k = 0 .. w/2 - 1.

    Parameters
    ----------
    shape : the grid
    dim : int
        A multiple of twice the number of axes.

    Returns
    -------
    array (1 + N, dim)

    Examples
    --------
    >>> sin_cos_table((1, 2), 4).round(3)
    array([[0.   , 0.   , 0.   , 0.   ],
           [0.   , 1.   , 0.   , 1.   ],
           [0.841, 0.54 , 0.   , 1.   ]])
    """
    axes = len(shape)
    if dim % (2 * axes):
        raise ValueError(f"dim: expected a multiple of {2 * axes} for {axes} axes, got {dim}")
    half = dim // axes // 2
    rows = [[0.0] * dim]
    for index in grid.positions(shape):
        row = []
        for i in reversed(index):
            angles = [i * 10000 ** (-k / half) for k in range(half)]
            row.extend([math.sin(angle) for angle in angles])
            row.extend([math.cos(angle) for angle in angles])
        rows.append(row)
    return np.array(rows)

"""The vision transformer in float64, for one image (tokens, channels).

Weights map timm's names to arrays. The weight of a linear layer is (out, in), as in torch.
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
    """Apply the linear layer ``name``: (n, in) to (n, out). It may have no bias."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = LAYER_NORM_EPS) -> Array:
    """Normalize every row to mean 0 and variance 1; apply weight and bias if given.

    The variance is biased; eps is added to it.

    Examples
    --------
    >>> layer_norm(np.array([[1.0, 3.0]])).round(3)
    array([[-1.,  1.]])
    """
    result = np.empty_like(x)
    for row, values in enumerate(x):
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / values.size
        result[row] = (values - mean) / math.sqrt(variance + eps)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result


def gelu(x: Array) -> Array:
    """Return x times the standard normal CDF at x (the exact form of GELU).

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
    # Subtracting the maximum keeps exp finite.
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=-1, keepdims=True), np.float64)


def attention_maps(x: Array, weights: Weights, name: str, num_heads: int, bias: Array | None = None) -> Array:
    """Return the attention maps (heads, n, n), queries before keys.

    The first two thirds of the fused layer ``qkv`` are queries and keys, each head by head. Scores are scaled by
    head_dim^-0.5 before the bias is added.

    Parameters
    ----------
    x : array (n, dim)
    weights, name : the layer ``{name}.qkv``
    num_heads : int
        Divides dim.
    bias : array (heads, n, n), optional
    """
    dim = x.shape[1]
    if dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {dim}, got {num_heads}")
    head_dim = dim // num_heads
    qkv = linear(x, weights, f"{name}.qkv")
    query, key = qkv[:, :dim], qkv[:, dim : 2 * dim]
    maps = []
    for head in range(num_heads):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[:, channels] @ key[:, channels].T / math.sqrt(head_dim)
        if bias is not None:
            scores = scores + bias[head]
        maps.append(softmax(scores))
    return np.array(maps)


def attention(x: Array, weights: Weights, name: str, num_heads: int, bias: Array | None = None) -> Array:
    """Apply multi-head self-attention.

    The last third of the fused layer ``qkv`` are the values. Each head mixes its channels by its `attention_maps`.

    Parameters
    ----------
    x : array (n, dim)
    weights, name : the layers ``{name}.qkv`` and ``{name}.proj``
    num_heads : int
        Divides dim.
    bias : array (heads, n, n), optional
        Added to the scores.
    """
    dim = x.shape[1]
    value = linear(x, weights, f"{name}.qkv")[:, 2 * dim :]
    heads = []
    for head, looks_at in enumerate(attention_maps(x, weights, name, num_heads, bias)):
        heads.append(looks_at @ value[:, head * dim // num_heads : (head + 1) * dim // num_heads])
    return linear(np.concatenate(heads, axis=1), weights, f"{name}.proj")


def mlp(x: Array, weights: Weights, name: str) -> Array:
    """Apply two linear layers with a GELU between them."""
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def norm(x: Array, weights: Weights, name: str) -> Array:
    """Apply the layer norm ``name``."""
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def layer_scale(x: Array, weights: Weights, name: str) -> Array:
    """Multiply channels by ``{name}.gamma``, if the weights contain it.

    Examples
    --------
    >>> layer_scale(np.array([[2.0, 3.0]]), {"ls1.gamma": np.array([0.5, 1.0])}, "ls1")
    array([[1., 3.]])
    """
    return x * weights[f"{name}.gamma"] if f"{name}.gamma" in weights else x


def block(
    x: Array,
    weights: Weights,
    name: str,
    num_heads: int,
    bias: Array | None = None,
    scales: Sequence[float] | Array = (1.0, 1.0),
) -> Array:
    """Apply a pre-norm transformer block: residual attention, then a residual MLP.

    Each branch is multiplied by its LayerScale (``{name}.ls1.gamma``, ``{name}.ls2.gamma``), if the weights contain it,
    and by its drop-path factor from ``scales``.
    """
    attended = attention(norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", num_heads, bias)
    x = x + scales[0] * layer_scale(attended, weights, f"{name}.ls1")
    mixed = mlp(norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp")
    return x + scales[1] * layer_scale(mixed, weights, f"{name}.ls2")


def depth(weights: Weights, name: str) -> int:
    """Return the number of blocks under ``{name}.blocks``."""
    number = 0
    while f"{name}.blocks.{number}.norm1.weight" in weights:
        number += 1
    return number


def hidden_states(
    x: Array,
    weights: Weights,
    name: str,
    num_heads: int,
    bias: Array | None = None,
    scales: Sequence[Sequence[float]] | Array | None = None,
) -> list[Array]:
    """Apply all blocks of ``name``; return the output of each, before any final norm.

    Parameters
    ----------
    x : array (n, dim)
    weights, name : the blocks ``{name}.blocks.0``, ``{name}.blocks.1``, ...
    num_heads : int
    bias : array (heads, n, n), optional
        Shared by all blocks.
    scales : (depth, 2), optional
        Factors of the attention and of the MLP branch of every block; 1 by default.
    """
    number_of_blocks = depth(weights, name)
    if scales is None:
        scales = [(1.0, 1.0)] * number_of_blocks
    if len(scales) != number_of_blocks:
        raise ValueError(f"scales: expected a pair for each of {number_of_blocks} blocks, got {len(scales)}")
    states = []
    for number in range(number_of_blocks):
        x = block(x, weights, f"{name}.blocks.{number}", num_heads, bias, scales[number])
        states.append(x)
    return states


def transformer(
    x: Array,
    weights: Weights,
    name: str,
    num_heads: int,
    bias: Array | None = None,
    scales: Sequence[Sequence[float]] | Array | None = None,
) -> Array:
    """Apply all blocks of ``name`` (see `hidden_states`) and its final norm."""
    last = [x, *hidden_states(x, weights, name, num_heads, bias, scales)][-1]
    return norm(last, weights, f"{name}.norm")


def relative_position_row(query: Sequence[int] | None, key: Sequence[int] | None, shape: Sequence[int]) -> int:
    """Return the relative position table's row for the cells of a query and a key.

    The offset between two tokens is counted in grid cells, query minus key. Along an axis of length n it runs from
    -(n-1) to n-1; shifted to 0 .. 2n-2 it numbers the rows in raster order. The cell of the class token is None. Its
    rows are the last three: class token to token, token to class token, and class token to itself.

    Examples
    --------
    >>> pairs = ((1, 1), (0, 0)), ((0, 0), (1, 1))
    >>> tuple(relative_position_row(*pair, (2, 2)) for pair in pairs)
    (8, 0)
    >>> pairs = (None, (0, 1)), ((0, 1), None), (None, None)
    >>> [relative_position_row(*pair, (2, 2)) for pair in pairs]
    [9, 10, 11]
    """
    lengths = [2 * length - 1 for length in shape]
    if query is None and key is None:
        return grid.num_tokens(lengths) + 2
    if key is None:
        return grid.num_tokens(lengths) + 1
    if query is None:
        return grid.num_tokens(lengths)
    return grid.raster_number([a - b + n - 1 for a, b, n in zip(query, key, shape, strict=True)], lengths)


def relative_position_bias(tokens: Sequence[int], shape: Sequence[int], table: Array) -> Array:
    """Return the attention bias of the class token and some tokens of an image.

    Parameters
    ----------
    tokens : n raster numbers
    shape : the grid
    table : array (product of 2 length - 1 over the axes, plus 3; heads)

    Returns
    -------
    array (heads, 1 + n, 1 + n), queries before keys, class token first

    References
    ----------
    Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254; the numbering is timm's.
    """
    rows = relative_position_row(None, None, shape) + 1
    if len(table) != rows:
        raise ValueError(f"table: expected {rows} rows for the grid {tuple(shape)}, got {len(table)}")
    cells = grid.positions(shape)
    sequence = [None, *(cells[token] for token in tokens)]
    bias = np.zeros((table.shape[1], len(sequence), len(sequence)))
    for i, query in enumerate(sequence):
        for j, key in enumerate(sequence):
            bias[:, i, j] = table[relative_position_row(query, key, shape)]
    return bias


def patch_embedding(patches: Array, weights: Weights, name: str) -> Array:
    """Embed patches (n, pixels * channels) with the weight of a convolution.

    The weight is (dim, channels, patch axes...). Channels come last in a patch and first in the weight.
    """
    weight = weights[f"{name}.weight"]
    rows = np.array([np.moveaxis(kernel, 0, -1).reshape(-1) for kernel in weight], np.float64)
    return patches @ rows.T + weights[f"{name}.bias"]


def raster_table(number: int, dim: int) -> Array:
    """Return VideoMAE's fixed position table of tokens in raster order.

    Channels 2k and 2k + 1 are the sine and the cosine of the token's number times 10000^(-2k / dim).

    Examples
    --------
    >>> raster_table(2, 4).round(3)
    array([[0.   , 1.   , 0.   , 1.   ],
           [0.841, 0.54 , 0.01 , 1.   ]])
    """
    if dim % 2:
        raise ValueError(f"dim: expected an even number, got {dim}")
    rows = []
    for token in range(number):
        row = []
        for k in range(dim // 2):
            angle = token * 10000 ** (-2 * k / dim)
            row += [math.sin(angle), math.cos(angle)]
        rows.append(row)
    return np.array(rows)


def sin_cos_table(shape: Sequence[int], dim: int) -> Array:
    """Return the fixed sine-cosine position table, a row per token.

    The class token's row is zero. Channels are split equally among the axes, **last** axis first (for images: column,
    then row). The w channels of an axis are the sines, then the cosines, of the token's index times 10000^(-k / (w /
    2)), k = 0 .. w/2 - 1.

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

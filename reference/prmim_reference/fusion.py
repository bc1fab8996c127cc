"""Fusion of encoder layers in float64, for one image (tokens, channels)."""

from collections.abc import Sequence

from prmim_reference.vit import Array, Weights, linear, softmax


def fused_blocks(number_of_blocks: int) -> list[int]:
    """Return the numbers of MFF's fused blocks, from 0: five shallow, and the last.

    Examples
    --------
    >>> fused_blocks(12), fused_blocks(24), fused_blocks(2)
    ([0, 2, 4, 6, 8, 11], [0, 4, 8, 12, 16, 23], [0, 1])
    """
    found: list[int] = []
    for block in [*(k * number_of_blocks // 6 for k in range(5)), number_of_blocks - 1]:
        if block not in found:
            found.append(block)
    return found


def fuse(states: Sequence[Array], weights: Weights) -> Array:
    """Return the learned mean of block outputs (MFF), before the final norm.

    Shallow outputs pass through the linear layers ``fusion.projections.0``, ``fusion.projections.1``, ...; the last
    output is used unchanged. The weights are the softmax of ``fusion.layer_weights``.

    Parameters
    ----------
    states : the outputs of all blocks, (n, dim) each
    weights

    References
    ----------
    Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261.
    """
    blocks = fused_blocks(len(states))
    shares = softmax(weights["fusion.layer_weights"])
    fused: Array = shares[-1] * states[blocks[-1]]
    for number, block in enumerate(blocks[:-1]):
        fused = fused + shares[number] * linear(states[block], weights, f"fusion.projections.{number}")
    return fused

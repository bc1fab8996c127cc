"""Fusion of the outputs of several encoder blocks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from prmim_jax.vit import Linear, constant


class Fusion(nnx.Module):
    """A learned mean of the outputs of several blocks (MFF).

    Parameters
    ----------
    dim
        Width of the encoder.
    blocks
        Numbers of the blocks, from 0. All outputs but the last pass through a linear layer each.
    dtype
        Dtype of the matrix products.
    rngs
        Source of the initial weights.

    Notes
    -----
    The weights of the mean are a softmax over ``layer_weights``, which start at one: equal weights.

    References
    ----------
    Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261.

    Examples
    --------
    >>> fusion = Fusion(8, (0, 2), rngs=nnx.Rngs(0))
    >>> fusion(jnp.zeros((4, 2, 5, 8))).shape  # input and outputs of three blocks
    (2, 5, 8)
    >>> fusion.named_weights()["layer_weight_2"]
    Array(0.5, dtype=float32)
    """

    def __init__(self, dim: int, blocks: Sequence[int], *, dtype: DTypeLike | None = None, rngs: nnx.Rngs) -> None:
        self.blocks = tuple(blocks)
        self.projections = nnx.List([Linear(dim, dim, dtype=dtype, rngs=rngs) for _ in self.blocks[:-1]])
        self.layer_weights = nnx.Param(constant(1.0, len(self.blocks)))

    def __call__(self, states: Array) -> Array:
        """Fuse the outputs of the blocks.

        Parameters
        ----------
        states
            (1 + depth, batch, length, dim): item k + 1 is the output of block k, see
            :meth:`prmim_jax.vit.Encoder.hidden_states`.

        Returns
        -------
        jax.Array
            (batch, length, dim).
        """
        *shallow, last = (states[block + 1] for block in self.blocks)
        # In bfloat16, linear layers return a lower precision than the residual stream.
        projected = [layer(state).astype(last.dtype) for layer, state in zip(self.projections, shallow, strict=True)]
        weights = jax.nn.softmax(self.layer_weights[...]).astype(last.dtype)
        return (weights[:, None, None, None] * jnp.stack([*projected, last])).sum(0)

    def named_weights(self) -> dict[str, Array]:
        """Return the weights of the fused blocks, without gradient.

        The names are ``layer_weight_K``.
        """
        weights = jax.lax.stop_gradient(jax.nn.softmax(self.layer_weights[...]))
        return {f"layer_weight_{block}": weights[place] for place, block in enumerate(self.blocks)}

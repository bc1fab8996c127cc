"""Fusion of the outputs of several encoder blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prmim_torch.vit import Linear


class Fusion(nn.Module):
    """A learned mean of the outputs of several blocks (MFF).

    Parameters
    ----------
    dim
        Width of the encoder.
    blocks
        Numbers of the blocks, from 0. All outputs but the last pass through a linear layer each.

    Notes
    -----
    The weights of the mean are a softmax over ``layer_weights``, which start at one: equal weights.

    References
    ----------
    Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv 2308.00261.

    Examples
    --------
    >>> fusion = Fusion(8, (0, 2))
    >>> fusion([torch.zeros(2, 5, 8)] * 4).shape  # input and outputs of three blocks
    torch.Size([2, 5, 8])
    >>> fusion.named_weights()["layer_weight_2"]
    tensor(0.5000)
    """

    def __init__(self, dim: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.projections = nn.ModuleList(Linear(dim, dim) for _ in self.blocks[:-1])
        self.layer_weights = nn.Parameter(torch.empty(len(self.blocks)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to their initial value; linear layers are not changed."""
        nn.init.ones_(self.layer_weights)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Fuse the outputs of the blocks.

        Parameters
        ----------
        states
            (batch, length, dim) each: item k + 1 is the output of block k, see
            :meth:`prmim_torch.vit.Encoder.hidden_states`.

        Returns
        -------
        Tensor
            (batch, length, dim).
        """
        *shallow, last = (states[block + 1] for block in self.blocks)
        # Under autocast, linear layers return a lower precision than the residual stream.
        projected = (layer(state).to(last.dtype) for layer, state in zip(self.projections, shallow, strict=True))
        weights = self.layer_weights.softmax(0).to(last.dtype)
        return (weights[:, None, None, None] * torch.stack([*projected, last])).sum(0)

    def named_weights(self) -> dict[str, Tensor]:
        """Return the weights of the fused blocks, without gradient.

        The names are ``layer_weight_K``.
        """
        weights = self.layer_weights.detach().softmax(0)
        return {f"layer_weight_{block}": weights[place] for place, block in enumerate(self.blocks)}

"""Progressive reconstruction of features of thrown tokens, stage by stage."""

from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prmim_core import (
    Grid,
    Plan,
    num_offsets,
    offset_squared_distances,
    reconstruct_stages,
    take_tokens,
)
from prmim_core.reconstruct import Mix, check_reconstructed
from prmim_torch.vit import LayerNorm, fill, offset_code

ReconstructionKind = Literal["kernel", "interpolate", "conv"]
RECONSTRUCTIONS: tuple[str, ...] = get_args(ReconstructionKind)


class ProgressiveReconstruction(nn.Module):
    """Reconstruct features of thrown tokens from those of known tokens.

    In stage s, each thrown token of that stage becomes a weighted mean of the features of all tokens known before the
    stage (visible, decoded, and thrown tokens of earlier stages). A layer norm follows, shared by the stages, eps 1e-6.

    The module has a fixed grid and width. Counts and stages come from the plan, so the throw ratio may change during
    training.

    Parameters
    ----------
    dim
        Channels of the features.
    grid
        The grid of the tokens.
    reconstruction
        How the weights are computed:

        ``"kernel"``
            a softmax over the known tokens, of a learned function of the offset between the two tokens: a table with
            one entry per offset and group of channels, initially minus the squared distance.
        ``"interpolate"``
            normalized inverse squared distances. No parameters; the norm has none either.
        ``"conv"``
            a learned depthwise 3x3 (3, 3x3x3) convolution over the grid, initially ones, divided by the number of known
            tokens that it sees. It is repeated: each repeat fills the unknown tokens next to filled ones. Values of
            tokens of later stages are discarded at the end of the stage. A token out of reach is 0 before the norm.
    heads
        Groups of channels with their own weights (``"kernel"`` only); divides ``dim``.
    repeats
        Convolutions per stage (``"conv"`` only).
    mix
        A custom module in place of these: ``mix(features, known, thrown) -> (batch, n, dim)``, from features (batch, K,
        dim) of known tokens (batch, K) to those of thrown tokens (batch, n). The norm follows. Its parameters become
        part of this module. It may be a function without parameters. n is 0 if nothing is thrown.

    Raises
    ------
    ValueError
        If the reconstruction is unknown, ``heads`` does not divide ``dim``, or both a reconstruction and a mix are
        given.
    TypeError
        If ``mix`` cannot be called.

    Notes
    -----
    Multiply-accumulates per image: ``kernel`` and ``interpolate`` dim x (tokens of a stage) x (tokens known before it),
    summed over stages (6.2 M for ViT-B/16 with half of the patches thrown, against 321 M for a decoder block);
    ``conv`` dim x N x 3^axes per repeat.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> from prmim_torch import ProgressiveReconstruction, make_plan
    >>> schedule = Schedule(Grid((4, 4)), TokenCounts(visible=4, decoded=4, thrown=8))
    >>> plan = make_plan(schedule, torch.arange(32).reshape(2, 16))
    >>> reconstruct = ProgressiveReconstruction(8, schedule.grid)
    >>> reconstruct(torch.randn(2, 8, 8), plan).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        reconstruction: ReconstructionKind = "kernel",
        heads: int = 4,
        repeats: int = 3,
        mix: Mix | None = None,
    ) -> None:
        super().__init__()
        if reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction: expected one of {', '.join(RECONSTRUCTIONS)}, got {reconstruction!r}")
        if mix is not None and not callable(mix):
            raise TypeError(f"mix: expected a module or a function, got {type(mix).__name__}")
        if mix is not None and reconstruction != "kernel":
            raise ValueError(f"mix: expected None with reconstruction {reconstruction!r}, got {type(mix).__name__}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if mix is None and reconstruction == "kernel" and (heads < 1 or dim % heads):
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        if reconstruction == "conv" and repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        self.dim = dim
        self.grid = grid
        self.reconstruction = reconstruction if mix is None else "custom"
        self.heads = heads
        self.repeats = repeats
        self.mix = mix
        self.norm = LayerNorm(dim, elementwise_affine=reconstruction != "interpolate")
        if self.reconstruction == "kernel":
            self.table = nn.Parameter(torch.empty(heads, num_offsets(grid)))
        elif self.reconstruction == "conv":
            self.kernel = nn.Parameter(torch.empty(dim, *(3,) * grid.axes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the table or the convolution; the norm and ``mix`` are not changed."""
        if self.reconstruction == "kernel":
            start = -torch.from_numpy(offset_squared_distances(self.grid)).float()
            fill(self.table, start.repeat(self.heads, 1))
        elif self.reconstruction == "conv":
            nn.init.ones_(self.kernel)

    def no_weight_decay(self) -> frozenset[str]:
        """Return the names of all parameters but those of ``mix``.

        Decay towards 0 would make the weights of near and far tokens equal.
        """
        return frozenset(name for name, _ in self.named_parameters() if not name.startswith("mix."))

    def forward(self, features: Tensor, plan: Plan, *, visible_features: bool = True) -> Tensor:
        """Reconstruct the thrown tokens.

        Parameters
        ----------
        features
            (batch, V + M, dim): features of the visible, then of the decoded tokens, in plan order; (batch, M, dim)
            without ``visible_features``.
        plan
            The plan of the batch, on the grid of this module.
        visible_features
            Whether visible tokens have features. False for a decoder that returns features of decoded tokens only (such
            as CrossMAE's): thrown tokens are reconstructed from decoded tokens and those of earlier stages.

        Returns
        -------
        Tensor
            (batch, N, dim): the features of all tokens, in plan order; the given ones are unchanged. Without
            ``visible_features``, (batch, M + T, dim): those of the masked tokens.

        Raises
        ------
        ValueError
            If ``features`` do not fit the plan, the plan is on another grid, no token is known, or ``mix`` returns
            another shape.
        """
        if plan.schedule.grid != self.grid:
            raise ValueError(f"plan: expected one on {self.grid}, got {plan.schedule.grid}")
        if features.shape[-1] != self.dim:
            raise ValueError(f"features: expected {self.dim} channels, got shape {tuple(features.shape)}")
        # In the precision of the parameters, independent of the features; autocast still applies to products.
        is_learned = self.norm.elementwise_affine
        dtype = self.norm.weight.dtype if is_learned else torch.promote_types(features.dtype, torch.float32)

        def mix(features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
            mixed = self._mix(features.to(dtype), known, thrown)
            return self.norm(mixed.to(dtype)).to(features.dtype)

        rebuilt: Tensor = reconstruct_stages(features, plan, mix, visible_features=visible_features)
        if plan.schedule.counts.thrown:
            return rebuilt
        # 0 tokens connect the parameters to the loss: DistributedDataParallel needs the gradients of all parameters.
        known = plan.known(1)[:, plan.schedule.num_known(1) - features.shape[1] :]
        return torch.cat([rebuilt, mix(features, known, plan.stage(1))], dim=1)

    def _mix(self, features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
        """Return weighted means (batch, n, dim) of known features for thrown tokens."""
        if self.mix is not None:
            mixed: Tensor = self.mix(features, known, thrown)
            check_reconstructed(mixed, features, thrown)
            return mixed
        if self.reconstruction == "kernel":
            return self._mix_by_kernel(features, known, thrown)
        if self.reconstruction == "interpolate":
            return self._mix_by_distance(features, known, thrown)
        return self._mix_by_conv(features, known, thrown)

    def _mix_by_kernel(self, features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
        offset = self._offset(known, thrown)
        logits = self.table.gather(1, offset.reshape(1, -1).expand(self.heads, -1))
        weights = logits.view(self.heads, *offset.shape).softmax(-1)  # heads, batch, n, num_known
        batch, num_known, dim = features.shape
        groups = features.reshape(batch, num_known, self.heads, dim // self.heads).permute(2, 0, 1, 3)
        return (weights @ groups).permute(1, 2, 0, 3).flatten(2)

    def _mix_by_distance(self, features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
        # The clamp avoids a division by zero for the offset of a token to itself, which is never looked up.
        inverse = self._squared_distances(features).clamp(min=1).reciprocal()
        weights = inverse[self._offset(known, thrown)]  # batch, n, num_known
        return weights / weights.sum(-1, keepdim=True) @ features

    def _offset(self, known: Tensor, thrown: Tensor) -> Tensor:
        """Return indices of offsets from known to thrown: int64 (batch, n, num_known)."""
        code = offset_code(self.grid, known.device)
        return code[thrown][:, :, None] - code[known][:, None, :] + num_offsets(self.grid) // 2

    def _squared_distances(self, like: Tensor) -> Tensor:
        """Compute the squared distances of all offsets (num_offsets,) on the device."""
        total = like.new_zeros(1)
        for size, step in zip(self.grid.shape, self.grid.spacing, strict=True):
            along_axis = torch.arange(1 - size, size, device=like.device) * step
            total = (total[:, None] + along_axis.square()).flatten()
        return total

    def _mix_by_conv(self, features: Tensor, known: Tensor, thrown: Tensor) -> Tensor:
        batch, _, dim = features.shape
        shape, place = self.grid.shape, known[:, :, None]
        raster = features.new_zeros(batch, prod(shape), dim).scatter(1, place.expand(-1, -1, dim), features)
        filled = features.new_zeros(batch, prod(shape), 1).scatter(1, place, 1.0)
        values = raster.mT.reshape(batch, dim, *shape)  # batch, dim, *axes
        is_filled = filled.view(batch, 1, *shape)
        for _ in range(self.repeats):
            values, is_filled = self._fill(values, is_filled)
        return take_tokens(values.flatten(2).mT, thrown)

    def _fill(self, values: Tensor, is_filled: Tensor) -> tuple[Tensor, Tensor]:
        """Fill unknown tokens next to filled ones.

        ``is_filled`` holds ones and zeros. Unknown values are 0.
        """
        convolution = (F.conv1d, F.conv2d, F.conv3d)[self.kernel.ndim - 2]
        seen = convolution(is_filled, torch.ones_like(self.kernel[:1, None]), padding=1)
        mean = convolution(values, self.kernel[:, None], padding=1, groups=self.dim) / seen.clamp(min=1)
        # Without filled neighbours, the convolution of zeros is 0, as wanted.
        values = torch.where(is_filled > 0, values, mean.to(values.dtype))
        return values, (seen > 0).to(is_filled.dtype)


def no_weight_decay(module: nn.Module) -> frozenset[str]:
    """Return the reconstruction parameters of a module that have no weight decay.

    Examples
    --------
    >>> from prmim_core import Grid
    >>> model = nn.ModuleDict({"stages": ProgressiveReconstruction(8, Grid((4, 4)))})
    >>> sorted(no_weight_decay(model))
    ['stages.norm.bias', 'stages.norm.weight', 'stages.table']
    """
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, ProgressiveReconstruction)
        for name in part.no_weight_decay()
    )

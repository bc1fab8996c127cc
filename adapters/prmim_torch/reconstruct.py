"""Progressive reconstruction: features of thrown tokens, stage by stage, from the features of known ones."""

from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prmim_core import Plan, Schedule, num_offsets, offset_squared_distances, take_tokens
from prmim_torch.vit import LayerNorm, offset_code

Variant = Literal["kernel", "interpolate", "conv"]
VARIANTS: tuple[str, ...] = get_args(Variant)


class ProgressiveReconstruction(nn.Module):
    """Rebuild the features of thrown tokens from those of their neighbours, for almost nothing.

    In stage s every thrown token of that stage becomes a weighted mean of the features of all tokens known before it
    (visible, decoded, and thrown ones of earlier stages), then a layer norm (shared by the stages, eps 1e-6).

    Parameters
    ----------
    dim
        Channels of the features.
    schedule
        The static part of the plans that will come.
    variant
        How the weights come about:

        ``"kernel"``
            a softmax, over the known tokens, of a learned function of the offset between the two tokens alone: a table
            with one entry per offset and group of channels, starting at minus the squared distance.
        ``"interpolate"``
            inverse squared distances, normalised. No parameters; the norm has none either.
        ``"conv"``
            a learned depthwise 3x3 (3, 3x3x3) kernel over the grid, starting at ones, divided by the number of known
            tokens that it sees. Repeated, so that each turn fills the unknown tokens next to filled ones; what it
            fills of later stages is dropped at the end of the stage. A token that no turn reaches is 0 before the norm.
    heads
        Groups of channels with weights of their own (``"kernel"`` only); divides ``dim``.
    repeats
        Turns per stage (``"conv"`` only).

    Raises
    ------
    ValueError
        If the variant is not known, ``heads`` does not divide ``dim``, or no token is known at the start.

    Notes
    -----
    Multiply-accumulates per image: ``kernel`` and ``interpolate`` dim x (tokens of a stage) x (tokens known before it),
    summed over stages (6.2 M for ViT-B/16 with half of the patches thrown, against 321 M for a decoder block);
    ``conv`` dim x N x 3^axes per turn.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> from prmim_torch import ProgressiveReconstruction, make_plan
    >>> schedule = Schedule(Grid((4, 4)), TokenCounts(visible=4, decoded=4, thrown=8))
    >>> plan = make_plan(schedule, torch.arange(32).reshape(2, 16))
    >>> rebuild = ProgressiveReconstruction(8, schedule)
    >>> rebuild(torch.randn(2, 8, 8), plan).shape
    torch.Size([2, 16, 8])
    """

    _code: Tensor
    _inverse: Tensor

    def __init__(
        self, dim: int, schedule: Schedule, variant: Variant = "kernel", heads: int = 4, repeats: int = 3
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if variant == "kernel" and (heads < 1 or dim % heads):
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        if variant == "conv" and repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        if schedule.counts.visible + schedule.counts.decoded == 0:
            raise ValueError("schedule: expected at least one visible or decoded token, got none")
        self.dim = dim
        self.schedule = schedule
        self.variant = variant
        self.heads = heads
        self.repeats = repeats
        grid = schedule.grid
        squared_distances = torch.from_numpy(offset_squared_distances(grid))
        if variant != "conv":
            self.register_buffer("_code", offset_code(grid), persistent=False)
        self._middle = num_offsets(grid) // 2  # the offset of a token to itself
        self.norm = LayerNorm(dim, elementwise_affine=variant != "interpolate")
        if variant == "kernel":
            self.table = nn.Parameter(-squared_distances.float().repeat(heads, 1))
        elif variant == "interpolate":
            # The distance of a token to itself is 0, and never looked up.
            self.register_buffer("_inverse", squared_distances.clamp(min=1).double().reciprocal(), persistent=False)
        else:
            self.kernel = nn.Parameter(torch.ones(dim, *(3,) * grid.axes))

    def forward(self, features: Tensor, plan: Plan) -> Tensor:
        """Rebuild the thrown tokens.

        Parameters
        ----------
        features
            (batch, V + M, dim): features of the visible, then of the decoded tokens, in plan order.
        plan
            The plan of the batch, of this module's schedule.

        Returns
        -------
        Tensor
            (batch, N, dim): the features of all tokens, in plan order; the given ones are passed on.

        Raises
        ------
        ValueError
            If the shapes do not fit the schedule.
        """
        num_known = self.schedule.num_known(1)
        if features.ndim != 3 or tuple(features.shape[1:]) != (num_known, self.dim):
            raise ValueError(f"features: expected shape (batch, {num_known}, {self.dim}), got {tuple(features.shape)}")
        if tuple(plan.order.shape) != (features.shape[0], self.schedule.counts.num_tokens):
            raise ValueError(
                f"plan: expected an order of shape {(features.shape[0], self.schedule.counts.num_tokens)}, "
                f"got {tuple(plan.order.shape)}"
            )
        # In the precision of the parameters, whatever that of the host is; autocast still has its say in products.
        learned = self.norm.elementwise_affine
        dtype = self.norm.weight.dtype if learned else torch.promote_types(features.dtype, torch.float32)
        for size in self.schedule.stage_sizes:
            if size:
                mixed = self._mix(features.to(dtype), plan.order, size)
                features = torch.cat([features, self.norm(mixed.to(dtype)).to(features.dtype)], dim=1)
        return features

    def _mix(self, known: Tensor, order: Tensor, size: int) -> Tensor:
        """Weighted means (batch, size, dim) of the known features, for the next ``size`` tokens of the order."""
        if self.variant == "kernel":
            return self._mix_by_kernel(known, order, size)
        if self.variant == "interpolate":
            return self._mix_by_distance(known, order, size)
        return self._mix_by_conv(known, order, size)

    def _mix_by_kernel(self, known: Tensor, order: Tensor, size: int) -> Tensor:
        column = self._column(known, order, size)
        logits = self.table.gather(1, column.reshape(1, -1).expand(self.heads, -1))
        weights = logits.view(-1, *column.shape).softmax(-1)  # heads, batch, size, num_known
        batch, num_known, _ = known.shape
        groups = known.reshape(batch, num_known, self.heads, -1).permute(2, 0, 1, 3)
        return (weights @ groups).permute(1, 2, 0, 3).flatten(2)

    def _mix_by_distance(self, known: Tensor, order: Tensor, size: int) -> Tensor:
        weights = self._inverse.to(known.dtype)[self._column(known, order, size)]  # batch, size, num_known
        return weights / weights.sum(-1, keepdim=True) @ known

    def _column(self, known: Tensor, order: Tensor, size: int) -> Tensor:
        """Look up the columns of the offsets from known tokens to the next ones: int64 (batch, size, num_known)."""
        num_known = known.shape[1]
        code = self._code[order[:, : num_known + size]]
        return code[:, num_known:, None] - code[:, None, :num_known] + self._middle

    def _mix_by_conv(self, known: Tensor, order: Tensor, size: int) -> Tensor:
        batch, num_known, dim = known.shape
        shape = self.schedule.grid.shape
        place = order[:, :num_known, None]
        raster = known.new_zeros(batch, prod(shape), dim).scatter(1, place.expand(-1, -1, dim), known)
        filled = known.new_zeros(batch, prod(shape), 1).scatter(1, place, 1.0)
        values = raster.mT.reshape(batch, dim, *shape)  # batch, dim, *axes
        is_filled = filled.view(batch, 1, *shape)
        for _ in range(self.repeats):
            values, is_filled = self._fill(values, is_filled)
        rebuilt: Tensor = take_tokens(values.flatten(2).mT, order[:, num_known : num_known + size])
        return rebuilt

    def _fill(self, values: Tensor, is_filled: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the unknown tokens next to filled ones; ``is_filled`` holds ones and zeros, unknown values are 0."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[self.kernel.ndim - 2]
        seen = convolution(is_filled, torch.ones_like(self.kernel[:1, None]), padding=1)
        mean = convolution(values, self.kernel[:, None], padding=1, groups=self.dim) / seen.clamp(min=1)
        # Where nothing is seen the convolution gives 0, as it must.
        values = torch.where(is_filled > 0, values, mean.to(values.dtype))
        return values, (seen > 0).to(is_filled.dtype)

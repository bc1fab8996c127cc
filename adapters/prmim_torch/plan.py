"""The core's plan as one opaque operator, which ``torch.compile`` does not unroll."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

import prmim_core
from prmim_core import Grid, Plan, Schedule, TokenCounts
from prmim_core.sampling import Sampler


def make_plan(schedule: Schedule, noise: Tensor, visible: Tensor | None = None, weights: Tensor | None = None) -> Plan:
    """Make the plan of a batch; ``prmim_core.make_plan`` for torch, which also works inside ``torch.compile``.

    Parameters
    ----------
    schedule
        The static part of the plan.
    noise
        int (batch, N), for example from ``prmim_core.counter_noise``. The plan is a pure function of it.
    visible
        int (batch, V): the visible tokens; None: the tokens of lowest noise, in units if the schedule has a unit.
    weights
        float (batch, N), for ``throwing="weighted"``; cast to float32.

    Returns
    -------
    Plan
        ``order`` is int64 (batch, N), on the device of ``noise``.

    Raises
    ------
    TypeError
        If ``noise`` is not of an integer dtype.
    ValueError
        If a shape does not fit the schedule.

    Notes
    -----
    The plan is computed by the operator ``torch.ops.prmim.plan_order``. Furthest sampling is a loop of a few small
    operations per pick; ``torch.compile`` would unroll it, which takes long and gains nothing.

    All devices give the same integers. On a CPU, the core works on NumPy views of the tensors, in less than half the
    time of PyTorch's operations. On CUDA, the loop is the kernel in :mod:`prmim_torch.furthest` if Triton is installed
    (it comes with CUDA builds of PyTorch), else the core's.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> schedule = Schedule(Grid((2, 4)), TokenCounts(visible=2, decoded=2, thrown=4))
    >>> plan = make_plan(schedule, torch.tensor([[3, 1, 4, 0, 5, 7, 2, 6]]))
    >>> plan.visible
    tensor([[3, 1]])
    """
    _check(schedule, noise, visible, weights)
    counts = schedule.counts
    order = torch.ops.prmim.plan_order(
        noise.detach(),
        None if visible is None else visible.detach(),
        None if weights is None else weights.detach().float(),
        schedule.grid.shape,
        schedule.grid.spacing,
        (counts.visible, counts.decoded, counts.thrown),
        schedule.stages,
        schedule.throwing,
        schedule.furthest_from,
        schedule.unit or (),
    )
    return Plan(order, schedule)


# An explicit schema, since inference from annotations differs between releases of torch.
@torch.library.custom_op(
    "prmim::plan_order",
    mutates_args=(),
    schema="(Tensor noise, Tensor? visible, Tensor? weights, int[] shape, int[] spacing, int[] counts, int stages, "
    "str throwing, str furthest_from, int[] unit=[]) -> Tensor",
)
def _plan_order(
    noise: Tensor,
    visible: Tensor | None,
    weights: Tensor | None,
    shape: Sequence[int],
    spacing: Sequence[int],
    counts: Sequence[int],
    stages: int,
    throwing: str,
    furthest_from: str,
    unit: Sequence[int] = (),
) -> Tensor:
    schedule = Schedule(
        Grid(tuple(shape), tuple(spacing)),
        TokenCounts(*counts),
        stages=stages,
        throwing=throwing,  # type: ignore[arg-type]  # an operator takes any string; Schedule checks it
        furthest_from=furthest_from,  # type: ignore[arg-type]
        unit=tuple(unit) or None,
    )
    if noise.device.type == "cpu":
        of_noise, of_visible, of_weights = (
            None if tensor is None else tensor.numpy() for tensor in (noise, visible, weights)
        )
        return torch.from_numpy(prmim_core.make_plan(schedule, of_noise, of_visible, weights=of_weights).order)
    plan = prmim_core.make_plan(schedule, noise, visible, weights=weights, sampler=_sampler(noise))
    return plan.order.contiguous()


def _sampler(noise: Tensor) -> Sampler:
    """Return the Triton kernel if it can run, else the core's loop."""
    if noise.is_cuda and importlib.util.find_spec("triton") is not None:
        from prmim_torch.furthest import furthest_point_sampling

        return furthest_point_sampling
    return prmim_core.furthest_point_sampling


@_plan_order.register_fake
def _plan_order_fake(
    noise: Tensor,
    visible: Tensor | None,
    weights: Tensor | None,
    shape: Sequence[int],
    spacing: Sequence[int],
    counts: Sequence[int],
    stages: int,
    throwing: str,
    furthest_from: str,
    unit: Sequence[int] = (),
) -> Tensor:
    return torch.empty(noise.shape, dtype=torch.int64, device=noise.device)


def _check(schedule: Schedule, noise: Tensor, visible: Tensor | None, weights: Tensor | None) -> None:
    num_tokens, num_visible = schedule.counts.num_tokens, schedule.counts.visible
    if noise.dtype.is_floating_point or noise.dtype.is_complex or noise.dtype == torch.bool:
        raise TypeError(f"noise: expected integers, got {noise.dtype}")
    if noise.ndim != 2 or noise.shape[1] != num_tokens:
        raise ValueError(f"noise: expected shape (batch, {num_tokens}), got {tuple(noise.shape)}")
    if visible is not None and tuple(visible.shape) != (noise.shape[0], num_visible):
        raise ValueError(f"visible: expected shape {(noise.shape[0], num_visible)}, got {tuple(visible.shape)}")
    if weights is not None and tuple(weights.shape) != tuple(noise.shape):
        raise ValueError(f"weights: expected shape {tuple(noise.shape)}, got {tuple(weights.shape)}")

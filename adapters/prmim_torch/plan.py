"""Plans as a single opaque operator, which ``torch.compile`` does not unroll."""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, GetAttrKey, register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

import prmim_core
from prmim_core import Grid, Plan, Schedule, TokenCounts
from prmim_core.sampling import Sampler
from prmim_core.schedule import check_plan_arguments, choose_by_function


def make_plan(
    schedule: Schedule,
    noise: Tensor,
    visible: Tensor | None = None,
    decoded: Tensor | None = None,
    weights: Tensor | None = None,
) -> Plan:
    """Return the plan of a batch; ``prmim_core.make_plan`` for torch.

    Also works inside ``torch.compile``.

    Parameters
    ----------
    schedule
        The static part of the plan.
    noise
        (batch, N), any real dtype, for example from ``prmim_core.counter_noise`` or ``torch.rand``. The plan is a pure
        function of it. Throwing by ``"weighted"`` needs int32, ``"cell"`` integers.
    visible
        int (batch, V): the visible tokens, distinct, and in whole units if the schedule has a unit; None: the tokens or
        units of lowest noise.
    decoded
        int (batch, M): the decoded tokens, distinct and masked, and in whole units if the schedule has a unit; None:
        those chosen by the strategy of the schedule.
    weights
        float (batch, N), for ``throwing="weighted"``; cast to float32.

    Returns
    -------
    Plan
        ``order`` is int64 (batch, N), on the device of ``noise``.

    Raises
    ------
    TypeError
        If an argument is not a tensor, or a dtype does not fit.
    ValueError
        If a shape does not fit the schedule, weights are missing or not needed, noise or weights have NaN, or
        ``visible`` or ``decoded`` repeats a token, cuts a unit or has tokens in common.
    IndexError
        If ``visible`` or ``decoded`` has a value outside of [0, N).

    Notes
    -----
    Values are checked on a CPU, also in compiled code. On other devices, a check would block; use
    :meth:`prmim_core.Plan.check` for tokens from other sources.

    The plan is computed by the operator ``torch.ops.prmim.plan_order``. Furthest sampling is a loop of a few small
    operations per pick. ``torch.compile`` would unroll it, which takes long and has no benefit. A function in
    ``schedule.throwing`` is called with tensors before the operator, so ``torch.compile`` traces it.

    All devices return equal integers. On a CPU, the core works on NumPy views of the tensors, in less than half the
    time of PyTorch's operations. On CUDA, the loop is the kernel in :mod:`prmim_torch.furthest` if Triton is installed
    (part of CUDA builds of PyTorch), else the core's.

    A plan is a PyTorch pytree with the leaf ``order``. ``torch.export`` accepts and returns plans, but cannot save a
    schedule with a function. ``torch.utils._pytree.tree_map(lambda order: order.to(device), plan)`` moves a plan to a
    device. ``default_collate`` concatenates plans of equal schedules.

    Examples
    --------
    >>> import torch
    >>> from prmim_core import Grid, Schedule, TokenCounts
    >>> schedule = Schedule(Grid((2, 4)), TokenCounts(visible=2, decoded=2, thrown=4))
    >>> plan = make_plan(schedule, torch.tensor([[3, 1, 4, 0, 5, 7, 2, 6]]))
    >>> plan.visible
    tensor([[3, 1]])
    """
    for name, tensor in (("noise", noise), ("visible", visible), ("decoded", decoded), ("weights", weights)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    check_plan_arguments(schedule, noise, visible, decoded, weights)
    counts, throwing, noise = schedule.counts, schedule.throwing, noise.detach()
    if callable(throwing):
        if decoded is None:
            visible, decoded = choose_by_function(schedule, noise, visible)
        throwing = "random"  # operators accept no functions, so the decoded tokens are passed instead
    order = torch.ops.prmim.plan_order(
        noise,
        None if visible is None else visible.detach(),
        None if weights is None else weights.detach().float(),
        schedule.grid.shape,
        schedule.grid.spacing,
        (counts.visible, counts.decoded, counts.thrown),
        schedule.stages,
        throwing,
        schedule.furthest_from,
        schedule.unit or (),
        None if decoded is None else decoded.detach(),
    )
    return Plan(order, schedule)


# An explicit schema, since inference from annotations differs between releases of torch.
@torch.library.custom_op(
    "prmim::plan_order",
    mutates_args=(),
    schema="(Tensor noise, Tensor? visible, Tensor? weights, int[] shape, int[] spacing, int[] counts, int stages, "
    "str throwing, str furthest_from, int[] unit=[], Tensor? decoded=None) -> Tensor",
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
    decoded: Tensor | None = None,
) -> Tensor:
    schedule = Schedule(
        Grid(tuple(shape), tuple(spacing)),
        TokenCounts(*counts),
        stages=stages,
        throwing=throwing,  # type: ignore[arg-type]  # an operator accepts any string; Schedule validates it
        furthest_from=furthest_from,  # type: ignore[arg-type]
        unit=tuple(unit) or None,
    )
    if noise.device.type == "cpu":
        if noise.dtype == torch.bfloat16:
            noise = noise.float()  # NumPy has no bfloat16
        arrays = [None if tensor is None else tensor.numpy() for tensor in (noise, visible, decoded, weights)]
        return torch.from_numpy(prmim_core.make_plan(schedule, *arrays).order)
    plan = prmim_core.make_plan(schedule, noise, visible, decoded, weights, sampler=_sampler(noise))
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
    decoded: Tensor | None = None,
) -> Tensor:
    return torch.empty(noise.shape, dtype=torch.int64, device=noise.device)


def _flatten(plan: Plan) -> tuple[list[Tensor], tuple[Any, ...]]:
    # The context is plain values, because torch.export does not support frozen dataclasses in output structures.
    grid, counts, schedule = plan.schedule.grid, plan.schedule.counts, plan.schedule
    sizes = grid.shape, grid.spacing, (counts.visible, counts.decoded, counts.thrown), schedule.stages
    return [plan.order], (*sizes, schedule.throwing, schedule.furthest_from, schedule.unit)


def _unflatten(leaves: Iterable[Any], context: tuple[Any, ...]) -> Plan:
    shape, spacing, counts, *rules = context
    # PyTorch unflattens with placeholders for tensors, so the constructor's checks must not run.
    plan = object.__new__(Plan)
    object.__setattr__(plan, "order", *leaves)
    object.__setattr__(plan, "schedule", Schedule(Grid(shape, spacing), TokenCounts(*counts), *rules))
    return plan


def _dump_context(context: tuple[Any, ...]) -> list[Any]:
    """Return a serializable schedule; ValueError if it has a function."""
    *_, throwing, _, _ = context
    if callable(throwing):
        raise ValueError(f"throwing: expected a named strategy in a plan that is saved, got the function {throwing!r}")
    return list(context)


def _load_context(context: list[Any]) -> tuple[Any, ...]:
    """Restore tuples, which JSON turned into lists."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in context)


def _collate(plans: Sequence[Plan], *, collate_fn_map: object = None) -> Plan:
    schedule = plans[0].schedule
    for plan in plans:
        if plan.schedule != schedule:
            raise ValueError(f"plans: expected equal schedules, got {schedule.counts} and {plan.schedule.counts}")
    return Plan(torch.cat([plan.order for plan in plans]), schedule)


if Plan not in SUPPORTED_NODES:  # this module may be reloaded
    register_pytree_node(
        Plan,
        _flatten,
        _unflatten,
        serialized_type_name="prmim_core.Plan",
        to_dumpable_context=_dump_context,
        from_dumpable_context=_load_context,
        flatten_with_keys_fn=lambda plan: ([(GetAttrKey("order"), plan.order)], _flatten(plan)[1]),
    )
default_collate_fn_map[Plan] = _collate

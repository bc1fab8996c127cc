"""Furthest point sampling on a GPU, as one Triton kernel.

There is one program per image, with the whole loop in registers. This module needs Triton, which is part of CUDA builds
of PyTorch; :mod:`prmim_torch.plan` imports it on use.
"""

import torch
import triton
import triton.language as tl
from array_api_compat import torch as xp
from torch import Tensor

import prmim_core
from prmim_core import Grid
from prmim_core.sampling import key_fits_int32, starting_distance


def furthest_point_sampling(
    grid: Grid, num_samples: int, noise: Tensor, is_known: Tensor | None = None, is_candidate: Tensor | None = None
) -> Tensor:
    """Pick tokens one by one, each the furthest from all known and picked tokens.

    Parameters
    ----------
    grid
        The grid of the tokens.
    num_samples
        Number of tokens to pick; at most the number of candidates of every image.
    noise
        (batch, N), any real dtype, on a CUDA device.
    is_known
        bool (batch, N), tokens known from the start; None: none.
    is_candidate
        bool (batch, N), tokens that may be picked, known ones excepted; None: all.

    Returns
    -------
    Tensor
        int64 (batch, num_samples), equal to :func:`prmim_core.furthest_point_sampling`. That function is called if
        distance and rank do not fit into one int32 key.
    """
    if num_samples == 0 or not key_fits_int32(grid):
        return prmim_core.furthest_point_sampling(grid, num_samples, noise, is_known, is_candidate)
    distance, rank = starting_distance(xp, grid, noise, is_known, is_candidate)
    batch, length = noise.shape
    picks = torch.empty(batch, num_samples, dtype=torch.int64, device=noise.device)
    _, height, width = (1, 1, *grid.shape)[-3:]
    block = triton.next_power_of_2(length)
    # Triton launches on the current device.
    with torch.cuda.device_of(noise):  # type: ignore[no-untyped-call]
        pick_tokens[(batch,)](
            (distance * length + rank).contiguous(),
            rank.contiguous(),
            picks,
            num_samples,
            height,
            width,
            *(1, 1, *grid.spacing)[-3:],
            length,
            block,
            num_warps=min(16, max(1, block // 256)),
            enable_fp_fusion=True,  # no effect on integers, but Triton 3.9 warns without this option
        )
    return picks


@triton.jit  # type: ignore[untyped-decorator]
def pick_tokens(  # type: ignore[no-untyped-def]  # Triton's types
    key_of,
    rank_of,
    picks,
    num_samples,
    height: tl.constexpr,
    width: tl.constexpr,
    step_0: tl.constexpr,
    step_1: tl.constexpr,
    step_2: tl.constexpr,
    length: tl.constexpr,
    block: tl.constexpr,
):
    """Pick ``num_samples`` tokens of one image, on a grid of three axes."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, block)
    is_token = token < length
    # Padding must never be the largest.
    key = tl.load(key_of + image * length + token, mask=is_token, other=-(2**31))
    rank = tl.load(rank_of + image * length + token, mask=is_token, other=0)
    for turn in range(num_samples):
        pick = tl.argmax(key, axis=0)
        tl.store(picks + image * num_samples + turn, pick.to(tl.int64))
        offset_0 = (token // (height * width) - pick // (height * width)) * step_0
        offset_1 = (token // width % height - pick // width % height) * step_1
        offset_2 = (token % width - pick % width) * step_2
        squared = offset_0 * offset_0 + offset_1 * offset_1 + offset_2 * offset_2
        key = tl.minimum(key, squared * length + rank)

"""The kernel of furthest sampling, on a GPU or in Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is imported, and torch.compile imports it in other tests; so one test here
runs the others in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import prmim_core
from prmim_core import Grid, Schedule, TokenCounts, counter_noise

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install 'prmim[gpu-tests]'", allow_module_level=True)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GRIDS = [
    Grid((7,), (3,)),
    Grid((4, 4)),
    Grid((5, 4), (3, 1)),
    Grid((3, 4, 2), (4, 1, 1)),
    Grid((14, 14)),
    Grid((14, 14), (254, 17)),  # the key reaches 0.9996 of int32
    Grid((14, 14), (254, 18)),  # and passes it
    Grid((2, 14, 14)),
]


@pytest.fixture(params=["interpreter" if IS_INTERPRETED else "gpu"])
def device(request):
    """Return the device of the kernel."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


@pytest.fixture
def sample():
    from prmim_torch.furthest import furthest_point_sampling

    return furthest_point_sampling


def some(grid, share, seed):
    return np.random.default_rng(seed).random((3, grid.num_tokens)) < share


@pytest.mark.skipif(IS_INTERPRETED, reason="this test starts the interpreter")
def test_the_interpreter_agrees():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masks", ["none", "known", "both"])
def test_picks_are_those_of_the_core(device, sample, grid, masks):
    noise = counter_noise(0, 0, np.arange(3), grid.num_tokens)
    is_known = some(grid, 0.2, 0) if masks != "none" else None
    is_candidate = some(grid, 0.8, 1) if masks == "both" else None
    may_pick = np.ones_like(noise, dtype=bool) if is_candidate is None else is_candidate
    most = int((may_pick if is_known is None else may_pick & ~is_known).sum(1).min())
    arrays = (noise, is_known, is_candidate)
    on_device = [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
    for number in (0, 1, min(most, 20)):
        picks = sample(grid, number, *on_device)
        assert picks.dtype == torch.int64
        assert picks.device.type == device.type
        expected = prmim_core.furthest_point_sampling(grid, number, *arrays)
        np.testing.assert_array_equal(picks.cpu().numpy(), expected)


@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_all_tokens_are_picked(device, sample, grid):
    noise = counter_noise(1, 0, np.arange(2), grid.num_tokens)
    picks = sample(grid, grid.num_tokens, torch.from_numpy(noise).to(device))
    expected = prmim_core.furthest_point_sampling(grid, grid.num_tokens, noise)
    np.testing.assert_array_equal(picks.cpu().numpy(), expected)


def test_equal_noise_and_an_empty_batch(device, sample):
    noise = np.zeros((2, 16), dtype=np.int32)
    picks = sample(GRIDS[1], 9, torch.from_numpy(noise).to(device))
    np.testing.assert_array_equal(picks.cpu().numpy(), prmim_core.furthest_point_sampling(GRIDS[1], 9, noise))
    assert sample(GRIDS[1], 9, torch.zeros(0, 16, device=device)).shape == (0, 9)


@pytest.mark.parametrize("unit", [None, (2, 2)])
@pytest.mark.parametrize("furthest_from", ["visible", "none"])
def test_a_plan_is_that_of_the_core(device, sample, unit, furthest_from):
    schedule = Schedule(Grid((4, 6)), TokenCounts(8, 4, 12), furthest_from=furthest_from, unit=unit)
    noise = counter_noise(0, 0, np.arange(3), 24)
    plan = prmim_core.make_plan(schedule, torch.from_numpy(noise).to(device), sampler=sample)
    np.testing.assert_array_equal(plan.order.cpu().numpy(), prmim_core.make_plan(schedule, noise).order)


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_loop_stays_in_registers(capability, tmp_path, monkeypatch):
    # Triton compiles for a GPU without one. 14x14 tokens: one warp, so no shared memory and no barrier.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prmim_torch.furthest import pick_tokens

    constants = {"height": 14, "width": 14, "step_0": 1, "step_1": 1, "step_2": 1, "length": 196, "block": 256}
    kinds = {"key_of": "*i32", "rank_of": "*i32", "picks": "*i64", "num_samples": "i32"}
    source = ASTSource(pick_tokens, kinds | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    loop = compiled.asm["ptx"].partition("bra")[2]
    assert compiled.metadata.shared == 0
    assert not [word for word in ("ld.global", "ld.local", "st.local", "bar.sync") if word in loop]

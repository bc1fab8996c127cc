"""Options of a training run, and its learning rate."""

import re
from math import cos, pi

import pytest

from prmim_methods import TrainingConfig

RUN = {"total_steps": 8, "warmup_steps": 2, "learning_rate": 1e-3}
SEED = "a whole number in [0, 2147483647]"
WRONG = [
    ({"seed": -1}, ValueError, f"seed: expected {SEED}, got -1"),
    ({"seed": 2**31}, ValueError, f"seed: expected {SEED}, got 2147483648"),
    ({"total_steps": 0}, ValueError, "total_steps: expected a whole number of at least 1, got 0"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps: expected a whole number of at least 0, got -1"),
    ({"warmup_steps": 9}, ValueError, "warmup_steps: expected at most total_steps 8, got 9"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate: expected a number of at least 0, got -1.0"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate: expected a number of at least 0, got nan"),
    ({"min_learning_rate": 1.0}, ValueError, "min_learning_rate: expected at most the peak learning rate 0.001, got 1"),
    (
        {"warmup_learning_rate": 1.0},
        ValueError,
        "warmup_learning_rate: expected at most the peak learning rate 0.001, got 1",
    ),
    ({"decay": "linear"}, ValueError, "decay: expected one of cosine, whole_cosine, step, got 'linear'"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a number of at least 0, got -0.1"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas: expected two numbers in [0, 1), got (0.9, 1.0)"),
    ({"betas": 0.9}, TypeError, "betas: expected two numbers in [0, 1), got 0.9"),
    ({"clip_grad": 0.0}, ValueError, "clip_grad: expected a number above 0, or null, got 0.0"),
    ({"accumulate": 0}, ValueError, "accumulate: expected a whole number of at least 1, got 0"),
    ({"precision": "float16"}, ValueError, "precision: expected one of auto, float32, bfloat16, got 'float16'"),
    ({"compile": 1}, TypeError, "compile: expected true or false, or null, got 1"),
    ({"device": "abacus"}, ValueError, "device: expected auto, cpu, cuda, cuda:N or mps, got 'abacus'"),
    ({"device": "cuda:x"}, ValueError, "device: expected auto, cpu, cuda, cuda:N or mps, got 'cuda:x'"),
    ({"device": "cpu\n"}, ValueError, r"device: expected text without control characters, got 'cpu\n'"),
    ({"device": "cuda:٣"}, ValueError, "device: expected auto, cpu, cuda, cuda:N or mps, got 'cuda:٣'"),
    ({"parallel": "zero"}, ValueError, "parallel: expected one of ddp, fsdp, got 'zero'"),
    ({"timeout": 0}, ValueError, "timeout: expected a number above 0, got 0"),
    ({"timeout": float("inf")}, ValueError, "timeout: expected a number above 0, got inf"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[str(given) for given, _, _ in WRONG])
def test_wrong_options(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        TrainingConfig(**{**RUN, **given})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "cpu:0"])
def test_devices(device):
    assert TrainingConfig(device=device).device == device


def test_cosine_decay():
    config = TrainingConfig(**RUN, min_learning_rate=1e-4)
    expected = [0.0, 5e-4] + [1e-4 + 9e-4 * (1 + cos(pi * done / 6)) / 2 for done in range(6)]
    assert [config.learning_rate_at(step) for step in range(8)] == pytest.approx(expected, rel=1e-12)
    assert config.learning_rate_at(2) == 1e-3
    assert config.learning_rate_at(8) == config.learning_rate_at(100) == 1e-4


def test_a_cosine_over_the_whole_run():
    run = {"total_steps": 100, "warmup_steps": 20, "learning_rate": 5e-3, "min_learning_rate": 1e-6}
    config = TrainingConfig(**run, decay="whole_cosine", warmup_learning_rate=1e-6)
    assert [config.learning_rate_at(step) for step in (0, 10)] == pytest.approx([1e-6, 2.5005e-3], rel=1e-12)
    assert config.learning_rate_at(19) == pytest.approx(1e-6 + 0.95 * 4.999e-3, rel=1e-12)
    assert [config.learning_rate_at(step) for step in (20, 60)] == pytest.approx([4.52e-3, 1.73e-3], rel=1e-2)
    assert config.learning_rate_at(100) == config.learning_rate_at(200) == 1e-6
    # The cosine after the warm-up is larger: its sum is 1.23 times this one.
    after = TrainingConfig(**run)
    assert [after.learning_rate_at(step) for step in (20, 60)] == pytest.approx([5e-3, 2.5e-3], rel=1e-3)
    total, total_after = (sum(map(schedule.learning_rate_at, range(100))) for schedule in (config, after))
    assert total_after / total == pytest.approx(1.23, abs=0.01)


def test_step_decay():
    config = TrainingConfig(**{**RUN, "total_steps": 16}, decay="step")
    rates = [config.learning_rate_at(step) for step in range(16)]
    assert rates == pytest.approx([0.0, 5e-4, *[1e-3] * 12, *[1e-4] * 2], rel=1e-12)
    assert TrainingConfig(**RUN, min_learning_rate=5e-4, decay="step").learning_rate_at(7) == 5e-4


def test_a_run_may_be_all_warm_up():
    config = TrainingConfig(total_steps=2, warmup_steps=2, learning_rate=1.0)
    assert [config.learning_rate_at(step) for step in range(3)] == [0.0, 0.5, 1.0]


def test_without_warm_up_the_first_step_has_the_peak():
    assert TrainingConfig(total_steps=1, learning_rate=1.0).learning_rate_at(0) == 1.0

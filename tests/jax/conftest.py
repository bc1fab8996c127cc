"""What the tests of the JAX adapter share."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler: None) -> None:
    """Compile quickly in every test here."""


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Options of an MAE that a step of takes milliseconds: 4x4 tokens, of which 4 visible, 4 decoded, 8 thrown."""
    return {
        "image_size": (16, 16),
        "patch_size": (4, 4),
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "decoder_dim": 8,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }


@pytest.fixture
def tiny_simmim() -> dict[str, Any]:
    """Options of a SimMIM that a step of takes milliseconds: 4x4 tokens, units of 2x2, of which 1 visible."""
    return {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def make_images() -> Callable[..., Any]:
    """Return a function from a shape to random uint8 images in NumPy."""

    def make(*shape: int, seed: int = 0) -> Any:
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make


@pytest.fixture
def dot_macs() -> Callable[[Any], int]:
    """Return a function that counts the multiply-accumulates of matrix products in a lowered, uncompiled program."""

    def count(lowered: Any) -> int:
        total = 0
        pattern = r"dot_general .*?(?:batching_dims = \[([\d, ]*)\].*?)?contracting_dims = \[([\d, ]*)\].*?"
        pattern += r": \(tensor<([\dx]+)x\w+>, tensor<[^>]+>\) -> tensor<([\dx]+)x\w+>"
        for _, contracted, left, result in re.findall(pattern, lowered.as_text()):
            sizes = [int(size) for size in left.split("x")]
            depth = np.prod([sizes[int(axis)] for axis in contracted.split(",")])
            total += int(depth * np.prod([int(size) for size in result.split("x")]))
        return total

    return count

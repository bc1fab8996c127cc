"""Fixtures of the tests of the JAX adapter."""

import importlib.util
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import jax


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler: None) -> None:
    """Compile quickly in every test here."""


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Return options of a small MAE: 4x4 tokens, 4 visible, 4 decoded, 8 thrown."""
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
def assert_close() -> Callable[..., None]:
    """Return a function that compares weights by name, without the biases of keys.

    Their gradient is rounding error alone, which AdamW scales to full steps.
    """

    def without_keys(name: str, array: Any) -> Any:
        return np.delete(array.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else array

    def check(weights: Any, others: Any, rtol: float, atol: float) -> None:
        for name, array in weights.items():
            ours, theirs = without_keys(name, array), without_keys(name, others[name])
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)

    return check


@pytest.fixture
def dot_macs() -> Callable[..., int]:
    """Return a function that counts the MACs of matrix products in a call."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += prod(result) * prod(left[axis] for axis in contracted)
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            turns = equation.params.get("length", 1)
            total += turns * sum(count(value) for value in inner if hasattr(value, "eqns"))
        return total

    return lambda function, *arguments: count(jax.make_jaxpr(function)(*arguments).jaxpr)

"""What the tests of one adapter against the other share."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("jax", "flax", "torch")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler: None, one_thread: None) -> None:
    """Both frameworks are quick in every test here."""


@pytest.fixture
def assert_same_decay() -> Callable[[Any, Any], None]:
    """Return a function that compares the weight decay of two equal modules."""
    from prmim_jax.interop import file_names, named_variables
    from prmim_jax.trainer import decay_mask
    from prmim_torch.trainer import parameter_groups

    def check(here: Any, there: Any) -> None:
        assert there.no_weight_decay() == here.no_weight_decay()
        decayed = {id(parameter) for parameter in parameter_groups(here, 0.05)[0]["params"]}
        mask, variables = decay_mask(there), named_variables(there)
        assert {file: mask[name] for name in mask for file in file_names(name, variables[name].shape)} == {
            name: id(parameter) in decayed for name, parameter in here.named_parameters() if parameter.requires_grad
        }

    return check


@pytest.fixture
def count_learned() -> Callable[[Any, Any], tuple[int, int]]:
    """Return a function that counts trained parameters in PyTorch and in JAX."""
    import jax
    from flax import nnx

    def count(here: Any, there: Any) -> tuple[int, int]:
        arrays = jax.tree.leaves(nnx.state(there, nnx.Param))
        learned = (parameter.numel() for parameter in here.parameters() if parameter.requires_grad)
        return sum(learned), sum(array.size for array in arrays)

    return count

"""What the tests of one adapter against the other share."""

import importlib.util

import pytest

if any(importlib.util.find_spec(name) is None for name in ("jax", "flax", "torch")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def quick(quick_compiler: None, one_thread: None) -> None:
    """Both frameworks are quick in every test here."""

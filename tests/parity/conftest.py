"""What the tests of one adapter against the other share."""

import importlib.util
from collections.abc import Iterator

import pytest

if any(importlib.util.find_spec(name) is None for name in ("jax", "flax", "torch")):
    collect_ignore_glob = ["test_*.py"]
else:
    import jax
    import torch


@pytest.fixture(autouse=True, scope="module")
def quiet_frameworks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Few optimisations and one compilation per program for JAX, and one thread for PyTorch."""
    changes = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name, value in before.items():
        jax.config.update(name, value)
    jax.clear_caches()  # compiled programs are large

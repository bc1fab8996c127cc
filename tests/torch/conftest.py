"""Fixtures of the tests of the PyTorch adapter."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> Iterator[None]:
    """Use one thread.

    Sums depend on the number of threads, and small tensors are faster with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forgetful_compiler() -> Iterator[None]:
    """Reset the compiler after a test.

    PyTorch compiles a function only a few times, and several methods share functions.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Any:
    """Return each device in turn, as a torch.device."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Return options of a small MAE: 4x4 tokens, 4 visible, 4 decoded, 8 thrown."""
    return {
        "image_size": (16, 16),
        "patch_size": (4, 4),
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "decoder_dim": 8,
        "decoder_depth": 1,
        "decoder_heads": 2,
    }


@pytest.fixture
def tiny_simmim() -> dict[str, Any]:
    """Return options of a small SimMIM: 4x4 tokens in 2x2 units, one visible."""
    return {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def make_images() -> Callable[..., Any]:
    """Return a function from a shape to random uint8 images in NumPy."""

    def make(*shape: int, seed: int = 0) -> Any:
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make

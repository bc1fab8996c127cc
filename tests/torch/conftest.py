"""Fixtures of the tests of the PyTorch adapter."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

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
def counted_macs() -> Callable[..., int]:
    """Return a function that counts the MACs of a method's matrix products per image.

    Explicit attention is included.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(method: Any, batch: int = 1) -> int:
        config = method.config
        images = torch.empty(batch, *config.image_size, config.channels, dtype=torch.uint8, device="meta")
        noise = torch.empty(batch, config.grid.num_tokens, dtype=torch.int32, device="meta")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            method.to("meta")(images, noise)
        assert counter.get_total_flops() % (2 * batch) == 0
        return counter.get_total_flops() // (2 * batch)

    return count

"""Checks that the host never waits for values of the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoReading(TorchDispatchMode):
    """Raises on operators that make the host wait for values."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_cpu")):
            raise AssertionError(f"{name} waits for the device")
        return function(*arguments, **(kwargs or {}))


def assert_no_reading(run: Callable[[], object], device: torch.device) -> None:
    """Raise unless a function, which is called twice on a GPU, never waits for the device."""
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    with NoReading():
        run()

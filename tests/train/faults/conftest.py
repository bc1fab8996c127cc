"""Fixtures of the fault tests: module `soak`, one undisturbed run per backend."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.forked import Forked
from tests.train.faults import soak as module

EPOCHS = 7
"""25 steps: 6 checkpoints, and one at the end. The command `soak.py` makes longer runs."""


@pytest.fixture(scope="session")
def soak() -> ModuleType:
    """The module `soak.py` in this folder, which is also a command.

    Runs on PyTorch are forked.
    """
    launch = module.launch
    module.launch = lambda words, *rest: (Forked if "torch" in words else launch)(words, *rest)  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="session")
def undisturbed(soak: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function from a backend to an undisturbed run and its pace. Cached.

    The result is a folder, the run in it, and the pace.
    """
    made: dict[tuple[str, int], Any] = {}

    def run(backend: str, processes: int = 1) -> Any:
        pytest.importorskip("torch" if backend == "torch" else "flax")
        key = (backend, processes)
        if key not in made:
            folder = tmp_path_factory.mktemp(backend)
            made[key] = (folder, *soak.run_undisturbed(backend, folder, EPOCHS, processes))
        return made[key]

    return run

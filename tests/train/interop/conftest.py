"""Runs with random weights, which nobody trained, and timm without torchvision."""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prmim_torch import METHODS, save_weights
from prmim_train.config.layers import dump_options
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.directory import RunDirectory
from prmim_train.run.manifest import write_manifest

SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that writes a run with a checkpoint, and returns its method.

    The checkpoint is of step 7.
    """

    def make(method: str = "mae", **options: Any) -> Any:
        decoder = DECODER if method == "mae" else {}
        config = pretrain_config(method=method, **{**SIZES, **decoder, **options}, out=str(tmp_path / "run"))
        built = METHODS[method](config.method).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in built.parameters():  # away from zeros and ones
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        run = RunDirectory(config.run_path)
        run.write_config(dump_options(config))
        checkpoint = run.path / "checkpoints" / "step_00000007"
        checkpoint.mkdir()
        save_weights(built, checkpoint / "weights.safetensors")
        write_manifest(checkpoint, None, 7)
        return built

    return make


class _Everything(type):
    """Type of a class that has every attribute; each is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Everything(name, (), {})


class _Module(ModuleType):
    """A module with every attribute."""

    __path__ = ()  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Everything(name, (), {})


class _Finder:
    """Finds torchvision and all modules in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="session")
def timm() -> Iterator[ModuleType]:
    """timm, whose models do not need torchvision; it imports some of it all the same."""
    finder: Any = _Finder()
    sys.meta_path.append(finder)  # the real one comes first, if it is there
    try:
        yield importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]

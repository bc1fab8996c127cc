"""Weights to and from ``.safetensors`` files, which both adapters read. Nothing is ever unpickled."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prmim_jax.vit import Buffer

Variables = dict[str, nnx.Variable[Array]]

METADATA_KEY = "prmim_architecture"
"""Where a file's metadata holds the JSON of the method's ``architecture()``."""


def save_weights(method: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a method, those of a teacher not, to a ``.safetensors`` file.

    Parameters
    ----------
    method
        A module with a method ``architecture() -> dict`` of plain values, which goes into the file's metadata.
    path
        The file. It appears whole or not at all: written beside its place first, then moved there.
    """
    tensors = {name: np.ascontiguousarray(variable[...]) for name, variable in named_variables(method).items()}
    # Tensors are laid out as PyTorch has them, and readers for PyTorch ask for this word.
    metadata = {"format": "pt", METADATA_KEY: json.dumps(_architecture(method))}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def load_weights(method: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Read the weights of a method from a ``.safetensors`` file that :func:`save_weights` wrote, here or in PyTorch.

    Parameters
    ----------
    method
        The module to fill; its own dtype and device stay.
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no safetensors file, was not written by prmim, is of another architecture (the first field that
        differs is named), or its tensors are not those of the method. The method is unchanged then.
    """
    tensors = read_weights(method, path)
    for name, variable in named_variables(method).items():
        value = variable[...]
        variable.set_value(jax.device_put(tensors[name].astype(value.dtype), value.sharding))


def named_variables(method: nnx.Module) -> Variables:
    """Return what goes into a module's file, by name: parameters and buffers, but nothing of a teacher."""
    return {
        ".".join(map(str, path)): value
        for path, value in nnx.iter_graph(method)
        if isinstance(value, nnx.Param | Buffer)
    }


def read_weights(method: nnx.Module, path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Return what :func:`load_weights` would put in a method, checked, without doing so."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({error})") from None
    check_architecture(_architecture(method), _parse_metadata(metadata, path))
    _check_tensors(named_variables(method), tensors, path)
    return tensors


def check_architecture(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise ValueError, naming the first field that differs, unless two architectures are equal."""
    for field in (*expected, *got):
        ours, theirs = expected.get(field), got.get(field)
        if ours != theirs:
            raise ValueError(f"weights: {field}: expected {ours!r}, got {theirs!r}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it appears whole or not at all: ``write`` fills another one, which then takes its place."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _architecture(method: nnx.Module) -> dict[str, Any]:
    architecture = getattr(method, "architecture", None)
    if not callable(architecture):
        raise TypeError(f"method: expected a module with architecture(), got {type(method).__name__}")
    values: dict[str, Any] = architecture()
    return values


def _parse_metadata(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        architecture = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        architecture = None
    if not isinstance(architecture, dict):
        raise ValueError(f"path: expected weights written by prmim, got {os.fspath(path)}, whose metadata has none")
    return architecture


def _check_tensors(expected: Variables, got: dict[str, NDArray[Any]], path: str | os.PathLike[str]) -> None:
    for name, variable in expected.items():
        if name not in got:
            raise ValueError(f"path: expected a tensor {name!r}, got none in {os.fspath(path)}")
        if got[name].shape != variable.shape:
            shapes = f"expected shape {tuple(variable.shape)}, got {tuple(got[name].shape)}"
            raise ValueError(f"path: {name}: {shapes} in {os.fspath(path)}")
        if not jnp.issubdtype(got[name].dtype, jnp.floating):
            raise ValueError(
                f"path: {name}: expected floating-point values, got {got[name].dtype} in {os.fspath(path)}"
            )
    for name in got:
        if name not in expected:
            raise ValueError(f"path: expected no tensor {name!r}, got one in {os.fspath(path)}")

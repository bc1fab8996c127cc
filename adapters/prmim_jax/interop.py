"""Weights to and from ``.safetensors`` files, which both adapters read. Nothing is ever unpickled."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prmim_core.files import check_metadata, check_tensors, dump_architecture, one_line, write_atomically
from prmim_jax.vit import Buffer

Variables = dict[str, nnx.Variable[Array]]


def save_weights(method: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a method, those of a teacher not, to a ``.safetensors`` file.

    Parameters
    ----------
    method
        A module with a method ``architecture() -> dict`` of plain values, which goes into the file's metadata.
    path
        The file. It appears whole or not at all: written beside its place first, then moved there.
    """
    tensors = {name: np.asarray(variable[...]) for name, variable in named_variables(method).items()}
    write_weights(tensors, dump_architecture(method), path)


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


def write_weights(weights: dict[str, NDArray[Any]], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write weights, named as :func:`named_variables` does, and the metadata of their method."""
    tensors = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def read_weights(method: nnx.Module, path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Return what :func:`load_weights` would put in a method, checked, without doing so."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({one_line(error)})") from None
    check_metadata(method, metadata, path)
    check_tensors(
        {name: tuple(variable.shape) for name, variable in named_variables(method).items()},
        {name: (t.shape, str(t.dtype), jnp.issubdtype(t.dtype, jnp.floating)) for name, t in tensors.items()},
        path,
    )
    return tensors

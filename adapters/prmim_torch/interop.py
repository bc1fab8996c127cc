"""Weights to and from ``.safetensors`` files, which both adapters read. Nothing is ever unpickled."""

import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prmim_core.files import check_metadata, check_tensors, dump_architecture, one_line, write_atomically

FROZEN = "teacher."
"""How names begin of what a method holds but does not learn, and what is no part of its files."""


def save_weights(method: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and persistent buffers of a method, those of a teacher not, to a ``.safetensors`` file.

    Parameters
    ----------
    method
        A module with a method ``architecture() -> dict`` of plain values, which goes into the file's metadata.
    path
        The file. It appears whole or not at all: written beside its place first, then moved there.
    """
    write_weights(named_weights(method), dump_architecture(method), path)


def load_weights(method: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read the weights of a method from a ``.safetensors`` file that :func:`save_weights` wrote, here or in JAX.

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
    put_weights(method, read_weights(method, path))


def named_weights(method: nn.Module) -> dict[str, Tensor]:
    """Return what goes into a method's file, by name: parameters and persistent buffers, those of a teacher not."""
    return {name: tensor for name, tensor in method.state_dict().items() if not name.startswith(FROZEN)}


def write_weights(weights: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write weights, named as :func:`named_weights` does, and the metadata of their method."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def put_weights(method: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights, of exactly the names of :func:`named_weights`, into a method."""
    method.load_state_dict(weights, strict=False)  # a teacher's are missing


def read_weights(method: nn.Module, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return what :func:`load_weights` would put in a method, checked, without doing so."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({one_line(error)})") from None
    check_metadata(method, metadata, path)
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in named_weights(method).items()},
        {name: (tuple(t.shape), str(t.dtype), t.is_floating_point()) for name, t in tensors.items()},
        path,
    )
    return tensors

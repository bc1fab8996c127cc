"""Reading and writing ``.safetensors`` files, which both adapters share.

Files store the weights of each block separately, as ``blocks.0.`` and so on. Modules store them stacked (see
:func:`prmim_jax.vit.stack_blocks`), as ``blocks.``.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prmim_jax.vit import Buffer
from prmim_methods.architecture import encoder_of, fit_encoder, fit_method
from prmim_methods.encoder import EncoderConfig
from prmim_methods.files import open_regular
from prmim_methods.messages import one_line
from prmim_methods.weight_files import (
    architecture_of,
    check_architecture,
    check_tensors,
    dump_architecture,
    read_architecture,
    write_atomically,
)

Variables = dict[str, nnx.Variable[Array]]
Weights = dict[str, NDArray[Any]]

BLOCKS = "blocks."


def save_weights(method: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write parameters and buffers to a ``.safetensors`` file, atomically.

    A teacher's are left out.

    Parameters
    ----------
    method
        A module with a method ``architecture() -> dict`` of plain values, which becomes the file's metadata.
    path
        The file.
    """
    write_weights(named_weights(method), dump_architecture(method), path)


def load_weights(method: nnx.Module, path: str | os.PathLike[str], *, resize: bool = False) -> None:
    """Load a ``.safetensors`` file that :func:`save_weights` of either adapter wrote.

    Parameters
    ----------
    method
        The module to fill; its dtype and device do not change.
    path
        The file.
    resize
        Whether the file's image size may differ. Position tables are then fitted to the method's; see
        :func:`prmim_methods.positions.fit_positions`.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is not a safetensors file, was not written by prmim, is of another architecture (the message names
        the first field that differs), or holds other tensors. The method is unchanged then.
    """
    put_weights(method, read_weights(method, path, resize=resize))


def named_variables(method: nnx.Module) -> Variables:
    """Return parameters and buffers by name, without a teacher's; blocks are stacked."""
    return {
        ".".join(map(str, path)): value
        for path, value in nnx.iter_graph(method)
        if isinstance(value, nnx.Param | Buffer)
    }


def is_stacked(name: str) -> bool:
    """Return whether a variable has a leading axis of blocks."""
    return f".{BLOCKS}" in f".{name}"


def file_names(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a variable in files: one per block if it is stacked.

    Examples
    --------
    >>> file_names("encoder.blocks.norm1.bias", (2, 8))
    ['encoder.blocks.0.norm1.bias', 'encoder.blocks.1.norm1.bias']
    >>> file_names("encoder.cls_token", (1, 1, 8))
    ['encoder.cls_token']
    """
    if not is_stacked(name):
        return [name]
    prefix, _, part = name.rpartition(BLOCKS)
    return [f"{prefix}{BLOCKS}{number}.{part}" for number in range(shape[0])]


def named_weights(method: nnx.Module) -> Weights:
    """Return a copy of a method's weights by name, as in files, without a teacher's."""
    weights: Weights = {}
    for name, variable in named_variables(method).items():
        array = np.array(variable[...])
        parts = array if is_stacked(name) else [array]
        weights.update(zip(file_names(name, array.shape), parts, strict=True))
    return weights


def write_weights(weights: Weights, metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write weights, named as by :func:`named_weights`, and metadata, atomically."""
    tensors = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def put_weights(method: nnx.Module, weights: Weights) -> None:
    """Copy weights, named as by :func:`named_weights`, into a method.

    Variables without weights are unchanged.
    """
    for name, variable in named_variables(method).items():
        value = variable[...]
        names = file_names(name, value.shape)
        if names[0] in weights:
            parts = [weights[part] for part in names]
            array = np.stack(parts) if is_stacked(name) else parts[0]
            variable.set_value(jax.device_put(array.astype(value.dtype), value.sharding))


def read_weights(method: nnx.Module, path: str | os.PathLike[str], *, resize: bool = False) -> Weights:
    """Return the validated weights that :func:`load_weights` would load."""
    metadata, tensors = read_file(path)
    got, expected = read_architecture(metadata, path), architecture_of(method)
    if resize:
        tensors = fit_method(expected, got, tensors)
    else:
        check_architecture(expected, got)
    check_fit(named_weights(method), tensors, path)
    return tensors


def read_encoder(
    path: str | os.PathLike[str], image_size: int | tuple[int, ...] | None = None
) -> tuple[EncoderConfig, Weights]:
    """Return the record of the encoder in a weight file, and its weights by name.

    All names begin with ``encoder.``.

    Parameters
    ----------
    path
        A file of a method, or of an encoder alone.
    image_size
        Size of the images, in place of the file's.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file has no encoder or lacks some of its weights, or the patches do not divide the images.
    """
    metadata, tensors = read_file(path)
    got = read_architecture(metadata, path)
    source = encoder_of(got)
    number, wanted = sum(array.size for array in tensors.values()), source.parameters()
    if wanted.learned + wanted.fixed > number:  # before a model of this size is built
        raise ValueError(f"path: expected the weights of an encoder, got {number:,} values in {os.fspath(path)}")
    config = source.encoder_config(image_size)
    return config, fit_encoder(config, got, tensors)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, str] | None, Weights]:
    """Return metadata and tensors of a ``.safetensors`` file; ValueError otherwise."""
    try:
        open_regular(path).close()  # safe_open would block on a pipe
        with safe_open(path, framework="numpy") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({one_line(error)})") from None


def check_fit(expected: Mapping[str, NDArray[Any]], got: Weights, path: str | os.PathLike[str]) -> None:
    """Validate a file's tensors: floating-point, with the expected names and shapes."""
    check_tensors(
        {name: array.shape for name, array in expected.items()},
        {name: (t.shape, str(t.dtype), jnp.issubdtype(t.dtype, jnp.floating)) for name, t in got.items()},
        path,
    )

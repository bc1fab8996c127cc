"""Import of weights of other code, from safetensors only. Unpickles nothing."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from prmim_jax.interop import named_weights, put_weights, read_file, write_weights
from prmim_methods.checkpoints import find_checkpoint
from prmim_methods.foreign import Checkpoint, ForeignWeights, Start, check_given, convert, start_from
from prmim_methods.weight_files import architecture_of


def import_weights(
    source: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, ...] | None = None,
    norm_pix: bool | None = None,
    encoder_only: bool = False,
) -> ForeignWeights:
    """Read weights of other code, under our names.

    Parameters
    ----------
    source
        A ``.safetensors`` file, an index of shards (``*.index.json``), a folder with one of them, or arrays by name.
    out
        The ``.safetensors`` file to write. :func:`prmim_jax.load_weights` of both adapters reads it.
    num_heads, decoder_heads, image_size, norm_pix, encoder_only
        Facts that the weights do not determine; see :func:`prmim_methods.foreign.convert`.

    Returns
    -------
    ForeignWeights
        Format, architecture and arrays; ``describe()`` returns them as text.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If it is not a checkpoint, was written by ``torch.save``, is of an unknown format, or its tensors are not those
        of the format. Nothing is written then.
    """
    given: dict[str, Any] = {"num_heads": num_heads, "decoder_heads": decoder_heads}
    given |= {"image_size": image_size, "norm_pix": norm_pix}
    found = convert(read_checkpoint(source), **given, encoder_only=encoder_only)
    check_given(found, given)
    if out is not None:
        write_weights(found.weights, found.metadata, out)
    return found


def init_weights(method: nnx.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """Load all fitting parts of other weights into a method.

    Parameters
    ----------
    method
        The method to fill; its dtype and device do not change.
    source
        See :func:`import_weights`.

    Returns
    -------
    str
        A line of text on the loaded parts.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`import_weights`; ValueError also if the encoder differs. The method is unchanged then.
    """
    start = read_start(method, source)
    put_weights(method, start.weights)
    return start.line


def read_start(method: nnx.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> Start:
    """Return the weights that :func:`init_weights` would load."""
    ours = architecture_of(method)
    found = convert(
        read_checkpoint(source),
        num_heads=ours["num_heads"],
        decoder_heads=ours.get("decoder_heads"),
        image_size=tuple(ours["image_size"]),
        norm_pix=ours.get("norm_pix"),
    )
    place = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    return start_from(found, place, method, {name: held.shape for name, held in named_weights(method).items()})


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint; see :func:`import_weights`."""
    if isinstance(source, Mapping):
        return Checkpoint("the state dict", {name: _as_array(array) for name, array in source.items()})
    found = find_checkpoint(source)
    if found.is_torch:
        raise ValueError(
            f"source: expected safetensors, got the PyTorch file {found.files[0]}; `prmim import --backend torch` "
            "converts it"
        )
    arrays: dict[str, NDArray[Any]] = {}
    metadata: dict[str, str] = {}
    for path in found.files:
        of_file, tensors = read_file(path)
        arrays |= {name: _as_array(array) for name, array in tensors.items()}
        metadata |= of_file or {}
    return Checkpoint(found.place, arrays, metadata, found.config, found.preprocessing)


def _as_array(array: Any) -> NDArray[Any]:
    """Convert an array to NumPy; floating-point ones to at least float32."""
    array = np.asarray(array)
    is_narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float64
    return array.astype(np.float32) if is_narrow else array

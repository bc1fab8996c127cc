"""Import of weights of other code. Unpickles tensors and plain values only."""

import argparse
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prmim_methods.checkpoints import CheckpointFiles, find_checkpoint
from prmim_methods.foreign import Checkpoint, ForeignWeights, Start, check_given, convert, start_from
from prmim_methods.messages import one_line, shown
from prmim_methods.weight_files import architecture_of
from prmim_torch.interop import named_weights, put_weights, read_file, write_weights

STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
"""Keys of the model's tensors in files of trainers."""
ARGUMENTS = "args"
"""Keys of the training options in files of trainers."""


ALLOWED: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
"""Allowed classes of training options in files of ``torch.save``; they hold values and execute nothing.

The second, SimMIM's, is a dictionary of another package. It is read as a dictionary of Python; the package is not
imported.
"""


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
    r"""Read weights of other code, under our names.

    Parameters
    ----------
    source
        A ``.safetensors`` file, a file of ``torch.save``, an index of shards (``*.index.json``), a folder with one of
        them, or a state dict.
    out
        The ``.safetensors`` file to write. :func:`prmim_torch.load_weights` of both adapters reads it.
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
        If it is not a checkpoint, holds code, is of an unknown format, or its tensors are not those of the format.
        Nothing is written then.

    Examples
    --------
    >>> from prmim_torch import create_method
    >>> sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "image_size": (16, 16),
    ...     "patch_size": (4, 4)}
    >>> other = create_method("mae", **sizes, decoder_dim=32, decoder_heads=1)
    >>> encoder = other.encoder.state_dict()
    >>> print(*import_weights(encoder, num_heads=2).describe(), sep="\n")  # timm's names
    Format: ViT (timm's names)
    Encoder: width 16, 1 blocks, 2 heads; images of 16 x 16 pixels and 3 channels, patches of 4 x 4; positions absolute
    Weights: the encoder alone, 18 tensors, 0.00 M numbers
    Note: mean and std of pixels: those of ImageNet assumed
    """
    given: dict[str, Any] = {"num_heads": num_heads, "decoder_heads": decoder_heads}
    given |= {"image_size": image_size, "norm_pix": norm_pix}
    found = convert(read_checkpoint(source), **given, encoder_only=encoder_only)
    check_given(found, given)
    if out is not None:
        write_weights({name: torch.from_numpy(array) for name, array in found.weights.items()}, found.metadata, out)
    return found


def init_weights(method: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
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
    put_weights(method, {name: torch.from_numpy(array) for name, array in start.weights.items()})
    return start.line


def read_start(method: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> Start:
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
    return start_from(found, place, method, {name: tuple(held.shape) for name, held in named_weights(method).items()})


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint; see :func:`import_weights`."""
    if isinstance(source, Mapping):
        return _from_entries(source, "the state dict")
    found = find_checkpoint(source)
    if found.is_torch:
        entries: dict[str, Any] = {}
        for path in found.files:
            entries |= read_torch_file(path)
        return _from_entries(entries, found.place, found)
    arrays: dict[str, NDArray[Any]] = {}
    metadata: dict[str, str] = {}
    for path in found.files:
        of_file, tensors = read_file(path)
        arrays |= {name: _as_array(name, tensor) for name, tensor in tensors.items()}
        metadata |= of_file or {}
    return Checkpoint(found.place, arrays, metadata, found.config, found.preprocessing)


def read_torch_file(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save``; ValueError unless tensors and plain values only."""
    try:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; unreadable content is an error
            entries = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # of many types, if the file is damaged
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        code = re.search(r"GLOBAL ([\w.]+)", text)
        got = f"one with code ({code[1]}), which was not executed" if code else one_line(text.strip().split("\n")[0])
        raise ValueError(f"source: expected a checkpoint of tensors in {path}, got {got}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"source: expected a dictionary of tensors in {path}, got {type(entries).__name__}")
    return entries


def _from_entries(entries: Mapping[str, Any], place: str, found: CheckpointFiles | None = None) -> Checkpoint:
    """Find the state dict of the model among the entries of a file."""
    inner = next((key for key in STATE_DICTS if isinstance(entries.get(key), Mapping)), None)
    state = entries if inner is None else entries[inner]
    others = [key for key in entries if key != inner] if inner is not None else []
    strange = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"source: expected tensors by name in {place}, got {shown(strange[0])}, which is not a tensor")
    arguments = entries.get(ARGUMENTS) if inner is not None else None
    return Checkpoint(
        place,
        {name: _as_array(name, tensor) for name, tensor in state.items()},
        config={} if found is None else found.config,
        preprocessing={} if found is None else found.preprocessing,
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        left_out=tuple(map(str, others)),
    )


def _as_array(name: str, tensor: Tensor) -> NDArray[Any]:
    """Convert a tensor to NumPy; floating-point ones to at least float32."""
    try:
        dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        return np.asarray(tensor.detach().cpu().to(dtype).numpy())
    except Exception as error:  # of meta, sparse and quantized tensors
        raise ValueError(f"source: expected a dense tensor {shown(name)}, got {one_line(error)}") from None

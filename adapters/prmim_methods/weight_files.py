"""What files of weights have in common, whichever framework writes and reads them."""

import json
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prmim_methods.messages import shown

METADATA_KEY = "prmim_architecture"
"""Where a file's metadata holds the JSON of the method's ``architecture()``."""


MOST_NAMED = 3
"""Most names of tensors that a message lists."""

RENAMED_FIELDS = {"variant": "reconstruction"}
"""Fields of files that earlier versions wrote, by their names of today."""


def architecture_of(method: object) -> dict[str, Any]:
    """Return what the weights of a method mean, as it says itself; TypeError if it is no method."""
    architecture = getattr(method, "architecture", None)
    if not callable(architecture):
        raise TypeError(f"method: expected a module with architecture(), got {type(method).__name__}")
    values: dict[str, Any] = architecture()
    return values


def dump_architecture(method: object) -> dict[str, str]:
    """Return the metadata of the file of a method."""
    # Tensors are laid out as PyTorch has them, and readers for PyTorch ask for this word.
    return {"format": "pt", METADATA_KEY: json.dumps(architecture_of(method))}


def check_metadata(method: object, metadata: Mapping[str, str] | None, path: str | os.PathLike[str]) -> None:
    """Raise ValueError, naming the first field that differs, unless a file holds weights of the method's architecture.

    Parameters
    ----------
    method
        What the weights are for.
    metadata
        That of the file.
    path
        The file, for messages.
    """
    try:
        got = json.loads((metadata or {})[METADATA_KEY])
        got = {RENAMED_FIELDS.get(field, field): value for field, value in got.items()}
    except (AttributeError, KeyError, ValueError, RecursionError):
        got = None
    if not isinstance(got, dict):
        raise ValueError(f"path: expected weights written by prmim, got {os.fspath(path)}, whose metadata has none")
    expected = architecture_of(method)
    for field in (*expected, *got):
        ours, theirs = expected.get(field), got.get(field)
        if ours != theirs:
            hint = ""
            if field == "cells" and theirs is None:  # also files from before that option
                hint = "; weights without cells need thrown_target: patch and extra_cells: none"
            if field == "cells" and ours is None:
                hint = "; weights with cells need thrown_target: cells, or extra_cells"
            if (ours, theirs) == ("relative_per_block", "relative"):
                hint = "; earlier versions fine-tuned one bias table for all blocks"
            raise ValueError(f"weights: {shown(field)[1:-1]}: expected {shown(ours)}, got {shown(theirs)}{hint}")


def official_name(name: str) -> str | None:
    """Return the name of a weight in the state dicts of MAE's and Pixio's code; None for parts that they do not have.

    The encoder has the names of timm's ViT; names of the decoder begin with ``decoder_``, but for the mask token.

    Examples
    --------
    >>> names = ("encoder.blocks.0.attn.qkv.bias", "decoder.norm.bias", "decoder.mask_token", "cell_head.bias")
    >>> [official_name(name) for name in names]
    ['blocks.0.attn.qkv.bias', 'decoder_norm.bias', 'mask_token', None]
    """
    part, _, rest = name.partition(".")
    if part == "decoder" and rest != "mask_token":
        return f"decoder_{rest}"
    return rest if part in ("encoder", "decoder") else None


def official_names(expected: Collection[str], got: Collection[str]) -> dict[str, str]:
    """Return the official name of each weight of a method that an official state dict sets.

    Parameters
    ----------
    expected
        Names of the weights of the method.
    got
        Names of the tensors of the state dict. Those of the decoder may be missing, all of them.

    Raises
    ------
    ValueError
        If the names are of another layout.
    """
    if "patch_embed.proj.weight" not in got:
        listed = ", ".join(map(shown, sorted(got)[:MOST_NAMED])) or "none"
        raise ValueError(
            "weights: expected the names of MAE's and Pixio's code, such as 'patch_embed.proj.weight', got " + listed
        )
    has_decoder = any(name.startswith("decoder_") for name in got)
    parts = ("encoder.", "decoder.") if has_decoder else ("encoder.",)
    names = {name: official_name(name) for name in expected if name.startswith(parts)}
    return {name: official for name, official in names.items() if official is not None}


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[tuple[int, ...], str, bool]],
    path: str | os.PathLike[str],
) -> None:
    """Raise ValueError unless a file holds exactly the tensors that are expected.

    Parameters
    ----------
    expected
        Shapes by name.
    got
        Shape, name of the dtype, and whether that is one of floating-point numbers, by name.
    path
        The file, for messages.
    """
    place = os.fspath(path)
    for name, shape in expected.items():
        if name not in got:
            raise ValueError(f"path: expected a tensor {name!r}, got none in {place}")
        got_shape, dtype, is_floating = got[name]
        if got_shape != shape:
            raise ValueError(f"path: {name}: expected shape {shape}, got {shown(got_shape)} in {place}")
        if not is_floating:
            raise ValueError(f"path: {name}: expected floating-point values, got {dtype} in {place}")
    for name in got:
        if name not in expected:
            raise ValueError(f"path: expected no tensor {shown(name)}, got one in {place}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: ``write`` fills a temporary file, which is flushed to disk and then renamed.

    A killed process can leave the temporary file behind, in the same folder. Its name has the form
    ``.NAME.partial-XXXXXXXX``.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

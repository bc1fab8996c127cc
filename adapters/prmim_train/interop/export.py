"""Export of a run's weights to transformers, timm, safetensors or PyTorch."""

import importlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from prmim_methods.architecture import MASK_TOKEN
from prmim_methods.encoder import EncoderOptions
from prmim_methods.export import (
    FORMATS,
    exported_config,
    preprocessor_options,
    timm_model,
    timm_weights,
    transformers_model,
)
from prmim_methods.files import expanded
from prmim_methods.layouts import Layout, left_out, to_library
from prmim_methods.messages import shown
from prmim_methods.weight_files import WEIGHTS_FILE, dump_architecture, write_atomically
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import check_backend
from prmim_train.run.files import delete, flush_tree
from prmim_train.run.manifest import step_of
from prmim_train.run.prepare import file_architecture, find_checkpoint, read_run_config

__all__ = ["Weights", "export_command", "read_weights"]

Arrays = Mapping[str, NDArray[Any]]
PYTORCH = {"format": "pt"}
"""Metadata that transformers and timm expect: tensors have the layout of PyTorch."""


class Weights(NamedTuple):
    """Weights to export.

    Parameters
    ----------
    config
        Options of the method, or of the encoder alone.
    path
        The file.
    title
        Description for the user.
    """

    config: EncoderOptions
    path: Path
    title: str


def read_weights(run: str, checkpoint: int | None = None) -> Weights:
    """Find the weights of a run, or read the metadata of a file of weights.

    Parameters
    ----------
    run
        Folder of the run, or a file of weights.
    checkpoint
        Step of the run's checkpoint. None: the newest good checkpoint.

    Raises
    ------
    FileNotFoundError, OSError, ValueError
        See `prmim_train.run.prepare.find_checkpoint`. Also if prmim did not write the file.
    """
    path = expanded(run)
    if path.is_file():
        config = exported_config(file_architecture(path, checkpoint))
        _check_encoder(config, path)
        return Weights(config, path, f"Weights of {path}")
    directory = RunDirectory.open(path)
    method = read_run_config(directory).method
    found = find_checkpoint(directory, checkpoint)
    return Weights(method, found / WEIGHTS_FILE, f"Checkpoint of step {step_of(found)}")


def export_command(run: str, to: str, out: str, *, checkpoint: int | None = None, encoder_only: bool = False) -> None:
    """Export the weights of a run, and print how to load them.

    Parameters
    ----------
    run
        Folder of the run, or a file of weights.
    to
        A key of `prmim_methods.export.FORMATS`.
    out
        The file, or the folder for `hf`. Must not exist.
    checkpoint
        Step of the checkpoint. None: the newest good checkpoint.
    encoder_only
        Whether to leave out the decoder. Only `hf` and `safetensors` can hold a decoder.

    Raises
    ------
    ValueError
        If the format is unknown, or cannot hold the model.
    FileExistsError
        If something exists at `out`.
    FileNotFoundError, OSError
        If there is no run or no checkpoint, or the file cannot be written.
    """
    if to not in WRITERS:
        raise ValueError(f"to: expected one of {', '.join(WRITERS)}, got {shown(to)}")
    place = Path(out)
    if place.exists() or place.is_symlink():
        raise FileExistsError(f"out: expected a path where nothing exists, got {out}")
    weights = read_weights(run, checkpoint)
    lines = WRITERS[to](weights, place, encoder_only)
    print("\n".join([f"{weights.title}, {FORMATS[to]}: {place}", *lines]))


def _write_transformers(weights: Weights, out: Path, encoder_only: bool) -> list[str]:
    model = transformers_model(weights.config, encoder_only=encoder_only)
    arrays = load_file(weights.path)
    files = {
        "config.json": _json(model.options),
        "preprocessor_config.json": _json(preprocessor_options(weights.config)),
        "model.safetensors": _tensors(to_library(arrays, model.layout), PYTORCH),
    }
    _write_folder(out, files)
    more = ", add_pooling_layer=False" if model.name == "ViTModel" else ""
    return [
        *_left_out(arrays, model.layout),
        *_range_of(weights.config, "clip values to [{low:g}, {high:g}] before the image processor"),
        "Load:",
        f"  transformers.{model.name}.from_pretrained({str(out)!r}{more})",
    ]


def _write_timm(weights: Weights, out: Path, encoder_only: bool) -> list[str]:
    model = timm_model(weights.config)
    arrays = load_file(weights.path)
    _write_file(out, _tensors(timm_weights(arrays, model.layout), PYTORCH))
    options = "".join(f",\n      {name}={value!r}" for name, value in model.options.items())
    return [
        *_left_out(arrays, model.layout),
        *_range_of(weights.config, "map [{low:g}, {high:g}] to [0, 1] and clip, before mean and standard deviation"),
        "Load:",
        f"  model = timm.create_model(\n      {model.name!r}{options},\n  )",
        f"  model.load_state_dict(safetensors.torch.load_file({str(out)!r}))",
    ]


def _write_ours(weights: Weights, out: Path, encoder_only: bool) -> list[str]:
    if not encoder_only:
        _write_file(out, weights.path.read_bytes())
        return [f"Load: prmim_torch.load_encoder({str(out)!r}), or prmim pretrain --init_weights {out}"]
    arrays = {name: array for name, array in load_file(weights.path).items() if _is_of_encoder(name)}
    _write_file(out, _tensors(arrays, dump_architecture(weights.config.encoder_config())))
    return [f"Load: prmim_torch.load_encoder({str(out)!r})"]


def _write_program(weights: Weights, out: Path, encoder_only: bool) -> list[str]:
    check_backend("torch")
    torch = importlib.import_module("prmim_torch")
    program = importlib.import_module("prmim_torch.program")
    out.parent.mkdir(parents=True, exist_ok=True)
    program.save_program(torch.load_encoder(weights.path), out)
    config = weights.config
    shape = ", ".join(map(str, (*config.image_size, config.channels)))
    return [
        f"Load: torch.export.load({str(out)!r}).module()",
        f"Call: {config.image_dtypes[-1]} (batch, {shape}) to features (batch, {config.encoder_size.dim})",
    ]


Writer = Callable[[Weights, Path, bool], list[str]]
WRITERS: dict[str, Writer] = {
    "hf": _write_transformers,
    "timm": _write_timm,
    "safetensors": _write_ours,
    "torch.export": _write_program,
}


def _left_out(arrays: Arrays, layout: Layout) -> list[str]:
    """Describe the weights that the other library lacks, by part or by name."""
    lost = set(left_out(arrays, layout))
    kept = {name.partition(".")[0] for name in arrays if name not in lost}
    parts = {name: name.partition(".")[0] for name in lost}
    listed = {name if part in kept else part for name, part in parts.items()}
    return [f"Left out: {', '.join(sorted(listed))}"] if listed else []


def _range_of(config: EncoderOptions, rule: str) -> list[str]:
    """Tell what the user must do for a `pixel_range`: the other libraries do not clip."""
    if config.pixel_range is None:
        return []
    low, high = config.pixel_range
    return [f"Images: {rule.format(low=low, high=high)}"]


def _check_encoder(config: EncoderOptions, path: Path) -> None:
    """Raise ValueError if an encoder's size in a file contradicts its metadata."""
    expected = config.encoder_config().parameters()
    got = sum(array.size for name, array in load_file(path).items() if _is_of_encoder(name))
    if got != expected.learned + expected.fixed:
        raise ValueError(
            f"run: expected an encoder of {expected.learned + expected.fixed:,} values, got {got:,} in {path}"
        )


def _is_of_encoder(name: str) -> bool:
    """Whether a weight is part of an encoder-only file.

    See `prmim_torch.load_encoder`.
    """
    return name.startswith("encoder.") and name != MASK_TOKEN


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _tensors(arrays: Arrays, metadata: dict[str, str]) -> bytes:
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata)


def _write_file(out: Path, content: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write(content))


def _write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder atomically.

    It is written under a temporary name, flushed to disk, and renamed.
    """
    beside = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    beside.mkdir(parents=True)
    try:
        for name, content in files.items():
            (beside / name).write_bytes(content)
        flush_tree(beside)
        beside.rename(out)
    finally:
        delete(beside)

"""Reading and writing ``.safetensors`` files, which both adapters share."""

import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

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


def save_weights(method: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write parameters and persistent buffers to a ``.safetensors`` file, atomically.

    A teacher's are left out.

    Parameters
    ----------
    method
        A module with a method ``architecture() -> dict`` of plain values, which becomes the file's metadata.
    path
        The file.
    """
    write_weights(named_weights(method), dump_architecture(method), path)


def load_weights(method: nn.Module, path: str | os.PathLike[str], *, resize: bool = False) -> None:
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


def named_weights(method: nn.Module) -> dict[str, Tensor]:
    """Return a method's weights by name, as in files, without a teacher's."""
    return dict(method.state_dict())


def write_weights(weights: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write weights, named as by :func:`named_weights`, and metadata, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def put_weights(method: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights, named as by :func:`named_weights`, into a method."""
    method.load_state_dict(weights, strict=False)  # a start from other weights may have only some


def read_weights(method: nn.Module, path: str | os.PathLike[str], *, resize: bool = False) -> dict[str, Tensor]:
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
) -> tuple[EncoderConfig, dict[str, Tensor]]:
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
    number, wanted = sum(array.numel() for array in tensors.values()), source.parameters()
    if wanted.learned + wanted.fixed > number:  # before a model of this size is built
        raise ValueError(f"path: expected the weights of an encoder, got {number:,} values in {os.fspath(path)}")
    config = source.encoder_config(image_size)
    return config, fit_encoder(config, got, tensors)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """Return metadata and tensors of a ``.safetensors`` file; ValueError otherwise."""
    try:
        open_regular(path).close()  # safe_open would block on a pipe
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({one_line(error)})") from None


def check_fit(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Validate a file's tensors: floating-point, with the expected names and shapes."""
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: (tuple(t.shape), str(t.dtype), t.is_floating_point()) for name, t in got.items()},
        path,
    )

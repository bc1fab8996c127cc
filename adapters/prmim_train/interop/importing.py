"""The command `prmim import`."""

from pathlib import Path

from prmim_methods.checkpoints import find_checkpoint
from prmim_methods.hub import SAFETENSORS
from prmim_train.run.engine import check_backend, import_backend
from prmim_train.run.processes import say

__all__ = ["import_command"]


def import_command(
    source: str,
    out: str,
    *,
    backend: str = "torch",
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, ...] | None = None,
    norm_pix: bool | None = None,
    encoder_only: bool = False,
) -> None:
    """Convert weights of other code to a file of prmim, and print a description.

    Parameters
    ----------
    source
        File or folder of the weights, or the folder of a run.
    out
        The `.safetensors` file to write. Must not exist.
    backend
        Framework that reads the source: `torch`, or `jax` for safetensors.
    num_heads, decoder_heads, image_size, norm_pix, encoder_only
        See `prmim_torch.import_weights`.

    Raises
    ------
    FileExistsError
        If something exists at `out`.
    FileNotFoundError, ImportError, ValueError
        If the backend is not installed, or the source is not a checkpoint of a known format. Nothing is written.
    """
    path = Path(out)
    if path.suffix != SAFETENSORS:
        raise ValueError(f"out: expected the name of a {SAFETENSORS} file, got {out}")
    if path.exists():
        raise FileExistsError(f"out: {out} exists already; name another file")
    check_backend(backend)
    find_checkpoint(source)  # report a wrong source before importing a framework
    found = import_backend(backend).import_weights(
        source,
        path,
        num_heads=num_heads,
        decoder_heads=decoder_heads,
        image_size=image_size,
        norm_pix=norm_pix,
        encoder_only=encoder_only,
    )
    for line in found.describe():
        say(line)
    say(f"Written: {out}")

"""Export of trained encoders to ``torch.export`` programs.

The programs run without prmim.
"""

import os

import torch
from torch.export import Dim, export, save

from prmim_methods.weight_files import write_atomically
from prmim_torch.encoder import ImageEncoder


def save_program(encoder: ImageEncoder, path: str | os.PathLike[str]) -> None:
    """Write an encoder as a program from images to mean patch tokens, atomically.

    Parameters
    ----------
    encoder
        The encoder, in evaluation mode.
    path
        The file, ``.pt2``.

    Notes
    -----
    ``torch.export.load(path).module()`` maps images (batch, image_size..., channels) of any batch size to features
    (batch, dim). They are uint8, or float32 for an encoder with a ``pixel_range``. It normalizes the pixels.
    """
    config = encoder.config
    device = encoder.encoder.patch_embed.proj.bias.device
    dtype = getattr(torch, config.image_dtypes[-1])
    images = torch.zeros(2, *config.image_size, config.channels, dtype=dtype, device=device)
    program = export(encoder, (images,), dynamic_shapes=({0: Dim("batch")},))
    write_atomically(path, lambda file: save(program, file))

"""Methods by name."""

from typing import Any

from prmim_methods import create_config
from prmim_torch.localmim import LocalMIM
from prmim_torch.mae import MAE
from prmim_torch.maskalign import MaskAlign
from prmim_torch.method import Method
from prmim_torch.simmim import SimMIM
from prmim_torch.videomae import VideoMAE

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "simmim": SimMIM,
    "maskalign": MaskAlign,
    "localmim": LocalMIM,
    "videomae": VideoMAE,
}
"""The class of each method, built from its record, for example ``MAE(MAEConfig())``."""


def create_method(name: str, **options: Any) -> Method:
    """Create a method: a module from (images, noise) to an output with a ``loss``.

    Parameters
    ----------
    name
        A key of :data:`METHODS`.
    **options
        Options of the method's record, see :func:`prmim_methods.create_config`; None: the default.

    Examples
    --------
    >>> method = create_method("mae", model="vit_tiny", image_size=(32, 32), patch_size=(8, 8))
    >>> method.config.counts
    TokenCounts(visible=4, decoded=4, thrown=8)
    """
    config = create_config(name, **options)
    return METHODS[config.name](config)

"""Methods by name."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from prmim_jax.localmim import LocalMIM
from prmim_jax.mae import MAE
from prmim_jax.maskalign import MaskAlign
from prmim_jax.method import Method
from prmim_jax.simmim import SimMIM
from prmim_jax.videomae import VideoMAE
from prmim_methods import create_config

METHODS: dict[str, Callable[..., Method]] = {
    "mae": MAE,
    "simmim": SimMIM,
    "maskalign": MaskAlign,
    "localmim": LocalMIM,
    "videomae": VideoMAE,
}
"""The class of each method, built from its record, for example ``MAE(MAEConfig())``."""


def create_method(name: str, *, rngs: nnx.Rngs | None = None, **options: Any) -> Method:
    """Create a method: a module from (images, noise) to an output with a ``loss``.

    Parameters
    ----------
    name
        A key of :data:`METHODS`.
    rngs
        Source of the initial weights; None: seeded with the option ``init_seed``.
    **options
        Options of the method's record, see :func:`prmim_methods.create_config`; None: the default.

    Examples
    --------
    >>> method = create_method("mae", model="vit_tiny", image_size=(32, 32), patch_size=(8, 8))
    >>> method.config.counts
    TokenCounts(visible=4, decoded=4, thrown=8)
    """
    config = create_config(name, **options)
    return METHODS[config.name](config, rngs=rngs)

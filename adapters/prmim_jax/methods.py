"""Methods by name."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from flax import nnx

from prmim_jax.mae import MAE
from prmim_jax.maskalign import MaskAlign
from prmim_jax.method import Method
from prmim_jax.simmim import SimMIM

METHODS: dict[str, Callable[..., Method]] = {"mae": MAE, "simmim": SimMIM, "maskalign": MaskAlign}
"""Builders of methods by name; each takes the keywords of :func:`create_method`, and options of its own."""


def create_method(
    name: str,
    *,
    model: str = "vit_base",
    image_size: Sequence[int] = (224, 224),
    patch_size: Sequence[int] = (16, 16),
    channels: int = 3,
    mask_ratio: float | None = None,
    throw_ratio: float | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Method:
    """Build a method: a module that maps (images, noise) to an output with a ``loss``.

    Parameters
    ----------
    name
        A key of :data:`METHODS`.
    model
        Name of the encoder.
    image_size, patch_size
        Pixels along each axis.
    channels
        Channels of the image.
    mask_ratio
        Fraction of the tokens that is masked; None: the method's own.
    throw_ratio
        Fraction of **all** tokens that is thrown; None: the method's own.
    rngs
        Source of the initial weights; None: the method's option ``init_seed``.
    **options
        Options of the method: see :class:`prmim_jax.MAE`, :class:`prmim_jax.SimMIM` and
        :class:`prmim_jax.MaskAlign`.

    Returns
    -------
    Method

    Raises
    ------
    TypeError
        If the method has no such option, or an option is of the wrong type.
    ValueError
        If the method is not known, or an option is out of range.

    Examples
    --------
    >>> method = create_method("mae", model="vit_tiny", image_size=(32, 32), patch_size=(8, 8))
    >>> method.counts
    TokenCounts(visible=4, decoded=4, thrown=8)
    """
    if name not in METHODS:
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {name!r}")
    build = METHODS[name]
    # Of a class: flax hides the signature of the constructor behind its metaclass.
    takes = signature(vars(build).get("__init__", build)).parameters
    known = [argument for argument in takes if argument != "self"]
    for option in options:
        if option not in known:
            raise TypeError(f"options: {name!r} has no option {option!r}, only {', '.join(known)}")
    return build(
        model=model,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        mask_ratio=mask_ratio,
        throw_ratio=throw_ratio,
        rngs=rngs,
        **options,
    )

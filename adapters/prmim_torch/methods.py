"""Methods by name."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from prmim_torch.mae import MAE
from prmim_torch.maskalign import MaskAlign
from prmim_torch.method import Method
from prmim_torch.simmim import SimMIM

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
    **options
        Options of the method: see :class:`prmim_torch.MAE`, :class:`prmim_torch.SimMIM` and
        :class:`prmim_torch.MaskAlign`.

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
    known = signature(build).parameters
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
        **options,
    )

"""Methods by name."""

from typing import Any

from prmim_methods.localmim import LocalMIMConfig
from prmim_methods.mae import MAEConfig
from prmim_methods.maskalign import MaskAlignConfig
from prmim_methods.method import MethodConfig
from prmim_methods.record import Option, Rule, options
from prmim_methods.simmim import SimMIMConfig
from prmim_methods.videomae import VideoMAEConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.name: config for config in (MAEConfig, SimMIMConfig, MaskAlignConfig, LocalMIMConfig, VideoMAEConfig)
}
"""The record of each method."""

METHOD_OPTION = Option(
    "method",
    str,
    MAEConfig.name,
    Rule(help="The method.", choices={name: config.title for name, config in METHODS.items()}),
)
"""The option for the method's name."""


def create_config(name: str, **given: Any) -> MethodConfig:
    """Return the record of a method.

    Parameters
    ----------
    name
        A key of :data:`METHODS`.
    **given
        Options of the method; None stands for the default.

    Raises
    ------
    TypeError
        If an option has the wrong type.
    ValueError
        If the method or an option is unknown, a value is not allowed, or the options do not fit together.

    Examples
    --------
    >>> create_config("mae", image_size=(32, 32), patch_size=(8, 8)).counts
    TokenCounts(visible=4, decoded=4, thrown=8)
    >>> create_config("simmim", decoder_dim=256)
    Traceback (most recent call last):
    ...
    ValueError: decoder_dim: method simmim has no such option
    """
    record = METHODS[METHOD_OPTION.check(name)]
    known = {item.name for item in options(record)}
    for option in given:
        if option not in known:
            raise ValueError(f"{option}: method {name} has no such option")
    return record(**{option: value for option, value in given.items() if value is not None})

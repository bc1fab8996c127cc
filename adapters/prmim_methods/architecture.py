"""Records of methods and encoders from the metadata of weight files."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prmim_core._arrays import Array
from prmim_methods.encoder import EncoderConfig
from prmim_methods.messages import shown
from prmim_methods.method import MethodConfig
from prmim_methods.methods import METHODS, create_config
from prmim_methods.positions import fit_positions
from prmim_methods.record import options
from prmim_methods.weight_files import check_architecture

Made = TypeVar("Made")

ENCODER = "encoder."
"""Prefix of the names of an encoder's weights."""
MASK_TOKEN = "encoder.mask_token"
"""A weight of SimMIM's encoder that whole images do not need."""


def config_of(architecture: Mapping[str, Any], **more: Any) -> MethodConfig:
    """Return the record of a method from the architecture of its weights.

    Parameters
    ----------
    architecture
        Result of :meth:`MethodConfig.architecture`, as in the metadata of a weight file.
    **more
        Options that the architecture does not define, such as ratios or MaskAlign's teacher; others have their
        defaults.

    Returns
    -------
    MethodConfig
        ``config.architecture()`` equals ``architecture``.

    Raises
    ------
    ValueError
        If the architecture is not a method's, or contradicts an option.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> config_of(MAEConfig(model="vit_small").architecture(), mask_ratio=0.6).encoder_size
    Transformer(dim=384, depth=12, heads=6, mlp_ratio=4)
    """
    name = _method_of(architecture)
    if name is None:
        raise ValueError("architecture: expected that of a method, got that of an encoder alone")
    config = _made(lambda: create_config(name, **{**METHODS[name].options_of(architecture), **more}))
    check_architecture(config.architecture(), architecture)
    return config


def encoder_of(architecture: Mapping[str, Any], image_size: int | tuple[int, ...] | None = None) -> EncoderConfig:
    """Return the record of the encoder in a weight file.

    Parameters
    ----------
    architecture
        Result of :meth:`MethodConfig.architecture`, or of :meth:`EncoderConfig.architecture` for an encoder alone.
    image_size
        Size of the images in place of the file's; one number for two equal sides.

    Raises
    ------
    ValueError
        If the architecture is of another kind, or the patches do not divide the images.

    Examples
    --------
    >>> from prmim_methods import SimMIMConfig
    >>> encoder = encoder_of(SimMIMConfig(model="vit_small").architecture(), image_size=(448, 448))
    >>> encoder.grid.shape, encoder.position, encoder.layer_scale is None
    ((28, 28), 'relative', False)
    """
    name = _method_of(architecture)
    found = _made(lambda: EncoderConfig.options_of(architecture))
    if name is not None:
        # The method determines whether there is LayerScale, not the file.
        has_scale = any(item.name == "layer_scale" for item in options(METHODS[name]))
        found["layer_scale"] = 1.0 if has_scale else None
    config = _made(lambda: EncoderConfig(**found))
    if name is None:
        check_architecture(config.architecture(), architecture)
    return config if image_size is None else config.encoder_config(image_size)


def fit_method(expected: Mapping[str, Any], got: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Array]:
    """Fit weights to a method of the same architecture.

    The image size may differ.

    Parameters
    ----------
    expected, got
        Architecture of the method and of the file.
    weights
        Arrays of the file, by name.

    Raises
    ------
    ValueError
        If anything but the size of the images differs.
    """
    if expected.get("image_size") == got.get("image_size"):
        check_architecture(expected, got)
        return dict(weights)
    check_architecture({**expected, "image_size": got.get("image_size")}, got)
    return fit_positions(weights, encoder_of(got), encoder_of(expected))


def fit_encoder(config: EncoderConfig, got: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Array]:
    """Fit the encoder weights of a file to a record, possibly of another image size.

    Parameters
    ----------
    config
        The record of the wanted encoder.
    got
        Architecture of the file, of a method or of an encoder alone.
    weights
        Arrays of the file, by name.

    Returns
    -------
    dict
        Arrays by name; all names begin with ``encoder.``.

    Raises
    ------
    ValueError
        If anything but the size of the images differs from the record.
    """
    source = encoder_of(got)
    check_architecture({**config.architecture(), "image_size": list(source.image_size)}, source.architecture())
    own = {name: array for name, array in weights.items() if name.startswith(ENCODER) and name != MASK_TOKEN}
    return fit_positions(own, source, config)


def _method_of(architecture: Mapping[str, Any]) -> str | None:
    """Return the name of the method; None for an encoder alone."""
    if "kind" in architecture:
        raise ValueError(f"architecture: expected that of a method or an encoder, got a {architecture['kind']}")
    name = architecture.get("method")
    if name is not None and (not isinstance(name, str) or name not in METHODS):
        raise ValueError(f"architecture: expected the method {', '.join(METHODS)}, got {shown(name)}")
    return name


def _made(make: Callable[[], Made]) -> Made:
    """Call a function that reads an architecture; report bad fields in one line."""
    try:
        return make()
    except KeyError as error:
        raise ValueError(f"architecture: expected the field {error}, got none") from None
    except TypeError as error:
        raise ValueError(f"architecture: {error}") from None

"""From the metadata of a file of weights back to the record of its method, or of its encoder."""

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
"""How the names of the weights of an encoder begin."""
MASK_TOKEN = "encoder.mask_token"
"""A weight that SimMIM's encoder has besides, and whole images do not need."""


def config_of(architecture: Mapping[str, Any], **more: Any) -> MethodConfig:
    """Return the record of a method whose weights have an architecture.

    Parameters
    ----------
    architecture
        What :meth:`MethodConfig.architecture` returned, as in the metadata of a file of weights.
    **more
        Options that the architecture does not tell, such as ratios, or the folder of a teacher, which MaskAlign needs.
        Options that neither tells have their defaults.

    Returns
    -------
    MethodConfig
        ``config.architecture()`` equals ``architecture``.

    Raises
    ------
    ValueError
        If the architecture is not that of a method, or contradicts an option.

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
    """Return the record of the encoder in a file of weights.

    Parameters
    ----------
    architecture
        What :meth:`MethodConfig.architecture` returned, or :meth:`EncoderConfig.architecture` for an encoder alone.
    image_size
        Size of the images in place of the file's; one number for two equal sides.

    Raises
    ------
    ValueError
        If the architecture is neither, or the patches do not divide the images.

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
        # Whether there is LayerScale is a fact of the method, not of the file.
        has_scale = any(item.name == "layer_scale" for item in options(METHODS[name]))
        found["layer_scale"] = 1.0 if has_scale else None
    config = _made(lambda: EncoderConfig(**found))
    if name is None:
        check_architecture(config.architecture(), architecture)
    return config if image_size is None else config.encoder_config(image_size)


def fit_method(expected: Mapping[str, Any], got: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return weights on the grid of a method of the same architecture, whose images may have another size.

    Parameters
    ----------
    expected, got
        Architecture of the method, and that of the file.
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
    """Return the weights of the encoder in a file, on the grid of a record of images of any size.

    Parameters
    ----------
    config
        The record of the encoder that is wanted.
    got
        Architecture of the file: that of a method, or of an encoder alone.
    weights
        Arrays of the file, by name.

    Returns
    -------
    dict
        Arrays by name, all of which begin with ``encoder.``.

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
    """Return the name of the method, if any."""
    if "kind" in architecture:
        raise ValueError(f"architecture: expected that of a method or an encoder, got a {architecture['kind']}")
    name = architecture.get("method")
    if name is not None and (not isinstance(name, str) or name not in METHODS):
        raise ValueError(f"architecture: expected the method {', '.join(METHODS)}, got {shown(name)}")
    return name


def _made(make: Callable[[], Made]) -> Made:
    """Call a function that reads an architecture; one line if a field is missing or of another type."""
    try:
        return make()
    except KeyError as error:
        raise ValueError(f"architecture: expected the field {error}, got none") from None
    except TypeError as error:
        raise ValueError(f"architecture: {error}") from None

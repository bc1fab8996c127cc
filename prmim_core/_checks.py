"""Argument checks that several public functions share. Every message names the argument, what it expected and got."""

from typing import Any, get_args

from prmim_core._arrays import Array, Namespace, array_namespace
from prmim_core.grid import Grid


def check_integer(name: str, value: object, minimum: int | None = None) -> None:
    """Raise TypeError unless ``value`` is a Python integer, and ValueError if it is below ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_count(name: str, value: int, maximum: int) -> None:
    """Raise ValueError unless ``value`` lies in [0, maximum]."""
    if not 0 <= value <= maximum:
        raise ValueError(f"{name}: expected 0 to {maximum}, got {value}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless ``value`` is a member of the ``Literal`` type."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")


def check_noise(noise: Array, num_tokens: int | None = None) -> None:
    """Raise ValueError unless ``noise`` has shape (batch, num_tokens); None accepts any number of tokens."""
    if noise.ndim != 2 or num_tokens not in (None, noise.shape[1]):
        length = "N" if num_tokens is None else num_tokens
        raise ValueError(f"noise: expected shape (batch, {length}), got {tuple(noise.shape)}")


def check_integers(xp: Namespace, name: str, array: Array) -> None:
    """Raise TypeError unless the array holds integers."""
    if not xp.isdtype(array.dtype, "integral"):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")


def check_mask(xp: Namespace, name: str, mask: Array, noise: Array) -> None:
    """Raise TypeError unless the mask is bool, and ValueError unless it has the shape of ``noise``."""
    if mask.dtype != xp.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}")
    _check_shape_of_noise(name, mask, noise)


def check_weights(xp: Namespace, noise: Array, weights: Array) -> None:
    """Check noise and weights of a weighted draw: int32 noise, and one weight per token."""
    if noise.dtype != xp.int32:
        raise TypeError(f"noise: expected int32, got {noise.dtype}")
    _check_shape_of_noise("weights", weights, noise)


def check_positions(positions: Grid | Array) -> int:
    """Return the number of tokens; raise unless ``positions`` is a grid or an integer array (N, axes)."""
    if isinstance(positions, Grid):
        return positions.num_tokens
    if positions.ndim != 2:
        raise ValueError(f"positions: expected a Grid or shape (N, axes), got shape {tuple(positions.shape)}")
    check_integers(array_namespace(positions), "positions", positions)
    return int(positions.shape[0])


def _check_shape_of_noise(name: str, array: Array, noise: Array) -> None:
    if tuple(array.shape) != tuple(noise.shape):
        raise ValueError(f"{name}: expected the shape of noise, {tuple(noise.shape)}, got {tuple(array.shape)}")

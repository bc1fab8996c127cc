"""Argument checks shared by public functions. Messages: argument, expected, got.

Values are checked where :func:`prmim_core._arrays.on_host` can read them. Elsewhere no check waits for a device.
"""

import reprlib
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from prmim_core._arrays import Array, Namespace, array_namespace, on_host
from prmim_core.grid import Grid


def shown(value: object) -> str:
    """Format a value for a message, on one line of bounded length."""
    return " ".join(reprlib.repr(value).split())


def check_integer(name: str, value: object, minimum: int | None = None) -> int:
    """Return an integer as an int; TypeError otherwise, ValueError below ``minimum``."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {shown(value)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return int(value)


def check_count(name: str, value: object, maximum: int) -> None:
    """Validate an integer (TypeError) in [0, maximum] (ValueError)."""
    if not 0 <= check_integer(name, value) <= maximum:
        raise ValueError(f"{name}: expected 0 to {maximum}, got {value}")


def check_choice(name: str, value: object, choices: Any, other: str = "") -> None:
    """Raise ValueError unless a ``Literal`` type has the value; ``other``: more text."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}{other}, got {shown(value)}")


def check_type(name: str, value: object, expected: type) -> None:
    """Raise TypeError unless ``value`` is an instance of the class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected a {expected.__name__}, got {type(value).__name__}")


def check_arrays(**arrays: Array) -> Namespace:
    """Return the namespace of arrays; TypeError unless all are of one library."""
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{name}: expected an array, got {type(array).__name__}")
    return array_namespace(*arrays.values())


def check_noise(noise: Array, num_tokens: int | None = None) -> None:
    """Raise unless noise is real, (batch, num_tokens); None: any number of tokens."""
    xp = array_namespace(noise)
    # != instead of "in": PyTorch's compiler does not find a dynamic size in a tuple.
    if noise.ndim != 2 or (num_tokens is not None and noise.shape[1] != num_tokens):
        length = "N" if num_tokens is None else num_tokens
        raise ValueError(f"noise: expected shape (batch, {length}), got {tuple(noise.shape)}")
    if not xp.isdtype(noise.dtype, ("integral", "real floating")):
        raise TypeError(f"noise: expected integers or real numbers, got {noise.dtype}")
    _check_not_nan("noise", noise)


def check_integers(xp: Namespace, name: str, array: Array) -> None:
    """Raise TypeError unless the array holds integers."""
    if not xp.isdtype(array.dtype, "integral"):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")


def check_index(xp: Namespace, name: str, index: Array) -> None:
    """Raise TypeError unless an array holds integers.

    For masks, the message suggests a conversion.
    """
    if index.dtype == xp.bool:
        how = "(~mask).argsort(1)[:, :n] are the n tokens where it is True"
        raise TypeError(f"{name}: expected token indices, got a boolean mask; {how}")
    check_integers(xp, name, index)


def check_tokens(xp: Namespace, name: str, index: Array, num_tokens: int) -> None:
    """Validate token indices: integers (TypeError) in [0, num_tokens) (IndexError)."""
    check_index(xp, name, index)
    values = on_host(index)
    if values is None or values.size == 0:
        return
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= num_tokens:
        raise IndexError(f"{name}: expected tokens in [0, {num_tokens}), got values from {least} to {most}")


def check_mask(xp: Namespace, name: str, mask: Array, noise: Array) -> None:
    """Validate a mask: bool (TypeError), the shape of ``noise`` (ValueError)."""
    if mask.dtype != xp.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}")
    _check_shape_of_noise(name, mask, noise)


def check_weights(xp: Namespace, noise: Array, weights: Array) -> None:
    """Validate a weighted draw: int32 noise, one weight per token, no NaN."""
    if noise.dtype != xp.int32:
        raise TypeError(f"noise: expected int32, got {noise.dtype}")
    _check_shape_of_noise("weights", weights, noise)
    _check_not_nan("weights", weights)


def check_positions(positions: Grid | Array) -> int:
    """Return the number of tokens of a grid, or of an int array (N, axes).

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(positions, Grid):
        return positions.num_tokens
    if not hasattr(positions, "dtype"):
        raise TypeError(f"positions: expected a Grid or an array (N, axes), got {type(positions).__name__}")
    if positions.ndim != 2:
        raise ValueError(f"positions: expected a Grid or shape (N, axes), got shape {tuple(positions.shape)}")
    check_integers(array_namespace(positions), "positions", positions)
    if isinstance(positions, np.ndarray) and squared_diagonal(positions) >= 2**30:
        raise ValueError(
            "positions: expected a squared diagonal of their bounding box below 2**30 (int32 arithmetic), "
            f"got {squared_diagonal(positions)}"
        )
    return int(positions.shape[0])


def squared_diagonal(positions: NDArray[Any]) -> int:
    """Return an upper bound of the squared distances between points (N, axes): that of their bounding box."""
    if len(positions) == 0:
        return 0
    return sum((int(column.max()) - int(column.min())) ** 2 for column in positions.T)


def _check_not_nan(name: str, array: Array) -> None:
    values = on_host(array)
    if values is not None and values.dtype.kind == "f" and np.isnan(values).any():
        raise ValueError(f"{name}: expected numbers, got NaN")


def _check_shape_of_noise(name: str, array: Array, noise: Array) -> None:
    if tuple(array.shape) != tuple(noise.shape):
        raise ValueError(f"{name}: expected the shape of noise, {tuple(noise.shape)}, got {tuple(array.shape)}")

"""The namespace of the arguments, and the few things on which array libraries differ.

Everything else in the core is written once, against the array API standard. Only this module knows that frameworks
have names.
"""

from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any
"""An array of any library that follows the array API standard: NumPy, PyTorch, JAX, array-api-strict, ..."""

Namespace = Any
"""A module of array functions, as `array_api_compat.array_namespace` returns it."""


def array_namespace(*arrays: Array) -> Namespace:
    """Return the namespace of the array API standard that all arguments share.

    Raises
    ------
    TypeError
        If an argument is no array, or the arguments are of different libraries.
    """
    if {_library(array) for array in arrays} == {"torch"}:
        # What array_api_compat does, less its caches, which make torch.compile warn.
        import array_api_compat.torch

        return array_api_compat.torch
    return compat.array_namespace(*arrays)


def compat_namespace(module: Namespace) -> Namespace:
    """Return the standard-conforming namespace that stands for ``module`` (``torch``, ``jax.numpy``, ...)."""
    return array_namespace(module.empty(0))


def device_of(array: Array) -> Any:
    """Return where new arrays that meet ``array`` must be made; None under JAX, whose tracers have no device."""
    return None if _is_jax(array) else array.device


def _library(array: Array) -> str:
    return type(array).__module__.partition(".")[0]


def _is_jax(array: Array) -> bool:
    return _library(array) in ("jax", "jaxlib")


def argsort(x: Array) -> Array:
    """Return the stable order of the values of every row of ``x`` (batch, n), as ``argsort`` of the standard does.

    NumPy sorts integers ten times as fast as it sorts their indices, so there each is packed with its index.
    """
    if not (isinstance(x, np.ndarray) and np.can_cast(x.dtype, np.int32)):
        return array_namespace(x).argsort(x, axis=1, stable=True)
    packed = x.astype(np.int64)
    packed <<= 32
    packed |= np.arange(x.shape[1])
    packed.sort(axis=1)
    packed &= 2**32 - 1
    return packed


def scatter(index: Array, values: Array, length: int) -> Array:
    """Write values to places of a row, the same ones in every row.

    Parameters
    ----------
    index
        int (batch, n), in [0, length).
    values
        (n,).
    length
        Length of the rows that are returned.

    Returns
    -------
    array
        (batch, length), of the dtype of the values: ``values[i]`` at ``[b, index[b, i]]``, zero elsewhere.
    """
    xp, device = array_namespace(index, values), device_of(index)
    batch, n = index.shape
    rows = xp.zeros((batch, length), dtype=values.dtype, device=device)
    if _library(index) == "torch":
        return rows.scatter(1, xp.astype(index, xp.int64), values.expand(batch, n))
    image = xp.arange(batch, device=device)[:, None]
    if _is_jax(index):
        return rows.at[image, index].set(values)
    if isinstance(index, np.ndarray):
        rows[image, index] = values
        return rows
    if n == 0:
        return rows
    # The standard knows no scatter, but it can search: all rows in one sorted list, each shifted past the one before.
    order = argsort(index)
    places = xp.reshape(xp.take_along_axis(index, order, axis=1) + image * length, (-1,))
    wanted = xp.arange(batch * length, dtype=places.dtype, device=device)
    nearest = xp.minimum(xp.searchsorted(places, wanted), xp.asarray(max(batch * n - 1, 0), device=device))
    written = xp.take(xp.take(values, xp.reshape(order, (-1,))), nearest)
    return xp.where(xp.reshape(xp.take(places, nearest) == wanted, rows.shape), xp.reshape(written, rows.shape), rows)


def scan(xp: Namespace, step: Callable[[Any], tuple[Any, Array]], state: Any, length: int) -> tuple[Any, Array]:
    """Call ``state, output = step(state)`` a fixed number of times; the only loop over data in the core.

    Parameters
    ----------
    xp
        The namespace of the arrays in ``state``.
    step
        A pure function of the state; ``output`` has shape (batch,) and the same dtype in every turn.
    state
        An array or a tuple of arrays, of unchanging shapes and dtypes.
    length
        How many turns, at least 1.

    Returns
    -------
    state, outputs
        The last state, and the outputs as an array of shape (batch, length).

    Notes
    -----
    Under JAX this is ``jax.lax.scan``: compiled once, whatever the length. Elsewhere it is a Python loop.
    """
    if xp.__name__.startswith("jax"):
        import jax

        state, outputs = jax.lax.scan(lambda carry, _: step(carry), state, length=length)
        return state, xp.permute_dims(outputs, (1, 0))
    collected = []
    for _ in range(length):
        state, output = step(state)
        collected.append(output)
    return state, xp.stack(collected, axis=1)


_pytree_classes: set[type] = set()


def register_pytree(cls: type, example: Array, array_field: str, static_field: str) -> None:
    """Make ``cls`` a JAX pytree of one array and one static field, the first time it holds a JAX array.

    JAX is not imported unless the caller holds one of its arrays, so the core stays free of it.
    """
    if cls in _pytree_classes or not _is_jax(example):
        return
    import jax

    def unflatten(static: Any, children: tuple[Array, ...]) -> Any:
        # JAX unflattens with stand-ins for arrays, so the checks of the constructor must not run.
        instance: Any = object.__new__(cls)
        object.__setattr__(instance, array_field, children[0])
        object.__setattr__(instance, static_field, static)
        return instance

    jax.tree_util.register_pytree_node(
        cls, lambda value: ((getattr(value, array_field),), getattr(value, static_field)), unflatten
    )
    _pytree_classes.add(cls)

"""Namespaces of array libraries, and the operations in which they differ.

The rest of the core uses the array API standard only. No other module names a framework.
"""

from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array of NumPy, PyTorch, JAX or any other library that follows the array API standard."""

Namespace = Any
"""A module of array functions, as returned by `array_api_compat.array_namespace`."""


def array_namespace(*arrays: Array) -> Namespace:
    """Return the array API namespace that all arguments share.

    Raises
    ------
    TypeError
        If an argument is not an array of the standard, or the arguments come from different libraries.
    """
    if {_library(array) for array in arrays} == {"torch"}:
        # Avoids the caches of array_api_compat, which make torch.compile warn.
        import array_api_compat.torch

        return array_api_compat.torch
    try:
        xp = compat.array_namespace(*arrays)
    except TypeError:
        xp = None
    if hasattr(xp, "bool"):  # MLX has a namespace, but neither this dtype nor stable sorting
        return xp
    foreign = {_class_name(array) for array in arrays if _is_foreign(array)}
    if foreign:
        raise TypeError(
            f"arrays: expected arrays of the array API standard (NumPy, PyTorch, JAX, ...), got "
            f"{' and '.join(sorted(foreign))}: make the plan from NumPy noise, and pass plan.order and "
            "stage_weights(plan) as NumPy arrays (docs/guides/foreign_frameworks.md)"
        )
    found = " and ".join(sorted({_class_name(array) for array in arrays}))
    raise TypeError(f"arrays: expected arrays of one library, got {found}")


def _is_foreign(array: object) -> bool:
    """Return whether an object is an array, but not of the array API standard."""
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        return False
    try:
        return not hasattr(compat.array_namespace(array), "bool")
    except TypeError:
        return True


def _class_name(array: object) -> str:
    return f"{_library(array)}.{type(array).__name__}".removeprefix("builtins.")


def compat_namespace(module: Namespace) -> Namespace:
    """Return the array API namespace of a module such as ``torch`` or ``jax.numpy``."""
    return array_namespace(module.empty(0))


def device_of(array: Array) -> Any:
    """Return the device for new arrays; None under JAX, whose tracers have no device."""
    return None if _is_jax(array) else array.device


def on_host(array: Array) -> NDArray[Any] | None:
    """Return an array's values if reading them is free and safe to trace, else None.

    Reading is free for NumPy, array-api-strict and CPU tensors of PyTorch, except while PyTorch compiles, exports or
    maps a function. JAX values are never read: JAX is asynchronous, and any call may be traced.
    """
    if isinstance(array, np.ndarray):
        return array
    if _library(array) == "array_api_strict":
        return np.asarray(array)
    if _library(array) != "torch":
        return None
    if array_namespace(array).compiler.is_compiling() or array.device.type != "cpu":
        return None
    try:
        return np.asarray(array.detach())
    except (RuntimeError, TypeError):  # inside torch.func, a fake tensor, or bfloat16
        return None


def to_numpy(array: Array) -> NDArray[Any]:
    """Copy an array to the host; blocks until it is computed. For tests only."""
    return np.asarray(array.cpu() if _library(array) == "torch" else array)


def as_index(xp: Namespace, index: Array) -> Array:
    """Cast token indices to the default integer dtype, in which sums do not overflow."""
    return xp.astype(index, xp.arange(0).dtype, copy=False)


def _library(array: Array) -> str:
    # Not type(array): torch.compile does not trace it for a Parameter.
    module: str = array.__class__.__module__
    return module.partition(".")[0]


def _is_jax(array: Array) -> bool:
    return _library(array) in ("jax", "jaxlib")


def argsort(xp: Namespace, x: Array) -> Array:
    """Sort every row of ``x`` (batch, n); return the indices. The sort is stable."""
    if not (isinstance(x, np.ndarray) and np.can_cast(x.dtype, np.int32)):
        return xp.argsort(x, axis=1, stable=True)
    # NumPy sorts integers ten times as fast as it argsorts them, so each value is packed with its index.
    packed = x.astype(np.int64)
    packed <<= 32
    packed |= np.arange(x.shape[1])
    packed.sort(axis=1)
    packed &= 2**32 - 1
    return packed


def take_along_rows(xp: Namespace, x: Array, index: Array) -> Array:
    """Gather ``x[b, index[b, i]]`` by :func:`argsort` indices: (batch, n)."""
    if _library(x) == "torch":
        return x.gather(1, index)  # take_along_dim would make the batch size of an exported program static
    return xp.take_along_axis(x, index, axis=1)


def scatter(xp: Namespace, index: Array, values: Array, length: int) -> Array:
    """Write the same values to different positions of every row.

    Parameters
    ----------
    xp
        The namespace of the arrays.
    index
        int (batch, n), in [0, length). JAX drops other values.
    values
        (n,).
    length
        Length of the returned rows.

    Returns
    -------
    array
        (batch, length), dtype of ``values``: ``values[i]`` at ``[b, index[b, i]]``, zero elsewhere.
    """
    device = device_of(index)
    batch, n = index.shape
    rows = xp.zeros((batch, length), dtype=values.dtype, device=device)
    if _library(index) == "torch":
        return rows.scatter(1, xp.astype(index, xp.int64), values.expand(batch, n))
    image = xp.arange(batch, device=device)[:, None]
    if _is_jax(index):
        # JAX drops indices beyond a row, but counts negative ones from its end.
        index = as_index(xp, index)
        return rows.at[image, xp.where(index < 0, length, index)].set(values, mode="drop")
    if isinstance(index, np.ndarray):
        rows[image, index] = values
        return rows
    if n == 0:
        return rows
    # The standard has no scatter. Instead, shift the rows apart, concatenate them to one sorted list, and search it.
    order = argsort(xp, index)
    places = xp.reshape(xp.take_along_axis(index, order, axis=1) + image * length, (-1,))
    wanted = xp.arange(batch * length, dtype=places.dtype, device=device)
    nearest = xp.minimum(xp.searchsorted(places, wanted), xp.asarray(max(batch * n - 1, 0), device=device))
    written = xp.take(xp.take(values, xp.reshape(order, (-1,))), nearest)
    return xp.where(xp.reshape(xp.take(places, nearest) == wanted, rows.shape), xp.reshape(written, rows.shape), rows)


def scan(xp: Namespace, step: Callable[[Any], tuple[Any, Array]], state: Any, length: int) -> tuple[Any, Array]:
    """Call ``state, output = step(state)`` a fixed number of times.

    Parameters
    ----------
    xp
        The namespace of the arrays in ``state``.
    step
        A pure function of the state; ``output`` has shape (batch,) and the same dtype in every iteration.
    state
        An array or a tuple of arrays, of fixed shapes and dtypes.
    length
        Number of iterations, at least 1.

    Returns
    -------
    state, outputs
        The final state, and the outputs, stacked to (batch, length).

    Notes
    -----
    The only loop over data in the core. Under JAX it is ``jax.lax.scan``, compiled once for any length. Elsewhere it is
    a Python loop.
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


def register_pytree(cls: type, example: Array | None, array_field: str, static_field: str) -> None:
    """Register ``cls`` as a JAX pytree of one array and one static field.

    A no-op if ``example`` is an array of another library, so JAX is imported only where it is in use.
    """
    if cls in _pytree_classes or not (example is None or _is_jax(example)):
        return
    import jax

    def unflatten(static: Any, children: tuple[Array, ...]) -> Any:
        # JAX unflattens with placeholders for arrays, so the constructor's checks must not run.
        instance: Any = object.__new__(cls)
        object.__setattr__(instance, array_field, children[0])
        object.__setattr__(instance, static_field, static)
        return instance

    jax.tree_util.register_pytree_node(
        cls, lambda value: ((getattr(value, array_field),), getattr(value, static_field)), unflatten
    )
    _pytree_classes.add(cls)

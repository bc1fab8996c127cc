"""Counter-based noise, bit-identical across libraries, devices and processes."""

from math import prod
from typing import Any

import numpy as np

from prmim_core._arrays import Array, Namespace, argsort, array_namespace, compat_namespace, device_of, on_host, scatter
from prmim_core._checks import check_integer, check_integers, shown


def counter_noise(seed: int, step: int | Array, sample: Array, num_tokens: int, xp: Namespace | None = None) -> Array:
    """Compute noise as a pure function of (seed, step, sample, token).

    Parameters
    ----------
    seed
        The seed of the run, in [0, 2**32).
    step
        The training step: an integer in [0, 2**31), or an integer array of one element (may be traced by JAX).
    sample
        int (batch,): dataset index of each image, at least 0. Each row depends on its own sample only, so processes may
        split a batch in any way.
    num_tokens
        N, the number of tokens.
    xp
        Array library of the result, for instance ``torch`` or ``jax.numpy``; None: the library of ``sample``.

    Returns
    -------
    array
        int32 (batch, N), uniform over all 2**32 values. The values of a row are distinct.

    Raises
    ------
    TypeError
        If ``seed``, ``step``, ``sample`` or ``num_tokens`` is not an integer.
    ValueError
        If ``seed`` or ``step`` is out of range, ``step`` has several elements, ``num_tokens`` is not positive,
        ``sample`` is not (batch,) or holds a negative number. Values of arrays are checked on the host only: NumPy, and
        PyTorch on a CPU when not compiled.

    Notes
    -----
    All arithmetic is modulo 2**32::

        mix(x):        x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
        absorb(h, w):  mix(h ^ mix(w + 0x9E3779B9))
        noise:         absorb(absorb(absorb(absorb(0, seed), step), sample), token)

    A sample of 2**32 or more has two words, absorbed one after the other: the low one, then the high one. Without
    64-bit types, JAX cannot hold such samples: pass them in NumPy, with ``xp=jax.numpy``.

    The result is read as a signed number. ``mix`` is a low-bias bijection (constants: C. Wellons, "hash-prospector",
    public domain), so ``absorb`` is a bijection of its second argument and rows have no ties. About ten integer
    operations per value. Not for cryptography.

    Examples
    --------
    >>> import numpy as np
    >>> counter_noise(0, 0, np.arange(2), 3).tolist()
    [[407902920, 1600198682, 1706822771], [1203627609, 1702173812, 250989885]]
    """
    seed = check_integer("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed}")
    num_tokens = check_integer("num_tokens", num_tokens, 1)
    low, high = _sample_words(np.asarray(sample) if isinstance(sample, list | tuple) else sample)
    if xp is None:
        xp = array_namespace(low)
    else:
        xp = compat_namespace(xp)
        low, high = xp.asarray(low), None if high is None else xp.asarray(high)
    device = device_of(low)
    state = _absorb(_full(xp, 0, device), _full(xp, seed, device))
    state = _absorb(state, _step_word(xp, step, device))
    state = _absorb(state, low)
    if high is not None:
        state = xp.where(high == 0, state, _absorb(state, high))
    return _absorb(state[:, None], xp.arange(num_tokens, dtype=xp.int32, device=device)[None, :])


def _sample_words(sample: Array) -> tuple[Array, Array | None]:
    """Split sample indices into low and high int32 words; None: no high word."""
    xp = array_namespace(sample)
    if sample.ndim != 1:
        raise ValueError(f"sample: expected shape (batch,), got {tuple(sample.shape)}")
    check_integers(xp, "sample", sample)
    values = on_host(sample)
    if values is not None and (values < 0).any():
        raise ValueError(f"sample: expected integers of at least 0, got {values.min()}")
    low = xp.astype(sample, xp.int32)
    if xp.iinfo(sample.dtype).bits <= 32:
        return low, None
    return low, xp.astype(xp.astype(sample, xp.int64) >> 32, xp.int32)


def _step_word(xp: Namespace, step: int | Array, device: Any) -> Array:
    if hasattr(step, "dtype") and not isinstance(step, np.generic):
        if not array_namespace(step).isdtype(step.dtype, "integral"):
            raise TypeError(f"step: expected an integer or an integer array of one element, got {step.dtype}")
        array: Array = step
        if prod(array.shape) != 1:
            shape = tuple(array.shape)
            raise ValueError(f"step: expected an integer or an integer array of one element, got shape {shape}")
        values = on_host(step)
        if values is None:
            return xp.astype(xp.reshape(step, (1,)), xp.int32)
        step = values.item()
    if not isinstance(step, int | np.integer) or isinstance(step, bool):
        raise TypeError(f"step: expected an integer or an integer array of one element, got {shown(step)}")
    if not 0 <= step < 2**31:
        raise ValueError(f"step: expected an integer in [0, 2**31), got {step}")
    return _full(xp, int(step), device)


def _full(xp: Namespace, value: int, device: Any) -> Array:
    # Shape (1,) rather than (): NumPy warns about overflow of scalars, but not of arrays.
    return xp.full((1,), _signed(value), dtype=xp.int32, device=device)


def _signed(value: int) -> int:
    """Reinterpret an unsigned 32-bit number as int32."""
    return value - 2**32 if value >= 2**31 else value


def _absorb(state: Array, word: Array) -> Array:
    """Mix an int32 word into the int32 state; see :func:`counter_noise`."""
    return _mix(state ^ _mix(word + _signed(0x9E3779B9)))


def _mix(x: Array) -> Array:
    # Clearing the sign bits turns the arithmetic shift into a logical one.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _noise_rank(xp: Namespace, noise: Array) -> Array:
    """Rank tokens by noise, lowest first, ties in raster order: int32 (batch, N)."""
    length = noise.shape[1]
    return scatter(xp, argsort(xp, noise), xp.arange(length, dtype=xp.int32, device=device_of(noise)), length)


def _uniform(xp: Namespace, noise: Array) -> Array:
    """Map int32 noise to uniform float32 in (0, 1), endpoints excluded."""
    # The upper 23 bits plus one half are the finest steps that float32 represents exactly below 1.
    return (xp.astype((noise >> 9) & 0x7FFFFF, xp.float32) + 0.5) / 2**23

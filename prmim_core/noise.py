"""Reproducible noise from a counter, equal bit for bit on every array library, device and number of processes."""

from typing import Any

import numpy as np

from prmim_core._arrays import Array, Namespace, argsort, array_namespace, compat_namespace, device_of, scatter


def counter_noise(seed: int, step: int | Array, sample: Array, num_tokens: int, xp: Namespace | None = None) -> Array:
    """Return noise that is a pure function of (seed, step, sample, token).

    Parameters
    ----------
    seed
        The seed of the run, in [0, 2**32).
    step
        The training step: an integer in [0, 2**31), or an integer array of one element (a traced one under JAX).
    sample
        int array (batch,): which image of the data set each row is for, in [0, 2**31). Rows depend on their own sample
        only, so any split of a batch over processes gives the same noise.
    num_tokens
        N, the length of a row.
    xp
        The library of the result, for instance ``torch`` or ``jax.numpy``; None: that of ``sample``.

    Returns
    -------
    array
        int32 (batch, N), uniform over all 2**32 values. No value occurs twice in a row, so ranks have no ties.

    Raises
    ------
    TypeError
        If ``seed`` is not an integer.
    ValueError
        If ``seed`` or ``step`` is out of range, ``num_tokens`` is not positive or ``sample`` has not one axis.

    Notes
    -----
    With all arithmetic modulo 2**32::

        mix(x):        x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
        absorb(h, w):  mix(h ^ mix(w + 0x9E3779B9))
        noise:         absorb(absorb(absorb(absorb(0, seed), step), sample), token)

    read as a signed number. ``mix`` is a bijection with low bias (constants found by C. Wellons, "hash-prospector",
    public domain), so ``absorb`` is one in its second argument, which is why a row has no ties. Not for cryptography.
    Cost: about ten integer operations per value.

    Examples
    --------
    >>> import numpy as np
    >>> counter_noise(0, 0, np.arange(2), 3).tolist()
    [[407902920, 1600198682, 1706822771], [1203627609, 1702173812, 250989885]]
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
    if xp is None:
        xp = array_namespace(sample)
    else:
        xp = compat_namespace(xp)
        sample = xp.asarray(sample)
    if sample.ndim != 1:
        raise ValueError(f"sample: expected shape (batch,), got {tuple(sample.shape)}")
    if not xp.isdtype(sample.dtype, "integral"):
        raise TypeError(f"sample: expected integers, got {sample.dtype}")
    device = device_of(sample)
    state = absorb(_full(xp, 0, device), _full(xp, seed, device))
    state = absorb(state, _step_word(xp, step, device))
    state = absorb(state, xp.astype(sample, xp.int32))
    return absorb(state[:, None], xp.arange(num_tokens, dtype=xp.int32, device=device)[None, :])


def _step_word(xp: Namespace, step: int | Array, device: Any) -> Array:
    if isinstance(step, int | np.integer):
        step = int(step)
    elif not hasattr(step, "dtype"):
        raise TypeError(f"step: expected an integer or an integer array of one element, got {step!r}")
    elif not xp.isdtype(step.dtype, "integral"):
        raise TypeError(f"step: expected an integer or an integer array of one element, got {step.dtype}")
    else:
        return xp.astype(xp.reshape(step, (1,)), xp.int32)
    if not 0 <= step < 2**31:
        raise ValueError(f"step: expected an integer in [0, 2**31), got {step}")
    return _full(xp, step, device)


def _full(xp: Namespace, value: int, device: Any) -> Array:
    # One element and not none: NumPy warns when arithmetic on its scalars wraps, and arrays are meant to wrap.
    return xp.full((1,), _signed(value), dtype=xp.int32, device=device)


def _signed(value: int) -> int:
    """Read an unsigned 32-bit number as a signed one, as int32 arrays hold it."""
    return value - 2**32 if value >= 2**31 else value


def absorb(state: Array, word: Array) -> Array:
    """Return the int32 state after taking in one more int32 word; see the notes of :func:`counter_noise`."""
    return _mix(state ^ _mix(word + _signed(0x9E3779B9)))


def _mix(x: Array) -> Array:
    # The shift of a signed number drags its sign along; the bit mask makes it the logical one.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def noise_rank(noise: Array) -> Array:
    """Return each token's place when the tokens of its image are sorted by noise, lowest first.

    Parameters
    ----------
    noise
        (batch, N), any real dtype; equal values keep their raster order.

    Returns
    -------
    array
        int32 (batch, N), a permutation of 0 .. N - 1 in every row.

    Examples
    --------
    >>> import numpy as np
    >>> noise_rank(np.asarray([[30, 10, 20]])).tolist()
    [[2, 0, 1]]
    """
    xp = array_namespace(noise)
    length = noise.shape[1]
    return scatter(argsort(noise), xp.arange(length, dtype=xp.int32, device=device_of(noise)), length)


def inverse_permutation(order: Array) -> Array:
    """Return the permutation that undoes ``order``.

    Parameters
    ----------
    order
        int (batch, N), a permutation of 0 .. N - 1 in every row.

    Returns
    -------
    array
        int (batch, N): ``inverse[b, order[b, i]] = i``.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_permutation(np.asarray([[2, 0, 1]])).tolist()
    [[1, 2, 0]]
    """
    xp = array_namespace(order)
    length = order.shape[1]
    return scatter(order, xp.arange(length, device=device_of(order)), length)


def uniform(noise: Array) -> Array:
    """Map int32 noise to float32 numbers strictly between 0 and 1, evenly."""
    xp = array_namespace(noise)
    # The upper 23 bits and a half step: the largest float32 that stays below 1.
    return (xp.astype((noise >> 9) & 0x7FFFFF, xp.float32) + 0.5) / 2**23

"""Counter-based noise, and orders of tokens by noise."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real

WORD = 2**32


def mix(x: int) -> int:
    """Scramble a 32-bit word (a bijection).

    Shifts are logical, products are modulo 2**32. Constants: C. Wellons, "hash-prospector", public domain.

    Examples
    --------
    >>> mix(0), mix(1)
    (0, 1753845952)
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D % WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B % WORD
    return x ^ (x >> 16)


def absorb(state: int, word: int) -> int:
    """Return the state after absorbing one more word."""
    return mix(state ^ mix((word + 0x9E3779B9) % WORD))


def counter_noise(seed: int, step: int, sample: int, num_tokens: int) -> list[int]:
    """Return the noise of one image: N distinct integers in [-2**31, 2**31).

    The noise of a token absorbs the seed, the step, the dataset index of the image, and the token. An index of 2**32 or
    more has two words: the low one, then the high one.

    Parameters
    ----------
    seed, step : int
        In [0, 2**32).
    sample : int
        In [0, 2**64).
    num_tokens : int

    Examples
    --------
    >>> counter_noise(0, 0, 1, 3)
    [1203627609, 1702173812, 250989885]
    """
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < WORD:
            raise ValueError(f"{name}: expected an integer in [0, 2**32), got {value}")
    if not 0 <= sample < WORD**2:
        raise ValueError(f"sample: expected an integer in [0, 2**64), got {sample}")
    sample_words = [sample] if sample < WORD else [sample % WORD, sample // WORD]
    noise = []
    for token in range(num_tokens):
        state = 0
        for word in (seed, step, *sample_words, token):
            state = absorb(state, word)
        noise.append(state - WORD if state >= WORD // 2 else state)
    return noise


def uniform(noise: int) -> float:
    """Map signed 32-bit noise to the midpoint of one of 2**23 intervals of (0, 1).

    The upper 23 bits of the word select the interval. Float32 represents the midpoints exactly.

    Examples
    --------
    >>> uniform(2**30), uniform(-(2**30))
    (0.2500000596046448, 0.7500000596046448)
    """
    return (noise % WORD // 2**9 + 0.5) / 2**23


def check_noise(noise: Sequence[float]) -> None:
    """Raise unless all noise is numeric and none is NaN.

    Examples
    --------
    >>> check_noise([0.5, 1])
    """
    for value in noise:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"noise: expected integers or real numbers, got {value!r}")
        if value != value:
            raise ValueError("noise: expected numbers, got NaN")


def integers(noise: Sequence[float]) -> list[int]:
    """Return noise as integers, for strategies that use its bits; raise otherwise.

    Examples
    --------
    >>> integers([3, -1])
    [3, -1]
    """
    for value in noise:
        if not isinstance(value, Integral):
            raise TypeError(f"noise: expected integers, got {value!r}")
    return [int(value) for value in noise]


def by_noise(noise: Sequence[float], tokens: Iterable[int]) -> list[int]:
    """Sort tokens by noise, lowest first; equal noise keeps raster order.

    Examples
    --------
    >>> by_noise([30, 10, 20, 10], tokens=[0, 3, 1])
    [1, 3, 0]
    """
    return sorted(tokens, key=lambda token: (noise[token], token))


def noise_rank(noise: Sequence[float]) -> list[int]:
    """Return the rank of every token in order of noise, lowest first.

    Examples
    --------
    >>> noise_rank([30, 10, 20])
    [2, 0, 1]
    """
    ranks = [0] * len(noise)
    for rank, token in enumerate(by_noise(noise, range(len(noise)))):
        ranks[token] = rank
    return ranks

"""Identities of images, computed without decoding.

They detect changed images in a resumed run.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Identities", "identities", "identities_of_files"]

_THREADS = 16  # network file systems are slow, but serve many requests at once
_PART = 100  # files that a thread examines in turn


class Identities(NamedTuple):
    """Two numbers per image.

    Parameters
    ----------
    keys
        uint64 (number of images,): hashes of name and size in bytes, or of the pixels.
    stamps
        int64 (number of images,): change if the content is replaced. The modification time in seconds, or the checksum
        of a tar header, which holds that time. 0 if the key covers the content.
    """

    keys: NDArray[np.uint64]
    stamps: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Identities":
        """Select images."""
        return Identities(self.keys[index], self.stamps[index])


def identities(images: Iterable[tuple[bytes, int]]) -> Identities:
    """Hash the key of each image.

    Parameters
    ----------
    images
        Content of the key, and stamp, of each image.

    Examples
    --------
    >>> found = identities([(b"cat/1.jpg 9000", 1700000000), (b"cat/2.jpg 8000", 1700000000)])
    >>> found.keys.dtype, len(set(found.keys.tolist())), found.stamps.tolist()
    (dtype('uint64'), 2, [1700000000, 1700000000])
    """
    keys, stamps = bytearray(), []
    for content, stamp in images:
        keys += hashlib.blake2b(content, digest_size=8).digest()
        stamps.append(stamp)
    return Identities(np.frombuffer(bytes(keys), np.uint64), np.array(stamps, np.int64))


def identities_of_files(names: Sequence[str], examine: Callable[[str], tuple[object, int]]) -> Identities:
    """Examine files in threads, and hash name and content facts of each.

    Parameters
    ----------
    names : sequence of str
        At least one.
    examine : callable
        Maps a name to a fact about the content, such as the size in bytes, and the stamp. Called in threads.

    Examples
    --------
    >>> found = identities_of_files(["cat/1.jpg", "cat/2.jpg"], lambda name: (9000, 1700000000))
    >>> found.stamps.tolist()
    [1700000000, 1700000000]
    """

    def examine_part(start: int) -> Identities:
        part = [names[k] for k in range(start, min(start + _PART, len(names)))]
        return identities(
            (os.fsencode(f"{name} {fact}"), stamp) for name, (fact, stamp) in zip(part, map(examine, part), strict=True)
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(examine_part, range(0, len(names), _PART)))
    return Identities(np.concatenate([part.keys for part in parts]), np.concatenate([part.stamps for part in parts]))

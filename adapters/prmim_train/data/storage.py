"""Local and remote files (`https://`, `s3://`, `gs://`), read at any offset.

Remote files are read by range requests, through `fsspec`. Every request has a timeout, and is repeated after transient
failures. Parts that were read stay in a bounded local cache.
"""

import functools
import hashlib
import io
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from prmim_methods.files import open_regular
from prmim_methods.messages import one_line, printable
from prmim_train.config.packages import check_installed
from prmim_train.data.cache import Cache
from prmim_train.data.names import expand_braces

__all__ = [
    "Address",
    "File",
    "PartialFile",
    "Place",
    "common_folder",
    "find_addresses",
    "is_address",
    "open_each",
    "open_place",
    "public_address",
]

T = TypeVar("T")

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""Package that `fsspec` needs for each protocol."""

_BLOCK = 2**17  # bytes of an entry of the cache; images have a similar size
_AHEAD = 2**22  # bytes per request while a file is indexed
_THREADS = 8  # concurrent requests at the start
_DELAYS = (0.5, 1.0, 2.0, 4.0)  # seconds before another attempt
_CONNECT, _SILENCE, _REQUEST = 10.0, 30.0, 120.0  # timeouts in seconds: to connect, between two bytes, of a request
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "generation", "updated", "mtime")
_NUM_NAMED = 3

File = io.RawIOBase
"""An open file; `prmim_train.data.image_files.read_part` reads it at an offset."""


@dataclass(frozen=True)
class Address:
    """A remote file, in the version at its discovery. Picklable.

    Parameters
    ----------
    url : str
    size : int
        In bytes.
    stamp : int
        Hash of the version that the server reports: ETag, or modification time.
    cache : Cache, optional
    """

    url: str
    size: int
    stamp: int
    cache: Cache | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rpartition("/")[2]

    def __str__(self) -> str:
        """Return the address without password and query, which may be secrets."""
        return public_address(self.url)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes, fewer at the end of the file. Thread-safe.

        Raises
        ------
        ConnectionError
            If the server rejects the request, or does not answer after several attempts.
        ValueError
            If the file has changed, or if the server supports no range requests.
        """
        stop = min(offset + size, self.size)
        if offset >= stop:
            return b""
        if self.cache is None:
            return self.fetch(offset, stop)
        first, last = offset // _BLOCK, -(-stop // _BLOCK)
        blocks = {number: self.cache.get(self.key(number)) for number in range(first, last)}
        missing = [number for number, block in blocks.items() if block is None]
        if missing:
            start = missing[0] * _BLOCK
            content = self.fetch(start, min((missing[-1] + 1) * _BLOCK, self.size))
            for number in missing:
                place = number * _BLOCK - start
                block = blocks[number] = content[place : place + _BLOCK]
                self.cache.put(self.key(number), block)
        joined = b"".join(block for block in blocks.values() if block is not None)
        return joined[offset - first * _BLOCK : stop - first * _BLOCK]

    def fetch(self, start: int, stop: int) -> bytes:
        """Request a range of bytes without the cache.

        The range ends at the end of the file. Raises as `read`.
        """

        def request() -> bytes:
            content: bytes = handle._fetch_range(start, stop)
            if len(content) != stop - start:
                raise OSError(f"{len(content):,} bytes instead of {stop - start:,}")
            return content

        try:
            handle = _handle(self)
            return _attempt(request)
        except OSError as error:
            raise ConnectionError(str(error)) from error

    def key(self, part: int | str) -> str:
        """Return the key of a part in the cache."""
        return f"{self.url} {self.size} {self.stamp} {part}"


Place = Path | Address
"""Place of a file. Both have `name`, and `str` returns the text for messages."""


class PartialFile(io.RawIOBase):
    """File whose bytes come from a function.

    The source is an address, or a part of another file.

    Parameters
    ----------
    read_at : callable
        Maps offset and size to bytes; called within the file only.
    size : int
        In bytes.
    whole : file, optional
        The other file, to be closed with this one.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, whole: File | None = None) -> None:
        self._read_at, self._size, self._whole, self._place = read_at, size, whole, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Change the position, and return it."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer; return the number of bytes."""
        size = min(len(buffer), self._size - self._place)
        if size <= 0:
            return 0
        content = self._read_at(self._place, size)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        """Close the file, and the one that it is a part of."""
        if self._whole is not None:
            self._whole.close()
        super().close()


def is_address(spec: str) -> bool:
    """Whether a specification of data is an address, not a path."""
    return "://" in spec


def open_place(place: Place) -> File:
    """Open a file for reading. Opening a file at an address takes no request.

    Raises
    ------
    OSError, ValueError
        As `prmim_methods.files.open_regular`.
    """
    return open_regular(place) if isinstance(place, Path) else PartialFile(place.read, place.size)


def open_each(places: Sequence[Place], read: Callable[[File], object]) -> Iterator[File]:
    """Open files one after another, closing the one before.

    For remote files, the parts that `read` reads are requested in advance, for many files at a time and in large
    blocks. The cache keeps them, so the next start needs no requests for these parts.

    Parameters
    ----------
    places : sequence of Path or Address
    read : callable
        Reads the parts of a file that will be needed. Called in threads.

    Yields
    ------
    file
        In the order of `places`.

    Raises
    ------
    OSError, ValueError
        If a file cannot be opened. Also errors of `Address.read` and of `read`.
    """
    addresses = [place for place in places if isinstance(place, Address)]
    pool = ThreadPoolExecutor(_THREADS)
    try:
        indices = pool.map(functools.partial(_record, read=read), addresses)
        bar = iter(tqdm(indices, "indexing", len(addresses), False, unit=" files", disable=None if addresses else True))
        for place in places:
            if isinstance(place, Address):
                yield PartialFile(_Recording(place, next(bar)).read, place.size)
            else:
                with open_regular(place) as file:
                    yield file
    finally:
        pool.shutdown(cancel_futures=True)


def common_folder(places: Sequence[Place]) -> str:
    """Return the folder that all files lie in, for messages."""
    local = [place.parent for place in places if isinstance(place, Path)]
    if local:
        return printable(os.path.commonpath(local) or ".")
    protocol = str(places[0]).partition("://")[0]
    return f"{protocol}://{os.path.commonpath([str(place).partition('://')[2] for place in places])}"


def find_addresses(pattern: str, cache: Cache | None) -> list[Address]:
    """Return the files that match a pattern, sorted.

    Parameters
    ----------
    pattern : str
        An address. Braces expand as in names of local files; ``*``, ``?`` and ``[`` match names if the store can list
        them.
    cache : Cache, optional
        For the content of the files.

    Raises
    ------
    ImportError
        If a package is missing.
    FileNotFoundError
        If files are missing; up to three are named.
    OSError, ValueError
        If the store cannot be reached or refuses, or if it cannot list files.
    """
    protocol = pattern.partition("://")[0]
    if protocol not in _PACKAGES or not pattern.partition("://")[2].strip("/"):
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise ValueError(f"data: expected an address that begins with {known}, got {public_address(pattern)}")
    check_installed("data", "fsspec", _PACKAGES[protocol])
    urls = [url for name in expand_braces(pattern) for url in _matches(name)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(functools.partial(_find, cache=cache), urls))
    missing = [public_address(url) for url, address in zip(urls, found, strict=True) if address is None]
    if missing:
        if len(urls) == 1:
            raise FileNotFoundError(f"data: nothing at {missing[0]}")
        listed = ", ".join(missing[:_NUM_NAMED]) + ", ..." * (len(missing) > _NUM_NAMED)
        raise FileNotFoundError(
            f"data: {len(missing):,} of {len(urls):,} files of {public_address(pattern)} are missing: {listed}"
        )
    return sorted({address for address in found if address is not None}, key=lambda address: address.url)


def _matches(pattern: str) -> list[str]:
    """Return the addresses that match a pattern without braces."""
    protocol = pattern.partition("://")[0]
    if protocol.startswith("http"):
        if "*" in urlsplit(pattern).path:
            raise ValueError(
                "data: web servers do not list files: expected a pattern such as train-{000..099}.tar, got "
                f"{public_address(pattern)}"
            )
        return [pattern]
    if not any(char in pattern for char in "*?["):
        return [pattern]
    with _named(pattern):
        found = _attempt(lambda: _file_system(protocol).glob(pattern))
    if not found:
        raise FileNotFoundError(f"data: no file matches {public_address(pattern)}")
    return [f"{protocol}://{name}" for name in found]


def _find(url: str, cache: Cache | None) -> Address | None:
    """Return the file at an address; None if there is none."""
    with _named(url):
        try:
            info = _info(url)
        except FileNotFoundError:
            return None
        if info["type"] == "directory":
            raise ValueError("expected a file or a pattern, got a folder")
        if info["size"] is None:
            raise ValueError("the server does not report the size of the file")
    return Address(url, info["size"], _stamp(info), cache)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Add the option and the address to errors."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise type(error)(f"data: {public_address(url)}: {error}") from error


def public_address(url: str) -> str:
    """Return an address without user, password and query."""
    if url.startswith("http"):
        parts = urlsplit(url)
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return printable(url)


# ----------------------------------------------------------------------------------------------------------- indices


class _Recording:
    """Records the parts of a remote file that are read.

    Missing parts are requested, together with the bytes that follow.

    Parameters
    ----------
    address : Address
    content : bytes
        As `pack` returned it; empty at first.
    """

    def __init__(self, address: Address, content: bytes = b"") -> None:
        self._address = address
        self._parts = _unpack(content) if content else {}
        self._start, self._window = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes. A repeated call with the same arguments sends no request."""
        part = self._parts.get((offset, size))
        if part is None:
            part = self._parts[offset, size] = self._look(offset, size)
        return part

    def _look(self, offset: int, size: int) -> bytes:
        end = self._start + len(self._window)
        if not self._start <= offset <= offset + size <= end:
            is_near = end <= offset + size < end + _AHEAD  # else large members lie between headers
            self._start, self._window = offset, self._address.read(offset, max(size, _AHEAD if is_near else _BLOCK))
        return self._window[offset - self._start :][:size]

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._parts)

    def pack(self) -> bytes:
        """Return the parts as compressed bytes."""
        places = np.array(list(self._parts), np.int64).reshape(-1, 2)
        content = b"".join((len(places).to_bytes(8, "little"), places.tobytes(), *self._parts.values()))
        return zlib.compress(content, 1)


def _unpack(content: bytes) -> dict[tuple[int, int], bytes]:
    content = zlib.decompress(content)
    number = int.from_bytes(content[:8], "little")
    places = np.frombuffer(content, np.int64, 2 * number, 8).reshape(-1, 2).tolist()
    parts, place = {}, 8 + 16 * number
    for offset, size in places:
        parts[offset, size] = content[place : place + size]
        place += size
    return parts


def _record(address: Address, read: Callable[[File], object]) -> bytes:
    """Return the packed parts that a function reads of a file.

    They come from the cache if possible.
    """
    key = address.key("parts")
    known = address.cache.get(key, pinned=True) if address.cache else None
    recording = _Recording(address, known or b"")
    if known is None and address.size:
        address.fetch(address.size - 1, address.size)  # a server without ranges would send the whole file
    num_known = len(recording)
    read(PartialFile(recording.read, address.size))
    if known is not None and len(recording) == num_known:
        return known
    content = recording.pack()
    if address.cache:
        address.cache.put(key, content, pinned=True)
    return content


# ---------------------------------------------------------------------------------------------------------- requests


@functools.lru_cache(4096)
def _handle(address: Address) -> Any:
    """Open a file of `fsspec`.

    Its `_fetch_range` has no state, and requests the version of the address.
    """
    info = _info(address.url)
    if (info["size"], _stamp(info)) != (address.size, address.stamp):
        raise ValueError(_CHANGED)
    system = _file_system(address.url.partition("://")[0])
    options: dict[str, Any] = {}
    if "http" in system.protocol:  # stores do this by themselves
        etag, time_modified = info.get("ETag", ""), info.get("Last-Modified")
        headers = {"Accept-Encoding": "identity", **system.kwargs.get("headers", {})}
        if etag and not etag.startswith("W/"):
            headers["If-Match"] = etag
        elif time_modified:
            headers["If-Unmodified-Since"] = time_modified
        options = {"size": address.size, "headers": headers}
    return _attempt(lambda: system.open(address.url, "rb", cache_type="none", **options))


def _info(url: str) -> Mapping[str, Any]:
    system = _file_system(url.partition("://")[0])
    info: Mapping[str, Any] = _attempt(lambda: system.info(url))
    return info


def _stamp(info: Mapping[str, Any]) -> int:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest(), "little", signed=True)


@functools.cache
def _file_system(protocol: str) -> Any:
    """Return a file system of `fsspec` with timeouts.

    It neither retries nor caches listings.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=_REQUEST, sock_connect=_CONNECT, sock_read=_SILENCE)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    elif protocol == "s3":
        timeouts = {"connect_timeout": _CONNECT, "read_timeout": _SILENCE}
        options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": 1}}
    elif protocol == "gs":
        options["requests_timeout"] = _REQUEST
    system = fsspec.filesystem(protocol, **options)
    if protocol == "s3":
        system.retries = 1
    return system


_CHANGED = "changed since it was opened"
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "gcsfs")  # their errors of connections are of no built-in type
_JITTER = random.Random()


def _attempt(action: Callable[[], T]) -> T:
    """Call a function that sends a request, with retries after transient failures.

    Raises
    ------
    ConnectionError
        If the last attempt failed, too.
    OSError, ValueError
        If the failure is permanent. All errors have built-in types, and their text is the reason.
    """
    for delay in (*_DELAYS, None):
        try:
            return action()
        except Exception as error:
            cause = _cause(error)
            _refuse(cause)
            if not isinstance(cause, OSError) and _library(cause) not in _LIBRARIES:
                raise
            if delay is None:
                number = len(_DELAYS) + 1
                raise ConnectionError(f"no answer after {number} attempts ({one_line(cause)})") from error
            time.sleep(delay * _JITTER.uniform(0.5, 1.5))
    raise AssertionError


def _cause(error: BaseException) -> BaseException:
    """Return the original error.

    `fsspec` reports a failed connection as a missing file.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _refuse(error: BaseException) -> None:
    """Raise permanent failures."""
    status = _status(error)
    if status in (401, 403) or isinstance(error, PermissionError):
        raise PermissionError(f"access denied{f' ({status})' if status else ''}") from error
    if type(error).__name__ == "NoCredentialsError":  # of botocore
        raise PermissionError("no credentials found; for a public bucket set FSSPEC_S3_ANON=true") from error
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        raise FileNotFoundError("not found") from error
    if status in (412, 416):
        raise ValueError(_CHANGED) from error
    if status is not None and status not in _PASSING:
        raise OSError(f"the server answers {status}") from error
    if isinstance(error, ValueError):
        no_ranges = "support range requests" in str(error)
        raise ValueError("the server supports no range requests" if no_ranges else str(error)) from error


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of aiohttp, botocore or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        # The code of other errors of aiohttp is its own: half an answer has 400.
        status = getattr(error, "status" if _library(error) == "aiohttp" else "code", None)
    return int(status) if isinstance(status, int) or str(status).isdigit() else None


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]

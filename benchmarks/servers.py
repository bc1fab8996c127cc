"""Local web and S3 servers, for benchmarks and tests of remote data."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


class RangeHandler(BaseHTTPRequestHandler):
    """Serves the files of a folder, also in ranges (RFC 9110).

    Tests override `fault`.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def fault(self) -> bool:
        """Answer with a fault in place of the file, if any; return whether there was one."""
        return False

    def do_HEAD(self) -> None:  # name required by the library
        """Answer with the headers of a file."""
        self._answer(with_content=False)

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        if self.fault():
            return
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.refuse(HTTPStatus.NOT_FOUND)
            return
        status = path.stat()
        etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if self.headers.get("If-Match", etag) != etag:
            self.refuse(HTTPStatus.PRECONDITION_FAILED)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), min(int(found[2]) + 1, status.st_size)) if found else (0, status.st_size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if found else HTTPStatus.OK)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{status.st_size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", etag)
        self.end_headers()
        if with_content:
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    def refuse(self, status: HTTPStatus) -> None:
        """Answer with a status and no content."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@contextmanager
def web_server(folder: Path, handler: type[RangeHandler] = RangeHandler) -> Iterator[str]:
    """Serve a folder; yield the address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, folder))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server, and set the environment to use it; yield its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    try:
        with patch.dict(os.environ, {**_CREDENTIALS, "AWS_ENDPOINT_URL": address}):
            yield address
    finally:
        server.stop()


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Serve a folder in another process; yield its address by protocol.

    The protocols are ``http`` and ``s3``. The environment is set to use the S3 server, whose bucket holds copies of the
    files of the folder.
    """
    command = [sys.executable, "-m", "benchmarks.servers", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        addresses: dict[str, str] = json.loads(process.stdout.readline())
        with patch.dict(os.environ, {**_CREDENTIALS, "AWS_ENDPOINT_URL": addresses["s3"]}):
            import fsspec

            store = fsspec.filesystem("s3", skip_instance_cache=True)
            store.mkdir("bucket")
            for path in folder.iterdir():
                store.pipe(f"bucket/{path.name}", path.read_bytes())
            yield {"http": addresses["http"], "s3": "s3://bucket"}
        process.communicate()  # closing its input ends the process


if __name__ == "__main__":
    with web_server(Path(sys.argv[1])) as web, s3_server() as s3:
        print(json.dumps({"http": web, "s3": s3}), flush=True)
        sys.stdin.read()

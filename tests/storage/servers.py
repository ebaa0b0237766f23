"""Real servers for the storage tests: moto's S3 in a process of its own, a proxy that spoils answers, web files."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# Ends when its standard input does, so that it cannot outlive the tests.
_MOTO = """
import sys, logging
logging.disable(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of an S3 server without any bucket."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        for line in process.stdout:
            if line.strip().isdigit():
                yield f"http://127.0.0.1:{line.strip()}"
                break
        else:
            raise AssertionError("moto did not start")
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Proxy:
    """Passes requests on to an S3 server, until told to spoil some.

    `spoil` is called with (method, path, headers) of each request and says what to do with it: None to pass it
    on, ``500``-like numbers to answer that, ``"truncate"`` to break off in the middle of the body, ``"stall"``
    to stop there until `released`, ``"garble"`` to flip a byte of the body.
    """

    def __init__(self, endpoint: str) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.spoil: Callable[[str, str, dict[str, str]], int | str | None] = lambda method, path, headers: (
            None
        )
        self.seen: list[tuple[str, str, str | None]] = []
        self.released = threading.Event()
        self.endpoint = ""


@contextlib.contextmanager
def proxy_to(endpoint: str) -> Iterator[Proxy]:
    proxy = Proxy(endpoint)

    class Spoiling(Handler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            sent = self.rfile.read(length) if length else self._chunks()
            headers = {k.lower(): v for k, v in self.headers.items()}
            proxy.seen.append((self.command, self.path, headers.get("range")))
            fault = proxy.spoil(self.command, self.path, headers)
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=30)
            for name in ("transfer-encoding", "expect"):
                headers.pop(name, None)
            if sent:
                headers["content-length"] = str(len(sent))
            upstream.request(self.command, self.path, sent or None, headers)
            response = upstream.getresponse()
            body = response.read()
            upstream.close()
            if fault == "garble" and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            announced = response.getheader("content-length") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", announced or "0")
            self.end_headers()
            half = len(body) // 2 if fault in ("truncate", "stall") else len(body)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[:half])
            if fault == "stall":
                proxy.released.wait(60)
            if fault:
                self.close_connection = True

        def _chunks(self) -> bytes:
            if "chunked" not in self.headers.get("transfer-encoding", ""):
                return b""
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    with serving(Spoiling) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield proxy
        finally:
            proxy.released.set()


class Web:
    """A web server of files with ranges; `answers` takes over single paths."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.seen: list[tuple[str, str]] = []
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"


@contextlib.contextmanager
def web() -> Iterator[Web]:
    site = Web()

    class Files(Handler):
        def answer(self) -> None:
            path = urlsplit(self.path).path.lstrip("/")
            site.seen.append((self.command, self.headers.get("host", "")))
            if path in site.answers:
                with contextlib.suppress(ConnectionError):
                    site.answers[path](self)
                return
            body = site.files.get(path)
            if body is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first = 0
            asked = self.headers.get("range", "")
            if asked.startswith("bytes=") and asked.endswith("-"):
                first = int(asked[6:-1])
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
            self.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body[first:])

        do_GET = do_HEAD = answer

    with serving(Files) as server:
        site.port = server.server_address[1]
        yield site

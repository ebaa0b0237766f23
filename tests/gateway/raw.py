"""Raw HTTP on a socket, for what client libraries do not do: stop half-way, flood, disconnect."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def connected(url: str, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout_s) as made:
        yield made


def head(path: str, *, method: str = "POST", **headers: object) -> bytes:
    """A request's head; ``content_length=5`` is the header ``content-length: 5``."""
    lines = [f"{method} {path} HTTP/1.1", "host: gateway"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def request(path: str, body: bytes, **headers: object) -> bytes:
    return head(path, content_length=len(body), **headers) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, or up to the end of the body that is announced."""
    received = b""
    while True:
        before, found, body = received.partition(b"\r\n\r\n")
        if found:
            lengths = [
                line.split(b":")[1]
                for line in before.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            ]
            if lengths and len(body) >= int(lengths[0]):
                return received
        piece = connection.recv(65536)
        if not piece:
            return received
        received += piece


def status(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])

"""What both clients tell httpx."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Generic, TypeVar

import httpx

from serve import __version__
from serve.errors import BadRequest

__all__ = ["Connections", "connection_arguments", "read_headers"]

Http = TypeVar("Http", bound=httpx.Client | httpx.AsyncClient)


class Connections(Generic[Http]):
    """The connections of a client, those of a process that was forked anew.

    A forked process has its parent's sockets. Two that send on one socket get each other's answers.

    Args:
        connect: makes them.
    """

    def __init__(self, connect: Callable[[], Http]) -> None:
        self._connect = connect
        self._made = connect()
        self._process = os.getpid()

    def get(self) -> Http:
        """Return those of this process."""
        if self._process != os.getpid() and not self._made.is_closed:
            self._made, self._process = self._connect(), os.getpid()
        return self._made

    def get_open(self) -> Http:
        """Return those of this process, to send on.

        Raises:
            BadRequest: the client is closed.
        """
        made = self.get()
        if made.is_closed:
            raise BadRequest("this client is closed; make a new one, or call it within its `with` block")
        return made


def connection_arguments(
    url: httpx.URL, token: str | None, compress: bool, verify: ssl.SSLContext | None
) -> dict[str, Any]:
    """Return the arguments of `httpx.Client` and `httpx.AsyncClient`; see `serve.client.Client`.

    Raises:
        BadRequest: no header can hold the token, which the message does not show.
    """
    headers = {
        "Accept-Encoding": "gzip" if compress else "identity",
        "User-Agent": f"mmdet3d-serve-client/{__version__}",
    }
    token = (token or "").strip()  # that of a file ends with a line break
    if not token.isascii() or not token.isprintable():
        raise BadRequest("the token has characters that no header can hold; give it as printable ASCII")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return {
        "base_url": url,
        "headers": headers,
        "trust_env": False,
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "verify": verify or (True if url.scheme == "https" else _no_tls()),
    }


@cache
def _no_tls() -> ssl.SSLContext:
    """Context without certificates, for addresses without TLS: reading the system's takes longer than a request."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def read_headers(response: httpx.Response) -> Mapping[str, str]:
    """Return the headers of a response by lower-case names."""
    return dict(response.headers)

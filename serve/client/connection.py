"""What both clients tell httpx."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx

__all__ = ["connection_arguments", "read_headers"]


def connection_arguments(
    url: httpx.URL, token: str | None, compress: bool, verify: ssl.SSLContext | None
) -> dict[str, Any]:
    """Return the arguments of `httpx.Client` and `httpx.AsyncClient`; see `serve.client.Client`."""
    headers = {"Accept-Encoding": "gzip" if compress else "identity"}
    if token is not None:
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

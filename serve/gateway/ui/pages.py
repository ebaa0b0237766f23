"""Routes of the page and the API documentation: files of the package, the same for every installation.

A browser cannot send an API key with an address that is typed. So the two documents are the body of the 401 that a
browser gets without a key (`document_response`), their scripts and styles need none, and the scripts ask for the key
and send it with everything else.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, Request, Response

from serve.errors import BadRequest
from serve.gateway.middleware import error_response

__all__ = ["OPEN_PATHS", "document_paths", "document_response", "router"]

OPEN_PATHS = ("/ui/assets/", "/docs/assets/")
_BUILT = Path(__file__).parent / "built"
_DOCUMENTS: Mapping[str, str] = {"/": "index.html", "/docs": "docs.html"}
_HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache",  # asked for anew, and answered 304 unless the server was updated
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class _Asset:
    """A file as it is sent.

    Attributes:
        body: its bytes, compressed if `is_compressed`.
        media_type: its Content-Type.
        etag: its digest, quoted.
    """

    body: bytes
    is_compressed: bool
    media_type: str
    etag: str


@cache
def _assets() -> Mapping[str, _Asset]:
    found: dict[str, _Asset] = {}
    sample = resources.files("serve.assets") / "sample.bin"
    files = {path.name: path.read_bytes() for path in sorted(_BUILT.iterdir())}
    for name, body in {**files, "sample.bin": sample.read_bytes()}.items():
        media_type = mimetypes.guess_type(name.removesuffix(".gz"))[0] or "application/octet-stream"
        if media_type.startswith("text/") or media_type.endswith("javascript"):
            media_type = f"{media_type.replace('application/', 'text/')}; charset=utf-8"
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found[name.removesuffix(".gz")] = _Asset(body, name.endswith(".gz"), media_type, etag)
    return found


def document_response(path: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Create the response with the document at `path`, one of `document_paths`."""
    body = _assets()[_DOCUMENTS[path]].body
    return Response(body, status, {**_HEADERS, **(headers or {})}, media_type="text/html")


def document_paths(*, is_ui: bool) -> tuple[str, ...]:
    """Return the paths of the HTML documents; without ``/`` unless `is_ui`."""
    return tuple(path for path in _DOCUMENTS if is_ui or path != "/")


def router(*, is_ui: bool) -> APIRouter:
    """Create the routes of the documents and their assets; without the page at ``/`` unless `is_ui`."""
    routes = APIRouter(include_in_schema=False)

    async def document(request: Request) -> Response:
        return document_response(request.url.path)

    async def asset(name: str, request: Request) -> Response:
        found = _assets().get(name)
        if found is None:
            error = BadRequest(f"{request.url.path[:200]}: no such file")
            return error_response(error, request.scope, status=404)
        headers = {**_HEADERS, "etag": found.etag}
        if found.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        body = found.body
        if found.is_compressed:
            if "gzip" in request.headers.get("accept-encoding", ""):
                headers["content-encoding"] = "gzip"
            else:
                body = gzip.decompress(body)
        return Response(body, headers=headers, media_type=found.media_type)

    for path in document_paths(is_ui=is_ui):
        routes.add_api_route(path, document)
    for prefix in OPEN_PATHS if is_ui else OPEN_PATHS[1:]:
        routes.add_api_route(f"{prefix}{{name}}", asset)
    return routes

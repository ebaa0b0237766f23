"""Frames by reference: read URIs in requests, within an allow-list and limits.

Off unless prefixes are given. A URI is read only if it starts with one of them, compared part by part after parsing:
``s3://bucket`` allows ``s3://bucket/…`` but not ``s3://bucket-evil/…``. Scheme and host of web URLs are compared
case-insensitively; ``..``, encoded slashes and the like are rejected before the comparison. Web hosts must resolve to
public addresses only, checked again at every redirect, and the connection goes to the checked address. Size and time
are limited.

Errors of the client are `ClientError`; a failing store is `NotReady`, a slow one `DeadlineExceeded`. Neither repeats
the store's message.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

from serve.errors import (
    AccessDenied,
    BadRequest,
    ClientError,
    DeadlineExceeded,
    FrameTooLarge,
    NotReady,
    ObjectNotFound,
    ReferenceNotFound,
    ReferenceRefused,
    SettingsError,
    StorageError,
    UriError,
)
from serve.settings import MAX_FRAME_BYTES
from serve.storage.addresses import is_public
from serve.storage.uri import Location, parse

if TYPE_CHECKING:
    import httpx

__all__ = ["ReferenceLimits", "References"]

_SCHEMES = ("s3", "http", "ffrecord", "lmdb")
_TRICKS = re.compile(r"%(?:2f|5c|2e|25|00)|\\", re.IGNORECASE)
_MAX_URI = 2048
_MAX_REDIRECTS = 3
_OFF = "frames by reference are disabled on this server; send the frame itself"


@dataclass(frozen=True)
class ReferenceLimits:
    """Limits of one reference.

    Attributes:
        max_bytes: largest frame, bytes.
        timeout_s: total time for resolving, connecting, redirects and reading, seconds.
        parallel: references read in parallel; others wait, with their time running.
        private_hosts: allow web hosts on loopback and private networks. Only for your own web servers named in the
            prefixes.
    """

    max_bytes: int = MAX_FRAME_BYTES
    timeout_s: float = 10.0
    parallel: int = 8
    private_hosts: bool = False


class References:
    """Reader of references; created once, used from one event loop, closed by `close`."""

    def __init__(
        self,
        allowed: Sequence[str],
        limits: ReferenceLimits | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Parse the prefixes and create the threads.

        Args:
            allowed: prefixes such as ``s3://bucket/frames/``, ``https://host/clouds/`` or
                ``ffrecord:///data/packed.ffr``; without any, the feature is off.
            limits: the limits.
            headers: sent to every web host among the prefixes, such as credentials.

        Raises:
            SettingsError: a prefix is not a URI, or one of plain files.
        """
        self.limits = limits or ReferenceLimits()
        self._headers = headers or {}
        self._allowed = [_parse_prefix(text) for text in allowed]
        self._threads = ThreadPoolExecutor(self.limits.parallel, thread_name_prefix="reference")

    def check(self, uri: object) -> Location:
        """Parse a URI and check it against the prefixes, without sending anything.

        Raises:
            BadRequest: not a valid URI.
            ReferenceRefused: the feature is off, or no prefix allows it.
        """
        if not self._allowed:
            raise ReferenceRefused(_OFF)
        if not isinstance(uri, str) or len(uri) > _MAX_URI:
            raise BadRequest(f'"uri" must be a string of at most {_MAX_URI} characters')
        try:
            where = parse(uri)
        except UriError as error:
            raise BadRequest(f'"uri": {error}') from None
        parts = _split_location(where)
        if parts is None or not any(_starts_with(parts, prefix) for prefix in self._allowed):
            raise ReferenceRefused("the server does not allow this URI; send the frame itself")
        return where

    async def fetch(self, uri: object) -> bytes:
        """Read the bytes at a URI.

        Raises:
            BadRequest: not a valid URI.
            ReferenceRefused: not allowed by the prefixes, or the host is in a private network.
            ReferenceNotFound: it does not exist.
            FrameTooLarge: over ``max_bytes``.
            DeadlineExceeded: not read within ``timeout_s``.
            NotReady: the store does not respond, or denies this server access.
        """
        where = self.check(uri)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                if where.scheme == "http":
                    return await _fetch_web(where.path, self.limits, self._check_redirect, self._headers)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, _read, where, self.limits)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{where} was not read within {self.limits.timeout_s:g} s; try again, or send the frame itself"
            ) from None
        except ObjectNotFound:
            raise ReferenceNotFound(f"{where} does not exist; check the URI") from None
        except AccessDenied as error:
            raise NotReady(
                f"this server has no permission to read {where}; ask its operator, or send the frame itself"
            ) from error
        except StorageError as error:
            raise NotReady(f"the store of {where} failed; try again later") from error

    def close(self) -> None:
        """Stop the threads; pending reads are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _check_redirect(self, url: str) -> None:
        """Check the target of a redirect like the URI itself."""
        try:
            self.check(url)
        except ClientError:
            raise ReferenceRefused("the URI redirects to a URL that the server does not allow") from None


def _parse_prefix(text: str) -> tuple[str, ...]:
    try:
        where = parse(text)
    except UriError as error:
        raise SettingsError(f"allowed prefix {text!r}: {error}") from None
    parts = _split_location(where)
    if parts is None:
        raise SettingsError(
            f"allowed prefix {text!r} must start with s3://, http(s)://, ffrecord:// or lmdb:// and contain no '..', "
            "'%2f' or '?'"
        )
    return parts


def _split_location(where: Location) -> tuple[str, ...] | None:
    """Scheme, host or bucket, then the path segment by segment; None for URIs that are never allowed."""
    if where.scheme not in _SCHEMES:
        return None
    if where.scheme == "s3":
        return _split("s3", f"{where.cluster}:{where.bucket}", where.path)
    if where.scheme in ("ffrecord", "lmdb"):
        container = _split(where.scheme, where.path, where.member)
        return None if ".." in where.path.split("/") else container
    url = urlsplit(where.path)
    if _TRICKS.search(url.path) or url.fragment:
        return None
    scheme, host = url.scheme.lower(), (url.hostname or "").rstrip(".").lower()
    port = url.port or (443 if scheme == "https" else 80)
    return _split(scheme, f"{host}:{port}", unquote(url.path.removeprefix("/")))


def _split(scheme: str, host: str, path: str) -> tuple[str, ...] | None:
    segments = path.split("/")
    if any(segment in (".", "..") for segment in segments) or "\\" in path:
        return None
    # A prefix may end in a slash: ignore the empty segment after it.
    return (scheme, host, *(segments[:-1] if segments[-1] == "" else segments))


def _starts_with(parts: tuple[str, ...], prefix: tuple[str, ...]) -> bool:
    return parts[: len(prefix)] == prefix


def _read(where: Location, limits: ReferenceLimits) -> bytes:
    """Read from a bucket or container (in a thread), within the size limit."""
    if where.scheme == "s3":
        from serve.storage import s3

        # A third attempt would exceed the deadline.
        options = s3.Options(min(limits.timeout_s, 5.0), limits.timeout_s, attempts=2, parallel=4)
        store = s3.connect(where.cluster, options=options)
        if where.path == "" or where.path.endswith("/"):
            raise ObjectNotFound(str(where))
        info = store.head(where)
        _require_small(info.size, limits)
        return store.read(where, info=info)
    if where.scheme == "ffrecord":
        from serve.storage.access import open_packed_folder

        view = open_packed_folder(where.path).read(where.member)
        _require_small(len(view), limits)
        return bytes(view)
    from serve.storage import lmdb_file

    value = lmdb_file.read(where)
    _require_small(len(value), limits)
    return value


def _require_small(size: int, limits: ReferenceLimits) -> None:
    if size > limits.max_bytes:
        raise FrameTooLarge(
            f"the frame at this URI is larger than {limits.max_bytes} bytes; send a smaller one"
        )


async def _fetch_web(
    url: str, limits: ReferenceLimits, check_redirect: Callable[[str], None], headers: Mapping[str, str]
) -> bytes:
    """GET a web URL; every redirect is checked, and its host resolved once and connected to by address."""
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=limits.timeout_s, follow_redirects=False) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                answer = await _send(client, httpx.URL(url), limits, headers)
                try:
                    if not answer.has_redirect_location:
                        return await _read_body(answer, limits)
                    url = str(httpx.URL(url).join(answer.headers["location"]))
                finally:
                    await answer.aclose()
            except httpx.InvalidURL:
                raise ReferenceRefused("the URI redirects to an invalid URL") from None
            except httpx.TimeoutException:
                raise TimeoutError from None
            except httpx.TransportError as error:
                raise StorageError(f"the web server cannot be read ({type(error).__name__})") from error
            check_redirect(url)
    raise ReferenceRefused(f"the URI redirects more than {_MAX_REDIRECTS} times")


async def _send(
    client: httpx.AsyncClient, url: httpx.URL, limits: ReferenceLimits, headers: Mapping[str, str]
) -> httpx.Response:
    """Send a GET to a checked IP address; Host header, SNI and certificate use the name."""
    address = await _resolve_public(url.host, url.port or (443 if url.scheme == "https" else 80), limits)
    request = client.build_request(
        "GET",
        url.copy_with(host=address),
        headers={**headers, "Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
        extensions={"sni_hostname": url.host},
    )
    return await client.send(request, stream=True)


async def _read_body(answer: httpx.Response, limits: ReferenceLimits) -> bytes:
    if answer.status_code in (404, 410):
        raise ObjectNotFound("no such page")
    if answer.status_code in (401, 403):
        raise AccessDenied("not for this server")
    if answer.status_code != 200:
        raise StorageError(f"the web server answered {answer.status_code}")
    if answer.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise StorageError("the web server sends only compressed bodies")
    announced = answer.headers.get("content-length", "")
    if announced.isdigit():
        _require_small(int(announced), limits)
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        _require_small(len(body), limits)
    return bytes(body)


async def _resolve_public(host: str, port: int, limits: ReferenceLimits) -> str:
    """Resolve a host to one of its IP addresses, all of which must be public.

    Raises:
        ReferenceRefused: any of them is loopback, private, link-local, multicast or reserved.
        StorageError: the name does not resolve.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StorageError(f"{host} cannot be resolved") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not limits.private_hosts and not all(is_public(address) for address in addresses):
        raise ReferenceRefused(
            "the host is in a private network, from which this server does not read frames"
        )
    return addresses[0]

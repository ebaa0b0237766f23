"""Frames that a request names by address instead of sending: which addresses are read, and how far.

Off unless prefixes are given. An address is read only where it begins with one of them, compared part by part
after parsing: ``s3://bucket`` allows ``s3://bucket/…`` and not ``s3://bucket-evil/…``; scheme and host of web
addresses count without regard to case; ``..``, encoded slashes and the like are refused before anything is
compared. Web addresses that do not resolve to public addresses only are refused, at every redirect again, and
the connection goes to the very address that was checked. Reading stops at the size limit and at the deadline.

What a client did wrong is a `ClientError`; a store that fails is `NotReady` and a slow one `DeadlineExceeded`.
Neither says what the store said. Knows no web framework and no batching.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
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
from serve.storage.uri import Location, parse

if TYPE_CHECKING:
    import httpx

__all__ = ["ReferenceLimits", "References"]

_SCHEMES = ("s3", "http", "ffrecord", "lmdb")
_TRICKS = re.compile(r"%(?:2f|5c|2e|25|00)|\\", re.IGNORECASE)
_MAX_URI = 2048
_MAX_REDIRECTS = 3
_OFF = "frames by reference are off on this server; send the frame itself"


@dataclass(frozen=True)
class ReferenceLimits:
    """Bounds on one reference.

    Attributes:
        max_bytes: largest frame, bytes.
        timeout_s: seconds for everything: resolving, connecting, redirects, reading.
        parallel: references read at once; further ones wait, their time running.
        private_hosts: let web addresses lead to loopback and private networks. Only for web servers of one's own
            that the prefixes name.
    """

    max_bytes: int = MAX_FRAME_BYTES
    timeout_s: float = 10.0
    parallel: int = 8
    private_hosts: bool = False


class References:
    """Reads what clients refer to. Made once, used from one event loop; `close` it at the end."""

    def __init__(self, allowed: Sequence[str], limits: ReferenceLimits | None = None) -> None:
        """Prepare.

        Args:
            allowed: prefixes such as ``s3://bucket/frames/``, ``https://host/clouds/`` or
                ``ffrecord:///data/packed.ffr``; none turns the feature off.
            limits: the bounds.

        Raises:
            SettingsError: a prefix is no address, or one of plain files.
        """
        self.limits = limits or ReferenceLimits()
        self._allowed = [_prefix(text) for text in allowed]
        self._threads = ThreadPoolExecutor(self.limits.parallel, thread_name_prefix="reference")

    @property
    def enabled(self) -> bool:
        """Whether any prefix is allowed."""
        return bool(self._allowed)

    def check(self, uri: object) -> Location:
        """The location an address names, if it may be read; nothing is sent.

        Raises:
            BadRequest: not a readable address.
            ReferenceRefused: the feature is off, or no prefix allows it.
        """
        if not self._allowed:
            raise ReferenceRefused(_OFF)
        if not isinstance(uri, str) or len(uri) > _MAX_URI:
            raise BadRequest(f'"uri" must be text of at most {_MAX_URI} letters')
        try:
            where = parse(uri)
        except UriError as error:
            raise BadRequest(f'"uri": {error}') from None
        parts = _parts(where)
        if parts is None or not any(_begins(parts, prefix) for prefix in self._allowed):
            raise ReferenceRefused(
                "this address is not on the server's list of prefixes; send the frame itself"
            )
        return where

    async def fetch(self, uri: object) -> bytes:
        """The bytes at an address.

        Raises:
            BadRequest: not a readable address.
            ReferenceRefused: not allowed by the list, or it leads to a private network.
            ReferenceNotFound: nothing lies there.
            FrameTooLarge: over ``max_bytes``.
            DeadlineExceeded: not read within ``timeout_s``.
            NotReady: the store does not answer, or refuses this server.
        """
        where = self.check(uri)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                if where.scheme == "http":
                    return await _fetch_web(where.path, self.limits, self._check_redirect)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, _read, where, self.limits)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{where} could not be read within {self.limits.timeout_s:g} s; try again, or send the frame itself"
            ) from None
        except ObjectNotFound:
            raise ReferenceNotFound(f"nothing lies at {where}; check the address") from None
        except AccessDenied as error:
            raise NotReady(
                f"the store does not let this server read {where}; its operator must see to it"
            ) from error
        except StorageError as error:
            raise NotReady(f"the store of {where} fails at the moment; try again later") from error

    def close(self) -> None:
        """Let go of the threads; what they still read is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _check_redirect(self, url: str) -> None:
        """A redirect must stay on the list, like the address itself."""
        try:
            self.check(url)
        except ClientError:
            raise ReferenceRefused(
                "the address redirects to a place that is not on the server's list"
            ) from None


# --- comparing addresses ----------------------------------------------------------------------------------


def _prefix(text: str) -> tuple[str, ...]:
    try:
        where = parse(text)
    except UriError as error:
        raise SettingsError(f"allowed prefix {text!r}: {error}") from None
    parts = _parts(where)
    if parts is None:
        raise SettingsError(
            f"allowed prefix {text!r} must be of s3://, http(s)://, ffrecord:// or lmdb://, without '..', '%2f' or '?'"
        )
    return parts


def _parts(where: Location) -> tuple[str, ...] | None:
    """What is compared: scheme, place, then the path bit by bit. None: no such thing is ever allowed."""
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


def _split(scheme: str, place: str, path: str) -> tuple[str, ...] | None:
    bits = path.split("/")
    if any(bit in (".", "..") for bit in bits) or "\\" in path:
        return None
    # A prefix may end in a slash; the empty bit behind it stands for nothing.
    return (scheme, place, *(bits[:-1] if bits[-1] == "" else bits))


def _begins(parts: tuple[str, ...], prefix: tuple[str, ...]) -> bool:
    return parts[: len(prefix)] == prefix


# --- buckets and containers (in a thread) -----------------------------------------------------------------


def _read(where: Location, limits: ReferenceLimits) -> bytes:
    """Read without taking more memory than the limit allows."""
    if where.scheme == "s3":
        from serve.storage import s3

        # Few attempts, each within the deadline: whoever waits has gone by the time of a third.
        patience = s3.Options(min(limits.timeout_s, 5.0), limits.timeout_s, attempts=2, parallel=4)
        store = s3.connect(where.cluster, options=patience)
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
            f"the frame at this address is larger than {limits.max_bytes} bytes; send a smaller one"
        )


# --- web addresses ----------------------------------------------------------------------------------------


async def _fetch_web(url: str, limits: ReferenceLimits, check_redirect: Callable[[str], None]) -> bytes:
    """GET, following few redirects, each checked, resolved once and connected to what it resolved to."""
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=limits.timeout_s, follow_redirects=False) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                answer = await _sent(client, httpx.URL(url), limits)
                try:
                    if not answer.has_redirect_location:
                        return await _body(answer, limits)
                    url = str(httpx.URL(url).join(answer.headers["location"]))
                finally:
                    await answer.aclose()
            except httpx.InvalidURL:
                raise ReferenceRefused("the address leads nowhere") from None
            except httpx.TimeoutException:
                raise TimeoutError from None
            except httpx.TransportError as error:
                raise StorageError(f"the web server cannot be read ({type(error).__name__})") from error
            check_redirect(url)
    raise ReferenceRefused(f"the address redirects more than {_MAX_REDIRECTS} times")


async def _sent(client: httpx.AsyncClient, url: httpx.URL, limits: ReferenceLimits) -> httpx.Response:
    """Connect to an address that was checked; the name stays in Host header, SNI and certificate."""
    address = await _public_address(url.host, url.port or (443 if url.scheme == "https" else 80), limits)
    request = client.build_request(
        "GET",
        url.copy_with(host=address),
        headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
        extensions={"sni_hostname": url.host},
    )
    return await client.send(request, stream=True)


async def _body(answer: httpx.Response, limits: ReferenceLimits) -> bytes:
    if answer.status_code in (404, 410):
        raise ObjectNotFound("no such page")
    if answer.status_code in (401, 403):
        raise AccessDenied("not for this server")
    if answer.status_code != 200:
        raise StorageError(f"the web server answered {answer.status_code}")
    if answer.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise StorageError("the web server insists on sending it compressed")
    announced = answer.headers.get("content-length", "")
    if announced.isdigit():
        _require_small(int(announced), limits)
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        _require_small(len(body), limits)
    return bytes(body)


async def _public_address(host: str, port: int, limits: ReferenceLimits) -> str:
    """One address of the host, after all of them were found to be public.

    Raises:
        ReferenceRefused: any of them is loopback, private, link-local, multicast or reserved.
        StorageError: the name does not resolve.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StorageError(f"{host} cannot be resolved") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not limits.private_hosts and not all(_is_public(address) for address in addresses):
        raise ReferenceRefused(
            "the address leads to a private network, which this server does not read for clients"
        )
    return addresses[0]


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        # An IPv4 address may hide in one of IPv6: mapped, 6to4, Teredo, NAT64.
        hidden = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if hidden is None and address in ipaddress.ip_network("64:ff9b::/96"):
            hidden = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if hidden is not None:
            return _is_public(str(hidden))
    return address.is_global and not address.is_multicast

"""Download one file over HTTP into a cache folder: resumable, hash-checked, atomic.

`fetch` returns the path of a complete, checked file or raises `DownloadError`. An interrupted transfer leaves
``<name>.part`` and ``<name>.part.json`` (the URL, validators and length) to be resumed; a wrong hash or a full disk
leaves nothing. The HTTP client honours the usual proxy variables.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from serve.errors import AccessDenied, DownloadError, ObjectNotFound, StorageError
from serve.storage.hashes import hash_in_name, sha256_of
from serve.storage.lock import hold_lock
from serve.storage.uri import redact_url

if TYPE_CHECKING:
    import httpx

__all__ = ["cache_path", "fetch", "read"]

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_PROGRESS_THAT_COUNTS = 1 << 20
_MAX_REDIRECTS = 5
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_ERRORS: dict[int, type[StorageError]] = {
    401: AccessDenied,
    403: AccessDenied,
    404: ObjectNotFound,
    410: ObjectNotFound,
}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")


def cache_path(url: str, cache_dir: Path, *, sha256_prefix: str | None = None) -> Path:
    """Path of the file of this URL in the cache.

    A file with a hash in its name (or a given one) is stored directly in `cache_dir`, so that a person can put it
    there. Other names can stand for different files on different servers and get a folder named by the URL's hash.

    Raises:
        DownloadError: the URL is not http(s), or has no file name.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(
            f"only http:// and https:// addresses can be downloaded, not '{redact_url(url)}'."
        )
    name = unquote(parts.path).rsplit("/", 1)[-1]
    if name in ("", ".", "..") or any(character in name for character in '\\\0\n\r:*?"<>|'):
        raise DownloadError(f"cannot download '{redact_url(url)}': it does not end in a usable file name")
    if sha256_prefix or hash_in_name(url):
        return cache_dir / name
    return cache_dir / hashlib.sha256(url.encode()).hexdigest()[:12] / name


def fetch(
    url: str,
    cache_dir: Path,
    *,
    sha256_prefix: str | None = None,
    progress: bool = True,
    timeout_s: float = 30.0,
    retries: int = 4,
    backoff_s: float = 0.5,
) -> Path:
    """Return the local path of the file at `url`; download it unless a valid copy is cached.

    Safe for several processes and threads: one downloads, the others wait and use its file.

    Args:
        url: http(s) URL. User name, password and query string never appear in messages or logs.
        cache_dir: folder of the cache, created if missing; see `cache_path`.
        sha256_prefix: required leading hex digits of the sha256; by default those in the file's name (see
            `hash_in_name`). Without either, a cached file is checked against the hash recorded when it was
            downloaded, and used unchecked if a person put it there.
        progress: show a progress bar on standard error if that is a terminal.
        timeout_s: seconds without a connection or without a byte after which an attempt fails.
        retries: further attempts after one without progress (an attempt that gained 1 MiB does not count).
        backoff_s: seconds before the first retry; doubled each time, at most 30. The server's Retry-After takes
            precedence.

    Raises:
        DownloadError: unreachable, rejected, interrupted too often, wrong hash, disk full. The message says which
            file to put where by hand.
    """
    expected = (sha256_prefix or hash_in_name(url) or "").lower() or None
    target = cache_path(url, cache_dir, sha256_prefix=expected)
    job = _Transfer(url, target, expected, progress, timeout_s, retries, backoff_s)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_good(target, expected):
            return target
        with hold_lock(target):
            if not _is_good(target, expected):
                job.run()
    except OSError as error:
        raise DownloadError(f"cannot write to the cache folder {target.parent}: {error}") from error
    return target


def read(url: str, *, timeout_s: float = 30.0, retries: int = 4, backoff_s: float = 0.5) -> bytes:
    """Return the bytes of the file at `url`, whatever it is called; nothing is cached. Arguments as of `fetch`.

    Raises:
        ObjectNotFound: the server has no such file.
        AccessDenied: the server refuses it.
        DownloadError: unreachable, rejected, interrupted too often, disk full.
    """
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as folder:
        job = _Transfer(url, Path(folder, "body"), None, False, timeout_s, retries, backoff_s, by_hand=False)
        return job.read()


class _Retry(Exception):
    """A failed attempt that is worth another one; `wait_s` is the delay that the server asked for."""

    def __init__(self, why: str, *, wait_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.unreachable = unreachable


@dataclass(frozen=True)
class _Transfer:
    url: str
    target: Path
    expected: str | None
    progress: bool
    timeout_s: float
    retries: int
    backoff_s: float
    by_hand: bool = True  # whether a person can help by putting the file there

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def notes(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def run(self) -> None:
        resumed = self._size() > 0
        self._download()
        found = sha256_of(self.part)
        if self.expected and not found.startswith(self.expected) and resumed:
            _LOG.warning("the resumed %s has a wrong hash; downloading it from the start", self.target.name)
            self._discard()
            self._download()
            found = sha256_of(self.part)
        if self.expected and not found.startswith(self.expected):
            self._discard()
            raise DownloadError(
                f"{redact_url(self.url)} has sha256 {found[:8]}…, expected {self.expected}; it was altered on the way "
                "or on the server, and was deleted"
            )
        _record_hash(self.target, found)
        os.replace(self.part, self.target)
        self.notes.unlink(missing_ok=True)

    def read(self) -> bytes:
        self._download()
        return self.part.read_bytes()

    def _download(self) -> None:
        import httpx

        failures = 0
        limits = httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, 10.0))
        with httpx.Client(timeout=limits, follow_redirects=True, max_redirects=_MAX_REDIRECTS) as client:
            while True:
                before = self._size()
                try:
                    return self._attempt(client)
                except _Retry as retry:
                    gained = self._size() - before
                    failures = 1 if gained >= _PROGRESS_THAT_COUNTS else failures + 1
                    allowed = min(self.retries, 1) if retry.unreachable else self.retries
                    if failures > allowed:
                        raise self._failure(str(retry), is_final=False) from retry
                    wait_s = min(self.backoff_s * 2.0 ** (failures - 1), 30.0)
                    if retry.wait_s is not None:
                        wait_s = min(retry.wait_s, 60.0)
                    _LOG.info("%s: %s; retrying in %.1f s", self.target.name, retry, wait_s)
                    time.sleep(wait_s)

    def _attempt(self, client: httpx.Client) -> None:
        import httpx

        have, notes = self._resumable()
        headers = {"Accept-Encoding": "identity", "User-Agent": "mmdet3d-serve"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := _validator(notes):
                headers["If-Range"] = validator
        try:
            with client.stream("GET", self.url, headers=headers) as response:
                self._receive(response, have, notes)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = f"{urlsplit(self.url).hostname} cannot be reached ({_describe(error)})"
            raise _Retry(reason, unreachable=True) from error
        except httpx.TimeoutException as error:
            raise _Retry(f"no data for {self.timeout_s:g} s") from error
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise self._failure(f"the server's redirect cannot be followed ({error})") from error
        except httpx.TransportError as error:
            raise _Retry(f"the connection was lost ({_describe(error)})") from error

    def _receive(self, response: httpx.Response, have: int, notes: dict[str, Any]) -> None:
        status = response.status_code
        if status == 416 and have:
            self._discard()
            raise _Retry("the server has a different file now")
        if status in _RETRIED_STATUS:
            raise _Retry(f"the server answered {status}", wait_s=_retry_after(response))
        if status not in (200, 206) or (status == 206 and not have):
            raise self._failure(f"the server answered {status} for {redact_url(self.url)}", status)
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise self._failure("the server sends only compressed bodies")
        if self.url.startswith("https:") and response.url.scheme == "http" and not self.expected:
            raise self._failure("the server redirects from https to plain http")

        length = _length(response)
        if status == 206:
            total = _read_resumed_total(response, have, notes)
            if total is None:
                self._discard()
                raise _Retry("the server has a different file now")
        else:
            have, total = 0, length
        if length is not None:
            self._check_disk_space(length)
        self._write_notes(response, total)
        received = self._write_body(response, have, total)
        if total is not None and received != total:
            raise _Retry(f"received only {received} of {total} bytes")

    def _write_body(self, response: httpx.Response, have: int, total: int | None) -> int:
        from tqdm import tqdm

        bar = tqdm(
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=self.target.name,
            disable=None if self.progress else True,
            leave=False,
        )
        with bar, self._map_disk_errors(), self.part.open("r+b" if have else "wb") as file:
            file.seek(have)
            file.truncate()
            try:
                for piece in response.iter_raw():
                    _write(file, piece)
                    have += len(piece)
                    bar.update(len(piece))
            finally:
                file.flush()
            os.fsync(file.fileno())
        return have

    @contextlib.contextmanager
    def _map_disk_errors(self) -> Iterator[None]:
        """Delete the part when the disk fails; it stays when the network does."""
        try:
            yield
        except OSError as error:
            self._discard()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise DownloadError(f"cannot write {self.target}: {'disk full' if full else error}") from error

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _resumable(self) -> tuple[int, dict[str, Any]]:
        """Read how many bytes of the part can be kept, and the notes on them."""
        notes: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads(self.notes.read_text())
            notes = loaded if isinstance(loaded, dict) else {}
        size = self._size()
        known = notes.get("url") == _digest(self.url)
        checkable = _validator(notes) is not None or self.expected is not None
        total = notes.get("total")
        short = not isinstance(total, int) or size < total
        return (size, notes) if size and known and checkable and short else (0, {})

    def _write_notes(self, response: httpx.Response, total: int | None) -> None:
        notes = {
            "url": _digest(self.url),
            "etag": response.headers.get("etag"),
            "last_modified": response.headers.get("last-modified"),
            "total": total,
        }
        with self._map_disk_errors():
            self.notes.write_text(json.dumps(notes))

    def _discard(self) -> None:
        for path in (self.part, self.notes):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _check_disk_space(self, length: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if length > free:
            self._discard()
            raise DownloadError(
                f"disk full: {self.target.name} needs {length / 1e6:.0f} MB more, {free / 1e6:.0f} MB are free in "
                f"{self.target.parent}; make room or use another cache folder"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failure(self, reason: str, status: int = 0, *, is_final: bool = True) -> StorageError:
        """Make the error of a download that is given up."""
        url = redact_url(self.url)
        if not self.by_hand and status in _ERRORS:
            return _ERRORS[status](f"{url} cannot be read: the server answered {status}")
        error = DownloadError(
            f"{reason}; download {url} on another machine and save it as {self.target}"
            if self.by_hand
            else f"{url} cannot be read: {reason}"
        )
        error.is_final = is_final
        return error


def _write(file: IO[bytes], piece: bytes) -> None:
    """Write one piece; tests replace it to fill the disk."""
    file.write(piece)


def _is_good(path: Path, expected: str | None) -> bool:
    if not path.is_file():
        return False
    if expected is None:
        record = _hash_file(path)
        expected = record.read_text().strip() if record.is_file() else None
    if expected is None or sha256_of(path).startswith(expected):
        return True
    _LOG.warning("the cached %s does not have the hash %s…; downloading it again", path, expected[:8])
    return False


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _record_hash(path: Path, digest: str) -> None:
    if hash_in_name(path.name) is None:
        _hash_file(path).write_text(digest + "\n")


def _validator(notes: dict[str, Any]) -> str | None:
    """Value for If-Range: a strong ETag, or else a date (RFC 9110, 13.1.5)."""
    etag, date = notes.get("etag"), notes.get("last_modified")
    if isinstance(etag, str) and etag.startswith('"'):
        return etag
    return date if isinstance(date, str) and etag is None else None


def _read_resumed_total(response: httpx.Response, have: int, notes: dict[str, Any]) -> int | None:
    """Full length according to a 206 response, or None if it does not continue the part."""
    found = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
    if not found or int(found.group(1)) != have or found.group(3) == "*":
        return None
    total = int(found.group(3))
    if notes.get("total") not in (None, total):
        return None
    etag = response.headers.get("etag")
    return total if etag is None or notes.get("etag") in (None, etag) else None


def _length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isdigit() else None


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _digest(url: str) -> str:
    """Hash of a URL, which may contain secrets."""
    return hashlib.sha256(url.encode()).hexdigest()

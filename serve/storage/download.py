"""Fetch one file over HTTP into a cache folder: resumed, hash-checked, atomic.

`fetch` gives back the path of a complete, checked file or raises `DownloadError`; nothing in between is
ever seen under the final name. A broken-off transfer leaves ``<name>.part`` (and ``<name>.part.json``, which
says what it is a part of) to be taken up again; a wrong hash or a full disk leaves nothing.

Does not know what the bytes are (no torch, no model index) and does not know other schemes than http and
https. It reads no setting: the cache folder is an argument. The HTTP client itself honours the usual proxy
variables.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from serve.errors import DownloadError

if TYPE_CHECKING:
    import httpx

__all__ = ["cache_path", "fetch", "hash_in_name", "one_at_a_time", "redact_url", "sha256_of"]

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_PROGRESS_THAT_COUNTS = 1 << 20
_MAX_REDIRECTS = 5
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[A-Za-z0-9]+$")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")


def hash_in_name(name: str) -> str | None:
    """Give the 8 hex digits of sha256 that OpenMMLab (and torch.hub) put at the end of a file name, or None.

    Args:
        name: a file name or URL, such as ``…-b086d0a3.pth``.
    """
    found = _HASH_IN_NAME.search(urlsplit(name).path)
    return found.group(1) if found else None


def sha256_of(path: Path) -> str:
    """Give the sha256 of a file as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def cache_path(url: str, cache_dir: Path, *, sha256_prefix: str | None = None) -> Path:
    """Say where `fetch` keeps the file of this URL.

    A file with a hash in its name (or one given) lies directly in `cache_dir`, under the name OpenMMLab gave
    it, so that a person can put it there by hand. Any other name could be used by two servers for two
    things, so it gets a folder named by the URL's own hash.

    Raises:
        DownloadError: the URL is not http(s), or ends in no file name.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(
            f"only http:// and https:// addresses can be downloaded, not '{redact_url(url)}'."
        )
    name = unquote(parts.path).rsplit("/", 1)[-1]
    if name in ("", ".", "..") or any(character in name for character in '\\\0\n\r:*?"<>|'):
        raise DownloadError(f"'{redact_url(url)}' does not end in a usable file name.")
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
    """Give the local path of the file behind `url`, downloading it unless a good copy is cached.

    Safe when several processes or threads ask for the same file: one downloads, the others wait and use it.

    Args:
        url: http(s) address. User name, password and query string never show in messages or logs.
        cache_dir: folder to keep it in; made when missing. See `cache_path`.
        sha256_prefix: leading hex digits the file's sha256 must have. Left out: those in the file's name,
            where it carries some (see `hash_in_name`); a cached file without any is checked against the hash
            noted when it was downloaded, and taken as it is when a person put it there.
        progress: show a bar on standard error where that is a terminal.
        timeout_s: seconds without a connection, or without a byte, after which an attempt is given up.
        retries: further attempts after one that got no further (an attempt that gained 1 MiB does not count).
        backoff_s: seconds before the first retry; doubled each time, at most 30. A server's Retry-After wins.

    Raises:
        DownloadError: not reachable, refused, broken off too often, wrong hash, no room on the disk. The
            message says which file to put where by hand.
    """
    expected = (sha256_prefix or hash_in_name(url) or "").lower() or None
    target = cache_path(url, cache_dir, sha256_prefix=expected)
    job = _Transfer(url, target, expected, progress, timeout_s, retries, backoff_s)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_good(target, expected):
            return target
        with one_at_a_time(target):
            if not _is_good(target, expected):
                job.run()
    except OSError as error:
        raise DownloadError(f"cannot write to the cache folder {target.parent}: {error}.") from error
    return target


# --- one transfer -----------------------------------------------------------------------------------------


class _Again(Exception):
    """Says that an attempt failed in a way another may not; `wait_s` is what the server asked for."""

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
            _LOG.warning("the resumed %s has a wrong hash; starting over.", self.target.name)
            self._discard()
            self._download()
            found = sha256_of(self.part)
        if self.expected and not found.startswith(self.expected):
            self._discard()
            raise DownloadError(
                f"{redact_url(self.url)} arrived with sha256 {found[:8]}… where {self.expected} was promised; "
                "it was altered on the way or on the server, and was thrown away."
            )
        _note_hash(self.target, found)
        os.replace(self.part, self.target)
        self.notes.unlink(missing_ok=True)

    def _download(self) -> None:
        import httpx

        failures = 0
        limits = httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, 10.0))
        with httpx.Client(timeout=limits, follow_redirects=True, max_redirects=_MAX_REDIRECTS) as client:
            while True:
                before = self._size()
                try:
                    return self._attempt(client)
                except _Again as again:
                    gained = self._size() - before
                    failures = 1 if gained >= _PROGRESS_THAT_COUNTS else failures + 1
                    allowed = min(self.retries, 1) if again.unreachable else self.retries
                    if failures > allowed:
                        raise DownloadError(self._by_hand(str(again))) from again
                    wait_s = min(self.backoff_s * 2.0 ** (failures - 1), 30.0)
                    if again.wait_s is not None:
                        wait_s = min(again.wait_s, 60.0)
                    _LOG.info("%s: %s; trying again in %.1f s.", self.target.name, again, wait_s)
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
            why = f"{urlsplit(self.url).hostname} cannot be reached ({_reason(error)})"
            raise _Again(why, unreachable=True) from error
        except httpx.TimeoutException as error:
            raise _Again(f"nothing arrived for {self.timeout_s:g} s") from error
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise DownloadError(self._by_hand(f"the server redirects to nowhere usable ({error})")) from error
        except httpx.TransportError as error:
            raise _Again(f"the connection broke off ({_reason(error)})") from error

    def _receive(self, response: httpx.Response, have: int, notes: dict[str, Any]) -> None:
        status = response.status_code
        if status == 416 and have:
            self._discard()
            raise _Again("the server has a different file now")
        if status in _RETRIED_STATUS:
            raise _Again(f"the server answered {status}", wait_s=_retry_after(response))
        if status not in (200, 206) or (status == 206 and not have):
            raise DownloadError(self._by_hand(f"the server answered {status} for {redact_url(self.url)}"))
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise DownloadError(self._by_hand("the server insists on sending it compressed"))
        if self.url.startswith("https:") and response.url.scheme == "http" and not self.expected:
            raise DownloadError(self._by_hand("the server redirects from https to plain http"))

        length = _length(response)
        if status == 206:
            total = _resumed_total(response, have, notes)
            if total is None:
                self._discard()
                raise _Again("the server has a different file now")
        else:
            have, total = 0, length
        if length is not None:
            self._make_room_for(length)
        self._write_notes(response, total)
        got = self._write_body(response, have, total)
        if total is not None and got != total:
            raise _Again(f"only {got} of {total} bytes arrived")

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
        with bar, self._kept_or_discarded(), self.part.open("r+b" if have else "wb") as file:
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
    def _kept_or_discarded(self) -> Iterator[None]:
        """Keep the part when the network fails, drop it when the disk does."""
        try:
            yield
        except OSError as error:
            self._discard()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "no room left on the disk" if full else str(error)
            raise DownloadError(f"cannot write {self.target}: {why}.") from error

    # --- the part and what is known about it ---

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _resumable(self) -> tuple[int, dict[str, Any]]:
        """Give how many bytes may be kept, and the notes on them."""
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
        with self._kept_or_discarded():
            self.notes.write_text(json.dumps(notes))

    def _discard(self) -> None:
        for path in (self.part, self.notes):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _make_room_for(self, length: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if length > free:
            self._discard()
            raise DownloadError(
                f"no room left on the disk: {self.target.name} needs {length / 1e6:.0f} MB more, but only "
                f"{free / 1e6:.0f} MB are free in {self.target.parent}."
            )

    def _by_hand(self, why: str) -> str:
        return f"{why}; fetch {redact_url(self.url)} on a machine that can and save it as {self.target}."


# --- small parts ------------------------------------------------------------------------------------------


def _write(file: IO[bytes], piece: bytes) -> None:
    """Write one piece; a seam for the tests of a full disk."""
    file.write(piece)


def _is_good(path: Path, expected: str | None) -> bool:
    if not path.is_file():
        return False
    if expected is None:
        noted = _hash_note(path)
        expected = noted.read_text().strip() if noted.is_file() else None
    if expected is None or sha256_of(path).startswith(expected):
        return True
    _LOG.warning("the cached %s does not have the hash %s…; fetching it again.", path, expected[:8])
    return False


def _hash_note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _note_hash(path: Path, digest: str) -> None:
    if hash_in_name(path.name) is None:
        _hash_note(path).write_text(digest + "\n")


def _validator(notes: dict[str, Any]) -> str | None:
    """Give what If-Range may carry: a strong ETag, or else a date (RFC 9110, 13.1.5)."""
    etag, date = notes.get("etag"), notes.get("last_modified")
    if isinstance(etag, str) and etag.startswith('"'):
        return etag
    return date if isinstance(date, str) and etag is None else None


def _resumed_total(response: httpx.Response, have: int, notes: dict[str, Any]) -> int | None:
    """Give the full length a 206 promises, or None when it does not continue what we have."""
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


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _digest(url: str) -> str:
    """Name a URL without keeping what may be secret in it."""
    return hashlib.sha256(url.encode()).hexdigest()


def redact_url(url: str) -> str:
    """Give the URL without user name, password, query and fragment: fit for messages."""
    parts = urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Hold the lock of this file against other processes and threads; the lock file is gone afterwards."""
    path = target.with_name(target.name + ".lock")
    while True:
        handle = path.open("a")
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _LOG.info("another process is downloading %s; waiting for it.", target.name)
                fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle.fileno()).st_ino:
                    break
        except BaseException:
            handle.close()
            raise
        handle.close()  # the holder removed the file we waited on: take the new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()

"""Files at web URLs that the user trusts (`serve.storage.references` reads those of clients).

`serve.storage.download` transfers them. Files with a hash in their name are stored in the cache folder itself, where a
person may have put them; others are stored per version (ETag or date) in the bounded part of the cache, or downloaded
each time if the server sends neither.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from pathlib import Path

from serve.errors import AccessDenied, ObjectNotFound, StorageError
from serve.storage import download
from serve.storage.cache import Cache, map_disk_errors
from serve.storage.hashes import hash_in_name
from serve.storage.uri import Location

__all__ = ["exists", "local_path", "probe", "read"]

_TIMEOUT_S = 30.0


def read(where: Location) -> bytes:
    """Read all bytes at the URL.

    Raises:
        ObjectNotFound: it does not exist.
        AccessDenied: the server refuses it.
        DownloadError: unreachable, rejected, or interrupted too often.
    """
    with map_disk_errors(tempfile.gettempdir()):
        return download.read(where.path)


def local_path(where: Location, cache: Cache, *, sha256: str | None = None, progress: bool = True) -> Path:
    """Return the path of a checked copy.

    Raises:
        DownloadError: as `read`, or a wrong hash.
    """
    if sha256 or hash_in_name(where.path):
        return download.fetch(where.path, cache.folder.parent, sha256_prefix=sha256, progress=progress)
    version = _version(where) or uuid.uuid4().hex
    folder = cache.folder / hashlib.sha256(f"{where.path}\n{version}".encode()).hexdigest()[:32]
    path = download.fetch(where.path, folder, progress=progress)
    os.utime(folder)
    cache.trim(keep=folder / path.name)
    return path


def exists(where: Location) -> bool:
    """Whether the URL exists.

    Raises:
        StorageError: the server cannot be reached, or denies access.
    """
    try:
        _headers(where)
    except ObjectNotFound:
        return False
    return True


def probe(where: Location) -> None:
    """Ask for the URL as `read` does, without its body; addresses that are signed for reading refuse other questions.

    Raises:
        ObjectNotFound: it does not exist.
        AccessDenied: the server refuses it.
        StorageError: the server cannot be reached, or fails.
    """
    _headers(where, "GET")


def _version(where: Location) -> str | None:
    headers = _headers(where)
    return headers.get("etag") or headers.get("last-modified")


def _headers(where: Location, method: str = "HEAD") -> dict[str, str]:
    import httpx

    try:
        with httpx.stream(method, where.path, follow_redirects=True, timeout=_TIMEOUT_S) as answer:
            pass
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StorageError(f"the server of {where} cannot be reached ({type(error).__name__})") from error
    if answer.status_code in (404, 410):
        raise ObjectNotFound(f"{where} does not exist; check the URL")
    if answer.status_code in (401, 403):
        raise AccessDenied(f"the server denies access to {where} (HTTP {answer.status_code})")
    if answer.status_code >= 400 and answer.status_code not in (405, 501):  # HEAD may be unsupported
        raise StorageError(f"{where} failed with HTTP {answer.status_code}; try again later")
    return dict(answer.headers) if answer.status_code < 400 else {}

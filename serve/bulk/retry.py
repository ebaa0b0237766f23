"""Patience with sources and destinations that fail for a time.

botocore and `serve.storage.download` repeat a request within seconds; what is repeated here outlasts a restart of the
server. What no repetition mends (no such object, no access, a full disk of this machine) is raised at once.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar
from urllib.parse import urlsplit

from serve import storage
from serve.errors import AccessDenied, DownloadError, ObjectNotFound, StorageError, UriError
from serve.protocol.batch import Body

__all__ = ["SourceGone", "keys_patiently", "on_server", "read_patiently", "repeat", "repeat_reading"]

T = TypeVar("T")

# Two minutes for results, which are computed; half a minute for a frame, whose source is asked for its health then.
_WRITE_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_READ_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
# A server that stalls takes minutes for one attempt; no other one begins so long after the first has failed.
_PATIENCE_S = 120.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FINAL = (ObjectNotFound, AccessDenied, UriError)
_Place = tuple[str, str]  # cluster and bucket, or scheme and host
_last_read: dict[_Place, storage.Location] = {}  # by this process


class SourceGone(StorageError):
    """The whole source fails, not one of its frames: the run ends, and nothing is recorded as the frames' error."""


def repeat(action: Callable[[], T], pauses_s: tuple[float, ...] = ()) -> T:
    """Do something with a bucket or server, again after each of the pauses (seconds) if that fails.

    Raises:
        StorageError: the last failure, or one that no repetition mends.
    """
    ends_at: float | None = None
    for pause_s in pauses_s or _WRITE_PAUSES_S:
        try:
            return action()
        except StorageError as error:
            now = time.monotonic()
            ends_at = now + _PATIENCE_S if ends_at is None else ends_at
            if _is_final(error) or now > ends_at:
                raise
            time.sleep(pause_s)
    return action()


def repeat_reading(action: Callable[[], T]) -> T:
    """Do as `repeat`, for as long as for a frame."""
    return repeat(action, _READ_PAUSES_S)


def keys_patiently(where: storage.Location) -> Iterator[str]:
    """List a bucket or prefix as `serve.storage.s3.S3.keys`, and go on behind the last name if that fails for a time.

    Raises:
        StorageError: as `repeat`.
    """
    from serve.storage import s3

    last, pauses = "", iter(_READ_PAUSES_S)
    while True:
        try:
            for name in s3.connect(where.cluster).keys(where, after=last):
                last, pauses = name, iter(_READ_PAUSES_S)
                yield name
            return
        except StorageError as error:
            if _is_final(error) or (pause_s := next(pauses, None)) is None:
                raise
            time.sleep(pause_s)


def on_server(uri: str) -> bool:
    """Whether a path or URI is in a bucket or on a web server, which may fail for a time."""
    return storage.is_remote(uri) and storage.parse(uri).scheme in ("s3", "http")


def read_patiently(read: Callable[[], Body], origin: str | Mapping[str, str]) -> Body:
    """Read a frame of a bucket or web server, with patience.

    Args:
        read: reads it.
        origin: URI of the frame, or of each of its parts.

    Raises:
        StorageError: this frame cannot be read.
        SourceGone: its bucket or server does not answer at all, or refuses the credentials; or the disk is full onto
            which it is copied.
    """
    uris = [origin] if isinstance(origin, str) else [*origin.values()]
    # Parts of a frame may lie in several places, on this machine too.
    places = {_place(where): where for where in map(storage.parse, filter(on_server, uris))}
    try:
        body = repeat_reading(read)
    except ObjectNotFound:
        raise
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            raise SourceGone(str(error)) from error
        for where in places.values():
            _check_health(where, error)
        raise
    _last_read.update({place: where for place, where in places.items() if not where.path.endswith("/")})
    return body


def _is_final(error: StorageError) -> bool:
    return isinstance(error, _FINAL) or (isinstance(error, DownloadError) and error.is_final)


def _place(where: storage.Location) -> _Place:
    if where.scheme == "http":
        parts = urlsplit(where.path)
        return parts.scheme, parts.netloc
    return where.cluster, where.bucket


def _check_health(where: storage.Location, failure: StorageError) -> None:
    """Ask the bucket or server of what cannot be read for something else.

    Raises:
        SourceGone: it gives nothing else either.
    """
    try:
        _ask(_root(where))
    except StorageError as error:
        # Many a server of files has no first page, and answers 400 or 500 there.
        may_read = where.scheme == "http" or isinstance(error, AccessDenied)
        if not (may_read and _reads_others(where)):
            raise SourceGone(f"the source does not answer: {error}") from failure


def _root(where: storage.Location) -> storage.Location:
    """Return what is asked for, of a bucket its listing below the folder."""
    if where.scheme == "http":
        scheme, host = _place(where)
        return replace(where, path=f"{scheme}://{host}/")
    return replace(where, path=where.path.rpartition("/")[0])


def _ask(where: storage.Location, *, is_file: bool = False) -> None:
    from serve.storage import http, s3

    if where.scheme == "s3":
        store = s3.connect(where.cluster)
        (store.is_file if is_file else store.is_folder)(where)
        return
    try:
        http.probe(where)
    except ObjectNotFound:  # which is an answer
        return


def _reads_others(where: storage.Location) -> bool:
    """Whether another frame of the bucket or server can be read, by an account that may not list it."""
    for pause_s in (0.0, *_READ_PAUSES_S):  # the first frames of a process are read at the same time
        time.sleep(pause_s)
        if (other := _last_read.get(_place(where))) is not None:
            try:
                _ask(other, is_file=True)
            except StorageError:
                return False
            return True
    return False

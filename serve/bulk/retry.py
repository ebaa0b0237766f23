"""Patience with sources and destinations that fail for a time.

botocore repeats a request within seconds; what is repeated here outlasts a restart of the server. What no repetition
mends (no such object, no access, a full disk of this machine) is raised at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from serve import storage
from serve.errors import AccessDenied, ObjectNotFound, StorageError, UriError
from serve.protocol.batch import Body

__all__ = ["SourceGone", "read_patiently", "repeat"]

T = TypeVar("T")

# Two minutes for results, which are computed; half a minute for a frame, whose source is asked for its health then.
_WRITE_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_READ_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
_FINAL = (ObjectNotFound, AccessDenied, UriError)
_last_read: dict[tuple[str, str], storage.Location] = {}  # by this process, of each cluster and bucket


class SourceGone(StorageError):
    """The whole source fails, not one of its frames: the run ends, and nothing is recorded as the frames' error."""


def repeat(action: Callable[[], T], pauses_s: tuple[float, ...] = ()) -> T:
    """Do something with a bucket, again after each of the pauses (seconds) if the bucket fails.

    Raises:
        StorageError: the last failure, or one that no repetition mends.
    """
    for pause_s in pauses_s or _WRITE_PAUSES_S:
        try:
            return action()
        except _FINAL:
            raise
        except StorageError:
            time.sleep(pause_s)
    return action()


def read_patiently(read: Callable[[], Body], origin: str | Mapping[str, str]) -> Body:
    """Read a frame of a bucket, with patience.

    Args:
        read: reads it.
        origin: URI of the frame, or of each of its parts.

    Raises:
        StorageError: this frame cannot be read.
        SourceGone: its bucket does not answer at all, or refuses the credentials.
    """
    uris = [origin] if isinstance(origin, str) else [*origin.values()]
    # Parts of a frame may lie in several places, on this machine too.
    where = next(each for each in map(storage.parse, uris) if each.scheme == "s3")
    try:
        body = repeat(read, _READ_PAUSES_S)
    except ObjectNotFound:
        raise
    except StorageError as error:
        _check_health(where, error)
        raise
    if not where.path.endswith("/"):
        _last_read[where.cluster, where.bucket] = where
    return body


def _check_health(where: storage.Location, failure: StorageError) -> None:
    """Ask the bucket of an object that cannot be read for something else."""
    from serve.storage import s3

    folder = storage.Location("s3", where.path.rpartition("/")[0], where.bucket, where.cluster)
    try:
        s3.connect(where.cluster).is_folder(folder)
    except StorageError as error:
        if not (isinstance(error, AccessDenied) and _reads_others(where)):
            raise SourceGone(f"the source does not answer: {error}") from failure


def _reads_others(where: storage.Location) -> bool:
    """Whether another frame of the bucket can be read, by an account that may not list it."""
    from serve.storage import s3

    for pause_s in (0.0, *_READ_PAUSES_S):  # the first frames of a process are read at the same time
        time.sleep(pause_s)
        if (other := _last_read.get((where.cluster, where.bucket))) is not None:
            try:
                return s3.connect(other.cluster).is_file(other)
            except StorageError:
                return False
    return False

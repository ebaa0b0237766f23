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
        SourceGone: its bucket does not answer at all, or lets nobody in.
    """
    try:
        return repeat(read, _READ_PAUSES_S)
    except ObjectNotFound:
        raise
    except StorageError as error:
        uris = [origin] if isinstance(origin, str) else [*origin.values()]
        # Parts of a frame may lie in several places, on this machine too.
        _check_health(next(uri for uri in uris if storage.parse(uri).scheme == "s3"), error)
        raise


def _check_health(uri: str, failure: StorageError) -> None:
    """Ask the bucket of an object that cannot be read for something else."""
    from serve.storage import s3

    where = storage.parse(uri)
    folder = storage.Location("s3", where.path.rpartition("/")[0], where.bucket, where.cluster)
    try:
        s3.connect(where.cluster).is_folder(folder)
    except StorageError as error:
        raise SourceGone(f"the source does not answer: {error}") from failure

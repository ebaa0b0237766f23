"""Values of LMDB databases, read only: the one seam to the ``lmdb`` package.

A database is a folder with ``data.mdb`` in it, or a single file. It is opened without its lock file, so a
read-only mount will do; nobody may write to it meanwhile. Opened once per process and kept, since LMDB
forbids opening a database twice.

Does not write and knows no named sub-databases.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.errors import ObjectNotFound, StorageError
from serve.storage.uri import Location

__all__ = ["keys", "read"]

_OPEN: dict[tuple[int, str], Any] = {}
_OPENING = threading.Lock()


def read(where: Location) -> bytes:
    """The value of ``where.member``.

    Raises:
        ObjectNotFound: no such database or key.
        StorageError: damaged, or not a database.
    """
    import lmdb

    if not where.member:
        raise StorageError(f"say which key: lmdb://{where.path}#key")
    try:
        with _database(where.path).begin(buffers=False) as transaction:
            value = transaction.get(where.member.encode())
    except lmdb.Error as error:
        raise StorageError(f"{where} cannot be read ({type(error).__name__})") from error
    if value is None:
        raise ObjectNotFound(f"{where.path} has no key '{where.member}'")
    return bytes(value)


def keys(path: str) -> Iterator[str]:
    """All keys of a database, in its order; those that are no UTF-8 are left out.

    Raises:
        StorageError: as `read`.
    """
    import lmdb

    try:
        with _database(path).begin() as transaction:
            for key in transaction.cursor().iternext(values=False):
                try:
                    yield bytes(key).decode()
                except UnicodeDecodeError:
                    continue
    except lmdb.Error as error:
        raise StorageError(f"lmdb://{path} cannot be read ({type(error).__name__})") from error


def _database(path: str) -> Any:
    import lmdb

    place = Path(path).expanduser().resolve()
    if not place.exists():
        raise ObjectNotFound(f"there is no LMDB database {path}")
    key = (os.getpid(), str(place))
    with _OPENING:
        if key not in _OPEN:
            try:
                _OPEN[key] = lmdb.open(
                    str(place), subdir=place.is_dir(), readonly=True, lock=False, readahead=False
                )
            except lmdb.Error as error:
                raise StorageError(f"{path} is no readable LMDB database ({type(error).__name__})") from error
        return _OPEN[key]

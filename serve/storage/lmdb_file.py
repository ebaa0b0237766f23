"""Read values of LMDB databases.

A database is a folder with ``data.mdb`` in it, or a single file. It is opened without its lock file, so a read-only
mount suffices, but no process may write to it meanwhile. It is opened once per process and kept open, since LMDB
forbids opening a database twice. Named sub-databases are not supported.
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
    """Read the value of ``where.member``.

    Raises:
        ObjectNotFound: no such database or key.
        StorageError: damaged, or not a database.
    """
    import lmdb

    if not where.member:
        raise StorageError(f"{where} names no key; write lmdb://{where.path}#key")
    try:
        with _database(where.path).begin(buffers=False) as transaction:
            value = transaction.get(where.member.encode(errors="surrogateescape"))
    except lmdb.Error as error:
        raise StorageError(f"{where} cannot be read ({type(error).__name__})") from error
    if value is None:
        raise ObjectNotFound(f"{where.path} has no key '{where.member}'")
    return bytes(value)


def keys(path: str) -> Iterator[str]:
    """Yield all keys of a database, in its order; bytes that are not UTF-8 as names of files have them (PEP 383).

    Raises:
        StorageError: as `read`.
    """
    import lmdb

    try:
        with _database(path).begin() as transaction:
            for key in transaction.cursor().iternext(values=False):
                yield bytes(key).decode(errors="surrogateescape")
    except lmdb.Error as error:
        raise StorageError(f"lmdb://{path} cannot be read ({type(error).__name__})") from error


def _database(path: str) -> Any:
    import lmdb

    file = Path(path).expanduser().resolve()
    if not file.exists():
        raise ObjectNotFound(f"LMDB database {path} does not exist")
    key = (os.getpid(), str(file))
    with _OPENING:
        if key not in _OPEN:
            try:
                _OPEN[key] = lmdb.open(
                    str(file), subdir=file.is_dir(), readonly=True, lock=False, readahead=False
                )
            except lmdb.Error as error:
                raise StorageError(
                    f"{path} is not a readable LMDB database ({type(error).__name__})"
                ) from error
        return _OPEN[key]

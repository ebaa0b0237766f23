"""Cache of remote objects on the local disk: bounded in size, checked by hash, written atomically.

Every entry is a folder, ``objects/<hash of the identity>/``, with the file under its own name and its sha256 beside
it. An entry is written under a temporary name and renamed when it is complete and its hash is right. One process or
thread fills an entry while others wait for it. The least recently used entries are evicted when the folder exceeds its
bound, except those used within the last minutes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from serve.errors import StorageError
from serve.storage.hashes import sha256_of
from serve.storage.lock import hold_lock

__all__ = ["Cache", "map_disk_errors"]

# Another process may have just received the path of an entry.
_IN_USE_S = 600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Writes the whole object into an empty file; returns the sha256 recorded at the source, or None.
Fill = Callable[[IO[bytes]], str | None]


class Cache:
    """A folder of checked copies; safe for several processes and threads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use `folder`, created when needed, and keep its size under `max_bytes` if possible."""
        self.folder = folder.expanduser() / "objects"
        self.max_bytes = max_bytes

    def entry(self, identity: str, name: str) -> Path:
        """Path of the copy of `identity`, existing or not. `identity` names one unchanging content."""
        return self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32] / (name or "object")

    def get(self, identity: str, name: str, fill: Fill, *, sha256: str | None = None) -> Path:
        """Return the path of a complete, checked copy.

        Args:
            identity: source of the copy including its version (an ETag, a modification time).
            name: file name of the copy.
            fill: called with an open file if there is no valid copy.
            sha256: required leading hex digits of the content's sha256.

        Raises:
            StorageError: wrong hash, disk full, or an error of `fill`.
        """
        target = self.entry(identity, name)
        with map_disk_errors(f"the cache folder {self.folder}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with hold_lock(target):
                if not _is_good(target):
                    _fill(target, fill, sha256)
                elif sha256:
                    _compare(name, _hash_file(target).read_text().strip(), sha256)
                os.utime(target.parent)
        self.trim(keep=target)
        return target

    def trim(self, keep: Path | None = None) -> None:
        """Evict least recently used entries until the folder is under its bound; `keep` stays."""
        entries = sorted(_list_entries(self.folder))
        total = sum(size for _, _, size in entries)
        for used_at, folder, size in entries:
            if total <= self.max_bytes:
                return
            if time.time() - used_at < _IN_USE_S or (keep is not None and folder == keep.parent):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _fill(target: Path, fill: Fill, sha256: str | None) -> None:
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w+b") as file:
            # No fsync: after a crash the hash of an incomplete file does not match, and it is filled again.
            recorded = fill(file)
        found = sha256_of(part)
        for expected in (sha256, recorded):
            if expected:
                _compare(target.name, found, expected)
        _hash_file(target).write_text(found + "\n")
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _compare(name: str, found: str, expected: str) -> None:
    if not found.startswith(expected.lower()):
        raise StorageError(
            f"{name} has sha256 {found[:12]}…, expected {expected[:12]}…; it was altered on the way or at its source, "
            "and is not used"
        )


def _is_good(path: Path) -> bool:
    record = _hash_file(path)
    return path.is_file() and record.is_file() and sha256_of(path) == record.read_text().strip()


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _list_entries(folder: Path) -> Iterator[tuple[float, Path, int]]:
    """(last use in seconds since the epoch, entry, bytes); entries that vanish meanwhile are omitted."""
    for entry in folder.glob("*/"):
        with contextlib.suppress(FileNotFoundError):
            yield entry.stat().st_mtime, entry, sum(file.stat().st_size for file in entry.rglob("*"))


@contextlib.contextmanager
def map_disk_errors(path: str) -> Iterator[None]:
    """Map ``OSError`` inside the ``with`` block to `StorageError`, naming `path`.

    Raises:
        StorageError: disk full, permission denied, or any other ``OSError``.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = "disk full" if error.errno in _FULL else str(error)
        raise StorageError(f"cannot write to {path}: {reason}") from error

"""Copies of remote objects on the local disk: bounded in size, checked by hash, complete or not there.

Every entry is a folder of its own, ``objects/<hash of what it is a copy of>/``, with the file under its own
name and its sha256 beside it. An entry is filled under a temporary name and renamed when it is whole and its
hash is right. One process or thread fills an entry, the others wait for it and use it. What was not used for
longest goes first when the folder grows over its bound; what was used within the last minutes stays.

Does not know where the bytes come from.
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
from serve.storage.download import one_at_a_time, sha256_of

__all__ = ["Cache", "map_disk_errors"]

# Another process may just have been given a path that lies here.
_IN_USE_S = 600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: Writes the whole object into an empty file; gives the sha256 the source promises, or None.
Fill = Callable[[IO[bytes]], str | None]


class Cache:
    """A folder of checked copies; safe for several processes and threads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use `folder` (made when needed) and keep what lies there under `max_bytes` where it can be."""
        self.folder = folder.expanduser() / "objects"
        self.max_bytes = max_bytes

    def entry(self, identity: str, name: str) -> Path:
        """Where the copy of `identity` lies, if it is there. `identity` names one unchanging content."""
        return self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32] / (name or "object")

    def get(self, identity: str, name: str, fill: Fill, *, sha256: str | None = None) -> Path:
        """The path of a whole, checked copy.

        Args:
            identity: what it is a copy of, down to the version (an ETag, a modification time).
            name: file name of the copy.
            fill: called with an open file when there is no good copy.
            sha256: leading hex digits the content's sha256 must have.

        Raises:
            StorageError: wrong hash, no room left on the disk, or whatever `fill` raises.
        """
        target = self.entry(identity, name)
        with map_disk_errors(f"the cache folder {self.folder}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(target):
                if not _is_good(target):
                    _fill(target, fill, sha256)
                elif sha256:
                    _compare(name, _note(target).read_text().strip(), sha256)
                os.utime(target.parent)
        self.trim(keep=target)
        return target

    def trim(self, keep: Path | None = None) -> None:
        """Remove entries, longest unused first, until the folder is under its bound; `keep` stays."""
        entries = sorted(_measured(self.folder))
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
            # Not synced to the disk: what a crash leaves behind does not have its hash, and is filled anew.
            promised = fill(file)
        found = sha256_of(part)
        for expected in (sha256, promised):
            if expected:
                _compare(target.name, found, expected)
        _note(target).write_text(found + "\n")
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _compare(name: str, found: str, expected: str) -> None:
    if not found.startswith(expected.lower()):
        raise StorageError(
            f"{name} has sha256 {found[:12]}… where {expected[:12]}… was promised; it was altered on the way or "
            "where it lies, and is not used"
        )


def _is_good(path: Path) -> bool:
    note = _note(path)
    return path.is_file() and note.is_file() and sha256_of(path) == note.read_text().strip()


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _measured(folder: Path) -> Iterator[tuple[float, Path, int]]:
    """(seconds since the epoch it was last used, entry, bytes); entries that vanish meanwhile are left out."""
    for entry in folder.glob("*/"):
        with contextlib.suppress(FileNotFoundError):
            yield entry.stat().st_mtime, entry, sum(file.stat().st_size for file in entry.rglob("*"))


@contextlib.contextmanager
def map_disk_errors(place: str) -> Iterator[None]:
    """Turn what the local disk refuses into a sentence; errors of ours pass.

    Raises:
        StorageError: no room left, not allowed, or any other ``OSError``.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        why = "no room left on the disk" if error.errno in _FULL else str(error)
        raise StorageError(f"cannot write to {place}: {why}") from error

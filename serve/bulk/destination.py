"""Folder or bucket that takes the results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serve import storage
from serve.errors import ObjectNotFound, SettingsError
from serve.storage.cache import map_disk_errors

__all__ = ["Destination"]

_PARTS = "parts"


class Destination:
    """Files of a run, by name below a folder or an ``s3://`` prefix; each appears whole.

    Args:
        where: path of a folder, which is made, or ``s3://bucket/prefix``.

    Raises:
        SettingsError: neither a folder nor a bucket.
    """

    def __init__(self, where: str) -> None:
        location = storage.parse(where)
        if location.scheme not in ("file", "s3"):
            raise SettingsError(f"{location} cannot be written; give a folder or s3://bucket/prefix")
        self.where = str(location).rstrip("/")
        self.is_local = location.scheme == "file"
        if self.is_local:
            self.folder = Path(location.path).expanduser().absolute()
            self.where = str(self.folder)
            with map_disk_errors(self.where):
                (self.folder / _PARTS).mkdir(parents=True, exist_ok=True)

    def uri(self, name: str) -> str:
        """Return the path or URI of a file of the run."""
        return f"{self.where}/{name}"

    def read(self, name: str) -> bytes | None:
        """Read a file; None if there is none."""
        try:
            return storage.read_bytes(self.uri(name))
        except ObjectNotFound:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a small file."""
        storage.write_bytes(self.uri(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file of any size: it appears at the end of the block, or not at all if that raises."""
        folder = self.folder / _PARTS if self.is_local else None
        with map_disk_errors(self.where):
            descriptor, path = tempfile.mkstemp(dir=folder, prefix=".unfinished-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if self.is_local:
                    os.chmod(path, 0o644)
                    os.replace(path, self.folder / name)
                else:
                    storage.upload(Path(path), self.uri(name), progress=False)
            finally:
                Path(path).unlink(missing_ok=True)

    def part_name(self, number: int) -> str:
        """Name of the results of a part."""
        return f"{_PARTS}/{number:08d}.jsonl"

    def counts_name(self, number: int) -> str:
        """Name of the counts of a part."""
        return f"{_PARTS}/{number:08d}.json"

    def finished(self) -> set[int]:
        """List the numbers of the parts that are there."""
        try:
            found = storage.list_files(self.uri(_PARTS), (".jsonl",))
        except ObjectNotFound:
            return set()
        names = (Path(each).name.partition(".")[0] for each in found)
        return {int(name) for name in names if name.isdecimal()}

    def clear(self) -> None:
        """Remove the results of a former run, parts first."""
        for number in sorted(self.finished()):
            self._remove(self.part_name(number))
            self._remove(self.counts_name(number))
        for name in ("summary.json", "bulk.json", "manifest.jsonl"):
            self._remove(name)
        self.sweep()

    def sweep(self) -> None:
        """Remove what a killed process left unfinished in a folder."""
        if self.is_local:
            for path in (self.folder / _PARTS).glob(".unfinished-*"):
                path.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        if self.is_local:
            (self.folder / name).unlink(missing_ok=True)
            return
        from serve.storage import s3

        location = storage.parse(self.uri(name))
        s3.connect(location.cluster).remove(location)

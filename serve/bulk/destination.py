"""Folder or bucket that takes the results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from serve import storage
from serve.bulk.retry import repeat
from serve.errors import ObjectNotFound, SettingsError, StorageError
from serve.storage.cache import map_disk_errors
from serve.storage.unnamed_file import unnamed_file

__all__ = ["ARCHIVE", "SUMMARY", "Destination"]

T = TypeVar("T")

#: Copy of the archive for the machines of a cluster.
ARCHIVE = "model.mar"
#: Counts of a run that has ended; readers take it for the end, so it goes before anything else changes.
SUMMARY = "summary.json"
_PARTS = "parts"
_FILES = ("coco.json", "coco_ids.json", "formats.json", ARCHIVE, "bulk.json", "manifest.jsonl")
_FORMATS = ("parquet", "kitti")  # folders of files that are made of the results


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
        self._made: list[Path] = []
        if self.is_local:
            self.folder = Path(location.path).expanduser().absolute()
            self.where = str(self.folder)
            parts = self.folder / _PARTS
            with map_disk_errors(self.where):
                self._made = [each for each in (parts, *parts.parents) if not each.exists()]
                parts.mkdir(parents=True, exist_ok=True)

    def discard_empty(self) -> None:
        """Remove the folders that this object has made and that are empty, as of a run that could not begin."""
        for folder in self._made:
            with suppress(OSError):  # it has something in it
                folder.rmdir()

    def check_inputs(self, *inputs: str | Path | None) -> None:
        """Check that a run does not write over, or remove, what it reads.

        Args:
            inputs: paths or URIs.

        Raises:
            SettingsError: one of them has the name of a file of the run.
        """
        names = (SUMMARY, *_FILES)
        own = {(self.folder / name).resolve() for name in names} if self.is_local else {*map(self.uri, names)}
        for given in inputs:
            if given is None:
                continue
            path = storage.parse(given).path if str(given).startswith("file://") else given
            if (path if storage.is_remote(path) else Path(path).expanduser().resolve()) in own:
                raise SettingsError(
                    f"{given} is read by this run, which writes a file of that name; choose another --out"
                )

    def uri(self, name: str) -> str:
        """Return the path or URI of a file of the run."""
        return f"{self.where}/{name}"

    def read(self, name: str) -> bytes | None:
        """Read a file; None if there is none."""
        try:
            return self._patiently(lambda: storage.read_bytes(self.uri(name)))
        except ObjectNotFound:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a small file."""
        if self.is_local:
            with self.writing(name) as file:  # on the disk before its name, as all files of a run
                file.write(data)
        else:
            repeat(lambda: storage.write_bytes(self.uri(name), data))

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file of any size: it appears at the end of the block, or not at all if that raises."""
        with map_disk_errors(self.where):
            if not self.is_local:
                with unnamed_file() as (copy, its_path):
                    yield copy
                    copy.flush()
                    repeat(lambda: storage.upload(its_path, self.uri(name), progress=False))
                return
            descriptor, path = tempfile.mkstemp(dir=self.folder / _PARTS, prefix=".unfinished-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                (self.folder / name).parent.mkdir(exist_ok=True)
                os.chmod(path, 0o644)
                os.replace(path, self.folder / name)
            finally:
                Path(path).unlink(missing_ok=True)

    def lines(self, name: str) -> Generator[bytes]:
        """Read a file of lines, one after the other, whatever its size.

        Raises:
            ObjectNotFound: there is none.
        """
        with ExitStack() as stack:
            try:
                if self.is_local:
                    file: IO[bytes] = stack.enter_context((self.folder / name).open("rb"))
                else:
                    file = stack.enter_context(self._downloaded(name))
                yield from file
            except FileNotFoundError as error:
                raise ObjectNotFound(f"{self.uri(name)} does not exist") from error
            except OSError as error:
                raise StorageError(f"{self.uri(name)} cannot be read: {error}") from error

    @contextmanager
    def _downloaded(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile(prefix="mmdet3d-serve-bulk-") as file:
            self.download(name, file)
            file.seek(0)
            yield file

    def download(self, name: str, file: IO[bytes]) -> None:
        """Copy a file of a bucket, of any size, into an empty one."""
        from serve.storage import s3

        location = storage.parse(self.uri(name))

        def copy() -> None:
            file.seek(0)
            file.truncate()
            s3.connect(location.cluster).download(location, file, progress=False)

        repeat(copy)

    def _patiently(self, action: Callable[[], T]) -> T:
        return action() if self.is_local else repeat(action)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._patiently(lambda: storage.exists(self.uri(name)))

    def remove(self, name: str) -> None:
        """Remove a file; that there is none is no error."""
        if self.is_local:
            (self.folder / name).unlink(missing_ok=True)
            return
        from serve.storage import s3

        location = storage.parse(self.uri(name))
        repeat(lambda: s3.connect(location.cluster).remove(location))

    def part_name(self, number: int) -> str:
        """Name of the results of a part."""
        return f"{_PARTS}/{number:08d}.jsonl"

    def counts_name(self, number: int) -> str:
        """Name of the counts of a part."""
        return f"{_PARTS}/{number:08d}.json"

    def format_name(self, folder: str, number: int, suffix: str) -> str:
        """Name of a file of a part in the folder of a format."""
        return f"{folder}/{number:08d}{suffix}"

    def finished(self, folder: str = _PARTS, suffix: str = ".jsonl") -> set[int]:
        """List the numbers of the parts that have results, or a file in the folder of a format."""
        names = (name.partition(".") for name in self._part_files(folder, suffix))
        return {int(number) for number, dot, rest in names if dot + rest == suffix}

    def clear(self) -> None:
        """Remove the results of a former run: its summary and parts first."""
        self.remove(SUMMARY)
        for folder in (_PARTS, *_FORMATS):
            for name in sorted(
                self._part_files(folder), key=lambda name: (not name.endswith(".jsonl"), name)
            ):
                self.remove(f"{folder}/{name}")
        for name in _FILES:
            self.remove(name)
        self.sweep()

    def _part_files(self, folder: str, suffix: str = "") -> list[str]:
        try:
            found = self._patiently(lambda: storage.list_files(self.uri(folder), (suffix,) if suffix else ()))
        except ObjectNotFound:
            return []
        names = (Path(each).name for each in found)
        return [name for name in names if name.partition(".")[0].isdecimal()]

    def sweep(self) -> None:
        """Remove what a killed process left unfinished in a folder."""
        if self.is_local:
            for path in (self.folder / _PARTS).glob(".*"):  # every name of a file that is being written
                path.unlink(missing_ok=True)

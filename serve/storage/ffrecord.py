"""FFRecord files: many samples in one file, with random access through a memory map.

The layout, from the sources of HFAiLab/ffrecord (``src/writer.cpp``, ``src/reader.cpp``), little-endian:

    uint32    CRC-32 of the metadata: of N, the checksums and the offsets, in that order; 0 means unchecked
    int64     N
    uint32    × N: CRC-32 of each sample; 0 means unchecked
    int64     × N: where each sample starts in the file
    samples   back to back, the last one up to the end of the file

Upstream's reader is a C++ extension that no package index carries. Samples are views of the map without a copy; a file
must not be truncated while it is read.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import struct
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from isal.isal_zlib import crc32

from serve.errors import ObjectNotFound, StorageError
from serve.storage.cache import map_disk_errors

__all__ = ["Reader", "Writer"]

_HEAD = struct.Struct("<Iq")
_BYTES_PER_SAMPLE = 12  # of metadata
_PIECE = 1 << 20


class Reader:
    """Random and batched reads from one FFRecord file, or from several as one sequence.

    Thread-safe. A forked process shares the maps; a pickled reader opens the files again when unpickled.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], *, check: bool = True) -> None:
        """Open the files and check their metadata.

        Args:
            files: one path, or several; a folder means its ``*.ffr`` by name.
            check: compare checksums, of the metadata now and of every sample when it is read.

        Raises:
            ObjectNotFound: a file does not exist.
            StorageError: a file is damaged or not an FFRecord file.
        """
        self.paths = _paths(files)
        self.check = check
        self._maps = [_Mapped(path, check) for path in self.paths]
        self._ends: list[int] = []
        total = 0
        for one in self._maps:
            total += one.count
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> memoryview:
        """Sample `index` (from 0) as a read-only view of bytes, valid as long as it is held.

        Raises:
            ObjectNotFound: no such index.
            StorageError: its checksum or its offset is wrong.
        """
        if not 0 <= index < len(self):
            raise ObjectNotFound(
                f"sample {index} not found in {self.paths[0].name}: it has 0 to {len(self) - 1}"
            )
        which = bisect.bisect_right(self._ends, index)
        before = self._ends[which - 1] if which else 0
        return self._maps[which].sample(index - before, self.check)

    def read_batch(self, indices: Sequence[int]) -> list[memoryview]:
        """Read several samples, in the given order; all are prefetched before the first is read.

        Raises:
            StorageError: as `read`.
        """
        for index in indices:
            if 0 <= index < len(self):
                which = bisect.bisect_right(self._ends, index)
                self._maps[which].prefetch(index - (self._ends[which - 1] if which else 0))
        return [self.read(index) for index in indices]

    def close(self) -> None:
        """Close the files; views still in use keep their map alive."""
        for one in self._maps:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.paths, self.check)


def _reopen(paths: Sequence[Path], check: bool) -> Reader:
    return Reader(paths, check=check)


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    if len(given) == 1 and given[0].is_dir():
        folder = given[0]
        given = sorted(folder.glob("*.ffr"))
        if not given:
            raise ObjectNotFound(f"the folder {folder} holds no .ffr file")
    if not given:
        raise StorageError("no FFRecord file given; name at least one")
    return given


class _Mapped:
    """One memory-mapped file."""

    def __init__(self, path: Path, check: bool) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                if self._size < _HEAD.size:
                    raise StorageError(f"{path} is not an FFRecord file: it has only {self._size} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ObjectNotFound(f"file {path} does not exist") from error
        except OSError as error:
            raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
        self._view = memoryview(self._map)
        checksum, self.count = _HEAD.unpack_from(self._view)
        self._offsets_at = _HEAD.size + 4 * self.count
        self._data_at = _HEAD.size + _BYTES_PER_SAMPLE * self.count
        if self.count < 0 or self._data_at > self._size:
            raise StorageError(
                f"{path} is not an FFRecord file, or is truncated: it claims {self.count} samples"
            )
        if check and checksum and crc32(self._view[4 : self._data_at]) != checksum:
            raise StorageError(f"{path} is damaged: metadata checksum mismatch; copy or pack it again")

    def _span(self, index: int) -> tuple[int, int]:
        at = self._offsets_at + 8 * index
        if index + 1 < self.count:
            start, end = struct.unpack_from("<qq", self._view, at)
        else:
            (start,), end = struct.unpack_from("<q", self._view, at), self._size
        if not self._data_at <= start <= end <= self._size:
            raise StorageError(f"{self.path} is damaged: sample {index} is outside the file")
        return start, end

    def sample(self, index: int, check: bool) -> memoryview:
        start, end = self._span(index)
        view = self._view[start:end]
        if check:
            (checksum,) = struct.unpack_from("<I", self._view, _HEAD.size + 4 * index)
            if checksum and crc32(view) != checksum:
                raise StorageError(
                    f"{self.path} is damaged: checksum mismatch of sample {index}; copy or pack it again"
                )
        return view

    def prefetch(self, index: int) -> None:
        start, end = self._span(index)
        if end > start:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


class Writer:
    """Writer of an FFRecord file of a given number of samples, atomic.

    A ``with`` block that succeeds renames the file into place; an error or Ctrl-C leaves nothing.
    """

    def __init__(self, path: str | Path, count: int) -> None:
        """Create a temporary file beside `path`.

        Args:
            path: the file to write, replaced if it exists. Its folder is created.
            count: number of samples.

        Raises:
            StorageError: the folder cannot be written.
        """
        if count < 0:
            raise StorageError(f"a file cannot have {count} samples")
        self.path, self.count = Path(path), count
        self._checksums, self._offsets = array("I"), array("q")
        with map_disk_errors(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part"
            )
        self._part = Path(name)
        self._file = os.fdopen(handle, "wb", buffering=_PIECE)
        self._position = _HEAD.size + _BYTES_PER_SAMPLE * count
        self._file.seek(self._position)

    def add(self, sample: bytes | bytearray | memoryview) -> int:
        """Append a sample; returns its index."""
        return self._add([sample])

    def add_file(self, file: IO[bytes]) -> int:
        """Append the rest of an open file, in pieces; returns its index."""
        return self._add(iter(lambda: file.read(_PIECE), b""))

    def _add(self, pieces: Iterator[bytes] | Sequence[bytes | bytearray | memoryview]) -> int:
        if len(self._offsets) >= self.count:
            raise StorageError(f"{self.path} was opened for {self.count} samples, received one more")
        checksum, start = 0, self._position
        with map_disk_errors(str(self.path)):
            for piece in pieces:
                checksum = crc32(piece, checksum)
                self._file.write(piece)
                self._position += len(piece)
        self._checksums.append(checksum)
        self._offsets.append(start)
        return len(self._offsets) - 1

    def close(self) -> None:
        """Write the metadata and rename the file into place.

        Raises:
            StorageError: samples are missing, or the disk fails.
        """
        if len(self._offsets) != self.count:
            self.abandon()
            raise StorageError(
                f"{self.path} was opened for {self.count} samples, received {len(self._offsets)}"
            )
        if sys.byteorder == "big":
            self._checksums.byteswap()
            self._offsets.byteswap()
        metadata = struct.pack("<q", self.count) + self._checksums.tobytes() + self._offsets.tobytes()
        try:
            with map_disk_errors(str(self.path)):
                self._file.seek(0)
                self._file.write(struct.pack("<I", crc32(metadata)) + metadata)
                self._file.flush()
                # Extend the file if its last samples are empty.
                self._file.truncate(self._position)
                os.fsync(self._file.fileno())
                self._file.close()
                os.chmod(self._part, 0o644)
                os.replace(self._part, self.path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(OSError):  # the last flush fails on a full disk
            self._file.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

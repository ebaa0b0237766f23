"""Bytes in memory as a file that is read piece by piece."""

from __future__ import annotations

import io

__all__ = ["ViewReader"]


class ViewReader(io.RawIOBase):
    """Reads bytes of any kind as a file, in the pieces that are asked for: `io.BytesIO` would copy all at once."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        super().__init__()
        self._view, self._at = memoryview(data), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position, bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, also beyond the end; returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes; all that are left if it is negative or None."""
        end = len(self._view) if size is None or size < 0 else self._at + size
        found = bytes(self._view[self._at : end])
        self._at += len(found)
        return found

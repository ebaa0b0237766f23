"""A view that is read as a file: like `io.BytesIO`, without a copy of all of it."""

from __future__ import annotations

import io

import pytest

from serve.storage.view_reader import ViewReader

DATA = bytes(range(20))


@pytest.mark.parametrize("data", [DATA, bytearray(DATA), memoryview(DATA)])
def test_it_reads_as_a_file_in_memory_does(data: bytes | bytearray | memoryview) -> None:
    found, expected = ViewReader(data), io.BytesIO(DATA)
    for size in (3, 0, 7, None, 5):
        assert (found.read(size), found.tell()) == (expected.read(size), expected.tell())
    for offset, whence in ((2, io.SEEK_SET), (3, io.SEEK_CUR), (-4, io.SEEK_END), (30, io.SEEK_SET)):
        assert found.seek(offset, whence) == expected.seek(offset, whence)
        assert found.read() == expected.read()
    assert found.readable() and found.seekable()

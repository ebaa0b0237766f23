"""Zip files that every reader unpacks alike.

A zip lists its entries twice: in the directory at its end, by which Python goes, and in a header before each entry, by
which TorchServe goes (``ZipInputStream``). Where the two differ, TorchServe would unpack what was not checked, such
as a ``torch.py`` that no directory lists. `open_zip` accepts the plain layout only: entries back to back from the first
byte to the directory, each with a header equal to its entry in the directory, and nothing after the end record.
"""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from serve.archive.bounds import (
    MAX_DIRECTORY_BYTES,
    MAX_ENTRIES,
    MAX_UNPACKED_BYTES,
    check_entry_name,
    check_entry_size,
    failures_as_archive_errors,
)
from serve.errors import ArchiveError

__all__ = ["open_zip"]

# APPNOTE.TXT of PKWARE: 4.3.7 local header, 4.3.16 end record, 4.3.15 and 4.3.14 its 64-bit forms.
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_EXTRA = struct.Struct("<HH")
_ZIP64_EXTRA = 0x0001
# Another name for the entry (0x7075), or encryption.
_REFUSED_EXTRAS = frozenset({0x7075, 0x0017, 0x9901})
# Of the general purpose flags: the level of compression, and names in UTF-8.
_ALLOWED_FLAGS = 0x0806
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_UNSET = 0xFFFFFFFF


@contextlib.contextmanager
def open_zip(path: Path, check_name: Callable[[str], None] = check_entry_name) -> Iterator[zipfile.ZipFile]:
    """Open a zip whose layout, names and sizes are within bounds, and close it after the block.

    Args:
        path: the file.
        check_name: raises `ArchiveError` for an entry that may not be there.

    Raises:
        ArchiveError: it is not such a zip, or the block failed; the message has the reason.
    """
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ArchiveError(f"{path.name} is not a file in {path.parent}; make an archive with `make archive`")
    with failures_as_archive_errors(path.name), path.open("rb") as file:
        try:
            directory = _read_end(file)
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise ArchiveError(
                f"{path.name} is not a readable archive ({error}); copy or convert it again"
            ) from None
        with archive:
            _check_entries(file, archive.infolist(), directory, check_name)
            yield archive


def _read_end(file: IO[bytes]) -> int:
    """Find the directory, which must lie directly before the end record; returns its offset in the file."""
    size = file.seek(0, 2)
    if size < _END.size:
        raise zipfile.BadZipFile(f"it has only {size} bytes")
    file.seek(size - _END.size)
    mark, *disks, count, all_count, length, offset, comment = _END.unpack(file.read(_END.size))
    if mark != b"PK\x05\x06" or comment or any(disks):
        raise zipfile.BadZipFile("it does not end as a zip, or has a comment")
    end = size - _END.size
    if 0xFFFF in (count, all_count) or _UNSET in (length, offset):
        end -= _LOCATOR.size + _END64.size
        if end < 0:
            raise zipfile.BadZipFile("its 64-bit end record is cut")
        file.seek(end)
        mark, record, *_, count, all_count, length, offset = _END64.unpack(file.read(_END64.size))
        locator, disk, where, disks_in_total = _LOCATOR.unpack(file.read(_LOCATOR.size))
        found = (mark, record, locator, disk, where, disks_in_total)
        if found != (b"PK\x06\x06", _END64.size - 12, b"PK\x06\x07", 0, end, 1):
            raise zipfile.BadZipFile("its 64-bit end record is damaged")
    if count != all_count or count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
        raise ArchiveError(
            f"the archive lists {max(count, all_count)} entries in {length} bytes, more than {MAX_ENTRIES} or "
            f"{MAX_DIRECTORY_BYTES}"
        )
    if offset + length != end:
        raise zipfile.BadZipFile("its directory is not where its end record says")
    return int(offset)


def _check_entries(
    file: IO[bytes], infos: list[zipfile.ZipInfo], directory: int, check_name: Callable[[str], None]
) -> None:
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise ArchiveError(f"the archive has several entries {twice[:200]!r}; convert the model again")
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    if both := sorted(folders.intersection(names)):
        raise ArchiveError(f"entry {both[0]!r} is a file and a folder; convert the model again")
    for info in infos:
        check_name(info.filename)
        if info.flag_bits & ~_ALLOWED_FLAGS or info.compress_type not in _METHODS:
            raise ArchiveError(
                f"entry {info.filename!r} is encrypted, streamed or compressed by method {info.compress_type}; "
                "an archive has stored or deflated entries"
            )
        check_entry_size(
            info.filename, info.file_size, info.compress_size, info.compress_type != zipfile.ZIP_STORED
        )
    if sum(info.file_size for info in infos) > MAX_UNPACKED_BYTES:
        raise ArchiveError(f"the archive is larger than {MAX_UNPACKED_BYTES >> 30} GiB unpacked")
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset != position:
            raise ArchiveError(f"the archive has bytes at {position} that its directory does not list")
        position += _check_local_header(file, info) + info.compress_size
    if position != directory:
        raise ArchiveError(f"the archive has bytes at {position} that its directory does not list")


def _check_local_header(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Compare the header before an entry with its entry in the directory; returns the length of the header."""
    file.seek(info.header_offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size:
        raise zipfile.BadZipFile(f"the header of {info.filename!r} is cut")
    mark, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(head)
    name, extra = file.read(name_length), file.read(extra_length)
    sizes = _zip64_sizes(extra)
    if sizes is not None:
        if (size not in (_UNSET, sizes[0])) or (packed not in (_UNSET, sizes[1])):
            raise ArchiveError(f"entry {info.filename!r} has several sizes")
        size, packed = sizes
    found = (mark, flags, method, crc, packed, size, name)
    listed = (info.flag_bits, info.compress_type, info.CRC, info.compress_size, info.file_size)
    if found != (b"PK\x03\x04", *listed, info.filename.encode()):
        raise ArchiveError(f"the header of entry {info.filename!r} differs from the archive's directory")
    return _LOCAL.size + int(name_length) + int(extra_length)


def _zip64_sizes(extra: bytes) -> tuple[int, int] | None:
    """Sizes (unpacked, packed) of an entry's 64-bit extra field, which take precedence; None without one."""
    sizes = None
    while extra:
        if len(extra) < _EXTRA.size:
            raise zipfile.BadZipFile("an extra field is cut")
        kind, length = _EXTRA.unpack_from(extra)
        field = extra[_EXTRA.size : _EXTRA.size + length]
        if len(field) != length or kind in _REFUSED_EXTRAS or (kind == _ZIP64_EXTRA and sizes is not None):
            raise zipfile.BadZipFile(f"extra field {kind:#06x} is cut, repeated or not allowed")
        if kind == _ZIP64_EXTRA:
            if length != 16:
                raise zipfile.BadZipFile("a 64-bit extra field has a wrong length")
            sizes = struct.unpack("<QQ", field)
        extra = extra[_EXTRA.size + length :]
    return sizes

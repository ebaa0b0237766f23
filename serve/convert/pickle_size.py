"""Bound the memory that reading a checkpoint takes, before it is unpickled.

torch writes a zip with stored entries, of which ``data.pkl`` describes the weights and the others hold their numbers.
A hostile one could be compressed a thousand times, or be a pickle of one byte per empty list. Files of torch before 1.6
are a row of pickles with the numbers after them.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from serve.errors import CheckpointError

__all__ = ["check_size_in_memory"]

MAX_PICKLE_BYTES = 256 << 20
MAX_ENTRIES = 200_000
MAX_OPCODES = 5_000_000
# Objects of a pickle take up to 70 bytes per byte; up to this size its opcodes need not be counted.
_FREE_BYTES = 2 << 20
# Magic number, protocol, system, the checkpoint, the keys of its storages.
_PICKLES_OF_OLD_FILES = 5


def check_size_in_memory(path: Path) -> None:
    """Check that a checkpoint takes memory in proportion to its size.

    Raises:
        CheckpointError: a part is compressed, or its pickle is too large or makes too many objects.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and zipfile.is_zipfile(path):
            _check_zip(path)
        elif path.stat().st_size > _FREE_BYTES:
            file.seek(0)
            _count_opcodes(file, path)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(
                f"{path} has compressed entries, as {packed[0][:100]!r}; torch.save writes none, save it again with it"
            )
        if len(infos) > MAX_ENTRIES or sum(info.file_size for info in infos) > path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: its entries are larger than the file, or too many")
        for info in infos:
            if info.filename.endswith("data.pkl") and info.file_size > _FREE_BYTES:
                if info.file_size > MAX_PICKLE_BYTES:
                    raise CheckpointError(
                        f"{path} describes its weights in {info.file_size >> 20} MiB, more than "
                        f"{MAX_PICKLE_BYTES >> 20}; save a state_dict() alone"
                    )
                with archive.open(info) as stream:
                    _count_opcodes(stream, path)


def _count_opcodes(file: IO[bytes], path: Path) -> None:
    """Count the opcodes of the pickle that `file` begins with, or of the row of pickles of an old checkpoint."""
    left = MAX_OPCODES
    for _pickle in range(_PICKLES_OF_OLD_FILES):
        try:
            for _ in pickletools.genops(file):
                left -= 1
                if left < 0:
                    raise CheckpointError(
                        f"{path} is a pickle of more than {MAX_OPCODES} steps, which no checkpoint needs"
                    )
        except ValueError:  # no further pickle; torch says what is wrong with a damaged one
            return

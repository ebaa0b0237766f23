"""Temporary files that are gone with their process, however it ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["unnamed_file"]

_PREFIX = "mmdet3d-serve-"  # where a file has to have a name


@contextmanager
def unnamed_file() -> Iterator[tuple[IO[bytes], Path]]:
    """Open an empty temporary file without a name, of which a process that is killed leaves nothing.

    Yields:
        The file, and a path to it for this process and its children. It has a name where there is no ``/proc``.
    """
    with ExitStack() as stack:
        file: Any = stack.enter_context(tempfile.TemporaryFile(prefix=_PREFIX))
        path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        if not path.exists():
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=_PREFIX))
            path = Path(file.name)
        yield file, path

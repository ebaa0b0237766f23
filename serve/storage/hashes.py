"""SHA-256 of files, and the hash that OpenMMLab puts into file names."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["hash_in_name", "sha256_of"]

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[A-Za-z0-9]+$")


def hash_in_name(name: str) -> str | None:
    """First 8 hex digits of the sha256, which OpenMMLab and torch.hub append to file names, or None.

    Args:
        name: a file name or URL, such as ``…-b086d0a3.pth``.
    """
    found = _HASH_IN_NAME.search(urlsplit(name).path)
    return found.group(1) if found else None


def sha256_of(path: Path) -> str:
    """Sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

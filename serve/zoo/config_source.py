"""Fetch a config from a URI together with the files it inherits from.

Bases (`serve.zoo.config_bases`) are fetched to the same relative paths without running any of them. Bases in installed
packages (``mmdet3d::…``) are left to mmengine; files named in ``custom_imports`` are not fetched.
"""

from __future__ import annotations

import ast
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve import storage
from serve.errors import ArchiveError
from serve.zoo.config_bases import config_bases

__all__ = ["fetch_config", "local_config"]

_MOST_FILES = 200


@contextmanager
def local_config(config: str) -> Iterator[str]:
    """Yield a path or name unchanged; a config at a URI is fetched to a temporary path.

    Raises:
        ArchiveError, StorageError: as `fetch_config`.
    """
    if not storage.is_remote(config):
        yield config
        return
    where = storage.parse(config)
    if where.scheme == "file":
        yield where.path
        return
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-config-") as folder:
        yield str(fetch_config(config, Path(folder)))


def fetch_config(uri: str, folder: Path) -> Path:
    """Fetch a config and its bases into an empty folder.

    Args:
        uri: URI of an object or web page.
        folder: destination; files keep the paths they have in the bucket.

    Returns:
        The path of the config.

    Raises:
        ArchiveError: a file is not a readable config, or a base is outside of its bucket.
        StorageError: a file cannot be fetched.
    """
    if storage.parse(uri).scheme not in ("s3", "http") or (uri.startswith("http") and "?" in uri):
        raise ArchiveError(
            f"config {storage.parse(uri)}: only s3://… and https://… without '?' are supported; copy it to a file"
        )
    base, slash, path = uri.rpartition("://")
    host, _, path = path.partition("/")
    root = f"{base}{slash}{host}/"
    wanted, seen = [posixpath.normpath(path)], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith("..") or len(seen) > _MOST_FILES:
            raise ArchiveError(f"config {uri} inherits from {name}, which is outside of its bucket or server")
        text = storage.read_bytes(root + name)
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text)
        if name.endswith(".py"):
            wanted += [
                posixpath.normpath(posixpath.join(posixpath.dirname(name), one))
                for one in _read_bases(text, root + name)
                if "::" not in one
            ]
    return folder / posixpath.normpath(path)


def _read_bases(text: bytes, uri: str) -> list[str]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ArchiveError(f"config {uri} is not readable Python: {error}") from None
    try:
        return list(config_bases(tree))
    except (TypeError, ValueError):
        raise ArchiveError(f"config {uri} computes _base_; write a literal string or list") from None

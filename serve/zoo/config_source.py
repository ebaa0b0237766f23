"""A config that lies at an address: fetched together with the files it inherits from.

A config says what it inherits in ``_base_ = [...]`` or in ``with read_base():`` imports; both are read from its
text, without running it, and fetched to the same places relative to each other. Bases of installed packages
(``mmdet3d::…``) are left to mmengine.

Knows nothing about what a config means. ``custom_imports`` of files beside the config are not followed.
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

__all__ = ["fetch_config", "local_config"]

_MOST_FILES = 200


@contextmanager
def local_config(config: str) -> Iterator[str]:
    """A path or name as it is; what lies at an address is there as a path until the ``with`` block ends.

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
    """Bring a config and its bases into an empty folder.

    Args:
        uri: an address of a bucket or web server.
        folder: where to; files get the places below it that they have in the bucket.

    Returns:
        The path of the config.

    Raises:
        ArchiveError: a file is no readable config, or climbs out of its bucket.
        StorageError: a file cannot be fetched.
    """
    if storage.parse(uri).scheme not in ("s3", "http") or (uri.startswith("http") and "?" in uri):
        raise ArchiveError(
            "a config is read from s3://… or from https://… without '?'; copy this one to a file"
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
            raise ArchiveError(f"{uri} inherits from {name}, which is outside of what can be fetched")
        text = storage.read_bytes(root + name)
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text)
        if name.endswith(".py"):
            wanted += [
                posixpath.normpath(posixpath.join(posixpath.dirname(name), one))
                for one in _bases(text, root + name)
            ]
    return folder / posixpath.normpath(path)


def _bases(text: bytes, shown: str) -> Iterator[str]:
    """Paths of the bases, relative to the config."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ArchiveError(f"{shown} is no readable config: {error}") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            getattr(target, "id", "") == "_base_" for target in node.targets
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                raise ArchiveError(f"_base_ in {shown} must be written out, not computed") from None
            yield from (one for one in ([value] if isinstance(value, str) else value) if "::" not in one)
        elif isinstance(node, ast.With) and any("read_base" in ast.dump(item) for item in node.items):
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom) and inner.level and inner.module:
                    yield "../" * (inner.level - 1) + inner.module.replace(".", "/") + ".py"

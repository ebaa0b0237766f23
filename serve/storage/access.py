"""Read, write and list by URI, whatever the scheme.

Each call parses the URI (`serve.storage.uri`) and dispatches to the module for its scheme. Client libraries are
imported when their scheme is first used.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

from serve.errors import ObjectNotFound, StorageError, UriError
from serve.storage.cache import Cache, map_disk_errors
from serve.storage.hashes import sha256_of
from serve.storage.packed_folder import PackedFolder
from serve.storage.uri import Location, parse

__all__ = ["exists", "list_files", "local_path", "read_bytes", "upload", "write_bytes"]


def read_bytes(uri: str | Path) -> bytes:
    """Read all bytes at a URI or path.

    Raises:
        ObjectNotFound: it does not exist.
        AccessDenied: credentials are missing or insufficient.
        UriError: unsupported or malformed URI.
        StorageError: unreachable, interrupted, damaged, or changed meanwhile.
    """
    where = parse(uri)
    if where.scheme == "file":
        try:
            return Path(where.path).expanduser().read_bytes()
        except FileNotFoundError as error:
            raise ObjectNotFound(f"file {where} does not exist") from error
        except OSError as error:
            raise StorageError(f"{where} cannot be read: {error.strerror}") from error
    if where.scheme == "http":
        from serve.storage import http

        return http.read(where)
    if where.scheme == "s3":
        from serve.storage import s3

        return s3.connect(where.cluster).read(where)
    return _read_member(where)


def local_path(uri: str | Path, cache: Cache, *, sha256: str | None = None, progress: bool = True) -> Path:
    """Return the path of a file with these bytes: a local file itself, or a checked copy in the cache.

    Args:
        uri: a URI or a path.
        cache: folder of the copies.
        sha256: required leading hex digits of the sha256. Objects uploaded by this package are also checked
            against the hash they carry.
        progress: show a progress bar on standard error for long transfers if that is a terminal.

    Raises:
        StorageError: as `read_bytes`, or a wrong hash, or a full disk.
    """
    where = parse(uri)
    if where.scheme == "file":
        return _check_file(Path(where.path).expanduser(), sha256)
    if where.scheme == "http":
        from serve.storage import http

        return http.local_path(where, cache, sha256=sha256, progress=progress)
    if where.scheme == "s3":
        from serve.storage import s3

        store = s3.connect(where.cluster)
        info = store.head(where)

        def fetch(file: IO[bytes]) -> str | None:
            store.download(where, file, info=info, progress=progress)
            return info.sha256

        identity = f"{store.endpoint} {where} {info.etag} {info.size}"
        return cache.get(identity, where.name, fetch, sha256=sha256)

    def extract(file: IO[bytes]) -> None:
        file.write(_read_member(where))

    return cache.get(f"{where} {_container_version(where)}", where.name, extract, sha256=sha256)


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Create or replace the file or object at a URI, atomically.

    Raises:
        UriError: the scheme is read-only.
        StorageError: rejected, unreachable, or disk full.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        s3.connect(where.cluster).write(where, data)
    elif where.scheme == "file":
        _replace(Path(where.path).expanduser(), [data])
    else:
        raise UriError(f"{where} is read-only; write to a file or to s3://")


def upload(path: Path, uri: str | Path, *, progress: bool = True) -> str:
    """Copy a local file to a URI, atomically; returns its sha256.

    Raises:
        UriError: the scheme is read-only.
        StorageError: rejected, unreachable, or disk full.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        return s3.connect(where.cluster).upload(path, where, progress=progress)
    if where.scheme != "file":
        raise UriError(f"{where} is read-only; write to a file or to s3://")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            _replace(Path(where.path).expanduser(), _read_pieces(file, digest.update))
    except FileNotFoundError as error:
        raise ObjectNotFound(f"file {path} does not exist") from error
    return digest.hexdigest()


def exists(uri: str | Path) -> bool:
    """Whether a URI names an existing file, object, member, or folder of these.

    Raises:
        StorageError: unreachable, or not permitted to look.
    """
    where = parse(uri)
    if where.scheme == "file":
        return Path(where.path).expanduser().exists()
    if where.scheme == "http":
        from serve.storage import http

        return http.exists(where)
    if where.scheme == "s3":
        from serve.storage import s3

        store = s3.connect(where.cluster)
        return store.is_file(where) or store.is_folder(where)
    try:
        if where.scheme == "ffrecord":
            return open_packed_folder(where.path).exists(where.member)
        _read_member(where)
    except ObjectNotFound:
        return False
    return True


def list_files(uri: str | Path, suffixes: tuple[str, ...] = (), *, recursive: bool = False) -> list[str]:
    """URIs of the files in a folder, bucket or container, sorted, with one of `suffixes`.

    Args:
        uri: of the folder, bucket or container.
        suffixes: ends of names; any name without.
        recursive: list the folders below it too; an LMDB database has no folders and is always listed whole.

    Raises:
        ObjectNotFound: no such folder, bucket or container.
        UriError: a web URL, which cannot be listed.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        store = s3.connect(where.cluster)
        entries = store.list(where, recursive=recursive)
        found = [str(where.join(one.name)) for one in entries if not one.is_folder]
    elif where.scheme == "ffrecord":
        inside = f"{where.member.rstrip('/')}/" if where.member else ""
        names = open_packed_folder(where.path).list(where.member, list_dir=False, recursive=recursive)
        found = [f"ffrecord://{where.path}#{inside}{name}" for name in names]
    elif where.scheme == "lmdb":
        from serve.storage import lmdb_file

        found = [f"lmdb://{where.path}#{key}" for key in lmdb_file.keys(where.path)]
    elif where.scheme == "file":
        folder = Path(where.path).expanduser()
        if not folder.is_dir():
            raise ObjectNotFound(f"folder {folder} does not exist")
        files = folder.rglob("*") if recursive else folder.iterdir()
        found = [str(file) for file in files if file.is_file()]
    else:
        raise UriError(f"{where} cannot be listed; name one file")
    return sorted(one for one in found if not suffixes or one.lower().endswith(suffixes))


def open_packed_folder(path: str) -> PackedFolder:
    """Open the packed folder at a path, once as long as the file stays the same.

    Raises:
        StorageError: missing, damaged, or not a packed folder.
    """
    file = Path(path).expanduser()
    return _open_cached(str(file.resolve()), _file_version(file))


@lru_cache(maxsize=16)
def _open_cached(path: str, version: str) -> PackedFolder:
    del version  # part of the cache key
    return PackedFolder(path)


def _read_member(where: Location) -> bytes:
    if where.scheme == "ffrecord":
        return bytes(open_packed_folder(where.path).read(where.member))
    from serve.storage import lmdb_file

    return lmdb_file.read(where)


def _container_version(where: Location) -> str:
    container = Path(where.path).expanduser()
    data = container / "data.mdb" if container.is_dir() else container
    return f"{container.resolve()} {_file_version(data)}"


def _file_version(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise ObjectNotFound(f"file {path} does not exist") from error
    return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"


def _check_file(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise ObjectNotFound(f"file {path} does not exist")
    if sha256 and not (found := sha256_of(path)).startswith(sha256.lower()):
        raise StorageError(f"{path} has sha256 {found[:12]}…, expected {sha256[:12]}…; it was altered")
    return path


def _read_pieces(file: IO[bytes], observe: Callable[[bytes], None]) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        observe(piece)
        yield piece


def _replace(path: Path, pieces: Iterator[bytes] | list[bytes]) -> None:
    with map_disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            os.chmod(part, 0o644)
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

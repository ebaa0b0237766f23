"""One call from an address to bytes or a local path, and back, whatever the address is of.

Each call looks at the address (`serve.storage.uri`) and hands on to the module for its kind. Copies go through
the cache that the settings describe. Client libraries are imported when their kind is first used.

Does not know what the bytes mean.
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
from serve.settings import Settings
from serve.storage.cache import Cache, map_disk_errors
from serve.storage.download import sha256_of
from serve.storage.packed_folder import PackedFolder
from serve.storage.uri import Location, parse

__all__ = ["exists", "list_files", "local_path", "read_bytes", "upload", "write_bytes"]


def read_bytes(uri: str | Path) -> bytes:
    """All bytes at an address.

    Raises:
        ObjectNotFound: nothing is there.
        AccessDenied: no credentials, or not allowed.
        UriError: no address of ours.
        StorageError: unreachable, broken off, damaged, or changed meanwhile.
    """
    where = parse(uri)
    if where.scheme == "file":
        try:
            return Path(where.path).expanduser().read_bytes()
        except FileNotFoundError as error:
            raise ObjectNotFound(f"there is no file {where}") from error
        except OSError as error:
            raise StorageError(f"{where} cannot be read: {error.strerror}") from error
    if where.scheme == "http":
        from serve.storage import http

        return http.read(where)
    if where.scheme == "s3":
        from serve.storage import s3

        return s3.connect(where.cluster).read(where)
    return _member(where)


def local_path(
    uri: str | Path, *, sha256: str | None = None, cache: Cache | None = None, progress: bool = True
) -> Path:
    """The path of a file with these bytes: the file itself, or a checked copy in the cache.

    Args:
        uri: an address or a path.
        sha256: leading hex digits the sha256 must have. Objects that we wrote are also held to the hash they carry.
        cache: where copies lie; the one the settings describe when None.
        progress: show a bar on standard error for long transfers where that is a terminal.

    Raises:
        StorageError: as `read_bytes`, or a wrong hash, or no room left on the disk.
    """
    where = parse(uri)
    if where.scheme == "file":
        return _checked_file(Path(where.path).expanduser(), sha256)
    cache = cache or _cache_of_settings()
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
        file.write(_member(where))

    return cache.get(f"{where} {_version_of(where)}", where.name, extract, sha256=sha256)


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Make or replace what lies at an address; nobody sees a part of it.

    Raises:
        UriError: an address of a kind that is only read.
        StorageError: refused, unreachable, no room left.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        s3.connect(where.cluster).write(where, data)
    elif where.scheme == "file":
        _replace(Path(where.path).expanduser(), [data])
    else:
        raise UriError(f"{where} can only be read; write to a file or to s3://")


def upload(path: Path, uri: str | Path, *, progress: bool = True) -> str:
    """Copy a local file to an address, all or nothing; returns its sha256.

    Raises:
        UriError: an address of a kind that is only read.
        StorageError: refused, unreachable, no room left.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        return s3.connect(where.cluster).upload(path, where, progress=progress)
    if where.scheme != "file":
        raise UriError(f"{where} can only be read; write to a file or to s3://")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            _replace(Path(where.path).expanduser(), _pieces(file, digest.update))
    except FileNotFoundError as error:
        raise ObjectNotFound(f"there is no file {path}") from error
    return digest.hexdigest()


def exists(uri: str | Path) -> bool:
    """Whether anything lies at an address: a file, an object, a member, or a folder of these.

    Raises:
        StorageError: it cannot be found out.
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
        _member(where)
    except ObjectNotFound:
        return False
    return True


def list_files(uri: str | Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Addresses of the files directly in a folder, bucket or container, sorted, ending in one of `suffixes`.

    Raises:
        ObjectNotFound: no such folder, bucket or container.
        UriError: a web address, which cannot be listed.
    """
    where = parse(uri)
    if where.scheme == "s3":
        from serve.storage import s3

        store = s3.connect(where.cluster)
        found = [str(where.joined(one.name)) for one in store.list(where) if not one.is_folder]
    elif where.scheme == "ffrecord":
        inside = f"{where.member}/" if where.member else ""
        names = open_packed_folder(where.path).list(where.member, list_dir=False)
        found = [f"ffrecord://{where.path}#{inside}{name}" for name in names]
    elif where.scheme == "lmdb":
        from serve.storage import lmdb_file

        found = [f"lmdb://{where.path}#{key}" for key in lmdb_file.keys(where.path)]
    elif where.scheme == "file":
        folder = Path(where.path).expanduser()
        if not folder.is_dir():
            raise ObjectNotFound(f"there is no folder {folder}")
        found = [str(file) for file in folder.iterdir() if file.is_file()]
    else:
        raise UriError(f"{where} cannot be listed; name one file")
    return sorted(one for one in found if not suffixes or one.lower().endswith(suffixes))


def open_packed_folder(path: str) -> PackedFolder:
    """The packed folder at a path, opened once as long as the file stays the same.

    Raises:
        StorageError: not there, damaged, or no packed folder.
    """
    place = Path(path).expanduser()
    return _opened(str(place.resolve()), _stamp(place))


@lru_cache(maxsize=16)
def _opened(path: str, stamp: str) -> PackedFolder:
    del stamp  # only tells versions of the file apart
    return PackedFolder(path)


def _member(where: Location) -> bytes:
    if where.scheme == "ffrecord":
        return bytes(open_packed_folder(where.path).read(where.member))
    from serve.storage import lmdb_file

    return lmdb_file.read(where)


def _version_of(where: Location) -> str:
    place = Path(where.path).expanduser()
    data = place / "data.mdb" if place.is_dir() else place
    return f"{place.resolve()} {_stamp(data)}"


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise ObjectNotFound(f"there is no {path}") from error
    return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"


def _checked_file(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise ObjectNotFound(f"there is no file {path}")
    if sha256 and not (found := sha256_of(path)).startswith(sha256.lower()):
        raise StorageError(f"{path} has sha256 {found[:12]}… where {sha256[:12]}… was promised")
    return path


def _cache_of_settings() -> Cache:
    settings = Settings.from_environment()
    return Cache(settings.cache_dir, settings.cache_max_bytes)


def _pieces(file: IO[bytes], tell: Callable[[bytes], None]) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        tell(piece)
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

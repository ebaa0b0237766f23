"""Publish archives to a bucket and fetch them into a folder, checked.

Published archives carry their sha256. A fetched archive must match it and pass `serve.archive.verify` before it
replaces an existing file. A file that matches the sha256 already is not fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve import archive, storage
from serve.errors import ArchiveError, ObjectNotFound, StorageError, UriError
from serve.storage import s3
from serve.storage.cache import map_disk_errors
from serve.storage.hashes import sha256_of

__all__ = ["FetchedArchive", "archive_uri", "fetch", "publish"]


@dataclass(frozen=True)
class FetchedArchive:
    """Archive of a store that is now in the folder.

    Attributes:
        path: the local file.
        sha256: of the whole file, hex.
        has_store_hash: whether the store has a hash of the file; without it, only the hashes inside were compared.
        already_present: whether the same file was in the folder already.
    """

    path: Path
    sha256: str
    has_store_hash: bool
    already_present: bool


def archive_uri(store: str, name: str) -> str:
    """URI of an archive in a store.

    Raises:
        UriError: the store is not in a bucket.
    """
    where = storage.parse(store)
    if where.scheme != "s3":
        raise UriError(f"{where} cannot be a model store; use a folder or s3://bucket/models")
    return str(where.join(f"{name}.mar"))


def publish(path: Path, store: str, *, force: bool = False, progress: bool = True) -> str:
    """Upload an archive under its own file name; returns its URI.

    Raises:
        ArchiveError: the store has an archive of that name, and `force` is not given.
        StorageError: the bucket cannot be written.
    """
    target = archive_uri(store, path.stem)
    if not force and storage.exists(target):
        raise ArchiveError(f"{target} exists; choose another --model-name, or replace it with --force")
    storage.upload(path, target, progress=progress)
    return target


def fetch(
    store: str,
    folder: Path,
    models: Sequence[str] = (),
    *,
    progress: bool = True,
    report: Callable[[FetchedArchive], None] | None = None,
) -> list[FetchedArchive]:
    """Fetch archives of a store into a folder, in order, each checked and written atomically.

    Args:
        store: ``s3://bucket/models``.
        folder: destination, created if missing.
        models: names, without ``.mar``; all archives of the store if empty.
        progress: show a progress bar on standard error for long transfers if that is a terminal.
        report: called with each archive that is in place.

    Raises:
        ObjectNotFound: an archive is not in the store, or the store is empty.
        ArchiveError: an object is not an archive that this version can serve.
        StorageError: wrong hash, unreachable, or disk full.
    """
    root = storage.parse(archive_uri(store, "any"))
    source = s3.connect(root.cluster)
    names = [f"{name.removesuffix('.mar')}.mar" for name in models]
    if not names:
        listed = source.list(storage.parse(store))
        names = [one.name for one in listed if not one.is_folder and one.name.endswith(".mar")]
    if not names:
        raise ObjectNotFound(f"{store} has no archive (.mar); create one with `make archive STORE={store}`")
    with map_disk_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    done = []
    for name in names:
        done.append(_fetch_one(source, storage.parse(store).join(name), folder / name, progress))
        if report is not None:
            report(done[-1])
    return done


def _fetch_one(source: s3.S3, where: storage.Location, target: Path, progress: bool) -> FetchedArchive:
    info = source.head(where)
    if info.sha256 and target.is_file() and sha256_of(target) == info.sha256:
        return FetchedArchive(target, info.sha256, True, True)
    # TorchServe does not load files of this name.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with map_disk_errors(str(target)):
            with part.open("w+b") as file:
                source.download(where, file, info=info, progress=progress)
                file.flush()
                os.fsync(file.fileno())
            sha256 = sha256_of(part)
            if info.sha256 and sha256 != info.sha256:
                raise StorageError(
                    f"{where} has sha256 {sha256[:12]}…, expected {info.sha256[:12]}…; it was altered, and is not used"
                )
            metadata = archive.verify(part)
            if f"{metadata.name}.mar" != target.name:
                raise ArchiveError(
                    f"{where} is an archive of '{metadata.name}'; rename it to {metadata.name}.mar"
                )
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return FetchedArchive(target, sha256, bool(info.sha256), False)

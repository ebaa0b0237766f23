"""File backends ``petrel``, ``aws`` and ``ffrecord`` for mmengine, implemented by `serve.storage`.

After `register`, which importing this module calls, configs written for Ceph's closed SDK, for mmcv's AWS backend and
for High-Flyer's FFRecordClient find their backends, by name and by the prefix ``s3://``, in the old ``FileClient`` and
in the functions of ``mmengine.fileio``. A training config registers them with
``custom_imports = dict(imports=['serve.storage.backends'])``; its parts then get its ``backend_args`` too
(`serve.storage.config_backend`).

mmengine's own backends for local files, http, LMDB and memcached stay unchanged. Reads return bytes that also have
``tobytes``, so that callers of either interface work.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.fileio import FileClient
from mmengine.fileio.backends import BaseStorageBackend, register_backend

from serve.errors import ObjectNotFound, StorageError, UriError
from serve.storage import s3
from serve.storage.config_backend import apply_to_configs
from serve.storage.packed_folder import PackedFolder
from serve.storage.uri import Location, map_path, parse

__all__ = ["FFRecordBackend", "ObjectBackend", "register"]


class Content(bytes):
    """Bytes with the method ``tobytes`` of the memoryviews that old backends returned."""

    def tobytes(self) -> bytes:
        """Return the same bytes."""
        return bytes(self)


class ObjectBackend(BaseStorageBackend):  # type: ignore[misc]
    """Objects in S3 or Ceph, with the interface of mmengine's ``PetrelBackend``."""

    def __init__(
        self,
        path_mapping: Mapping[str, str] | None = None,
        enable_mc: bool = True,
        conf_path: str | None = None,
    ) -> None:
        """Create the backend without sending anything.

        Args:
            path_mapping: prefixes of paths → their replacements; the longest matching one applies.
            enable_mc: accepted for petrel's configs and ignored; memcached is not used.
            conf_path: petrel's configuration; ``~/petreloss.conf`` when None.
        """
        del enable_mc
        self.path_mapping = dict(path_mapping or {})
        self._conf = Path(conf_path) if conf_path else None

    def get(self, filepath: str | Path) -> bytes:
        """Read an object."""
        where = self._where(filepath)
        return Content(self._s3(where).read(where))

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        """Read an object as text."""
        return str(self.get(filepath), encoding=encoding)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Create or replace an object."""
        where = self._where(filepath)
        self._s3(where).write(where, bytes(obj))

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Create or replace an object from text."""
        self.put(obj.encode(encoding), filepath)

    def exists(self, filepath: str | Path) -> bool:
        """Whether the object, or a folder of objects, exists."""
        return self.isfile(filepath) or self.isdir(filepath)

    def isdir(self, filepath: str | Path) -> bool:
        """Whether any object has this prefix."""
        where = self._where(filepath)
        return self._s3(where).is_folder(where)

    def isfile(self, filepath: str | Path) -> bool:
        """Whether the object exists."""
        where = self._where(filepath)
        return self._s3(where).is_file(where)

    def join_path(self, filepath: str | Path, *filepaths: str | Path) -> str:
        """Join paths with slashes."""
        parts = [str(part).replace("\\", "/").lstrip("/") for part in filepaths]
        return "/".join([map_path(filepath, self.path_mapping).rstrip("/"), *parts])

    @contextlib.contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str]:
        """Yield the path of a local copy, which is removed when the ``with`` block ends."""
        where = self._where(filepath)
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as folder:
            path = os.path.join(folder, where.name or "object")
            self._download(where, path)
            yield path

    def copyfile(self, src: str | Path, dst: str | Path) -> str:
        """Copy an object within the store; returns the new path."""
        target = self._target(dst, src)
        self.put(self.get(src), target)
        return target

    def copytree(self, src: str | Path, dst: str | Path) -> str:
        """Copy a folder of objects; returns the new path."""
        target = self._require_missing(dst)
        for name in self.list_dir_or_file(src, list_dir=False, recursive=True):
            self.copyfile(self.join_path(src, name), self.join_path(target, name))
        return target

    def copyfile_from_local(self, src: str | Path, dst: str | Path) -> str:
        """Upload a file; returns the new path."""
        target = self._target(dst, src)
        where = self._where(target)
        self._s3(where).upload(Path(src), where)
        return target

    def copytree_from_local(self, src: str | Path, dst: str | Path) -> str:
        """Upload a folder; returns the new path."""
        target = self._require_missing(dst)
        for path in sorted(Path(src).rglob("*")):
            if path.is_file():
                self.copyfile_from_local(path, self.join_path(target, path.relative_to(src).as_posix()))
        return target

    def copyfile_to_local(self, src: str | Path, dst: str | Path) -> str | Path:
        """Download an object to a file or into a folder; returns its path."""
        where = self._where(src)
        if os.path.isdir(dst):
            dst = type(dst)(os.path.join(dst, where.name))
        self._download(where, str(dst))
        return dst

    def copytree_to_local(self, src: str | Path, dst: str | Path) -> str | Path:
        """Download a folder of objects; returns its path."""
        for name in self.list_dir_or_file(src, list_dir=False, recursive=True):
            path = Path(dst, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.copyfile_to_local(self.join_path(src, name), path)
        return dst

    def remove(self, filepath: str | Path) -> None:
        """Remove an object.

        Raises:
            FileNotFoundError: no such object (`ObjectNotFound` is one).
            IsADirectoryError: it is a folder.
        """
        where = self._where(filepath)
        store = self._s3(where)
        if not store.is_file(where):
            if store.is_folder(where):
                raise IsADirectoryError(f"{where} is a folder; remove it with rmtree")
            raise ObjectNotFound(f"{where} does not exist")
        store.remove(where)

    def rmtree(self, dir_path: str | Path) -> None:
        """Remove all objects below a path."""
        for name in list(self.list_dir_or_file(dir_path, list_dir=False, recursive=True)):
            self.remove(self.join_path(dir_path, name))

    def copy_if_symlink_fails(self, src: str | Path, dst: str | Path) -> bool:
        """Copy, since stores have no links; returns False."""
        if self.isfile(src):
            self.copyfile(src, dst)
        else:
            self.copytree(src, dst)
        return False

    def list_dir_or_file(
        self,
        dir_path: str | Path,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """List the names below a path, relative to it; folders have no trailing slash.

        Raises:
            TypeError: a suffix is given together with folders, as in mmengine's backends.
        """
        _check_suffix(list_dir, suffix)
        where = self._where(dir_path)
        for one in self._s3(where).list(where, recursive=recursive):
            if (list_dir and one.is_folder) or (list_file and not one.is_folder and _ends(one.name, suffix)):
                yield one.name

    def generate_presigned_url(
        self, url: str, client_method: str = "get_object", expires_in: int = 3600
    ) -> str:
        """Generate a URL that permits reading (or with ``put_object`` writing) the object for `expires_in` seconds."""
        where = self._where(url)
        presigned: str = self._s3(where).client.generate_presigned_url(
            client_method,
            Params={"Bucket": where.bucket, "Key": where.path},
            ExpiresIn=expires_in,
        )
        return presigned

    def _where(self, filepath: str | Path) -> Location:
        where = parse(map_path(filepath, self.path_mapping))
        if where.scheme != "s3":
            raise UriError(
                f"{where} is not an s3:// URI, and path_mapping has no prefix of it; add one, for instance "
                "{'data/': 's3://bucket/data/'}"
            )
        return where

    def _s3(self, where: Location) -> s3.S3:
        return s3.connect(where.cluster, self._conf)

    def _download(self, where: Location, path: str) -> None:
        store = self._s3(where)
        info = store.head(where)
        try:
            with open(path, "w+b") as file:
                store.download(where, file, info=info)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def _target(self, dst: str | Path, src: str | Path) -> str:
        """Return `dst`, or the path of `src` in it if it is a folder."""
        target = map_path(dst, self.path_mapping)
        return self.join_path(target, os.path.basename(str(src))) if self.isdir(target) else target

    def _require_missing(self, dst: str | Path) -> str:
        target = map_path(dst, self.path_mapping)
        if self.exists(target):
            raise FileExistsError(f"{parse(target)} exists; choose another folder")
        return target


class FFRecordBackend(BaseStorageBackend):  # type: ignore[misc]
    """Files in a packed folder, read-only: ``file_client_args=dict(backend='ffrecord', fname='packed.ffr')``.

    A path is looked up unchanged first, then relative to the folder of the packed file: with ``data/coco/coco.ffr``,
    ``data/coco/train2017/1.jpg`` finds ``train2017/1.jpg``.
    """

    def __init__(
        self,
        fname: str | Path | list[str],
        check_data: bool = True,
        path_mapping: Mapping[str, str] | None = None,
    ) -> None:
        """Set the packed file, which each process opens on first use.

        Args:
            fname: packed file, or several that form one.
            check_data: compare checksums.
            path_mapping: prefixes of paths → prefixes in the packed folder; the longest matching one applies.
        """
        self._fname, self._check = fname, check_data
        self.path_mapping = dict(path_mapping or {})
        self._opened: PackedFolder | None = None

    def get(self, filepath: str | Path) -> bytes:
        """Read a packed file."""
        return Content(self._packed().read(self._name(filepath)))

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        """Read a packed file as text."""
        return str(self.get(filepath), encoding=encoding)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Raise, because packed files are read-only.

        Raises:
            StorageError: always.
        """
        del obj
        raise StorageError(f"{filepath} cannot be written: {self._fname} is read-only; pack the folder again")

    def exists(self, filepath: str | Path) -> bool:
        """Whether the file or folder exists."""
        return self._packed().exists(self._name(filepath))

    def isdir(self, filepath: str | Path) -> bool:
        """Whether the folder exists."""
        return self._packed().is_dir(self._name(filepath))

    def isfile(self, filepath: str | Path) -> bool:
        """Whether the file exists."""
        return self._packed().is_file(self._name(filepath))

    def join_path(self, filepath: str | Path, *filepaths: str | Path) -> str:
        """Join paths."""
        return os.path.join(str(filepath), *(str(part) for part in filepaths))

    @contextlib.contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str]:
        """Yield the path of a local copy, which is removed when the ``with`` block ends."""
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-") as folder:
            path = Path(folder, Path(str(filepath)).name)
            path.write_bytes(self.get(filepath))
            yield str(path)

    def list_dir_or_file(
        self,
        dir_path: str | Path,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """List the names below a path, relative to it.

        Raises:
            TypeError: a suffix is given together with folders, as in mmengine's backends.
        """
        _check_suffix(list_dir, suffix)
        packed = self._packed()
        folder = self._name(dir_path)
        for name in packed.list(folder, list_file=list_file, list_dir=list_dir, recursive=recursive):
            if list_dir or _ends(name, suffix):
                yield name

    def _packed(self) -> PackedFolder:
        if self._opened is None:
            self._opened = PackedFolder(self._fname, check=self._check)
        return self._opened

    def _name(self, filepath: str | Path) -> str:
        name = os.path.normpath(map_path(filepath, self.path_mapping))
        if self._packed().exists(name) or isinstance(self._fname, list):
            return name
        beside = os.path.relpath(os.path.abspath(name), os.path.dirname(os.path.abspath(self._fname)))
        return beside if self._packed().exists(beside) else name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _check_suffix(list_dir: bool, suffix: str | tuple[str, ...] | None) -> None:
    if list_dir and suffix is not None:
        raise TypeError("`list_dir` should be False when `suffix` is not None")


def _ends(name: str, suffix: str | tuple[str, ...] | None) -> bool:
    return suffix is None or name.endswith(suffix)


def register() -> None:
    """Register the backends with mmengine, replacing its own, and apply `config_backend` to configs. Idempotent."""
    for name, backend, prefixes in (
        ("petrel", ObjectBackend, ["s3", "petrel", "ceph"]),
        ("aws", ObjectBackend, []),
        ("ffrecord", FFRecordBackend, []),
    ):
        register_backend(name, backend, force=True, prefixes=prefixes)
        FileClient.register_backend(name, backend, force=True)
        # mmengine 0.10.7 does not replace a known prefix, even with force.
        FileClient._prefix_to_backends.update(dict.fromkeys(prefixes, backend))
    apply_to_configs()


register()

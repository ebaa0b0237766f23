"""Manifests as sources: text files that list frames, one a line.

    velodyne/000008.bin                      a path, relative to the manifest's own folder, or absolute
    s3://bucket/drive/000009.bin             a URI
    frames/000010/                           a frame of several parts: its folder, in a bucket with a slash at the end
    {"frame": "a", "origin": "a.bin"}        JSON, with a name; lines of a run's `manifest.jsonl` are such lines
    {"frame": "b", "origin": {"points": "b.bin", "image": "b.png"}}

It is UTF-8, with or without a byte order mark. Blank lines and those that begin with ``#`` are left out. A frame
without a name is named by its path below the folder that all such frames share. No file that is listed is touched here:
one that is missing fails when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from serve import storage
from serve.errors import BadRequest, ObjectNotFound, StorageError, UndecodableFrame, UriError
from serve.predict.stems import Stems, repeated
from serve.storage.cache import map_disk_errors
from serve.storage.unnamed_file import unnamed_file

__all__ = ["Listed", "Manifest", "copied", "is_manifest", "open_manifest", "read_manifest"]

SUFFIXES = (".txt", ".jsonl")
_COPY_BYTES = 1 << 20
_MOST_LINE_BYTES = 1 << 20
_HASH = (1 << 64) - 1

Origin = str | dict[str, str]


class Listed(NamedTuple):
    """A frame of a manifest, as `serve.predict.sources.frame_at` takes it."""

    name: str
    stem: str
    origin: Origin


class _Entry(NamedTuple):
    """A line of a manifest: its number from 1, and name and stem if it has any."""

    number: int
    origin: Origin
    name: str | None
    stem: str | None


def is_manifest(source: str) -> bool:
    """Whether a path or URI names a manifest."""
    if not source.partition("?")[0].lower().endswith(SUFFIXES):
        return False
    if storage.is_remote(source) and storage.parse(source).scheme != "file":
        return True
    path = Path(storage.parse(source).path).expanduser()
    return path.is_file()


@contextmanager
def copied(stream: IO[bytes]) -> Iterator[Path]:
    """Copy what cannot be read twice into a file, which is removed at the end of the block."""
    with unnamed_file() as (file, path):
        with map_disk_errors(tempfile.gettempdir()):
            while data := stream.read(_COPY_BYTES):
                file.write(data)
            file.flush()
        yield path


def read_manifest(source: str) -> Manifest:
    """Check a manifest and count its frames, without holding them in memory.

    Args:
        source: path or URI.

    Raises:
        BadRequest: a line that is none, or a name that is there twice.
        UndecodableFrame: no frame is listed.
        StorageError: it cannot be read.
    """
    manifest = open_manifest(source)
    manifest.check()
    return manifest


def open_manifest(source: str, base: storage.Location | None = None, *, what: str = "") -> Manifest:
    """Open a manifest without reading its lines: `Manifest.check` comes before its frames.

    Args:
        source: path or URI.
        base: file that relative paths are relative to; the manifest itself if None.
        what: name in messages; `source` if empty.

    Raises:
        StorageError: it cannot be fetched.
    """
    where = storage.parse(source)
    if where.scheme == "file":
        where = replace(where, path=str(Path(where.path).expanduser().absolute()))
    return Manifest(what or str(where), where, base or where)


class Manifest:
    """Frames of a manifest in its order, each time it is iterated from the start.

    Attributes:
        what: its name in messages.
        count: number of frames.
    """

    def __init__(self, what: str, where: storage.Location, base: storage.Location) -> None:
        self.what, self.count = what, 0
        self._base = base
        self._path = where.path
        if where.scheme != "file":
            copy = ExitStack()
            self._path = str(copy.enter_context(_fetched(where)))
            weakref.finalize(self, copy.close)
        self._root = ""
        self._stems = Stems()

    def __iter__(self) -> Iterator[Listed]:
        """Yield the frames."""
        for entry in self._entries():
            name = self._name(entry)
            yield Listed(name, self._stems.stem(name, entry.stem), entry.origin)

    def check(self) -> None:
        """Find the folder that the frames share, and names that are there twice; 16 bytes of memory for each frame."""
        root: list[str] | None = None
        for entry in self._entries():
            self.count += 1
            if entry.name is None:
                folder = _key(entry.origin).split("/")[:-1]
                root = folder if root is None else _shared(root, folder)
        if not self.count:
            raise UndecodableFrame(f"{self.what} lists no frame")
        self._root = "".join(f"{name}/" for name in root or ())
        names = array("Q")
        for entry in self._entries():
            name = self._name(entry)
            with self._naming(entry.number):
                _check_name(name)
            names.append(hash(name) & _HASH)
            self._stems.count(name, entry.stem)
        if twice := repeated(names):
            self._raise_repeated(twice)
        if not self._stems.settle():
            for entry in self._entries():
                self._stems.count(self._name(entry), entry.stem)
            self._stems.settle()

    def sha256(self) -> str:
        """Hash of its bytes, hex."""
        digest = hashlib.sha256()
        with self._opened() as file:
            while data := file.read(_COPY_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def _raise_repeated(self, hashes: frozenset[int]) -> None:
        seen: dict[str, int] = {}
        for entry in self._entries():
            name = self._name(entry)
            if hash(name) & _HASH in hashes and seen.setdefault(name, entry.number) != entry.number:
                raise BadRequest(
                    f"{self.what} lists {name} in line {seen[name]} and again in line {entry.number}; every frame has "
                    "one result: remove one, or give them names of their own"
                )

    def _name(self, entry: _Entry) -> str:
        return entry.name or _key(entry.origin).removeprefix(self._root)

    def _entries(self) -> Iterator[_Entry]:
        with self._opened() as file:
            number = 0
            while line := file.readline(_MOST_LINE_BYTES):
                number += 1
                with self._naming(number):
                    if len(line) == _MOST_LINE_BYTES:
                        raise BadRequest("it is longer than a megabyte")
                    found = _parse(line, number, self._base)
                if found is not None:
                    yield found

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Add the manifest and the line to errors of the block."""
        try:
            yield
        except (BadRequest, UriError) as error:
            raise BadRequest(f"{self.what}, line {number}: {error}") from error

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with open(self._path, "rb") as file:
                yield file
        except FileNotFoundError as error:
            raise ObjectNotFound(f"file {self.what} does not exist") from error
        except OSError as error:
            raise StorageError(f"{self.what} cannot be read: {error.strerror}") from error


@contextmanager
def _fetched(where: storage.Location) -> Iterator[Path]:
    """Copy a manifest from elsewhere into a temporary file, and yield its path."""
    with unnamed_file() as (file, path):
        with map_disk_errors(tempfile.gettempdir()):
            if where.scheme == "s3":
                from serve.storage import s3

                s3.connect(where.cluster).download(where, file, progress=False)  # in pieces
            else:
                file.write(storage.read_bytes(_uri(where)))
            file.flush()
        yield path


def _parse(line: bytes, number: int, base: storage.Location) -> _Entry | None:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        raise BadRequest("it is not UTF-8") from None
    if not text or text.startswith("#"):
        return None
    if not text.startswith(("{", '"')):
        return _Entry(number, _resolve(text, base), None, None)
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise BadRequest(f"it is not JSON: {error}") from None
    if isinstance(content, str):
        return _Entry(number, _resolve(content, base), None, None)
    name, stem, origin = (content.get(key) for key in ("frame", "stem", "origin"))
    for value in (name, stem):
        if value is not None:
            _check_name(value)
    if isinstance(origin, str):
        return _Entry(number, _resolve(origin, base), name, stem)
    if isinstance(origin, dict) and origin and all(isinstance(each, str) for each in origin.values()):
        if name is None:
            raise BadRequest('a frame of several parts needs a name, "frame"')
        return _Entry(number, {part: _resolve(each, base) for part, each in origin.items()}, name, stem)
    raise BadRequest('it has no "origin": a path or URI, or one of each part by name')


def _check_name(name: Any) -> None:
    """Check that files can be named after a frame, below one folder."""
    is_text = isinstance(name, str) and not any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    if not is_text or any(part in ("", ".", "..") for part in name.split("/")):
        raise BadRequest(f"{name!r} is no name of a frame; give a relative path, without '.' and '..'")


def _resolve(text: str, base: storage.Location) -> str:
    """Return the absolute path, or the URI, of a path or URI in a manifest."""
    if storage.is_remote(text):
        where = storage.parse(text)
        return os.path.normpath(where.path) if where.scheme == "file" else text
    storage.parse(text)  # no control characters
    if base.scheme == "file" or text.startswith("/"):
        return os.path.normpath(os.path.join(os.path.dirname(base.path), text))
    if base.scheme == "http":
        return urljoin(base.path, text)
    inside = base.member or base.path
    path = posixpath.normpath(posixpath.join(posixpath.dirname(inside), text))
    if path.startswith(("..", "/")):
        raise BadRequest(
            f"{text} is outside of {replace(base, path='', member='') if base.bucket else base.path}"
        )
    path += "/" * text.endswith("/")
    return _uri(replace(base, member=path) if base.member else replace(base, path=path))


def _uri(where: storage.Location) -> str:
    return where.path if where.scheme == "http" else str(where)


def _key(origin: Origin) -> str:
    """Path of a file or object among all others, from which names are made."""
    assert isinstance(origin, str)
    if not storage.is_remote(origin):
        return origin.strip("/")
    where = storage.parse(origin)
    if where.scheme == "http":
        parts = urlsplit(where.path)
        return f"{parts.netloc}{parts.path}".strip("/")
    return "/".join(part for part in (where.bucket, where.path.strip("/"), where.member.strip("/")) if part)


def _shared(one: list[str], other: list[str]) -> list[str]:
    return one[
        : next(
            (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
    ]

"""Frames of folders and buckets of any length, listed without holding them in memory.

Names go into a database in a temporary file, as they are found, and come out of it sorted: SQLite sorts on the disk.
Everything else that `serve.predict.sources` knows (patterns, packed files, recordings, frames in the folder itself) is
listed there. Both list the same frames in the same order.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from serve import storage
from serve.bulk.retry import keys_patiently
from serve.errors import StorageError, UndecodableFrame
from serve.predict import video
from serve.predict.frames import Clip, Frame
from serve.predict.manifests import is_manifest, read_manifest
from serve.predict.recordings import is_recording
from serve.predict.sources import Source, frame_at, of_manifest, open_source
from serve.predict.stems import caseless, hashed, longer, stem_for
from serve.protocol.frame_spec import Modality
from serve.storage.cache import map_disk_errors
from serve.verify.endpoint import FRAME_MARKERS
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["list_frames", "sorted_frames"]

_SWEEPS, _CALIBRATION = FRAME_MARKERS
_CACHE_KIB = 16 << 10  # of each of three sorts
_SHOW_EVERY = 500_000
_CLIP = Clip("bulk")
# How many frames have the stem of each frame, and the one that it has if those are several: see `Stems`.
_IS_SHARED = "SELECT EXISTS (SELECT 1 FROM frames GROUP BY key HAVING count(*) > 1)"
_DISTINCT_STEMS = "SELECT name, 1, 1 FROM frames ORDER BY name"
_STEMS = """
SELECT name, first, count(*) OVER (PARTITION BY CASE first WHEN 1 THEN key ELSE longer(name) END)
FROM (SELECT name, key, count(*) OVER (PARTITION BY key) AS first FROM frames) ORDER BY name
"""
_FRAME_FILES = tuple(ending for endings in FRAME_SUFFIXES.values() for ending in endings)

Report = Callable[[int], None]


def list_frames(
    source: str,
    modality: Modality,
    *,
    cache: storage.Cache | None = None,
    report: Report = lambda count: None,
) -> Source:
    """List the frames that `source` names, as `serve.predict.sources.open_source` does, with its errors.

    Args:
        source: path, pattern or URI.
        modality: kind of frames to select.
        cache: see `open_source`.
        report: called with the number of names that were found, now and then.
    """
    if is_manifest(source):
        return of_manifest(read_manifest(source))
    where = storage.parse(source) if storage.is_remote(source) else None
    if where is None or where.scheme == "file":
        folder = Path(source if where is None else where.path).expanduser()
        if _is_plain_folder(folder, modality):
            names = _names_in(folder, modality)
            frames: Iterable[Frame] = _Sorted(names, f"{folder.absolute()}/", str(folder), report)
            return Source(source, None, False, (_CLIP,), (frames,))
    elif where.scheme == "s3" and not where.name.lower().endswith(_FRAME_FILES) and "*" not in where.name:
        return Source(source, None, False, (_CLIP,), (_Bucket(where, modality, report),))
    return open_source(source, modality, cache=cache)


def sorted_frames(names: Iterable[str], origin: str, report: Report = lambda count: None) -> Iterator[Frame]:
    """Sort frames of one file each by name.

    Args:
        names: path of each frame below `origin`, with a suffix.
        origin: path or URI of their folder, with a slash at its end.
        report: see `list_frames`.
    """
    with _database("CREATE TABLE frames (name TEXT, key TEXT)") as database:
        database.create_function("longer", 1, lambda name: caseless(longer(name)), deterministic=True)
        _insert(database, "INSERT INTO frames VALUES (?, ?)", _with_keys(names), report)
        is_shared = database.execute(_IS_SHARED).fetchone()[0]
        for name, first, second in database.execute(_STEMS if is_shared else _DISTINCT_STEMS):
            stem = stem_for(name) if first == 1 else longer(name)
            yield frame_at(name, stem if second == 1 else hashed(name), origin + name, _CLIP)


@dataclass(frozen=True)
class _Sorted:
    """Frames of a folder, one file or folder each."""

    names: Iterable[str]
    origin: str
    what: str
    report: Report

    def __iter__(self) -> Iterator[Frame]:
        return _not_empty(sorted_frames(self.names, self.origin, self.report), self.what)


def _is_plain_folder(folder: Path, modality: Modality) -> bool:
    """Whether it is a folder of frames, and neither a frame, nor a recording, nor one of videos."""
    if not folder.is_dir() or is_recording(folder):
        return False
    if any((folder / marker).is_file() for marker in FRAME_MARKERS):
        return False
    if modality != "image":
        return True
    suffixes = (os.path.splitext(name)[1].lower() for name in _files_in(folder))
    first = next((suffix for suffix in suffixes if suffix in FRAME_SUFFIXES["image"]), None)
    return first is not None or not any(
        name.lower().endswith(tuple(video.SUFFIXES)) for name in _files_in(folder)
    )


def _files_in(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def _names_in(folder: Path, modality: Modality) -> Iterator[str]:
    """Find what `serve.verify.endpoint.find_frames` finds, in the file system's order."""
    if modality in ("lidar", "depth", "image"):
        endings = FRAME_SUFFIXES["image" if modality == "image" else "points"]
        marker = _SWEEPS
    else:
        endings, marker = (), _CALIBRATION
    with _reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            is_frame = bool(endings) and entry.name.lower().endswith(endings) and _may_be_file(entry)
            if is_frame or os.path.isfile(os.path.join(entry.path, marker)):
                yield entry.name


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads nowhere: a frame that is recorded as one that cannot be read."""
    return os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Tell errors of the source from those of the disk that its names are sorted on."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror}") from error


def _with_keys(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((name, caseless(stem_for(name))) for name in names)


@dataclass(frozen=True)
class _Bucket:
    """Frames below a prefix of a bucket: objects, or folders with one object per part."""

    where: storage.Location
    modality: Modality
    report: Report

    def __iter__(self) -> Generator[Frame]:
        with _database("CREATE TABLE files (folder TEXT, name TEXT)") as database:
            _insert(database, "INSERT INTO files VALUES (?, ?)", self._files(), self.report)
            database.execute(
                "CREATE TABLE whole AS SELECT DISTINCT folder FROM files WHERE name IN (?, ?)", FRAME_MARKERS
            )
            if database.execute("SELECT EXISTS (SELECT 1 FROM whole)").fetchone()[0]:
                yield from self._of_parts(database)
                return
            kinds = FRAME_SUFFIXES["image" if self.modality in ("image", "mono3d", "multiview") else "points"]
            rows = database.execute("SELECT name FROM files WHERE folder = ''")
            names = (name for (name,) in rows if name.lower().endswith(kinds))
            what = f"{self.where} ({', '.join(kinds)})"
            yield from _not_empty(sorted_frames(names, f"{str(self.where).rstrip('/')}/"), what)

    def _files(self) -> Iterator[tuple[str, str]]:
        """Find what `serve.verify.frame_source.list_frame_files` considers: folder, if any, and name of each file."""
        for key in keys_patiently(self.where):
            folder, slash, name = key.rpartition("/")
            is_near = "/" not in folder and bool(folder) == bool(slash) and folder not in (".", "..")
            if is_near and name.lower().endswith((*_FRAME_FILES, *FRAME_MARKERS)):
                yield folder, name

    def _of_parts(self, database: sqlite3.Connection) -> Iterator[Frame]:
        own = (self.where.path or self.where.bucket).rstrip("/").rsplit("/", 1)[-1] or "frames"
        rows = database.execute(
            "SELECT CASE folder WHEN '' THEN ? ELSE folder END AS frame, folder, name FROM files "
            "WHERE folder = '' OR folder IN (SELECT folder FROM whole) ORDER BY frame, folder, name",
            (own,),
        )
        database.create_function("caseless", 1, caseless, deterministic=True)
        database.execute(
            "CREATE TABLE shared AS SELECT caseless(folder) AS key FROM whole GROUP BY key HAVING count(*) > 1"
        )
        shared = "SELECT EXISTS (SELECT 1 FROM shared WHERE key = ?)"
        for frame, files in groupby(rows, itemgetter(0)):
            origin = {
                os.path.splitext(name)[0]: str(self.where.join(f"{folder}/{name}" if folder else name))
                for _, folder, name in files
            }
            is_shared = database.execute(shared, (caseless(frame),)).fetchone()[0]
            yield frame_at(frame, hashed(frame) if is_shared else stem_for(frame, frame), origin, _CLIP)


def _not_empty(frames: Iterator[Frame], what: str) -> Iterator[Frame]:
    first = next(frames, None)
    if first is None:
        raise UndecodableFrame(f"{what} has no frame for this model")
    yield first
    yield from frames


@contextmanager
def _database(schema: str) -> Iterator[sqlite3.Connection]:
    """Open a database in a temporary file, which has no name any more and is gone with the process."""
    with (
        map_disk_errors(tempfile.gettempdir()),
        tempfile.NamedTemporaryFile(prefix="mmdet3d-serve-bulk-", suffix=".list") as file,
        closing(sqlite3.connect(file.name, isolation_level=None)) as database,
    ):
        for setting in (
            "journal_mode = OFF",
            "synchronous = OFF",
            f"cache_size = -{_CACHE_KIB}",
            "temp_store = FILE",
        ):
            database.execute(f"PRAGMA {setting}")
        database.execute(schema)
        try:
            yield database
        except sqlite3.OperationalError as error:  # the disk is full
            raise OSError(None, str(error), file.name) from error


def _insert(
    database: sqlite3.Connection, statement: str, rows: Iterable[tuple[str, ...]], report: Report
) -> None:
    def counted() -> Iterator[tuple[str, ...]]:
        for count, row in enumerate(rows, 1):
            if not count % _SHOW_EVERY:
                report(count)
            yield row

    database.execute("BEGIN")
    try:
        database.executemany(statement, counted())
    except UnicodeEncodeError as error:
        raise UndecodableFrame(
            f"the name {os.fsencode(error.object)!r} of a frame is not UTF-8; rename it"
        ) from None
    database.execute("COMMIT")

"""Model archives (``.mar``): deterministic writer, validating reader.

An archive is a zip that TorchServe can serve and that holds data only:

    MAR-INF/MANIFEST.json     TorchServe's: model name, version, handler (a module of this package, by name)
    model.json                `Metadata`: description of the model, writer, sha256 of every other file
    config.json               the resolved config (`serve.archive.config_json`)
    weights.safetensors       the weights
    golden/frame.*            a frame that the model was run on
    golden/expected.json      the predictions for that frame
    golden/statistics.json    statistics of many frames, if they were recorded (`serve.watch.reference`)
    code/…                    modules named in the config's custom_imports, if any
    extra/…                   the user's extra files
    handlers.….py             one fixed line, in archives by torch-model-archiver only (`serve.archive.parts`)

Equal contents give equal bytes: entries are sorted, times and modes fixed. TorchServe's archiver is not used, because
it works in a shared temporary folder, deletes the files there, and records times.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from serve import __version__
from serve.archive import config_json
from serve.archive.bounds import (
    CONFIG,
    EXPECTED,
    HANDLER_FILE,
    HANDLER_FILES,
    MANIFEST,
    METADATA,
    WEIGHTS,
    check_entry_name,
    check_entry_size,
    failures_as_archive_errors,
    unique_members,
)
from serve.archive.metadata import HANDLERS, Metadata, check_identity
from serve.archive.python_path import keep_off_path
from serve.archive.zip_layout import open_zip
from serve.errors import ArchiveError
from serve.watch.reference import ENTRY as STATISTICS
from serve.watch.reference import Reference

__all__ = [
    "Archive",
    "extract",
    "open_directory",
    "read_expected",
    "read_statistics",
    "record_statistics",
    "verify",
    "write",
]

_EPOCH = (1980, 1, 1, 0, 0, 0)
Source = bytes | Path


@dataclass(frozen=True)
class Archive:
    """Unpacked, verified archive.

    Attributes:
        root: the folder it is unpacked in.
        metadata: description of its model.
    """

    root: Path
    metadata: Metadata

    @property
    def weights(self) -> Path:
        """Path of the safetensors file."""
        return self.root / WEIGHTS

    @property
    def code(self) -> Path | None:
        """Folder of packed modules, or None without any."""
        return self.root / "code" if any(name.startswith("code/") for name in self.metadata.files) else None

    def config(self) -> dict[str, Any]:
        """Read the resolved config."""
        with failures_as_archive_errors(CONFIG):
            config = config_json.from_json(orjson.loads((self.root / CONFIG).read_bytes()))
            if not isinstance(config, dict):
                raise ArchiveError(f"{CONFIG} is not a dictionary; convert the model again")
            return config

    def golden_frame(self) -> bytes | dict[str, bytes]:
        """Read the golden frame, by part if it has several."""
        entries = self.metadata.golden_frame
        with failures_as_archive_errors("the golden frame"):
            if isinstance(entries, str):
                return (self.root / entries).read_bytes()
            return {name: (self.root / entry).read_bytes() for name, entry in entries.items()}

    def golden_expected(self) -> dict[str, Any]:
        """Read the predictions recorded for the golden frame, without a score threshold."""
        with failures_as_archive_errors(EXPECTED):
            expected = orjson.loads((self.root / EXPECTED).read_bytes())
            if not isinstance(expected, dict):
                raise ArchiveError(f"{EXPECTED} is not a dictionary; convert the model again")
            return expected

    def reference(self) -> Reference | None:
        """Read the statistics that were recorded for watching; None if there are none."""
        if STATISTICS not in self.metadata.files:
            return None
        with failures_as_archive_errors(STATISTICS):
            return Reference.parse((self.root / STATISTICS).read_bytes())


def write(
    path: Path,
    metadata: Metadata,
    *,
    config: Mapping[str, Any],
    weights: Path,
    golden_frame: bytes | Mapping[str, bytes],
    golden_expected: Mapping[str, Any],
    code: Mapping[str, Source] | None = None,
    extra: Mapping[str, Source] | None = None,
    force: bool = False,
) -> str:
    """Write an archive atomically; returns its sha256 (hex).

    Args:
        path: the file to write; its folder must exist.
        metadata: description of the model; `files` is filled in here.
        config: the resolved config.
        weights: a safetensors file.
        golden_frame: content of the entries ``metadata.golden_frame``; by part if these are.
        golden_expected: the predictions for that frame.
        code: modules, by path below ``code/``.
        extra: further files, by path below ``extra/``.
        force: replace an existing archive.

    Raises:
        ArchiveError: the file exists, or a name is invalid.
    """
    if path.exists() and not force:
        raise ArchiveError(f"{path} exists; choose another name or version, or replace it with --force")
    check_identity(metadata.name, metadata.version)
    entries: dict[str, Source] = {
        CONFIG: _json(config_json.to_json(config)),
        WEIGHTS: weights,
        **_golden_entries(metadata, golden_frame),
        EXPECTED: _json(golden_expected),
        **{f"code/{name}": source for name, source in (code or {}).items()},
        **{f"extra/{name}": source for name, source in (extra or {}).items()},
    }
    for name in entries:
        check_entry_name(name)
    described = {f.name: getattr(metadata, f.name) for f in fields(metadata)}
    described["inference"] = asdict(metadata.inference)
    described["files"] = {name: _sha256(source) for name, source in entries.items()}
    manifest = {
        "archiverVersion": f"mmdet3d-serve {__version__}",
        "runtime": "python",
        "model": {
            "modelName": metadata.name,
            "modelVersion": metadata.version,
            "handler": HANDLERS[metadata.package],
        },
    }
    _write_zip(path, {**entries, METADATA: _json(described), MANIFEST: _json(manifest)})
    return _sha256(path)


def record_statistics(source: Path, target: Path, reference: Reference) -> str:
    """Write an archive again with a reference in it, atomically; returns its sha256 (hex).

    Args:
        source: the archive, checked on the way.
        target: the file to write; may be `source`.
        reference: takes the place of one that is there.

    Raises:
        ArchiveError: as `verify`.
    """
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-archive-") as folder:
        opened = extract(source, Path(folder))
        entries: dict[str, Source] = {name: opened.root / name for name in _list_files(opened.root)}
        entries[STATISTICS] = _json(reference.document())
        described = orjson.loads((opened.root / METADATA).read_bytes())
        described["files"][STATISTICS] = _sha256(entries[STATISTICS])
        _write_zip(target, {**entries, METADATA: _json(described)})
    return _sha256(target)


def read_statistics(path: Path) -> Reference | None:
    """Read the statistics that were recorded in an archive file, without unpacking it; None if there are none.

    Raises:
        ArchiveError: as `verify`, of these only; or they are malformed.
    """
    document = _read_entry(path, STATISTICS)
    return None if document is None else Reference.parse(document)


def read_expected(path: Path) -> dict[str, Any]:
    """Read the predictions recorded for the golden frame from an archive file; errors as `read_statistics`."""
    with failures_as_archive_errors(EXPECTED):
        expected: dict[str, Any] = orjson.loads(_read_entry(path, EXPECTED) or b"null")
        return expected


def _read_entry(path: Path, name: str) -> bytes | None:
    with open_zip(path) as archive:
        expected = _read_header(archive).files.get(name)
        if expected is None:
            return None
        document = archive.read(name)
        _compare(name, _sha256(document), expected)
        return document


def _write_zip(path: Path, everything: Mapping[str, Source]) -> None:
    """Write the entries in order, through a file beside it; one that it replaces keeps its permissions."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    descriptor, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, source in sorted(everything.items()):
                _add(archive, name, source)
        os.chmod(staging, mode)
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def verify(path: Path) -> Metadata:
    """Check layout, names, sizes, version and hashes of an archive file without unpacking it.

    Raises:
        ArchiveError: corrupt, altered, written by another program, or of an incompatible version.
    """
    with open_zip(path) as archive:
        metadata = _read_header(archive)
        for name, expected in (metadata.files | _handler_files(archive.namelist())).items():
            with archive.open(name) as stream:
                _compare(name, _digest(stream), expected)
        return metadata


def extract(path: Path, root: Path) -> Archive:
    """Unpack an archive into the empty folder `root` and check it.

    Raises:
        ArchiveError: as `verify`.
    """
    with open_zip(path) as archive:
        _read_header(archive)
        for info in archive.infolist():
            target = root / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as stream, target.open("wb") as out:
                while block := stream.read(1 << 20):
                    out.write(block)
    return open_directory(root)


def open_directory(root: Path) -> Archive:
    """Open an archive that TorchServe or `extract` has unpacked, checking every hash.

    Its folder is taken off Python's search path, where TorchServe puts it.

    Raises:
        ArchiveError: a file is missing, altered or not declared, or the version is incompatible.
    """
    with failures_as_archive_errors(f"the archive in {root}"):
        keep_off_path(root)
        if not (root / METADATA).is_file():
            raise ArchiveError(
                f"{root} has no {METADATA}: the archive was not written by mmdet3d-serve; convert the model with it"
            )
        sizes = _list_files(root)
        metadata = Metadata.parse((root / METADATA).read_bytes())
        if missing := sorted({*metadata.files, MANIFEST} - set(sizes)):
            raise ArchiveError(f"{missing[0]} is missing from the archive; convert the model again")
        known = metadata.files | _handler_files(sizes)
        if odd := sorted(set(sizes) - {*known, METADATA, MANIFEST}):
            raise ArchiveError(
                f"{odd[0]} is in the archive's folder, but not declared; convert the model again"
            )
        for name, expected in known.items():
            _compare(name, _sha256(root / name), expected)
        return Archive(root, metadata)


def _handler_files(names: Iterable[str]) -> dict[str, str]:
    """Hashes of the entries that torch-model-archiver adds for the handler."""
    return {name: _sha256(HANDLER_FILE) for name in HANDLER_FILES.intersection(names)}


def _list_files(root: Path) -> dict[str, int]:
    """Sizes of the files of an unpacked archive, by entry name; other than files and folders are refused.

    Bytecode that Python has written beside trusted modules is left out.
    """
    sizes = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            entry = path.relative_to(root).as_posix()
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                check_entry_size(entry, found.st_size, found.st_size, compressed=False)
                sizes[entry] = found.st_size
            elif not stat.S_ISDIR(found.st_mode):
                raise ArchiveError(f"{entry} is neither a file nor a folder")
        if Path(folder).relative_to(root).parts[:1] == ("code",):
            folders[:] = [name for name in folders if name != "__pycache__"]
    return sizes


def _read_header(archive: zipfile.ZipFile) -> Metadata:
    names = set(archive.namelist())
    for needed in (METADATA, MANIFEST):
        if needed not in names:
            raise ArchiveError(
                f"the archive was not written by mmdet3d-serve (it has no {needed}); convert the model"
            )
    metadata = Metadata.parse(archive.read(METADATA))
    # Of two members of one name, another reader might take the first.
    manifest = json.loads(archive.read(MANIFEST), object_pairs_hook=unique_members)
    if odd := sorted(names ^ {*metadata.files, *_handler_files(names), METADATA, MANIFEST}):
        raise ArchiveError(
            f"the entries differ from {METADATA}: {', '.join(odd[:5])}; convert the model again"
        )
    expected = {
        "runtime": "python",
        "model": {
            "modelName": metadata.name,
            "modelVersion": metadata.version,
            "handler": HANDLERS[metadata.package],
        },
    }
    # TorchServe takes more from a manifest, such as another interpreter or a file of requirements. What
    # torch-model-archiver adds to it changes nothing.
    found = {
        key: value for key, value in dict(manifest).items() if key not in ("archiverVersion", "createdOn")
    }
    if isinstance(found.get("model"), dict) and found["model"].get("serializedFile") == WEIGHTS:
        del found["model"]["serializedFile"]
    if found != expected:
        raise ArchiveError(
            f"the manifest has {str(found)[:200]}, expected {expected}; convert the model again"
        )
    return metadata


def _golden_entries(metadata: Metadata, frame: bytes | Mapping[str, bytes]) -> dict[str, bytes]:
    entries = metadata.golden_frame
    if isinstance(entries, str) and isinstance(frame, bytes):
        return {entries: frame}
    if isinstance(entries, Mapping) and isinstance(frame, Mapping) and set(entries) == set(frame):
        return {entries[name]: body for name, body in frame.items()}
    raise ArchiveError("the golden frame's parts differ from those in the metadata")


def _compare(name: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ArchiveError(
            f"{name} was altered: sha256 {actual[:12]}…, expected {expected[:12]}…; copy or convert it again"
        )


def _add(archive: zipfile.ZipFile, name: str, source: Source) -> None:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.create_system = 3  # unix, on every system, so that the bytes are the same
    info.external_attr = 0o644 << 16
    # Weights do not compress, and deflated bytes could differ between zlib builds.
    info.compress_type = zipfile.ZIP_STORED
    with archive.open(info, "w", force_zip64=True) as out:
        for block in _blocks(source):
            out.write(block)


def _blocks(source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield block


def _sha256(source: Source) -> str:
    digest = hashlib.sha256()
    for block in _blocks(source):
        digest.update(block)
    return digest.hexdigest()


def _digest(stream: io.IOBase | Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _json(document: Any) -> bytes:
    return orjson.dumps(
        document, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY
    )

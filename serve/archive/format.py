"""Model archives (``.mar``): deterministic writer, validating reader.

An archive is a zip that TorchServe can serve and that holds data only:

    MAR-INF/MANIFEST.json     TorchServe's: model name, version, handler (a module of this package, by name)
    model.json                `Metadata`: description of the model, writer, sha256 of every other file
    config.json               the resolved config (`serve.archive.config_json`)
    weights.safetensors       the weights
    golden/frame.*            a frame that the model was run on
    golden/expected.json      the predictions for that frame
    code/…                    modules named in the config's custom_imports, if any
    extra/…                   the user's extra files

Equal contents give equal bytes: entries are sorted, times and modes fixed. TorchServe's archiver is not used, because
it works in a shared temporary folder, deletes the files there, and records times.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import orjson

from serve import __version__
from serve.archive import config_json
from serve.errors import ArchiveError, ArchiveVersionError

__all__ = [
    "FORMAT",
    "Archive",
    "InferenceOptions",
    "Metadata",
    "check_identity",
    "extract",
    "open_directory",
    "verify",
    "write",
]

FORMAT = 1
MANIFEST, METADATA, CONFIG, WEIGHTS = (
    "MAR-INF/MANIFEST.json",
    "model.json",
    "config.json",
    "weights.safetensors",
)
EXPECTED = "golden/expected.json"
HANDLERS = {"mmdet3d": "handlers.mmdet3d_handler", "mmdet": "handlers.mmdet_handler"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")
# A larger unpacked size is rejected before unpacking.
MAX_UNPACKED_BYTES = 16 << 30
_EPOCH = (1980, 1, 1, 0, 0, 0)
Source = bytes | Path


@dataclass(frozen=True)
class InferenceOptions:
    """Options of the runtime for this model.

    Attributes:
        fold_batch_norm: pairs of module names (convolution, batch norm) to fold into one.
        channels_last: keep dense 2D convolutions in NHWC memory order.
        autocast: precision of CUDA autocast; the CPU always computes in float32.
    """

    fold_batch_norm: tuple[tuple[str, str], ...] = ()
    channels_last: bool = True
    autocast: Literal["off", "fp16", "bf16"] = "off"


@dataclass(frozen=True)
class Metadata:
    """Description of an archive's model (``model.json``).

    Attributes:
        name: model name.
        version: model version, digits and dots.
        modality: kind of frame, one of `serve.protocol.frames.MODALITIES`.
        package: ``"mmdet"`` or ``"mmdet3d"``.
        classes: class names by label.
        box_type_3d: ``"LiDAR"``, ``"Camera"``, ``"Depth"``; None for 2D boxes and for labels.
        load_dim: floats per point of a ``.bin``; None without a point cloud.
        color_type: mmcv's name of the image decoding; None without images.
        golden_frame: entry name of the golden frame; for a frame of several parts, entry names by part.
        source: file names and hashes of config and checkpoint, and the package versions at conversion.
        inference: options of the runtime.
        parts: names of the parts of a frame.
        files: sha256 (hex) of every entry except the manifest and ``model.json``.
        serve_version: version of this package that wrote the archive; for people, nothing depends on it.
        format: version of the layout and of its meaning; it changes if an older reader would go wrong.
    """

    name: str
    version: str
    modality: str
    package: Literal["mmdet", "mmdet3d"]
    classes: tuple[str, ...]
    box_type_3d: str | None
    load_dim: int | None
    color_type: str | None
    golden_frame: str | Mapping[str, str]
    source: Mapping[str, str]
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    parts: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    serve_version: str = __version__
    format: int = FORMAT

    @classmethod
    def parse(cls, document: bytes) -> Metadata:
        """Parse ``model.json``.

        Raises:
            ArchiveVersionError: written by an incompatible version.
            ArchiveError: malformed.
        """
        try:
            raw = orjson.loads(document)
            _check_version(raw["format"], raw["serve_version"])
            unknown = set(raw) - {f.name for f in fields(cls)}
            if unknown:
                raise ArchiveError(f"{METADATA} has unknown fields: {', '.join(sorted(unknown))}")
            inference = dict(raw["inference"])
            inference["fold_batch_norm"] = tuple((conv, norm) for conv, norm in inference["fold_batch_norm"])
            raw["inference"] = InferenceOptions(**inference)
            raw["classes"], raw["parts"] = tuple(raw["classes"]), tuple(raw.get("parts", ()))
            return cls(**raw)
        except ArchiveError:
            raise
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{METADATA} is malformed ({error!r}); convert the model again") from None


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
        config: dict[str, Any] = config_json.from_json(orjson.loads((self.root / CONFIG).read_bytes()))
        return config

    def golden_frame(self) -> bytes | dict[str, bytes]:
        """Read the golden frame, by part if it has several."""
        entries = self.metadata.golden_frame
        if isinstance(entries, str):
            return (self.root / entries).read_bytes()
        return {name: (self.root / entry).read_bytes() for name, entry in entries.items()}

    def golden_expected(self) -> dict[str, Any]:
        """Read the predictions recorded for the golden frame, without a score threshold."""
        expected: dict[str, Any] = orjson.loads((self.root / EXPECTED).read_bytes())
        return expected


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
        _check_entry_name(name)
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
    everything = {**entries, METADATA: _json(described), MANIFEST: _json(manifest)}
    descriptor, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, source in sorted(everything.items()):
                _add(archive, name, source)
        os.chmod(staging, 0o644)
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    return _sha256(path)


def verify(path: Path) -> Metadata:
    """Check names, version and hashes of an archive file without unpacking it.

    Raises:
        ArchiveError: corrupt, altered, written by another program, or of an incompatible version.
    """
    with _open_zip(path) as archive:
        metadata, _ = _read_header(archive)
        for name, expected in metadata.files.items():
            with archive.open(name) as stream:
                _compare(name, _digest(stream), expected)
        return metadata


def extract(path: Path, root: Path) -> Archive:
    """Unpack an archive into the empty folder `root` and check it.

    Raises:
        ArchiveError: as `verify`.
    """
    with _open_zip(path) as archive:
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

    Raises:
        ArchiveError: a file is missing or altered, or the version is incompatible.
    """
    try:
        metadata = Metadata.parse((root / METADATA).read_bytes())
    except OSError:
        raise ArchiveError(
            f"{root} has no {METADATA}: the archive was not written by mmdet3d-serve; convert the model with it"
        ) from None
    for name, expected in metadata.files.items():
        _check_entry_name(name)
        try:
            _compare(name, _sha256(root / name), expected)
        except OSError:
            raise ArchiveError(f"{name} is missing from the archive; convert the model again") from None
    return Archive(root, metadata)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ArchiveError(
            f"{path.name} is not a readable archive ({error}); copy or convert it again"
        ) from None


def _read_header(archive: zipfile.ZipFile) -> tuple[Metadata, dict[str, Any]]:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise ArchiveError("the archive has duplicate entries; convert the model again")
    for name in names:
        _check_entry_name(name)
    if sum(info.file_size for info in infos) > MAX_UNPACKED_BYTES:
        raise ArchiveError(f"the archive is larger than {MAX_UNPACKED_BYTES >> 30} GiB unpacked")
    try:
        metadata = Metadata.parse(archive.read(METADATA))
        manifest: dict[str, Any] = orjson.loads(archive.read(MANIFEST))
    except KeyError as error:
        raise ArchiveError(
            f"the archive was not written by mmdet3d-serve ({error.args[0]}); convert the model"
        ) from None
    except (zipfile.BadZipFile, orjson.JSONDecodeError, OSError) as error:
        raise ArchiveError(f"the archive is corrupt ({error}); copy or convert it again") from None
    if set(names) != {*metadata.files, METADATA, MANIFEST}:
        odd = sorted(set(names) ^ {*metadata.files, METADATA, MANIFEST})
        raise ArchiveError(f"the entries differ from {METADATA}: {', '.join(odd)}; convert the model again")
    model = manifest.get("model") if isinstance(manifest, dict) else None
    expected = {
        "modelName": metadata.name,
        "modelVersion": metadata.version,
        "handler": HANDLERS[metadata.package],
    }
    if model != expected:
        raise ArchiveError(f"the manifest has {model}, expected {expected}; convert the model again")
    return metadata, manifest


def _golden_entries(metadata: Metadata, frame: bytes | Mapping[str, bytes]) -> dict[str, bytes]:
    entries = metadata.golden_frame
    if isinstance(entries, str) and isinstance(frame, bytes):
        return {entries: frame}
    if isinstance(entries, Mapping) and isinstance(frame, Mapping) and set(entries) == set(frame):
        return {entries[name]: body for name, body in frame.items()}
    raise ArchiveError("the golden frame's parts differ from those in the metadata")


def _check_version(archive_format: Any, serve_version: Any) -> None:
    if archive_format != FORMAT:
        raise ArchiveVersionError(
            f"the archive has format {archive_format} (mmdet3d-serve {serve_version}), mmdet3d-serve {__version__} "
            f"reads format {FORMAT}; convert the model with the version that serves it"
        )


def check_identity(name: str, version: str) -> None:
    """Check that a model's name and version can be served.

    Raises:
        ArchiveError: they cannot; the message says what is allowed.
    """
    if not NAME.fullmatch(name):
        raise ArchiveError(
            f"model name {name!r} is invalid; use letters, digits, '.', '_' and '-' (at most 128)"
        )
    if not VERSION.fullmatch(version):
        raise ArchiveError(f"model version {version!r} is invalid; use digits and dots, as in 1.0")


def _check_entry_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name.endswith("/") or str(path) != name:
        raise ArchiveError(f"entry {name!r} is not a plain path inside the archive")
    if path.parts[0] not in {"MAR-INF", "golden", "code", "extra", METADATA, CONFIG, WEIGHTS}:
        # Other top-level entries could shadow a Python module: TorchServe puts the folder on sys.path.
        raise ArchiveError(f"entry {name!r} is not a part of an mmdet3d-serve archive")


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
    try:
        while block := stream.read(1 << 20):
            digest.update(block)
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"the archive is corrupt ({error}); copy or convert it again") from None
    return digest.hexdigest()


def _json(document: Any) -> bytes:
    return orjson.dumps(
        document, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY
    )

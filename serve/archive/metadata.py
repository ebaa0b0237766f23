"""Description of an archive's model (``model.json``), checked field by field when it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from serve import __version__
from serve.archive.bounds import CONFIG, EXPECTED, MANIFEST, MAX_ENTRIES, METADATA, WEIGHTS, check_entry_name
from serve.errors import ArchiveError, ArchiveVersionError

__all__ = ["FORMAT", "HANDLERS", "InferenceOptions", "Metadata", "check_identity"]

FORMAT = 1
HANDLERS = {"mmdet3d": "handlers.mmdet3d_handler", "mmdet": "handlers.mmdet_handler"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")
_MAX_CLASSES, _MAX_PARTS, _MAX_PAIRS = 100_000, 64, 100_000
_MAX_QUOTED_CHARS = 200

_Text = Annotated[str, Field(max_length=1024)]
_Word = Annotated[str, Field(max_length=128)]
_Entries = Annotated[dict[_Word, _Text], Field(max_length=_MAX_PARTS)]


@dataclass(frozen=True)
class InferenceOptions:
    """Options of the runtime for this model.

    Attributes:
        fold_batch_norm: pairs of module names (convolution, batch norm) to fold into one.
        channels_last: keep dense 2D convolutions in NHWC memory order.
        autocast: precision of CUDA autocast; the CPU always computes in float32.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    fold_batch_norm: Annotated[tuple[tuple[_Text, _Text], ...], Field(max_length=_MAX_PAIRS)] = ()
    channels_last: bool = True
    autocast: Literal["off", "fp16", "bf16"] = "off"


@dataclass(frozen=True)
class Metadata:
    """Description of an archive's model (``model.json``).

    Attributes:
        name: model name.
        version: model version, digits and dots.
        modality: kind of frame, one of `serve.protocol.frame_spec.MODALITIES`.
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

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: _Word
    version: _Word
    modality: _Word
    package: Literal["mmdet", "mmdet3d"]
    classes: Annotated[tuple[_Text, ...], Field(max_length=_MAX_CLASSES)]
    box_type_3d: _Word | None
    load_dim: Annotated[int, Field(ge=1, le=1024)] | None
    color_type: _Word | None
    golden_frame: _Text | _Entries
    source: Annotated[dict[_Word, _Text], Field(max_length=256)]
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    parts: Annotated[tuple[_Word, ...], Field(max_length=_MAX_PARTS)] = ()
    files: Annotated[
        dict[_Text, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(max_length=MAX_ENTRIES)
    ] = field(default_factory=dict)
    serve_version: _Word = __version__
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
            metadata = _PARSER.validate_json(document)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))[:_MAX_QUOTED_CHARS]
            raise ArchiveError(
                f"{METADATA} is malformed ({where}: {first['msg'][:_MAX_QUOTED_CHARS]}); convert the model again"
            ) from None
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ArchiveError(
                f"{METADATA} is malformed ({repr(error)[:_MAX_QUOTED_CHARS]}); convert the model again"
            ) from None
        check_identity(metadata.name, metadata.version)
        metadata._check_entries()
        return metadata

    def golden_entries(self) -> tuple[str, ...]:
        """Names of the entries of the golden frame."""
        return (
            (self.golden_frame,) if isinstance(self.golden_frame, str) else tuple(self.golden_frame.values())
        )

    def _check_entries(self) -> None:
        for name in self.files:
            check_entry_name(name)
        if named := {MANIFEST, METADATA} & set(self.files):
            raise ArchiveError(
                f"{METADATA} has a hash of {', '.join(sorted(named))}; convert the model again"
            )
        needed = (CONFIG, WEIGHTS, EXPECTED, *self.golden_entries())
        if missing := [name for name in needed if name not in self.files]:
            raise ArchiveError(
                f"{METADATA} names {missing[0][:_MAX_QUOTED_CHARS]!r}, which is not an entry of the archive; "
                "convert the model again"
            )
        if not all(name.startswith("golden/") for name in self.golden_entries()):
            raise ArchiveError(
                f"{METADATA} names a golden frame that is not below golden/; convert the model again"
            )


_PARSER: TypeAdapter[Metadata] = TypeAdapter(Metadata)


def _check_version(archive_format: Any, serve_version: Any) -> None:
    if archive_format != FORMAT or isinstance(archive_format, bool):
        raise ArchiveVersionError(
            f"the archive has format {str(archive_format)[:_MAX_QUOTED_CHARS]} (mmdet3d-serve "
            f"{str(serve_version)[:_MAX_QUOTED_CHARS]}), mmdet3d-serve {__version__} "
            f"reads format {FORMAT}; convert the model with the version that serves it"
        )


def check_identity(name: str, version: str) -> None:
    """Check that a model's name and version can be served.

    Raises:
        ArchiveError: they cannot; the message says what is allowed.
    """
    if not NAME.fullmatch(name):
        raise ArchiveError(
            f"model name {name[:_MAX_QUOTED_CHARS]!r} is invalid; use letters, digits, '.', '_' and '-' (at most 128)"
        )
    if not VERSION.fullmatch(version):
        raise ArchiveError(
            f"model version {version[:_MAX_QUOTED_CHARS]!r} is invalid; use digits and dots, as in 1.0"
        )

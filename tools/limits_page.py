"""Write docs/limits.md: every bound with its default, its unit, and what is answered beyond it.

python -m tools.limits_page            write the page
python -m tools.limits_page --check    exit with 1 if the page is not current
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.cli.flags import show_default
from serve.errors import (
    ArchiveError,
    BadRequest,
    DeadlineExceeded,
    FrameTooLarge,
    NotReady,
    Overloaded,
    ReferenceRefused,
    ServeError,
    SlowRequest,
    UndecodableFrame,
    UnknownOption,
)
from serve.gateway.options import GatewayOptions
from serve.settings import OptionInfo, Settings
from tools.settings_page import write_or_check

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"

HEAD = """# Limits

This page is generated: `python -m tools.limits_page`.

What a request, a frame or an archive may hold, and what is answered beyond it: HTTP status and code of the error.
A limit with a variable is a [setting](settings.md); the others are constants, in the module that is named.
The error of one frame among several is that frame's outcome; the others are answered.
"""

Beyond = type[ServeError] | str


@dataclass(frozen=True)
class Limit:
    """One row.

    Attributes:
        source: name of a setting, or ``module:CONSTANT[.member]`` below `serve`.
        what: noun phrase for what is bounded.
        beyond: the error, or in words what happens.
        unit: of a constant; a setting has its own.
    """

    source: str
    what: str
    beyond: Beyond
    unit: str = ""

    @property
    def value(self) -> Any:
        """The default of the setting, or the constant."""
        if ":" not in self.source:
            return _setting(self.source).default
        module, _, path = self.source.partition(":")
        found: Any = importlib.import_module(f"serve.{module}")
        for name in path.split("."):
            found = getattr(found, name)
        return found


SECTIONS: dict[str, tuple[Limit, ...]] = {
    "A request": (
        Limit("max_body_bytes", "largest body, announced or arriving in chunks", FrameTooLarge),
        Limit("max_frames_per_request", "most frames", FrameTooLarge),
        Limit("max_json_bytes", "largest JSON, strings of base64 not counted", FrameTooLarge),
        Limit("max_json_values", "most values in JSON", FrameTooLarge),
        Limit(
            "protocol.json_reader:JsonBounds.max_objects",
            "most strings, names, lists, objects in JSON",
            FrameTooLarge,
            "N",
        ),
        Limit("protocol.json_reader:JsonBounds.max_depth", "depth of JSON", BadRequest, "N"),
        Limit(
            "protocol.batch:HEADER_BYTES_PER_FRAME",
            "largest header of a framed batch, for each frame",
            FrameTooLarge,
            "BYTES",
        ),
        Limit("protocol.batch:MAX_PARTS", "most parts of a frame", FrameTooLarge, "N"),
        Limit("protocol.batch:MAX_NAME_CHARS", "longest name of a part", BadRequest, "CHARACTERS"),
        Limit("gateway.form:_MAX_TEXT_BYTES", "longest text field of a form", FrameTooLarge, "BYTES"),
        Limit("gateway.routes.kserve_tensors:_MAX_RANK", "dimensions of a v2 tensor", BadRequest, "N"),
        Limit(
            "gateway.routes.kserve_tensors:_MAX_PARAMETERS",
            "parameters of a v2 request or tensor",
            BadRequest,
            "N",
        ),
        Limit(
            "gateway.routes.kserve_tensors:MAX_TEXT_CHARS",
            "longest id of a v2 request",
            BadRequest,
            "CHARACTERS",
        ),
        Limit(
            "protocol.selection:_MAX_TEXT_CHARS",
            "text of `classes`, `class_thr`, `fields`",
            UnknownOption,
            "CHARACTERS",
        ),
        Limit("protocol.selection:_MAX_NAMES", "names in one of them", UnknownOption, "N"),
        Limit(
            "gateway.grpc.wire:MAX_HEADER_BYTES",
            "gRPC message, `raw_input_contents` not counted",
            FrameTooLarge,
            "BYTES",
        ),
        Limit("gateway.grpc.wire:MAX_FIELDS", "fields of a gRPC message", FrameTooLarge, "N"),
        Limit("gateway.request:MAX_QUERY_BYTES", "longest query", BadRequest, "BYTES"),
        Limit("gateway.response:_MAX_ACCEPT_CHARS", "longest Accept header", BadRequest, "CHARACTERS"),
        Limit(
            "gateway.http_protocol:MAX_HEADER_BYTES",
            "header of a request, all lines together",
            BadRequest,
            "BYTES",
        ),
        Limit("gateway.request_head:MAX_HEADER_LINES", "lines of a header", BadRequest, "N"),
        Limit("max_timeout_s", "longest deadline that `timeout_ms` may name", UnknownOption),
        Limit("timeout_s", "deadline of a request that names none", DeadlineExceeded),
        Limit("errors:MAX_MESSAGE_CHARS", "longest message of an error", "the message is cut", "CHARACTERS"),
    ),
    "A client": (
        Limit("max_pending_frames", "frames waiting or running, of all clients", Overloaded),
        Limit("max_pending_bytes", "bytes held for requests and unread answers, of all clients", Overloaded),
        Limit("track_sessions", "sequences whose objects are tracked", Overloaded),
        Limit("tracks_per_session", "tracks of a sequence", "further detections have no id"),
        Limit(
            "gateway.rollout:_MAX_FILE_BYTES",
            "largest `rollout_file`",
            "the start ends; later its change is ignored",
            "BYTES",
        ),
        Limit("shadow_frames", "frames on their way to shadows", "the frame is not compared"),
        Limit("shadow_bytes", "bytes of these and of their answers", "the frame is not compared"),
        Limit(
            "gateway.shadow:_MAX_COMPARED_BOXES",
            "boxes of an answer of these",
            "the frame is not compared",
            "N",
        ),
        Limit(
            "gateway.shadow_metrics:MAX_CLASSES",
            "classes with a label of their own in the metrics of shadows",
            "counted as `(other)`",
            "N",
        ),
        Limit("client_share", "part of these that one client may hold", Overloaded),
        Limit("max_connections", "open connections", NotReady),
        Limit("max_grpc_streams", "open streams over gRPC", Overloaded),
        Limit(
            "gateway.grpc.reading:MAX_CALLS_PER_CONNECTION",
            "calls at a time on one connection over gRPC",
            "the others wait in the client",
            "N",
        ),
        Limit("header_timeout_s", "time for the header of a request", "the connection is closed"),
        Limit("body_timeout_s", "time for a body", SlowRequest),
        Limit(
            "client_stall_timeout_s",
            "time to bring, or take, what `client_bytes_per_s` asks for",
            "408 `request_timeout`, or the connection is cut",
        ),
        Limit("client_bytes_per_s", "least rate of a body and of an answer", "as before"),
        Limit("keep_alive_s", "time that a connection may be idle", "the connection is closed"),
        Limit(
            "max_requests_per_connection",
            "requests on one connection; 0: no limit",
            "the connection is closed",
        ),
    ),
    "A frame": (
        Limit("max_frame_bytes", "largest frame, all parts together", FrameTooLarge),
        Limit("max_points", "most points, sweeps included", FrameTooLarge),
        Limit(
            "protocol.point_formats:MAX_HEADER_BYTES",
            "largest header of a PCD, PLY or npy file",
            UndecodableFrame,
            "BYTES",
        ),
        Limit("protocol.point_formats:MAX_NPZ_ENTRIES", "entries of an npz", UndecodableFrame, "N"),
        Limit("protocol.point_table:MAX_COLUMNS", "most columns of a point cloud", UndecodableFrame, "N"),
        Limit("protocol.point_table:MAX_BYTES_PER_POINT", "largest point of a file", FrameTooLarge, "BYTES"),
        Limit("protocol.points:MAX_COORDINATE_M", "largest coordinate", UndecodableFrame, "M"),
        Limit(
            "protocol.las:LAZ_SECONDS",
            "CPU time of the process that unpacks a LAZ file",
            UndecodableFrame,
            "S",
        ),
        Limit(
            "protocol.las:LAZ_PROCESS_BYTES",
            "its memory, besides four times `max_frame_bytes`",
            UndecodableFrame,
            "BYTES",
        ),
        Limit("protocol.las:MAX_RECORDS", "records before the points of a LAS file", UndecodableFrame, "N"),
        Limit("protocol.sweeps:MAX_SWEEPS", "most sweeps", BadRequest, "N"),
        Limit("protocol.sweeps:MAX_LAG_S", "largest age of a sweep", UndecodableFrame, "S"),
        Limit("protocol.sweeps:MAX_SHIFT_M", "largest shift of a sweep", UndecodableFrame, "M"),
        Limit("protocol.calibration:MAX_CALIBRATION_BYTES", "largest calibration", FrameTooLarge, "BYTES"),
        Limit("protocol.json_bodies:_MAX_TEXT_BYTES", "longest part `text`", FrameTooLarge, "BYTES"),
    ),
    "An image": (
        Limit("max_pixels", "width times height", FrameTooLarge),
        Limit("protocol.image_work:MAX_SCANS", "scans of a JPEG", FrameTooLarge, "N"),
        Limit(
            "protocol.image_work:MAX_PASSES",
            "scans times components times pixels of a JPEG, in `max_pixels`",
            FrameTooLarge,
            "N",
        ),
        Limit("protocol.image_size:MAX_JPEG_SEGMENTS", "segments of a JPEG", UndecodableFrame, "N"),
        Limit(
            "protocol.image_size:MAX_JPEG_FILL_BYTES", "bytes between its segments", UndecodableFrame, "BYTES"
        ),
        Limit("protocol.image_work:MAX_PNG_CHUNKS", "chunks of a PNG", FrameTooLarge, "N"),
        Limit(
            "protocol.image_work:MAX_PACKED_TEXTS", "packed texts and profiles of a PNG", FrameTooLarge, "N"
        ),
        Limit(
            "protocol.image_work:START_SECONDS",
            "CPU time of the process that decodes JPEG 2000 or AVIF, …",
            FrameTooLarge,
            "S",
        ),
        Limit("protocol.image_work:SECONDS_PER_PIXEL", "… and for each pixel", FrameTooLarge, "S"),
        Limit("protocol.image_work:SECONDS_PER_BYTE", "… and for each byte", FrameTooLarge, "S"),
        Limit("protocol.images:PROCESS_BYTES", "its memory, …", FrameTooLarge, "BYTES"),
        Limit("protocol.images:PROCESS_BYTES_PER_PIXEL", "… and for each pixel", FrameTooLarge, "BYTES"),
    ),
    "A frame by reference": (
        Limit("storage.references:_MAX_URI", "longest URI", BadRequest, "CHARACTERS"),
        Limit("storage.references:_MAX_REDIRECTS", "redirects", ReferenceRefused, "N"),
        Limit("uri_timeout_s", "time for reading it", NotReady),
    ),
    "A batch": (
        Limit("batch_frames", "frames", "the next batch takes the rest"),
        Limit("batch_points", "points", "the next batch takes the rest; one frame of more goes alone"),
        Limit(
            "batch_pixels",
            "pixels, each image counted as the largest",
            "the next batch takes the rest; one frame of more goes alone",
        ),
        Limit("batch_bytes", "bytes", "the next batch takes the rest"),
        Limit(
            "protocol.worker:MAX_BATCH_FRAMES", "frames that a worker takes", "the connection is closed", "N"
        ),
        Limit(
            "protocol.worker:MAX_MESSAGE_BYTES",
            "bytes that a worker takes",
            "the connection is closed",
            "BYTES",
        ),
    ),
    "An archive": (
        Limit("archive.bounds:MAX_ENTRIES", "entries", ArchiveError, "N"),
        Limit("archive.bounds:MAX_DIRECTORY_BYTES", "directory of the ZIP file", ArchiveError, "BYTES"),
        Limit("archive.bounds:MAX_UNPACKED_BYTES", "unpacked size", ArchiveError, "BYTES"),
        Limit(
            "archive.bounds:MAX_COMPRESSION",
            "unpacked over packed bytes of an entry over 1 MiB",
            ArchiveError,
            "RATIO",
        ),
    ),
}


def _setting(name: str) -> OptionInfo:
    found = {each.name: each for cls in (GatewayOptions, Settings) for each in cls.options()}
    return found[name]


def answered(beyond: Beyond) -> str:
    """Describe what is answered: status and code of an error."""
    if isinstance(beyond, str):
        return beyond
    if issubclass(beyond, ArchiveError):
        return f"the archive is refused, `{beyond.code}`"
    return f"{beyond.status} `{beyond.code}`"


def render() -> str:
    """Generate the text of docs/limits.md."""
    parts = [HEAD]
    for title, limits in SECTIONS.items():
        rows = ["| Limit | Default | Unit | Beyond | Set by |\n", "| --- | --- | --- | --- | --- |\n"]
        for each in limits:
            if ":" in each.source:
                unit, by = each.unit, f"constant in `serve.{each.source.partition(':')[0]}`"
            else:
                setting = _setting(each.source)
                unit, by = setting.unit, f"`{setting.variable}`"
            default = show_default(each.value, unit)
            rows.append(f"| {each.what} | `{default}` | {unit} | {answered(each.beyond)} | {by} |\n")
        parts += [f"## {title}\n", "".join(rows)]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or check it."""
    return write_or_check("python -m tools.limits_page", __doc__, PAGE, render)


if __name__ == "__main__":
    sys.exit(main())

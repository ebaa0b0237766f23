"""docs/limits.md is current and complete, and what it names is what is answered."""

from __future__ import annotations

import ast
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from serve.errors import ArchiveError, ServeError
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.protocol.calibration import parse_calibration
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.images import decode_image
from serve.protocol.options import FrameOptions
from serve.protocol.sweeps import parse_sweeps
from serve.settings import Limits
from tests.attacks.pictures import hostile
from tests.gateway import raw
from tests.gateway.running import eventually
from tools import limits_page
from tools.limits_page import PAGE, SECTIONS, Limit

ROOT = Path(__file__).parents[2]
ROWS = {each.source: each for limits in SECTIONS.values() for each in limits}
# Constants that are named like bounds and are none on what is sent.
NO_LIMITS = {
    "archive.bounds:_MAX_QUOTED_CHARS", "archive.metadata:_MAX_QUOTED_CHARS", "errors:_MAX_QUOTED_CHARS",
    "gateway.models:MAX_AGE_S",
    "gateway.backend:_MAX_POLLS", "protocol.start_record:_MAX_REASON_CHARS",
    "protocol.start_record:_MAX_FILE_BYTES", "settings.process:MAX_FRAME_BYTES",
}  # fmt: skip
# Bounds per kind of entry or header, which stand behind one row of the page, or behind its text.
PARTS_OF_OTHERS = {
    "archive.bounds:_MAX_BYTES", "archive.bounds:_MAX_BYTES_BELOW", "protocol.image_size:_MAX_HEADER_BYTES",
    "protocol.image_size:_MAX_BOXES", "protocol.image_size:_MAX_META_BYTES", "gateway.form:_MAX_CONTENT_TYPE_BYTES",
    "protocol.calibration:_MAX_ENTRY", "protocol.image_size:_MAX_TIFF_TAGS", "worker.server:_MAX_CONNECTIONS",
    "protocol.pam:_MAX_HEADER_BYTES",
}  # fmt: skip


def test_page_is_current() -> None:
    assert PAGE.read_text() == limits_page.render(), "run `python -m tools.limits_page`"


def test_every_constant_named_like_a_limit_is_on_the_page() -> None:
    found = set()
    for package in ("gateway", "protocol", "archive", "worker", "settings"):
        for path in (ROOT / "serve" / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT / "serve").with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                names = [each.id for each in targets if isinstance(each, ast.Name)]
                found |= {f"{module}:{name}" for name in names if re.match(r"_?MAX_", name)}
    assert len(found) > 20
    assert found - set(ROWS) - NO_LIMITS - PARTS_OF_OTHERS == set()


def test_every_limit_among_the_settings_is_on_the_page() -> None:
    from serve.gateway.options import GatewayOptions
    from serve.settings import Settings

    names = {each.name for cls in (GatewayOptions, Settings) for each in cls.options()}
    limits = {name for name in names if name.startswith(("max_", "batch_"))}
    assert len(limits) >= 12
    assert limits <= set(ROWS), limits - set(ROWS)


Outcome = tuple[int, str]
LIDAR, IMAGE = FrameSpec("lidar"), FrameSpec("image")


def refused(call: Callable[[], object]) -> Outcome:
    with pytest.raises(ServeError) as caught:
        call()
    return caught.value.status, caught.value.code


def decoded(
    body: bytes, spec: FrameSpec = LIDAR, *, options: FrameOptions | None = None, **limits: int
) -> Outcome:
    return refused(lambda: decode_frame(body, spec, options or FrameOptions(), Limits(**limits)))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pcd(columns: int) -> bytes:
    names = ["x", "y", "z", *(f"c{k}" for k in range(columns - 3))]
    lines = [
        "# .PCD v0.7", "VERSION 0.7", f"FIELDS {' '.join(names)}", f"SIZE {' '.join('4' * columns)}",
        f"TYPE {' '.join('F' * columns)}", f"COUNT {' '.join('1' * columns)}", "WIDTH 1", "HEIGHT 1", "POINTS 1",
        "DATA binary", "",
    ]  # fmt: skip
    return "\n".join(lines).encode() + bytes(4 * columns)


def sweeps(**changes: object) -> bytes:
    matrix = np.eye(4).tolist()
    return json.dumps([{"time_lag_s": 0.1, "transform": matrix, **changes}]).encode()


def shifted(metres: float) -> list[list[float]]:
    matrix = np.eye(4)
    matrix[0, 3] = metres
    return matrix.tolist()


def value(source: str) -> int:
    return int(ROWS[source].value)


# What one frame more, or one byte, is answered with; frames are decoded here as the worker does it.
FRAMES: dict[str, Callable[[], Outcome]] = {
    "max_frame_bytes": lambda: decoded(bytes(32), max_frame_bytes=31),
    "max_points": lambda: decoded(bytes(64), max_points=3),
    "protocol.point_formats:MAX_HEADER_BYTES": lambda: decoded(
        b"# .PCD v0.7\n" + b"#" * 70_000 + b"\nDATA binary\n"
    ),
    "protocol.point_table:MAX_COLUMNS": lambda: decoded(pcd(129)),
    "protocol.points:MAX_COORDINATE_M": lambda: decoded(np.full((4, 4), 1.1e6, np.float32).tobytes()),
    "protocol.sweeps:MAX_LAG_S": lambda: refused(lambda: parse_sweeps(sweeps(time_lag_s=3601.0))),
    "protocol.sweeps:MAX_SHIFT_M": lambda: refused(lambda: parse_sweeps(sweeps(transform=shifted(10_001.0)))),
    "protocol.calibration:MAX_CALIBRATION_BYTES": lambda: refused(
        lambda: parse_calibration(bytes(1 + (1 << 20)), ("lidar2img",))
    ),
    "max_pixels": lambda: refused(lambda: decode_image(hostile.png(8, 8), "color", "cv2", 63)),
    "protocol.image_work:MAX_SCANS": lambda: refused(
        lambda: decode_image(hostile.jpeg_of_scans(8, 8, 501), "color", "cv2", 10**6)
    ),
    "protocol.image_work:MAX_PASSES": lambda: refused(
        lambda: decode_image(hostile.jpeg_of_scans(8, 8, 33), "color", "cv2", 64)
    ),
    "protocol.image_size:MAX_JPEG_SEGMENTS": lambda: decoded(
        hostile.jpeg_with(b"\xff\xfe\0\2" * 2001), IMAGE
    ),
    "protocol.image_size:MAX_JPEG_FILL_BYTES": lambda: decoded(hostile.jpeg_with(b"\xff" * 70_000), IMAGE),
    "protocol.image_work:MAX_PNG_CHUNKS": lambda: decoded(
        hostile.png(8, 8, extra=hostile.chunk(b"abCd", b"") * 100_001), IMAGE
    ),
    "protocol.image_work:MAX_PACKED_TEXTS": lambda: decoded(
        hostile.png(8, 8, extra=hostile.chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a")) * 33), IMAGE
    ),
}


@pytest.mark.parametrize("source", FRAMES)
def test_frame_beyond_a_limit_is_answered_as_the_page_says(source: str) -> None:
    kind = ROWS[source].beyond
    assert not isinstance(kind, str)
    assert FRAMES[source]() == (kind.status, kind.code)


def infer(**changes: object) -> bytes:
    tensor = {"name": "points", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4}
    document = {"inputs": [{**tensor, **changes.pop("tensor", {})}], **changes}  # type: ignore[dict-item]
    return json.dumps(document).encode()


INFER = "/v2/models/second/infer"
JSON = {"content_type": "application/json"}
FORM = {"content_type": "multipart/form-data; boundary=b"}
FRAMED = {"content_type": FRAMES_CONTENT_TYPE}


def field(name: str, text: str) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()


def framed(header: dict[str, object], payload: bytes = b"") -> bytes:
    packed = json.dumps(header).encode()
    return pack_frames([])[:8] + struct.pack("<I", len(packed)) + packed + payload


# The bytes of a request that is beyond a limit.
REQUESTS: dict[str, Callable[[], bytes]] = {
    "max_body_bytes": lambda: raw.head("/predictions/second", content_length=3000),
    "max_frames_per_request": lambda: raw.request(
        "/predictions/second", pack_frames([(bytes(16), {})] * 5), **FRAMED
    ),
    "max_json_bytes": lambda: raw.request(
        "/predictions/second", b'{"b64": "", "x": [' + b"1," * 60_000 + b"1]}", **JSON
    ),
    "protocol.json_reader:JsonBounds.max_depth": lambda: raw.request(
        "/predictions/second", b'{"b64": "", "x": ' + b"[" * 40 + b"]" * 40 + b"}", **JSON
    ),
    "protocol.batch:MAX_PARTS": lambda: raw.request(
        "/predictions/second",
        framed({"frames": [{"length": 0, "options": {}, "parts": [[f"p{k}", 0] for k in range(129)]}]}),
        **FRAMED,
    ),
    "protocol.batch:MAX_NAME_CHARS": lambda: raw.request(INFER, infer(tensor={"name": "n" * 201}), **JSON),
    "gateway.routes.kserve_tensors:_MAX_RANK": lambda: raw.request(
        INFER, infer(tensor={"shape": [1] * 9}), **JSON
    ),
    "gateway.routes.kserve_tensors:_MAX_PARAMETERS": lambda: raw.request(
        INFER, infer(parameters={f"p{k}": 1 for k in range(65)}), **JSON
    ),
    "gateway.response:_MAX_ACCEPT_CHARS": lambda: raw.request(
        "/predictions/second", bytes(16), accept="a" * 5000
    ),
    "protocol.selection:_MAX_TEXT_CHARS": lambda: raw.request(
        "/predictions/second", bytes(16), x_classes="a" * (1 + value("protocol.selection:_MAX_TEXT_CHARS"))
    ),
    "protocol.selection:_MAX_NAMES": lambda: raw.request(
        "/predictions/second",
        json.dumps({"b64": "", "classes": ["a"] * (1 + value("protocol.selection:_MAX_NAMES"))}).encode(),
        **JSON,
    ),
    "max_timeout_s": lambda: raw.request("/predictions/second?timeout_ms=5001", bytes(16)),
    "max_json_values": lambda: raw.request(
        "/predictions/second", b'{"b64": "", "x": [' + b"1," * 1100 + b"1]}", **JSON
    ),
    "storage.references:_MAX_URI": lambda: raw.request(
        "/predictions/second", json.dumps({"uri": "s3://bucket/" + "a" * 2048}).encode(), **JSON
    ),
}
SMALL = {
    "max_body_bytes": 2999,
    "max_frame_bytes": 2000,
    "max_frames_per_request": 4,
    "max_timeout_s": 5,
    "timeout_s": 5,
}
# Where a small body would be refused for another reason.
OWN = {
    "max_json_bytes": {"max_json_bytes": 1024},
    "max_json_values": {"max_json_values": 1024},
}
LARGE = (
    "max_json_bytes", "protocol.batch:MAX_PARTS", "gateway.routes.kserve_tensors:_MAX_PARAMETERS", "max_json_values",
    "storage.references:_MAX_URI", "protocol.selection:_MAX_NAMES",
)  # fmt: skip


@pytest.mark.parametrize("source", REQUESTS)
def test_request_beyond_a_limit_is_answered_as_the_page_says(source, start_gateway) -> None:
    prefixes = {"uri_prefixes": ("s3://bucket/",)} if source.startswith("storage") else {}
    gateway = start_gateway(**({} if source in LARGE else SMALL), **OWN.get(source, {}), **prefixes)
    with raw.connected(gateway.url) as connection:
        connection.sendall(REQUESTS[source]())
        answer = raw.answer(connection)
    kind = ROWS[source].beyond
    assert not isinstance(kind, str)
    assert raw.status(answer) == kind.status, answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert isinstance(error, str) or error["code"] == kind.code  # v2 has no codes


def test_deadline_and_full_queue_are_answered_as_the_page_says(start_gateway, backend, cloud) -> None:
    gateway = start_gateway(timeout_s=0.2, max_pending_frames=1, max_frames_per_request=1, client_share=1)
    backend.hold()
    import threading

    late: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: late.append(gateway.post(content=cloud(1))))
    waiting.start()
    eventually(lambda: gateway.admission.items)
    full = gateway.post(content=cloud(2))
    waiting.join()
    backend.release()
    for answer, source in ((full, "max_pending_frames"), (late[0], "timeout_s")):
        kind = ROWS[source].beyond
        assert not isinstance(kind, str)
        assert (answer.status_code, answer.json()["error"]["code"]) == (kind.status, kind.code)


# Rows with an error that take time, clients, files or other processes: each has a test of its own.
ELSEWHERE = {
    "gateway.http_protocol:MAX_HEADER_BYTES": "tests/gateway/test_http_protocol.py",
    "gateway.request_head:MAX_HEADER_LINES": "tests/gateway/test_http_protocol.py",
    "gateway.request:MAX_QUERY_BYTES": "tests/attacks/bodies",
    "gateway.grpc.wire:MAX_HEADER_BYTES": "tests/gateway/grpc/test_wire.py",
    "gateway.grpc.wire:MAX_FIELDS": "tests/gateway/grpc/test_wire.py",
    "max_grpc_streams": "tests/gateway/grpc/test_stream.py",
    "body_timeout_s": "tests/gateway/test_limits.py",
    "max_pending_bytes": "tests/gateway/test_limits.py",
    "track_sessions": "tests/gateway/test_tracks.py",
    "client_share": "tests/attacks/connections",
    "max_connections": "tests/attacks/connections",
    "uri_timeout_s": "tests/storage/test_references.py",
    "storage.references:_MAX_REDIRECTS": "tests/storage/test_references.py",
    "protocol.json_reader:JsonBounds.max_objects": "tests/attacks/bodies",
    "protocol.batch:HEADER_BYTES_PER_FRAME": "tests/attacks/bodies",
    "gateway.form:_MAX_TEXT_BYTES": "tests/attacks/bodies",
    "gateway.routes.kserve_tensors:MAX_TEXT_CHARS": "tests/attacks/bodies",
    "protocol.point_table:MAX_BYTES_PER_POINT": "tests/protocol/test_point_formats.py",
    "protocol.point_formats:MAX_NPZ_ENTRIES": "tests/attacks/bodies",
    "protocol.las:LAZ_SECONDS": "tests/protocol/test_point_formats.py",
    "protocol.las:MAX_RECORDS": "tests/attacks/bodies",
    "protocol.las:LAZ_PROCESS_BYTES": "tests/protocol/test_point_formats.py",
    "protocol.sweeps:MAX_SWEEPS": "tests/protocol/test_sweeps.py",
    "protocol.json_bodies:_MAX_TEXT_BYTES": "tests/attacks/bodies",
    "protocol.image_work:START_SECONDS": "tests/attacks/pictures",
    "protocol.image_work:SECONDS_PER_PIXEL": "tests/attacks/pictures",
    "protocol.image_work:SECONDS_PER_BYTE": "tests/attacks/pictures",
    "protocol.images:PROCESS_BYTES": "tests/attacks/pictures",
    "protocol.images:PROCESS_BYTES_PER_PIXEL": "tests/attacks/pictures",
}


def test_every_row_with_an_error_is_tried_here_or_elsewhere() -> None:
    def has_status(each: Limit) -> bool:
        return not isinstance(each.beyond, str) and not issubclass(each.beyond, ArchiveError)

    rows = {source for source, each in ROWS.items() if has_status(each)}
    tried = {*FRAMES, *REQUESTS, "max_pending_frames", "timeout_s"}
    assert rows == tried | set(ELSEWHERE), rows ^ (tried | set(ELSEWHERE))
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())

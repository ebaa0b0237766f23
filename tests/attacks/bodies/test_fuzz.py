"""Any bytes, and almost right ones, make every parser answer or raise a client error, never another exception."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import laspy
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers, QueryParams

from serve.errors import ClientError
from serve.gateway import form
from serve.gateway.admission import Admission
from serve.gateway.json_frames import read_frames
from serve.gateway.options import GatewayOptions
from serve.gateway.request import parse_request_options
from serve.gateway.response import choose_media
from serve.gateway.routes.kserve_codec import decode_infer
from serve.protocol import json_reader
from serve.protocol.batch import pack_frames, unpack_frames
from serve.protocol.calibration import parse_calibration
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.json_bodies import decode_json_request
from serve.protocol.json_reader import JsonBounds, LongText, decode_base64, read_json
from serve.protocol.options import FrameOptions, parse_options
from serve.protocol.sweeps import parse_sweeps
from serve.settings import Limits
from serve.storage.references import References
from tests.gateway.fake_torchserve import CLOUDS, FUSION, IMAGES, SWEEPS

# `make test` runs the short form, `make test-soak` both.
LENGTH = pytest.mark.parametrize(
    "examples", [pytest.param(80, id="short"), pytest.param(5000, id="long", marks=pytest.mark.soak)]
)
LIMITS = Limits(max_frame_bytes=1 << 20, max_points=1000, max_pixels=10_000)
POINTS = np.random.default_rng(0).uniform(-40, 40, (20, 4)).astype("<f4")
POSE = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
NAMES = (
    *("b64", "frames", "uri", "points", "image", "calibration", "sweeps", "text", "sweep.0", "image.front"),
    *(
        "score_thr",
        "load_dim",
        "num_points",
        "columns",
        "max_detections",
        "timestamp_s",
        "time_lag_s",
        "transform",
    ),
    *(
        "cam2img",
        "lidar2cam",
        "lidar2img",
        "inputs",
        "outputs",
        "name",
        "datatype",
        "shape",
        "data",
        "parameters",
    ),
    *("binary_data_size", "binary_data", "content_type", "id", "options", "length", "parts"),
)
SPEC = FrameSpec("lidar", 4)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**64), 10**40]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["AAAA", "accumulated", "BYTES", "FP32", "UINT8", "base64", "1e999999", "s3://b/k", *NAMES]
    ),
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=5),
    ),
    max_leaves=25,
)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, points=POINTS)
    return stream.getvalue()


def pcd(kind: str) -> bytes:
    head = (
        "VERSION .7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH 20\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 20\nDATA {kind}\n"
    ).encode()
    return head + (POINTS.tobytes() if kind == "binary" else texts())


def ply(kind: str) -> bytes:
    properties = "".join(f"property float {name}\n" for name in ("x", "y", "z", "intensity"))
    head = f"ply\nformat {kind} 1.0\nelement vertex 20\n{properties}end_header\n".encode()
    return head + (texts() if kind == "ascii" else POINTS.tobytes())


def texts() -> bytes:
    return b"".join(b" ".join(b"%f" % value for value in row) + b"\n" for row in POINTS)


def las() -> bytes:
    cloud = laspy.LasData(laspy.LasHeader(point_format=3, version="1.2"))
    cloud.x, cloud.y, cloud.z = (np.asarray(POINTS[:, k], dtype=np.float64) for k in range(3))
    stream = io.BytesIO()
    cloud.write(stream)
    return stream.getvalue()


def infer() -> bytes:
    tensor = {"name": "points", "datatype": "FP32", "shape": [20, 4], "data": POINTS.ravel().tolist()}
    return json.dumps(
        {"id": "1", "inputs": [tensor], "outputs": [{"name": "scores_3d"}], "parameters": {}}
    ).encode()


def a_form() -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\nContent-Type: text/plain\r\n\r\n%s\r\n'
    return (
        part % (b"score_thr", b"", b"0.5")
        + part % (b"data", b'; filename="a.bin"', POINTS.tobytes())
        + part % (b"data", b'; filename="b.bin"', b"--b\r-\n--")
        + b"--b--\r\n"
    )


CALIBRATION = {"cam2img": POSE, "lidar2cam": POSE, "lidar2img": POSE}
SWEEP_LIST = {"timestamp_s": 1.0, "sweeps": [{"timestamp_s": 0.9, "transform": POSE}]}
FRAME = {"b64": "AAAA", "score_thr": 0.5, "columns": "x,y,z,intensity=0"}
SEEDS: Mapping[str, Callable[[], bytes]] = {
    "bin": POINTS.tobytes,
    "npy": lambda: npy(POINTS),
    "npy-structured": lambda: npy(POINTS.view([(name, "<f4") for name in "xyzi"])[:, 0]),
    "npz": npz,
    "pcd": lambda: pcd("binary"),
    "pcd-text": lambda: pcd("ascii"),
    "ply": lambda: ply("binary_little_endian"),
    "ply-text": lambda: ply("ascii"),
    "las": las,
    "form": a_form,
    "framed": lambda: pack_frames(
        [(POINTS.tobytes(), {"score_thr": 0.5}), ({"points": b"ab", "image": b"c"}, {})]
    ),
    "infer": infer,
    "json-frame": lambda: json.dumps({"frames": [FRAME, FRAME]}).encode(),
    "json-calibration": lambda: json.dumps(CALIBRATION).encode(),
    "json-sweeps": lambda: json.dumps(SWEEP_LIST).encode(),
}


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed with some bytes replaced, removed or added, and perhaps cut."""
    piece = st.binary(max_size=3) | st.sampled_from(
        [
            b"[",
            b"]",
            b"{",
            b"}",
            b'"',
            b"\\",
            b",",
            b"-1",
            b"1e999",
            b"NaN",
            b"\xff" * 4,
            b"9" * 30,
            b"\r\n--b",
            b"\n",
        ]
    )
    edit = st.tuples(st.integers(0, len(seed)), st.integers(0, 8), piece)

    def apply(edits: list[tuple[int, int, bytes]], end: int) -> bytes:
        body = seed
        for at, removed, added in edits:
            body = body[:at] + added + body[at + removed :]
        return body[: len(body) - end]

    # Most often in the first bytes, where headers are.
    head = st.tuples(st.integers(0, min(200, len(seed))), st.integers(0, 8), piece)
    return st.builds(apply, st.lists(head | edit, max_size=4), st.just(0) | st.integers(0, len(seed)))


def documents(*seeds: str) -> st.SearchStrategy[bytes]:
    """JSON of any shape, and damaged bytes of the seeds."""
    whole = DOCUMENTS.map(lambda document: json.dumps(document).encode())
    return st.one_of(whole, st.binary(max_size=60), *(damaged(SEEDS[seed]()) for seed in seeds))


def cloud(body: bytes) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_frame(body, SPEC, FrameOptions(), LIMITS)


def frames_of(body: bytes) -> object:
    permit = Admission(100, 1 << 30).permit()
    return asyncio.run(read_frames(body, References(()), permit, 8, JsonBounds()))


def infer_of(body: bytes) -> None:
    for spec in (CLOUDS, IMAGES, FUSION, SWEEPS):
        refused_or(lambda spec=spec: decode_infer(body, None, spec))
        refused_or(lambda spec=spec: decode_infer(body, str(len(body) // 2), spec))


def refused_or(call: Callable[[], object]) -> None:
    with contextlib.suppress(ClientError):
        call()


def options_of(body: bytes) -> None:
    document = read_json(body, JsonBounds())
    if isinstance(document, dict):
        parse_options(document)


def headers_of(body: bytes) -> None:
    text = body.decode("latin-1")
    names = ["x-score-thr", "x-timeout-ms", "x-columns", "x-num-points", "x-load-dim", "x-sweeps"]
    for name in names:
        headers = Headers(raw=[(name.encode(), body)])
        refused_or(lambda headers=headers: parse_request_options({}, headers, GatewayOptions()))
    refused_or(lambda: parse_request_options(QueryParams(text), Headers(), GatewayOptions()))
    refused_or(lambda: choose_media(text))
    refused_or(lambda: form.read_form(a_form(), text, 8))
    refused_or(lambda: form.read_form(a_form(), f"multipart/form-data; boundary={text}", 8))


PARSERS: Mapping[str, tuple[tuple[str, ...], Callable[[bytes], object]]] = {
    "clouds": (("bin", "npy", "npy-structured", "npz", "pcd", "pcd-text", "ply", "ply-text", "las"), cloud),
    "forms": (("form",), lambda body: form.read_form(body, "multipart/form-data; boundary=b", 8)),
    "framed": (("framed",), lambda body: unpack_frames(body, 8)),
    "json": (("json-frame", "infer"), lambda body: read_json(body, JsonBounds())),
    "json-frames": (("json-frame",), frames_of),
    "json-of-workers": (("json-frame",), decode_json_request),
    "infer": (("infer",), infer_of),
    "options": (("json-frame",), options_of),
    "headers": (("json-frame",), headers_of),
    "calibration": (
        ("json-calibration",),
        lambda body: (
            parse_calibration(body, ("lidar2img",)),
            parse_calibration(body, ("cam2img",), ("front",)),
        ),
    ),
    "sweeps": (("json-sweeps",), parse_sweeps),
}


@LENGTH
@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_are_parsed_or_raise_a_client_error(name, examples):
    seeds, parse = PARSERS[name]

    @settings(max_examples=examples * len(seeds), deadline=None, suppress_health_check=list(HealthCheck))
    @given(documents(*seeds))
    def fuzz(body: bytes) -> None:
        refused_or(lambda: parse(body))

    fuzz()


def plain(value: Any) -> Any:
    """Replace the long texts of a document by strings."""
    if isinstance(value, LongText):
        return value.unescape()
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    return [plain(member) for member in value] if isinstance(value, list) else value


@LENGTH
def test_long_texts_are_cut_out_of_json_without_a_change(monkeypatch, examples):
    monkeypatch.setattr(json_reader, "LONG_TEXT_BYTES", 8)
    texts = st.text(st.sampled_from('"\\/,:[]{}aé\U0001f600 '), max_size=30) | st.text(max_size=30)
    inner = st.recursive(
        st.one_of(texts, st.integers(-9, 9), st.booleans()),
        lambda leaf: st.lists(leaf, max_size=4) | st.dictionaries(texts, leaf, max_size=4),
        max_leaves=12,
    )
    whole = st.builds(
        lambda document, spaces: json.dumps(document, indent=spaces).encode(),
        inner,
        st.sampled_from([None, 9]),
    )

    @settings(max_examples=4 * examples, deadline=None)
    @given(whole | st.binary(max_size=60) | st.text('"\\/,:[]{}a1 ', max_size=60).map(str.encode))
    def check(body: bytes) -> None:
        try:
            expected = orjson.loads(body)
        except orjson.JSONDecodeError:
            with pytest.raises(ClientError):
                plain(read_json(body, JsonBounds()))
            return
        try:
            found = plain(read_json(body, JsonBounds()))
        except ClientError as error:
            # Long names, and two members of one name, are refused on purpose.
            assert "name" in str(error), (body, error)
            return
        assert found == expected, body

    check()


@LENGTH
def test_long_base64_is_decoded_as_a_short_one(monkeypatch, examples):
    monkeypatch.setattr(json_reader, "LONG_TEXT_BYTES", 4)
    monkeypatch.setattr(json_reader, "_PIECE_BYTES", 12)

    @settings(max_examples=4 * examples, deadline=None)
    @given(st.text("AB+/=\\x", max_size=60), st.booleans())
    def check(text: str, is_escaped: bool) -> None:
        encoded = json.dumps(text)
        if is_escaped:
            encoded = encoded.replace("/", "\\/").replace("=", "\\u003d").replace("+", "\\u002B")
        document = read_json(b"[%s]" % encoded.encode(), JsonBounds())[0]
        try:
            expected = decode_base64(text)
        except ValueError:
            with pytest.raises(ValueError):
                decode_base64(document)
            return
        assert decode_base64(document) == expected

    check()


@LENGTH
def test_form_is_read_alike_in_pieces_of_any_length(monkeypatch, examples):
    names = st.sampled_from([b"data", b"score_thr", "é".encode()])
    contents = st.lists(
        st.sampled_from([b"\r\n", b"--b", b"-", b"\r", b"\n", b"b", b"\0", b"abc"]), max_size=8
    ).map(b"".join)
    parts = st.lists(st.tuples(names, st.booleans(), contents), max_size=4)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(parts, st.integers(1, 40))
    def check(sent: list[tuple[bytes, bool, bytes]], length: int) -> None:
        body = b"".join(
            b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (name, b'; filename="f"' if is_file else b"", content)
            for name, is_file, content in sent
        )
        body += b"--b--\r\n"
        results = []
        for piece in (1 << 20, length):
            monkeypatch.setattr(form, "_PIECE_BYTES", piece)
            try:
                fields, files = form.read_form(body, "multipart/form-data; boundary=b", 20)
                results.append((fields, [(name, bytes(content)) for name, content in files]))
            except ClientError as error:
                results.append(error.code)
        assert results[0] == results[1]
        if not any(b"--b" in content for _, _, content in sent):
            fields, files = results[0]
            assert files == [(name.decode(), content) for name, is_file, content in sent if is_file]
            assert [name for name, _ in fields] == [name.decode() for name, is_file, _ in sent if not is_file]

    check()

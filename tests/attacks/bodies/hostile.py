"""Bodies that a stranger may send: small texts that cost much, and large ones that the limit on bytes lets pass."""

# ruff: noqa: UP031 (JSON is full of braces)

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

JSON, FRAMED = "application/json", "application/vnd.mmdet3d-serve.frames"
LARGE = 60_000_000  # the default limit is 64 MiB
MILLION = 1_000_000


@dataclass(frozen=True)
class Attack:
    """One request.

    Attributes:
        statuses: what it may be answered.
        large: whether its body has tens of megabytes.
    """

    body: Callable[[], bytes]
    path: str = "/predictions/second"
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": JSON})
    statuses: tuple[int, ...] = (400,)
    large: bool = False


def _json(text: str, *statuses: int, large: bool = False) -> Attack:
    return Attack(text.encode, statuses=statuses or (400,), large=large)


def _infer(input_members: str, *statuses: int, rest: str = "", large: bool = False) -> Attack:
    def body() -> bytes:
        return ('{"inputs":[{"name":"points","datatype":"FP32",%s}]%s}' % (input_members, rest)).encode()

    return Attack(body, "/v2/models/second/infer", statuses=statuses or (400,), large=large)


def _binary(datatype: str, shape: list[int], data: bytes, *statuses: int) -> Attack:
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "frame" if datatype == "BYTES" else "points",
                    "datatype": datatype,
                    "shape": shape,
                    "parameters": {"binary_data_size": len(data)},
                }
            ]
        }
    ).encode()
    headers = {"inference-header-content-length": str(len(header))}
    return Attack(lambda: header + data, "/v2/models/second/infer", headers, statuses, len(data) > 10**7)


def _framed(header: Callable[[], bytes], *statuses: int, large: bool = False) -> Attack:
    def body() -> bytes:
        text = header()
        return b"MM3DFRM1" + struct.pack("<I", len(text)) + text

    return Attack(body, headers={"content-type": FRAMED}, statuses=statuses or (400,), large=large)


def _form(
    body: Callable[[], bytes],
    *statuses: int,
    kind: str = "multipart/form-data; boundary=b",
    large: bool = False,
) -> Attack:
    return Attack(body, headers={"content-type": kind}, statuses=statuses or (400,), large=large)


def _part(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    return (
        b'--b\r\nContent-Disposition: form-data; name="'
        + name
        + b'"'
        + more
        + b"\r\n\r\n"
        + content
        + b"\r\n"
    )


def _request(headers: Mapping[str, str], *statuses: int, path: str = "/predictions/second") -> Attack:
    cloud = np.random.default_rng(0).normal(size=(16, 4)).astype("<f4").tobytes()
    return Attack(lambda: cloud, path, headers, statuses)


_FRAME = '"b64":"AAAA"'
_DEEP = "[" * 1000 + "]" * 1000

ATTACKS: Mapping[str, Attack] = {
    # JSON of predictions
    "json-frames-empty": Attack(
        lambda: b'{"frames":[' + b"{}," * (15 * MILLION) + b"{}]}", statuses=(413,), large=True
    ),
    "json-frames-many-small": Attack(lambda: b'{"frames":[' + b"{}," * 80_000 + b"{}]}", statuses=(413,)),
    "json-list-of-strings": Attack(
        lambda: b'{"b64":[' + b'"",' * (20 * MILLION) + b'""]}', statuses=(413,), large=True
    ),
    "json-list-of-strings-allowed": Attack(lambda: b'{"b64":[' + b'"",' * 45_000 + b'""]}'),
    "json-members-many": Attack(
        lambda: b"{" + b",".join(b'"%d":1' % i for i in range(MILLION)) + b"}", statuses=(413,)
    ),
    "json-members-allowed": Attack(
        lambda: b'{"b64":"AAAA",' + b",".join(b'"%d":":"' % i for i in range(22_000)) + b"}"
    ),
    "json-member-twice": _json('{"b64":"AAAA","b64":"AAAB"}'),
    "json-one-string": Attack(lambda: b'{"b64":"' + b"a-" * (LARGE // 2) + b'"}', large=True),
    "json-one-string-wide": Attack(
        lambda: b'{"b64":"' + b"a" * LARGE + "\U0001f600".encode() + b'"}', large=True
    ),
    "json-one-string-escaped": Attack(lambda: b'{"b64":"' + rb"\u0041" * (LARGE // 6) + b'"}', large=True),
    "json-one-string-quotes": Attack(
        lambda: b'{"b64":"' + b'\\"' * (LARGE // 2) + b'"}', statuses=(413,), large=True
    ),
    "json-backslashes": Attack(lambda: b'{"b64":"' + b"\\" * LARGE + b'"}', statuses=(400, 413), large=True),
    "json-open-string": Attack(lambda: b'{"b64":"' + b"A" * LARGE, statuses=(400, 413), large=True),
    "json-wide-allowed": Attack(
        lambda: ('{"b64":"AAAA","columns":"' + "\U0001f600 " * MILLION + '"}').encode()
    ),
    "json-base64-allowed": Attack(
        lambda: b'{"b64":"' + b"AAAA" * (LARGE // 4) + b'"}', statuses=(413,), large=True
    ),
    "json-base64-frame": Attack(
        lambda: b'{"b64":"' + b"AAAA" * (10 * MILLION) + b'"}', statuses=(200,), large=True
    ),
    "json-whitespace": Attack(lambda: b" " * LARGE + b"{}", statuses=(413,), large=True),
    "json-whitespace-allowed": Attack(lambda: b" " * (10 * MILLION) + b"{}", large=True),
    "json-digits": Attack(lambda: b'{"score_thr":' + b"1" * LARGE + b"}", statuses=(413,), large=True),
    "json-digits-allowed": Attack(lambda: b'{"score_thr":' + b"1" * (10 * MILLION) + b"}", large=True),
    "json-depth-million": Attack(lambda: b"[" * MILLION + b"]" * MILLION, statuses=(400, 413)),
    "json-option-deep": _json('{%s,"score_thr":%s}' % (_FRAME, _DEEP)),
    "json-option-10**400": _json('{%s,"score_thr":%d}' % (_FRAME, 10**400)),
    "json-option-10**20": _json('{%s,"num_points":%d}' % (_FRAME, 10**20)),
    "json-option-1e999999": _json('{%s,"score_thr":1e999999}' % _FRAME),
    "json-option-text-1e999999": _json('{%s,"score_thr":"1e999999"}' % _FRAME),
    "json-option-nan": _json('{%s,"score_thr":NaN}' % _FRAME),
    "json-option-surrogate": _json('{%s,"columns":"\\ud800"}' % _FRAME),
    "json-option-name-surrogate": _json('{%s,"\\udc00":1}' % _FRAME),
    "json-option-long": Attack(
        lambda: b'{"b64":"AAAA","columns":"' + b"x," * (LARGE // 2) + b'"}', large=True
    ),
    "json-option-name-long": Attack(lambda: b'{"b64":"AAAA","' + b"x" * LARGE + b'":1}', large=True),
    "json-part-name-surrogate": _json('{"points":{"b64":"AAAA"},"image.\\ud800":{"b64":"AAAA"}}'),
    "json-calibration-deep": _json(
        '{"points":{"b64":"AAAA"},"image":{"b64":"AAAA"},"calibration":{"cam2img":%s}}' % _DEEP
    ),
    "json-parts-many": Attack(
        lambda: (
            b'{"points":{"b64":"AAAA"},'
            + b",".join(b'"image.%d":{"b64":""}' % i for i in range(100_000))
            + b"}"
        ),
        statuses=(413,),
    ),
    "json-sweeps-many": Attack(
        lambda: b'{"points":{"b64":"AAAA"},"sweeps":[' + b"{}," * 400_000 + b"{}]}", statuses=(400, 413)
    ),
    "json-uris-many": Attack(
        lambda: (
            b'{"points":{"b64":"AAAA"},'
            + b",".join(b'"image.%d":{"uri":"s3://b/k"}' % i for i in range(100_000))
            + b"}"
        ),
        statuses=(413,),
    ),
    # Open Inference Protocol
    "v2-shape-1e308": _infer('"shape":[%s],"data":[]' % ",".join(["1e308"] * 10_000)),
    "v2-shape-integers": _infer('"shape":[%s],"data":[]' % ",".join([str(2**62)] * 10_000)),
    "v2-shape-of-eight": _infer('"shape":[%s],"data":[]' % ",".join(["2147483647"] * 8), 413),
    "v2-shape-digits": _infer('"shape":[%s],"data":[]' % ("9" * 60_000)),
    "v2-shape-zero": _infer('"shape":[0,2147483647,4],"data":[]', 400, 422),
    "v2-deep-list-beside-string": _infer(
        '"shape":[1],"data":[%s,"%s"]' % ("[" * 800 + "]" * 800, "a" * 30_000)
    ),
    "v2-nested-beside-string": _infer('"shape":[1,1,1,1],"data":[[[[1]]],"%s"]' % ("a" * 30_000)),
    "v2-deep": _infer('"shape":[1],"data":%s' % _DEEP),
    "v2-numbers": _infer('"shape":[7500000,4],"data":[%s0]' % ("0," * (30 * MILLION - 1)), 413, large=True),
    "v2-numbers-allowed": _infer('"shape":[120000,4],"data":[%s1.5]' % ("-12.345678," * 479_999), 200),
    "v2-numbers-nested-allowed": _infer(
        '"shape":[45000,4],"data":[%s[1,2,3,4.5]]' % ("[1.25,-2.5,3.75,4]," * 44_999), 200
    ),
    "v2-numbers-one-too-many": _infer('"shape":[3],"data":[1,2,3,4]'),
    "v2-numbers-huge": _infer('"shape":[1],"data":[%d]' % 10**400),
    "v2-inputs-many": Attack(lambda: b'{"inputs":[' + b"{}," * 45_000 + b"{}]}", "/v2/models/second/infer"),
    "v2-outputs-many": _infer('"shape":[1,4],"data":[1,2,3,4]', rest=',"outputs":[%s{}]' % ("{}," * 45_000)),
    "v2-parameters-many": _infer(
        '"shape":[1,4],"data":[1,2,3,4]',
        rest=',"parameters":{%s}' % ",".join(f'"{i}":1' for i in range(45_000)),
    ),
    "v2-parameter-deep": _infer(
        '"shape":[1,4],"data":[1,2,3,4]', rest=',"parameters":{"score_thr":%s}' % _DEEP
    ),
    "v2-id-long": Attack(
        lambda: b'{"id":"' + b"i" * LARGE + b'","inputs":[]}', "/v2/models/second/infer", large=True
    ),
    "v2-name-surrogate": Attack(
        lambda: rb'{"inputs":[{"name":"\ud800","datatype":"FP32","shape":[1],"data":[1]}]}',
        "/v2/models/second/infer",
    ),
    "v2-binary-empty-too-large": _binary("FP32", [0, *[2147483647] * 7], b"", 400),
    "v2-bytes-empty-elements": _binary("BYTES", [MILLION], bytes(4 * MILLION), 413),
    "v2-bytes-more-than-declared": _binary("BYTES", [1], bytes(LARGE), 400),
    "v2-bytes-json-many": Attack(
        lambda: (
            b'{"inputs":[{"name":"frame","datatype":"BYTES","shape":[400000],"data":['
            + b'"",' * 399_999
            + b'""]}]}'
        ),
        "/v2/models/second/infer",
        statuses=(413,),
    ),
    "v2-image-of-zeros": Attack(
        lambda: (
            b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[4000,4000,3],"parameters":'
            b'{"binary_data_size":48000000}}]}' + bytes(48 * MILLION)
        ),
        "/v2/models/camera/infer",
        {
            "inference-header-content-length": "113",
        },
        (200,),
        True,
    ),
    "v2-header-length": Attack(
        lambda: b"{}", "/v2/models/second/infer", {"inference-header-content-length": "9" * 60_000}
    ),
    # framed batches
    "framed-frames-many": _framed(
        lambda: b'{"frames":[' + b'{"length":0},' * MILLION + b'{"length":0}]}', 413
    ),
    "framed-frames-empty": _framed(
        lambda: b'{"frames":[' + b"{}," * (15 * MILLION) + b"{}]}", 413, large=True
    ),
    "framed-frames-object": _framed(lambda: b'{"frames":{"a":1}}'),
    "framed-parts-many": _framed(
        lambda: (
            b'{"frames":[{"length":0,"parts":[' + b",".join(b'["%d",0]' % i for i in range(20_000)) + b"]}]}"
        ),
        413,
    ),
    "framed-deep": _framed(lambda: b'{"frames":' + _DEEP.encode() + b"}"),
    "framed-option-deep": _framed(
        lambda: b'{"frames":[{"length":0,"options":{"score_thr":%s}}]}' % _DEEP.encode()
    ),
    "framed-part-name-surrogate": _framed(lambda: rb'{"frames":[{"length":0,"parts":[["\ud800",0]]}]}'),
    "framed-length-10**400": _framed(lambda: b'{"frames":[{"length":%d}]}' % 10**400),
    "framed-length-negative": _framed(lambda: b'{"frames":[{"length":-1}]}'),
    # forms
    "form-files-many": _form(lambda: _part(b"data", b"x", b'; filename="f"') * 100_000 + b"--b--\r\n", 413),
    "form-fields-many": _form(lambda: _part(b"score_thr", b"1") * 100_000 + b"--b--\r\n", 413),
    "form-header-long": _form(
        lambda: b"--b\r\nContent-Disposition: " + b"x" * LARGE + b"\r\n\r\nx\r\n--b--\r\n", 400, large=True
    ),
    "form-headers-many": _form(
        lambda: b"--b\r\n" + b"a: b\r\n" * (LARGE // 6) + b"\r\nx\r\n--b--\r\n", 400, large=True
    ),
    "form-lines": _form(
        lambda: _part(b"data", b"\r\n" * (LARGE // 2), b'; filename="f"') + b"--b--\r\n", 413, large=True
    ),
    "form-almost-boundaries": _form(
        lambda: _part(b"data", b"\r\n--bx" * (LARGE // 6), b'; filename="f"') + b"--b--\r\n",
        400,
        413,
        large=True,
    ),
    "form-almost-boundaries-short": _form(
        lambda: _part(b"data", b"\r\n--" * (LARGE // 4), b'; filename="f"') + b"--b--\r\n", 413, large=True
    ),
    "form-preamble": _form(lambda: b"\r\n" * (LARGE // 2) + b"--b--\r\n", 400, large=True),
    "form-epilogue": _form(
        lambda: _part(b"score_thr", b"1") + b"--b--\r\n" + b"\r\n" * (LARGE // 2), 400, large=True
    ),
    "form-field-long": _form(lambda: _part(b"columns", b"x" * LARGE) + b"--b--\r\n", 413, large=True),
    "form-name-surrogate": _form(lambda: _part(b"\xed\xa0\x80", b"x", b'; filename="f"') + b"--b--\r\n"),
    "form-charset": _form(
        lambda: _part(b"a" * 30_000 + b"-" + b"z9" * 15_000, b"1") + b"--b--\r\n",
        400,
        kind="multipart/form-data; boundary=b; charset=punycode",
    ),
    "form-no-end": _form(lambda: _part(b"data", b"x", b'; filename="f"')),
    "form-boundary-quotes": _form(
        lambda: b"--b--\r\n", 400, kind='multipart/form-data; boundary="' + ";" * 60_000
    ),
    # framing
    "chunks-of-one-byte": Attack(
        lambda: b"1\r\nx\r\n" * MILLION + b"0\r\n\r\n",
        headers={"transfer-encoding": "chunked"},
        statuses=(200,),
    ),
    # headers and queries
    "accept-commas": _request({"accept": "," * 60_000}, 400),
    "accept-weights": _request({"accept": "*/*;q=0.1," * 6000}, 200, 400, 406),
    "query-fields": _request({}, 400, path="/predictions/second?" + "&a=" * 20_000),
    "query-columns": _request({}, 400, path="/predictions/second?columns=" + "x," * 20_000),
    "timeout-digits": _request({"x-timeout-ms": "9" * 60_000}, 400),
    "score-digits": _request({"x-score-thr": "9" * 60_000}, 400),
    "count-digits": _request({"x-num-points": "9" * 60_000}, 400),
    "content-type-parameters": _request(
        {"content-type": "application/octet-stream" + ";a=b" * 15_000}, 200, 400
    ),
    # images: only their headers are read in the gateway
    **{
        f"image-{name}": Attack(body, "/predictions/camera", {}, (200, 413, 422), True)
        for name, body in {
            "jpeg-markers": lambda: b"\xff\xd8" + b"\xff\xe5\x00\x02" * (5 * MILLION) + b"\xff\xd9",
            "jpeg-fill": lambda: b"\xff\xd8" + b"\xff" * (30 * MILLION) + b"\xd9",
            "gif-comments": lambda: b"GIF89a\x01\0\x01\0\0\0\0" + b"\x21\xfe\x01a\0" * (5 * MILLION) + b";",
            "gif-comment": lambda: (
                b"GIF89a\x01\0\x01\0\0\0\0\x21\xfe" + (b"\xff" + b"a" * 255) * 100_000 + b"\0;"
            ),
            "ppm-comment": lambda: b"P6 #" + b"a" * (30 * MILLION) + b"\n1 1 255\n\0\0\0",
            "ppm-blanks": lambda: b"P6 " + b" " * (30 * MILLION) + b"1 1 255\n\0\0\0",
            "jp2-boxes": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * (3 * MILLION),
            "jp2-sizes": lambda: (
                b"\xff\x4f\xff\x51\x00\x2f" + bytes(45) + b"\xff\x4f\xff\x51" * (7 * MILLION)
            ),
            "tiff-loop": lambda: b"II*\0\x08\0\0\0\x01\0\xfe\0\x04\0\x01\0\0\0\0\0\0\0\x08\0\0\0",
            "png-size": lambda: (
                b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x02\0\0\0"
            ),
            "webp-size": lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6,
            "avif-boxes": lambda: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + b"\0\0\0\x08free" * (3 * MILLION),
        }.items()
    },
}

"""Compression of long answers by ``Accept-Encoding``."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib

import numpy as np
import pytest
import tritonclient.http as triton

from serve.gateway.compression import CODINGS, choose_coding
from tests.gateway import fake_torchserve
from tests.gateway.raw import answer as raw_answer
from tests.gateway.raw import connected, request

HAS_ZSTD = "zstd" in CODINGS
LONG = json.dumps({"scores_3d": [0.25] * 20_000, "bboxes_3d": [], "labels_3d": [], "names": []}).encode()


@pytest.fixture(autouse=True)
def long_answers(monkeypatch):
    """Answer every frame with `LONG`; returns what answers otherwise."""
    usual = fake_torchserve.answer_for
    monkeypatch.setattr(fake_torchserve, "answer_for", lambda frame, options: LONG)
    return usual


def test_long_answer_is_compressed_for_a_client_that_accepts_it(gateway, cloud):
    found = gateway.post(content=cloud(1), headers={"accept-encoding": "gzip"})
    assert found.headers["content-encoding"] == "gzip" and found.headers["vary"] == "accept-encoding"
    assert int(found.headers["content-length"]) < len(LONG) / 20
    assert found.content == LONG  # unpacked by the client


def test_bytes_on_the_wire_are_gzip(gateway, cloud):
    with connected(gateway.url) as connection:
        connection.sendall(request("/predictions/second", cloud(1), accept_encoding="gzip"))
        body = raw_answer(connection).partition(b"\r\n\r\n")[2]
    assert gzip.decompress(body) == LONG


@pytest.mark.parametrize(
    "accepted", ["identity", "", "br", "gzip;q=0", "identity, gzip;q=0.5", "gzip;q=x", "gzip," * 300]
)
def test_answer_stays_as_it_is_for_other_clients(gateway, cloud, accepted):
    found = gateway.post(content=cloud(1), headers={"accept-encoding": accepted})
    assert "content-encoding" not in found.headers and found.content == LONG


def test_short_answer_and_picture_stay_as_they_are(start_gateway, cloud, long_answers, monkeypatch):
    short = start_gateway(compress_from_bytes=len(LONG) + 1)
    assert "content-encoding" not in short.post(content=cloud(1), headers={"accept-encoding": "gzip"}).headers
    never = start_gateway(compress_from_bytes=0)
    assert "content-encoding" not in never.post(content=cloud(1), headers={"accept-encoding": "gzip"}).headers
    always = start_gateway(compress_from_bytes=1)
    monkeypatch.setattr(fake_torchserve, "answer_for", long_answers)
    picture = always.post(content=cloud(1), headers={"accept-encoding": "gzip", "accept": "image/png"})
    assert picture.status_code == 200 and "content-encoding" not in picture.headers


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_client_reads_compressed_tensors(gateway, cloud, algorithm):
    points = np.frombuffer(cloud(1), np.float32).reshape(-1, 4)
    asked = triton.InferInput("points", list(points.shape), "FP32")
    asked.set_data_from_numpy(points)
    with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as client:
        found = client.infer("second", [asked], response_compression_algorithm=algorithm)
    assert bytes(found.as_numpy("detections")[0]) == LONG


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"), ("x-gzip", "gzip"), ("GZIP;Q=0.5", "gzip"), ("*", "zstd" if HAS_ZSTD else "gzip"),
        ("gzip, zstd", "zstd" if HAS_ZSTD else "gzip"), ("zstd;q=0.5, gzip", "gzip"), ("*;q=0", None),
        ("gzip;q=0, *", "zstd" if HAS_ZSTD else None), ("identity;q=0.5, gzip;q=0.5", "gzip"), (",;,", None),
    ],
)  # fmt: skip
def test_coding_is_the_one_that_the_client_prefers(accepted, coding):
    assert choose_coding(accepted) == coding


@pytest.mark.skipif(not HAS_ZSTD, reason="neither Python 3.14 nor backports.zstd")
def test_zstd_is_zstd():
    module = importlib.import_module(
        "compression.zstd" if not _missing("compression.zstd") else "backports.zstd"
    )
    assert module.decompress(CODINGS["zstd"](LONG)) == LONG


def _missing(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return True
    return False


def test_gzip_is_a_whole_gzip_file():
    assert zlib.decompress(CODINGS["gzip"](LONG), 31) == LONG

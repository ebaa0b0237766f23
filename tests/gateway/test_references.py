"""Frames by URI: read from a bucket if the operator allows the prefix, else refused."""

# ruff: noqa: F811 (fixtures are named as arguments)

from __future__ import annotations

import base64

import pytest

from serve.storage import s3
from tests.gateway.fake_torchserve import answer_for
from tests.storage.conftest import account, bucket, nobody, s3_endpoint  # noqa: F401  # fixtures


def put(bucket: str, key: str, body: bytes) -> str:
    s3.connect().client.put_object(Bucket=bucket, Key=key, Body=body)
    return f"s3://{bucket}/{key}"


def test_frame_in_an_allowed_bucket_is_answered(start_gateway, bucket, cloud):
    gateway = start_gateway(uri_prefixes=(f"s3://{bucket}/frames/",))
    uri = put(bucket, "frames/000008.bin", cloud(1))
    answer = gateway.post(json={"uri": uri})
    assert answer.status_code == 200 and answer.content == answer_for(cloud(1), {})


@pytest.mark.parametrize("prefixes", [(), ("s3://another/",), ("s3://{bucket}/frames/public/",)])
def test_uri_without_a_listed_prefix_is_refused(
    start_gateway,
    bucket,
    cloud,
    torchserve,
    prefixes,
):
    gateway = start_gateway(uri_prefixes=tuple(prefix.format(bucket=bucket) for prefix in prefixes))
    answer = gateway.post(json={"uri": put(bucket, "frames/000008.bin", cloud(1))})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "reference_refused"


def test_error_of_one_reference_does_not_affect_the_others(start_gateway, bucket, cloud):
    gateway = start_gateway(uri_prefixes=(f"s3://{bucket}/",), max_frame_bytes=1024)
    frames = [
        {"uri": put(bucket, "a.bin", cloud(1))},
        {"uri": f"s3://{bucket}/missing.bin"},
        {"uri": "s3://elsewhere/a.bin"},
        {"uri": put(bucket, "large.bin", bytes(2048))},
        {"b64": base64.b64encode(cloud(2)).decode(), "max_detections": 1},
        {"uri": 7},
    ]
    answers = gateway.post(json={"frames": frames, "score_thr": 0.5}).json()
    assert answers[0]["options"] == {"score_thr": 0.5}
    assert answers[4]["options"] == {"score_thr": 0.5, "max_detections": 1}
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, "reference_not_found", "reference_refused", "frame_too_large", None, "bad_request"]


def test_object_read_by_reference_counts_as_pending_bytes(start_gateway, bucket, cloud):
    limits = {"max_frame_bytes": 4096, "max_body_bytes": 4096, "max_pending_bytes": 4096}
    gateway = start_gateway(uri_prefixes=(f"s3://{bucket}/",), **limits)
    uris = [put(bucket, f"{i}.bin", cloud(i, points=128)) for i in range(4)]
    answers = gateway.post(json={"frames": [{"uri": uri} for uri in uris]}).json()
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes.count("overloaded") >= 2 and codes.count(None) >= 1


@pytest.mark.parametrize(
    "document",
    [
        {"uri": "s3://b/a.bin", "b64": ""},
        {"uri": "s3://b/a.bin", "points": {"b64": ""}},
        {"frames": []},
        {"frames": "s3://b/a.bin"},
        {"frames": 3},
    ],
)
def test_ambiguous_or_empty_reference_is_rejected(start_gateway, document):
    answer = start_gateway(uri_prefixes=("s3://b/",)).post(json=document)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_request"

"""JSON bodies: a frame with its options, other shapes rejected, exact numbers in answers."""

from __future__ import annotations

import base64

import numpy as np
import orjson
import pytest

from serve.errors import BadRequest
from serve.protocol.json_bodies import decode_json_request, encode_json


def test_json_carries_a_frame_and_its_options():
    encoded = base64.b64encode(b"abc").decode()
    assert decode_json_request(encode_json({"b64": encoded, "score_thr": 0.5})) == (
        b"abc",
        {"score_thr": 0.5},
    )
    assert decode_json_request(encode_json(encoded)) == (b"abc", {})


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"{}", b'{"b64": 3}', b'{"b64": "a b"}', b'"%%%"', b"\xff", b"null"]
)
def test_json_of_another_shape_is_rejected(body):
    with pytest.raises(BadRequest):
        decode_json_request(body)


def test_float32_round_trips_through_json():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    back = np.array(orjson.loads(encode_json({"v": values}))["v"], dtype=np.float32)
    np.testing.assert_array_equal(back, values)

"""Framed batches and outcomes: round trips and corrupted bodies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import BackendBroken, BadRequest
from serve.protocol.batch import (
    Outcomes,
    frame_chunks,
    pack_frames,
    pack_outcomes,
    unpack_frames,
    unpack_outcomes,
)

BODIES = st.binary(max_size=50)
PARTS = st.dictionaries(st.text(max_size=8), BODIES, min_size=1, max_size=3)
OPTIONS = st.dictionaries(st.sampled_from(["score_thr"]), st.floats(0, 1))


def plain(body):
    return {name: bytes(part) for name, part in body.items()} if isinstance(body, dict) else bytes(body)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.one_of(BODIES, PARTS), OPTIONS), max_size=5))
def test_framed_batch_round_trips(frames):
    packed = pack_frames(frames)
    assert [(plain(body), options) for body, options in unpack_frames(packed)] == frames
    assert b"".join(frame_chunks(frames)) == packed


def test_chunks_reference_the_given_bytes():
    body = bytearray(1000)
    assert frame_chunks([(body, {})])[1] is body


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_corrupted_framed_batch_is_a_bad_request_or_parses(data):
    body = bytearray(pack_frames([(b"12345678", {}), ({"image": b"ab", "points": b"c"}, {"score_thr": 0.1})]))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack_frames(bytes(body[: data.draw(st.integers(0, len(body)))]))
    except BadRequest as error:
        assert str(error)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(200, 599), BODIES), max_size=5),
    st.dictionaries(st.sampled_from(["decode", "inference"]), st.floats(0, 10)),
)
def test_outcomes_round_trip(items, seconds):
    found = unpack_outcomes(pack_outcomes(Outcomes(items, seconds)))
    assert [(status, bytes(body)) for status, body in found.items] == items
    assert found.seconds == seconds


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_corrupted_outcomes_are_backend_broken_or_parse(data):
    body = bytearray(pack_outcomes(Outcomes([(200, b"{}"), (422, b'{"error":{}}')], {"decode": 0.1})))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack_outcomes(bytes(body[: data.draw(st.integers(0, len(body)))]))
    except BackendBroken as error:
        assert str(error)


@pytest.mark.parametrize("parts", [[["a", 3]], [["a", 1], ["a", 1]], [["a", -1], ["b", 3]], [[1, 2]], "ab"])
def test_parts_that_do_not_fit_their_frame_are_rejected(parts):
    import orjson

    header = orjson.dumps({"frames": [{"length": 2, "options": {}, "parts": parts}]})
    body = b"MM3DFRM1" + len(header).to_bytes(4, "little") + header + b"xy"
    with pytest.raises(BadRequest):
        unpack_frames(body)

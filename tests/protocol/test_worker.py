"""Messages of the worker's socket: frames and outcomes round trip, bounds hold before anything is built."""

from __future__ import annotations

import os
import tracemalloc

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import BadRequest, FrameTooLarge, OutOfMemory, ServeError
from serve.protocol.batch import pack_frames, unpack_frames, unpack_outcomes
from serve.protocol.options import FrameOptions
from serve.protocol.worker import (
    BATCH_HEADER,
    LENGTH,
    MAX_BATCH_FRAMES,
    MAX_MESSAGE_BYTES,
    EncodedFrame,
    MessageReader,
    ProtocolError,
    batch_chunks,
    cancel_message,
    encode_outcome,
    read_batch,
    write_outcomes,
)

BODIES = st.binary(max_size=40)
PARTS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), BODIES, min_size=1, max_size=3)
OPTIONS = st.builds(
    FrameOptions,
    score_thr=st.floats(0, 1),
    max_detections=st.none() | st.integers(0, 2**31),
    columns=st.none() | st.just("x,y,z"),
)


def plain(body):
    return {name: bytes(part) for name, part in body.items()} if isinstance(body, dict) else bytes(body)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(EncodedFrame, st.one_of(BODIES, PARTS), OPTIONS), max_size=5))
def test_batch_round_trips_with_parsed_options(frames):
    found = read_batch(b"".join(batch_chunks(frames)))
    assert [(plain(each.body), each.options) for each in found] == [
        (each.body, each.options) for each in frames
    ]


def test_chunks_reference_the_bytes_of_a_frame():
    body = bytearray(1000)
    assert batch_chunks([EncodedFrame(body)])[1] is body


def test_lone_surrogate_in_a_part_name_fails_that_frame_alone():
    with pytest.raises(BadRequest):
        EncodedFrame({"points": b"x", "\ud800": b"y"})


def test_unknown_option_fails_that_frame_alone():
    first, second = read_batch(pack_frames([(b"a", {"no": 1}), (b"b", {})]))
    assert isinstance(first, BadRequest) and bytes(second.body) == b"b"


def framed(header: bytes, payload: bytes = b"") -> bytes:
    return b"MM3DFRM1" + len(header).to_bytes(4, "little") + header + payload


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (b'{"frames":[' + b",".join([b"{}"] * 65) + b"]}", FrameTooLarge),
        (b'{"frames":[{"length":0,"parts":[' + b",".join([b'["",0]'] * 129) + b"]}]}", FrameTooLarge),
        (b" " * (64 * 4096 + 1), FrameTooLarge),
        (b"[" * 2000 + b"]" * 2000, BadRequest),
        (b'{"frames":[{"length":' + b"9" * 400 + b"}]}", BadRequest),
        (b'{"frames":[{"length":true}]}', BadRequest),
        (b'{"frames":[{"length":0,"options":[1]}]}', BadRequest),
        (b'{"frames":[{"length":0,"parts":[["\\ud800",0]]}]}', BadRequest),
        (b'{"frames":[{"length":0,"parts":[["' + b"a" * 201 + b'",0]]}]}', BadRequest),
        (b'{"frames":7}', BadRequest),
    ],
)
def test_hostile_header_is_rejected_by_its_bounds(header, kind):
    with pytest.raises(kind) as caught:
        unpack_frames(framed(header))
    assert len(str(caught.value)) < 400


def test_header_beyond_the_bound_is_rejected_before_it_is_parsed():
    body = framed(b"{" + b'"a":{},' * 2_000_000 + b'"frames":[]}')
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLarge):
            unpack_frames(body)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_worker_accepts_as_many_frames_as_a_gateway_may_send():
    frames = [EncodedFrame(b"x")] * MAX_BATCH_FRAMES
    assert len(read_batch(b"".join(batch_chunks(frames)))) == MAX_BATCH_FRAMES


@pytest.mark.parametrize("answer", [{"a": object()}, {"a": "\ud800"}, {"a": 10**30}, {(1, 2): 3}])
def test_outcome_that_cannot_be_encoded_fails_alone(answer):
    outcomes = unpack_outcomes(write_outcomes([{"a": 1}, answer, OutOfMemory("too large")], {"decode": 0.1}))
    assert [status for status, _ in outcomes.items] == [200, 500, 507]
    assert orjson.loads(outcomes.items[0][1]) == {"a": 1}
    assert orjson.loads(outcomes.items[1][1])["error"]["code"] == "inference_failed"


class Unprintable(ServeError):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_error_without_a_text_is_answered():
    status, body = encode_outcome(Unprintable())
    assert status == 500 and orjson.loads(body)["error"]["code"] == "inference_failed"


@pytest.mark.parametrize("message", ["\ud800", "x" * 1_000_000, "\x00"])
def test_every_error_can_be_encoded_and_is_short(message):
    status, body = encode_outcome(ServeError(message), "id")
    assert status == 500 and orjson.loads(body)["error"]["request_id"] == "id" and len(body) < 10_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=5), st.integers(1, 20))
@pytest.mark.parametrize("reuse", [False, True])
def test_messages_arrive_complete_in_pieces_of_any_size(reuse, bodies, piece):
    stream = memoryview(b"".join(BATCH_HEADER.pack(len(body), 7) + body for body in bodies))
    reader = MessageReader(BATCH_HEADER, reuse=reuse)
    found = []
    while stream:
        taken = min(piece, len(reader.buffer), len(stream))
        reader.buffer[:taken] = stream[:taken]
        stream = stream[taken:]
        if (message := reader.advance(taken)) is not None:
            (length, seconds), body = message
            assert (length, seconds) == (len(body), 7)
            found.append(bytes(body))
    assert found == bodies


def test_length_over_the_maximum_is_refused_before_memory_is_allocated():
    reader = MessageReader(LENGTH)
    reader.buffer[:] = LENGTH.pack(MAX_MESSAGE_BYTES + 1)
    with pytest.raises(ProtocolError):
        reader.advance(LENGTH.size)


def test_reader_keeps_the_memory_of_a_body_if_asked_to():
    reader = MessageReader(LENGTH, reuse=True)

    def receive(body: bytes) -> memoryview:
        reader.buffer[:] = LENGTH.pack(len(body))
        reader.advance(LENGTH.size)
        reader.buffer[:] = body
        return reader.advance(len(body))[1]

    first = receive(os.urandom(1000))
    second = receive(b"x" * 900)
    assert first.obj is second.obj and second == b"x" * 900


def test_cancel_message_is_a_head_without_a_body():
    assert BATCH_HEADER.unpack(cancel_message(3)) == (0, 3)


def test_frame_that_arrived_in_pieces_is_sent_and_read_as_one():
    pieces = [b"ab", bytearray(b"c"), b"def"]
    frame = EncodedFrame(pieces[0], FrameOptions(score_thr=0.5), pieces[1:])
    assert frame.nbytes == 6
    chunks = batch_chunks([frame, EncodedFrame(b"other")])
    assert chunks[1] is pieces[0] and chunks[3] is pieces[2]  # none is copied
    ((body, options), (other, _)) = unpack_frames(b"".join(chunks))
    assert (bytes(body), options, bytes(other)) == (b"abcdef", {"score_thr": 0.5}, b"other")
    assert frame.join() == b"abcdef" == frame.body and frame.nbytes == 6
    assert b"".join(batch_chunks([frame])[1:]) == b"abcdef"

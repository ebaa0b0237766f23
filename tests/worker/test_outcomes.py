"""One outcome per frame, whatever is raised where a frame is read, decoded, inferred or encoded."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import BadRequest, OutOfMemory, ServeError
from serve.protocol.batch import FRAMES_CONTENT_TYPE, OUTCOMES_CONTENT_TYPE, pack_frames, unpack_outcomes
from serve.protocol.worker import (
    BATCH_HEADER,
    HELLO,
    LENGTH,
    Batch,
    EncodedFrame,
    batch_chunks,
    cancel_message,
    encode_outcome,
    socket_path,
)
from serve.worker.handler import Handler
from serve.worker.server import CancelledFrames, listen
from tests.worker.context import Context

SEAMS = ("decode", "infer", "encode")


class Panic(BaseException):
    """Like `pyo3_runtime.PanicException`."""


class Unprintable(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def leaves(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    """Every exception of Python, but the one with which a person stops a process."""
    if kind.__module__ == "builtins" and kind is not KeyboardInterrupt and not issubclass(kind, Warning):
        yield kind
        for child in kind.__subclasses__():
            yield from leaves(child)


def make(kind: type[BaseException]) -> BaseException:
    for arguments in ((), ("\ud800",), ("utf-8", b"\xff", 0, 1, "no"), ("m", [ValueError()])):
        try:
            return kind(*arguments)
        except TypeError:
            continue
    raise AssertionError(kind)


EXCEPTIONS = sorted({*leaves(BaseException), Panic, Unprintable, BadRequest, OutOfMemory}, key=str)


class Poisoned(Handler):
    """Answers each frame with its text; a frame ``SEAM N`` raises exception N at that seam, alone or not."""

    def describe(self):
        return {"modality": "lidar"}

    def decode(self, frame):
        text = bytes(frame.body).decode()
        self.trip("decode", text)
        return text

    def infer(self, frames):
        for text in frames:
            self.trip("infer", text)
        return [{"text": Poison(text) if text.startswith("encode") else text} for text in frames]

    @staticmethod
    def trip(seam, text):
        if text.startswith(seam):
            raise make(EXCEPTIONS[int(text.split()[1])])


class Poison:
    """No JSON."""

    def __init__(self, text: str) -> None:
        self.text = text


@pytest.fixture(scope="module")
def poisoned() -> Handler:
    handler = Poisoned()
    handler.initialize(Context("nowhere"))
    return handler


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "serve.worker.handler")


FRAMES = st.lists(
    st.sampled_from(["good", "fine"])
    | st.builds("{} {}".format, st.sampled_from(SEAMS), st.integers(0, len(EXCEPTIONS) - 1)),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(FRAMES)
def test_whatever_is_raised_for_a_frame_is_its_own_outcome(poisoned, texts):
    outcomes, seconds = poisoned.answer(Batch([EncodedFrame(text.encode()) for text in texts]))
    assert set(seconds) == {"decode", "inference"} and len(outcomes) == len(texts)
    for text, outcome in zip(texts, outcomes, strict=True):
        status, body = encode_outcome(outcome)
        if " " in text:
            assert status >= 400 and orjson.loads(body)["error"]["code"], text
        else:
            assert (status, orjson.loads(body)) == (200, {"text": text})


@pytest.mark.parametrize("kind", EXCEPTIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seam", ["decode", "infer"])
def test_every_exception_is_answered_beside_an_untouched_neighbour(poisoned, seam, kind):
    frames = [b"good", f"{seam} {EXCEPTIONS.index(kind)}".encode(), b"fine"]
    first, second, third = poisoned.answer(Batch([EncodedFrame(frame) for frame in frames]))[0]
    assert (first, third) == ({"text": "good"}, {"text": "fine"}) and isinstance(second, ServeError)
    expected = 507 if issubclass(kind, MemoryError | OutOfMemory) else 422 if seam == "decode" else 500
    assert second.status == (400 if kind is BadRequest else expected)


def test_interrupt_of_a_person_passes(poisoned, monkeypatch):
    def interrupt(frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(poisoned, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        poisoned.answer(Batch([EncodedFrame(b"x")]))


@pytest.mark.parametrize("returned", [[], [{}], [{}, {}, {}], None, [1, 2]])
def test_wrong_number_of_outcomes_fails_each_frame_with_a_code(poisoned, monkeypatch, returned):
    monkeypatch.setattr(poisoned, "infer", lambda frames: returned)
    outcomes, _ = poisoned.answer(Batch([EncodedFrame(b"a"), EncodedFrame(b"b")]))
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert encode_outcome(outcome)[0] in (200, 500)


def test_torchserve_and_the_socket_give_the_same_outcomes(poisoned):
    packed = pack_frames([(b"good", {}), (b"decode 0", {}), (b"infer 1", {}), (b"encode 0", {})])
    headers = {"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}
    (through,) = poisoned.handle([{"body": packed}], Context("nowhere", headers=[headers]))
    directly = poisoned.respond(memoryview(packed), 0, frozenset)
    assert unpack_outcomes(through).items == unpack_outcomes(directly).items
    assert [status for status, _ in unpack_outcomes(directly).items] == [200, 422, 500, 500]


@pytest.mark.parametrize(
    "row",
    [
        {"body": 7},
        {"body": b"good", "score_thr": b"1" + b"0" * 400},
        {"body": b"good", "max_detections": b"1" + b"0" * 5000},
        {"body": b"good", "columns": "\ud800"},
        {"body": {"b64": "Z29vZA==", "num_points": 10**400}},
        {"points": b"1", "image.\ud800": b"2"},
        {"body": {"b64": "\ud800"}},
        {"body": b"[" * 100_000, "data": b""},
        {b"bytes": b"as a name"},
        {1: 2},
    ],
)
def test_hostile_row_is_answered_beside_an_untouched_neighbour(poisoned, row):
    context = Context("nowhere")
    bodies = poisoned.handle([{"body": b"good"}, row, {"body": b"fine"}], context)
    assert [context.status[i][0] for i in (0, 2)] == [200, 200] and json.loads(bodies[2]) == {"text": "fine"}
    assert 400 <= context.status[1][0] < 500, bodies[1]
    assert len(bodies[1]) < 5000 and orjson.loads(bodies[1])["error"]["code"]


def test_frames_cancelled_before_they_are_decoded_are_not_decoded(poisoned, monkeypatch):
    decoded = []
    monkeypatch.setattr(poisoned, "decode", lambda frame: decoded.append(bytes(frame.body)) or frame.body)
    cancelled: set[int] = {1}
    frames = [EncodedFrame(b"a"), EncodedFrame(b"b"), EncodedFrame(b"c")]
    monkeypatch.setattr(poisoned, "infer", lambda texts: [{"text": bytes(text).decode()} for text in texts])
    outcomes, _ = poisoned.answer(Batch(frames, 0, lambda: cancelled))
    assert decoded == [b"a", b"c"]
    assert outcomes[0] == {"text": "a"} and outcomes[1].code == "not_ready" and outcomes[2] == {"text": "c"}


def test_frame_cancelled_while_another_batch_is_computed_is_not_computed(poisoned, monkeypatch):
    computing, go_on, cancelled, computed = threading.Event(), threading.Event(), set(), []

    def infer(texts):
        computed.extend(texts)
        computing.set()
        assert go_on.wait(20)
        return [{} for _ in texts]

    monkeypatch.setattr(poisoned, "infer", infer)
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(poisoned.answer, Batch([EncodedFrame(b"first")]))
        assert computing.wait(20)
        decoded = threading.Event()
        second = callers.submit(
            poisoned.answer,
            Batch(
                [EncodedFrame(b"a"), EncodedFrame(b"b")],
                0,
                lambda: (decoded.set(), cancelled)[1],
            ),
        )
        assert decoded.wait(20)
        while poisoned._engine._work_queue.empty():
            pass
        cancelled.add(0)
        go_on.set()
        assert first.result(20)[0] == [{}]
        gone, answered = second.result(20)[0]
    assert computed == ["first", "b"] and gone.code == "not_ready" and answered == {}


class Line:
    """A gateway's end of the socket."""

    def __init__(self, folder) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(socket_path(folder, os.getpid())))
        assert self.receive(len(HELLO)) == HELLO

    def send(self, *bodies: bytes) -> None:
        message = b"".join(batch_chunks([EncodedFrame(body) for body in bodies]))
        self.socket.sendall(BATCH_HEADER.pack(len(message), 0) + message)

    def receive(self, nbytes: int) -> bytes:
        return self.socket.recv(nbytes, socket.MSG_WAITALL)

    def outcomes(self):
        (length,) = LENGTH.unpack(self.receive(LENGTH.size))
        return [(status, bytes(body)) for status, body in unpack_outcomes(self.receive(length)).items]


@pytest.fixture
def line(poisoned, tmp_path, monkeypatch):
    monkeypatch.setattr(CancelledFrames, "interval_s", 0.0)
    with closing(listen(tmp_path, poisoned.respond)):
        one = Line(tmp_path)
        with one.socket:
            yield one


def test_cancelled_frame_of_a_batch_on_the_socket_is_not_decoded(line, poisoned, monkeypatch):
    reached, go_on, decoded = threading.Event(), threading.Event(), []

    def decode(frame):
        decoded.append(bytes(frame.body))
        reached.set()
        assert go_on.wait(20)
        return bytes(frame.body).decode()

    monkeypatch.setattr(poisoned, "decode", decode)
    line.send(b"slow", b"gone", b"kept")
    assert reached.wait(20)
    line.socket.sendall(cancel_message(1)[:5])
    line.socket.sendall(cancel_message(1)[5:])
    go_on.set()
    assert [status for status, _ in line.outcomes()] == [200, 503, 200] and decoded == [b"slow", b"kept"]


def test_cancel_message_that_comes_after_the_answer_is_ignored(line):
    line.send(b"one")
    assert line.outcomes() == [(200, b'{"text":"one"}')]
    line.socket.sendall(cancel_message(0))
    line.send(b"two")
    assert line.outcomes() == [(200, b'{"text":"two"}')]


def test_half_of_a_cancel_message_does_not_shift_what_follows(line, poisoned, monkeypatch):
    decoding, decode_on, inferring = threading.Event(), threading.Event(), threading.Event()
    decode, infer = poisoned.decode, poisoned.infer

    def slow_decode(frame):
        decoding.set()
        assert decode_on.wait(20)
        return decode(frame)

    monkeypatch.setattr(poisoned, "decode", slow_decode)
    monkeypatch.setattr(poisoned, "infer", lambda frames: (inferring.set(), infer(frames))[1])
    line.send(b"one", b"two")
    assert decoding.wait(20)
    line.socket.sendall(cancel_message(5)[:5])
    decode_on.set()
    assert inferring.wait(20)  # the half was read before the second frame
    line.socket.sendall(cancel_message(5)[5:])
    assert line.outcomes() == [(200, b'{"text":"one"}'), (200, b'{"text":"two"}')]
    line.send(b"three")
    assert line.outcomes() == [(200, b'{"text":"three"}')]


def test_gateway_that_disconnects_leaves_nothing_to_decode(line, poisoned, monkeypatch):
    reached, go_on, decoded, ended = threading.Event(), threading.Event(), [], threading.Event()

    def decode(frame):
        decoded.append(bytes(frame.body))
        reached.set()
        assert go_on.wait(20)
        return "text"

    monkeypatch.setattr(poisoned, "decode", decode)
    monkeypatch.setattr(poisoned, "infer", lambda frames: (ended.set(), [{} for _ in frames])[1])
    line.send(b"first", b"second", b"third")
    assert reached.wait(20)
    line.socket.close()
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "worker-connection":
            thread.join(20)
    assert decoded == [b"first"] and not ended.is_set()

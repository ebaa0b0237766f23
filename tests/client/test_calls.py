"""Both clients against a real gateway: frames of every kind, many at a time, repetition, deadlines."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from serve import errors
from serve.client import AsyncClient, Client, PredictOptions, Result, Retry, encode_image, encode_points
from serve.client.requests import Calls, Reply, Send, Wait, Work
from serve.client.retry import _retry_after_s
from serve.errors import error_body
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.images import decode_image
from serve.protocol.option_places import TRACK_OPTIONS
from serve.protocol.options import FrameOptions
from serve.settings import Limits
from tests.client.test_protocol import FakeServer, running
from tests.gateway.conftest import (
    RunningGateway,
    backend,
    background,
    cloud,
    gateway,
    start_gateway,
    torchserve,
)  # fmt: skip
from tests.gateway.fake_torchserve import FUSION, IMAGES, SWEEPS, FakeModel, answer_for
from tests.gateway.running import eventually

__all__ = ["backend", "background", "cloud", "gateway", "start_gateway", "torchserve"]  # fixtures

NEVER = Retry(())


class Driven:
    """A client of either kind, called alike."""

    def __init__(self, kind: str, address: str, **arguments: Any) -> None:
        self.kind, self.address, self.arguments = kind, address, arguments

    def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self.kind == "blocking":
            with Client(self.address, **self.arguments) as client:
                found = getattr(client, method)(*arguments, **options)
                return list(found) if method == "predict_many" else found
        return asyncio.run(self._call(method, *arguments, **options))

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncClient(self.address, **self.arguments) as client:
            if method == "predict_many":
                return [each async for each in client.predict_many(*arguments, **options)]
            return await getattr(client, method)(*arguments, **options)


@pytest.fixture(params=["blocking", "asynchronous"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def answering() -> Iterator[FakeServer]:
    with running() as server:
        yield server


# Frames


def test_arrays_paths_and_bytes_are_the_same_frame(
    kind: str, gateway: RunningGateway, torchserve: Any, cloud: Any, tmp_path: Any
) -> None:
    call = Driven(kind, gateway.url)
    (tmp_path / "frame.bin").write_bytes(cloud(1))
    points = np.frombuffer(cloud(1), np.float32).reshape(-1, 4)
    assert call("predict", cloud(1), "second") == json.loads(answer_for(cloud(1), {}))
    assert call("predict", tmp_path / "frame.bin", "second") == call(
        "predict", str(tmp_path / "frame.bin"), "second"
    )
    for array in (points, points.astype(np.float64), points[::-1][::-1]):
        call("predict", array, "second")
        (sent,) = torchserve.calls[-1]
        decoded = decode_frame(sent, FrameSpec("lidar"), FrameOptions(), Limits())
        assert isinstance(decoded.data, np.ndarray) and (decoded.data == points).all()


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 3), (6, 4)])
def test_image_arrays_arrive_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    decoded = cv2.imdecode(np.frombuffer(encode_image(pixels), np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None and decoded.shape == shape and (decoded == pixels).all()
    if len(shape) == 3:
        assert encode_image(pixels[..., ::-1], "rgb") == encode_image(pixels)
        assert (decode_image(encode_image(pixels), "color", "cv2", 10**6) == pixels).all()


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((2, 3, 4, 5)), np.zeros((4, 4), np.int64), np.zeros((0, 4, 3), np.uint8), 3, None, "no-such-file.bin",
        {"points": object()}, {"calibration": {"cam2img": object()}}, np.zeros((8, 6, 4), np.uint8),
    ],
)  # fmt: skip
def test_what_is_no_frame_is_refused_before_anything_is_sent(
    kind: str, answering: FakeServer, frame: Any
) -> None:
    with pytest.raises(errors.UndecodableFrame):
        Driven(kind, answering.address)("predict", frame, "second")
    assert not answering.seen


def test_dictionaries_and_folders_of_parts_arrive_by_name(
    kind: str, start_gateway: Callable[..., RunningGateway], torchserve: Any, cloud: Any, tmp_path: Any
) -> None:
    torchserve.models |= {
        "fusion": {"1.0": FakeModel(dict(FUSION))},
        "swept": {"1.0": FakeModel(dict(SWEEPS))},
    }
    gateway = start_gateway()
    eventually(lambda: gateway.client.get("/v2/models/fusion/ready").status_code == 200)
    eventually(lambda: gateway.client.get("/v2/models/swept/ready").status_code == 200)
    call = Driven(kind, gateway.url)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    matrices = {"cam2img": np.eye(3), "lidar2cam": np.eye(4).tolist()}
    parts = {"points": cloud(1), "image": pixels, "calibration": matrices}
    whole = call("predict", parts, "fusion")
    for name, content in (
        ("points.bin", cloud(1)),
        ("image.png", encode_image(pixels)),
        (
            "calibration.json",
            json.dumps({"cam2img": np.eye(3).tolist(), "lidar2cam": np.eye(4).tolist()}).encode(),
        ),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".DS_Store").write_bytes(b"left by a file manager")
    assert call("predict", tmp_path, "fusion") == whole
    sweeps = [{"time_lag_s": 0.05, "transform": np.eye(4)}]
    five = np.zeros((3, 5), np.float32)
    call("predict", {"points": five, "sweep.0": five, "sweeps": sweeps}, "swept")
    (sent,) = torchserve.calls[-1]
    assert encode_points(five) in sent and b"time_lag_s" in sent


# Options


def test_options_arrive_as_given(kind: str, gateway: RunningGateway, cloud: Any) -> None:
    options: PredictOptions = {
        "score_thr": 0.25, "max_detections": 7, "classes": ["Car"], "class_thr": {"Car": 0.5},
        "fields": "names,scores_3d",
    }  # fmt: skip
    found = Driven(kind, gateway.url)("predict", cloud(1), "second", timeout_s=10, **options)
    assert found["options"] == {
        "score_thr": 0.25, "max_detections": 7, "classes": ["Car"], "class_thr": [["Car", 0.5]],
        "fields": ["names", "scores_3d"],
    }  # fmt: skip


def test_class_names_of_any_script_arrive(kind: str, gateway: RunningGateway, cloud: Any) -> None:
    call = Driven(kind, gateway.url)
    for given in (["行人", "a, b"], ("行人", "a, b")):
        assert call("predict", cloud(1), "second", classes=given)["options"]["classes"] == ["行人", "a, b"]
    assert call("predict", cloud(1), "second", classes="行人,Car")["options"]["classes"] == ["行人", "Car"]
    assert call("predict", cloud(1), "second", class_thr={"行人": 0.5})["options"]["class_thr"] == [
        ["行人", 0.5]
    ]


def test_unknown_option_is_refused_before_anything_is_sent(kind: str, answering: FakeServer) -> None:
    with pytest.raises(errors.UnknownOption, match="score_thr"):
        Driven(kind, answering.address)("predict", b"", "second", score_threshold=0.3)
    assert not answering.seen


def test_deadline_is_passed_on_if_it_is_named(kind: str, answering: FakeServer) -> None:
    call = Driven(kind, answering.address)
    call("predict", b"", "second", timeout_s=2.5)
    assert 2000 < int(answering.seen["headers"]["X-Timeout-Ms"]) <= 2500
    call("predict", b"", "second")
    assert "X-Timeout-Ms" not in answering.seen["headers"]


def test_options_of_the_client_are_those_of_the_server() -> None:
    from dataclasses import fields

    of_frames = {each.name for each in fields(FrameOptions)}
    assert set(PredictOptions.__annotations__) == of_frames | set(TRACK_OPTIONS)


# Many frames


def test_results_of_many_frames_are_in_order(kind: str, gateway: RunningGateway, cloud: Any) -> None:
    clouds = [cloud(number) for number in range(40)]
    found = Driven(kind, gateway.url)("predict_many", iter(clouds), "second", concurrency=5)
    assert [dict(each) for each in found] == [json.loads(answer_for(each, {})) for each in clouds]


def test_no_more_requests_than_asked_for_are_under_way(
    kind: str, gateway: RunningGateway, backend: Any, cloud: Any
) -> None:
    taken: list[int] = []

    def frames() -> Iterator[bytes]:
        for number in range(30):
            taken.append(number)
            yield cloud(number)

    backend.hold()
    done: list[Any] = []
    call = Driven(kind, gateway.url)
    thread = threading.Thread(
        target=lambda: done.extend(call("predict_many", frames(), "second", concurrency=3))
    )
    thread.start()
    eventually(lambda: gateway.admission.items == 3 and len(taken) == 6)
    time.sleep(0.1)  # nothing more comes
    assert gateway.admission.items == 3 and len(taken) == 6
    backend.release()
    thread.join(30)
    assert len(done) == 30


def test_error_of_a_frame_is_raised_or_in_its_place(kind: str, gateway: RunningGateway, cloud: Any) -> None:
    call = Driven(kind, gateway.url)
    frames = [cloud(1), b"bad!", cloud(2)]
    found = call("predict_many", frames, "second", return_errors=True)
    assert [type(each) for each in found] == [Result, errors.UndecodableFrame, Result]
    with pytest.raises(errors.UndecodableFrame):
        call("predict_many", frames, "second")


def test_frames_of_a_track_session_are_sent_in_order_or_not(
    kind: str, gateway: RunningGateway, cloud: Any
) -> None:
    call = Driven(kind, gateway.url)
    call("predict", cloud(1), "second", track_session="drive", track_start=True)
    with pytest.raises(errors.UnknownOption):
        call("predict_many", [cloud(1)], "second", track_session="drive")
    frames = [cloud(1) for _ in range(5)]
    found = call("predict_many", frames, "second", track_session="drive", concurrency=1)
    assert [each["track_frame"] for each in found] == [1, 2, 3, 4, 5]


def test_results_that_are_not_taken_leave_nothing_behind(gateway: RunningGateway, cloud: Any) -> None:
    with Client(gateway.url) as client:
        results = client.predict_many((cloud(k) for k in range(100)), "second", concurrency=2)
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert not [each for each in threading.enumerate() if each.name.startswith("client")]

    async def leave() -> set[str]:
        async with AsyncClient(gateway.url) as client:
            results = client.predict_many((cloud(k) for k in range(100)), "second", concurrency=2)
            await anext(results)
            await results.aclose()  # type: ignore[attr-defined]
        return {str(each.get_coro()) for each in asyncio.all_tasks()} - {
            str(asyncio.current_task().get_coro())
        }  # type: ignore[union-attr]

    assert asyncio.run(leave()) == set()


def test_one_client_serves_many_threads(gateway: RunningGateway, cloud: Any) -> None:
    found: dict[int, Any] = {}
    with Client(gateway.url) as client:
        threads = [
            threading.Thread(target=lambda k=k: found.update({k: client.predict(cloud(k), "second")}))  # type: ignore[misc]
            for k in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {k: dict(each) for k, each in found.items()} == {
        k: json.loads(answer_for(cloud(k), {})) for k in range(12)
    }


# Repetition, without a network: what a call asks for, and what it makes of the answers.


def conversation(
    replies: Sequence[Reply | errors.ServeError], retry: Retry, timeout_s: float = 60.0
) -> tuple[Any, list[float]]:
    """Drive a call with these replies; returns its value or error, and the pauses that it asked for."""
    steps = Calls("host:1", timeout_s, retry).predict(b"frame", "second", None, {})
    waited: list[float] = []
    left = iter(replies)
    try:
        step = next(steps)
        while True:
            if isinstance(step, Work):
                step = steps.send(step.call())
            elif isinstance(step, Wait):
                waited.append(step.seconds)
                step = steps.send(None)
            else:
                assert isinstance(step, Send)
                reply = next(left)
                step = steps.throw(reply) if isinstance(reply, errors.ServeError) else steps.send(reply)
    except StopIteration as end:
        return end.value, waited
    except errors.ServeError as error:
        return error, waited


def test_repetition_passes_on_what_is_left_of_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve.client.requests.time", SimpleNamespace(monotonic=lambda: now))
    steps = Calls("host:1", 60.0, Retry((1.0,) * 5)).predict(b"frame", "second", None, {}, timeout_s=8.0)
    sent = []
    step = next(steps)
    while len(sent) < 3:
        if isinstance(step, Work):
            now += 0.5  # the frame is encoded
            step = steps.send(step.call())
        elif isinstance(step, Send):
            sent.append((step.request.headers["X-Timeout-Ms"], step.timeout_s))
            now += 1.5  # it waits in the server's queue
            step = steps.send(refused(503))
        else:
            now += 1.0
            step = steps.send(None)
    assert sent == [("7500", 7.5), ("5000", 5.0), ("2500", 2.5)]


GOOD = Reply(200, {}, b'{"bboxes": [], "scores": [], "labels": [], "names": []}')


def refused(status: int, **headers: str) -> Reply:
    kind = {429: errors.Overloaded, 503: errors.NotReady}.get(status, errors.BadRequest)
    return Reply(status, headers, json.dumps(error_body(kind("why"))).encode())


@pytest.mark.parametrize("status", [429, 503])
def test_request_is_sent_again_after_a_pause_that_grows(status: int) -> None:
    value, waited = conversation([refused(status)] * 3 + [GOOD], Retry((0.2, 0.5, 1.0)))
    assert isinstance(value, Result)
    assert all(longest / 2 <= each <= longest for each, longest in zip(waited, (0.2, 0.5, 1.0), strict=True))


def test_pause_is_at_least_what_retry_after_asks_for() -> None:
    waits = [
        conversation([refused(429, **{"retry-after": "3"}), GOOD], Retry((0.2,)))[1][0] for _ in range(20)
    ]
    assert all(3 <= each <= 4.5 for each in waits) and len(set(waits)) > 10


def test_number_of_repetitions_is_bounded() -> None:
    value, waited = conversation([refused(503)] * 9, Retry((0.1, 0.1)))
    assert isinstance(value, errors.NotReady) and len(waited) == 2


def test_no_repetition_past_the_deadline() -> None:
    value, waited = conversation([refused(429, **{"retry-after": "100"})], Retry(), timeout_s=5)
    assert isinstance(value, errors.Overloaded) and waited == []


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 502, 504, 507])
def test_other_errors_are_raised_at_once(status: int) -> None:
    value, waited = conversation([refused(status), GOOD], Retry())
    assert isinstance(value, errors.ServeError) and waited == []


def test_refused_connections_count_only_if_asked_for() -> None:
    lost = errors.NotReady("cannot connect")
    assert conversation([lost, GOOD], Retry())[0] is lost
    assert isinstance(conversation([lost, GOOD], Retry(connection_failures=True))[0], Result)


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 0), ("7", 7), ("soon", 0), ("-1", 0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0)]
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float) -> None:
    assert _retry_after_s(text) == seconds


def test_retry_after_of_a_date_ahead() -> None:
    import email.utils

    assert 50 < _retry_after_s(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60


def test_overloaded_gateway_is_asked_again(
    kind: str, start_gateway: Callable[..., RunningGateway], backend: Any, cloud: Any
) -> None:
    gateway = start_gateway(max_pending_frames=1, max_frames_per_request=1, client_share=1)
    backend.hold()
    first = threading.Thread(target=lambda: gateway.post(content=cloud(1)))
    first.start()
    eventually(lambda: gateway.admission.items == 1)
    with pytest.raises(errors.Overloaded):
        Driven(kind, gateway.url)("predict", cloud(2), "second", retry=NEVER)
    threading.Timer(0.3, backend.release).start()
    assert Driven(kind, gateway.url)("predict", cloud(2), "second")["names"]
    first.join()


# Deadlines and lost connections


def test_answer_that_drips_ends_at_the_deadline(kind: str) -> None:
    import socketserver

    class Dripping(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
                if gone.wait(0.05):
                    return

    gone = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            began = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded):
                Driven(kind, f"127.0.0.1:{server.server_address[1]}")("predict", b"", "second", timeout_s=0.4)
            assert time.monotonic() - began < 3
        finally:
            gone.set()
            server.shutdown()


@pytest.mark.parametrize("method", ["predict", "draw"])
def test_refused_connection_is_not_ready(kind: str, method: str, free_ports: Any) -> None:
    with pytest.raises(errors.NotReady):
        Driven(kind, f"127.0.0.1:{free_ports(1)[0]}")(method, b"", "second")


@pytest.mark.parametrize("body", [b"[]", b"not json", b"3"])
def test_answer_that_is_none_is_a_broken_backend(kind: str, answering: FakeServer, body: bytes) -> None:
    answering.body = body
    with pytest.raises(errors.BackendBroken):
        Driven(kind, answering.address)("predict", b"", "second")


# Pictures, models, compression


def test_picture_is_drawn_by_the_gateway(
    kind: str, gateway: RunningGateway, cloud: Any, answering: Any
) -> None:
    picture = Driven(kind, gateway.url)("draw", cloud(1), "second", score_thr=0.1)
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR) is not None
    with pytest.raises(errors.BadRequest):
        Driven(kind, answering.address)("draw", cloud(1), "second")


def test_models_are_described(kind: str, gateway: RunningGateway) -> None:
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    call = Driven(kind, gateway.url)
    assert [each["name"] for each in call("models")] == ["second"]
    assert call("describe", "second")["modality"] == "lidar"
    with pytest.raises(errors.ModelNotFound):
        call("describe", "third")


@pytest.mark.parametrize("compress", [True, False])
def test_answers_are_compressed_if_asked_for(
    kind: str, start_gateway: Callable[..., RunningGateway], torchserve: Any, cloud: Any, compress: bool
) -> None:
    gateway = start_gateway(compress_from_bytes=1)
    found = Driven(kind, gateway.url, compress=compress)("predict", cloud(1), "second")
    assert found == json.loads(answer_for(cloud(1), {}))
    assert (found._headers.get("content-encoding") == "gzip") == compress


def test_key_is_sent(kind: str, start_gateway: Callable[..., RunningGateway], cloud: Any) -> None:
    gateway = start_gateway(api_keys=("secret",))
    assert Driven(kind, gateway.url, token="secret")("predict", cloud(1), "second")["names"]
    with pytest.raises(errors.Unauthorized):
        Driven(kind, gateway.url)("predict", cloud(1), "second")


def test_image_model_answers_an_array(
    kind: str, start_gateway: Callable[..., RunningGateway], torchserve: Any
) -> None:
    torchserve.models["pictures"] = {"1.0": FakeModel(dict(IMAGES))}
    gateway = start_gateway()
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Driven(kind, gateway.url, retry=Retry((1.0,) * 5))("predict", pixels, "pictures")
    (sent,) = torchserve.calls[-1]
    assert sent == encode_image(pixels) and io.BytesIO(sent).read(4) == b"\x89PNG"

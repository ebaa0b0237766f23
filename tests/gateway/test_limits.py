"""Limits: what is rejected, when, and without effect on other requests."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from tests.gateway import raw
from tests.gateway.fake_torchserve import FakeModel, answer_for
from tests.gateway.running import eventually

PATH = "/predictions/second"
SMALL = {"max_frame_bytes": 1000, "max_body_bytes": 2000, "batch_bytes": 1000}


def test_body_over_the_limit_is_rejected_before_it_is_read(start_gateway, torchserve):
    gateway = start_gateway(**SMALL)
    with raw.connected(gateway.url) as connection:
        connection.sendall(raw.head(PATH, content_length=1 << 40))  # and not one byte of it
        received = raw.answer(connection)
    assert raw.status(received) == 413 and b'"frame_too_large"' in received
    assert b"connection: close" in received.lower()
    eventually(gateway.idle)
    assert not torchserve.calls


def test_client_that_keeps_sending_a_large_body_receives_413(start_gateway):
    gateway = start_gateway(**SMALL)
    answer = gateway.post(content=b"x" * (8 << 20))
    assert answer.status_code == 413 and "2000" in answer.json()["error"]["message"]


def test_chunked_body_is_rejected_at_the_limit(start_gateway, torchserve):
    gateway = start_gateway(**SMALL)
    with raw.connected(gateway.url) as connection:
        connection.sendall(raw.head(PATH, transfer_encoding="chunked"))
        for _ in range(3):
            connection.sendall(raw.chunk(b"x" * 700))
        received = raw.answer(connection)
        assert raw.status(received) == 413
        connection.settimeout(10)
        assert connection.recv(1) == b""  # closed: the flood may not go on
    eventually(gateway.idle)
    assert not torchserve.calls


def test_form_over_the_limit_is_rejected(start_gateway, torchserve):
    gateway = start_gateway(**SMALL)
    answer = gateway.post(files=[("data", b"x" * 1500), ("data", b"y" * 1500)])
    assert answer.status_code == 413 and not torchserve.calls


def test_frame_over_the_limit_does_not_affect_the_other_frame(start_gateway, cloud):
    gateway = start_gateway(**{**SMALL, "batch_bytes": 1500})  # the batcher has a limit of its own
    answer = gateway.post(files=[("data", cloud(1)), ("data", b"x" * 1001)])
    assert answer.json()[0] == json.loads(answer_for(cloud(1), {}))
    assert answer.json()[1]["error"]["code"] == "frame_too_large"


def test_too_many_frames_in_a_request_are_rejected(start_gateway, cloud, torchserve):
    gateway = start_gateway(max_frames_per_request=2)
    body = pack_frames([(cloud(i), {}) for i in range(3)])
    answer = gateway.post(content=body, headers={"content-type": FRAMES_CONTENT_TYPE})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "frame_too_large"
    assert gateway.post(files=[("data", cloud(i)) for i in range(3)]).status_code == 413
    assert (
        gateway.post(files=[("data", cloud(i)) for i in range(200)]).status_code == 413
    )  # parts beyond all reason
    assert not torchserve.calls


def test_body_that_does_not_arrive_returns_408(start_gateway):
    gateway = start_gateway(body_timeout_s=0.2)
    for head in (raw.head(PATH, content_length=100), raw.head(PATH, transfer_encoding="chunked")):
        with raw.connected(gateway.url) as connection:
            connection.sendall(head + b"5\r\nx")
            received = raw.answer(connection)
        assert raw.status(received) == 408 and b'"request_timeout"' in received
    multipart = raw.head(PATH, content_length=100, content_type="multipart/form-data; boundary=b")
    with raw.connected(gateway.url) as connection:
        connection.sendall(multipart + b"--b\r\n")
        assert raw.status(raw.answer(connection)) == 408
    eventually(gateway.idle)


def in_background(gateway, **request) -> threading.Thread:
    thread = threading.Thread(target=lambda: gateway.post(**request))
    thread.start()
    return thread


def test_full_queue_returns_429_at_once(start_gateway, backend, cloud):
    gateway = start_gateway(max_pending_frames=2, max_frames_per_request=2)
    backend.hold()
    threads = [in_background(gateway, content=cloud(i)) for i in range(2)]
    eventually(lambda: gateway.admission.items == 2 and backend.app.held)
    answer = gateway.post(content=cloud(3))
    assert backend.app.held and gateway.admission.items == 2  # before any was answered
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "overloaded"
    with raw.connected(gateway.url) as connection:  # before the body is read
        connection.sendall(raw.head(PATH, content_length=100))
        assert raw.status(raw.answer(connection)) == 429
    backend.release()
    for thread in threads:
        thread.join()
    assert gateway.post(content=cloud(3)).status_code == 200


def test_pending_bytes_are_limited(start_gateway, backend, cloud):
    gateway = start_gateway(**SMALL, max_pending_bytes=2000, client_share=1)
    backend.hold()
    thread = in_background(gateway, content=cloud(1, 62))
    eventually(lambda: gateway.admission.bytes == 992)
    thread2 = in_background(gateway, content=cloud(2, 62))
    eventually(lambda: gateway.admission.bytes == 1984)
    refused = gateway.post(content=cloud(3, 2))
    assert refused.status_code == 429 and "1984" in refused.json()["error"]["message"]
    assert gateway.post(files={"data": cloud(3, 2)}).status_code == 429
    with raw.connected(gateway.url) as connection:  # before the body is sent
        connection.sendall(raw.head(PATH, content_length=32))
        assert raw.status(raw.answer(connection)) == 429
    backend.release()
    for each in (thread, thread2):
        each.join()


def test_frame_past_its_deadline_never_reaches_the_model(start_gateway, backend, cloud):
    gateway = start_gateway(batch_frames=1, prefetch_batches=0)
    backend.hold()
    running = in_background(gateway, content=cloud(0))
    eventually(lambda: backend.app.held == 1)
    answer = gateway.post(f"{PATH}?timeout_ms=50", content=cloud(1))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    header = gateway.post(content=cloud(2), headers={"x-timeout-ms": "50"})
    assert header.status_code == 504
    lines = gateway.post(
        f"{PATH}?timeout_ms=50", content=cloud(3), headers={"accept": "application/x-ndjson"}
    )
    assert json.loads(lines.text)["status"] == 504
    many = gateway.post(f"{PATH}?timeout_ms=50", files=[("data", cloud(4)), ("data", cloud(5))])
    assert [entry["error"]["code"] for entry in many.json()] == ["deadline_exceeded"] * 2
    eventually(lambda: gateway.admission.items == 1)
    backend.release()
    running.join()
    eventually(gateway.idle)
    assert backend.app.calls == [[cloud(0)]]


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_frame_of_a_disconnected_client_never_reaches_the_model(start_gateway, backend, cloud, accept):
    gateway = start_gateway(batch_frames=1, prefetch_batches=0)
    backend.hold()
    running = in_background(gateway, content=cloud(0))
    eventually(lambda: backend.app.held == 1)
    with raw.connected(gateway.url) as connection:
        connection.sendall(raw.request(PATH, cloud(1), accept=accept))
        eventually(lambda: gateway.admission.items == 2)
    eventually(lambda: gateway.admission.items == 1)
    backend.release()
    running.join()
    eventually(gateway.idle)
    assert backend.app.calls == [[cloud(0)]]


def test_disconnect_during_the_answer_releases_the_permit(start_gateway, backend, cloud):
    backend.app.models["second"]["1.0"].workers = [1, 2]
    gateway = start_gateway(batch_frames=1, prefetch_batches=0)
    backend.hold(cloud(0))
    files = [("data", cloud(0)), ("data", cloud(1))]
    with gateway.client.stream(
        "POST", PATH, files=files, headers={"accept": "application/x-ndjson"}
    ) as answer:
        assert json.loads(next(answer.iter_lines()))["index"] == 1
    eventually(lambda: gateway.admission.items == 0)


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_disconnect_at_any_moment_leaves_nothing_pending(gateway, cloud, accept, caplog):
    whole = raw.request(PATH, cloud(1), accept=accept)
    form = (
        b'--b\r\ncontent-disposition: form-data; name="data"; filename="f"\r\n\r\n'
        + cloud(1)
        + b"\r\n--b--\r\n"
    )
    in_parts = raw.request(PATH, form, accept=accept, content_type="multipart/form-data; boundary=b")
    for sent in (whole, in_parts):
        for cut in (10, len(sent) - 100, len(sent) - 1, len(sent)):
            for _ in range(3):
                with raw.connected(gateway.url) as connection:
                    connection.sendall(sent[:cut])
    eventually(gateway.idle)
    assert gateway.post(content=cloud(2)).content == answer_for(cloud(2), {})
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")], caplog.text


def test_rejected_request_leaves_its_connection_usable_or_closed(start_gateway, cloud):
    gateway = start_gateway(**SMALL)
    with httpx.Client(
        base_url=gateway.url, limits=httpx.Limits(max_connections=1), trust_env=False
    ) as client:
        for _ in range(3):
            assert client.post(PATH, content=b"x" * 3000).status_code == 413
            assert client.post("/predictions/nobody", content=b"x" * 1500).status_code == 404
            assert client.post(PATH, content=cloud(1)).status_code == 200


def test_flood_of_one_model_leaves_another_served(start_gateway, torchserve, backend, cloud):
    """The first model's worker stands still while requests for it keep coming; the second answers all the same."""
    torchserve.models["other"] = {"1.0": FakeModel(workers=[4712])}
    gateway = start_gateway(max_pending_frames=8, max_frames_per_request=2, client_share=1.0)
    eventually(lambda: gateway.registry.count() == 2)
    flood = [cloud(number) for number in range(12)]
    backend.hold(*flood)
    with ThreadPoolExecutor(12) as clients:
        stuck = [clients.submit(gateway.post, PATH, content=frame) for frame in flood]
        eventually(lambda: sum(each.done() for each in stuck) >= 6)
        assert {each.result().status_code for each in stuck if each.done()} == {429}
        for number in range(20, 30):
            answer = gateway.post("/predictions/other", content=cloud(number))
            assert answer.content == answer_for(cloud(number), {}), answer.text
        backend.release()
        answered = [each.result() for each in stuck if each.result().status_code == 200]
    assert len(answered) == 6  # three quarters of the limit: beyond an equal share half of one is kept

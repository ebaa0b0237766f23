"""Failures of TorchServe and its workers, and what clients get for them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.gateway import dispatch
from serve.protocol.worker import HELLO, socket_path
from tests.gateway.fake_torchserve import CLOUDS, FakeModel, FakeTorchServe, answer_for
from tests.gateway.running import eventually


def ready(gateway) -> bool:
    return gateway.client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("trouble", ["worker died", "worker killed", "cut off"])
def test_batch_of_a_dead_worker_is_sent_once_more(gateway, torchserve, cloud, trouble):
    torchserve.troubles.append(trouble)
    answer = gateway.post(content=cloud(1))
    assert answer.content == answer_for(cloud(1), {})
    assert torchserve.calls == [[cloud(1)]] * 2


@pytest.mark.parametrize("trouble", ["worker died", "cut off"])
def test_batch_whose_worker_died_twice_returns_503(gateway, torchserve, cloud, trouble):
    torchserve.troubles.extend([trouble] * 2)
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "not_ready"
    assert len(torchserve.calls) == 2
    assert gateway.post(content=cloud(1)).status_code == 200


@contextmanager
def worker_that_dies(folder: Path, pid: int) -> Iterator[None]:
    """A worker's socket that hangs up on its first batch."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path(folder, pid)))
        listener.listen()

        def die() -> None:
            connection, _ = listener.accept()
            listener.close()
            with connection:
                connection.sendall(HELLO)
                assert connection.recv(1)

        thread = threading.Thread(target=die)
        thread.start()
        yield
        thread.join(20)
        assert not thread.is_alive()


class NoticedLate(FakeModel):
    """A worker that TorchServe calls ready for some answers after it died; what was asked of it until then."""

    def __init__(self, torchserve: FakeTorchServe, answers: float) -> None:
        super().__init__(spec=dict(CLOUDS), workers=[4711])
        self.torchserve, self.answers, self.early_calls = torchserve, answers, 0

    def described(self, name: str, version: str) -> dict[str, Any]:
        if self.answers > 0:
            self.early_calls = len(self.torchserve.calls)
            self.answers -= 1
        else:
            self.ready = 0
        return super().described(name, version)


def test_batch_of_a_dead_worker_waits_until_torchserve_noticed(start_gateway, torchserve, cloud, tmp_path):
    model = torchserve.models["second"]["1.0"] = NoticedLate(torchserve, float("inf"))
    with worker_that_dies(tmp_path, 4711):
        gateway = start_gateway(worker_sockets=tmp_path)
        eventually(lambda: ready(gateway))
        model.answers = 12
        answer = gateway.post(content=cloud(1))
    assert answer.content == answer_for(cloud(1), {}), answer.text
    assert model.ready == 0 and model.early_calls == 0
    assert torchserve.calls == [[cloud(1)]]


def test_wait_for_torchserve_ends_if_the_worker_only_disconnected(
    start_gateway, torchserve, cloud, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("serve.gateway.backend._POLL_S", 0.001)
    with worker_that_dies(tmp_path, 4711):
        answer = start_gateway(worker_sockets=tmp_path).post(content=cloud(1))
    assert answer.content == answer_for(cloud(1), {}), answer.text
    assert "worker 4711 of second 1.0 closed a connection but is still alive" in caplog.text


def test_slow_management_port_does_not_block_the_retry(start_gateway, torchserve, cloud, tmp_path):
    torchserve.models["second"]["1.0"] = NoticedLate(torchserve, float("inf"))
    with worker_that_dies(tmp_path, 4711):
        gateway = start_gateway(worker_sockets=tmp_path)
        eventually(lambda: ready(gateway))
        torchserve.hang = True
        answer = gateway.post(content=cloud(1))
    assert answer.content == answer_for(cloud(1), {}), answer.text
    assert torchserve.calls == [[cloud(1)]]


@pytest.mark.parametrize("trouble", ["worker died", "out of memory"])
def test_cancelled_frame_is_not_sent_again(gateway, backend, torchserve, cloud, trouble):
    """Two frames go out together, one of them expires there; what then goes wrong concerns the other one alone."""
    backend.hold()
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(gateway.post, content=cloud(0))
        eventually(lambda: torchserve.held == 1)
        pending = [
            clients.submit(gateway.post, f"/predictions/second?timeout_ms={limit_ms}", content=cloud(i))
            for i, limit_ms in ((1, 400), (2, 20_000))
        ]
        eventually(lambda: gateway.admission.items == 3)
        backend.let_pass()
        assert first.result().status_code == 200
        eventually(lambda: torchserve.held == 1)
        assert {*torchserve.calls[-1]} == {cloud(1), cloud(2)}
        if trouble == "out of memory":
            torchserve.most_frames = 1
        else:
            torchserve.troubles.append(trouble)
        assert pending[0].result().status_code == 504
        backend.release()
        assert pending[1].result().content == answer_for(cloud(2), {})
    assert torchserve.calls[2:] == [[cloud(2)]]


def test_frame_whose_worker_is_killed_twice_returns_507_alone(gateway, torchserve, cloud):
    torchserve.troubles.extend(["worker killed"] * 2)
    assert gateway.post(content=cloud(1)).json()["error"]["code"] == "out_of_memory"
    torchserve.calls.clear()
    torchserve.troubles.extend(["worker killed"] * 3)
    many = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))]).json()
    assert many[0]["error"]["code"] == "out_of_memory" and many[1] == json.loads(answer_for(cloud(2), {}))
    assert [len(call) for call in torchserve.calls] == [2, 1, 1, 1]


def test_frame_that_ends_every_worker_fails_alone(gateway, torchserve, cloud):
    torchserve.troubles.extend(["worker died", "worker died", "", "worker died"])
    files = [("data", cloud(i)) for i in range(3)]
    first, second, third = gateway.post(files=files).json()
    assert [first, third] == [json.loads(answer_for(cloud(i), {})) for i in (0, 2)]
    assert second["error"]["code"] == "not_ready"
    assert [len(call) for call in torchserve.calls] == [3, 3, 1, 1, 1]


def test_batch_out_of_memory_after_a_worker_death_is_split(gateway, torchserve, cloud):
    torchserve.troubles.extend(["worker died", "worker killed"])
    many = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))]).json()
    assert many == [json.loads(answer_for(cloud(i), {})) for i in (1, 2)]


def test_batch_out_of_memory_is_split_until_it_fits(gateway, torchserve, cloud):
    torchserve.most_frames = 2
    frames = [cloud(i) for i in range(7)]
    answer = gateway.post(files=[("data", frame) for frame in frames])
    assert [entry["frame"] for entry in answer.json()] == [
        json.loads(answer_for(frame, {}))["frame"] for frame in frames
    ]
    assert [len(call) for call in torchserve.calls] == [7, 3, 1, 2, 4, 2, 2]


def test_only_the_frame_that_is_too_large_returns_507(gateway, torchserve, cloud):
    torchserve.most_frames = 0
    assert gateway.post(content=cloud(1)).status_code == 507
    assert gateway.post(content=cloud(1)).json()["error"]["code"] == "out_of_memory"
    many = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))])
    assert [entry["error"]["code"] for entry in many.json()] == ["out_of_memory"] * 2


@pytest.mark.parametrize("trouble", ["short answer", "garbage", "another type", "strange refusal"])
def test_invalid_backend_answer_returns_502_for_all_frames(gateway, torchserve, cloud, trouble):
    torchserve.troubles.append(trouble)
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 502 and answer.json()["error"]["code"] == "backend_broken"
    torchserve.troubles.append(trouble)
    many = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))])
    assert [entry["error"]["code"] for entry in many.json()] == ["backend_broken"] * 2
    assert gateway.post(content=cloud(1)).status_code == 200


@pytest.mark.parametrize("accept", ["application/x-msgpack", "image/png"])
def test_backend_answer_that_is_not_json_returns_502_if_parsed(gateway, torchserve, cloud, accept):
    torchserve.troubles.append("no json")
    answer = gateway.post(content=cloud(1), headers={"accept": accept})
    assert answer.status_code == 502, answer.text


def test_model_without_workers_returns_503(gateway, torchserve, cloud):
    torchserve.troubles.append("queue full")
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_batch_over_the_backend_timeout_returns_504(start_gateway, backend, cloud):
    gateway = start_gateway(backend_timeout_s=0.2)
    backend.hold()
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.timing
def test_stopped_torchserve_returns_503_quickly_and_recovers(gateway, backend, cloud):
    eventually(lambda: ready(gateway))
    assert gateway.post(content=cloud(1)).status_code == 200
    backend.go()
    began = time.monotonic()
    eventually(lambda: not ready(gateway), 2.0)
    for _ in range(5):
        asked = time.monotonic()
        answer = gateway.post(content=cloud(1))
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert time.monotonic() - asked < 2.0
    assert "TorchServe" in gateway.client.get("/health/ready").json()["reasons"][0]
    assert gateway.client.get("/health/live").status_code == 200
    assert time.monotonic() - began < 10
    backend.come_back()
    eventually(lambda: ready(gateway), 2.0)
    assert gateway.post(content=cloud(1)).content == answer_for(cloud(1), {})


def test_requests_in_flight_return_503_when_torchserve_stops(gateway, backend, cloud):
    backend.hold()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(gateway.post(content=cloud(1))))
    thread.start()
    eventually(lambda: backend.app.held == 1)
    backend.go()
    thread.join()
    assert answers[0].status_code == 503


def test_gateway_started_before_torchserve_serves_once_it_is_up(start_gateway, backend, cloud):
    backend.go()
    gateway = start_gateway()
    assert not ready(gateway)
    assert gateway.post(content=cloud(1)).status_code == 503
    backend.come_back()
    eventually(lambda: ready(gateway), 2.0)
    assert gateway.post(content=cloud(1)).status_code == 200


@pytest.mark.timing
def test_hung_torchserve_fails_readiness_within_two_seconds(gateway, torchserve):
    eventually(lambda: ready(gateway))
    torchserve.hang = True
    eventually(lambda: not ready(gateway), 2.5)
    torchserve.hang = False
    eventually(lambda: ready(gateway), 2.5)


@pytest.mark.timing
def test_hung_torchserve_returns_503_at_once(gateway, torchserve, backend, cloud):
    eventually(lambda: ready(gateway))
    torchserve.hang = True
    backend.hold()
    stuck = threading.Thread(target=lambda: gateway.post(content=cloud(1)))
    stuck.start()
    try:
        eventually(lambda: not ready(gateway) and torchserve.held == 1, 5.0)

        def refusal() -> str | None:
            begun = time.perf_counter()
            answer = gateway.post("/predictions/second?timeout_ms=500", content=cloud(2))
            at_once = time.perf_counter() - begun < 0.4
            return answer.json()["error"]["code"] if answer.status_code == 503 and at_once else None

        assert eventually(refusal, 5.0) == "not_ready"
    finally:
        torchserve.hang = False
        backend.release()
        stuck.join()
    eventually(lambda: ready(gateway), 2.5)
    assert gateway.post(content=cloud(3)).status_code == 200


def test_slow_management_port_does_not_block_predictions(gateway, torchserve, cloud):
    eventually(lambda: ready(gateway))
    torchserve.hang = True
    try:
        eventually(lambda: not ready(gateway), 2.5)
        assert gateway.post(content=cloud(1)).status_code == 200
    finally:
        torchserve.hang = False


def test_stalled_batch_fails_readiness(start_gateway, backend, cloud):
    gateway = start_gateway(stall_timeout_s=0.1)
    eventually(lambda: ready(gateway))
    backend.hold()
    thread = threading.Thread(target=lambda: gateway.post(content=cloud(1)))
    thread.start()
    eventually(lambda: not ready(gateway))
    assert "second" in gateway.client.get("/health/ready").json()["reasons"][0]
    backend.release()
    thread.join()
    assert ready(gateway)


def test_foreign_model_is_refused_with_the_reason(start_gateway, torchserve, cloud):
    torchserve.models["foreign"] = {"1.0": FakeModel("no metadata")}
    gateway = start_gateway()
    answer = gateway.post("/predictions/foreign", content=cloud(1))
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
    entry = eventually(lambda: gateway.client.get("/models/foreign").json())[0]
    assert entry["status"] == "refused" and "mmdet3d-serve archive" in entry["reason"]
    assert ready(gateway)  # the other one is served


def test_refused_model_is_described_anew_when_one_of_its_workers_is_replaced(
    start_gateway, torchserve, cloud
):
    model = torchserve.models["second"]["1.0"]
    model.workers = [1, 2]
    gateway = start_gateway()
    assert gateway.post(content=cloud(1)).status_code == 200
    torchserve.undescribed.append("what is this?")
    model.workers = [3, 4]  # all are new, so the description is read again
    eventually(lambda: gateway.client.get("/models/second").json()[0]["status"] == "refused")
    model.workers = [5, 4]
    eventually(lambda: gateway.post(content=cloud(2)).status_code == 200)
    assert ready(gateway)


def test_worker_that_dies_while_it_describes_its_model_refuses_nothing(
    start_gateway, torchserve, cloud, caplog
):
    model = torchserve.models["second"]["1.0"]
    gateway = start_gateway()
    assert gateway.post(content=cloud(1)).status_code == 200
    torchserve.undescribed.append("Worker died.")
    model.workers = [3]
    eventually(
        lambda: (
            gateway.post(content=cloud(2)).status_code == 200
            and "cannot read the description of model second 1.0" in caplog.text
        )
    )
    eventually(lambda: ready(gateway) and gateway.registry.get("second", "1.0").described_by == {3})
    assert "rejected model" not in caplog.text


def test_unreadable_management_answer_fails_readiness_without_crash(start_gateway, torchserve, cloud):
    gateway = start_gateway()
    torchserve.models["second"]["1.0"].described = lambda name, version: {"nothing": "known"}
    eventually(lambda: not ready(gateway))
    del torchserve.models["second"]["1.0"].described
    eventually(lambda: ready(gateway))
    assert gateway.post(content=cloud(1)).status_code == 200


def test_rejected_token_is_read_again_from_the_key_file(start_gateway, torchserve, cloud, tmp_path):
    def write(generation: int) -> None:
        torchserve.tokens = {use: f"{use}-{generation}" for use in ("inference", "management")}
        keys = {use: {"key": key, "expiration time": "soon"} for use, key in torchserve.tokens.items()}
        (tmp_path / "key_file.json").write_text(json.dumps(keys))

    write(1)
    gateway = start_gateway(backend_key_file=tmp_path / "key_file.json")
    assert gateway.post(content=cloud(1)).status_code == 200
    write(2)
    eventually(lambda: gateway.post(content=cloud(1)).status_code == 200)
    assert ready(gateway)
    (tmp_path / "key_file.json").unlink()
    torchserve.tokens = {"inference": "third", "management": "third"}
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 503 and str(tmp_path) not in answer.text
    assert not ready(gateway)
    write(4)
    eventually(lambda: gateway.post(content=cloud(1)).status_code == 200)


def test_unexpected_exception_about_one_frame_is_its_outcome_alone(gateway, cloud, monkeypatch):
    estimate = dispatch.estimate_cost

    def fail_for_one(frame, *more):
        if bytes(getattr(frame, "body", frame)) == cloud(2):
            raise ArithmeticError("a bug")
        return estimate(frame, *more)

    monkeypatch.setattr(dispatch, "estimate_cost", fail_for_one)
    first, second, third = gateway.post(files=[("data", cloud(number)) for number in (1, 2, 3)]).json()
    assert second["error"]["code"] == "internal_error" and "a bug" not in second["error"]["message"]
    assert [first, third] == [json.loads(answer_for(cloud(number), {})) for number in (1, 3)]

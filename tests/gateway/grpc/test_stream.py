"""ModelStreamInfer by Triton's client."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
grpc = pytest.importorskip("grpc", reason="needs the extra grpc")

from serve.gateway.grpc.messages import INFERENCE, message_class  # noqa: E402
from tests.gateway.fake_torchserve import answer_for  # noqa: E402
from tests.gateway.grpc.test_infer import points, tensor  # noqa: E402
from tests.gateway.running import eventually  # noqa: E402


class Results(queue.Queue[tuple[Any, Any]]):
    """What a stream brings, in order: (result, error)."""

    def __call__(self, result: Any, error: Any) -> None:
        self.put((result, error))

    def next(self) -> tuple[Any, Any]:
        return self.get(timeout=20)


@pytest.fixture
def opened(start_grpc: Callable[..., Any]) -> Callable[..., tuple[Any, Results]]:
    def open_stream(headers: dict[str, str] | None = None, **options: Any) -> tuple[Any, Results]:
        client, results = start_grpc(**options), Results()
        client.start_stream(results, headers=headers)
        return client, results

    return open_stream


def frame_of(result: Any) -> str:
    return json.loads(result.as_numpy("detections")[0])["frame"]


def expected(cloud: bytes) -> str:
    return json.loads(answer_for(cloud, {}))["frame"]


def test_frames_of_a_stream_are_answered_in_order(opened, cloud):
    client, results = opened()
    for number in range(40):
        client.async_stream_infer("second", [points(cloud(number))], request_id=f"frame-{number}")
    for number in range(40):
        result, error = results.next()
        assert error is None
        response = result.get_response()
        assert response.id == f"frame-{number}" and frame_of(result) == expected(cloud(number))
        assert response.parameters["triton_final_response"].bool_param
    client.stop_stream()


def test_result_is_sent_when_it_and_those_before_it_are_there(opened, backend, cloud):
    client, results = opened(batch_frames=1, prefetch_batches=0)
    backend.hold(cloud(1))
    for number in range(3):
        client.async_stream_infer("second", [points(cloud(number))], request_id=str(number))
    assert results.next()[0].get_response().id == "0"  # while the second is held
    eventually(lambda: client.gateway.admission.items == 2)
    backend.release()
    assert [results.next()[0].get_response().id for _ in range(2)] == ["1", "2"]
    client.stop_stream()


def test_frame_that_fails_does_not_end_the_stream(opened, cloud):
    client, results = opened()
    bad = tensor("frame", np.array([b"bad!"], dtype=object))
    client.async_stream_infer("second", [points(cloud(1))], request_id="a")
    client.async_stream_infer("second", [bad], request_id="b")
    client.async_stream_infer("nobody", [points(cloud(1))], request_id="c")
    client.async_stream_infer("second", [points(cloud(2))], request_id="d")
    assert results.next()[0].get_response().id == "a"
    assert "request 'b': bad frame" in results.next()[1].message()
    assert "request 'c': model 'nobody'" in results.next()[1].message()
    assert results.next()[0].get_response().id == "d"
    client.stop_stream()


def test_batch_of_a_worker_that_dies_is_answered_by_its_successor(opened, torchserve, cloud):
    client, results = opened()
    torchserve.troubles.append("worker died")
    for number in range(8):
        client.async_stream_infer("second", [points(cloud(number))], request_id=str(number))
    answered = [results.next() for _ in range(8)]
    assert [(result.get_response().id, error) for result, error in answered] == [
        (str(k), None) for k in range(8)
    ]


def test_frames_that_no_worker_survives_fail_and_the_stream_goes_on(opened, torchserve, cloud):
    client, results = opened()
    torchserve.models["second"]["1.0"].trouble = "worker died"
    for number in range(3):
        client.async_stream_infer("second", [points(cloud(number))], request_id=str(number))
    for number in range(3):
        assert f"request '{number}'" in results.next()[1].message()
    torchserve.models["second"]["1.0"].trouble = ""
    client.async_stream_infer("second", [points(cloud(3))], request_id="3")
    result, error = results.next()
    assert error is None and frame_of(result) == expected(cloud(3))
    client.stop_stream()


def test_error_in_a_stream_has_the_id_and_the_code(client):
    stub = client.channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
    request = message_class("inference.ModelInferRequest")(model_name="nobody", id="7")
    (message,) = stub(iter([request.SerializeToString(), b"\xff"][:1]), timeout=20)
    response = message_class("inference.ModelStreamInferResponse").FromString(message)
    assert response.infer_response.id == "7"
    assert response.infer_response.parameters["error_code"].string_param == "model_not_found"


def test_stream_reads_no_more_than_it_may_answer_at_a_time(opened, backend, cloud):
    client, results = opened(max_frames_per_request=4)
    backend.hold()
    for number in range(12):
        client.async_stream_infer("second", [points(cloud(number))])
    eventually(lambda: client.gateway.admission.items == 4)
    backend.release()
    assert all(results.next()[1] is None for _ in range(12))
    client.stop_stream()


def test_stream_needs_a_key(opened, cloud):
    client, results = opened(api_keys=("secret",))
    assert results.next()[1].status() == "StatusCode.UNAUTHENTICATED"
    client.stop_stream()
    client, results = opened(api_keys=("secret",), headers={"authorization": "Bearer secret"})
    client.async_stream_infer("second", [points(cloud(1))])
    assert results.next()[1] is None
    client.stop_stream()


def test_streams_beyond_the_limit_are_refused(start_grpc, cloud):
    client = start_grpc(max_grpc_streams=1, client_share=1)
    first, second = Results(), Results()
    client.start_stream(first)
    client.async_stream_infer("second", [points(cloud(1))])
    assert first.next()[1] is None
    other = triton.InferenceServerClient(f"127.0.0.1:{client.gateway.grpc_port}")
    other.start_stream(second)
    assert second.next()[1].status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert "mmdet3d_serve_grpc_streams 1.0" in client.gateway.client.get("/metrics").text
    other.close()
    client.stop_stream()
    eventually(lambda: "mmdet3d_serve_grpc_streams 0.0" in client.gateway.client.get("/metrics").text)


def test_cancelled_stream_frees_its_frames(opened, backend, cloud):
    client, _ = opened()
    backend.hold()
    client.async_stream_infer("second", [points(cloud(1))])
    eventually(lambda: client.gateway.admission.items == 1)
    client.stop_stream(cancel_requests=True)
    eventually(lambda: not client.gateway.admission.items)
    backend.release()


def test_stream_ends_after_what_it_holds_when_the_server_stops(opened, backend, background, cloud):
    client, results = opened()
    backend.hold()
    client.async_stream_infer("second", [points(cloud(1))], request_id="held")
    eventually(lambda: client.gateway.admission.items == 1)
    background.soon(client.gateway.lifecycle.stop)
    backend.release()
    assert results.next()[0].get_response().id == "held"
    assert results.next()[1].status() == "StatusCode.UNAVAILABLE"
    client.stop_stream()


def test_client_that_reads_no_answers_holds_no_bytes(start_grpc, cloud):
    limits = {"max_frames_per_request": 512, "max_pending_frames": 4096}
    client = start_grpc(client_stall_timeout_s=0.5, client_bytes_per_s=1 << 30, **limits)
    request = message_class("inference.ModelInferRequest")(model_name="second")
    request.inputs.add(name="frame", datatype="BYTES", shape=[512])
    bodies = map(cloud, range(512))
    request.raw_input_contents.append(b"".join(len(body).to_bytes(4, "little") + body for body in bodies))
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with grpc.insecure_channel(f"127.0.0.1:{client.gateway.grpc_port}", small_window) as channel:
        stub = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
        call = stub(iter([request.SerializeToString()] * 4), timeout=60)
        eventually(lambda: client.gateway.admission.bytes > 500_000)
        eventually(client.gateway.idle)
        assert not call.done()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED

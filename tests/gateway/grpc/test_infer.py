"""ModelInfer and the calls about server and models, by Triton's client."""

from __future__ import annotations

import json
import threading

import cv2
import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
grpc = pytest.importorskip("grpc", reason="needs the extra grpc")

from tritonclient.utils import InferenceServerException  # noqa: E402

from serve.gateway.grpc.messages import INFERENCE, message_class  # noqa: E402
from tests.gateway.fake_torchserve import FUSION, IMAGES, SWEEPS, FakeModel, answer_for  # noqa: E402
from tests.gateway.running import eventually  # noqa: E402

NAMES = ["bboxes_3d", "scores_3d", "labels_3d", "num_detections", "detections"]


def tensor(name: str, value: np.ndarray) -> triton.InferInput:
    datatype = "BYTES" if value.dtype == object else {"f": "FP32", "u": "UINT8"}[value.dtype.kind]
    made = triton.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def points(body: bytes) -> triton.InferInput:
    return tensor("points", np.frombuffer(body, np.float32).reshape(-1, 4))


def unary(channel: grpc.Channel, method: str, message: object, **call: object) -> object:
    """Call a method without Triton's client; returns its response."""
    path = f"/{INFERENCE}/{method}"
    stub = channel.unary_unary(
        path, lambda given: given if isinstance(given, bytes) else given.SerializeToString()
    )
    return message_class(f"inference.{method}Response").FromString(stub(message, timeout=20, **call))


def refused(call: object) -> tuple[str, str]:
    """Return status and message of a call that fails."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_server_and_models_are_described(client, torchserve):
    assert client.is_server_live() and eventually(client.is_server_ready)
    assert client.is_model_ready("second") and client.is_model_ready("second", "1.0")
    assert not client.is_model_ready("nobody") and not client.is_model_ready("second", "7")
    assert client.get_server_metadata().name == "mmdet3d-serve"
    found = client.get_model_metadata("second", as_json=True)
    assert found == {
        **client.gateway.client.get("/v2/models/second").json(),
        "inputs": [{"name": "points", "datatype": "FP32", "shape": ["-1", "4"]}],
        "outputs": found["outputs"],
    }
    assert [output["name"] for output in found["outputs"]] == NAMES


def test_config_statistics_and_index_are_those_of_http(client, cloud):
    client.infer("second", [points(cloud(1))])
    plain = client.gateway.client
    config = client.get_model_config("second", as_json=True)["config"]
    over_http = plain.get("/v2/models/second/config").json()
    assert (config["name"], config["platform"]) == (over_http["name"], over_http["platform"])
    assert [each["name"] for each in config["input"]] == [each["name"] for each in over_http["input"]]
    for name in ("second", ""):
        (found,) = client.get_inference_statistics(name).model_stats
        assert (found.name, found.inference_count, found.inference_stats.success.count) == ("second", 1, 1)
        assert found.inference_stats.compute_infer.ns > 0
    (index,) = client.get_model_repository_index().models
    assert (index.name, index.version, index.state) == ("second", "1.0", "READY")
    for call in (client.load_model, client.unload_model):
        assert refused(lambda call=call: call("second"))[0] == "INVALID_ARGUMENT"


def test_unready_server_and_model_are_answered_rather_than_refused(client, torchserve):
    assert eventually(client.is_server_ready)
    client.gateway.lifecycle.drain()
    assert not client.is_server_ready() and client.is_server_live()


@pytest.mark.parametrize("names", [None, NAMES, ["scores_3d"], ["detections", "labels_3d"]])
def test_infer_gives_the_same_detections_as_predictions(client, cloud, names):
    outputs = None if names is None else [triton.InferRequestedOutput(name) for name in names]
    result = client.infer("second", [points(cloud(1))], outputs=outputs, request_id="mine")
    plain = client.gateway.post(content=cloud(1), params={"load_dim": 4}).json()
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("mine", "second", "1.0")
    assert [output.name for output in response.outputs] == (names or NAMES)
    for name in response.outputs:
        found = result.as_numpy(name.name)
        if name.name == "detections":
            assert [json.loads(each) for each in found] == [plain]
        elif name.name == "num_detections":
            assert found.tolist() == [len(plain["scores_3d"])]
        else:
            assert found.tolist() == plain[name.name]


def test_one_request_carries_several_frames(client, cloud, torchserve):
    clouds = [cloud(number) for number in range(8)]
    result = client.infer("second", [tensor("frame", np.array(clouds, dtype=object))])
    expected = [json.loads(answer_for(body, {})) for body in clouds]
    assert result.as_numpy("num_detections").tolist() == [len(answer["scores_3d"]) for answer in expected]
    for name in NAMES[:3]:
        assert result.as_numpy(name).tolist() == [each for answer in expected for each in answer[name]]
    assert len(torchserve.calls) == 1


def test_options_are_parameters(client, cloud):
    result = client.infer(
        "second",
        [points(cloud(1))],
        parameters={"score_thr": "0.25", "timeout_ms": 9000},
        priority=1,
        timeout=5,
    )
    assert json.loads(result.as_numpy("detections")[0])["options"] == {"load_dim": 4, "score_thr": 0.25}


def test_parts_of_a_frame_are_inputs(client, torchserve, cloud):
    torchserve.models["fusion"] = {"1.0": FakeModel(FUSION)}
    torchserve.models["faster-rcnn"] = {"1.0": FakeModel(IMAGES)}
    torchserve.models["centerpoint"] = {"1.0": FakeModel(SWEEPS)}
    pixels = np.random.default_rng(1).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    assert eventually(lambda: client.is_model_ready("fusion"))
    client.infer("faster-rcnn", [tensor("image", pixels)])
    (sent,) = torchserve.calls[-1]
    assert (cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] == pixels).all()
    client.infer("faster-rcnn", [tensor("image", np.array([sent], dtype=object))])
    assert torchserve.calls[-1] == [sent]
    inputs = [
        points(cloud(1)),
        tensor("image", np.array([sent], dtype=object)),
        tensor("calibration", np.array([b"{}"], dtype=object)),
    ]
    result = client.infer("fusion", inputs)
    parts = {"points": cloud(1), "image": sent, "calibration": b"{}"}
    assert json.loads(result.as_numpy("detections")[0])["frame"] == json.loads(answer_for(parts, {}))["frame"]


def test_typed_contents_are_the_tensor_that_raw_contents_are(client, cloud):
    values = np.frombuffer(cloud(1), np.float32)
    request = message_class("inference.ModelInferRequest")(model_name="second")
    given = request.inputs.add(name="points", datatype="FP32", shape=[16, 4])
    given.contents.fp32_contents.extend(values.tolist())
    typed = unary(client.channel, "ModelInfer", request)
    raw = client.infer("second", [points(cloud(1))]).get_response()
    assert list(typed.raw_output_contents) == list(raw.raw_output_contents)
    request = message_class("inference.ModelInferRequest")(model_name="second")
    request.inputs.add(name="frame", datatype="BYTES", shape=[1]).contents.bytes_contents.append(cloud(1))
    assert (
        list(unary(client.channel, "ModelInfer", request).raw_output_contents)[:4]
        == list(raw.raw_output_contents)[:4]
    )


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (lambda client, frame: client.infer("nobody", [frame]), "NOT_FOUND", "available: second"),
        (lambda client, frame: client.infer("second", [frame], model_version="2"), "NOT_FOUND", "'2'"),
        (lambda client, frame: client.infer("a/b", [frame]), "NOT_FOUND", "'/'"),
        (lambda client, frame: client.infer("", [frame]), "INVALID_ARGUMENT", "names no model"),
        (lambda client, frame: client.get_model_metadata("nobody"), "NOT_FOUND", "available: second"),
        (lambda client, frame: client.infer("second", []), "INVALID_ARGUMENT", "no input"),
        (
            lambda client, frame: client.infer("second", [frame], parameters={"colour": "red"}),
            "INVALID_ARGUMENT",
            "colour",
        ),
        (
            lambda client, frame: client.infer("second", [tensor("points", np.zeros((1, 5), np.float32))]),
            "INVALID_ARGUMENT",
            r"FP32 [N, 4]",
        ),
        (
            lambda client, frame: client.infer("second", [tensor("frame", np.array([b"bad!"], dtype=object))]),
            "INVALID_ARGUMENT",
            "bad frame",
        ),
        (lambda client, frame: client.get_system_shared_memory_status(), "UNIMPLEMENTED", ""),
    ],
)  # fmt: skip
def test_error_of_the_application_is_the_status_of_the_call(client, cloud, call, status, reason):
    found, message = refused(lambda: call(client, points(cloud(1))))
    assert found == status and reason in message


def test_shared_memory_is_refused(client, torchserve):
    frame = triton.InferInput("points", [1, 4], "FP32")
    frame.set_shared_memory("region", 16)
    other = tensor("calibration", np.array([b"{}"], dtype=object))
    assert refused(lambda: client.infer("second", [frame, other]))[0] == "INVALID_ARGUMENT"
    assert not torchserve.calls


def test_response_has_the_ids_and_times_of_a_response_over_http(client, cloud):
    request = message_class("inference.ModelInferRequest")(model_name="second", raw_input_contents=[cloud(1)])
    request.inputs.add(name="points", datatype="FP32", shape=[16, 4])
    stub = client.channel.unary_unary(f"/{INFERENCE}/ModelInfer")
    _, call = stub.with_call(request.SerializeToString(), metadata=[("x-request-id", "mine-7")])
    trailing = dict(call.trailing_metadata())
    assert trailing["x-request-id"] == "mine-7" and "inference;dur=" in trailing["server-timing"]


def test_deadline_of_a_call_is_that_of_its_frames(start_grpc, backend, cloud):
    client = start_grpc()
    backend.hold()
    with pytest.raises(InferenceServerException) as caught:
        client.infer("second", [points(cloud(1))], client_timeout=0.2)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    eventually(lambda: not client.gateway.admission.items)
    assert refused(lambda: client.infer("second", [points(cloud(1))], parameters={"timeout_ms": 50}))[0] == (
        "DEADLINE_EXCEEDED"
    )
    backend.release()


def test_cancelled_call_frees_its_frames(start_grpc, backend, cloud):
    client = start_grpc()
    backend.hold()
    ended = threading.Event()
    call = client.async_infer("second", [points(cloud(1))], lambda result, error: ended.set())
    eventually(lambda: client.gateway.admission.items == 1)
    call.cancel()
    eventually(lambda: not client.gateway.admission.items)
    assert ended.wait(10)
    line = (
        'mmdet3d_serve_requests_total{model="second",status="499"} 1.0'  # as a client over HTTP that hangs up
    )
    eventually(lambda: line in client.gateway.client.get("/metrics").text)
    backend.release()


def test_full_queue_is_answered_with_a_time_to_retry(start_grpc, backend, cloud):
    client = start_grpc(max_pending_frames=1, max_frames_per_request=1, client_share=1)
    backend.hold()
    waiting = client.async_infer("second", [points(cloud(1))], lambda result, error: None)
    eventually(lambda: client.gateway.admission.items == 1)
    stub = client.channel.unary_unary(f"/{INFERENCE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as caught:
        stub(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(caught.value.trailing_metadata())
    assert (trailing["error-code"], trailing["grpc-retry-pushback-ms"]) == ("overloaded", "1000")
    waiting.cancel()
    backend.release()


def test_calls_need_a_key_and_probes_do_not(start_grpc, cloud):
    client = start_grpc(api_keys=("secret",))
    assert client.is_server_live() and eventually(client.is_server_ready)
    for call in (
        lambda **given: client.infer("second", [points(cloud(1))], **given),
        lambda **given: client.get_server_metadata(**given),
        lambda **given: client.is_model_ready("second", **given),
    ):
        assert refused(call)[0] == "UNAUTHENTICATED"
        assert refused(lambda call=call: call(headers={"x-api-key": "other"}))[0] == "UNAUTHENTICATED"
        assert call(headers={"x-api-key": "secret"})
        assert call(headers={"authorization": "Bearer secret"})


def test_message_beyond_the_limits_is_refused(start_grpc, cloud):
    client = start_grpc(max_body_bytes=100_000, max_frame_bytes=50_000)
    assert refused(lambda: client.infer("second", [points(cloud(1, 4000))]))[0] == "INVALID_ARGUMENT"
    assert refused(lambda: client.infer("second", [points(cloud(1, 100_000))]))[0] == "RESOURCE_EXHAUSTED"
    assert client.infer("second", [points(cloud(1, 3000))])


def test_compressed_message_is_refused(client, cloud):
    status, _ = refused(lambda: client.infer("second", [points(bytes(64_000))], compression_algorithm="gzip"))
    assert status == "UNIMPLEMENTED"


def test_calls_are_counted(client, cloud):
    client.infer("second", [points(cloud(1))])
    refused(lambda: client.infer("nobody", [points(cloud(1))]))

    def counted() -> str:
        return client.gateway.client.get("/metrics").text

    eventually(lambda: 'grpc_calls_total{method="ModelInfer",status="NOT_FOUND"} 1.0' in counted())
    assert 'grpc_calls_total{method="ModelInfer",status="OK"} 1.0' in counted()
    assert 'mmdet3d_serve_requests_total{model="second",status="200"} 1.0' in counted()

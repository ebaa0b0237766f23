"""The Open Inference Protocol with Triton's client, and with raw requests that no client sends."""

from __future__ import annotations

import base64
import json
import struct

import cv2
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from serve.errors import ClientError
from serve.gateway.routes.kserve_codec import decode_infer
from tests.gateway.fake_torchserve import CLOUDS, FUSION, IMAGES, SWEEPS, FakeModel, answer_for
from tests.gateway.running import eventually

INFER = "/v2/models/second/infer"


@pytest.fixture
def client(start_gateway, torchserve):
    torchserve.models["faster-rcnn"] = {"1.0": FakeModel(IMAGES)}
    torchserve.models["centerpoint"] = {"1.0": FakeModel(SWEEPS)}
    gateway = start_gateway()
    eventually(lambda: gateway.client.get("/v2/health/ready").status_code == 200)
    with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as made:
        made.gateway = gateway
        yield made


def points_input(points: np.ndarray, *, binary: bool) -> triton.InferInput:
    made = triton.InferInput("points", list(points.shape), "FP32")
    made.set_data_from_numpy(points, binary_data=binary)
    return made


def test_server_and_model_metadata_are_returned(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("second") and client.is_model_ready("second", "1.0")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "mmdet3d-serve"
    found = client.get_model_metadata("second")
    assert (found["name"], found["versions"]) == ("second", ["1.0"])
    assert found["inputs"] == [{"name": "points", "datatype": "FP32", "shape": [-1, 4]}]
    assert [output["name"] for output in found["outputs"]] == [
        "bboxes_3d", "scores_3d", "labels_3d", "num_detections", "detections",
    ]  # fmt: skip
    assert client.get_model_metadata("faster-rcnn", "1.0")["inputs"][0]["name"] == "image"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer_gives_the_same_detections_as_predictions(client, cloud, binary_in, binary_out):
    points = np.frombuffer(cloud(1), np.float32).reshape(-1, 4)
    names = ["bboxes_3d", "scores_3d", "labels_3d", "num_detections", "detections"]
    result = client.infer(
        "second",
        [points_input(points, binary=binary_in)],
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in names],
        request_id="mine",
    )
    plain = client.gateway.post(content=cloud(1)).json()
    assert result.get_response()["id"] == "mine" and result.get_response()["model_version"] == "1.0"
    assert result.as_numpy("bboxes_3d").dtype == np.float32 and result.as_numpy("labels_3d").dtype == np.int64
    for name in names[:3]:
        assert result.as_numpy(name).tolist() == plain[name]
    assert result.as_numpy("num_detections").tolist() == [len(plain[names[1]])]
    answer = json.loads(result.as_numpy("detections")[0])
    assert (
        answer.pop("options") == {"load_dim": 4} and plain.pop("options") == {}
    )  # a shape declares the columns
    assert answer == plain


def test_only_requested_outputs_are_returned(client, cloud):
    points = np.frombuffer(cloud(1), np.float32).reshape(-1, 4)
    result = client.infer(
        "second", [points_input(points, binary=True)], outputs=[triton.InferRequestedOutput("scores_3d")]
    )
    assert [output["name"] for output in result.get_response()["outputs"]] == ["scores_3d"]
    with pytest.raises(InferenceServerException, match="nonsense"):
        client.infer(
            "second", [points_input(points, binary=True)], outputs=[triton.InferRequestedOutput("nonsense")]
        )


@pytest.mark.parametrize("binary", [True, False])
def test_one_request_carries_several_frames(client, cloud, torchserve, binary):
    pictures = [cv2.imencode(".png", np.full((8, 8, 3), i, np.uint8))[1].tobytes() for i in range(3)]
    frames = np.array(pictures, dtype=object)
    asked = triton.InferInput("frame", [3], "BYTES")
    if binary:
        asked.set_data_from_numpy(frames, binary_data=True)
        result = client.infer("faster-rcnn", [asked], parameters={"score_thr": 0.5})
        bodies = list(result.as_numpy("detections"))
        counts = result.as_numpy("num_detections").tolist()
    else:  # bytes that are no text travel as base64, which this client does not speak
        tensor = {
            "name": "frame", "shape": [3], "datatype": "BYTES", "parameters": {"content_type": "base64"},
            "data": [base64.b64encode(picture).decode() for picture in pictures],
        }  # fmt: skip
        document = {"inputs": [tensor], "parameters": {"score_thr": 0.5}}
        outputs = client.gateway.post("/v2/models/faster-rcnn/infer", json=document).json()["outputs"]
        bodies = outputs[-1]["data"]
        counts = outputs[-2]["data"]
    assert [json.loads(body) for body in bodies] == [
        json.loads(answer_for(picture, {"score_thr": 0.5})) for picture in pictures
    ]
    assert counts == [0, 0, 0]  # the paper model answers in three dimensions, this one is asked in two
    assert len(torchserve.calls) == 1


@pytest.mark.parametrize("binary", [True, False])
def test_detections_of_several_frames_follow_one_another_in_the_order_of_the_frames(client, cloud, binary):
    clouds = [cloud(number) for number in range(8)]
    asked = triton.InferInput("frame", [8], "BYTES")
    asked.set_data_from_numpy(np.array(clouds, dtype=object), binary_data=True)
    names = ("bboxes_3d", "scores_3d", "labels_3d")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in (*names, "num_detections")]
    result = client.infer("second", [asked], outputs=outputs)
    expected = [json.loads(answer_for(body, {})) for body in clouds]
    counts = [len(answer["scores_3d"]) for answer in expected]
    assert len(set(counts)) > 1 and counts != counts[::-1]  # else their order would not show
    assert result.as_numpy("num_detections").tolist() == counts
    for name in names:
        assert result.as_numpy(name).tolist() == [each for answer in expected for each in answer[name]]


def test_image_may_be_encoded_or_a_pixel_array(client, torchserve):
    pixels = np.random.default_rng(1).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    array = triton.InferInput("image", [8, 6, 3], "UINT8")
    array.set_data_from_numpy(pixels, binary_data=True)
    client.infer("faster-rcnn", [array])
    (sent,) = torchserve.calls[-1]
    decoded = cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[..., ::-1] == pixels).all()
    encoded = triton.InferInput("image", [1], "BYTES")
    encoded.set_data_from_numpy(np.array([sent], dtype=object), binary_data=True)
    client.infer("faster-rcnn", [encoded])
    assert torchserve.calls[-1] == [sent]


def test_empty_point_cloud_is_accepted(client, torchserve):
    client.infer("second", [points_input(np.zeros((0, 4), np.float32), binary=True)])
    assert torchserve.calls[-1] == [b""]


def test_deadline_applies_to_infer(start_gateway, backend, cloud):
    gateway = start_gateway()
    backend.hold()
    document = {"inputs": [{"name": "points", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    answer = gateway.post(INFER, json={**document, "parameters": {"timeout_ms": 50}})
    assert answer.status_code == 504 and answer.json() == {
        "error": answer.json()["error"], "code": "deadline_exceeded",
    }  # fmt: skip
    assert gateway.post(f"{INFER}?timeout_ms=50", json=document).status_code == 504


def tensor(**changes):
    return {"name": "points", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        ({}, 400, "bad_request"),
        ([], 400, "bad_request"),
        ({"inputs": []}, 400, "bad_request"),
        ({"inputs": "points"}, 400, "bad_request"),
        ({"inputs": [tensor(name="image")]}, 400, "bad_request"),
        ({"inputs": [tensor(name=5)]}, 400, "bad_request"),
        ({"inputs": [tensor(name=5), tensor(name="image")]}, 400, "bad_request"),
        ({"inputs": [tensor(shape=[1, 5], data=[1, 2, 3, 4, 5])]}, 422, "undecodable_frame"),
        ({"inputs": [tensor(shape=[4])]}, 422, "undecodable_frame"),
        ({"inputs": [tensor(datatype="FP64")]}, 422, "undecodable_frame"),
        ({"inputs": [tensor(datatype="FP99")]}, 400, "bad_request"),
        ({"inputs": [tensor(datatype="UINT8", data=[300, 0, 0, 0])]}, 400, "bad_request"),
        ({"inputs": [tensor(datatype="INT64", data=[1e300, 0, 0, 0])]}, 400, "bad_request"),
        ({"inputs": [tensor(data=[1e45, 0, 0, 0])]}, 400, "bad_request"),
        ({"inputs": [tensor(data=[1, 2, 3])]}, 400, "bad_request"),
        ({"inputs": [tensor(data=["a", "b", "c", "d"])]}, 400, "bad_request"),
        ({"inputs": [tensor(data=[[1, 2], 3, 4])]}, 400, "bad_request"),
        ({"inputs": [tensor(data=None)]}, 400, "bad_request"),
        ({"inputs": [tensor(shape=[-1, 4])]}, 400, "bad_request"),
        ({"inputs": [tensor(shape=[1 << 62, 1 << 62])]}, 400, "bad_request"),
        ({"inputs": [tensor(shape=[1e308, 4])]}, 400, "bad_request"),
        ({"inputs": [tensor(shape=["x"])]}, 400, "bad_request"),
        ({"inputs": [tensor(parameters={"binary_data_size": 16})]}, 400, "bad_request"),
        ({"inputs": [tensor(parameters=[1])]}, 400, "bad_request"),
        ({"inputs": [tensor()], "outputs": [{"name": "nonsense"}]}, 400, "bad_request"),
        ({"inputs": [tensor()], "outputs": [{"name": 5}, {"name": None}]}, 400, "bad_request"),
        ({"inputs": [tensor()], "outputs": [5]}, 400, "bad_request"),
        ({"inputs": [tensor()], "parameters": {"colour": "red"}}, 400, "unknown_option"),
        ({"inputs": [tensor()], "parameters": [1]}, 400, "bad_request"),
        ({"inputs": [tensor()], "parameters": {"score_thr": [0.5]}}, 400, "unknown_option"),
        (
            {"inputs": [{"name": "frame", "shape": [65], "datatype": "BYTES", "data": ["x"] * 65}]},
            413,
            "frame_too_large",
        ),
    ],
)
def test_invalid_infer_request_returns_a_client_error(gateway, torchserve, document, status, code):
    answer = gateway.post(INFER, json=document)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert not torchserve.calls


def test_infer_passes_over_the_parameters_of_other_servers(gateway):
    parameters = {
        "content_type": "np", "sequence_id": 1, "sequence_start": True, "sequence_end": False, "priority": 1,
        "timeout": 1000, "triton_enable_empty_final_response": True,
    }  # fmt: skip
    document = {"inputs": [tensor(parameters={"content_type": "np"})], "parameters": parameters}
    answer = gateway.post(INFER, json=document)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("length", ["x", "-1", "99999", "9" * 5000, b"\xb2", "1.5", ""])
def test_header_length_that_does_not_fit_is_rejected(gateway, length):
    body = json.dumps({"inputs": [tensor()]}).encode()
    answer = gateway.post(INFER, content=body, headers={"inference-header-content-length": length})
    assert answer.status_code == 400 and "does not fit the body" in answer.json()["error"]


def test_bytes_beyond_the_declared_tensors_are_rejected(gateway):
    head = json.dumps({"inputs": [tensor()]}).encode()
    answer = gateway.post(
        INFER, content=head + b"more", headers={"inference-header-content-length": str(len(head))}
    )
    assert answer.status_code == 400 and "4 bytes follow" in answer.json()["error"]


def test_infer_error_names_the_failed_frame(gateway):
    head = {"name": "frame", "shape": [2], "datatype": "BYTES", "data": ["good", "bad!"]}
    answer = gateway.post(INFER, json={"inputs": [head]})
    assert answer.status_code == 422 and answer.json()["error"].startswith("frame 1: bad frame")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["points", "frame", "image", "calibration", "other"]) | JSON
TENSOR = st.fixed_dictionaries(
    {"name": NAMES, "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON},
    optional={
        "datatype": st.sampled_from(["FP32", "BYTES", "UINT8", "INT64", "FP16", "BOOL"]) | JSON,
        "data": st.lists(st.floats() | st.integers() | st.text(max_size=4), max_size=8) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | JSON})
        | JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR | JSON, max_size=3) | JSON},
    optional={
        "outputs": JSON | st.lists(st.fixed_dictionaries({"name": NAMES})),
        "parameters": JSON,
        "id": JSON,
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=REQUEST | JSON, rest=st.binary(max_size=40), spec=st.sampled_from([CLOUDS, IMAGES, FUSION]))
def test_any_infer_body_decodes_or_raises_a_client_error(document, rest, spec):
    head = json.dumps(document).encode()
    for body, length in ((head, None), (head + rest, str(len(head)))):
        try:
            decode_infer(body, length, spec)
        except ClientError as error:
            assert str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(elements=st.lists(st.binary(max_size=10), max_size=4), damage=st.data())
def test_corrupted_bytes_tensor_decodes_or_raises_a_client_error(elements, damage):
    packed = bytearray(b"".join(struct.pack("<I", len(element)) + element for element in elements))
    size = len(packed)
    head = json.dumps(
        {
            "inputs": [
                {"name": "frame", "shape": [len(elements)], "datatype": "BYTES",
                 "parameters": {"binary_data_size": size}},
            ]
        }
    ).encode()  # fmt: skip
    whole = decode_infer(head + bytes(packed), str(len(head)), CLOUDS)
    assert [bytes(frame.body) for frame in whole.frames] == elements
    if packed:
        packed[damage.draw(st.integers(0, size - 1))] = damage.draw(st.integers(0, 255))
    try:
        decode_infer(head + bytes(packed), str(len(head)), CLOUDS)
    except ClientError as error:
        assert str(error)


def test_sweeps_are_optional_inputs(client):
    found = client.get_model_metadata("centerpoint")["inputs"]
    assert [entry["name"] for entry in found if not entry.get("optional")] == ["points"]
    assert [entry["name"] for entry in found if entry.get("optional")] == ["sweep.0", "sweeps"]
    points = np.arange(40, dtype=np.float32).reshape(8, 5)
    sweep = triton.InferInput("sweep.0", [8, 5], "FP32")
    sweep.set_data_from_numpy(points + 1)
    poses = json.dumps([{"time_lag_s": 0.05, "transform": np.eye(4).tolist()}])
    described = triton.InferInput("sweeps", [1], "BYTES")
    described.set_data_from_numpy(np.array([poses], dtype=object))
    inputs = [points_input(points, binary=True), sweep, described]
    answer = json.loads(client.infer("centerpoint", inputs).as_numpy("detections")[0])
    parts = {"points": points.tobytes(), "sweep.0": (points + 1).tobytes(), "sweeps": poses.encode()}
    assert answer == json.loads(answer_for(parts, {"load_dim": 5}))
    alone = client.infer("centerpoint", inputs[:1], parameters={"sweeps": "accumulated"})
    options = json.loads(alone.as_numpy("detections")[0])["options"]
    assert options == {"load_dim": 5, "sweeps": "accumulated"}
    with pytest.raises(InferenceServerException, match="sweep"):
        client.infer("second", [points_input(points[:, :4].copy(), binary=True), sweep, described])

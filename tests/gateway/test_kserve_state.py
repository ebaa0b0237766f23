"""Triton's extensions: configuration, statistics, the index of the repository; and TorchServe's ping."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.gateway.fake_torchserve import IMAGES, SWEEPS, FakeModel
from tests.gateway.running import eventually

INDEX = "/v2/repository/index"


@pytest.fixture
def client(start_gateway, torchserve):
    torchserve.models["faster-rcnn"] = {"1.0": FakeModel(dict(IMAGES))}
    torchserve.models["centerpoint"] = {"2.0": FakeModel(dict(SWEEPS))}
    gateway = start_gateway()
    with triton.InferenceServerClient(gateway.url.removeprefix("http://")) as made:
        made.gateway = gateway
        yield made


def infer(client, number: int, cloud) -> None:
    points = np.frombuffer(cloud(number), np.float32).reshape(-1, 4)
    asked = triton.InferInput("points", list(points.shape), "FP32")
    asked.set_data_from_numpy(points)
    client.infer("second", [asked])


def test_configuration_has_the_tensors_of_the_metadata(client) -> None:
    for model in ("second", "faster-rcnn", "centerpoint"):
        config, metadata = client.get_model_config(model), client.get_model_metadata(model)
        assert (config["name"], config["max_batch_size"]) == (model, 0)
        for ours, theirs in ((config["input"], metadata["inputs"]), (config["output"], metadata["outputs"])):
            assert [each["name"] for each in ours] == [each["name"] for each in theirs]
            assert [each["dims"] for each in ours] == [each["shape"] for each in theirs]
    assert client.get_model_config("second", "1.0")["input"][0]["data_type"] == "TYPE_FP32"
    assert client.get_model_config("faster-rcnn")["input"][0]["data_type"] == "TYPE_STRING"
    assert [each.get("optional") for each in client.get_model_config("centerpoint")["input"]] == [
        None,
        True,
        True,
    ]
    with pytest.raises(InferenceServerException, match="nobody"):
        client.get_model_config("nobody")


def test_statistics_count_frames_batches_and_failures(client, cloud, torchserve) -> None:
    for number in range(3):
        infer(client, number, cloud)

    def counted() -> dict:
        (found,) = client.get_inference_statistics("second")["model_stats"]
        return found

    eventually(lambda: counted()["inference_count"] == 3)
    found = counted()
    assert (found["name"], found["version"], found["execution_count"]) == ("second", "1.0", 3)
    stats = found["inference_stats"]
    assert stats["success"]["count"] == stats["queue"]["count"] == stats["compute_infer"]["count"] == 3
    assert stats["compute_infer"]["ns"] == 3 * 2_000_000  # of the fake worker
    assert stats["fail"]["count"] == 0 and stats["success"]["ns"] >= stats["queue"]["ns"] > 0
    assert (
        found["batch_stats"][0]["batch_size"] == 1 and found["batch_stats"][0]["compute_infer"]["count"] == 3
    )
    assert found["last_inference"] > 1_600_000_000_000
    torchserve.troubles.append("garbage")
    assert client.gateway.post(content=cloud(9)).status_code >= 500
    eventually(lambda: counted()["inference_stats"]["fail"]["count"] == 1)
    assert counted()["inference_count"] == 3
    assert client.gateway.post(content=b"bad!").status_code == 422
    eventually(lambda: counted()["inference_stats"]["fail"]["count"] == 2)
    assert counted()["execution_count"] == counted()["inference_stats"]["compute_infer"]["count"] == 3


def test_statistics_are_of_one_version_one_model_or_all(client) -> None:
    every = client.get_inference_statistics()["model_stats"]
    assert {each["name"] for each in every} == {"second", "faster-rcnn", "centerpoint"}
    assert len(client.get_inference_statistics("centerpoint", "2.0")["model_stats"]) == 1
    with pytest.raises(InferenceServerException):
        client.get_inference_statistics("centerpoint", "1.0")
    with pytest.raises(InferenceServerException, match="nobody"):
        client.get_inference_statistics("nobody")


def test_index_lists_models_with_their_state(client, torchserve) -> None:
    torchserve.models["slow"] = {"1.0": FakeModel(dict(IMAGES), ready=0)}
    eventually(lambda: len(client.get_model_repository_index()) == 4)
    states = {each["name"]: each["state"] for each in client.get_model_repository_index()}
    assert states["second"] == "READY" and states["slow"] == "LOADING"
    ready = client.gateway.client.post(INDEX, json={"ready": True}).json()
    assert {each["name"] for each in ready} == {"second", "faster-rcnn", "centerpoint"}


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"ready": 1}', b'{"ready": "yes"}', b"3"])
def test_index_refuses_another_body(gateway, body) -> None:
    found = gateway.client.post(INDEX, content=body)
    assert (found.status_code, found.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize("what", ["load", "unload"])
def test_models_are_not_loaded_by_request(client, torchserve, what) -> None:
    with pytest.raises(InferenceServerException) as caught:
        getattr(client, f"{what}_model")("second")
    assert caught.value.status() == "400"
    assert client.is_model_ready("second")


def test_ping_is_torchserves(gateway) -> None:
    eventually(lambda: gateway.client.get("/ping").status_code == 200)
    assert gateway.client.get("/ping").json() == {"status": "Healthy"}
    gateway.lifecycle.drain()
    found = gateway.client.get("/ping")
    assert (found.status_code, found.json()) == (503, {"status": "Unhealthy"})


def test_ping_needs_no_key(start_gateway) -> None:
    gateway = start_gateway(api_keys=("secret",))
    eventually(lambda: gateway.client.get("/ping").status_code == 200)
    assert gateway.client.get("/v2/models/second/config").status_code == 401
    assert gateway.client.post(INDEX).status_code == 401


PIXELS = np.random.default_rng(1).integers(0, 256, (8, 6, 3), dtype=np.uint8)
LAYOUTS = {
    "HWC": PIXELS,
    "1HWC": PIXELS[None],
    "CHW": PIXELS.transpose(2, 0, 1),
    "1CHW": PIXELS.transpose(2, 0, 1)[None],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("datatype", "kind"), [("UINT8", np.uint8), ("FP32", np.float32)])
@pytest.mark.parametrize("binary", [True, False])
def test_pixels_arrive_in_every_layout(client, torchserve, layout, datatype, kind, binary) -> None:
    import cv2

    pixels = np.ascontiguousarray(LAYOUTS[layout].astype(kind))
    asked = triton.InferInput("image", list(pixels.shape), datatype)
    asked.set_data_from_numpy(pixels, binary_data=binary)
    client.infer("faster-rcnn", [asked])
    (sent,) = torchserve.calls[-1]
    decoded = cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[..., ::-1] == PIXELS).all()


@pytest.mark.parametrize(
    ("pixels", "datatype"),
    [
        (np.zeros((2, 8, 6, 3), np.uint8), "UINT8"),
        (np.zeros((8, 6), np.uint8), "UINT8"),
        (np.zeros((8, 6, 4), np.uint8), "UINT8"),
        (np.zeros((0, 6, 3), np.uint8), "UINT8"),
        (np.full((8, 6, 3), 0.5, np.float32), "FP32"),
        (np.full((8, 6, 3), 256, np.float32), "FP32"),
        (np.full((8, 6, 3), -1, np.float32), "FP32"),
        (np.full((8, 6, 3), np.nan, np.float32), "FP32"),
        (np.zeros((8, 6, 3), np.int32), "INT32"),
    ],
)
def test_what_is_no_image_is_refused(client, pixels, datatype) -> None:
    asked = triton.InferInput("image", list(pixels.shape), datatype)
    asked.set_data_from_numpy(pixels)
    with pytest.raises(InferenceServerException) as raised:
        client.infer("faster-rcnn", [asked])
    assert raised.value.status() == "422"


def test_fields_are_for_predictions(client, cloud) -> None:
    found = client.gateway.client.post("/v2/models/second/infer?fields=names", json={"inputs": [
        {"name": "points", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    ]})  # fmt: skip
    assert (found.status_code, found.json()["code"]) == (400, "unknown_option")

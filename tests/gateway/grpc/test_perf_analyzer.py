"""The calls of Triton's perf_analyzer in their order, as the access log of a run with version 2.51.0 has them.

Its program is in old wheels of tritonclient only and needs libraries of CUDA, so a run of it is in docs/grpc.md and not
here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

triton_http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

from serve.gateway.grpc.messages import message_class  # noqa: E402
from tests.gateway.fake_torchserve import FakeModel  # noqa: E402
from tests.gateway.grpc.test_infer import points, unary  # noqa: E402
from tests.gateway.grpc.test_stream import Results  # noqa: E402
from tests.gateway.running import eventually  # noqa: E402


@pytest.fixture
def by_grpc(start_grpc, torchserve):
    torchserve.models = {
        "second": {"1": FakeModel()}
    }  # it looks up statistics by a version that is a whole number
    client = start_grpc()
    eventually(lambda: client.is_model_ready("second"))
    return client


def successes(statistics: Any) -> tuple[str, int, int, int]:
    """Version, successful requests, frames and batches, of Triton's messages or of their JSON."""
    (model,) = statistics["model_stats"]
    success = model["inference_stats"]["success"]
    assert {"queue", "compute_input", "compute_infer", "compute_output"} <= set(model["inference_stats"])
    counts = success["count"], model["inference_count"], model["execution_count"]
    return model["version"], *(int(count) for count in counts)


@pytest.mark.parametrize("streaming", [False, True])
def test_calls_over_grpc_are_answered_in_their_order(by_grpc, cloud, streaming):
    metadata = by_grpc.get_model_metadata("second")
    config = by_grpc.get_model_config("second").config
    assert [each.name for each in config.input] == [each.name for each in metadata.inputs]
    assert "statistics" in by_grpc.get_server_metadata().extensions
    results = Results()
    if streaming:
        by_grpc.start_stream(results)
    by_grpc.get_inference_statistics("second")
    frame = points(cloud(1))
    if streaming:
        for _ in range(3):
            by_grpc.async_stream_infer("second", [frame], enable_empty_final_response=True)
        found = [results.next() for _ in range(3)]
        assert all(error is None and len(result.as_numpy("num_detections")) == 1 for result, error in found)
    else:
        # Triton's client in Python refuses the parameter outside of streams; the one in C++ sends it.
        request = message_class("inference.ModelInferRequest")(model_name="second")
        request.inputs.add(name="points", datatype="FP32", shape=frame.shape())
        request.raw_input_contents.append(cloud(1))
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        for _ in range(3):
            assert unary(by_grpc.channel, "ModelInfer", request).outputs
    version, requests, frames, batches = successes(by_grpc.get_inference_statistics("second", as_json=True))
    assert (version, requests, frames) == ("1", 3, 3)
    assert 1 <= batches <= 3
    if streaming:
        by_grpc.stop_stream()


def test_calls_over_http_are_answered_in_their_order(by_grpc, cloud):
    client = triton_http.InferenceServerClient(by_grpc.gateway.url.removeprefix("http://"))
    try:
        metadata = client.get_model_metadata("second")
        config = client.get_model_config("second")
        assert [each["name"] for each in config["input"]] == [each["name"] for each in metadata["inputs"]]
        assert "statistics" in client.get_server_metadata()["extensions"]
        client.get_inference_statistics("second")
        frame = triton_http.InferInput("points", [16, 4], "FP32")
        frame.set_data_from_numpy(np.frombuffer(cloud(1), np.float32).reshape(-1, 4))
        wanted = [
            triton_http.InferRequestedOutput(each["name"], binary_data=True) for each in metadata["outputs"]
        ]
        for _ in range(3):
            client.infer("second", [frame], outputs=wanted)
        assert successes(client.get_inference_statistics("second"))[:3] == ("1", 3, 3)
    finally:
        client.close()

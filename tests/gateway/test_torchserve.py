"""The gateway in front of a real TorchServe, with the checksum handler and with the demo SECOND."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image

from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.management import split_url
from tests.conftest import pick_free_ports, write_archive
from tests.gateway.checksum_handler import checksum
from tests.gateway.conftest import RunningGateway, running_gateway
from tests.gateway.running import Background, eventually

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(600)]


def options(store, *models: ServedModel, **more) -> TorchServeOptions:
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    return TorchServeOptions(model_store=store, models=models, system_metrics=False, gpus=0, **ports, **more)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for name in ("checksum", "later"):
        write_archive(folder / f"{name}.mar", "tests.gateway.checksum_handler", name)
    return folder


@pytest.fixture(scope="module")
def server(archives) -> Iterator[TorchServe]:
    with TorchServe(options(archives, ServedModel("checksum.mar"))) as running:
        yield running


@pytest.fixture(scope="module", params=["directly", "through TorchServe"])
def gateway(request, server, background: Background) -> Iterator[RunningGateway]:
    urls = {"inference_url": server.inference_url, "management_url": server.management_url}
    sockets = server.worker_sockets if request.param == "directly" else None
    with running_gateway(background, **urls, worker_sockets=sockets) as running:
        eventually(lambda: running.client.get("/health/ready").status_code == 200)
        yield running


PATH = "/predictions/checksum"


def test_frames_get_their_own_answers(gateway, cloud):
    assert gateway.post(PATH, content=cloud(1)).content == checksum(cloud(1))
    many = gateway.post(PATH, files=[("data", cloud(1)), ("data", b"odd"), ("data", cloud(2))]).json()
    assert [many[0], many[2]] == [json.loads(checksum(cloud(i))) for i in (1, 2)]
    assert many[1]["error"]["code"] == "undecodable_frame"


def predictions_of(server: TorchServe) -> float:
    """How many predictions TorchServe counts."""
    text = httpx.get(f"{server.metrics_url}/metrics", trust_env=False).text
    return sum(float(count) for count in re.findall(r"^ts_inference_requests_total\{.*} (\S+)", text, re.M))


def test_batches_use_the_worker_sockets_if_configured(gateway, server, cloud, request):
    gateway.post(PATH, content=cloud(1))
    before = predictions_of(server)
    assert gateway.post(PATH, content=cloud(2)).content == checksum(cloud(2))
    assert gateway.post(PATH, files=[("data", cloud(i)) for i in range(40)]).json() == [
        json.loads(checksum(cloud(i))) for i in range(40)
    ]
    directly = "directly" in request.node.callspec.params.values()
    assert (predictions_of(server) == before) == directly


def test_hung_worker_is_replaced(archives, background, cloud):
    model = ServedModel("checksum.mar", response_timeout_s=2)
    with TorchServe(options(archives, model)) as server:
        urls = {"inference_url": server.inference_url, "management_url": server.management_url}
        limits = {"backend_timeout_s": 4.0, "worker_sockets": server.worker_sockets}
        with running_gateway(background, **urls, **limits) as gateway:
            eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
            assert gateway.post(PATH, content=cloud(1)).content == checksum(cloud(1))
            (before,) = server.workers("checksum")
            os.kill(before.pid, signal.SIGSTOP)
            assert gateway.post(PATH, content=cloud(2)).status_code == 504
            # TorchServe has the next one, misses its answer, and replaces the worker.
            eventually(lambda: gateway.post(PATH, content=cloud(3)).content == checksum(cloud(3)), 60)
            (after,) = server.workers("checksum")
            assert after.pid != before.pid


@pytest.mark.parametrize("way", ["directly", "through TorchServe"])
def test_batch_of_a_worker_in_an_endless_computation_is_answered_by_its_successor(
    archives, background, cloud, tmp_path, way
):
    model = ServedModel("checksum.mar", response_timeout_s=2)
    with TorchServe(options(archives, model, log_dir=tmp_path / "logs")) as server:
        urls = {"inference_url": server.inference_url, "management_url": server.management_url}
        sockets = server.worker_sockets if way == "directly" else None
        with running_gateway(background, **urls, worker_sockets=sockets) as gateway:
            eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
            frame = f"hang once {tmp_path / 'flag'}".encode()
            answers = gateway.post(PATH, files=[("data", cloud(1)), ("data", frame)], timeout=60).json()
            assert answers == [json.loads(checksum(cloud(1))), json.loads(checksum(frame))]
    if way == "directly":  # the worker says where it was before it goes
        log = (tmp_path / "logs" / "torchserve.log").read_text()
        assert re.search(r"Timeout .*!", log) and re.search(r"line \d+ in infer", log), log


def test_batch_of_a_dying_worker_is_answered_by_its_successor(gateway, server, cloud, tmp_path):
    (before,) = server.workers("checksum")
    frame = f"die once {tmp_path / 'flag'}".encode()
    answers = gateway.post(PATH, files=[("data", cloud(1)), ("data", frame)], timeout=60).json()
    assert answers == [json.loads(checksum(cloud(1))), json.loads(checksum(frame))]
    (after,) = server.workers("checksum")
    assert after.pid != before.pid


def test_frame_that_kills_every_worker_returns_503_and_the_service_survives(gateway, cloud):
    answer = gateway.post(PATH, content=b"die", timeout=60)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1", answer.text
    eventually(lambda: gateway.post(PATH, content=cloud(1), timeout=60).status_code == 200, 60)


def test_neighbours_of_a_frame_that_kills_every_worker_are_answered(gateway, cloud):
    files = [("data", cloud(1)), ("data", b"die"), ("data", cloud(2))]
    first, second, third = gateway.post(f"{PATH}?timeout_ms=100000", files=files, timeout=100).json()
    assert [first, third] == [json.loads(checksum(cloud(i))) for i in (1, 2)]
    assert second["error"]["code"] == "not_ready"


def test_batch_out_of_memory_is_split(gateway, cloud):
    # The test before may have ended the workers, and until one is back requests are refused.
    eventually(lambda: gateway.post(PATH, content=cloud(1), timeout=60).status_code == 200, 60)
    files = [("data", cloud(1)), ("data", b"too large"), ("data", cloud(2)), ("data", b"too large alone")]
    answers = gateway.post(PATH, files=files, timeout=60).json()
    assert [entry.get("error", {}).get("code") for entry in answers] == [None, None, None, "out_of_memory"]
    assert gateway.post(PATH, content=b"too large alone").status_code == 507


def test_changes_through_the_management_api_are_noticed(gateway, server, cloud):
    assert gateway.post("/predictions/later", content=cloud(1)).status_code == 404
    server.register(ServedModel("later.mar"))
    eventually(lambda: gateway.post("/predictions/later", content=cloud(1), timeout=60).status_code == 200)
    base, management = split_url(server.management_url)
    with httpx.Client(transport=httpx.HTTPTransport(uds=management)) as client:
        assert client.put(f"{base}/models/later?min_worker=2&max_worker=2").is_success

    def workers() -> dict[str, int]:
        return gateway.client.get("/models/later").json()[0]["workers"]

    eventually(lambda: workers() == {"ready": 2, "all": 2}, 60)
    server.unregister("later")
    eventually(lambda: gateway.post("/predictions/later", content=cloud(1)).status_code == 404)


def test_torchserve_with_token_authorization_is_supported(archives, background, cloud):
    with TorchServe(options(archives, ServedModel("checksum.mar"), token_authorization=True)) as server:
        assert server.run_dir is not None
        keys = server.run_dir / "key_file.json"
        urls = {"inference_url": server.inference_url, "management_url": server.management_url}
        with running_gateway(background, **urls, backend_key_file=keys) as gateway:
            eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
            assert gateway.post(PATH, content=cloud(1)).content == checksum(cloud(1))
            # New tokens, as operators make them: the gateway finds out by being refused.
            before = json.loads(keys.read_text())
            authority = {"Authorization": f"Bearer {before['API']['key']}"}
            for use in ("inference", "management"):
                made = httpx.get(
                    f"{server.management_url}/token", params={"type": use}, headers=authority, trust_env=False
                )
                assert made.status_code == 200, made.text
            assert json.loads(keys.read_text()) != before
            eventually(lambda: gateway.post(PATH, content=cloud(2)).content == checksum(cloud(2)))
            eventually(lambda: gateway.client.get("/health/ready").status_code == 200)


@pytest.fixture(scope="module")
def second(demo_mar, tmp_path_factory, background) -> Iterator[tuple[RunningGateway, TorchServe]]:
    store = tmp_path_factory.mktemp("second")
    shutil.copy(demo_mar, store)
    with TorchServe(options(store, ServedModel("second.mar"))) as server:
        urls = {"inference_url": server.inference_url, "management_url": server.management_url}
        with running_gateway(background, **urls, worker_sockets=server.worker_sockets) as running:
            eventually(lambda: running.client.get("/health/ready").status_code == 200, 30)
            running.client.timeout = 60
            yield running, server


@pytest.fixture(scope="module")
def street() -> bytes:
    from serve.synthetic.scenes import sample_frame

    return sample_frame()


def test_demo_model_answers_the_same_with_and_without_the_gateway(second, street):
    gateway, server = second
    direct = httpx.post(
        f"{server.inference_url}/predictions/second", content=street, timeout=60, trust_env=False
    )
    through = gateway.post(content=street)
    assert through.status_code == direct.status_code == 200
    assert through.content == direct.content and len(through.json()["scores_3d"]) > 1
    best = gateway.post("/predictions/second?max_detections=1&score_thr=0.1", content=street).json()
    assert best["bboxes_3d"] == direct.json()["bboxes_3d"][:1]


def test_triton_client_runs_the_demo_model(second, street):
    gateway, _ = second
    points = np.frombuffer(street, np.float32).reshape(-1, 4)
    plain = gateway.post(content=street).json()
    with triton.InferenceServerClient(gateway.url.removeprefix("http://"), network_timeout=60) as client:
        assert client.is_server_ready() and client.is_model_ready("second")
        asked = triton.InferInput("points", list(points.shape), "FP32")
        asked.set_data_from_numpy(points)
        result = client.infer("second", [asked])
        frames = triton.InferInput("frame", [2], "BYTES")
        frames.set_data_from_numpy(np.array([street, street[: 16 * 5000]], dtype=object))
        several = client.infer("second", [frames])
    print(
        f"tritonclient: {len(result.as_numpy('scores_3d'))} boxes, best {result.as_numpy('scores_3d')[0]:.3f}"
    )
    assert np.array_equal(result.as_numpy("bboxes_3d"), np.array(plain["bboxes_3d"], np.float32))
    assert np.array_equal(result.as_numpy("scores_3d"), np.array(plain["scores_3d"], np.float32))
    assert result.as_numpy("labels_3d").tolist() == plain["labels_3d"]
    counts = several.as_numpy("num_detections")
    assert counts[0] == len(plain["scores_3d"]) and counts.sum() == len(several.as_numpy("scores_3d"))


def test_gateway_passes_the_handlers_errors_through(second, street):
    gateway, server = second
    for body, status, code in (
        (street[:-3], 422, "undecodable_frame"),
        (b"", 422, "undecodable_frame"),
        (b"just some text", 422, "undecodable_frame"),
        (np.full((10, 4), np.nan, np.float32).tobytes(), 422, "non_finite_points"),
    ):
        answer = gateway.post(content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert gateway.post(content=street).status_code == 200
    assert len(server.workers("second")) == 1


def test_demo_model_answers_with_a_png(second, street):
    gateway, _ = second
    answer = gateway.post(content=street, headers={"accept": "image/png"})
    assert Image.open(io.BytesIO(answer.content)).size == (1200, 900)

"""Models registered, changed and removed at run time; health, metrics and API documentation."""

from __future__ import annotations

import re
import threading

import pytest

from serve.gateway.metrics import DEPRECATED_NAMES
from tests.gateway.fake_torchserve import CLOUDS, FakeModel
from tests.gateway.running import eventually


def ready(gateway) -> bool:
    return gateway.client.get("/health/ready").status_code == 200


def test_model_registered_at_run_time_is_served(gateway, torchserve, cloud):
    assert gateway.post("/predictions/pillars", content=cloud(1)).status_code == 404
    torchserve.models["pillars"] = {"2.0": FakeModel()}
    eventually(lambda: gateway.post("/predictions/pillars", content=cloud(1)).status_code == 200, 2.0)
    listed = {(entry["name"], entry["version"]): entry for entry in gateway.client.get("/models").json()}
    assert set(listed) == {("second", "1.0"), ("pillars", "2.0")}


def test_model_removed_at_run_time_returns_404(gateway, torchserve, cloud):
    torchserve.models["pillars"] = {"1.0": FakeModel()}
    eventually(lambda: gateway.post("/predictions/pillars", content=cloud(1)).status_code == 200)
    del torchserve.models["pillars"]
    eventually(lambda: gateway.post("/predictions/pillars", content=cloud(1)).status_code == 404, 3.0)
    assert gateway.client.get("/models/pillars").status_code == 404
    assert ready(gateway)


def test_new_default_version_is_used(gateway, torchserve, cloud):
    versions = torchserve.models["second"]
    versions["2.0"] = FakeModel(workers=[5], default=False)
    eventually(lambda: gateway.post("/predictions/second/2.0", content=cloud(1)).status_code == 200)
    versions["1.0"].default, versions["2.0"].default = False, True

    def defaults():
        found = gateway.client.get("/models/second").json()
        return [entry["version"] for entry in found if entry["default"]]

    eventually(lambda: defaults() == ["2.0"], 3.0)
    del versions["1.0"]
    eventually(lambda: len(gateway.client.get("/models/second").json()) == 1)
    assert gateway.post(content=cloud(1)).status_code == 200
    assert gateway.post("/predictions/second/1.0", content=cloud(1)).status_code == 404


def test_concurrent_batches_match_the_number_of_ready_workers(start_gateway, backend, cloud):
    gateway = start_gateway(batch_frames=1, prefetch_batches=0)
    backend.hold()
    threads = [threading.Thread(target=gateway.post, kwargs={"content": cloud(i)}) for i in range(6)]
    for thread in threads:
        thread.start()
    eventually(lambda: gateway.admission.items == 6)
    eventually(lambda: backend.app.held == 1)
    backend.app.models["second"]["1.0"].workers = [4711, 2, 3]
    eventually(lambda: gateway.client.get("/models").json()[0]["workers"]["ready"] == 3)
    eventually(lambda: backend.app.held == 3)
    shown = gateway.client.get("/models").json()[0]
    assert (shown["running"], shown["waiting"]) == (3, 3)
    backend.release()
    for thread in threads:
        thread.join()


def test_model_with_starting_workers_returns_503_until_one_is_ready(start_gateway, torchserve, cloud):
    model = torchserve.models["second"]["1.0"]
    model.ready = 0
    gateway = start_gateway()
    answer = gateway.post(content=cloud(1))
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
    assert gateway.client.get("/v2/models/second/ready").status_code == 503
    assert not ready(gateway) and gateway.client.get("/models").json()[0]["status"] == "loading"
    model.ready = 1
    eventually(lambda: ready(gateway), 2.0)
    assert gateway.post(content=cloud(1)).status_code == 200
    assert gateway.client.get("/v2/models/second/ready").json() == {"name": "second", "ready": True}
    model.ready = 0
    eventually(lambda: not ready(gateway), 2.0)
    assert gateway.client.get("/v2/models/second/ready").status_code == 503


def test_replaced_model_of_the_same_name_is_described_again(gateway, torchserve, cloud):
    eventually(lambda: ready(gateway))
    torchserve.models["second"]["1.0"] = FakeModel({**CLOUDS, "load_dim": 5}, workers=[99])
    eventually(lambda: gateway.client.get("/models").json()[0]["load_dim"] == 5)


def test_readiness_requires_the_configured_models(start_gateway, torchserve):
    gateway = start_gateway(require_models=("second", "pillars"))
    eventually(
        lambda: gateway.client.get("/health/ready").json()["reasons"] == ["model pillars is not ready"]
    )
    torchserve.models["pillars"] = {"1.0": FakeModel()}
    eventually(lambda: ready(gateway))


def test_gateway_without_models_is_not_ready(start_gateway, torchserve):
    torchserve.models.clear()
    gateway = start_gateway()
    assert gateway.client.get("/health/ready").json() == {
        "ready": False,
        "reasons": ["no model is registered"],
    }
    assert gateway.client.get("/models").json() == []


def test_draining_gateway_is_live_and_answers_but_is_not_ready(gateway, cloud):
    eventually(lambda: ready(gateway))
    gateway.lifecycle.drain()
    assert gateway.client.get("/health/ready").json()["reasons"] == ["draining"]
    assert gateway.client.get("/v2/health/ready").status_code == 503
    assert gateway.client.get("/health/live").json()["live"] is True
    assert gateway.post(content=cloud(1)).status_code == 200


def test_idle_gateway_sends_no_requests_to_torchserve(gateway, torchserve, cloud, background):
    eventually(lambda: ready(gateway))
    gateway.post(content=cloud(1))
    before = torchserve.looks
    background.call(_quiet_for(1.5))
    assert torchserve.looks == before


async def _quiet_for(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)  # longer than MAX_AGE_S: nothing must happen meanwhile


def metrics(gateway) -> dict[str, float]:
    text = gateway.client.get("/metrics").text
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line and not line.startswith("#")
    }


def test_metrics_count_requests_batches_and_pending_frames(gateway, backend, cloud):
    before = metrics(gateway)
    assert gateway.post(files=[("data", cloud(i)) for i in range(3)]).status_code == 200
    gateway.post(content=b"bad!")
    backend.hold()
    thread = threading.Thread(target=gateway.post, kwargs={"content": cloud(1)})
    thread.start()
    eventually(lambda: backend.app.held == 1)
    found = metrics(gateway)
    assert found["mmdet3d_serve_pending_frames"] == 1 and found["mmdet3d_serve_pending_bytes"] == len(
        cloud(1)
    )
    assert 0 < found["mmdet3d_serve_pending_ratio"] < 0.1
    backend.release()
    thread.join()
    after = metrics(gateway)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('mmdet3d_serve_requests_total{model="second",status="200"}') == 2
    assert grown('mmdet3d_serve_requests_total{model="second",status="422"}') == 1
    assert grown('mmdet3d_serve_batch_frames_count{model="second"}') == 3
    assert grown('mmdet3d_serve_batch_frames_sum{model="second"}') == 5
    assert grown('mmdet3d_serve_batch_cost_sum{model="second"}') == 3 * 16 + 1 + 16
    assert grown('mmdet3d_serve_queue_duration_seconds_count{model="second"}') == 5
    assert grown('mmdet3d_serve_batch_duration_seconds_count{model="second"}') == 3
    assert after["mmdet3d_serve_pending_frames"] == after["mmdet3d_serve_pending_bytes"] == 0


@pytest.mark.parametrize(("old", "new"), DEPRECATED_NAMES.items())
def test_renamed_metric_is_exported_under_its_old_name_too(gateway, cloud, old, new):
    gateway.post(content=cloud(1))
    found = metrics(gateway)
    labels = '{model="second"}'
    assert found[f"{old}_count{labels}"] == found[f"{new}_count{labels}"] > 0
    assert found[f"{old}_sum{labels}"] == found[f"{new}_sum{labels}"]
    assert f"# HELP {old} Deprecated: use {new}" in gateway.client.get("/metrics").text


def test_unknown_model_names_create_no_metric_labels(gateway, cloud):
    gateway.post("/predictions/nobody", content=b"")
    before = set(metrics(gateway))
    for i in range(10):
        assert gateway.post(f"/predictions/nobody-{i}", content=b"").status_code == 404
        assert gateway.client.get(f"/nowhere/{i}").status_code == 404
    grown = set(metrics(gateway)) - before
    # The first look at the metrics themselves is a 200 without a model.
    assert {name.partition("{")[2] for name in grown} <= {'model="",status="200"}'}


def test_metrics_count_failed_batches(gateway, torchserve, cloud):
    torchserve.troubles.append("garbage")
    gateway.post(content=cloud(1))
    assert metrics(gateway)['mmdet3d_serve_failed_batches_total{model="second"}'] == 1


def test_api_documentation_is_served(gateway):
    assert "swagger" in gateway.client.get("/docs").text.lower()
    document = gateway.client.get("/openapi.json").json()
    assert {"/predictions/{model}", "/v2/models/{model}/infer", "/health/ready"} <= set(document["paths"])
    assert re.fullmatch(r"\d+\.\d+.*", gateway.client.get("/health/live").json()["version"])


def test_unknown_route_returns_the_common_error_body(gateway):
    missing = gateway.client.get("/nowhere")
    assert missing.status_code == 404 and set(missing.json()["error"]) == {"code", "message", "request_id"}
    wrong = gateway.client.delete("/predictions/second")
    assert wrong.status_code == 405 and wrong.headers["allow"] in ("POST", "PUT", "POST, PUT")

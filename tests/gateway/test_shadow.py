"""Shadow traffic: counted as `compare` counts, and without an effect on any answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.compare.changes import find_changes
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.shadow import compare_bodies
from serve.gateway.shadow_metrics import MAX_CLASSES, OTHER, ShadowMetrics
from serve.protocol.options import FrameOptions
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import CLOUDS, FakeModel, FakeTorchServe, answer_for
from tests.gateway.running import Background, eventually
from tests.gateway.test_canary import ready, sample

Start = Callable[..., RunningGateway]
Cloud = Callable[[int], bytes]
PATH = "/predictions/second/1.0"


def keep_first(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without all detections but the first, which has a lower score and is half a metre off."""
    cut = {name: answer[name][:1] for name in ("bboxes_3d", "scores_3d", "labels_3d", "names")}
    x, *rest = cut["bboxes_3d"][0]
    return {**answer, **cut, "bboxes_3d": [[x + 0.5, *rest]], "scores_3d": [cut["scores_3d"][0] - 0.1]}


@pytest.fixture
def second(torchserve: FakeTorchServe) -> FakeModel:
    torchserve.models["second"]["2.0"] = made = FakeModel(workers=[4712], default=False)
    return made


def changes_of(gateway: RunningGateway, change: str, **labels: str) -> float:
    return sample(gateway, "shadow_detections_total", change=change, **labels)


def compared(gateway: RunningGateway) -> float:
    return sample(gateway, "shadow_frames_total", model="second", version="1.0", shadow="2.0")


def dropped(gateway: RunningGateway, reason: str) -> float:
    return sample(gateway, "shadow_dropped_frames_total", shadow="2.0", reason=reason)


def failed(gateway: RunningGateway, reason: str) -> float:
    return sample(gateway, "shadow_failures_total", shadow="2.0", reason=reason)


def test_an_equal_version_loses_nothing(start_gateway: Start, second: FakeModel, cloud: Cloud) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    for k in range(5):
        assert gateway.post(content=cloud(k)).content == answer_for(cloud(k), {})
    eventually(lambda: compared(gateway) == 5)
    expected = sum(len(json.loads(answer_for(cloud(k), {}))["names"]) for k in range(5))
    assert changes_of(gateway, "matched") == expected
    assert not any(changes_of(gateway, kind) for kind in ("lost", "new", "renamed"))
    assert sample(gateway, "shadow_score_shift_bucket", le="0.0") == expected
    assert sample(gateway, "shadow_moved_meters_bucket", le="0.0") == expected
    shares = {each["version"]: each.get("shadow_share") for each in gateway.client.get("/models").json()}
    assert shares == {"1.0": None, "2.0": 1.0}


def test_metrics_of_a_shadow_count_from_0_before_it_has_a_frame(
    start_gateway: Start, second: FakeModel
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1,second:3.0=1"))
    shown = [
        each
        for family in text_string_to_metric_families(gateway.client.get("/metrics").text)
        for each in family.samples
        if each.name.startswith("mmdet3d_serve_shadow_") and each.name.endswith("_total")
    ]
    assert shown and not any(each.value for each in shown)
    assert {(each.labels["version"], each.labels["shadow"]) for each in shown} == {("1.0", "2.0")}
    detections = [each.labels for each in shown if each.name.endswith("detections_total")]
    assert {(each["class"], each["change"]) for each in detections} >= {
        ("Car", "new"),
        ("Pedestrian", "lost"),
    }
    assert "not_ready" in {each.labels.get("reason") for each in shown}


def test_what_changed_is_counted_as_compare_counts_it(
    start_gateway: Start, second: FakeModel, cloud: Cloud
) -> None:
    second.alter = keep_first
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    for k in range(6):
        assert gateway.post(content=cloud(k)).content == answer_for(cloud(k), {})
    eventually(lambda: compared(gateway) == 6)
    classes = {"classes": CLOUDS["classes"]}  # of the model, in place of numbers of labels
    answers = [{**json.loads(answer_for(cloud(k), {})), **classes} for k in range(6)]
    changes = [each for answer in answers for each in find_changes(answer, keep_first(answer))]
    for kind in ("matched", "renamed", "lost", "new"):
        for name in ("Car", "Pedestrian"):
            expected = sum((each.kind, each.name) == (kind, name) for each in changes)
            assert changes_of(gateway, kind, **{"class": name}) == expected, (kind, name)
    assert changes_of(gateway, "lost")
    pairs = [each for each in changes if each.kind == "matched"]
    before, after = (sample(gateway, "shadow_paired_scores_total", side=side) for side in ("before", "after"))
    assert after - before == pytest.approx(sum(each.score_shift for each in pairs))
    assert sample(gateway, "shadow_moved_meters_sum") == pytest.approx(sum(each.moved for each in pairs))


def test_frames_of_every_protocol_are_compared(start_gateway: Start, second: FakeModel, cloud: Cloud) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    gateway.post(content=cloud(1))
    gateway.post(files=[("data", cloud(k)) for k in range(3)])
    gateway.post(files=[("data", cloud(k)) for k in range(3)], headers={"accept": "application/x-ndjson"})
    points = {"name": "points", "datatype": "FP32", "shape": [16, 4], "data": [0.5] * 64}
    assert gateway.post("/v2/models/second/infer", json={"inputs": [points]}).status_code == 200
    eventually(lambda: compared(gateway) == 8)


def test_a_share_of_the_frames_is_chosen_always_in_the_same_way(
    start_gateway: Start, second: FakeModel, cloud: Cloud
) -> None:
    for _ in range(2):
        gateway = ready(start_gateway(shadow="second:2.0=0.25", shadow_frames=64))
        gateway.post(files=[("data", cloud(k)) for k in range(60)])
        drained(gateway)
        assert compared(gateway) == 15


def drained(gateway: RunningGateway) -> None:
    eventually(lambda: compared(gateway) and not shadows(gateway))


def shadows(gateway: RunningGateway) -> int:
    """Frames on their way to shadows."""
    inner: Any = gateway.listening._server.config.app
    while not hasattr(inner, "state"):
        inner = getattr(inner, "_app", None) or inner.app
    pending: int = inner.state.shadow.pending
    return pending


def test_a_shadow_that_hangs_holds_up_nothing_and_what_waits_is_bounded(
    start_gateway: Start, background: Background, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(
        start_gateway(shadow="second:2.0=1", shadow_frames=3, shadow_wait_s=0.5, stall_timeout_s=0.05)
    )
    second.gate = background.call(_gate())
    answer = gateway.post(files=[("data", cloud(k)) for k in range(8)])
    assert answer.status_code == 200 and all("frame" in each for each in answer.json())
    eventually(lambda: shadows(gateway))
    assert shadows(gateway) <= 3
    assert gateway.client.get("/health/ready").status_code == 200
    eventually(lambda: shadows(gateway) == 1)  # the others have waited long enough
    assert dropped(gateway, "busy") == 7 and second.calls == [1]
    background.soon(second.gate.set)
    eventually(lambda: compared(gateway) == 1)


def test_a_shadow_that_hangs_takes_nothing_from_another_one(
    start_gateway: Start, background: Background, torchserve: FakeTorchServe, second: FakeModel, cloud: Cloud
) -> None:
    torchserve.models["second"]["3.0"] = FakeModel(workers=[4713], default=False)
    gateway = start_gateway(shadow="second:2.0=1,second:3.0=1", shadow_frames=4, shadow_wait_s=20)
    eventually(lambda: [each["status"] for each in gateway.client.get("/models").json()] == ["ready"] * 3)
    second.gate = background.call(_gate())

    def has_compared(frames: int) -> bool:
        return sample(gateway, "shadow_frames_total", shadow="3.0") == frames

    for k in range(6):
        gateway.post(content=cloud(k))
        eventually(partial(has_compared, k + 1))
    assert dropped(gateway, "busy") == 4 and shadows(gateway) == 2
    background.soon(second.gate.set)
    eventually(lambda: compared(gateway) == 2)


async def _gate() -> asyncio.Event:
    return asyncio.Event()


def test_bytes_on_their_way_are_bounded(
    start_gateway: Start, background: Background, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1", shadow_bytes=100))
    assert gateway.post(content=cloud(1)).status_code == 200
    eventually(lambda: dropped(gateway, "busy") == 1)
    assert not second.calls


def test_requests_for_the_shadows_version_go_before_its_shadows(
    start_gateway: Start, background: Background, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    second.gate = background.call(_gate())
    gateway.post(content=cloud(0))
    eventually(lambda: second.calls == [1])
    for k in range(4):
        gateway.post(content=cloud(k))
    answers: list[httpx.Response] = []
    real = threading.Thread(
        target=lambda: answers.append(
            gateway.post("/predictions/second/2.0", files=[("data", cloud(k)) for k in range(2)])
        )
    )
    real.start()
    batcher = gateway.registry.versions("second")[1].batcher
    assert batcher is not None
    eventually(lambda: batcher.waiting == 2)
    background.soon(second.gate.set)
    real.join()
    assert answers[0].status_code == 200
    eventually(lambda: compared(gateway) == 5)
    assert second.calls == [1, 2, 1, 1, 1, 1]
    assert sample(gateway, "batch_frames_count", model="second") == 6  # no shadow among them


@pytest.mark.parametrize(("trouble", "code"), [("worker died", "not_ready"), ("garbage", "backend_broken")])
def test_a_shadow_that_fails_is_counted_and_changes_no_answer(
    start_gateway: Start, second: FakeModel, cloud: Cloud, trouble: str, code: str
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    second.trouble = trouble
    assert gateway.post(content=cloud(1)).content == answer_for(cloud(1), {})
    eventually(lambda: failed(gateway, code) == 1)
    assert not compared(gateway)


def test_what_cannot_be_compared_is_not_sent(
    start_gateway: Start, torchserve: FakeTorchServe, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1,second:3.0=1"))
    assert gateway.post(content=b"bad!").status_code == 422
    eventually(lambda: dropped(gateway, "unanswered") == 1)
    gateway.post(content=cloud(1), params={"fields": "names,classes"})
    eventually(lambda: dropped(gateway, "options") == 1)
    assert not second.calls
    assert sample(gateway, "shadow_dropped_frames_total", shadow="3.0", reason="not_ready") == 0
    gateway.post(content=cloud(1))
    eventually(lambda: sample(gateway, "shadow_dropped_frames_total", shadow="3.0", reason="not_ready") == 1)


def test_a_gateway_that_drains_sends_no_shadows(
    start_gateway: Start, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1"))
    lifecycle: Lifecycle = gateway.lifecycle
    lifecycle.drain()
    assert gateway.post(content=cloud(1)).status_code == 200
    eventually(lambda: dropped(gateway, "draining") == 1)


def test_a_gateway_that_is_half_full_sends_no_shadows(
    start_gateway: Start, background: Background, torchserve: FakeTorchServe, second: FakeModel, cloud: Cloud
) -> None:
    gateway = ready(start_gateway(shadow="second:2.0=1", max_pending_frames=64))
    permit = gateway.admission.permit("somebody")
    background.soon(lambda: permit.grow(items=33))
    assert gateway.post(content=cloud(1)).status_code == 200
    eventually(lambda: dropped(gateway, "busy") == 1)
    background.soon(permit.release)


# Comparison of two answers


def answer(*detections: tuple[str, float, float], **more: Any) -> bytes:
    """An answer with boxes of (class, x, score)."""
    classes = ["Car", "Pedestrian"]
    return orjson.dumps(
        {
            "bboxes_3d": [[x, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0] for _, x, _ in detections],
            "scores_3d": [score for _, _, score in detections],
            "labels_3d": [classes.index(name) for name, _, _ in detections],
            "classes": classes,
            **more,
        }
    )


def kinds(before: bytes, after: bytes, **options: Any) -> list[str]:
    return [each.kind for each in compare_bodies(before, after, FrameOptions(**options))]


def test_a_score_that_crosses_the_threshold_is_a_shift_unless_the_client_cut_it_off() -> None:
    before, after = answer(("Car", 1.0, 0.31)), answer(("Car", 1.0, 0.29))
    assert kinds(before, after) == ["matched"]
    # A client that asked for 0.3 never saw the partner: only what would show counts.
    assert kinds(before, answer(), score_thr=0.3) == []
    assert kinds(answer(("Car", 1.0, 0.7)), answer(), score_thr=0.3) == ["lost"]
    assert kinds(answer(("Car", 1.0, 0.7)), answer(("Car", 1.0, 0.4)), score_thr=0.3) == ["matched"]
    assert kinds(answer(("Car", 1.0, 0.7)), answer(), class_thr=(("Pedestrian", 0.45),)) == []


def test_what_lies_beyond_the_best_few_is_not_lost() -> None:
    before = answer(("Car", 1.0, 0.9), ("Car", 20.0, 0.5))
    after = answer(("Car", 1.0, 0.9), ("Car", 40.0, 0.5))
    assert sorted(kinds(before, after)) == ["lost", "matched", "new"]
    with pytest.raises(Exception, match="options"):
        kinds(answer(("Car", 1.0, 0.9)), answer(("Car", 40.0, 0.9)), max_detections=1)


def test_answers_with_labels_are_not_compared() -> None:
    with pytest.raises(Exception, match="no_boxes"):
        kinds(b'{"pts_semantic_mask": {}}', b'{"pts_semantic_mask": {}}')


def test_what_fields_left_out_is_known_of_the_models() -> None:
    def of_fields(z: float) -> bytes:
        return orjson.dumps({"bboxes_3d": [[1.0, 1.5, z, 4, 2, 2, 0]], "scores_3d": [0.9], "labels_3d": [1]})

    spec = {"box_type_3d": "Camera", "classes": ["Car", "Pedestrian"]}
    found = compare_bodies(of_fields(10.0), of_fields(30.0), FrameOptions(), (spec, spec))
    assert sorted((change.kind, change.name) for change in found) == [
        ("lost", "Pedestrian"),
        ("new", "Pedestrian"),
    ]


def test_an_answer_of_thousands_of_boxes_is_not_compared() -> None:
    weak = [("Car", 10.0 * k, 0.01) for k in range(2001)]
    assert kinds(answer(("Car", 1.0, 0.9), *weak), answer(("Car", 1.0, 0.9))) == ["matched"]
    strong = [(name, x, 0.9) for name, x, _ in weak]
    with pytest.raises(Exception, match="many_boxes"):
        kinds(answer(("Car", 1.0, 0.9)), answer(*strong))


def test_labels_of_classes_are_bounded() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    metrics = ShadowMetrics(registry)
    names = [f"class {k}" for k in range(MAX_CLASSES + 5)]
    boxes = {
        "bboxes": [[10.0 * k, 0.0, 10.0 * k + 5, 5.0] for k in range(len(names))],
        "scores": [0.9] * len(names),
        "labels": list(range(len(names))),
        "classes": names,
    }
    changes = find_changes(boxes, boxes)
    metrics.show_pair(("m", "1", "2"), names)  # which of them occur is not known yet
    metrics.observe_changes(("m", "1", "2"), changes)
    text = generate_latest(registry).decode()
    assert text.count("mmdet3d_serve_shadow_detections_total{") == MAX_CLASSES + 1
    assert f'class="{OTHER}"' in text and "shadow_iou_loss_ratio_count" in text

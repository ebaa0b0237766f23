"""What models see as metrics: counts of workers added up, windows, references recorded or learned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.models import ModelVersion
from serve.gateway.siblings import merge_metrics
from serve.gateway.watching import ModelWatch, Watching, WatchOptions
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.torchserve.management import ModelState
from serve.watch.reference import Recording, Reference, reference_of
from serve.watch.statistics import CLASS, MAX_CLASSES, OTHER, SEGMENT, Counts, Layout
from tests.gateway.conftest import RunningGateway
from tests.gateway.fake_torchserve import CLOUDS, FakeTorchServe, answer_for
from tests.gateway.running import eventually

LAYOUT = Layout.of_classes(CLOUDS["classes"])  # type: ignore[arg-type]
RECORDING = Recording("2026-11-28T20:00:00+00:00", "s3://bucket/val", 20)
OPTIONS = WatchOptions(window_s=120.0, window_frames=20, learn_frames=80)


def counted(frames: int, score: float = 0.5, label: int = 0, seed: int = 0) -> Counts:
    """Counts of frames with some detections about a score."""
    rng = np.random.default_rng(seed)
    counts = LAYOUT.empty()
    counts.frames = frames
    counts.add_values("score", np.clip(rng.normal(score, 0.1, 10 * frames), 0.1, 1))
    counts.of(CLASS)[label] += 10 * frames
    counts.add_warnings({"no_intensity": 1})
    return counts


def recorded() -> Reference:
    return reference_of([counted(1, seed=k) for k in range(100)], 0.3, 20, RECORDING)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels, in the order of the names of labels."""
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


MODEL = ("model=second", "version=1.0")


def test_counts_of_workers_are_in_the_metrics_and_answers_are_as_ever(
    start_gateway: Callable[..., RunningGateway], torchserve: FakeTorchServe, cloud: Callable[[int], bytes]
) -> None:
    torchserve.observed = counted(3).document()
    gateway = start_gateway()
    body = pack_frames([(cloud(k), {"fields": ["names"], "score_thr": 0.9}) for k in range(3)])
    for accept in ("application/json", "application/x-ndjson", "application/x-msgpack"):
        answer = gateway.post(content=body, headers={"content-type": FRAMES_CONTENT_TYPE, "accept": accept})
        assert answer.status_code == 200
    calls = len(torchserve.calls)
    eventually(
        lambda: (
            samples(gateway.client.get("/metrics").text).get(("mmdet3d_serve_watched_frames_total", *MODEL))
            == 3 * calls
        )
    )
    found = samples(gateway.client.get("/metrics").text)
    assert found["mmdet3d_serve_detection_score_bucket", "le=+Inf", *MODEL] == 30 * calls
    assert found["mmdet3d_serve_detection_score_count", *MODEL] == 30 * calls
    assert found["mmdet3d_serve_detection_score_sum", *MODEL] == pytest.approx(
        calls * counted(3).sums["score"]
    )
    assert found["mmdet3d_serve_detections_total", "class=Car", *MODEL] == 30 * calls
    assert found["mmdet3d_serve_detections_total", "class=Pedestrian", *MODEL] == 0
    assert found["mmdet3d_serve_frame_warnings_total", "code=no_intensity", *MODEL] == calls
    assert found["mmdet3d_serve_drift_learning", *MODEL] == 1
    assert gateway.post(content=cloud(7)).content == answer_for(cloud(7), {})


@pytest.mark.parametrize("observed", [{"frames": "many"}, {}, {"frames": 1, "statistics": {"score": 3}}])
def test_counts_that_are_malformed_change_no_answer(
    start_gateway: Callable[..., RunningGateway],
    torchserve: FakeTorchServe,
    cloud: Callable[[int], bytes],
    observed: dict[str, Any],
) -> None:
    torchserve.observed = observed
    gateway = start_gateway()
    for k in range(2):
        assert gateway.post(content=cloud(k)).content == answer_for(cloud(k), {})
    assert gateway.client.get("/metrics").status_code == 200


def test_the_reference_of_an_archive_is_compared_and_models_show_its_frames_only(
    start_gateway: Callable[..., RunningGateway], torchserve: FakeTorchServe, cloud: Callable[[int], bytes]
) -> None:
    torchserve.models["second"]["1.0"].spec = {**CLOUDS, "watch": recorded().document()}
    torchserve.observed = counted(30, score=0.7, seed=500).document()
    gateway = start_gateway(watch_window_frames=20)
    gateway.post(content=cloud(0))
    key = ("mmdet3d_serve_drift_distance", *MODEL[:1], "statistic=score", *MODEL[1:])
    eventually(lambda: key in samples(gateway.client.get("/metrics").text))
    found = samples(gateway.client.get("/metrics").text)
    assert (
        found[key]
        > found["mmdet3d_serve_drift_limit", "model=second", "statistic=score", "version=1.0"]
        >= 0.1
    )
    assert found["mmdet3d_serve_drift_distance", "model=second", "statistic=class", "version=1.0"] == 0
    assert (
        found["mmdet3d_serve_drift_reference_frames", "model=second", "source=archive", "version=1.0"] == 100
    )
    described = gateway.client.get("/models/second").json()[0]["watch"]
    assert described == {"reference_frames": 100, "recorded": RECORDING.time, "window_frames": 20}


def test_a_window_of_the_same_source_is_near_and_a_changed_one_is_far() -> None:
    watch = ModelWatch(CLOUDS["classes"], recorded(), OPTIONS, Clock())  # type: ignore[arg-type]
    watch.add(counted(19, seed=1000))
    assert not list(watch.distances(watch.window()))  # too few
    watch.add(counted(30, seed=1001))
    assert all(found < limit for _, found, limit in watch.distances(watch.window()))
    watch.add(counted(60, score=0.7, seed=1002))
    far = {name: found > limit for name, found, limit in watch.distances(watch.window())}
    assert far == {"score": True, CLASS: False}


def test_frames_leave_the_window_and_its_memory_is_bounded() -> None:
    clock = Clock()
    watch = ModelWatch(CLOUDS["classes"], recorded(), OPTIONS, clock)  # type: ignore[arg-type]
    for _ in range(1000):
        clock.now += 1
        watch.add(counted(1))
    assert 108 <= watch.window().frames <= 121 and len(watch._slices) <= 13
    clock.now += 121
    assert watch.window().frames == 0 and watch.total.frames == 1000


def test_without_a_recorded_reference_the_first_frames_are_learned() -> None:
    watch = ModelWatch(CLOUDS["classes"], None, OPTIONS, Clock())  # type: ignore[arg-type]
    for k in range(79):
        watch.add(counted(1, seed=k))
        assert watch.reference is None and not list(watch.distances(watch.window()))
    assert watch.learned_frames == 79 and len(watch._learned) <= 41
    watch.add(counted(1, seed=79))
    assert watch.reference is not None and watch.learned_frames == 80 and not watch._learned
    watch.add(counted(40, seed=2000))
    assert all(found < limit for _, found, limit in watch.distances(watch.window()))
    watch.add(counted(400, label=1, seed=2001))
    assert any(found > limit for name, found, limit in watch.distances(watch.window()) if name == CLASS)


def test_limits_learned_from_large_batches_can_be_exceeded() -> None:
    options = WatchOptions(window_frames=20, learn_frames=40)
    watch = ModelWatch(CLOUDS["classes"], None, options, Clock())  # type: ignore[arg-type]
    for k in range(5):
        watch.add(counted(32, seed=k))
    assert watch.reference is not None and watch.reference.limits["score"] < 1


def test_limits_of_a_learned_reference_are_not_computed_in_the_event_loop() -> None:
    model = ModelVersion(ModelState("second", "1.0", True, (), 0), spec=dict(CLOUDS))
    watching = Watching(lambda name, version: model, OPTIONS)
    before = threading.active_count()
    work: list[Callable[[], None]] = []
    watch = ModelWatch(CLOUDS["classes"], None, OPTIONS, Clock(), run=work.append)  # type: ignore[arg-type]
    for k in range(100):
        watch.add(counted(1, seed=k))
        watching.observe("second", "1.0", counted(1, seed=k).document())
    assert watch.learned_frames == len(watch._learned) * 2 == 80 and len(work) == 1
    work.pop()()
    assert watch.reference is not None and watch.learned_frames == 80 and not watch._learned

    def is_learned() -> bool:
        return samples(watching.exposition())["mmdet3d_serve_drift_learning", *MODEL] == 0

    eventually(is_learned)
    eventually(lambda: threading.active_count() == before)


def test_another_archive_under_the_same_version_begins_anew_and_a_removed_model_is_gone() -> None:
    state = ModelState("second", "1.0", True, (), 0)
    models = {("second", "1.0"): ModelVersion(state, spec=dict(CLOUDS))}
    watching = Watching(lambda name, version: models.get((name, version)), OPTIONS)

    def frames() -> list[float]:
        found = samples(watching.exposition())
        return [value for key, value in found.items() if key[0] == "mmdet3d_serve_watched_frames_total"]

    watching.observe("second", "1.0", counted(2).document())
    watching.observe("second", "1.0", counted(3).document())
    watching.observe("second", "9.9", counted(3).document())
    assert frames() == [5]
    models["second", "1.0"].spec = {**CLOUDS, "watch": recorded().document()}
    watching.observe("second", "1.0", counted(1).document())
    assert frames() == [1]
    models.clear()
    assert frames() == []


def test_several_gateways_keep_their_histograms_apart_under_a_label() -> None:
    state = ModelState("second", "1.0", True, (), 0)
    watching = Watching(lambda *_: ModelVersion(state, spec=SPEC), OPTIONS)
    watching.observe("second", "1.0", counted(2).document())
    text = watching.exposition().encode()
    found = samples(merge_metrics({"0": text, "1": text}).decode())
    for gateway in ("gateway=0", "gateway=1"):
        assert found["mmdet3d_serve_detection_score_bucket", gateway, "le=+Inf", *MODEL] == 20
        assert found["mmdet3d_serve_watched_frames_total", gateway, *MODEL] == 2


def test_the_text_changes_with_every_batch_and_when_frames_leave_the_window() -> None:
    clock = Clock()
    spec = {**CLOUDS, "watch": recorded().document()}
    model = ModelVersion(ModelState("second", "1.0", True, (), 0), spec=spec)
    watching = Watching(lambda *_: model, OPTIONS, clock)
    for batches in (1, 2):
        watching.observe("second", "1.0", counted(30).document())
        found = samples(watching.exposition())
        assert watching.exposition() == watching.exposition()
        assert found["mmdet3d_serve_watched_frames_total", *MODEL] == 30 * batches
        assert found["mmdet3d_serve_drift_window_frames", *MODEL] == 30 * batches
        assert found["mmdet3d_serve_drift_distance", "model=second", "statistic=score", "version=1.0"] < 1
    clock.now = 1000.0
    found = samples(watching.exposition())
    assert found["mmdet3d_serve_drift_window_frames", *MODEL] == 0
    assert found["mmdet3d_serve_watched_frames_total", *MODEL] == 60
    assert not any(name == "mmdet3d_serve_drift_distance" for name, *_ in found)


def test_names_of_a_hostile_archive_are_escaped_and_bounded_in_number() -> None:
    hostile = [
        'a"b',
        "a\nb",
        "line\nbreak 1",
        'x"} 1\nevil_total{y="',
        "back\\slash\\",
        "",
        *map(str, range(5000)),
    ]
    model = ModelVersion(ModelState("second", "1.0", True, (), 0), spec={**CLOUDS, "classes": hostile})
    watching = Watching(lambda *_: model, OPTIONS)
    layout = Layout.of_classes(hostile)
    counts = layout.empty()
    counts.frames = 1
    counts.of(CLASS)[:] = 7
    counts.add_warnings(
        {"x" * 1000: 1, 'odd"\n': 1, "no_intensity": 2, **{f"code_{k}": 1 for k in range(500)}}
    )
    watching.observe("second", "1.0", counts.document())
    text = merge_metrics({"0": watching.exposition().encode()}).decode()
    families = {each.name: each for each in text_string_to_metric_families(text)}
    assert all(name.startswith("mmdet3d_serve_") for name in families)
    classes = {each.labels["class"]: each.value for each in families["mmdet3d_serve_detections"].samples}
    assert classes == {**dict.fromkeys(hostile[:MAX_CLASSES], 7), OTHER: 7}
    assert len(families["mmdet3d_serve_frame_warnings"].samples) <= 34


def test_segments_are_in_the_metrics_and_drift_is_looked_for_in_them() -> None:
    def segmented(road: int, car: int) -> Counts:
        counts = LAYOUT.empty()
        counts.frames = 1
        counts.of(SEGMENT)[:2] = road, car
        return counts

    reference = reference_of([segmented(900 + k, 100) for k in range(100)], 0.3, 20).document()
    model = ModelVersion(ModelState("second", "1.0", True, (), 0), spec={**CLOUDS, "watch": reference})
    watching = Watching(lambda *_: model, OPTIONS)
    for _ in range(20):
        watching.observe("second", "1.0", segmented(500, 500).document())
    found = samples(watching.exposition())
    first, second = LAYOUT.classes[:2]
    assert found["mmdet3d_serve_segmented_elements_total", f"class={first}", *MODEL] == 10_000
    assert found["mmdet3d_serve_segmented_elements_total", f"class={second}", *MODEL] == 10_000
    distance, limit = (
        found[f"mmdet3d_serve_drift_{name}", "model=second", "statistic=segment", "version=1.0"]
        for name in ("distance", "limit")
    )
    assert distance > limit


def test_a_window_shorter_than_that_of_the_limits_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    spec = {**CLOUDS, "watch": recorded().document()}
    model = ModelVersion(ModelState("second", "1.0", True, (), 0), spec=spec)
    for frames, warnings in ((20, 0), (19, 1)):
        watching = Watching(lambda *_: model, WatchOptions(window_frames=frames))
        watching.observe("second", "1.0", counted(1).document())
        watching.observe("second", "1.0", counted(1).document())
        assert len(caplog.records) == warnings


SPEC = dict(CLOUDS)

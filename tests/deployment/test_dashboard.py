"""Dashboard, alerts and autoscaler: about metrics and labels that there are."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.compare.changes import Change
from serve.gateway.admission import Admission
from serve.gateway.batcher import BatchReport
from serve.gateway.metrics import DEPRECATED_NAMES, Metrics
from serve.gateway.models import ModelVersion
from serve.gateway.options import GatewayOptions
from serve.gateway.rollout import Rollout
from serve.gateway.shadow_metrics import ShadowMetrics
from serve.gateway.tracks import TrackSessions
from serve.gateway.watching import Watching, WatchOptions
from serve.torchserve.management import ModelState
from serve.watch.observation import ObservedFrame, count_frames
from serve.watch.reference import Reference, reference_of
from serve.watch.statistics import SEGMENT, Layout
from tests.deployment.conftest import ROOT
from tests.deployment.dockerfile import DOCKER

# What NVIDIA's exporter exports by default; TorchServe collects no figures of GPUs here.
DCGM = {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED"}
PROMQL = {
    "absent", "and", "by", "group_left", "histogram_quantile", "ignoring", "increase", "label_values", "le", "max",
    "rate", "sum",
}  # fmt: skip


def watched() -> Watching:
    """Metrics of a model of clouds and one of images, whose window is compared with its reference."""
    image = {
        "bboxes": np.array([[0, 0, 9, 9]]), "scores": np.array([0.9]), "labels": np.array([0]), "classes": ["Car"],
    }  # fmt: skip
    cloud = {
        **{f"{name}_3d": image[name] for name in ("scores", "labels")},
        "bboxes_3d": np.ones((1, 7)), "box_type_3d": "LiDAR", "classes": ["Car"],
    }  # fmt: skip
    layout = Layout.of_classes(["Car"])
    counts = count_frames([ObservedFrame(cloud, 5, 0.5, ("no_intensity",))], layout)
    counts.add(count_frames([ObservedFrame(image)], layout))
    counts.of(SEGMENT)[0] = 5
    reference = reference_of([counts], 0.3, 1).document()
    spec = {"classes": ["Car"], Reference.KEY: reference}
    model = ModelVersion(ModelState("m", "1.0", True, (), 0), spec=spec)
    watching = Watching(lambda name, version: model, WatchOptions(window_frames=1))
    watching.observe("m", "1.0", counts.document())
    return watching


@cache
def of_the_gateway() -> Mapping[str, set[str]]:
    """Labels of the gateway's samples by name, without deprecated ones."""
    metrics = Metrics(Admission(1, 1), lambda model: True, TrackSessions(GatewayOptions()))
    metrics.observe_request("m", 200, 0.1)
    metrics.observe_batch("m", BatchReport(items=1, cost=1, queue_s=(0.0,), run_s=0.1, failed=True))
    metrics.set_ready(True)
    metrics.observe_sample("m", "kept")
    metrics.texts.append(watched().exposition)
    metrics.observe_fallback("m", "2.0", "not_ready")
    metrics.observe_version("m", "1.0", 200, 0.1)
    metrics.show_rollout(Rollout(file=Path("rollout")))
    shadow, pair = ShadowMetrics(metrics.registry), ("m", "1.0", "2.0")
    for range_m in (None, 9.0):  # of an image, of a cloud
        shadow.observe_changes(pair, [Change("matched", "Car", "Car", 0.9, 0.0, False, 0.0, range_m, (0, 0))])
    shadow.observe_failure(pair, "not_ready")
    shadow.observe_drop(pair, "busy")
    parsed = text_string_to_metric_families(metrics.exposition().decode())
    current = (family for family in parsed if family.name not in DEPRECATED_NAMES)
    return {sample.name: {*sample.labels} for family in current for sample in family.samples}


@cache
def exported() -> set[str]:
    """Names of all metrics of the gateway, TorchServe and NVIDIA's exporter."""
    torchserve = importlib.util.find_spec("ts")
    assert torchserve is not None and torchserve.origin is not None
    theirs = yaml.safe_load((Path(torchserve.origin).parent / "configs" / "metrics.yaml").read_text())[
        "ts_metrics"
    ]
    return {*of_the_gateway()} | {one["name"] for kind in theirs.values() for one in kind} | DCGM


def names_in(expression: str) -> set[str]:
    """The metrics that an expression names: its words, without strings, labels, durations and PromQL's own."""
    bare = re.sub(
        r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", re.sub(r"\b(by|without|ignoring)\s*\([^)]*\)", " ", expression)
    )
    return {word for word in re.findall(r"[A-Za-z_]\w*", bare) if word not in PROMQL}


def labels_in(expression: str) -> set[str]:
    """The labels that an expression names, in selectors and in groups."""
    selected = re.findall(r"([A-Za-z_]\w*)\s*(?:=~|!~|!=|=)\s*\"", expression)
    groups = re.findall(r"\b(?:by|without|ignoring)\s*\(([^)]*)\)", expression)
    return {*selected, *(label.strip() for group in groups for label in group.split(","))}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "mmdet3d-serve.json").read_text())
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    autoscaler = ROOT / "k8s" / "components" / "autoscale-on-pending" / "horizontalpodautoscaler.yaml"
    for metric in yaml.safe_load(autoscaler.read_text())["spec"]["metrics"]:
        yield "autoscaler", metric["pods"]["metric"]["name"]


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_every_expression_is_about_metrics_that_there_are(title: str, expression: str) -> None:
    names = names_in(expression)
    assert names and names <= exported()


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_every_expression_is_about_labels_that_its_metrics_have(title: str, expression: str) -> None:
    ours = [of_the_gateway()[name] for name in names_in(expression) if name in of_the_gateway()]
    if ours:  # TorchServe lists no labels
        assert labels_in(expression) <= set().union(*ours)


def test_the_dashboard_shows_all_that_is_counted_of_shadows_and_canaries() -> None:
    shown = {
        re.sub("_(bucket|sum|count)$", "", name)
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in names_in(target["expr"])
    }
    counted = {
        re.sub("_(bucket|sum|count)$", "", name)
        for name in of_the_gateway()
        if re.match("mmdet3d_serve_(shadow|canary|version|rollout)_", name) and not name.endswith("_created")
    }
    assert len(counted) >= 12 and counted <= shown


def test_the_dashboard_shows_queue_batches_latency_outcomes_and_gpus() -> None:
    shown = {name for _, expression in expressions() for name in names_in(expression)}
    assert {
        "mmdet3d_serve_queue_duration_seconds_bucket", "mmdet3d_serve_request_duration_seconds_bucket",
        "mmdet3d_serve_batch_frames_bucket", "mmdet3d_serve_batch_cost_bucket", "mmdet3d_serve_requests_total",
        "mmdet3d_serve_pending_ratio", "mmdet3d_serve_ready", "ts_queue_latency_microseconds", *DCGM,
    } <= shown  # fmt: skip


def test_the_dashboard_is_well_formed_and_finds_its_data() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (uid,) = [one["uid"] for one in source["datasources"]]
    panels = dashboard()["panels"]
    assert all(panel["datasource"]["uid"] == uid for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_the_cluster_alerts_on_the_same() -> None:
    rule = yaml.safe_load((ROOT / "k8s/components/servicemonitor/prometheusrule.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())

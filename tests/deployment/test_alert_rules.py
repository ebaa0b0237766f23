"""Alerts of drift and rollouts, evaluated by Prometheus' own tool; each says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

RULES = ROOT / "docker" / "prometheus" / "alerts.yaml"
LABELS = 'model="second", version="1.0", statistic="score"'


def rules() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def series(name: str, values: str, gateway: int = 0, labels: str = LABELS) -> dict[str, str]:
    return {"series": f'{name}{{{labels}, gateway="{gateway}", instance="a:8000"}}', "values": values}


def drift(values: str, limit: str = "0.1x60", gateway: int = 0) -> list[dict[str, str]]:
    return [
        series("mmdet3d_serve_drift_distance", values, gateway),
        series("mmdet3d_serve_drift_limit", limit, gateway),
    ]


DRIFTED = {"model": "second", "version": "1.0", "statistic": "score"}


@pytest.mark.parametrize(
    ("input_series", "minute", "fires"),
    [
        pytest.param(drift("0.05x60"), 50, False, id="near"),
        pytest.param(drift("0.3x60"), 5, False, id="far-for-five-minutes"),
        pytest.param(drift("0.3x60"), 15, True, id="far"),
        pytest.param(drift("0.3x5 0.05x60"), 30, False, id="far-for-a-while"),
        pytest.param(drift("0.3x60", "0.4x60"), 50, False, id="below-a-wide-limit"),
        pytest.param([*drift("0.05x60"), *drift("0.3x60", gateway=1)], 15, True, id="one-gateway-of-two"),
        pytest.param(drift("_x60", "_x60"), 50, False, id="still-learning"),
    ],
)
def test_drift_alert_fires_by_promtool(
    tmp_path: Path, input_series: list[dict[str, str]], minute: int, fires: bool
) -> None:
    check_alert(tmp_path, "Mmdet3dServeDrift", input_series, minute, [DRIFTED] if fires else [])


def check_alert(
    folder: Path,
    alert: str,
    input_series: list[dict[str, str]],
    minute: int,
    firing: list[dict[str, str]],
) -> None:
    """Check by promtool that at a minute an alert fires once with each of these labels, or not at all."""
    rule = rules()[alert]
    expected = [
        {
            "exp_labels": {**rule["labels"], **labels},
            "exp_annotations": {name: fill(text, labels) for name, text in rule["annotations"].items()},
        }
        for labels in firing
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": input_series,
                "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected}],
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    run_promtool("test", "rules", str(file))


def fill(text: str, labels: Mapping[str, str]) -> str:
    """Fill labels into an annotation, as Prometheus does."""
    for name, value in labels.items():
        text = text.replace(f"{{{{ $labels.{name} }}}}", value)
    return text


def run_promtool(*arguments: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(
            "promtool is not installed; it comes with Prometheus (Debian: apt-get install prometheus)"
        )
    found = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stdout + found.stderr


# Alerts of shadows and canaries

SHADOW = {"model": "second", "version": "1.0", "shadow": "2.0"}
CANARY = {"model": "second", "version": "2.0"}


def counter(name: str, values: str, **labels: str) -> dict[str, str]:
    """A series of one gateway, with a value for each minute."""
    text = ", ".join(
        f'{key}="{value}"' for key, value in {**labels, "gateway": "0", "instance": "a:8000"}.items()
    )
    return {"series": f"mmdet3d_serve_{name}{{{text}}}", "values": values}


def detections(name: str, **per_minute: int) -> list[dict[str, str]]:
    """Counts of a class of a shadow, from 0 on as the gateway shows them, by what became of them."""
    return [
        counter(
            "shadow_detections_total",
            f"0+{per_minute.get(kind, 0)}x120",
            **SHADOW,
            **{"class": name, "change": kind},
        )
        for kind in ("matched", "renamed", "lost", "new")
    ]


def failures(values: str, reason: str = "backend_broken") -> list[dict[str, str]]:
    return [counter("shadow_failures_total", values, **SHADOW, reason=reason)]


def fallbacks(values: str, reason: str = "stalled") -> list[dict[str, str]]:
    return [counter("canary_fallbacks_total", values, **CANARY, reason=reason)]


def rollout_file(values: str) -> list[dict[str, str]]:
    return [counter("rollout_file_valid", values)]


@pytest.mark.parametrize(
    ("alert", "input_series", "minute", "firing"),
    [
        pytest.param("ShadowDiffers", detections("Car", matched=20), 60, [], id="equal"),
        pytest.param("ShadowDiffers", detections("Car", matched=98, lost=1, new=1), 60, [], id="2-percent"),
        pytest.param("ShadowDiffers", detections("Car", matched=94, renamed=6), 60, [], id="renamed"),
        pytest.param(
            "ShadowDiffers",
            detections("Car", matched=94, lost=6),
            60,
            [{"class": "Car"}],
            id="6-percent-lost",
        ),
        pytest.param(
            "ShadowDiffers", detections("Car", matched=94, new=6), 60, [{"class": "Car"}], id="6-percent-new"
        ),
        pytest.param(
            "ShadowDiffers", detections("Van", new=4), 60, [{"class": "Van"}], id="a-class-that-is-all-new"
        ),
        pytest.param(
            "ShadowDiffers", detections("Van", lost=4), 60, [{"class": "Van"}], id="a-class-that-is-all-lost"
        ),
        pytest.param(
            "ShadowDiffers",
            [*detections("Car", matched=1000), *detections("Cyclist", matched=3, lost=1)],
            60,
            [{"class": "Cyclist"}],
            id="a-rare-class-beside-a-frequent-one",
        ),
        pytest.param("ShadowDiffers", detections("Car", matched=1, lost=1), 45, [], id="too-few"),
        pytest.param("ShadowDiffers", detections("Car", matched=94, lost=6), 4, [], id="for-four-minutes"),
        pytest.param("ShadowFails", failures("0x60"), 30, [], id="no-failure"),
        pytest.param(
            "ShadowFails", failures("0x20 1x40"), 21, [{"reason": "backend_broken"}], id="one-failure"
        ),
        pytest.param("ShadowFails", failures("0x20 1x40"), 40, [], id="a-failure-long-ago"),
        pytest.param("CanaryFails", fallbacks("0x60"), 30, [], id="no-fallback"),
        pytest.param("CanaryFails", fallbacks("0x20 1x40"), 21, [{"reason": "stalled"}], id="one-fallback"),
        pytest.param(
            "CanaryFails",
            [*fallbacks("0x20 1x40"), *fallbacks("0x20 3x40", "not_ready")],
            21,
            [{"reason": "not_ready"}, {"reason": "stalled"}],
            id="two-reasons",
        ),
        pytest.param("CanaryFails", fallbacks("0x20 1x40"), 40, [], id="a-fallback-long-ago"),
        pytest.param("RolloutFile", rollout_file("1x60"), 30, [], id="valid-file"),
        pytest.param("RolloutFile", rollout_file("1x5 0x60"), 8, [], id="invalid-for-three-minutes"),
        pytest.param("RolloutFile", rollout_file("1x5 0x60"), 15, [{}], id="invalid-file"),
        pytest.param("RolloutFile", rollout_file("1x5 0x10 1x60"), 30, [], id="mended-file"),
    ],
)
def test_alerts_of_rollouts_fire_by_promtool(
    tmp_path: Path, alert: str, input_series: list[dict[str, str]], minute: int, firing: list[dict[str, str]]
) -> None:
    kept = {
        "ShadowDiffers": {"model": "second", "shadow": "2.0"},
        "ShadowFails": {"model": "second", "shadow": "2.0"},
        "CanaryFails": CANARY,
        "RolloutFile": {"gateway": "0", "instance": "a:8000"},
    }[alert]
    check_alert(
        tmp_path, f"Mmdet3dServe{alert}", input_series, minute, [{**kept, **labels} for labels in firing]
    )


def test_every_rule_is_accepted_by_promtool() -> None:
    run_promtool("check", "rules", str(RULES))


def test_every_expression_of_the_dashboard_is_accepted_by_promtool(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/mmdet3d-serve.json").read_text())
    variables = {"$__rate_interval": "1m", "$model": ".*"}
    records = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(name, value)
            records.append({"record": f"panel_{panel['id']}_{target['refId']}", "expr": expression})
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    run_promtool("check", "rules", str(file))


def test_every_alert_has_a_severity_and_a_line_in_the_runbook() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.partition("## Alerts")[2].partition("\n## ")[0]
    for name, rule in rules().items():
        assert rule["labels"]["severity"] in ("critical", "warning") and {*rule["annotations"]} == {
            "summary",
            "description",
        }
        assert name.removeprefix("Mmdet3dServe") in table, name

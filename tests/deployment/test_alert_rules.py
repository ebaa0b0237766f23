"""The alert of drift: fires for what left its reference and stays so, by Prometheus' own tool; and says what to do."""

from __future__ import annotations

import shutil
import subprocess
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


FIRING = {"severity": "warning", "model": "second", "version": "1.0", "statistic": "score"}


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
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(
            "promtool is not installed; it comes with Prometheus (Debian: apt-get install prometheus)"
        )
    annotations = {
        name: text.replace("{{ $labels.statistic }}", "score").replace("{{ $labels.model }}", "second")
        .replace("{{ $labels.version }}", "1.0")
        for name, text in rules()["Mmdet3dServeDrift"]["annotations"].items()
    }  # fmt: skip
    expected = [{"exp_labels": FIRING, "exp_annotations": annotations}] if fires else []
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": input_series,
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": "Mmdet3dServeDrift", "exp_alerts": expected}
                ],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    found = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_rule_is_accepted_by_promtool() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(
            "promtool is not installed; it comes with Prometheus (Debian: apt-get install prometheus)"
        )
    found = subprocess.run(
        [promtool, "check", "rules", str(RULES)], capture_output=True, text=True, timeout=30
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_has_a_severity_and_a_line_in_the_runbook() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.partition("## Alerts")[2].partition("\n## ")[0]
    for name, rule in rules().items():
        assert rule["labels"]["severity"] in ("critical", "warning") and {*rule["annotations"]} == {
            "summary",
            "description",
        }
        assert name.removeprefix("Mmdet3dServe") in table, name

"""Compose files: about the service that there is, and as closed as the cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema import builtin_schemas

import serve.torchserve.supervisor
from serve.gateway.options import GatewayOptions
from serve.settings import Settings
from serve.torchserve import TorchServeOptions
from serve.torchserve.process import DRAIN_S
from tests.deployment.dockerfile import DOCKER, stages, words


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    jsonschema.validate(compose(name), builtin_schemas.get_builtin_schema("vendor.compose-spec"))


def test_compose_builds_and_names_what_there_is() -> None:
    service = compose("compose.yaml")["services"]["serve"]
    assert service["build"]["target"] in stages()
    assert (DOCKER / service["build"]["context"] / service["build"].get("dockerfile", "Dockerfile")).is_file()
    known = {rest.partition("=")[0] for stage in stages() for rest in words(stage, "ARG")}
    assert service["build"]["args"].keys() <= known
    settings = {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in service["environment"].items()
    }
    Settings.from_environment(settings)
    for each in compose("compose.yaml")["services"].values():
        for volume in each["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists(), source


def test_compose_is_as_closed_as_the_cluster() -> None:
    services = compose("compose.yaml")["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "serve" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert services["serve"]["read_only"] and services["serve"]["tmpfs"]
    assert services["serve"]["ports"] == [f"127.0.0.1:{GatewayOptions().port}:{GatewayOptions().port}"]


def test_compose_waits_until_everything_in_flight_is_answered() -> None:
    default = GatewayOptions()
    grace = int(compose("compose.yaml")["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    assert (
        default.shutdown_delay_s
        + default.graceful_timeout_s
        + serve.torchserve.supervisor._EXIT_S
        + DRAIN_S
        + 10
        < grace
    )


def test_prometheus_scrapes_ports_that_there_are() -> None:
    jobs = compose("prometheus/prometheus.yaml")["scrape_configs"]
    targets = [target for job in jobs for each in job.get("static_configs", []) for target in each["targets"]]
    ports = (GatewayOptions().port, TorchServeOptions(Path("store")).metrics_port)
    assert targets == [f"serve:{port}" for port in ports]

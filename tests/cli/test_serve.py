"""`mmdet3d-serve serve`: which options TorchServe and the gateway get from flags, variables and the container."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.cli import serve as serving
from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions
from serve.settings import PREFIX
from serve.torchserve import TorchServeOptions
from serve.torchserve.supervisor import Service

Built = tuple[TorchServeOptions, GatewayOptions | None]
Build = Callable[..., Built]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build("--gateway-port", "9000", GATEWAY_HOST="…")`: what the command would start, without starting it."""
    services: list[Service] = []
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)

    def record(service: Service, _: object) -> int:
        services.append(service)
        return 0

    monkeypatch.setattr(serving, "serve_until_stopped", record)
    monkeypatch.setattr("serve.logs.set_up", lambda style, level: None)

    def run(*flags: str, **variables: str) -> Built:
        for name, text in variables.items():
            monkeypatch.setenv(f"{PREFIX}{name}", text)
        assert serving.main(["--models", "second", *flags]) == 0
        return services[-1]._options, services[-1]._gateway_options

    return run


def test_plain_service_listens_on_loopback_and_logs_text(build: Build) -> None:
    torchserve, gateway = build()
    assert gateway is not None
    assert (gateway.host, gateway.port, gateway.log_format) == ("127.0.0.1", 8000, "text")
    assert (torchserve.inference_host, torchserve.state_dir) == ("127.0.0.1", Path(".state"))
    assert [model.archive for model in torchserve.models] == ["second.mar"]


def test_container_listens_everywhere_with_the_gateway_alone_and_logs_json(build: Build) -> None:
    torchserve, gateway = build("--container")
    assert gateway is not None
    assert (gateway.host, gateway.log_format) == ("0.0.0.0", "json")
    assert (torchserve.inference_host, torchserve.metrics_host) == ("127.0.0.1", "127.0.0.1")
    assert (torchserve.management_host, torchserve.token_authorization) == ("127.0.0.1", False)
    assert torchserve.model_store == serving.CONTAINER_STORE and torchserve.state_dir is None


def test_image_opens_torchserve_and_says_so(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    torchserve, _ = build("--container", OPEN_TORCHSERVE="1")
    assert (torchserve.inference_host, torchserve.metrics_host) == ("0.0.0.0", "0.0.0.0")
    said = capsys.readouterr().err
    assert "0.0.0.0 port 8080" in said and "0.0.0.0 port 8082" in said


@pytest.mark.parametrize("where", ["variable", "file", "file by flag"])
def test_image_keeps_torchserve_on_loopback_beside_api_keys(
    build: Build, capsys: pytest.CaptureFixture[str], tmp_path: Path, where: str
) -> None:
    (tmp_path / "keys").write_text("secret\n")
    flags: list[str] = ["--gateway-api-keys-file", str(tmp_path / "keys")] if where == "file by flag" else []
    variables = {
        "variable": {"GATEWAY_API_KEYS": "secret"},
        "file": {"GATEWAY_API_KEYS_FILE": str(tmp_path / "keys")},
        "file by flag": {},
    }[where]
    torchserve, _ = build("--container", *flags, OPEN_TORCHSERVE="1", **variables)
    assert (torchserve.inference_host, torchserve.metrics_host) == ("127.0.0.1", "127.0.0.1")
    assert "0.0.0.0 port" not in capsys.readouterr().err
    # On purpose, and said.
    torchserve, _ = build(
        "--container", "--inference-host", "0.0.0.0", *flags, OPEN_TORCHSERVE="1", **variables
    )
    assert (torchserve.inference_host, torchserve.metrics_host) == ("0.0.0.0", "127.0.0.1")
    assert "0.0.0.0 port 8080" in capsys.readouterr().err


BY_FLAG_OR_VARIABLE = pytest.mark.parametrize(
    ("flags", "variables"),
    [(["--open-management"], {}), ([], {"OPEN_MANAGEMENT": "1"})],
    ids=["flag", "variable"],
)


@BY_FLAG_OR_VARIABLE
def test_open_management_of_a_container_asks_for_tokens(
    build: Build, flags: list[str], variables: dict[str, str]
) -> None:
    torchserve, _ = build("--container", *flags, **variables)
    assert (torchserve.management_host, torchserve.token_authorization) == ("0.0.0.0", True)
    with pytest.raises(SettingsError, match="token"):
        build("--container", "--no-token-authorization", *flags, **variables)


@BY_FLAG_OR_VARIABLE
def test_open_management_allows_an_address_beyond_loopback(
    build: Build, flags: list[str], variables: dict[str, str]
) -> None:
    torchserve, _ = build("--management-host", "0.0.0.0", *flags, **variables)
    assert (torchserve.management_host, torchserve.has_tokens) == ("0.0.0.0", True)
    assert build(*flags, **variables)[0].management_host == "127.0.0.1"


def test_flag_closes_the_management_that_a_variable_opens(build: Build) -> None:
    torchserve, _ = build("--container", "--no-open-management", OPEN_MANAGEMENT="1")
    assert (torchserve.management_host, torchserve.token_authorization) == ("127.0.0.1", False)


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--gateway-no-direct-batches"], {}),
        ([], {"GATEWAY_DIRECT_BATCHES": "0"}),
        ([], {"GATEWAY_WORKER_SOCKETS": "none"}),
    ],
)
def test_batches_to_the_sockets_of_workers_can_be_turned_off(
    build: Build, flags: list[str], variables: dict[str, str]
) -> None:
    _, gateway = build(*flags, **variables)
    assert gateway is not None and gateway.socket_folder is None
    assert gateway.worker_sockets != "auto" or not gateway.direct_batches


@pytest.mark.parametrize("where", [[], ["--container"]])
def test_flag_goes_before_variable_before_the_default_of_the_command(build: Build, where: list[str]) -> None:
    variables = {
        "GATEWAY_HOST": "127.0.0.2",
        "GATEWAY_PORT": "9000",
        "GATEWAY_LOG_FORMAT": "text",
        "WORKERS": "2",
    }
    torchserve, gateway = build(*where, "--gateway-port", "9001", **variables)
    assert gateway is not None
    assert (gateway.host, gateway.port, gateway.log_format) == ("127.0.0.2", 9001, "text")
    assert [model.workers for model in torchserve.models] == [2]


def test_gateway_is_told_where_torchserve_is_whatever_the_variables_say(build: Build) -> None:
    _, gateway = build(
        "--inference-host", "0.0.0.0", "--inference-port", "18080", "--response-timeout-s", "60",
        GATEWAY_INFERENCE_URL="http://elsewhere:1", GATEWAY_BACKEND_TIMEOUT_S="1",
    )  # fmt: skip
    assert gateway is not None
    assert gateway.inference_url == "http://127.0.0.1:18080" and gateway.backend_timeout_s == 70


def test_service_without_gateway_needs_no_option_of_it(build: Build) -> None:
    assert build("--no-gateway", GATEWAY_PORT="x")[1] is None


def test_former_flags_work(build: Build) -> None:
    torchserve, _ = build(
        "--max-request-mib", "80", "--response-timeout", "60", "--startup-timeout", "61",
        "--java-option=-Xmx2g", "--java-options=-Xss1m", "--no-model-api",
    )  # fmt: skip
    assert torchserve.max_request_bytes == 80 << 20
    assert (torchserve.response_timeout_s, torchserve.startup_timeout_s) == (60, 61)
    assert torchserve.java_options == ("-Xmx2g", "-Xss1m") and not torchserve.model_api


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--metrics-port", "0"], "--metrics-port must be"),
        (["--gateway-batch-points", "many"], "--gateway-batch-points must be"),
        (["--workers", "0"], "--workers must be a whole number of at least 1, got '0'$"),
        (["--management-host", "0.0.0.0"], "--management-host=0.0.0.0 .*--open-management"),
        (
            ["--gateway-batch-bytes", "99999999"],
            "--gateway-batch-bytes=99999999 must leave 64 KiB of backend_request",
        ),
    ],
)
def test_wrong_flag_ends_the_command_before_anything_starts(
    build: Build, flags: list[str], named: str
) -> None:
    with pytest.raises(SettingsError, match=named):
        build(*flags)

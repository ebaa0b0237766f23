"""API keys, CORS, and secrets that must not be logged."""

from __future__ import annotations

import json
import logging

import pytest

from serve import logs
from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions

KEY, OTHER = "correct horse battery", "staple"


@pytest.fixture
def locked(start_gateway, tmp_path):
    (tmp_path / "keys").write_text(f"# keys\n{KEY}\n\n")
    return start_gateway(api_keys_file=tmp_path / "keys", api_keys=(OTHER,))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        {"x-api-key": OTHER},
    ],
)
def test_request_with_a_valid_key_is_answered(locked, cloud, headers):
    assert locked.post(content=cloud(1), headers=headers).status_code == 200
    assert locked.client.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": KEY},
        {"x-api-key": ""},
        {"x-api-key": KEY[:-1]},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
def test_request_without_a_valid_key_returns_401_first(locked, cloud, headers, torchserve):
    for path in ("/predictions/second", "/predictions/nobody", "/v2/models/second/infer"):
        answer = locked.post(path, content=cloud(1), headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert "unauthorized" in answer.text
    for path in ("/models", "/docs", "/openapi.json", "/v2", "/"):
        assert locked.client.get(path, headers=headers).status_code == 401
    assert not torchserve.calls


def test_health_and_metrics_need_no_key(locked):
    for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert locked.client.get(path).status_code in (200, 503)


def test_keys_bodies_and_queries_are_not_logged(locked, cloud, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for key in (KEY, OTHER, "a wrong one"):
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            locked.post("/predictions/second?score_thr=0.0987654321", content=cloud(1), headers=headers)
    # Not the client's own, nor those of a uvicorn that the test itself runs (the next test has the command's logging).
    records = [record for record in caplog.records if not record.name.startswith(("http", "uvicorn.access"))]
    written = "".join(f"{record.getMessage()} {record.__dict__}" for record in records)
    written += "".join(capfd.readouterr())
    assert "/predictions/second" in written
    for secret in (KEY, OTHER, "a wrong one", "0987654321"):
        assert secret not in written
    assert OTHER not in repr(GatewayOptions(api_keys=(OTHER,)))


def test_empty_key_file_is_rejected(tmp_path):
    (tmp_path / "keys").write_text("\n# none yet\n")
    with pytest.raises(SettingsError, match="keys"):
        GatewayOptions(api_keys_file=tmp_path / "keys").keys()
    with pytest.raises(SettingsError, match="No such file"):
        GatewayOptions(api_keys_file=tmp_path / "missing").keys()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="binary"):
        GatewayOptions(api_keys_file=tmp_path / "binary").keys()


def test_listed_origins_may_call_with_api_keys_enabled(start_gateway, cloud):
    gateway = start_gateway(cors_origins=("https://viewer.example",), api_keys=(KEY,))
    asked = {
        "origin": "https://viewer.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key,content-type",
    }
    leave = gateway.client.options("/predictions/second", headers=asked)  # browsers send no key with this
    assert leave.status_code == 200, leave.text
    assert leave.headers["access-control-allow-origin"] == "https://viewer.example"
    assert "x-api-key" in leave.headers["access-control-allow-headers"]
    origin = {"origin": "https://viewer.example"}
    answer = gateway.post(content=cloud(1), headers={**origin, "x-api-key": KEY})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://viewer.example"
    assert "server-timing" in answer.headers["access-control-expose-headers"]
    refused = gateway.post(content=cloud(1), headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://viewer.example"
    stranger = gateway.post(content=cloud(1), headers={"origin": "https://evil.example", "x-api-key": KEY})
    assert "access-control-allow-origin" not in stranger.headers


def test_origins_are_rejected_without_cors(gateway, cloud):
    answer = gateway.post(content=cloud(1), headers={"origin": "https://viewer.example"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


@pytest.fixture
def logged(capsys):
    """What is logged while a test runs, as the gateway writes it."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in ("httpx", "httpcore", "matplotlib", "uvicorn")}

    def lines(style: str) -> pytest.CaptureFixture[str]:
        logs.set_up(style, "info")
        return capsys

    yield lines
    root.handlers[:] = before
    root.setLevel(level)
    for name, was in quiet.items():
        logging.getLogger(name).setLevel(was)


def test_log_lines_are_json_with_the_request_id(gateway, cloud, logged):
    captured = logged("json")
    gateway.post(
        "/predictions/second?score_thr=0.0987654321", content=cloud(1), headers={"x-request-id": "mine-7"}
    )
    gateway.post("/predictions/nobody", content=cloud(1), headers={"x-request-id": "mine-8"})
    written = captured.readouterr().err
    assert "0987654321" not in written
    lines = [json.loads(line) for line in written.splitlines()]
    (first,) = [line for line in lines if line.get("request_id") == "mine-7"]
    assert (first["level"], first["status"], first["model"], first["frames"]) == ("INFO", 200, "second", 1)
    assert first["message"] == "POST /predictions/second 200" and first["duration_ms"] > 0
    (second,) = [line for line in lines if line.get("request_id") == "mine-8"]
    assert (second["status"], second["error"]) == (404, "model_not_found")


def test_path_cannot_inject_log_lines(gateway, logged):
    captured = logged("text")
    gateway.client.get("/x%0A2026-01-01%20ERROR%20forged")
    assert not [
        line for line in captured.readouterr().err.splitlines() if line.startswith("2026-01-01 ERROR")
    ]

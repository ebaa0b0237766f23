"""Settings: read once, wrong ones stop the start with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.settings import Settings


def test_defaults_need_no_environment():
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings == Settings() and settings.limits.max_points == settings.max_points


def test_values_are_read_and_typed():
    settings = Settings.from_environment(
        {
            "MMDET3D_SERVE_OPS": "portable",
            "MMDET3D_SERVE_TRUST_ARCHIVE_CODE": "1",
            "MMDET3D_SERVE_MAX_POINTS": "1000",
            "MMDET3D_SERVE_CACHE_DIR": "/tmp/x",
        }
    )
    assert settings == Settings(
        ops="portable", trust_archive_code=True, max_points=1000, cache_dir=Path("/tmp/x")
    )
    with pytest.raises(FrozenInstanceError):
        settings.max_points = 1


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MMDET3D_SERVE_MAX_POINT", "3", "did you mean MMDET3D_SERVE_MAX_POINTS"),
        ("MMDET3D_SERVE_ZZZ", "3", "known: "),
        ("MMDET3D_SERVE_MAX_POINTS", "0", "1 or more"),
        ("MMDET3D_SERVE_MAX_POINTS", "many", "whole number"),
        ("MMDET3D_SERVE_OPS", "fast", "auto or portable"),
        ("MMDET3D_SERVE_TRUST_ARCHIVE_CODE", "perhaps", "1 or 0"),
    ],
)
def test_a_wrong_setting_says_what_to_change(variable, value, says):
    with pytest.raises(SettingsError, match=says):
        Settings.from_environment({variable: value})


def test_a_wrong_setting_stops_every_command_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "serve", "zoo", "second"],
        env={**os.environ, "MMDET3D_SERVE_OPS": "fast"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: MMDET3D_SERVE_OPS='fast'")


def test_the_variables_that_kubernetes_adds_for_a_service_of_our_name_are_no_settings() -> None:
    links = {
        "MMDET3D_SERVE_SERVICE_HOST": "10.0.0.1",
        "MMDET3D_SERVE_SERVICE_PORT": "8000",
        "MMDET3D_SERVE_SERVICE_PORT_HTTP": "8000",
        "MMDET3D_SERVE_PORT": "tcp://10.0.0.1:8000",
        "MMDET3D_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "MMDET3D_SERVE_PORT_8000_TCP_PROTO": "tcp",
        "MMDET3D_SERVE_PORT_8000_TCP_PORT": "8000",
        "MMDET3D_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "MMDET3D_SERVE_GATEWAY_SERVICE_HOST": "10.0.0.2",
        "MMDET3D_SERVE_GATEWAY_PORT": "tcp://10.0.0.2:8000",
        "MMDET3D_SERVE_GATEWAY_PORT_8000_TCP_ADDR": "10.0.0.2",
    }
    assert Settings.from_environment(links) == Settings()
    ours = Settings.from_environment({**links, "MMDET3D_SERVE_GATEWAY_PORT": "9000"})
    assert ours.gateway == {"port": "9000"}


@pytest.mark.parametrize("name", ["SERVICES", "GATEWAY", "PORT_NUMBER", "PORT"])
def test_what_only_looks_like_one_is_still_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting"):
        Settings.from_environment({f"MMDET3D_SERVE_{name}": "8000"})

"""Settings of the gateway: where they come from, and which of them cannot be meant."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions, parser

ROOT = Path(__file__).parents[2]


def test_a_flag_goes_before_the_environment_and_that_before_the_default():
    options = GatewayOptions.build(
        {"batch_points": "10", "port": None},
        {"batch_points": "20", "port": "9000", "cors_origins": "http://a, http://b"},
    )
    assert (options.batch_points, options.port, options.batch_frames) == (
        10,
        9000,
        GatewayOptions.batch_frames,
    )
    assert options.cors_origins == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_bytes": 64 << 20}, "batch_bytes must leave 64 KiB of backend_request_bytes"),
        ({"max_frame_bytes": 49 << 20}, "max_frame_bytes is over batch_bytes"),
        ({"max_body_bytes": 1 << 20}, "max_body_bytes is below max_frame_bytes"),
        ({"max_pending_bytes": 63 << 20}, "max_pending_bytes is below max_body_bytes"),
        ({"max_pending_frames": 63}, "max_pending_frames is below max_frames_per_request"),
        ({"timeout_s": 301.0}, "timeout_s is over max_timeout_s"),
        ({"cors_origins": ("*",), "api_keys": ("k",)}, "list the origins"),
        ({"batch_frames": 0}, "batch_frames must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s must be at least"),
        ({"timeout_s": float("nan")}, "timeout_s must be at least"),
        ({"drain_s": -1.0}, "drain_s must be at least 0"),
        ({"port": 65536}, "is not a port"),
        ({"port": -1}, "port must be at least 0"),
        ({"inference_url": "localhost:8080"}, "inference_url must start with http"),
        ({"log_format": "xml"}, "log_format must be json or text"),
        ({"log_level": "loud"}, "log_level must be"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_to_change(changes, said):
    with pytest.raises(SettingsError, match=said):
        GatewayOptions(**changes)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"batch_point": "1"},
            "unknown setting MMDET3D_SERVE_GATEWAY_BATCH_POINT; did you mean .*BATCH_POINTS",
        ),
        ({"batch_points": "many"}, "MMDET3D_SERVE_GATEWAY_BATCH_POINTS='many' must be a number"),
        ({"timeout_s": "soon"}, r"must be a number \(S\)"),
    ],
)
def test_variables_that_are_unknown_or_no_numbers_are_refused(variables, said):
    with pytest.raises(SettingsError, match=said):
        GatewayOptions.build({}, variables)
    with pytest.raises(SettingsError, match=r"--batch-points='1\.5' must be a number"):
        GatewayOptions.build({"batch_points": "1.5"}, {})


def test_help_lists_every_option_with_its_unit_and_default():
    text = parser("words").format_help()
    for each in dataclasses.fields(GatewayOptions):
        if each.name == "api_keys":
            assert "--api-keys " not in text  # a process list shows arguments
            continue
        flag = f"--{each.name.replace('_', '-')}"
        assert f"{flag} {each.metadata['unit']}" in text, flag
        assert each.metadata["unit"], flag


def run_gateway(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {f"MMDET3D_SERVE_{name.upper()}": text for name, text in variables.items()}
    return subprocess.run(
        [sys.executable, "-m", "serve", "gateway", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--batch-bytes", "99999999"], {}, "error: batch_bytes must leave 64 KiB"),
        (["--port", "x"], {}, "error: --port='x' must be a number (PORT)"),
        ([], {"gateway_max_frame_byte": "1"}, "did you mean MMDET3D_SERVE_GATEWAY_MAX_FRAME_BYTES?"),
        ([], {"gatway_port": "1"}, "error: unknown setting MMDET3D_SERVE_GATWAY_PORT"),
        (
            ["--api-keys-file", "/nonexistent/keys"],
            {},
            "error: api_keys_file /nonexistent/keys: No such file",
        ),
        (["--backend-key-file", "/nonexistent/keys"], {}, "cannot read /nonexistent/keys"),
        (["--host", "203.0.113.1"], {}, "error: cannot listen on 203.0.113.1 port 8000"),
        (["--host", "not a host"], {}, "error: cannot listen on not a host"),
        (["--colour", "red"], {}, "unrecognized arguments"),
    ],
)
def test_the_command_refuses_to_start_with_a_sentence_and_exit_code_2(arguments, variables, said):
    done = run_gateway(*arguments, **variables)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_the_command_explains_itself():
    done = run_gateway("--help")
    assert done.returncode == 0 and "MMDET3D_SERVE_GATEWAY_BATCH_POINTS" in done.stdout

"""Options of the gateway: where they come from, and which of them contradict each other."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from serve.cli.flags import add_flags, add_help_all, values_of
from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions

ROOT = Path(__file__).parents[2]
VARIABLE = "MMDET3D_SERVE_GATEWAY_"


def parse(*argv: str, prefix: str = "") -> GatewayOptions:
    made = parser(prefix)
    return GatewayOptions.build(
        values_of(made.parse_args(argv), GatewayOptions), {}, flag_prefix=f"--{prefix}"
    )


def parser(prefix: str = "") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="gateway")
    add_help_all(made)
    add_flags(made, GatewayOptions, title="gateway", prefix=prefix)
    return made


def test_flag_goes_before_variable_and_that_before_the_default():
    options = GatewayOptions.build(
        {"batch_points": "10"},
        {
            f"{VARIABLE}BATCH_POINTS": "20",
            f"{VARIABLE}PORT": "9000",
            f"{VARIABLE}CORS_ORIGINS": "http://a, http://b",
        },
    )
    assert (options.batch_points, options.port, options.batch_frames) == (
        10,
        9000,
        GatewayOptions.batch_frames,
    )
    assert options.cors_origins == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_bytes": 64 << 20}, "batch_bytes=67108864 must leave 64 KiB of backend_request_bytes"),
        ({"max_frame_bytes": 49 << 20}, "max_frame_bytes=.* is over batch_bytes"),
        ({"max_body_bytes": 1 << 20}, "max_body_bytes=.* is below max_frame_bytes"),
        ({"max_pending_bytes": 63 << 20}, "max_pending_bytes=.* is below max_body_bytes"),
        ({"max_pending_frames": 63}, "max_pending_frames=63 is below max_frames_per_request"),
        ({"timeout_s": 301.0}, "timeout_s=301 is over max_timeout_s"),
        ({"cors_origins": ("*",), "api_keys": ("k",)}, "list the origins"),
        ({"batch_frames": 0}, "batch_frames must be a whole number of at least 1 and at most 4096, got 0$"),
        ({"timeout_s": 0.0}, r"timeout_s must be .* got 0\.0"),
        ({"timeout_s": float("nan")}, "timeout_s must be .* got nan"),
        ({"timeout_s": float("inf")}, "timeout_s must be .* got inf"),
        ({"graceful_timeout_s": -1.0}, "graceful_timeout_s must be .* at least 0"),
        ({"port": 65536}, "port must be .* at most 65535"),
        ({"port": -1}, "port must be .* at least 0"),
        ({"inference_url": "localhost:8080"}, "inference_url must start with http.* got 'localhost:8080'"),
        ({"log_format": "xml"}, "log_format must be json or text, got 'xml'"),
        ({"log_level": "loud"}, "log_level must be"),
        ({"host": ""}, "host must be a value"),
        ({"api_keys_file": ""}, "api_keys_file must be a path"),
    ],
)
def test_values_that_contradict_each_other_or_their_range_are_refused(changes, named):
    with pytest.raises(SettingsError, match=named):
        GatewayOptions(**changes)


@pytest.mark.parametrize(
    ("flags", "variables", "named"),
    [
        (
            {"batch_bytes": "99999999"},
            {},
            "^--gateway-batch-bytes=99999999 must leave 64 KiB of backend_request",
        ),
        ({}, {"BATCH_BYTES": "99999999"}, f"^{VARIABLE}BATCH_BYTES=99999999 must leave"),
        ({}, {"LINGER_S": "x"}, f"^{VARIABLE}LINGER_S must be"),
        (
            {"timeout_s": "9"},
            {"MAX_TIMEOUT_S": "8"},
            f"^--gateway-timeout-s=9 is over {VARIABLE}MAX_TIMEOUT_S=8$",
        ),
        ({"cors_origins": "*", "api_keys_file": "k"}, {}, r"^--gateway-cors-origins=\* "),
        ({}, {"CORS_ORIGINS": "*", "API_KEYS": "k"}, rf"^{VARIABLE}CORS_ORIGINS=\* "),
    ],
)
def test_contradiction_names_each_option_as_it_was_written(flags, variables, named):
    environ = {f"{VARIABLE}{name}": text for name, text in variables.items()}
    with pytest.raises(SettingsError, match=named):
        GatewayOptions.build(flags, environ, flag_prefix="--gateway-")


def test_fixed_value_goes_before_a_flag_and_is_named_by_its_field():
    options = GatewayOptions.build({"port": "1"}, {f"{VARIABLE}PORT": "2"}, fixed={"port": 3})
    assert options.port == 3
    with pytest.raises(SettingsError, match=r"^port must be"):
        GatewayOptions.build({"port": "1"}, {}, fixed={"port": -1})


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"BATCH_POINT": "1"}, f"unknown setting {VARIABLE}BATCH_POINT; did you mean {VARIABLE}BATCH_POINTS"),
        ({"MAX_FRAME_BYTE": "1"}, "did you mean MMDET3D_SERVE_MAX_FRAME_BYTES"),
        ({"BATCH_POINTS": "many"}, rf"{VARIABLE}BATCH_POINTS must be .*\(POINTS\), got 'many'"),
        ({"TIMEOUT_S": "soon"}, r"must be a number .*\(S\)"),
    ],
)
def test_variables_that_are_unknown_or_no_numbers_are_refused(variables, said):
    with pytest.raises(SettingsError, match=said):
        GatewayOptions.build({}, {f"{VARIABLE}{name}": text for name, text in variables.items()})


def test_wrong_flag_is_named_as_it_was_written():
    with pytest.raises(SettingsError, match=r"--batch-points must be .* got '1\.5'"):
        parse("--batch-points", "1.5")
    with pytest.raises(SettingsError, match=r"--gateway-batch-points must be"):
        parse("--gateway-batch-points", "1.5", prefix="gateway-")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--uri-private-hosts"], "uri_private_hosts", True),
        (["--uri-private-hosts", "true"], "uri_private_hosts", True),
        (["--uri-private-hosts", "false"], "uri_private_hosts", False),
        (["--no-uri-private-hosts"], "uri_private_hosts", False),
        (["--cors-origins", "http://a,http://b", "--cors-origins", "http://c"], "cors_origins",
         ("http://a", "http://b", "http://c")),
        (["--worker-sockets", "none"], "worker_sockets", None),
        (["--worker-sockets", "/run/w"], "socket_folder", Path("/run/w")),
        (["--worker-sockets", "/run/w", "--no-direct-batches"], "socket_folder", None),
        (["--direct-batches", "false"], "direct_batches", False),
        ([], "worker_sockets", "auto"),
    ],
)  # fmt: skip
def test_flags_become_values(argv, field, value):
    assert getattr(parse(*argv), field) == value


@pytest.mark.parametrize(
    ("former", "now", "field"),
    [
        ("--linger-s", "--shutdown-delay-s", "shutdown_delay_s"),
        ("--drain-s", "--graceful-timeout-s", "graceful_timeout_s"),
        ("--head-timeout-s", "--header-timeout-s", "header_timeout_s"),
        ("--receive-timeout-s", "--body-timeout-s", "body_timeout_s"),
        ("--early-s", "--lead-time-s", "lead_time_s"),
        ("--batches-ahead", "--prefetch-batches", "prefetch_batches"),
        ("--connection-requests", "--max-requests-per-connection", "max_requests_per_connection"),
        ("--stall-s", "--stall-timeout-s", "stall_timeout_s"),
    ],
)
def test_former_flag_works_with_a_warning_and_is_not_in_the_help(former, now, field, caplog):
    assert getattr(parse(former, "7"), field) == 7
    assert f"{former} is now {now}" in caplog.text
    assert former not in parser().format_help()


def test_help_shows_the_common_options_and_help_all_every_one_with_unit_and_default(capsys):
    common = parser().format_help()
    with pytest.raises(SystemExit):
        parser().parse_args(["--help-all"])
    everything = capsys.readouterr().out
    shown = 0
    for each in GatewayOptions.options():
        flag = f"--{each.name.replace('_', '-')}"
        if each.name == "api_keys" or each.private:
            assert f"{flag} " not in everything  # a process list shows arguments
            continue
        assert f"{flag} {each.unit}".strip() in everything, flag
        assert (f"  {flag} " in common) == each.common, flag
        shown += each.common
    assert 15 <= shown <= 25
    assert "33554432, 32 MiB" in everything


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
        (["--batch-bytes", "99999999"], {}, "error: --batch-bytes=99999999 must leave 64 KiB"),
        (
            ["--port", "x"],
            {},
            "error: --port must be a whole number of at least 0 and at most 65535 (PORT), got 'x'",
        ),
        ([], {"gateway_max_frame_byte": "1"}, "did you mean MMDET3D_SERVE_MAX_FRAME_BYTES?"),
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
        (["--refused-file", "x"], {}, "unrecognized arguments"),
        (["--address-file", "x"], {}, "unrecognized arguments"),
    ],
)
def test_command_refuses_to_start_with_a_sentence_and_exit_code_2(arguments, variables, said):
    done = run_gateway(*arguments, **variables)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_private_entry_of_the_supervisor_refuses_a_person():
    done = subprocess.run(
        [sys.executable, "-m", "serve.cli.gateway"],
        cwd=ROOT, input="hello", capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "mmdet3d-serve gateway" in done.stderr


def test_command_explains_itself():
    done = run_gateway("--help")
    assert done.returncode == 0 and "MMDET3D_SERVE_GATEWAY_BATCH_POINTS" in done.stdout

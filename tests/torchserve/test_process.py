"""A real TorchServe starts, answers, says why it cannot, and ends without leaving a process or a file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.cli import run
from serve.cli import serve as serving
from serve.errors import BackendStartError, ModelNotFound, NotReady, SettingsError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions, stop_running
from serve.torchserve import supervisor as supervision
from serve.torchserve.config import Manifest, log_configuration, properties, read_manifest
from serve.torchserve.java import child_environment
from serve.torchserve.log import WorkerLog
from serve.torchserve.management import split_url
from serve.torchserve.pidfile import write_pidfile
from tests.conftest import pick_free_ports, write_archive

ECHO = "tests.torchserve.echo_handler"
REFUSING = "tests.torchserve.refusing_handler"
BYTES = {"Content-Type": "application/octet-stream"}
GONE_S = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_archive(folder / "echo.mar", ECHO)
    write_archive(folder / "refusing.mar", REFUSING)
    (folder / "torn.mar").write_bytes((folder / "echo.mar").read_bytes()[:-30])
    return folder


def options_for(store: Path, root: Path, *models: str, **more: object) -> TorchServeOptions:
    inference, management, metrics = pick_free_ports(3)
    return TorchServeOptions(
        **{
            "model_store": store,
            "models": tuple(ServedModel.parse(model) for model in models),
            "inference_port": inference,
            "management_port": management,
            "metrics_port": metrics,
            "run_root": root,
            "max_request_bytes": 1 << 20,
            "system_metrics": False,
            **more,
        }
    )


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    root = tmp_path_factory.mktemp("run")
    one = TorchServe(options_for(store, root, "echo"))
    one.start()
    yield one
    one.stop(drain_s=0)
    assert list(root.iterdir()) == []


def post(server: TorchServe, body: bytes = b"abc", model: str = "echo", **headers: str) -> httpx.Response:
    address = f"{server.inference_url}/predictions/{model}"
    return httpx.post(address, content=body, headers={**BYTES, **headers}, timeout=30, trust_env=False)


def family(server: TorchServe) -> list[psutil.Process]:
    """Java and its workers."""
    assert server.pid is not None
    java = psutil.Process(server.pid)
    return [java, *java.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=GONE_S)[1]


# A running server


@pytest.mark.torchserve
def test_started_server_answers_at_once(server: TorchServe) -> None:
    answer = post(server)
    assert (answer.status_code, answer.json()) == (200, {"body": 3})
    assert [worker.ready for worker in server.workers("echo")] == [True]
    assert server.models() == ["echo"]
    assert server.poll() is None


@pytest.mark.torchserve
def test_handler_status_and_body_reach_the_client(server: TorchServe) -> None:
    answer = post(server, **{"x-status": "422"})
    assert (answer.status_code, answer.reason_phrase, answer.json()) == (422, "As Asked", {"body": 3})
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.torchserve
def test_broken_json_body_reaches_the_handler_as_bytes(server: TorchServe) -> None:
    answer = post(server, b'{"a": ', **{"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (200, {"body": 6})


@pytest.mark.torchserve
def test_oversized_body_gets_413_and_the_server_continues(server: TorchServe) -> None:
    assert post(server, b"0" * (server.options.max_request_bytes + 1)).status_code == 413
    assert post(server, b"0" * (server.options.max_request_bytes - 1)).status_code == 200


@pytest.mark.torchserve
def test_metrics_port_counts_requests(server: TorchServe) -> None:
    post(server)
    told = httpx.get(f"{server.metrics_url}/metrics", trust_env=False).text
    assert 'ts_inference_requests_total{model_name="echo"' in told


@pytest.mark.torchserve
def test_only_loopback_addresses_listen(server: TorchServe) -> None:
    ports = {server.options.inference_port, server.options.metrics_port}
    listening = [
        connection.laddr
        for process in family(server)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ports <= {address.port for address in listening}
    assert server.options.management_port not in {address.port for address in listening}  # it is a socket
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.torchserve
def test_model_is_registered_and_unregistered_at_run_time(server: TorchServe) -> None:
    server.register(ServedModel("echo.mar", name="second"))
    assert post(server, model="second").status_code == 200
    server.unregister("second")
    assert server.models() == ["echo"]
    with pytest.raises(ModelNotFound):
        server.workers("second")


@pytest.mark.torchserve
def test_model_that_fails_to_load_is_not_registered_and_reports_why(server: TorchServe) -> None:
    with pytest.raises(
        BackendStartError, match=r"^model refusing did not load: weights.safetensors has the wrong"
    ):
        server.register(ServedModel("refusing.mar"))
    assert server.models() == ["echo"]


@pytest.mark.torchserve
def test_archives_cannot_be_loaded_from_urls(server: TorchServe) -> None:
    for address in ("http://127.0.0.1:1/x.mar", f"file://{server.options.model_store}/echo.mar"):
        base, management = split_url(server.management_url)
        with httpx.Client(transport=httpx.HTTPTransport(uds=management)) as client:
            asked = client.post(f"{base}/models", params={"url": address})
        assert (asked.status_code, "does not match any allowed" in asked.text) == (404, True)


@pytest.mark.torchserve
def test_management_has_no_port_and_a_socket_of_this_user_alone(server: TorchServe) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{server.options.management_port}/models", trust_env=False)
    _, management = split_url(server.management_url)
    assert management is not None and server.run_dir is not None
    assert Path(management).parent == server.run_dir and server.run_dir.stat().st_mode & 0o077 == 0
    assert post(server).status_code == 200  # predictions need no token


@pytest.mark.torchserve
def test_killed_worker_is_replaced(server: TorchServe) -> None:
    [killed] = server.workers("echo")
    assert killed.pid is not None
    psutil.Process(killed.pid).kill()
    for _ in range(2):  # The first may be lost with the worker; the next waits for the new one.
        answer = post(server)
    assert answer.status_code == 200
    assert server.workers("echo")[0].pid != killed.pid


@pytest.mark.torchserve
def test_two_servers_run_side_by_side_and_one_stops_cleanly(
    server: TorchServe, store: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    with TorchServe(options_for(store, tmp_path, "twin=echo.mar"), stages.append) as twin:
        assert [stage.split()[0] for stage in stages] == ["starting", "loading"] and "twin" in stages[1]
        assert post(twin, model="twin").status_code == 200
        assert post(server, model="twin").status_code == 404
        processes = family(twin)
    assert all_gone(processes)
    assert list(tmp_path.iterdir()) == []
    assert post(server).status_code == 200
    with pytest.raises(NotReady):
        twin.workers("twin")


@pytest.mark.torchserve
def test_token_authorization_rejects_requests_without_token(store: Path, tmp_path: Path) -> None:
    with TorchServe(options_for(store, tmp_path, "echo", token_authorization=True)) as server:
        assert post(server).status_code == 400
        assert post(server, Authorization=f"Bearer {server.tokens()['inference']}").status_code == 200
        assert httpx.get(f"{server.management_url}/models", trust_env=False).status_code == 400
        assert server.models() == ["echo"]


# Servers that do not start


@pytest.mark.torchserve
def test_handler_that_rejects_its_archive_fails_the_start_with_its_message(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackendStartError) as caught:
        TorchServe(options_for(store, tmp_path, "refusing")).start()
    reason = "weights.safetensors has the wrong hash; convert the model again"
    assert str(caught.value) == f"model refusing did not load: {reason}"
    assert "Traceback" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "reason"),
    [("torn", "torn.mar is not a readable archive"), ("absent", "there is no archive absent.mar")],
)
def test_broken_or_missing_archive_fails_before_java_starts(
    store: Path, tmp_path: Path, model: str, reason: str
) -> None:
    with pytest.raises(BackendStartError, match=reason):
        TorchServe(options_for(store, tmp_path, model)).start()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", ["inference", "management", "metrics"])
def test_busy_port_is_named_with_its_setting(store: Path, tmp_path: Path, use: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(BackendStartError, match=rf"port {port} .* set {use}_port \(--{use}-port\)"):
            options = {f"{use}_port": port, "token_authorization": use == "management"}
            TorchServe(options_for(store, tmp_path, "echo", **options)).start()


@pytest.mark.torchserve
def test_java_start_failure_reports_its_output(store: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendStartError, match="Unrecognized option: --no-such-option"):
        TorchServe(options_for(store, tmp_path, java_options=["--no-such-option"])).start()
    assert list(tmp_path.iterdir()) == []


# Servers that end otherwise than by stop()


@pytest.mark.torchserve
def test_poll_reports_killed_java_and_its_workers_exit(store: Path, tmp_path: Path) -> None:
    with TorchServe(options_for(store, tmp_path, "echo")) as server:
        processes = family(server)
        assert server.poll() is None
        processes[0].kill()
        assert server.wait(GONE_S) == -signal.SIGKILL
        assert all_gone(processes)
        with pytest.raises(NotReady):
            server.models()
    assert server.poll() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torchserve
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part in this is Linux's")
def test_java_and_workers_exit_with_their_guard(store: Path, tmp_path: Path) -> None:
    with TorchServe(options_for(store, tmp_path, "echo")) as server:
        processes = family(server)
        guard = processes[0].parent()
        assert guard is not None
        guard.kill()
        assert all_gone(processes)
        assert server.wait(GONE_S) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torchserve
def test_no_process_outlives_a_killed_parent(store: Path, tmp_path: Path) -> None:
    options = options_for(store, tmp_path, "echo")
    program = f"""
from pathlib import Path
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
server = TorchServe(TorchServeOptions(
    Path({str(store)!r}), [ServedModel("echo.mar")], run_root=Path({str(tmp_path)!r}),
    inference_port={options.inference_port}, management_port={options.management_port},
    metrics_port={options.metrics_port}))
server.start()
print(server.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    ) as parent:
        assert parent.stdout is not None
        java = psutil.Process(int(parent.stdout.readline()))
        guard = java.parent()
        assert guard is not None
        processes = [guard, java, *java.children(recursive=True)]
        parent.kill()
    assert all_gone(processes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torchserve
def test_serve_command_runs_until_stop_command(
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, ready = tmp_path / "state", threading.Event()
    # The tiny archive is not one of ours, and the gateway would not serve it.
    monkeypatch.setattr(supervision, "examine", lambda store, models: (list(models), []))
    tell = serving._print_ready
    monkeypatch.setattr(serving, "_print_ready", lambda *arguments: (tell(*arguments), ready.set()))
    ended: list[str] = []

    def stop_when_ready() -> None:
        assert ready.wait(60)
        ended.extend(stop_running(state))

    stopper = threading.Thread(target=stop_when_ready)
    stopper.start()
    inference, management, metrics = pick_free_ports(3)
    ports = [
        "--inference-port",
        f"{inference}",
        "--management-port",
        f"{management}",
        "--metrics-port",
        f"{metrics}",
    ]
    where = ["--store", str(store), "--state-dir", str(state)]
    assert run(serving.main, [*where, *ports, "--models", "echo", "--no-gateway"]) == 0
    stopper.join()
    assert ended == [f"http://127.0.0.1:{inference}"]
    assert list(state.iterdir()) == []
    assert f"curl -T FRAME http://127.0.0.1:{inference}/predictions/echo" in capsys.readouterr().out


def test_serve_command_rejects_a_foreign_archive(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(serving.main, ["--store", str(store), "--models", "echo"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {store / 'echo.mar'}: ") and "mmdet3d-serve" in told


def test_stop_running_spares_foreign_processes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        write_pidfile(tmp_path, stranger.pid, "http://127.0.0.1:8080")
        assert stop_running(tmp_path) == []
        assert stranger.poll() is None
        stranger.kill()
    assert list(tmp_path.iterdir()) == []


# What TorchServe is told


def test_properties_close_management_and_metrics(tmp_path: Path) -> None:
    options = TorchServeOptions(tmp_path, [ServedModel("a.mar", workers=2)], gpus=1)
    told = dict(line.split("=", 1) for line in properties(options, [Manifest("a", "1.0", "h")]).splitlines())
    assert told["inference_address"] == "http://127.0.0.1:8080"
    assert told["management_address"] == "http://127.0.0.1:8081"
    assert told["disable_token_authorization"] == "true"
    opened = properties(TorchServeOptions(tmp_path, open_management=True), [])
    assert "disable_token_authorization=false" in opened.splitlines()
    assert told["metrics_address"] == "http://127.0.0.1:8082"
    assert told["metrics_mode"] == "prometheus"
    assert told["allowed_urls"] == "(?!)"
    assert told["decode_input_request"] == told["install_py_dep_per_model"] == "false"
    assert told["max_request_size"] == str(64 << 20)
    assert told["number_of_gpu"] == "1"
    assert told["system_metrics_cmd"].endswith("--gpu 0")  # Else it wants nvgpu and collects nothing at all.
    assert told["load_models"] == "a=a.mar"
    assert json.loads(told["models"])["a"]["1.0"]["minWorkers"] == 2
    assert json.loads(told["models"])["a"]["1.0"]["batchSize"] == 1


def test_path_round_trips_through_java_properties(tmp_path: Path) -> None:
    store = tmp_path / "模型 store\\x"
    store.mkdir()
    text = properties(TorchServeOptions(store), [])
    assert text.isascii()
    line = next(line for line in text.splitlines() if line.startswith("model_store="))
    assert line.endswith(r"\u6a21\u578b store\\x")


def test_log_configuration_is_well_formed_for_any_folder(tmp_path: Path) -> None:
    import xml.etree.ElementTree as tree

    text = log_configuration(
        TorchServeOptions(tmp_path, log_level="warn"), tmp_path / 'a&"<b' / "torchserve.log"
    )
    root = tree.fromstring(text.encode())
    assert root.find("Appenders/RollingFile").get("fileName") == str(tmp_path / 'a&"<b' / "torchserve.log")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"inference_port": 0}, "inference_port must be .* at least 1"),
        ({"metrics_port": 8080}, "must differ"),
        ({"management_host": "0.0.0.0"}, "open_management"),
        ({"inference_host": "localhost"}, "must be an IP address"),
        ({"max_request_bytes": 1 << 31}, "max_request_bytes"),
        ({"response_timeout_s": 0}, "response_timeout_s must be .* at least 1"),
    ],
)
def test_impossible_settings_are_rejected(tmp_path: Path, setting: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        TorchServeOptions(tmp_path, **setting)


@pytest.mark.parametrize("text", ["../x.mar", "a=b,c.mar", "a/b=c.mar", "", "=x.mar"])
def test_archive_names_outside_the_store_are_rejected(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--models must be"):
        ServedModel.parse(text)


def test_duplicate_model_version_is_rejected(tmp_path: Path) -> None:
    options = TorchServeOptions(tmp_path, [ServedModel("a.mar"), ServedModel("b.mar")])
    with pytest.raises(SettingsError, match="twice"):
        properties(options, [Manifest("a", "1.0", "h"), Manifest("a", "1.0", "h")])


def test_read_manifest_returns_model_version_and_handler(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.mar", ECHO, name="second", version="2.1")
    assert read_manifest(path) == Manifest("second", "2.1", ECHO)


# What its log says


def logged(path: Path, *messages: tuple[str, str, str]) -> None:
    with path.open("a") as log:
        for thread, logger, message in messages:
            log.write(f"2026-01-01T00:00:00,000 INFO [{thread}] {logger}: {message}\n")


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "torchserve.log"


STDOUT = "W-9000-second_1.0-stdout"


def test_load_failure_reason_is_the_last_exception_of_the_worker(log_path: Path) -> None:
    log = WorkerLog(log_path)
    assert log.failure({"second"}) is None
    logged(
        log_path,
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", '  File "x.py", line 1'),
        (STDOUT, "MODEL_LOG", "KeyError: 'a'"),
        (STDOUT, "MODEL_LOG", "During handling of the above exception, another exception occurred:"),
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "ValueError: no such layer: neck.0"),
        (STDOUT, "MODEL_LOG", "Backend worker process died."),
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "RuntimeError: 500 - Unknown exception"),
        ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
        (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
    )
    failure = log.failure({"second"})
    assert failure is not None
    assert (failure.model, failure.reason) == ("second", "ValueError: no such layer: neck.0")


DEATH = (
    ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
    (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
)


def test_worker_that_dies_silently_twice_is_reported(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve.torchserve.log.time.monotonic", lambda: now)
    log = WorkerLog(log_path)
    for second_at in (101.0, 200.0):
        logged(log_path, *DEATH)
        assert log.failure({"second"}) is None
        now = second_at
    failure = log.failure({"second"})
    assert failure is not None
    assert "out of memory" in failure.reason


def test_reason_lost_with_the_first_death_is_read_from_the_second(log_path: Path) -> None:
    """TorchServe stops reading when it notices that a worker is gone, whatever the pipe still holds."""
    log = WorkerLog(log_path)
    logged(log_path, (STDOUT, "MODEL_LOG", "model_name: second, batchSize: 1"), *DEATH)
    assert log.failure({"second"}) is None
    logged(
        log_path,
        (STDOUT, "MODEL_LOG", "Traceback (most recent call last):"),
        (STDOUT, "MODEL_LOG", "serve.errors.ArchiveError: weights.safetensors has the wrong hash"),
        *DEATH,
    )
    failure = log.failure({"second"})
    assert failure is not None
    assert failure.reason == "weights.safetensors has the wrong hash"


def test_death_of_another_model_is_not_the_reason(log_path: Path) -> None:
    log = WorkerLog(log_path)
    logged(
        log_path,
        ("W-9000-second_1.0", "WorkerThread", "Retry worker: 9000 in 1 seconds."),
        (STDOUT, "WorkerLifeCycle", f"Stopped Scanner - {STDOUT}"),
    )
    assert log.failure({"other"}) is None
    log.discard()
    assert log.failure({"second"}) is None


def test_child_environment_has_the_package_and_no_torchserve_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/before")
    environment = child_environment()
    assert "TS_CONFIG_FILE" not in environment
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/before"
    assert (Path(environment["PYTHONPATH"].split(os.pathsep)[0]) / "serve" / "__init__.py").is_file()


def test_free_ports_are_different(free_ports: Callable[[int], list[int]]) -> None:
    assert len(set(free_ports(20))) == 20

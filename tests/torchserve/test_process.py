"""A real TorchServe starts, answers, says why it cannot, and ends without leaving a process or a file."""

from __future__ import annotations

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
from serve.errors import BackendStartError, ModelNotFound, NotReady
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions, stop_running
from serve.torchserve import supervisor as supervision
from serve.torchserve.java import child_environment
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


def test_free_ports_are_different(free_ports: Callable[[int], list[int]]) -> None:
    assert len(set(free_ports(20))) == 20

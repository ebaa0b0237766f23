"""TorchServe and the gateway as one service: what happens when either ends, and how both end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.errors import ArchiveError, BackendStartError, ModelNotFound, ModelNotLoaded, SettingsError
from serve.gateway.listener import bind
from serve.synthetic.scenes import sample_frame
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.log import WorkerLog
from serve.torchserve.management import Worker
from serve.torchserve.supervisor import Service, archives_of, examine, gateway_options
from tests.conftest import pick_free_ports

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


class Up:
    """``python -m serve serve --container`` as a container runs it, and what it says."""

    def __init__(self, store: Path, home: Path, **environment: str) -> None:
        self.ports = pick_free_ports(4)
        inference, management, metrics, gateway = self.ports
        self.url = f"http://127.0.0.1:{gateway}"
        self.inference_url = f"http://127.0.0.1:{inference}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "serve", "serve", "--container", "--store", str(store),
                "--inference-port", str(inference), "--management-port", str(management),
                "--metrics-port", str(metrics), "--gateway-port", str(gateway),
            ],
            cwd=ROOT,
            env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def await_ready(self, seconds: float = 120) -> None:
        wait_until(
            lambda: self.process.poll() is not None or any("Ctrl-C" in line for line in self.lines), seconds
        )
        assert self.process.poll() is None, self.text()
        wait_until(lambda: httpx.get(f"{self.url}/health/ready").status_code == 200, 20)

    def child(self, what: str) -> psutil.Process:
        """The gateway, or TorchServe's Java."""
        everything = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = [each for each in everything if what in each.cmdline() or each.name() == what]
        return found

    def worker(self) -> psutil.Process:
        """The process that has the model."""
        everything = psutil.Process(self.process.pid).children(recursive=True)
        (found,) = [
            one for one in everything if any("model_service_worker" in word for word in one.cmdline())
        ]
        return found

    def text(self) -> str:
        return "".join(self.lines)

    def end(self) -> int:
        code = self.process.wait(60)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def up(demo_store: Path, tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(store: Path = demo_store, **environment: str) -> Up:
        started.append(Up(store, tmp_path, **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.end()


@pytest.fixture(scope="module")
def demo_store(demo_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one archive, the demo's."""
    store = tmp_path_factory.mktemp("store")
    shutil.copy(demo_mar, store)
    return store


def test_sigterm_under_load_loses_no_request_and_ends_with_0(up: Callable[..., Up]) -> None:
    service = up()
    service.await_ready()
    frame = sample_frame()
    statuses: list[int] = []

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            statuses.append(client.post(f"{service.url}/predictions/second", content=frame).status_code)

    worker = service.worker()
    worker.suspend()  # so that none of the eight is answered before the last has come
    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers:
        asker.start()
    wait_until(lambda: "mmdet3d_serve_pending_frames 8.0" in httpx.get(f"{service.url}/metrics").text, 10)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining" in service.text(), 10)
    worker.resume()
    for asker in askers:
        asker.join(60)
    assert service.end() == 0, service.text()
    assert statuses == [200] * 8
    assert not any(port_is_open(port) for port in service.ports)


def port_is_open(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/")
    except httpx.ConnectError:
        return False
    return True


@pytest.mark.parametrize("turned_off", [False, True])
def test_batches_go_to_the_worker_directly_unless_turned_off(up: Callable[..., Up], turned_off: bool) -> None:
    service = up(**({"MMDET3D_SERVE_GATEWAY_DIRECT_BATCHES": "false"} if turned_off else {}))
    service.await_ready()
    frame = sample_frame()
    through = httpx.post(f"{service.inference_url}/predictions/second", content=frame, timeout=60)
    answer = httpx.post(f"{service.url}/predictions/second", content=frame, timeout=60)
    assert answer.status_code == 200 and answer.content == through.content
    counts = httpx.get(f"http://127.0.0.1:{service.ports[2]}/metrics").text.splitlines()
    counted = sum(
        float(line.rpartition(" ")[2]) for line in counts if line.startswith("ts_inference_requests_total{")
    )
    assert counted == (2 if turned_off else 1)
    assert ("to the socket of worker" in service.text()) != turned_off


@pytest.mark.parametrize("which", ["gateway", "java"])
def test_the_death_of_either_process_ends_the_service_with_an_error(
    up: Callable[..., Up], which: str
) -> None:
    service = up()
    service.await_ready()
    everything = psutil.Process(service.process.pid).children(recursive=True)
    service.child("serve.cli.gateway" if which == "gateway" else which).kill()
    assert service.end() == 128 + signal.SIGKILL
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert not alive
    assert "ended by itself" in service.text()


def test_nothing_outlives_a_supervisor_that_is_killed(up: Callable[..., Up]) -> None:
    service = up()
    service.await_ready()
    everything = psutil.Process(service.process.pid).children(recursive=True)
    service.process.kill()
    service.end()
    _, alive = psutil.wait_procs(everything, timeout=30)
    assert not alive


def test_a_wrong_setting_is_a_sentence_and_2(up: Callable[..., Up]) -> None:
    service = up(MMDET3D_SERVE_GATEWAY_BATCH_POINTZ="5")
    assert service.end() == 2
    assert (
        "unknown setting MMDET3D_SERVE_GATEWAY_BATCH_POINTZ; did you mean MMDET3D_SERVE_GATEWAY_BATCH_POINTS?"
        in (service.text())
    )
    assert "starting TorchServe" not in service.text()


def test_a_taken_port_of_the_gateway_ends_the_start_before_torchserve_starts(tmp_path: Path) -> None:
    (tmp_path / "bad.mar").write_bytes(b"PK")  # which would end the start of TorchServe
    options = TorchServeOptions(tmp_path, [ServedModel("bad.mar")])
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}"):
            Service(options, gateway_options(options, {"port": port})).start()


def test_bad_archives_are_refused_with_a_reason_and_the_others_serve(
    up: Callable[..., Up], demo_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(demo_store, store)
    (store / "foreign.mar").write_bytes(b"PK not really")
    damaged = bytearray((demo_store / "second.mar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (store / "damaged.mar").write_bytes(damaged)
    of_another_version(demo_store / "second.mar", store / "future.mar", format=2, serve_version="9.0.0")
    service = up(store)
    service.await_ready()
    models = {
        entry.get("archive") or entry["name"]: entry for entry in httpx.get(f"{service.url}/models").json()
    }
    assert models["second"]["status"] == "ready"
    assert "9.0.0" in models["future.mar"]["reason"]
    for name in ("foreign.mar", "damaged.mar", "future.mar"):
        assert models[name]["status"] == "refused" and models[name]["reason"]
        assert f"{name} is rejected: " in service.text()
    assert (
        httpx.post(f"{service.url}/predictions/second", content=sample_frame(), timeout=60).status_code == 200
    )


def of_another_version(path: Path, out: Path, **changes: object) -> None:
    """The archive as a later version might have written it."""
    with zipfile.ZipFile(path) as known, zipfile.ZipFile(out, "w") as made:
        for entry in known.namelist():
            body = known.read(entry)
            if entry == "model.json":
                body = json.dumps({**json.loads(body), **changes}).encode()
            made.writestr(entry, body)


def test_an_empty_store_serves_the_demo(up: Callable[..., Up], tmp_path: Path) -> None:
    service = up(tmp_path / "nothing-here")
    service.await_ready()
    assert "serving the demo SECOND" in service.text()
    answer = httpx.post(f"{service.url}/predictions/second", content=sample_frame(), timeout=60).json()
    assert len(answer["bboxes_3d"]) > 2


def test_open_management_asks_for_tokens_and_the_gateway_has_them(up: Callable[..., Up]) -> None:
    service = up(MMDET3D_SERVE_OPEN_MANAGEMENT="1")
    service.await_ready()
    management = f"http://127.0.0.1:{service.ports[1]}/models"
    assert httpx.get(management).status_code == 400
    assert httpx.get(management, headers={"authorization": "Bearer guess"}).status_code >= 400
    assert (
        httpx.post(f"{service.url}/predictions/second", content=sample_frame(), timeout=60).status_code == 200
    )


def test_a_named_archive_that_is_damaged_ends_the_start(demo_store: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mar").write_bytes(b"PK")
    with pytest.raises(ArchiveError, match=r"bad\.mar"):
        Service(TorchServeOptions(tmp_path, [ServedModel("bad.mar")]), None).start()
    with pytest.raises(BackendStartError, match=r"no model .* bad\.mar"):
        Service(TorchServeOptions(tmp_path, [ServedModel("bad.mar")]), None, lenient=True).start()


def test_archives_are_examined_one_by_one(demo_store: Path, tmp_path: Path) -> None:
    shutil.copy(demo_store / "second.mar", tmp_path / "a.mar")
    (tmp_path / "b.mar").write_bytes(b"")
    good, rejected = examine(tmp_path, archives_of(tmp_path, workers=2))
    assert [(model.archive, model.workers) for model in good] == [("a.mar", 2)]
    assert [each.archive for each in rejected] == ["b.mar"]
    assert json.dumps(rejected[0].reason)


def test_model_that_torchserve_does_not_register_is_known_by_its_archive(tmp_path, monkeypatch):
    """So that the supervisor can serve the others without it."""

    def workers(model: str, version: str) -> list[Worker]:
        raise ModelNotFound(model)

    server = TorchServe(TorchServeOptions(tmp_path, [ServedModel("other.mar")]))
    monkeypatch.setattr(server, "workers", workers)
    monkeypatch.setattr(server, "_archives", {"odd": "odd.mar"})
    monkeypatch.setattr(server, "_log", WorkerLog(tmp_path / "log"))
    with pytest.raises(ModelNotLoaded, match="rejected model odd") as raised:
        server._await_workers([("odd", "1.0", 1)], deadline=float("inf"))
    assert raised.value.archive == "odd.mar"

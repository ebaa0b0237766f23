"""Targets of the serving benchmark: servers started on free ports of loopback.

One TorchServe holds the model once per batch setting; the gateway stands in front of the one without batching. The
peers LitServe, mosec and BentoML run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from serve.errors import BackendStartError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tools.bench.serving.load import Load
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess, pause, resume

__all__ = [
    "GATEWAY",
    "GATEWAY_HTTP",
    "PEERS",
    "Target",
    "TargetSet",
    "Workload",
    "free_ports",
    "sleep_archive",
]

GATEWAY = "gateway + TorchServe"
# Without the worker sockets: every batch goes through TorchServe's port.
GATEWAY_HTTP = "gateway + TorchServe, HTTP"
# Package and extra arguments of each peer. mosec waits 10 ms for a batch to fill by default and 1 ms at least.
PEERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LitServe": ("litserve", ()),
    "mosec, 10 ms": ("mosec", ("10",)),
    "mosec, 1 ms": ("mosec", ("1",)),
    "BentoML": ("bentoml", ()),
}
READY_S = 60.0
_APPS = "tools.bench.serving.peers"
_BOUNDARY = "frame-of-the-benchmark"


@dataclass(frozen=True)
class Workload:
    """Model that all targets serve.

    Attributes:
        name: name of the model.
        archive: archive for TorchServe.
        peer_model: model of the peers: ``sleep``, or the folder of an unpacked archive.
        batches: settings of TorchServe's own batching to measure, (batchSize, maxBatchDelay in ms).
        reports_batch: whether answers report the size of their frame and of their batch.
    """

    name: str
    archive: Path
    peer_model: str
    batches: Sequence[tuple[int, int]]
    reports_batch: bool


@dataclass
class Target:
    """One running server.

    Attributes:
        name: name in the tables.
        port: port on 127.0.0.1.
        path: path of predictions.
        groups: leaders' ids of all process groups that work for this target.
        own: those groups that no other target uses.
        form: whether a frame is sent as a part of a form instead of the body.
    """

    name: str
    port: int
    path: str
    groups: tuple[int, ...]
    own: tuple[int, ...] = ()
    form: bool = False

    def load(self, body: Path, expect: Mapping[str, object]) -> Load:
        """Create a load without clients or rate; `body` is the file with the frame."""
        if not self.form:
            headers = {"content-type": "application/octet-stream"}
            return Load("127.0.0.1", self.port, self.path, str(body), headers, expect=expect)
        form = body.with_suffix(".form")
        if not form.exists():
            head = (
                f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="frames"; filename="frame.bin"\r\n'
                "content-type: application/octet-stream\r\n\r\n"
            )
            form.write_bytes(head.encode() + body.read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode())
        headers = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}
        return Load("127.0.0.1", self.port, self.path, str(form), headers, expect=expect)


@dataclass
class TargetSet:
    """All targets of one workload; a context manager. `skipped` has the reasons of peers that cannot start.

    Args:
        workload: model to serve.
        bench_python: Python of the peers.
        only: names of targets to start; empty for all.
        announce: called with the name of each server that is started.
    """

    workload: Workload
    bench_python: Path
    only: Sequence[str] = ()
    announce: Callable[[str], None] = lambda text: None
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> TargetSet:
        try:
            self._start_torchserve()
            for name, (package, settings) in PEERS.items():
                if self._is_selected(name):
                    try:
                        self._start_peer(name, package, settings)
                    except BackendStartError as error:
                        self.skipped[name] = str(error)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.run_only(None)
        self._stack.close()

    def await_ready(self, load: LoadProcess, body: Path, expect: Mapping[str, object]) -> None:
        """Send requests to each target until it answers; skip one that does not in time."""
        for target in [*self.targets]:
            deadline = time.monotonic() + READY_S
            request = target.load(body, expect)
            once = Load(
                **{**request.__dict__, "clients": 1, "warmup_s": 0.0, "seconds": 5.0, "max_requests": 1}
            )
            while not (measured := load.measure(once)).answered:
                if time.monotonic() > deadline or not _alive(target):
                    self.targets.remove(target)
                    self.skipped[target.name] = f"no correct response: {dict(measured.failures)}"
                    break
                time.sleep(0.2)
            for group in target.own:
                pause(group)  # a server that spins when idle would slow down the start of the next

    def run_only(self, chosen: Target | None) -> None:
        """Pause every process group that does not work for `chosen`; None resumes all."""
        for target in self.targets:
            for group in target.groups:
                if chosen is None or group in chosen.groups:
                    resume(group)
                else:
                    pause(group)

    def _is_selected(self, name: str) -> bool:
        return not self.only or name in self.only

    def _start_torchserve(self) -> None:
        inference, management, metrics = free_ports(3)
        names = {(1, 1): "TorchServe batch 1"}
        names |= {
            (size, delay): f"TorchServe batch {size}, {delay} ms" for size, delay in self.workload.batches
        }
        selected = {key: name for key, name in names.items() if key == (1, 1) or self._is_selected(name)}
        models = {key: f"{self.workload.name}-{key[0]}-{key[1]}" for key in selected}
        served = {key: ServedModel(self.workload.archive.name, name=model) for key, model in models.items()}
        options = TorchServeOptions(
            self.workload.archive.parent,
            [served[1, 1]],
            inference_port=inference,
            management_port=management,
            metrics_port=metrics,
            system_metrics=False,
        )
        self.announce("TorchServe")
        server = self._stack.enter_context(TorchServe(options))
        assert server.pid is not None
        for key, model in served.items():  # one by one: many workers at once start slowly on few cores
            if key != (1, 1):
                self.announce(f"TorchServe, {model.name}")
                server.register(model, batch_size=key[0], max_batch_delay_ms=key[1])
        for key, name in selected.items():
            if self._is_selected(name):
                path = f"/predictions/{models[key]}"
                self.targets.append(Target(name, inference, path, (server.pid,)))
        for name, how in (
            (GATEWAY, ["--worker-sockets", str(server.worker_sockets)]),
            (GATEWAY_HTTP, ["--no-direct-batches"]),
        ):
            if self._is_selected(name):
                self.announce(name)
                command = [sys.executable, "-m", "serve", "gateway", "--port", "0"]
                command += [
                    "--inference-url",
                    server.inference_url,
                    "--management-url",
                    server.management_url,
                ]
                command += how
                gateway = self._stack.enter_context(ManagedProcess("the gateway", command))
                port = int(gateway.wait_for("gateway      ", READY_S).rpartition(":")[2])
                path = f"/predictions/{models[1, 1]}"
                self.targets.append(Target(name, port, path, (server.pid, gateway.pid), own=(gateway.pid,)))

    def _start_peer(self, name: str, package: str, settings: Sequence[str]) -> None:
        python = self.bench_python
        if not python.exists():
            raise BackendStartError(f"{python} does not exist; create it with `make bench-env`")
        found = subprocess.run(
            [python, "-c", f"import {package}"], capture_output=True, text=True, check=False
        )
        if found.returncode:
            errors = found.stderr.strip().splitlines() or [f"cannot import {package}"]
            raise BackendStartError(f"{errors[-1]}; `make bench-env` installs it")
        self.announce(name)
        (port,) = free_ports(1)
        if package == "bentoml":
            command = [str(python.with_name("bentoml")), "serve", f"{_APPS}.bentoml_app:Frames"]
            command += [
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--arg",
                f"model={self.workload.peer_model}",
            ]
        else:
            command = [str(python), "-m", f"{_APPS}.{package}_app", str(port), self.workload.peer_model]
            command += settings
        server = self._stack.enter_context(ManagedProcess(name, command))
        self.targets.append(
            Target(name, port, "/predict", (server.pid,), own=(server.pid,), form=package == "bentoml")
        )


def sleep_archive(
    folder: Path, version: str = "1.0", handler: str = "tools.bench.serving.sleep_handler"
) -> Path:
    """Write a TorchServe archive of the sleep model, with a module of its handler."""
    path = folder / f"sleep-{version}.mar"
    model = {"modelName": "sleep", "modelVersion": version, "handler": handler}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
    return path


def _alive(target: Target) -> bool:
    try:
        for group in target.groups:
            os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Find unused ports of loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()

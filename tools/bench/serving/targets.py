"""The servers that are compared, started on free ports of loopback and ended again.

One TorchServe holds the model once per batch setting; the gateway stands in front of the one that does not
batch. LitServe, mosec and BentoML run in an environment of their own. Knows how each is started and asked,
and nothing of what is measured.
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
from tools.bench.serving.process import Guarded, pause, resume

__all__ = ["FOREIGN", "GATEWAY", "GATEWAY_HTTP", "Contender", "Field", "Subject", "slept_archive"]

GATEWAY = "gateway + TorchServe"
# The same without the workers' sockets: every batch through TorchServe's port.
GATEWAY_HTTP = "gateway + TorchServe, HTTP"
# The servers that are not ours: package, and what is added to their command. mosec waits 10 ms for a batch to fill
# unless it is told otherwise; 1 ms is the least it takes.
FOREIGN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LitServe": ("litserve", ()),
    "mosec, 10 ms": ("mosec", ("10",)),
    "mosec, 1 ms": ("mosec", ("1",)),
    "BentoML": ("bentoml", ()),
}
READY_S = 60.0
_APPS = "tools.bench.serving.peers"
_BOUNDARY = "frame-of-the-benchmark"


@dataclass(frozen=True)
class Subject:
    """What all of them serve.

    Attributes:
        name: of the model.
        archive: for TorchServe.
        foreign_model: how the other servers' model is named: ``slept``, or the folder of an unpacked archive.
        batches: TorchServe's own batching to measure, as (batchSize, maxBatchDelay in ms).
        answers_batch: the answers say what size they were measured at and how large their batch was.
    """

    name: str
    archive: Path
    foreign_model: str
    batches: Sequence[tuple[int, int]]
    answers_batch: bool


@dataclass
class Contender:
    """One server, ready.

    Attributes:
        name: as the table has it.
        port: on 127.0.0.1.
        path: of predictions.
        groups: process groups, by the id of their leader; all of them work for this one.
        own: those of them that are not another contender's too.
        form: takes a frame as a part of a form, not as the body.
    """

    name: str
    port: int
    path: str
    groups: tuple[int, ...]
    own: tuple[int, ...] = ()
    form: bool = False

    def load(self, body: Path, expect: Mapping[str, object]) -> Load:
        """A request to it, without clients or rate yet; `body` is the file with the frame."""
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
class Field:
    """All contenders of one subject; a context manager. Who cannot start is named in `skipped`, with the reason.

    Args:
        subject: what they serve.
        bench_python: the Python of the other servers.
        only: names of contenders to take, or all.
        say: told what is being started.
    """

    subject: Subject
    bench_python: Path
    only: Sequence[str] = ()
    say: Callable[[str], None] = lambda text: None
    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Field:
        try:
            self._start_torchserve()
            for name, (package, settings) in FOREIGN.items():
                if self._wanted(name):
                    try:
                        self._start_foreign(name, package, settings)
                    except BackendStartError as error:
                        self.skipped[name] = str(error)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.only_runs(None)
        self._stack.close()

    def await_answers(self, load: LoadProcess, body: Path, expect: Mapping[str, object]) -> None:
        """Ask each until it answers; one that does not in time is skipped."""
        for contender in [*self.contenders]:
            deadline = time.monotonic() + READY_S
            request = contender.load(body, expect)
            once = Load(**{**request.__dict__, "clients": 1, "warm_s": 0.0, "seconds": 5.0, "most": 1})
            while not (measured := load.measure(once)).answered:
                if time.monotonic() > deadline or not _alive(contender):
                    self.contenders.remove(contender)
                    self.skipped[contender.name] = f"it gave no right answer: {dict(measured.failures)}"
                    break
                time.sleep(0.2)
            for group in contender.own:
                pause(group)  # one that spins when idle would keep the next from loading

    def only_runs(self, chosen: Contender | None) -> None:
        """Pause all that does not work for `chosen`; with None, let all go on."""
        for contender in self.contenders:
            for group in contender.groups:
                if chosen is None or group in chosen.groups:
                    resume(group)
                else:
                    pause(group)

    def _wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def _start_torchserve(self) -> None:
        inference, management, metrics = _free_ports(3)
        names = {(1, 1): "TorchServe batch 1"}
        names |= {
            (size, delay): f"TorchServe batch {size}, {delay} ms" for size, delay in self.subject.batches
        }
        wanted = {key: name for key, name in names.items() if key == (1, 1) or self._wanted(name)}
        models = {key: f"{self.subject.name}-{key[0]}-{key[1]}" for key in wanted}
        served = [
            ServedModel(self.subject.archive.name, name=model, batch_size=size, max_batch_delay_ms=delay)
            for (size, delay), model in models.items()
        ]
        options = TorchServeOptions(
            self.subject.archive.parent,
            served[:1],
            inference_port=inference,
            management_port=management,
            metrics_port=metrics,
            system_metrics=False,
        )
        self.say("TorchServe")
        server = self._stack.enter_context(TorchServe(options))
        assert server.pid is not None
        for model in served[1:]:  # one by one: all workers at once take long to start on few cores
            self.say(f"TorchServe, {model.name}")
            server.register(model)
        for key, name in wanted.items():
            if self._wanted(name):
                path = f"/predictions/{models[key]}"
                self.contenders.append(Contender(name, inference, path, (server.pid,)))
        for name, sockets in ((GATEWAY, str(server.worker_sockets)), (GATEWAY_HTTP, "none")):
            if self._wanted(name):
                self.say(name)
                command = [sys.executable, "-m", "serve", "gateway", "--port", "0"]
                command += [
                    "--inference-url",
                    server.inference_url,
                    "--management-url",
                    server.management_url,
                ]
                command += ["--worker-sockets", sockets]
                gateway = self._stack.enter_context(Guarded("the gateway", command))
                port = int(gateway.wait_for("gateway      ", READY_S).rpartition(":")[2])
                path = f"/predictions/{models[1, 1]}"
                self.contenders.append(
                    Contender(name, port, path, (server.pid, gateway.pid), own=(gateway.pid,))
                )

    def _start_foreign(self, name: str, package: str, settings: Sequence[str]) -> None:
        python = self.bench_python
        if not python.exists():
            raise BackendStartError(f"{python} is not there; make it with `make bench-env`")
        found = subprocess.run(
            [python, "-c", f"import {package}"], capture_output=True, text=True, check=False
        )
        if found.returncode:
            said = found.stderr.strip().splitlines() or ["it cannot be imported"]
            raise BackendStartError(f"{said[-1]}; `make bench-env` installs it")
        self.say(name)
        (port,) = _free_ports(1)
        if package == "bentoml":
            command = [str(python.with_name("bentoml")), "serve", f"{_APPS}.bentoml_app:Frames"]
            command += [
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--arg",
                f"model={self.subject.foreign_model}",
            ]
        else:
            command = [str(python), "-m", f"{_APPS}.{package}_app", str(port), self.subject.foreign_model]
            command += settings
        server = self._stack.enter_context(Guarded(name, command))
        self.contenders.append(
            Contender(name, port, "/predict", (server.pid,), own=(server.pid,), form=package == "bentoml")
        )


def slept_archive(folder: Path) -> Path:
    """An archive for TorchServe around the model that sleeps."""
    path = folder / "slept.mar"
    model = {"modelName": "slept", "modelVersion": "1.0", "handler": "tools.bench.serving.sleep_handler"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
    return path


def _alive(contender: Contender) -> bool:
    try:
        for group in contender.groups:
            os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()

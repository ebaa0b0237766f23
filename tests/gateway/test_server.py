"""Lifecycle of the real process: start, serve, drain, exit; and its cost when idle."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.gateway import raw
from tests.gateway.fake_torchserve import answer_for
from tests.gateway.running import eventually

ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    popen: subprocess.Popen[str]
    url: str

    def post(self, frame: bytes) -> httpx.Response:
        return httpx.post(f"{self.url}/predictions/second", content=frame, trust_env=False, timeout=30)

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/health/ready", trust_env=False, timeout=5).status_code == 200

    def end(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(20)


@pytest.fixture
def start(backend) -> Iterator[Callable[..., Process]]:
    """`start("--graceful-timeout-s", "2")`: the gateway as its command starts it."""
    started: list[subprocess.Popen[str]] = []

    urls = ("--inference-url", backend.url, "--management-url", backend.url)

    def launch(*arguments: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-m", "serve", "gateway", "--port", "0", *urls, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(popen)
        assert popen.stderr is not None
        line_with_url = next((line for line in popen.stderr if line.startswith("gateway ")), "")
        found = re.search(r"http://\S+", line_with_url)
        assert found, f"it did not start: {popen.wait(10)}"
        threading.Thread(target=popen.stderr.read, daemon=True).start()
        process = Process(popen, found[0])
        eventually(process.ready)
        return process

    yield launch
    backend.release()
    for popen in started:
        popen.kill()
        popen.wait()
        assert popen.stderr is not None
        eventually(lambda popen=popen: popen.stderr.closed or _closed(popen))


def _closed(popen: subprocess.Popen[str]) -> bool:
    popen.stderr.close()
    return True


def asked(process: Process, frame: bytes) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(process.post(frame))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


@pytest.mark.timing
def test_idle_gateway_uses_no_cpu_and_does_not_import_torch(start, cloud):
    process = start()
    assert process.post(cloud(1)).content == answer_for(cloud(1), {})
    watched = psutil.Process(process.popen.pid)
    with httpx.Client(base_url=process.url, trust_env=False) as client:  # an open connection is idle as well
        client.get("/health/live")
        before = watched.cpu_times()
        time.sleep(2)  # the measurement itself
        after = watched.cpu_times()
    spent_ms = 1e3 * (after.user + after.system - before.user - before.system)
    print(f"idle for 2 s: {spent_ms:.0f} ms of CPU, {watched.memory_info().rss >> 20} MiB")
    assert spent_ms < 20
    assert not [file.path for file in watched.memory_maps() if "libtorch" in file.path]
    assert process.end() == 0


def test_sigterm_ends_an_idle_gateway_with_exit_code_0(start, cloud):
    process = start()
    with httpx.Client(base_url=process.url, trust_env=False) as client:
        client.get("/health/live")
        began = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_draining_finishes_requests_in_flight_and_accepts_no_more(start, backend, cloud, number):
    process = start()
    backend.hold()
    thread, answers = asked(process, cloud(1))
    eventually(lambda: backend.app.held == 1)
    process.popen.send_signal(number)

    def refused() -> bool:
        try:
            with raw.connected(process.url):
                return False
        except OSError:
            return True

    eventually(refused)
    with pytest.raises(subprocess.TimeoutExpired):  # a drain too short for any frame would have ended it
        process.popen.wait(2.5)
    assert not answers
    backend.release()
    thread.join()
    assert answers[0].content == answer_for(cloud(1), {})
    assert process.popen.wait(10) == 0


def test_shutdown_delay_answers_requests_but_fails_readiness(start, cloud):
    process = start("--shutdown-delay-s", "300")
    process.popen.send_signal(signal.SIGTERM)
    eventually(lambda: not process.ready())
    assert process.post(cloud(1)).status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(10) == 0


def test_request_over_the_graceful_timeout_is_dropped_with_exit_code_1(start, backend, cloud):
    process = start("--graceful-timeout-s", "1")
    backend.hold()
    thread, answers = asked(process, cloud(1))
    eventually(lambda: backend.app.held == 1)
    began = time.monotonic()
    assert process.end() == 1
    assert time.monotonic() - began < 10
    thread.join()
    assert isinstance(answers[0], Exception) or answers[0].status_code >= 500


def test_second_signal_ends_at_once(start, backend, cloud):
    process = start()
    backend.hold()
    thread, _ = asked(process, cloud(1))
    eventually(lambda: backend.app.held == 1)
    process.popen.send_signal(signal.SIGTERM)
    time_of_first = time.monotonic()
    eventually(lambda: not _accepts(process))
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(10) != 0
    assert time.monotonic() - time_of_first < 10
    thread.join()


def _accepts(process: Process) -> bool:
    try:
        with raw.connected(process.url):
            return True
    except OSError:
        return False


def test_used_port_is_reported_with_exit_code_2(start):
    port = start().url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "serve", "gateway", "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (
        done.returncode == 2
        and f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr
    )

"""Several gateway processes on one port (`--gateways`), seen from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.siblings import merge_metrics
from serve.settings.environment import child_environment
from tests.gateway.conftest import NO_TLS, FakeBackend
from tests.gateway.fake_torchserve import answer_for
from tests.gateway.running import eventually

pytestmark = pytest.mark.slow


@contextmanager
def gateways(backend: FakeBackend, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Two gateway processes in front of the fake TorchServe; yields their URL and the process that started them."""
    command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--gateways", "2", *flags]
    command += ["--inference-url", backend.url, "--management-url", backend.url]
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        url = next(line.split()[1] for line in lines if line.startswith("gateway "))
        drain = ThreadPoolExecutor(1)
        drain.submit(process.stderr.read)
        eventually(lambda: get(url, "/health/ready").status_code == 200)
        yield url, process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        drain.shutdown()
        process.stderr.close()


def get(url: str, path: str) -> httpx.Response:
    """A GET on a connection of its own, so that any of the processes may answer."""
    return httpx.get(url + path, trust_env=False, verify=NO_TLS)


def post(url: str, body: bytes) -> httpx.Response:
    return httpx.post(f"{url}/predictions/second", content=body, trust_env=False, verify=NO_TLS, timeout=20)


def requests_by_process(url: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(get(url, "/metrics").text):
        for sample in family.samples:
            if sample.name == "mmdet3d_serve_requests_total" and sample.labels["model"] == "second":
                found[sample.labels["gateway"]] = found.get(sample.labels["gateway"], 0) + sample.value
    return found


def test_requests_spread_over_the_processes_and_metrics_name_each(backend, cloud):
    with gateways(backend) as (url, _):
        for number in range(40):
            assert post(url, cloud(number)).content == answer_for(cloud(number), {})
        counted = requests_by_process(url)
    assert {*counted} == {"0", "1"} and sum(counted.values()) == 40
    assert min(counted.values()) >= 5, counted


def test_track_sessions_are_refused_by_each_process(backend, cloud):
    with gateways(backend) as (url, _):
        query = "?track_session=drive&track_start=true"
        answers = [
            httpx.post(f"{url}/predictions/second{query}", content=cloud(1), trust_env=False, verify=NO_TLS)
            for _ in range(6)
        ]
        assert {answer.status_code for answer in answers} == {400}
        assert "--gateways 1" in answers[0].json()["error"]["message"]


def test_killed_process_is_started_again_and_the_other_answers_meanwhile(backend, cloud):
    with gateways(backend) as (url, process):
        first = {child.pid for child in psutil.Process(process.pid).children()}
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(killed))
        assert post(url, cloud(1)).content == answer_for(cloud(1), {})

        def restarted() -> bool:
            now = {child.pid for child in psutil.Process(process.pid).children()}
            return len(now) == 2 and killed not in now and {*_processes(url)} == {"0", "1"}

        eventually(restarted, 20.0)
        assert post(url, cloud(2)).content == answer_for(cloud(2), {})


def _processes(url: str) -> set[str]:
    return set(re.findall(r'gateway="(\d)"', get(url, "/metrics").text))


def test_sigterm_drains_all_processes(backend, torchserve, cloud):
    with gateways(backend) as (url, process):
        children = psutil.Process(process.pid).children()
        backend.hold()
        with ThreadPoolExecutor(12) as clients:
            pending = [clients.submit(post, url, cloud(number)) for number in range(12)]
            # Each process has a batch at the worker, and the rest in its queue.
            eventually(lambda: torchserve.held >= 2)
            eventually(lambda: sum(_pending(url)) == 12)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: _refused(url))
            backend.release()
            assert [each.result().content for each in pending] == [
                answer_for(cloud(number), {}) for number in range(12)
            ]
        assert process.wait(20) == 0
    assert not any(child.is_running() for child in children)


def _pending(url: str) -> list[float]:
    text = get(url, "/metrics").text
    return [float(value) for value in re.findall(r"^mmdet3d_serve_pending_frames\{.*\} (\S+)$", text, re.M)]


def _refused(url: str) -> bool:
    try:
        get(url, "/health/live")
    except httpx.TransportError:
        return True
    return False


def test_stuck_batch_of_one_process_shows_in_the_readiness_of_all(backend, torchserve, cloud):
    with gateways(backend, "--stall-timeout-s", "0.2") as (url, _), ThreadPoolExecutor(1) as client:
        backend.hold()
        stuck = client.submit(post, url, cloud(1))
        eventually(lambda: torchserve.held == 1)
        eventually(lambda: get(url, "/health/ready").status_code == 503)
        # Asked over and over, on a new connection each, both processes are reached.
        assert {get(url, "/health/ready").status_code for _ in range(12)} == {503}
        backend.release()
        assert stuck.result().status_code == 200
        eventually(lambda: {get(url, "/health/ready").status_code for _ in range(4)} == {200})


def test_option_that_the_processes_refuse_ends_the_command(backend, tmp_path):
    command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--gateways", "2"]
    command += ["--backend-key-file", str(tmp_path / "none.json")]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "none.json" in ended.stderr


def test_merged_metrics_keep_types_and_name_their_process():
    text = b'# HELP a_total A.\n# TYPE a_total counter\na_total{model="m"} 2.0\n'
    merged = merge_metrics({"0": text, "1": text.replace(b"2.0", b"3.0")}).decode()
    assert merged.count("# TYPE a_total counter") == 1
    assert 'a_total{gateway="0",model="m"} 2.0' in merged and 'a_total{gateway="1",model="m"} 3.0' in merged
